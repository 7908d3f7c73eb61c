"""Callback for transformers' `Trainer` that drives the budget allocator.

During training, the allocator reduces the budget, the maximum number of nonzero entries of all weight updates.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from snella.allocator import BudgetAllocator

_EPOCHS_WITHOUT_LENGTH = 20  # maximum number of epochs, and thus of reallocations, if the loader has no length


class SnellaCallback(TrainerCallback):
    """Callback that attaches a `BudgetAllocator` when training starts: `Trainer(…, callbacks=[SnellaCallback()])`.

    The optimizer's state includes the allocator's state, so the Trainer's checkpoints contain it and
    `resume_from_checkpoint` restores it.

    If the data loader has no length, the length of an epoch is unknown. With `realloc_every="epoch"`, the budget is
    then reallocated at most 20 times.

    Args:
        adapter_name: Adapter to train; defaults to the first active one.

    Attributes:
        allocator: The allocator, or `None` before training starts for the first time.
    """

    def __init__(self, adapter_name: str | None = None) -> None:
        self.adapter_name = adapter_name
        self.allocator: BudgetAllocator | None = None

    def on_train_begin(  # noqa: D102
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if model is None or optimizer is None:
            raise RuntimeError(
                f"SnellaCallback requires the Trainer's model and optimizer, got {type(model).__name__} and "
                f"{type(optimizer).__name__}; pass the callback to Trainer(callbacks=[…])"
            )
        if self.allocator is not None:
            self.allocator.detach()  # an interrupted run may have left it attached
        epochs = max(math.ceil(state.num_train_epochs), 1)
        length = len(train_dataloader) if has_length(train_dataloader) else 0
        if length:
            steps_per_epoch = math.ceil(length / args.gradient_accumulation_steps)
        else:  # for a loader without a length, the Trainer's number of epochs is huge
            steps_per_epoch = max(math.ceil(state.max_steps / min(epochs, _EPOCHS_WITHOUT_LENGTH)), 1)
            epochs = max(math.ceil(state.max_steps / steps_per_epoch), 1)
        self.allocator = BudgetAllocator(
            model,
            total_epochs=epochs,
            steps_per_epoch=steps_per_epoch,
            total_steps=max(state.max_steps, 1),
            adapter_name=self.adapter_name,
        )
        self.allocator.has_exact_steps = True
        self.allocator.attach(optimizer)

    def on_step_end(  # noqa: D102
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.allocator is not None:
            self.allocator.advance_to(state.global_step)

    def on_train_end(  # noqa: D102
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.allocator is None:
            return
        self.allocator.detach()
        budget, target = sum(self.allocator.budgets.values()), self.allocator.target_budget
        if args.load_best_model_at_end and budget > target:
            warnings.warn(
                f"the best model of the Trainer has {budget:,} entries, but the target is {target:,}, because its "
                "checkpoint precedes the end of the budget schedule; set schedule_end in SnellaConfig, e.g. to 0.7, "
                "or load_best_model_at_end=False",
                stacklevel=2,
            )
