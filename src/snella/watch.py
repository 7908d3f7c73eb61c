"""Warnings about silent training mistakes."""

from __future__ import annotations

import warnings

from torch import nn

from snella._utils import listed

_STEPS_WITHOUT_ALLOCATOR = 2  # a single step may be a gradient probe


class TrainingWatch:
    """Warnings about silent training mistakes, at most one of each kind per adapter.

    - No allocator reduces the budget.
    - A new head is frozen.
    - The model reads a layer's weight, which disables dropout and drop-path on the update.
    - A wrong step count leaves the budget of a saved adapter above its target.
    - Batch-norm running statistics change in training, but are not saved with the adapter.
    """

    def __init__(self) -> None:
        self.is_attached = False
        self.steps: tuple[int, int, int] | None = None
        """Completed optimizer steps, total steps, and steps per epoch; `None` if unknown."""
        self._steps_without_allocator = 0
        self._batch_counts: dict[str, int] = {}
        self._warned: set[str] = set()

    def on_step(self, budget: int, target_budget: int, target_sparsity: float) -> bool:
        """Record an optimizer step of an adapter with `budget` entries; return True if later steps need no check."""
        if self.is_attached:
            self._steps_without_allocator = 0
            return False
        if budget <= target_budget:
            return True
        self._steps_without_allocator += 1
        if self._steps_without_allocator >= _STEPS_WITHOUT_ALLOCATOR:
            self._warn_about_missing_allocator(target_sparsity)
        return "allocator" in self._warned

    def _warn_once(self, topic: str, message: str) -> None:
        """Warn about a topic unless it has already been warned about."""
        if topic not in self._warned:
            self._warned.add(topic)
            warnings.warn(message, stacklevel=3)

    def _warn_about_missing_allocator(self, target_sparsity: float) -> None:
        steps = self._steps_without_allocator
        self._warn_once(
            "allocator",
            f"target_sparsity={target_sparsity} is set, but after {steps} optimizer step{'s' * (steps > 1)} no budget "
            "allocator is attached, so the update stays at its initial sparsity; call "
            "BudgetAllocator(model, total_epochs=…, steps_per_epoch=…).attach(optimizer), "
            "or pass callbacks=[SnellaCallback()] to the Trainer",
        )

    def on_frozen_heads(self, names: list[str]) -> None:
        """Warn about head layers that are used but frozen at their initial random values."""
        if names:
            warnings.warn(
                f"the head {listed(map(repr, names), 3)} has its initial random values and is frozen, so it is "
                f"neither trained nor saved; set modules_to_save={names[:3]}",
                stacklevel=2,
            )

    def on_weight_read(self, module_name: str) -> None:
        """Warn that a model reads the weight of a layer whose update has dropout or drop-path."""
        self._warn_once(
            "read",
            f"the model reads the weight of {module_name!r} for something other than F.linear, so update_dropout "
            "and update_drop_path have no effect there; to avoid this, set dropout_exclude and update_drop_path=0, or "
            "exclude the layer with exclude_modules",
        )

    def record_statistics(self, model: nn.Module) -> None:
        """Record the batch counters of all batch normalizations."""
        self._batch_counts = _tracked_batches(model)

    def on_saving(self, model: nn.Module, budget: int, target_budget: int, target_sparsity: float) -> None:
        """Run the checks for saving an adapter with `budget` entries."""
        if self._steps_without_allocator and budget > target_budget:
            self._warn_about_missing_allocator(target_sparsity)
        current = _tracked_batches(model)
        changed = [name for name, count in self._batch_counts.items() if current.get(name, count) != count]
        if changed:
            self._batch_counts = current
            warnings.warn(
                f"the running statistics of {len(changed)} batch normalizations changed in training but are not "
                f"saved with the adapter: {listed(map(repr, changed), 4)}; add them to modules_to_save, or "
                "train with these layers in evaluation mode",
                stacklevel=2,
            )
        if self.steps is None or budget <= target_budget:
            return
        step, total, steps_per_epoch = self.steps
        # the best adapter may be saved at any time, the last adapter in the last epoch
        if step < total and (budget > 1.1 * target_budget or step > total - steps_per_epoch):
            self._warn_once(
                "budget",
                f"the adapter is saved with {budget:,} entries, its target is {target_budget:,}: the allocator has "
                f"counted {step} of {total} optimizer steps; if training is over, steps_per_epoch or total_epochs was "
                "too large (with gradient accumulation, several batches are one step) or steps were skipped; "
                f"allocator.advance_to({total}) reduces the budget to its target",
            )


def _tracked_batches(model: nn.Module) -> dict[str, int]:
    """Return `num_batches_tracked` of each batch normalization, by name in the adapted model."""
    counts = {
        name.removeprefix("base_model.model."): module.num_batches_tracked
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.num_batches_tracked is not None
        if ".modules_to_save." not in name  # saved with the adapter
    }
    return {name: int(count) for name, count in counts.items() if not count.is_meta}
