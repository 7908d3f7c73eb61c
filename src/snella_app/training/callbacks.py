"""Trainer callbacks: weight averaging, epochs, method schedules, step time, trackers, and progress.

The budget of a weight matrix is the maximum number of its entries that the update may change. SNELLA allocates budgets
to the adapted matrices by importance; most other methods have no budgets.
"""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn
from transformers import TrainerCallback, TrainerState

from snella.matrices import AdaptedMatrix
from snella_app.console import print_line
from snella_app.device import synchronized_time
from snella_app.methods.model_parts import updated_statistics
from snella_app.text import seconds_text
from snella_app.training.checkpoints import CheckpointError, require_file

if TYPE_CHECKING:
    from snella_app.training.trainer import SnellaTrainer

_AVERAGE_FILE = "ema.safetensors"
_SNAPSHOTS_FILE = "epoch_ends.safetensors"
_ESTIMATE_STEPS = 4
"""Number of steps after which the remaining time is estimated."""
_ESTIMATE_S = 20.0
"""Seconds after which two steps suffice for the estimate. One step does not, because the first step compiles."""
_LONG_S = 300.0
"""Remaining seconds above which the display suggests how to shorten the run."""
_LINE_S = 30.0
"""Minimum seconds between progress lines, which are printed if the output is not a terminal."""
_TIMED_STEPS = 20
"""Maximum number of recent step ends from which the median step time is computed."""
_LOGGED_STEPS = 10
"""Steps between logged values."""
_RISING_RATIO = 1.5
"""Ratio of an epoch's loss to that of the first epoch, above which the display warns about a rising loss."""
_RISING_AFTER_STEPS = 20
"""First step that may trigger this warning. If the head was first fitted to features of the pre-trained backbone, the
loss may rise in earlier steps, as the backbone changes."""


