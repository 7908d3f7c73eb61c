"""Devices by name."""

import torch


def device_named(name: str) -> torch.device:
    """The device of torch that has this name, which need not be in this machine.

    Raises:
        ValueError: torch knows no such device.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        hint = "; did you mean cuda?" if name.partition(":")[0].lower() in ("gpu", "nvidia", "0", "1") else ""
        raise ValueError(
            f"device must be auto or a device of torch such as cpu, cuda, cuda:1 or mps, got {name!r}{hint}"
        ) from None
    if device.type == "meta":
        raise ValueError("device must be one that computes, got 'meta'; leave it at auto")
    return device


def choose_device(name: str) -> torch.device:
    """The device that `auto` or a name of torch means here.

    Raises:
        ValueError: torch does not know it, or it is not in this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = device_named(name)
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = f"torch {torch.__version__} sees no {'GPU' if device.type == 'cuda' else 'such device'}"
        if device.type == "cuda" and torch.cuda.is_available():
            reason = f"torch sees {torch.cuda.device_count()} of them, from cuda:0"
        raise ValueError(f"device must be usable here, got {name!r}, but {reason}; leave it at auto") from error
    return device
