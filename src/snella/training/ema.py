"""Exponential moving average of what is trained: steadier values to measure and to keep."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from snella.training.checkpoints import CheckpointError

__all__ = ["EmaCallback", "WeightAverage"]

_FILE = "ema.safetensors"


class WeightAverage:
    """The average of every trainable parameter over the optimiser's steps.

    average ← d_t · average + (1 − d_t) · value,   d_t = min(decay, (1 + t) / (10 + t)),   t = 1, 2, … steps

    The decay warms up: without it, a short run with a decay of 0.9999 would still weigh the values it began with. While
    (1 + t) / (10 + t) is the lesser, the average spans about the last ninth of the steps so far.

    Averaged are parameters alone: factors, scalars, head. Budgets are buffers and stay those of the present, so that
    an update built of averaged factors keeps exactly as many entries as its budget: the threshold is recomputed from
    them. (Averaging merged matrices, or restoring budgets of another time, would lose the sparsity.)

    Args:
        model: From `build_method`; only what is trainable now is averaged.
        decay: In (0, 1); nearer to 1 averages over more steps.

    Attributes:
        steps: How many steps were averaged.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._averages = {name: p.detach().clone() for name, p in self._parameters.items()}

    @property
    def decay_now(self) -> float:
        """`d_t` of the last step."""
        return min(self.decay, (1 + self.steps) / (10 + self.steps))

    @torch.no_grad()
    def update(self) -> None:
        """Take the values after an optimiser's step in."""
        self.steps += 1
        values = [parameter.detach() for parameter in self._parameters.values()]
        get_ema_multi_avg_fn(self.decay_now)(list(self._averages.values()), values, self.steps)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model have the averages in place of its values, inside."""
        values = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._write(self._averages)
        try:
            yield
        finally:
            self._write(values)

    def save(self, checkpoint: Path) -> None:
        """Write the averages into a checkpoint's folder."""
        tensors = {name: average.cpu().contiguous() for name, average in self._averages.items()}
        save_file(tensors, checkpoint / _FILE, {"steps": str(self.steps)})

    def load(self, checkpoint: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            CheckpointError: It holds no averages, or those of other parameters.
        """
        path = checkpoint / _FILE
        if not path.is_file():
            raise CheckpointError(f"the checkpoint is damaged: {path} is missing; start over with --overwrite")
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            if names != set(self._averages):
                different = sorted(names ^ set(self._averages))[:3]
                raise CheckpointError(
                    f"{path} must hold the averages of this model's trainable parameters, it differs in "
                    f"{', '.join(different)}; start over with --overwrite"
                )
            for name, average in self._averages.items():
                average.copy_(file.get_tensor(name))
            self.steps = int(file.metadata()["steps"])

    @torch.no_grad()
    def _write(self, values: dict[str, torch.Tensor]) -> None:
        """Copy values into the model's own parameters, so that layers notice that what they remember is out of date."""
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])


class EmaCallback(TrainerCallback):
    """Takes every optimiser step into an average.

    Args:
        average: Of the model that is trained.
    """

    def __init__(self, average: WeightAverage) -> None:
        self.average = average

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Average the step."""
        self.average.update()
