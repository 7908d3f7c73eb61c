"""The optimiser of a run: AdamW with groups of their own for factors, scalars and head."""

import torch
from peft import PeftModel
from torch import nn

from snella import create_snella_optimizer
from snella.methods import spec_of
from snella.methods.head import is_inside
from snella.training.config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Make AdamW for whatever is trainable; weight decay on matrices only.

    Args:
        model: From `build_method`.
        config: Resolved settings; `lr` and `weight_decay` are set, `head_lr` falls back to `lr`.

    Raises:
        ValueError: Nothing is trainable.
    """
    lr, weight_decay = config.lr or 0.0, config.weight_decay or 0.0
    head_lr = lr if config.head_lr is None else config.head_lr
    if spec_of(model).family in ("snella", "snell", "klora", "fixed-mask"):
        scalars = {} if config.scalar_lr is None else {"scalar_lr": config.scalar_lr}
        return create_snella_optimizer(
            model, torch.optim.AdamW, lr=lr, head_lr=head_lr, weight_decay=weight_decay, **scalars
        )
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
