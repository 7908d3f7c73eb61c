"""Ways in which training ends early: Ctrl-C, and a loss that is no number."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class TrainingInterrupted(Exception):
    """Training was stopped by the user, after saving."""


class NonFiniteLossError(Exception):
    """The loss or the gradient became infinite or NaN."""


class InterruptCallback(TrainerCallback):
    """Turn the first Ctrl-C into: finish the step, save, stop. The second one stops at once.

    A context manager: the handler is installed inside, in the main thread only.
    """

    def __init__(self) -> None:
        self.is_requested = False
        self._previous: Any = None

    def __enter__(self) -> "InterruptCallback":
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Remember the first request, raise at the second."""
        if self.is_requested:
            raise KeyboardInterrupt
        self.is_requested = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save within the epoch, unless its end, which saves anyway, is reached."""
        if self.is_requested and not _is_epoch_end(state):
            control.should_save = True
            control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """An unfinished epoch is not evaluated, and is saved already."""
        if not _is_epoch_end(state):
            control.should_log = control.should_evaluate = control.should_save = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop after the checkpoint of a whole epoch."""
        if self.is_requested:
            control.should_training_stop = True


def _is_epoch_end(state: TrainerState) -> bool:
    """Whether the number of steps is a whole number of epochs."""
    steps_per_epoch = state.max_steps // state.num_train_epochs
    return state.global_step % steps_per_epoch == 0
