"""An optimiser for models without a head: 8-bit AdamW where bitsandbytes runs, AdamW elsewhere."""

from __future__ import annotations

import importlib

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from snella import create_snella_optimizer
from snella.tuner.layer import SnellaLayer

_PACKAGE = "bitsandbytes"


def build_low_bit_optimizer(
    model: nn.Module, wanted: str, device: torch.device, *, lr: float, scalar_lr: float | None, weight_decay: float
) -> tuple[Optimizer, str]:
    """Make the optimiser for whatever is trainable.

    Args:
        model: From `adapt_headless`, on its device.
        wanted: `auto`, `adamw` or `adamw8bit`.
        device: Where it trains.
        lr: Rate of the factors, or of all weights that are trained.
        scalar_lr: Rate of the kernels' scalars (SNELLA, SNELL); a default of the optimiser's own if None.
        weight_decay: Decoupled weight decay; none on the scalars.

    Returns:
        The optimiser, and what it is, with the reason where it is not what was hoped for.

    Raises:
        ImportError: `adamw8bit` was asked for and bitsandbytes is missing or does not run here.
    """
    kind, name = _choose(wanted, device)
    if any(isinstance(module, SnellaLayer) for module in model.modules()):
        scalars = {} if scalar_lr is None else {"scalar_lr": scalar_lr}
        return create_snella_optimizer(model, kind, lr=lr, weight_decay=weight_decay, **scalars), name
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return kind(trained, lr=lr, weight_decay=weight_decay), name  # type: ignore[call-arg]


def _choose(wanted: str, device: torch.device) -> tuple[type[Optimizer], str]:
    """The class that `auto`, `adamw` or `adamw8bit` means here, and its name for people."""
    if wanted == "adamw":
        return AdamW, "AdamW"
    try:
        kind: type[Optimizer] = importlib.import_module(_PACKAGE).optim.AdamW8bit
        _try_out(kind, device)
        return kind, "8-bit AdamW of bitsandbytes"
    except Exception as fault:
        # a library for accelerators fails in ways of its own: missing, without a kernel for this device, too old
        reason = f"{type(fault).__name__}: {fault}".splitlines()[0]
        if wanted == "adamw8bit":
            raise ImportError(
                f"optimizer=adamw8bit needs bitsandbytes to run on {device}, but {reason}; "
                "pip install bitsandbytes, or leave it at auto"
            ) from fault
        return AdamW, f"AdamW, since 8-bit AdamW does not run here ({reason})"


def _try_out(kind: type[Optimizer], device: torch.device) -> None:
    """One step on a parameter that is large enough to be kept in 8 bits."""
    parameter = nn.Parameter(torch.zeros(64, 128, device=device))
    parameter.grad = torch.ones_like(parameter)
    kind([parameter], lr=1.0).step()  # type: ignore[call-arg]
    if not bool((parameter != 0).all()):
        raise RuntimeError("its step changes nothing")
