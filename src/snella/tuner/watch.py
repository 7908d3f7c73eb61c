"""Notices a training run whose target sparsity nobody applies."""

from __future__ import annotations

import warnings

from snella.tuner.effective import optimizer_steps

_PATIENCE = 10  # optimiser steps before the warning: enough to tell training from a probe of the gradients


class TrainingWatch:
    """Warns once each of what goes wrong silently while an adapter is trained.

    No allocator was ever attached to shrink its budget: AdaLoRA's users forget the call and silently train LoRA. A
    model reads a layer's weight, so that dropout and drop-path of the update cannot act.
    """

    def __init__(self) -> None:
        self.is_attached = False
        self._first_step: int | None = None
        self._has_warned = False
        self._has_warned_of_read = False

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

    def observe_read(self, module_name: str) -> None:
        """Note that a model in training reads the weight of a layer whose update has dropout or drop-path."""
        if self._has_warned_of_read:
            return
        self._has_warned_of_read = True
        warnings.warn(
            f"the model reads the weight of {module_name!r} instead of calling it, so that update_dropout and "
            "update_drop_path do not act there; set dropout_exclude and update_drop_path=0, or leave the layer out "
            "with exclude_modules, if that matters",
            stacklevel=2,
        )
