"""Warnings about silent training mistakes."""

from __future__ import annotations

import warnings

from torch import nn

from snella._text import listed

_STEPS_WITHOUT_ALLOCATOR = 2  # one may be a probe of the gradients


class TrainingWatch:
    """Warns once of each silent mistake in the training of one adapter.

    - No allocator lowers its budget.
    - A new head is frozen.
    - A model reads a layer's weight, so that dropout and drop-path of the update cannot act.
    - It is saved with a budget above the target, because a loop counted its steps wrong.
    - It is saved without the running statistics that changed.
    """

    def __init__(self) -> None:
        self.is_attached = False
        self.steps: tuple[int, int, int] | None = None
        """Optimizer steps taken, in total and per epoch, where the caller of the allocator counted them."""
        self._steps_without_allocator = 0
        self._batches: dict[str, int] = {}
        self._has_told_of_budget = False
        self._has_warned = False
        self._has_warned_of_read = False

    def on_step(self, budget: int, target_budget: int, target_sparsity: float) -> bool:
        """Note an optimizer step of an adapter that keeps `budget` entries; return whether the watch is over."""
        if self.is_attached:
            self._steps_without_allocator = 0
            return False
        if budget <= target_budget:
            return True
        self._steps_without_allocator += 1
        if self._steps_without_allocator >= _STEPS_WITHOUT_ALLOCATOR:
            self._warn_of_no_allocator(target_sparsity)
        return self._has_warned

    def _warn_of_no_allocator(self, target_sparsity: float) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        steps = self._steps_without_allocator
        warnings.warn(
            f"target_sparsity={target_sparsity} is set, but after {steps} optimizer step{'s' * (steps > 1)} no budget "
            "allocator is attached, so the update stays as dense as it started; call "
            "BudgetAllocator(model, total_epochs=…, steps_per_epoch=…).attach(optimizer), "
            "or pass callbacks=[SnellaCallback()] to the Trainer",
            stacklevel=2,
        )

    def on_frozen_heads(self, names: list[str]) -> None:
        """Note layers of a head that have their first random values, are used, and are not trained."""
        if names:
            warnings.warn(
                f"the head {listed(map(repr, names), 3)} has its initial random values and is frozen, so that it is "
                f"neither trained nor saved; set modules_to_save={names[:3]}",
                stacklevel=2,
            )

    def on_weight_read(self, module_name: str) -> None:
        """Note that a model in training reads the weight of a layer whose update has dropout or drop-path."""
        if self._has_warned_of_read:
            return
        self._has_warned_of_read = True
        warnings.warn(
            f"the model reads the weight of {module_name!r} for something else than F.linear, so that update_dropout "
            "and update_drop_path do not act there; set dropout_exclude and update_drop_path=0, or leave the layer out "
            "with exclude_modules, if that matters",
            stacklevel=2,
        )

    def note_statistics(self, model: nn.Module) -> None:
        """Remember how many batches the running statistics of each normalization have seen."""
        self._batches = _tracked_batches(model)

    def on_saving(self, model: nn.Module, budget: int, target_budget: int, target_sparsity: float) -> None:
        """Note that an adapter of a model is saved, which keeps `budget` entries."""
        if self._steps_without_allocator and budget > target_budget:
            self._warn_of_no_allocator(target_sparsity)
        now = _tracked_batches(model)
        changed = [name for name, batches in self._batches.items() if now.get(name, batches) != batches]
        if changed:
            self._batches = now
            warnings.warn(
                f"the running statistics of {len(changed)} batch normalizations changed in training and are no part "
                f"of the saved adapter: {listed(map(repr, changed), 4)}; name them in modules_to_save, or "
                "train with these layers in evaluation mode",
                stacklevel=2,
            )
        if self.steps is None or self._has_told_of_budget or budget <= target_budget:
            return
        step, total, epoch = self.steps
        # the best adapter so far is saved at any time, the last one in the last epoch
        if step < total and (budget > 1.1 * target_budget or step > total - epoch):
            self._has_told_of_budget = True
            warnings.warn(
                f"the adapter is saved with {budget:,} entries, its target is {target_budget:,}: the allocator has "
                f"seen {step} of {total} optimizer steps; if the training is over, steps_per_epoch or total_epochs was "
                "too large (batches over which gradients are accumulated are one step) or steps were skipped; "
                f"allocator.advance_to({total}) lowers the budget to its target",
                stacklevel=2,
            )


def _tracked_batches(model: nn.Module) -> dict[str, int]:
    """Batches that the running statistics of each batch normalization have seen, by name within the adapted model."""
    counts = {
        name.removeprefix("base_model.model."): module.num_batches_tracked
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.num_batches_tracked is not None
        if ".modules_to_save." not in name  # those are saved
    }
    return {name: int(count) for name, count in counts.items() if not count.is_meta}
