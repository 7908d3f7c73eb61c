"""Torch devices by name, and the precision of training on them."""

from contextlib import nullcontext

import torch

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


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


def choose_precision(name: str, device: torch.device) -> str:
    """Return bf16 or fp32 for `auto`, depending on whether the device multiplies bfloat16 matrices in hardware.

    Args:
        name: `OptimConfig.precision`; other names than `auto` are returned.
        device: Training device.
    """
    if name != "auto":
        return name
    return "bf16" if _has_bfloat16_products(device) else "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast | nullcontext[None]:
    """Return the autocast context of a training step; `fp32` has none."""
    return torch.autocast(device.type, _HALF[precision]) if precision in _HALF else nullcontext()


def _has_bfloat16_products(device: torch.device) -> bool:
    """Return whether bfloat16 products are faster than float32: GPUs with tensor cores for it, AVX512-BF16 and AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
