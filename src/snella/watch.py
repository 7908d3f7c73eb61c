"""Warnings about silent mistakes in training and merging."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from snella._utils import listed
from snella.cache import check_after_step

if TYPE_CHECKING:
    from snella.config import SnellaConfig
    from snella.layer import SnellaLayer

_STEPS_WITHOUT_ALLOCATOR = 2  # a script with a single step may only need its gradients
_MIN_ENTRIES = 256  # minimum for the statistical tests of new heads
_SIGMAS = 5.0  # tolerance of one comparison, in standard deviations


class TrainingWatch:
    """Warnings about silent mistakes in training one adapter.

    Each warning is issued once, except the last, which is repeated if the statistics have changed since the last save.

    - The model does not use an adapted layer.
    - No allocator reduces the budget.
    - A new head is frozen.
    - The model reads a layer's weight, which disables dropout and drop-path on the update.
    - A wrong step count leaves the budget of a saved adapter above its target.
    - Batch-norm running statistics change in training, but are not saved with the adapter.
    """

    def __init__(self) -> None:
        self.allocators: set[int] = set()
        """`id` of each attached allocator."""
        self.steps: tuple[int, int, int] | None = None
        """Completed optimizer steps, total steps, and steps per epoch; `None` if unknown or counted by a trainer."""
        self._steps_without_allocator = 0
        self._batch_counts: dict[str, int] = {}
        self._warned: set[str] = set()

    @property
    def is_attached(self) -> bool:
        """True if an allocator sets the budgets."""
        return bool(self.allocators)

    def start(
        self,
        model: nn.Module,
        adapter_name: str,
        find_layers: Callable[[nn.Module], list[SnellaLayer]],
        find_heads: Callable[[nn.Module], dict[str, nn.Linear | nn.Conv2d]],
    ) -> None:
        """Check the optimizer steps of an adapter until no checks remain.

        Args:
            model: Model with the adapter.
            adapter_name: Name of the adapter.
            find_layers: Returns the layers of a model with this adapter.
            find_heads: Returns the head layers of a model by name.
        """
        self._batch_counts = _tracked_batches(model)
        reference = weakref.ref(model)
        steps = 0
        heads: _NewHeads | None = None

        def check(optimizer: Optimizer) -> bool:
            nonlocal steps, heads
            if (model := reference()) is None:
                return True
            if steps > 1 and self.is_attached:
                return False
            layers = find_layers(model)
            if not layers:
                return True
            factors = (layer.snella_A[adapter_name] for layer in layers)
            trained = {id(factor) for factor in factors if factor.requires_grad}
            groups: list[dict[str, Any]] = []
            for group in optimizer.param_groups:
                if any(id(parameter) in trained for parameter in group["params"]):
                    groups.append(group)
            # torch.distributed.checkpoint creates an optimizer's state with a step at learning rate 0
            if all(group.get("lr") == 0 for group in groups):
                return False
            steps += 1
            if steps == 1:
                _warn_about_unused(layers)
                heads = _NewHeads(find_heads(model))
            elif heads is not None:
                _warn_about_frozen_heads(heads.frozen_and_used())
                heads = None
            return self._check_allocator(layers, adapter_name) and steps > 1

        check_after_step(check)

    def _check_allocator(self, layers: Sequence[SnellaLayer], adapter_name: str) -> bool:
        """Count a step without an allocator; return True if later steps need no check."""
        if self.is_attached:
            self._steps_without_allocator = 0
            return False
        budget, target_budget = _budget_and_target(layers, adapter_name)
        if budget <= target_budget:
            return True
        self._steps_without_allocator += 1
        if self._steps_without_allocator >= _STEPS_WITHOUT_ALLOCATOR:
            self._warn_about_missing_allocator(layers[0].snella_config[adapter_name])
        return "allocator" in self._warned

    def _warn_once(self, topic: str, message: str) -> None:
        """Warn about a topic unless it has already been warned about."""
        if topic not in self._warned:
            self._warned.add(topic)
            warnings.warn(message, stacklevel=3)

    def _warn_about_missing_allocator(self, config: SnellaConfig) -> None:
        steps = self._steps_without_allocator
        self._warn_once(
            "allocator",
            f"target_sparsity={config.target_sparsity} is set, but after {steps} optimizer step{'s' * (steps > 1)} no "
            "budget allocator is attached, so the update stays at its initial sparsity; call "
            "BudgetAllocator(model, total_epochs=…, steps_per_epoch=…).attach(optimizer), "
            "or pass callbacks=[SnellaCallback()] to the Trainer",
        )

    def on_weight_read(self, module_name: str) -> None:
        """Warn that a model reads the weight of a layer whose update has dropout or drop-path."""
        self._warn_once(
            "read",
            f"the model reads the weight of {module_name!r} in an operation other than F.linear, so update_dropout "
            "and update_drop_path have no effect there; to silence this warning, set dropout_exclude and "
            "update_drop_path=0, or exclude the layer with exclude_modules",
        )

    def on_saving(self, model: nn.Module, layers: Sequence[SnellaLayer], adapter_name: str) -> None:
        """Run the checks that are due when an adapter is saved."""
        budget, target_budget = _budget_and_target(layers, adapter_name)
        if self._steps_without_allocator and not self.is_attached and budget > target_budget:
            self._warn_about_missing_allocator(layers[0].snella_config[adapter_name])
        current = _tracked_batches(model)
        changed = [name for name, count in self._batch_counts.items() if current.get(name, count) != count]
        if changed:
            self._batch_counts = current
            warnings.warn(
                f"the running statistics of {len(changed)} batch-norm layer{'s' * (len(changed) > 1)} changed in "
                f"training but are not saved with the adapter: {listed(map(repr, changed), 4)}; add them to "
                "modules_to_save, or train with these layers in evaluation mode",
                stacklevel=2,
            )
        if self.steps is None or budget <= target_budget:
            return
        step, total, steps_per_epoch = self.steps
        # before the last epoch, 10% above the target is accepted, because the best adapter so far may be saved
        if step < total and (budget > 1.1 * target_budget or step > total - steps_per_epoch):
            self._warn_once(
                "budget",
                f"the adapter is saved with {budget:,} entries, but its target is {target_budget:,}; the allocator has "
                f"counted {step} of {total} optimizer steps; if training is over, steps_per_epoch or total_epochs was "
                "too large (with gradient accumulation, several batches are one step) or steps were skipped; "
                f"allocator.advance_to({total}) reduces the budget to its target",
            )


def _tracked_batches(model: nn.Module) -> dict[str, int]:
    """Return `num_batches_tracked` of each batch-norm layer that is not saved, by name without PEFT's prefix."""
    counts = {
        name.removeprefix("base_model.model."): module.num_batches_tracked
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.num_batches_tracked is not None
        if ".modules_to_save." not in name  # saved with the adapter
    }
    return {name: int(count) for name, count in counts.items() if not count.is_meta}


