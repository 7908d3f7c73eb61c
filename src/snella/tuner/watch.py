"""Notices a training run whose target sparsity nobody applies."""

from __future__ import annotations

import warnings

from .effective import optimizer_steps

_PATIENCE = 10  # optimiser steps before the warning: enough to tell training from a probe of the gradients


class TrainingWatch:
    """Warns once if an adapter is being trained and no allocator was ever attached to shrink its budget.

    AdaLoRA's users forget the call and silently train LoRA; ours are told.
    """

    def __init__(self) -> None:
        self.is_attached = False
        self._first_step: int | None = None
        self._has_warned = False

    def observe_training(self, target_sparsity: float) -> None:
        """Note a forward pass in training, with gradients, towards `target_sparsity`."""
        if self.is_attached or self._has_warned:
            return
        if self._first_step is None:
            self._first_step = optimizer_steps()
        elif optimizer_steps() - self._first_step >= _PATIENCE:
            self._has_warned = True
            warnings.warn(
                f"target_sparsity={target_sparsity} is set, but after {_PATIENCE} optimiser steps no budget allocator "
                "is attached, so the update stays as dense as it started; call "
                "BudgetAllocator(model, total_epochs=…, steps_per_epoch=…).attach(optimizer), "
                "or pass callbacks=[SnellaCallback()] to the Trainer",
                stacklevel=2,
            )
