"""Torch device and training precision of a run, and a clock that waits for the device."""

import time
from contextlib import nullcontext

import torch
from torch import Tensor

from snella.ops import has_bfloat16_instructions, widest_dtype
from snella_app.text import first_line

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def parse_device(name: str) -> torch.device:
    """Parse a torch device name without checking availability.

    Raises:
        ValueError: If the name is not a torch device, or is `meta`.
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
    """Resolve `auto` or a torch device name, and check that the device is available.

    Raises:
        ValueError: If the device is unknown or unavailable.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = parse_device(name)
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        kind = "GPU" if device.type == "cuda" else "device of this type"
        reason = f"torch {torch.__version__} finds no {kind}"
        if device.type == "cuda" and torch.cuda.is_available():
            count = torch.cuda.device_count()
            is_missing = (device.index or 0) >= count
            reason = f"torch.cuda.device_count() is {count}" if is_missing else first_line(error)
        raise ValueError(f"device={name} is not available: {reason}; use auto") from error
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """Resolve the precision `auto`; other names are returned unchanged.

    `auto` selects bf16 on CUDA GPUs and CPUs with bfloat16 instructions; otherwise, it selects fp32.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        with torch.cuda.device(device):
            is_supported = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        is_supported = device.type == "cpu" and has_bfloat16_instructions()
    return "bf16" if is_supported else "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast | nullcontext[None]:
    """Return the autocast context of a precision, which does nothing for fp32."""
    return torch.autocast(device.type, _HALF[precision]) if precision in _HALF else nullcontext()


def move_to(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to a device. A float64 tensor becomes float32 if the device does not support float64."""
    return tensor.to(device, widest_dtype(device.type) if tensor.dtype == torch.float64 else tensor.dtype)


def synchronized_time(device: torch.device) -> float:
    """Wait for pending CUDA work, which runs asynchronously, and then return the time in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