def _budget_and_target(layers: Sequence[SnellaLayer], adapter_name: str) -> tuple[int, int]:
    """Return an adapter's current and target number of entries; they are equal if its sparsity is constant."""
    budget = sum(sum(layer.budgets(adapter_name)) for layer in layers)
    config = layers[0].snella_config[adapter_name]
    size = sum(layer.out_features * layer.in_features for layer in layers)
    is_constant = config.target_sparsity <= config.init_sparsity
    return budget, budget if is_constant else size - round(config.target_sparsity * size)


# unused layers -------------------------------------------------------------------------------------------------------


def _warn_about_unused(layers: Sequence[SnellaLayer]) -> None:
    """Warn about layers that the model did not use before the first optimizer step."""
    if unapplied := [layer.module_name for layer in layers if not layer.is_applied]:
        warnings.warn(
            f"{len(unapplied)} of {len(layers)} adapted modules were not used before the first optimizer step: "
            f"{listed(map(repr, unapplied), 8)}; the model neither called them nor read their weight, so "
            "they are not trained, but merging would change their weights; exclude them with exclude_modules",
            stacklevel=2,
        )


def warn_about_unused_merges(layers: Sequence[SnellaLayer], configs: Sequence[SnellaConfig]) -> None:
    """Warn if a merge includes updates that the model has never used, although it has used others.

    If the model has not run since the adapters were loaded, use the `unused_modules` saved in their configurations.

    Args:
        layers: Layers with the merged adapters.
        configs: Configurations of these adapters.
    """
    unapplied = [layer.module_name for layer in layers if not layer.is_applied]
    when = "so far"
    if len(unapplied) == len(layers):
        saved_unused = {name for config in configs for name in getattr(config, "unused_modules", None) or ()}
        unapplied = [name for name in unapplied if name in saved_unused]
        when = "in training"
    if 0 < len(unapplied) < len(layers):
        warnings.warn(
            f"the model has not used the updates of {len(unapplied)} of {len(layers)} merged modules {when}: "
            f"{listed(map(repr, unapplied), 8)}; if it neither calls these modules nor reads their weight, merging "
            "does not change the outputs, unless other code reads the merged weight",
            stacklevel=4,
        )


# new heads -----------------------------------------------------------------------------------------------------------


