"""Optimizers of whatever a method trains, and what changes how the model around it is trained."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from peft import PeftModel
from timm.layers import DropPath
from timm.models import group_parameters
from torch import nn
from torch.optim import AdamW, Optimizer

from snella import create_snella_optimizer
from snella.layer import SnellaLayer
from snella_app.config import TrainConfig
from snella_app.methods import method_of, spec_of
from snella_app.methods.model_parts import base_model, find_blocks, is_inside

_PACKAGE = "bitsandbytes"


def build_low_bit_optimizer(
    model: nn.Module, wanted: str, device: torch.device, *, lr: float, scalar_lr: float | None, weight_decay: float
) -> tuple[Optimizer, str]:
    """Make the optimizer for whatever is trainable.

    Args:
        model: From `adapt_headless`, on its device.
        wanted: `auto`, `adamw` or `adamw8bit`.
        device: Where it trains.
        lr: Learning rate of the factors, or of all weights that are trained.
        scalar_lr: Learning rate of the kernels' scalars (SNELLA, SNELL); the optimizer's default if None.
        weight_decay: Decoupled weight decay; none on the scalars.

    Returns:
        The optimizer, and its name, with the reason for a fallback.

    Raises:
        ImportError: `adamw8bit` was asked for and bitsandbytes is missing or does not run here.
    """
    kind, name = _choose(wanted, device)
    if any(isinstance(module, SnellaLayer) for module in model.modules()):
        scalars: dict[str, Any] = {} if scalar_lr is None else {"scalar_lr": scalar_lr}
        return create_snella_optimizer(model, kind, lr=lr, weight_decay=weight_decay, **scalars), name
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return kind(trained, lr=lr, weight_decay=weight_decay), name  # type: ignore[call-arg]


def _choose(wanted: str, device: torch.device) -> tuple[type[Optimizer], str]:
    """The class that `auto`, `adamw` or `adamw8bit` means here, and its human-readable name."""
    if wanted == "adamw":
        return AdamW, "AdamW"
    try:
        kind: type[Optimizer] = importlib.import_module(_PACKAGE).optim.AdamW8bit
        _try_out(kind, device)
        return kind, "8-bit AdamW of bitsandbytes"
    except Exception as error:
        # a library for accelerators fails in ways of its own: missing, without a kernel for this device, too old
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if wanted == "adamw8bit":
            raise ImportError(
                f"optimizer=adamw8bit needs bitsandbytes to run on {device}, but {reason}; "
                "pip install bitsandbytes, or leave it at auto"
            ) from error
        return AdamW, f"AdamW, since 8-bit AdamW does not run here ({reason})"


def _try_out(kind: type[Optimizer], device: torch.device) -> None:
    """One step on a parameter that is large enough to be kept in 8 bits."""
    parameter = nn.Parameter(torch.zeros(64, 128, device=device))
    parameter.grad = torch.ones_like(parameter)
    kind([parameter], lr=1.0).step()  # type: ignore[call-arg]
    if not bool((parameter != 0).all()):
        raise RuntimeError("its step changes nothing")


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Make AdamW for whatever is trainable; weight decay on matrices only, lower rates of earlier layers if asked for.

    Args:
        model: From `build_method`.
        config: Resolved settings; `lr` and `weight_decay` are set, `head_lr` falls back to `lr`.

    Raises:
        ValueError: Nothing is trainable, or `layer_decay` with a model whose layers timm does not number.
    """
    optimizer = _grouped_optimizer(model, config)
    if config.layer_decay is not None:
        _decay_rates(optimizer, model, config.layer_decay)
    return optimizer


def _grouped_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW with the groups of the model's method."""
    lr, weight_decay = config.lr or 0.0, config.weight_decay or 0.0
    head_lr = lr if config.head_lr is None else config.head_lr
    method = method_of(model)
    if method is not None and method.optimizer is not None:
        scalars: dict[str, Any] = {} if config.scalar_lr is None else {"scalar_lr": config.scalar_lr}
        return method.optimizer(model, torch.optim.AdamW, lr=lr, head_lr=head_lr, weight_decay=weight_decay, **scalars)
    head = ("base_model.model." if isinstance(model, PeftModel) else "") + spec_of(model).head
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((is_inside(name, head), parameter.ndim > 1), []).append(parameter)
    if not groups:
        raise ValueError(f"method {spec_of(model).name!r} leaves nothing to train in {type(model).__name__}")
    return torch.optim.AdamW(
        [
            {"params": params, "lr": head_lr if in_head else lr, "weight_decay": weight_decay if is_matrix else 0.0}
            for (in_head, is_matrix), params in sorted(groups.items(), key=lambda item: item[0])
        ]
    )


def _decay_rates(optimizer: Optimizer, model: nn.Module, decay: float) -> None:
    """Split each group by layers, whose learning rates are `lr · decay^(layers behind it)`.

    Layers are numbered as timm does it for its own layer-wise decay: stem, blocks, head; what a method adds to a block
    belongs to the block.
    """
    base = base_model(model)
    if not callable(getattr(base, "group_matcher", None)):
        raise ValueError(
            f"layer_decay needs a timm model, which numbers its layers, got {type(base).__name__}; leave it out"
        )
    numbers = group_parameters(base, base.group_matcher(coarse=False), reverse=True)  # type: ignore[operator]
    last = max(numbers.values())
    depth = {id(parameter): last - numbers[name] for name, parameter in base.named_parameters() if name in numbers}
    groups = []
    for group in optimizer.param_groups:
        by_depth: dict[int, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_depth.setdefault(depth.get(id(parameter), 0), []).append(parameter)
        groups += [
            {**group, "params": parameters, "lr": group["lr"] * decay**behind}
            for behind, parameters in sorted(by_depth.items())
        ]
    optimizer.param_groups[:] = groups


def set_drop_path(model: nn.Module, head: str, rate: float) -> None:
    """Let a backbone drop its residual branches: from 0 in the first block to `rate` in the last, linearly.

    Args:
        model: A backbone with its head, changed in place.
        head: Name of the head.
        rate: Probability of an image's branch to be left out, in [0, 1).

    Raises:
        ValueError: The backbone's blocks have no place for it.
    """
    blocks = find_blocks(model, head)
    places = 0
    for number, (_, block) in enumerate(blocks):
        for name in ("drop_path", "drop_path1", "drop_path2"):
            if isinstance(getattr(block, name, None), nn.Identity | DropPath):
                setattr(block, name, DropPath(rate * number / max(len(blocks) - 1, 1)))
                places += 1
    if not places:
        raise ValueError(
            f"drop_path needs a backbone whose blocks have residual branches that can be dropped, got "
            f"{type(model).__name__}; leave it out"
        )


def checkpoint_gradients(model: nn.Module) -> None:
    """Keep the inputs of a backbone's blocks alone for the backward pass, and compute the rest again.

    Args:
        model: From `build_method`, changed in place.

    Raises:
        ValueError: The backbone cannot do so.
    """
    base = base_model(model)
    for part in (base, getattr(base, "encoder", None)):
        if callable(setting := getattr(part, "set_grad_checkpointing", None)):
            try:
                setting(True)
                return
            except AssertionError:  # timm's, of a model that has the function and not the thing
                break
    raise ValueError(
        f"grad_checkpointing needs a backbone that can compute activations again, got {type(base).__name__}; "
        "leave it out, and lower --batch-size with --accumulate instead"
    )
