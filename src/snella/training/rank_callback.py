"""AdaLoRA's ranks inside of transformers' `Trainer`."""

from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from snella.methods.adalora import RankSchedule


class RankCallback(TrainerCallback):
    """Attaches a `RankSchedule` when training starts.

    Attributes:
        schedule: It, from the start of training on.
    """

    def __init__(self) -> None:
        self.schedule: RankSchedule | None = None

    def on_train_begin(  # noqa: D102
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        if model is None or optimizer is None:
            raise RuntimeError(f"RankCallback needs the Trainer's model and optimizer, got {model} and {optimizer}")
        self.schedule = RankSchedule(model, max(state.max_steps, 1)).attach(optimizer)