def _warn_about_frozen_heads(names: list[str]) -> None:
    """Warn about newly initialized head layers that are used but frozen."""
    if names:
        warnings.warn(
            "newly initialized head layers are frozen, so they are neither trained nor saved; set "
            f"modules_to_save={names}",
            stacklevel=2,
        )


class _NewHeads:
    """Frozen, newly initialized layers among a model's heads, with a record of the layers that are called."""

    def __init__(self, heads: dict[str, nn.Linear | nn.Conv2d]) -> None:
        self._layers: dict[str, nn.Linear | nn.Conv2d] = {}
        for name, layer in heads.items():
            if _is_frozen(layer) and is_newly_initialized(layer.weight, layer.bias):
                self._layers[name] = layer
        self._called: set[str] = set()
        self._handles = [
            layer.register_forward_hook(partial(_record_call, self._called, name))
            for name, layer in self._layers.items()
        ]

    def frozen_and_used(self) -> list[str]:
        """Stop recording and return the names of the called layers that are still frozen."""
        for handle in self._handles:
            handle.remove()
        return [name for name, layer in self._layers.items() if name in self._called and _is_frozen(layer)]


def _is_frozen(layer: nn.Module) -> bool:
    """Return whether no parameter of a layer requires a gradient."""
    return not any(parameter.requires_grad for parameter in layer.parameters())


def _record_call(called: set[str], name: str, *_: Any) -> None:
    """Record a call of a layer; a forward hook that, unlike a closure, is picklable."""
    called.add(name)


@torch.no_grad()
def is_newly_initialized(weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether a layer looks newly initialized.

    Three patterns count as new:

    - All values are zero.
    - Weight and bias follow torch's default `U(-1/√n, 1/√n)`, with values close to the bound.
    - The bias is zero, and the entries of the weight are independent, according to their mean, the row norms and the
      angles between rows.

    The last two require at least 256 weights. A trained layer has a nonzero bias and exceeds the bound; rows of class
    embeddings are correlated.

    Args:
        weight: `[m, …]`.
        bias: `[m]` or `None`.
    """
    tensors = [weight] if bias is None else [weight, bias]
    if any(type(t) not in (Tensor, nn.Parameter) or t.is_meta or not t.is_floating_point() for t in tensors):
        return False
    if weight.ndim < 2 or weight.numel() == 0:
        return False
    rows = weight.detach().float().flatten(1)  # [m, n]
    has_bias = bias is not None and bool(bias.any())
    if not rows.any() and not has_bias:
        return True
    if rows.numel() < _MIN_ENTRIES:
        return False
    if bias is not None and has_bias:
        return _is_default_init(rows, bias.float(), torch.finfo(weight.dtype).eps)
    return _is_default_init(rows, None, torch.finfo(weight.dtype).eps) or (bias is not None and _is_noise(rows))


def _is_default_init(rows: Tensor, bias: Tensor | None, eps: float) -> bool:
    """Return whether a layer has the default initialization of `nn.Linear` and `nn.Conv2d`."""
    bound = 1 / math.sqrt(rows.shape[1])
    count = rows.numel()
    largest = float(rows.abs().max())
    mean_square = float(rows.square().mean())
    rounded_bound = bound * (1 + eps)
    is_bounded = largest <= rounded_bound
    if is_bounded and bias is not None:
        is_bounded = float(bias.abs().max()) <= rounded_bound
    reaches_bound = largest >= bound * (1 - 7 / count)
    # U(±bound) has the variance bound² / 3
    has_uniform_variance = abs(3 * mean_square / bound**2 - 1) < _SIGMAS * math.sqrt(0.8 / count)
    return is_bounded and reaches_bound and has_uniform_variance


def _is_noise(rows: Tensor) -> bool:
    """Return whether the entries of a matrix look like i.i.d. draws from a symmetric distribution."""
    n = rows.shape[1]
    square = rows.square().mean()
    if float(rows.mean().abs()) > _SIGMAS * float((square / rows.numel()).sqrt()):
        return False
    # variance of the squares: 2 for normal, 0.8 for uniform entries
    variance = float((rows.square() / square).var(correction=0))
    norms = rows.square().mean(1) / square  # [m]
    if variance > 4 or float((norms - 1).abs().max()) > _SIGMAS * math.sqrt(variance / n) + 1e-3:
        return False
    sample = nn.functional.normalize(rows[:512], dim=1)
    cosines = (sample @ sample.T).square().triu(1).sum()
    pairs = len(sample) * (len(sample) - 1) / 2
    return pairs == 0 or float(cosines) * n / pairs < 1 + _SIGMAS * math.sqrt(2 / pairs)
