"""What a training step costs: its time, and on a GPU the memory that torch has reserved."""

import statistics
import time
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StepCosts(TrainerCallback):
    """Time every step, from before the forward pass to after the optimiser's step; loading images is not in it.

    Args:
        device: Where the model is; memory is noted on a GPU only.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.step_s: list[float] = []
        self.reserved_bytes: list[int] = []
        self._start: float | None = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._wait()
        self._start = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the clock."""
        self._wait()
        if self._start is not None:
            self.step_s.append(time.perf_counter() - self._start)
        if self.device.type == "cuda":
            self.reserved_bytes.append(torch.cuda.memory_reserved(self.device))

    def summary(self) -> dict[str, Any]:
        """Median seconds of a step, and bytes on the GPU (None on a CPU) as PEFT's method comparison names them."""
        reserved = self.reserved_bytes
        return {
            "step_s": round(statistics.median(self.step_s), 6) if self.step_s else None,
            "accelerator_memory_max": torch.cuda.max_memory_reserved(self.device) if reserved else None,
            "accelerator_memory_reserved_avg": int(np.mean(reserved)) if reserved else None,
            "accelerator_memory_reserved_99th": int(np.percentile(reserved, 99)) if reserved else None,
        }

    def _wait(self) -> None:
        """Let the GPU finish, so that the clock counts its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
