"""Warnings about silent mistakes in training and merging.

The budget of an adapter is the maximum number of nonzero entries of its updates. During training, a `BudgetAllocator`
reduces it.
"""

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

_STEPS_WITHOUT_ALLOCATOR = 2  # steps before the warning; a script with a single step may need only its gradients
_MIN_ENTRIES = 256  # minimum number of weights for the statistical tests of new heads
_SIGMAS = 5.0  # tolerance of one statistical comparison, in standard deviations


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
        self.allocators: weakref.WeakSet[Any] = weakref.WeakSet()
        """Attached allocators."""
        self.steps: tuple[int, int, int] | None = None
        """Completed optimizer steps, total steps, and steps per epoch; `None` if unknown or counted by a trainer."""
        self._steps_without_allocator = 0
        self._batch_counts: dict[str, int] = {}
        self._warned: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the allocators."""
        return {name: value for name, value in vars(self).items() if name != "allocators"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state without allocators: none is attached to a copy."""
        self.__dict__ = {**state, "allocators": weakref.WeakSet()}

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
        """Run the checks of an adapter after each optimizer step until no checks remain.

        Args:
            model: Model with the adapter.
            adapter_name: Name of the adapter.
            find_layers: Returns the layers of a model that have this adapter.
            find_heads: Returns the head layers of a model by name.
        """
        self._batch_counts = _tracked_batches(model)
        model_reference = weakref.ref(model)
        num_steps = 0
        new_heads: _NewHeads | None = None

        def check(optimizer: Optimizer) -> bool:
            """Check one step and return whether later steps need no check."""
            nonlocal num_steps, new_heads
            if (model := model_reference()) is None:
                return True
            if num_steps > 1 and self.is_attached:
                return False  # the allocator may be detached later
            layers = find_layers(model)
            if not layers:
                return True
            factors = (layer.snella_A[adapter_name] for layer in layers)
            trained_ids = {id(factor) for factor in factors if factor.requires_grad}
            trained_groups: list[dict[str, Any]] = []
            for group in optimizer.param_groups:
                if any(id(parameter) in trained_ids for parameter in group["params"]):
                    trained_groups.append(group)
            # torch.distributed.checkpoint creates an optimizer's state with a step at learning rate 0
            if all(group.get("lr") == 0 for group in trained_groups):
                return False
            num_steps += 1
            if num_steps == 1:
                _warn_about_unused(layers)
                new_heads = _NewHeads(find_heads(model))
            elif new_heads is not None:
                _warn_about_frozen_heads(new_heads.frozen_and_used())
                new_heads = None
            return self._check_allocator(layers, adapter_name) and num_steps > 1

        check_after_step(check)

    def _check_allocator(self, layers: Sequence[SnellaLayer], adapter_name: str) -> bool:
        """Count a step without an allocator, and return whether later steps need no check."""
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
        batch_counts = _tracked_batches(model)
        changed = [name for name, count in self._batch_counts.items() if batch_counts.get(name, count) != count]
        if changed:
            self._batch_counts = batch_counts
            warnings.warn(
                f"the running statistics of {len(changed)} batch-norm layer{'s' * (len(changed) > 1)} changed in "
                f"training but are not saved with the adapter: {listed(map(repr, changed), 4)}; add them to "
                "modules_to_save, or train with these layers in evaluation mode",
                stacklevel=2,
            )
        if self.steps is None or budget <= target_budget:
            return
        step, total, steps_per_epoch = self.steps
        # before the last epoch, up to 10% above the target is accepted, because the best adapter so far may be saved
        if step < total and (budget > 1.1 * target_budget or step > total - steps_per_epoch):
            self._warn_once(
                "budget",
                f"the adapter is saved with {budget:,} entries, but its target is {target_budget:,}; the allocator has "
                f"counted {step} of {total} optimizer steps; if training is over, steps_per_epoch or total_epochs was "
                "too large (with gradient accumulation, several batches are one step) or steps were skipped; "
                f"allocator.advance_to({total}) reduces the budget to its target",
            )


def _tracked_batches(model: nn.Module) -> dict[str, int]:
    """Return, by name without PEFT's prefix, how many batches each batch-norm layer that is not saved has tracked."""
    counts = {
        name.removeprefix("base_model.model."): module.num_batches_tracked
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.num_batches_tracked is not None
        if ".modules_to_save." not in name  # saved with the adapter
    }
    return {name: int(count) for name, count in counts.items() if not count.is_meta}


def _budget_and_target(layers: Sequence[SnellaLayer], adapter_name: str) -> tuple[int, int]:
    """Return an adapter's current and target number of entries, which are equal if its sparsity is constant."""
    budget = sum(sum(layer.budgets(adapter_name)) for layer in layers)
    config = layers[0].snella_config[adapter_name]
    if config.target_sparsity <= config.init_sparsity:
        return budget, budget
    size = sum(layer.out_features * layer.in_features for layer in layers)
    return budget, size - round(config.target_sparsity * size)


