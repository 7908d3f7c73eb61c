"""Torch devices by name."""

import torch


def device_named(name: str) -> torch.device:
    """Parse the name of a torch device, whether or not this machine has it.

    Raises:
        ValueError: If torch does not know the device.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        hint = "; did you mean cuda?" if name.partition(":")[0].lower() in ("gpu", "nvidia", "0", "1") else ""
        raise ValueError(
            f"device must be auto or a torch device such as cpu, cuda, cuda:1 or mps, got {name!r}{hint}"
        ) from None
    if device.type == "meta":
        raise ValueError("device must not be the meta device, got 'meta'; use auto")
    return device


def choose_device(name: str) -> torch.device:
    """Return the device for `auto` or the name of a torch device, and check that this machine has it.

    Raises:
        ValueError: If torch does not know the device, or this machine does not have it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = device_named(name)
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = f"torch {torch.__version__} finds no {'GPU' if device.type == 'cuda' else 'device of this type'}"
        if device.type == "cuda" and torch.cuda.is_available():
            reason = f"torch.cuda.device_count() is {torch.cuda.device_count()}"
        raise ValueError(f"device must be available, got {name!r}, but {reason}; use auto") from error

    return device
