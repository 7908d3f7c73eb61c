"""Optimizers, layer-wise learning rate decay, drop path and gradient checkpointing."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from timm.layers import DropPath
from timm.models import group_parameters
from torch import nn
from torch.optim import Optimizer

from snella_app.methods import method_of, spec_of
from snella_app.methods.model_parts import base_model, find_blocks, is_inside


def build_optimizer(
    model: nn.Module,
    *,
    lr: float,
    head_lr: float | None = None,
    weight_decay: float = 0.0,
    scalar_lr: float | None = None,
    layer_decay: float | None = None,
) -> torch.optim.Optimizer:
    """Build AdamW for all trainable parameters, with weight decay only on matrices and optional layer-wise decay.

    Args:
        model: Model from `build_method`.
        lr: Learning rate of the method's parameters.
        head_lr: Learning rate of the head; `lr` if None.
        weight_decay: Weight decay of matrices.
        scalar_lr: Learning rate of the scalar kernel parameters; the method's default if None.
        layer_decay: Factor of the learning rate per layer below the head; None for equal learning rates.

    Raises:
        ValueError: If no parameter is trainable, or `layer_decay` is set for a model without timm's layer numbers.
    """
    head_lr = lr if head_lr is None else head_lr
    scalars = {} if scalar_lr is None else {"scalar_lr": scalar_lr}
    method = method_of(model)
    if method is not None and method.optimizer is not None:
        rates = {"lr": lr, "head_lr": head_lr, "weight_decay": weight_decay, **scalars}
        optimizer = method.optimizer(model, torch.optim.AdamW, **rates)
    else:
        optimizer = torch.optim.AdamW(_parameter_groups(model, lr, head_lr, weight_decay))
    if layer_decay is not None:
        _decay_rates(optimizer, model, layer_decay)
    return optimizer


def _parameter_groups(model: nn.Module, lr: float, head_lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Group the trainable parameters by head and matrices."""
    head = ("base_model.model." if isinstance(model, PeftModel) else "") + spec_of(model).head
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((is_inside(name, head), parameter.ndim > 1), []).append(parameter)
    if not groups:
        raise ValueError(f"method {spec_of(model).name!r} has no trainable parameters in {type(model).__name__}")
    return [
        {"params": params, "lr": head_lr if in_head else lr, "weight_decay": weight_decay if is_matrix else 0.0}
        for (in_head, is_matrix), params in sorted(groups.items(), key=lambda item: item[0])
    ]


def _decay_rates(optimizer: Optimizer, model: nn.Module, decay: float) -> None:
    """Split each parameter group by timm's layer numbers, with learning rates `lr · decay^(layers after it)`."""
    base = base_model(model)
    if not callable(getattr(base, "group_matcher", None)):
        raise ValueError(
            f"layer_decay needs a timm model with numbered layers, got {type(base).__name__}; leave it out"
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
    """Set stochastic depth in place: the drop rate rises linearly from 0 in the first block to `rate` in the last.

    Raises:
        ValueError: If the backbone's blocks do not support drop path.
    """
    blocks = find_blocks(model, head)
    num_replaced = 0
    for number, (_, block) in enumerate(blocks):
        for name in ("drop_path", "drop_path1", "drop_path2"):
            if isinstance(getattr(block, name, None), nn.Identity | DropPath):
                setattr(block, name, DropPath(rate * number / max(len(blocks) - 1, 1)))
                num_replaced += 1
    if not num_replaced:
        raise ValueError(
            f"drop_path needs a backbone with droppable residual branches, got {type(model).__name__}; leave it out"
        )


def checkpoint_gradients(model: nn.Module) -> None:
    """Enable gradient checkpointing: save only the inputs of the backbone's blocks and recompute the rest.

    Raises:
        ValueError: If the backbone does not support gradient checkpointing.
    """
    base = base_model(model)
    for part in (base, getattr(base, "encoder", None)):
        if callable(setting := getattr(part, "set_grad_checkpointing", None)):
            try:
                setting(True)
                return
            except AssertionError:  # timm raises it for models with the method but without support
                break
    raise ValueError(
        f"grad_checkpointing needs a backbone that supports it, got {type(base).__name__}; leave it out and use a "
        "smaller --batch-size with --accumulate"
    )