# unused layers -------------------------------------------------------------------------------------------------------


def _warn_about_unused(layers: Sequence[SnellaLayer]) -> None:
    """Warn about layers that the model did not use before the first optimizer step."""
    if layers and all(layer.merged_adapters for layer in layers):
        warnings.warn(
            "the adapter is merged, so it is not trained; call unmerge_adapter() before training", stacklevel=2
        )
    elif unused_names := [layer.module_name for layer in layers if not layer.is_applied]:
        warnings.warn(
            f"{len(unused_names)} of {len(layers)} adapted modules were not used before the first optimizer step: "
            f"{listed(map(repr, unused_names), 8)}; the model neither called them nor read their weights, so "
            "they are not trained, but merging would change their weights; exclude them with exclude_modules",
            stacklevel=2,
        )


def warn_about_unused_merges(layers: Sequence[SnellaLayer], configs: Sequence[SnellaConfig]) -> None:
    """Warn if a merge includes updates that the model has never used, although it has used others.

    If no layer has been used since the adapters were loaded, the `unused_modules` in their configurations decide.

    Args:
        layers: Layers with the merged adapters.
        configs: Configurations of these adapters.
    """
    unused_names = [layer.module_name for layer in layers if not layer.is_applied]
    when = "so far"
    if len(unused_names) == len(layers):
        unused_in_training = {name for config in configs for name in getattr(config, "unused_modules", None) or ()}
        unused_names = [name for name in unused_names if name in unused_in_training]
        when = "in training"
    if 0 < len(unused_names) < len(layers):
        warnings.warn(
            f"the model has not used the updates of {len(unused_names)} of {len(layers)} merged modules {when}: "
            f"{listed(map(repr, unused_names), 8)}; if it neither calls these modules nor reads their weights, merging "
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
    """Frozen, newly initialized layers among a model's heads, with a record of those that are called."""

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
    """Record a call to a layer (a forward hook that, unlike a closure, can be pickled)."""
    called.add(name)


@torch.no_grad()
def is_newly_initialized(weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether a layer looks newly initialized.

    Three patterns count as new:

    - All values are zero.
    - Weight and bias follow torch's default `U(-1/√n, 1/√n)`, with values close to the bound.
    - The bias is zero, and the entries of the weight look independent, judging by their mean, the row norms, and the
      angles between rows.

    The last two require at least 256 weights. They exclude trained layers, which have a nonzero bias and exceed the
    bound, and class embeddings, whose rows are correlated.

    Args:
        weight: `[m, …]`.
        bias: `[m]` or `None`.
    """
    tensors = [weight] if bias is None else [weight, bias]
    # subclasses, e.g. quantized or sharded weights, are not inspected
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
    num_weights = rows.numel()
    largest = float(rows.abs().max())
    mean_square = float(rows.square().mean())
    rounded_bound = bound * (1 + eps)
    is_bounded = largest <= rounded_bound
    if is_bounded and bias is not None:
        is_bounded = float(bias.abs().max()) <= rounded_bound
    # the largest of N uniform magnitudes is smaller than this with a probability of about e⁻⁷
    reaches_bound = largest >= bound * (1 - 7 / num_weights)
    # U(±bound) has the variance bound² / 3, and the squares have the relative variance 0.8
    has_uniform_variance = abs(3 * mean_square / bound**2 - 1) < _SIGMAS * math.sqrt(0.8 / num_weights)
    return is_bounded and reaches_bound and has_uniform_variance


def _is_noise(rows: Tensor) -> bool:
    """Return whether the entries of a matrix look like i.i.d. draws from a symmetric distribution."""
    n = rows.shape[1]
    mean_square = rows.square().mean()
    if float(rows.mean().abs()) > _SIGMAS * float((mean_square / rows.numel()).sqrt()):
        return False
    # the relative variance of the squares is 2 for normal and 0.8 for uniform entries
    variance = float((rows.square() / mean_square).var(correction=0))
    squared_norms = rows.square().mean(1) / mean_square  # [m]
    if variance > 4 or float((squared_norms - 1).abs().max()) > _SIGMAS * math.sqrt(variance / n) + 1e-3:
        return False
    sample = nn.functional.normalize(rows[:512], dim=1)
    # the squared cosine of two independent rows has the mean 1 / n
    squared_cosines = (sample @ sample.T).square().triu(1).sum()
    num_pairs = len(sample) * (len(sample) - 1) / 2
    return num_pairs == 0 or float(squared_cosines) * n / num_pairs < 1 + _SIGMAS * math.sqrt(2 / num_pairs)
