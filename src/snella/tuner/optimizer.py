"""An optimiser with the right rate for each kind of parameter."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from snella.tuner.layer import SnellaLayer
from snella.tuner.tokens import token_adapters

_FACTORS = ("snella_A", "snella_B")


def create_snella_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer] = AdamW,
    *,
    lr: float,
    scalar_lr: float = 1e-4,
    head_lr: float | None = None,
    weight_decay: float = 0.0,
    head_weight_decay: float | None = None,
    **optimizer_kwargs: Any,
) -> Optimizer:
    """Create an optimiser whose parameter groups suit a SNELLA model, in the manner of `peft.optimizers`.

    The kernels' scalars need a small rate of their own and no weight decay: `β` shifts every entry of `ΔW` alike and
    an adaptive optimiser moves it by one learning rate a step, so that at the factors' rate it soon exceeds the
    kernel's own spread, and a coefficient `α_p` = ±0.1 flips its sign.

    Args:
        model: Any model; parameters that are not SNELLA's (the head) form groups of their own.
        optimizer_cls: Class of the optimiser.
        lr: Rate of the factors `A` and `B`.
        scalar_lr: Rate of `α`, `β`, `α_p` and the temperature.
        head_lr: Rate of everything else that is trained, default `lr`.
        weight_decay: Weight decay of the factors.
        head_weight_decay: Weight decay of the other weights, default `weight_decay`; never on biases, norms and tokens.
        optimizer_kwargs: Passed on.

    Returns:
        An optimiser with the groups `factors`, `scalars`, `head` and `head_no_decay`, as far as they have parameters.

    Raises:
        ValueError: Nothing in the model is trainable.
    """
    factors: list[nn.Parameter] = []
    scalars: list[nn.Parameter] = []
    for module in model.modules():
        if isinstance(module, SnellaLayer):
            for attribute in module.adapter_layer_names:
                kind = factors if attribute in _FACTORS else scalars
                kind.extend(p for p in getattr(module, attribute).values() if p.requires_grad)
    of_adapter = {id(parameter) for parameter in (*factors, *scalars)}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in of_adapter]
    tokens = {id(p) for token in token_adapters(model) for p in token.snella_token.values()}
    decayed = [p for p in others if p.ndim > 1 and id(p) not in tokens]
    not_decayed = [p for p in others if p.ndim <= 1 or id(p) in tokens]
    rate = lr if head_lr is None else head_lr
    decay = weight_decay if head_weight_decay is None else head_weight_decay
    groups = [
        {"name": "factors", "params": factors, "lr": lr, "weight_decay": weight_decay},
        {"name": "scalars", "params": scalars, "lr": scalar_lr, "weight_decay": 0.0},
        {"name": "head", "params": decayed, "lr": rate, "weight_decay": decay},
        {"name": "head_no_decay", "params": not_decayed, "lr": rate, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError(
            f"{type(model).__name__} has no trainable parameter; wrap it with get_peft_model(model, SnellaConfig(…)) "
            "and check that the adapter is active and not in inference mode"
        )
    return optimizer_cls(groups, **optimizer_kwargs)
