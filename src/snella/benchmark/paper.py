"""The paper's computation of a layer, done plainly: what the folded op is measured against."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from snella.ops.sparsify import quantile_threshold, sparsify
from snella.tuner.layer import SnellaLayer

_MOST_OF_QUANTILE = 2**24  # entries that torch.quantile takes


class TwoBranches(nn.Module):
    """Base layer and update as two products, the update merged by autograd under activation checkpointing.

        y = x W0ᵀ + bias + scaling·x Sᵀ,   S = sparsify(ΔW, quantile(|ΔW|, sparsity))

    The memory rule is kept by `torch.utils.checkpoint`: `ΔW` and all that leads to it are computed once in the forward
    and once more in the backward pass, each time with a sort of all magnitudes.

    Args:
        layer: An adapted linear layer; its parameters are used as they are.
        adapter_name: Which adapter.
    """

    def __init__(self, layer: SnellaLayer, adapter_name: str = "default") -> None:
        super().__init__()
        self.layer, self.adapter_name = layer, adapter_name

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply both branches, `x` `[…, n]`."""
        return self.layer.base_layer(x, *args, **kwargs) + checkpoint(self._branch, x, use_reentrant=False)

    def _branch(self, x: Tensor) -> Tensor:
        """The update's product."""
        update = self.layer._update(self.adapter_name)
        groups = []
        for factors, budget in zip(update.group_factors(), update.budgets, strict=True):
            delta = update.merge(factors)
            sparsity, magnitudes = 1 - budget / delta.numel(), delta.detach().abs().flatten()
            is_small = delta.numel() <= _MOST_OF_QUANTILE
            # torch's own, as the authors take it: ours is quicker
            threshold = torch.quantile(magnitudes, sparsity) if is_small else quantile_threshold(delta, sparsity)
            groups.append(sparsify(delta, threshold, update.mode))
        return update.scaling * F.linear(x, torch.cat(groups).to(x.dtype))


def put_two_branches(model: nn.Module) -> nn.Module:
    """Replace every adapted linear layer of `model` by its two branches, in place.

    Raises:
        TypeError: An adapted layer is not linear.
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, SnellaLayer):
            continue
        if not isinstance(module.get_base_layer(), nn.Linear):
            raise TypeError(f"the paper's computation is for linear layers, got {type(module).__name__} at {name!r}")
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, TwoBranches(module))
    return model