class WeightAverage(TrainerCallback):
    """Exponential moving average of the trainable parameters.

    average ← d_t · average + (1 − d_t) · value,   d_t = min(decay, (1 + t) / (10 + t)),   t = 1, 2, … (steps)

    The decay warms up; without warmup, a short run with a decay of 0.9999 would be dominated by the initial values.
    During warmup, the average spans about the last ninth of the steps.

    The trained parameters (in SNELLA: factors, kernel scalars, and head) and the running statistics that training
    updates are averaged. Budgets are buffers and keep their current values. The magnitude threshold of each update is
    recomputed from the averaged factors, so the number of nonzero entries stays within the budget. Averaging the sparse
    updates themselves, or restoring old budgets, would lose the sparsity.

    Args:
        model: Model from `build_method`. The parameters that are trainable now are averaged.
        decay: Decay in (0, 1). Larger values average over more steps.
        statistics: Additional running statistics to average, by name. Training must update them in place.

    Attributes:
        steps: Number of averaged steps.
    """

    def __init__(self, model: nn.Module, decay: float, statistics: Mapping[str, torch.Tensor] | None = None) -> None:
        self.decay = decay
        self.steps = 0
        self._parameters = _trained_tensors(model, statistics)
        self._averages = {name: p.detach().clone() for name, p in self._parameters.items()}

    @property
    def decay_now(self) -> float:
        """Decay `d_t` of the last step."""
        return min(self.decay, (1 + self.steps) / (10 + self.steps))

    @torch.no_grad()
    def update(self) -> None:
        """Update the average after an optimizer step."""
        self.steps += 1
        values = [parameter.detach() for parameter in self._parameters.values()]
        get_ema_multi_avg_fn(self.decay_now)(list(self._averages.values()), values, self.steps)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Update the average."""
        self.update()

    def average_parameters(self) -> AbstractContextManager[None]:
        """Use the averaged parameters in the model inside the context."""
        return _swapped_parameters(self._parameters, self._averages)

    def save(self, checkpoint: Path) -> None:
        """Write the averages to a checkpoint folder."""
        tensors = {name: average.cpu().contiguous() for name, average in self._averages.items()}
        save_file(tensors, checkpoint / _AVERAGE_FILE, {"steps": str(self.steps)})

    def load(self, checkpoint: Path) -> None:
        """Load the averages from a checkpoint.

        Raises:
            CheckpointError: If the checkpoint has no averages, or has averages of different parameters.
        """
        path = require_file(checkpoint, _AVERAGE_FILE)
        with safe_open(path, "pt") as file:
            _check_names(path, file.keys(), self._averages)
            for name, average in self._averages.items():
                average.copy_(file.get_tensor(name))
            self.steps = int(file.metadata()["steps"])


class EpochSnapshots:
    """Trained parameters of the last epochs, for averaging after training.

    They include the same running statistics as `WeightAverage`. The averaged update uses the budgets of the last step
    and therefore has the target sparsity.

    Args:
        model: Model from `build_method`. The parameters that are trainable now are stored, on the CPU.
        count: Number of epochs to keep.
        statistics: Additional running statistics to average, by name. Training must update them in place.
    """

    def __init__(self, model: nn.Module, count: int, statistics: Mapping[str, torch.Tensor] | None = None) -> None:
        self.count = count
        self._parameters = _trained_tensors(model, statistics)
        self._values: dict[int, dict[str, torch.Tensor]] = {}

    @property
    def epochs(self) -> list[int]:
        """Stored epochs, oldest first."""
        return sorted(self._values)

    def add(self, epoch: int) -> None:
        """Store the current values for an epoch, and drop all but the latest `count` epochs."""
        self._values[epoch] = {name: p.detach().to("cpu", copy=True) for name, p in self._parameters.items()}
        for old in self.epochs[: -self.count]:
            del self._values[old]

    def average_parameters(self, epochs: Sequence[int]) -> AbstractContextManager[None]:
        """Use the mean parameters of the given epochs in the model inside the context."""
        first_epoch, *other_epochs = epochs
        means = {name: value.clone() for name, value in self._values[first_epoch].items()}
        update_means = get_swa_multi_avg_fn()
        for num_averaged, epoch in enumerate(other_epochs, 1):
            update_means(list(means.values()), [self._values[epoch][name] for name in means], num_averaged)
        return _swapped_parameters(self._parameters, means)

    def save(self, checkpoint: Path) -> None:
        """Write the values to a checkpoint folder."""
        values: dict[str, torch.Tensor] = {}
        for epoch in self.epochs:
            for name, value in self._values[epoch].items():
                values[f"{epoch}/{name}"] = value.contiguous()
        save_file(values, checkpoint / _SNAPSHOTS_FILE)

    def load(self, checkpoint: Path) -> None:
        """Load the values from a checkpoint.

        Raises:
            CheckpointError: If the checkpoint has no values, or has values of different parameters.
        """
        path = require_file(checkpoint, _SNAPSHOTS_FILE)
        self._values = {}
        for key, value in load_file(path).items():
            epoch, name = key.split("/", 1)
            self._values.setdefault(int(epoch), {})[name] = value
        for values in self._values.values():
            _check_names(path, values, self._parameters)


def _trained_tensors(model: nn.Module, statistics: Mapping[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
    """Return the trainable parameters and the running statistics that training updates, by name."""
    tensors: dict[str, torch.Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {**tensors, **updated_statistics(model), **(statistics or {})}


def _check_names(path: Path, stored: Iterable[str], expected: Iterable[str]) -> None:
    """Raise CheckpointError unless a checkpoint file contains exactly the tensors to average."""
    if different := sorted(set(stored) ^ set(expected))[:3]:
        raise CheckpointError(
            f"{path} does not match this model's trainable parameters: only one of the two contains "
            f"{', '.join(different)}; start over with --overwrite"
        )


@contextmanager
def _swapped_parameters(parameters: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Replace parameter values inside the context.

    The values are copied in place, so that layers detect that their caches are stale.
    """
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def copy(source: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in parameters.items():
            parameter.copy_(source[name])

    copy(values)
    try:
        yield
    finally:
        copy(before)


class EpochCallback(TrainerCallback):
    """Callback that calls `set_epoch` of datasets and samplers, with epochs counted from 0.

    Accelerate also does this, but not for an epoch that is resumed midway.
    """

    def __init__(self, *targets: Any) -> None:
        self.targets = targets

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Set the current epoch."""
        steps_per_epoch = state.max_steps // int(state.num_train_epochs)
        for target in self.targets:
            target.set_epoch(state.global_step // steps_per_epoch)


class ScheduleCallback(TrainerCallback):
    """Callback that attaches a method's schedule when training starts.

    Args:
        make: `Method.schedule`, which creates the schedule from the model and the total number of steps.
    """

    def __init__(self, make: Callable[[nn.Module, int], Any]) -> None:
        self.make = make

    def on_train_begin(
        self, args: Any, state: TrainerState, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Attach the schedule to the optimizer."""
        self.make(model, max(state.max_steps, 1)).attach(optimizer)  # a run of 0 epochs has no steps


class StepTimeCallback(TrainerCallback):
    """Callback that records step time (forward pass to optimizer step, without data loading) and GPU memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.step_s: list[float] = []
        self.reserved_bytes: list[int] = []
        self._start = 0.0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the timer."""
        self._start = synchronized_time(self.device)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop the timer and, on a GPU, record the memory."""
        self.step_s.append(synchronized_time(self.device) - self._start)
        if self.device.type == "cuda":
            self.reserved_bytes.append(torch.cuda.memory_reserved(self.device))

    def summary(self) -> dict[str, Any]:
        """Return the median step time in seconds, and GPU memory in bytes under the names of PEFT's method comparison.

        Values that were not measured, such as the memory on a CPU, are None.
        """
        step_s = round(statistics.median(self.step_s), 6) if self.step_s else None
        memory_max: int | None = None
        memory_mean: int | None = None
        memory_99th: int | None = None
        if self.reserved_bytes:
            memory_max = torch.cuda.max_memory_reserved(self.device)
            memory_mean = int(np.mean(self.reserved_bytes))
            memory_99th = int(np.percentile(self.reserved_bytes, 99))
        return {
            "step_s": step_s,
            "accelerator_memory_max": memory_max,
            "accelerator_memory_reserved_avg": memory_mean,
            "accelerator_memory_reserved_99th": memory_99th,
        }


class TrackingCallback(TrainerCallback):
    """Callback that logs values to experiment trackers.

    Every few steps, it logs the loss and the throughput. For methods with budgets, it logs four values of each adapted
    matrix every epoch: its budget, its importance, the magnitude threshold of its sparse update S, and the relative
    size ‖scaling·S‖ / ‖W0‖ of the update, where W0 is the pre-trained matrix. It then also logs the total budget, the
    relative size of all updates together, and the number of frozen matrices, i.e. those with a budget of 0. The Trainer
    itself logs the metrics of an epoch.

    Args:
        trainer: Trainer that sends the values to its trackers.
        matrices: Adapted matrices. The sequence is empty for methods without budgets.
    """

    def __init__(self, trainer: "SnellaTrainer", matrices: Sequence[AdaptedMatrix]) -> None:
        self.trainer = trainer
        self.matrices = matrices
        self._logged_at = (0, time.perf_counter())

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Start the timer."""
        self._logged_at = (state.global_step, time.perf_counter())

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Log the loss and the throughput."""
        last_step, last_time = self._logged_at
        if state.global_step % _LOGGED_STEPS == 0:
            now = time.perf_counter()
            images = self.trainer.plan.optim.images_per_step * (state.global_step - last_step)
            throughput = images / max(now - last_time, 1e-9)
            self._log({"loss": self.trainer.last_loss, "images_per_s": throughput})
            self._logged_at = (state.global_step, now)

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Log the values of all matrices."""
        allocator = self.trainer.allocator
        if self.matrices and allocator is not None:
            self._log(self._measure(allocator.history[-1]["importance"]))

    def _log(self, values: dict[str, float]) -> None:
        """Log values to all trackers."""
        self.trainer.callback_handler.on_log(self.trainer.args, self.trainer.state, self.trainer.control, values)

    @torch.no_grad()
    def _measure(self, importance: Mapping[str, float]) -> dict[str, float]:
        """Compute the values of each matrix and the totals."""
        values: dict[str, float] = {}
        total_update_square = 0.0
        total_weight_square = 0.0
        for matrix in self.matrices:
            layer, name = matrix.layer, matrix.adapter_name
            spec, factors, budgets, *_ = layer.get_update(name)
            matrix_factors = list(spec.matrices(factors))[matrix.group]
            delta = spec.merge_matrix(matrix_factors)
            layer_weight = cast(torch.Tensor, layer.get_base_layer().weight).reshape(-1, delta.shape[1])
            weight = layer_weight[layer.matrix_rows(name)[matrix.group]]
            weight_square = weight.float().square().sum().item()
            update_square = (layer.scaling[name] * matrix.sparse_update()).float().square().sum().item()
            total_update_square += update_square
            total_weight_square += weight_square
            values[f"budget/{matrix.name}"] = matrix.budget
            values[f"threshold/{matrix.name}"] = float(spec.find_threshold(delta, budgets[matrix.group]))
            values[f"importance/{matrix.name}"] = importance[matrix.name]
            values[f"update_size/{matrix.name}"] = (update_square / weight_square) ** 0.5 if weight_square else 0.0
        values["snella/budget"] = sum(matrix.budget for matrix in self.matrices)
        values["snella/frozen_matrices"] = sum(matrix.is_frozen for matrix in self.matrices)
        relative_square = total_update_square / total_weight_square if total_weight_square else 0.0
        values["snella/update_size"] = relative_square**0.5
        return values


class ProgressDisplay(TrainerCallback):
    """Progress bar with loss, budget and throughput, and one line of results per epoch.

    Without a terminal, a line every half minute replaces the bar. After the first steps, the estimated remaining time
    is printed if it is at least a minute.

    Args:
        console: Output console. The bar appears only on a terminal.
        trainer: Trainer of the run. If its plan disables `progress`, neither the bar nor the lines that replace it
            appear.
        shorten: Function that maps the remaining time, divided by five minutes, to a hint on how to shorten the run.
    """

    def __init__(self, console: Console, trainer: "SnellaTrainer", shorten: Callable[[float], str]) -> None:
        self.console = console
        self.trainer = trainer
        self.shorten = shorten
        self.show_bar = trainer.plan.run.progress and console.is_terminal
        self.show_lines = trainer.plan.run.progress and not console.is_terminal
        self._bar: Progress | None = None
        self._bar_task: Any = None
        self._best = (-math.inf, -math.inf)
        self._step_ends: deque[float] = deque(maxlen=_TIMED_STEPS)
        self._last_line = 0.0
        self._has_estimated = False
        self._first_loss: float | None = None
        self._has_warned = False

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Restore the best score and the first loss of a resumed run, and start the bar at the current step."""
        past_epochs = [row for row in state.log_history if "budget" in row]  # only epoch rows have a budget
        self._best = max((self.trainer.selection_score(row) for row in past_epochs), default=self._best)
        # epoch 0 is the model before training, so its training loss is NaN
        self._first_loss = next((row["train_loss"] for row in past_epochs if math.isfinite(row["train_loss"])), None)
        self._last_line = time.monotonic()
        self._step_ends.append(self._last_line)
        if self.show_bar and state.is_world_process_zero:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[shown]}"),
            )
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._bar_task = self._bar.add_task(
                "training", total=state.max_steps, completed=state.global_step, shown="the first step takes longest"
            )
            self._bar.start()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Update the bar or print progress lines at intervals, and print the estimated remaining time once."""
        if not state.is_world_process_zero:
            return
        now = time.monotonic()
        self._step_ends.append(now)
        timed_steps = len(self._step_ends) - 1
        steps_left = state.max_steps - state.global_step
        step_s = self._step_s()
        left_s = step_s * steps_left
        are_steps_long = timed_steps > 1 and now - self._step_ends[0] >= _ESTIMATE_S
        if not self._has_estimated and (timed_steps >= _ESTIMATE_STEPS or are_steps_long):
            self._has_estimated = True
            if left_s >= 60:
                hint = self.shorten(left_s / _LONG_S) if left_s > _LONG_S else ""
                estimate = f"{steps_left} steps of {seconds_text(step_s)}{hint}"
                print_line(self.console, f"about {seconds_text(left_s)} remaining: {estimate}")
                self._last_line = now
        if self.show_lines and now - self._last_line >= _LINE_S:
            self._last_line = now
            remaining = f"  about {seconds_text(left_s)} remaining" if timed_steps > 1 else ""
            step = f"step {state.global_step}/{state.max_steps}"
            print_line(self.console, f"{step}  loss {self.trainer.last_loss:.4f}{self._throughput()}{remaining}")
        if self._bar is not None:
            epoch = f"epoch {math.ceil(state.epoch)}/{state.num_train_epochs}"
            shown = f"loss {self.trainer.last_loss:.3f}{self._budget()}{self._throughput()}"
            self._bar.update(self._bar_task, completed=state.global_step, description=epoch, shown=shown)

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        """Show in the bar that evaluation is running."""
        split = self.trainer.protocol.selected_on
        if self._bar is not None and split is not None:
            self._bar.update(self._bar_task, shown=f"evaluating on {split} images")

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Print the results of the epoch, and warn once if the training loss has risen well above the first epoch's."""
        if not state.is_world_process_zero:
            return
        score = self.trainer.selection_score(metrics)
        protocol = self.trainer.protocol
        is_best = score >= self._best
        self._best = max(self._best, score)
        split = protocol.selected_on
        scores = ""
        if split is not None and f"{split}_loss" in metrics:
            task_scores = self.trainer.task.epoch_format.format_map(protocol.with_val_prefix(metrics))
            scores = f"  {split} loss {metrics[f'{split}_loss']:.4f}  {task_scores}"
        is_best = is_best and bool(scores)  # epochs that were not evaluated have equal scores
        best = "  best" if is_best else ""
        epoch = f"epoch {round(state.epoch):>3}/{state.num_train_epochs}"
        if state.global_step == 0:
            print_line(self.console, f"{epoch}  before training{scores}{best}")
            return
        loss = metrics["train_loss"]
        print_line(self.console, f"{epoch}  loss {loss:.4f}{scores}{self._budget()}{best}")
        self._first_loss = loss if self._first_loss is None else self._first_loss
        # the loss may also rise while the scores improve, for example with MixUp
        is_harmful = loss > _RISING_RATIO * self._first_loss and not is_best
        if is_harmful and state.global_step >= _RISING_AFTER_STEPS and not self._has_warned:
            self._has_warned = True
            print_line(
                self.console,
                f"the training loss has risen from {self._first_loss:.4f} to {loss:.4f}: the learning rate is probably "
                "too high; stop the run and retry with --lr reduced to a third",
            )

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Remove the bar."""
        self.close()

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _step_s(self) -> float:
        """Return the median time of recent steps without the oldest, if there are several: the first step compiles."""
        spans = [after - before for before, after in pairwise(self._step_ends)]
        return statistics.median(spans[1:] or spans)

    def _throughput(self) -> str:
        """Format the throughput. Returns an empty string until two steps have ended, because the first one compiles."""
        if len(self._step_ends) <= 2:
            return ""
        return f"  {self.trainer.plan.optim.images_per_step / max(self._step_s(), 1e-9):,.0f} images/s"

    def _budget(self) -> str:
        """Format the total budget as a fraction of the adapted weights. Returns an empty string if there is none."""
        allocator = self.trainer.allocator
        if allocator is None:
            return ""
        return f"  budget {sum(allocator.budgets.values()) / allocator.total_weights:.1%}"
