"""`DreamBoothTrainer`: the training loop, bit-identical when resumed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from snella import BudgetAllocator
from snella._console import print_line
from snella.methods import load_trained_into, save_trained
from snella.recipes.dreambooth.config import DreamBoothConfig, DreamBoothFolder
from snella.recipes.dreambooth.pipeline import LatentImages, PromptEmbedding
from snella.training.checkpoints import reading_checkpoint, remove_incomplete, staged
from snella.training.optimizer import build_low_bit_optimizer
from snella.training.results import matrices_of
from snella.training.sampler import EpochSampler, mix_seed
from snella.training.session import InterruptCallback, NonFiniteLossError

_LOGIT_MEAN, _LOGIT_STD, _MODE_SCALE = 0.0, 1.0, 1.29


class FlowMatching:
    """Rectified flow between images and noise.

    z_σ = (1 − σ) z + σ ε,      loss = w(σ) · mean |v(z_σ, σ) − (ε − z)|²

    `v` is the transformer. With `precondition` it is the images that are compared, z against z_σ − σ v, which weights
    the same error by σ².

    Args:
        scheduler: Of the pipeline; a fresh one of its configuration is used, since sampling changes a scheduler.
        weighting: `logit_normal` and `mode` draw the times unevenly; `sigma_sqrt` and `cosmap` draw them evenly and
            weight the loss; `uniform` does neither.
        precondition: Compare images instead of velocities.

    Source: Esser et al., arXiv 2403.03206, section 3, with the defaults of diffusers' DreamBooth training.
    """

    def __init__(self, scheduler: FlowMatchEulerDiscreteScheduler, weighting: str, precondition: bool) -> None:
        fresh = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
        self.sigmas, self.times = fresh.sigmas[: len(fresh.timesteps)], fresh.timesteps
        self.weighting = weighting
        self.precondition = precondition

    def draw_times(self, count: int, generator: torch.Generator) -> Tensor:
        """Sample `count` positions in [0, 1) of the list of times, distributed by the weighting."""
        return compute_density_for_timestep_sampling(
            self.weighting, count, _LOGIT_MEAN, _LOGIT_STD, _MODE_SCALE, generator=generator
        )

    def losses(
        self, transformer: nn.Module, images: Tensor, noise: Tensor, times: Tensor, prompt: PromptEmbedding
    ) -> Tensor:
        """Loss of each image.

        Args:
            transformer: Predicts velocities.
            images: Latent images, `[n, c, h, w]`.
            noise: `[n, c, h, w]`.
            times: Places in the list of times, `[n]`, in [0, 1).
            prompt: Of all images.

        Returns:
            `[n]`, float32.
        """
        device = images.device
        indices = (times * len(self.times)).long().clamp_max(len(self.times) - 1).cpu()
        sigmas = self.sigmas[indices].to(device)[:, None, None, None]
        noisy = (1.0 - sigmas) * images + sigmas * noise
        tokens, pooled = prompt.repeated(len(images), device)
        velocity = transformer(
            hidden_states=noisy,
            timestep=self.times[indices].to(device),
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            return_dict=False,
        )[0].float()
        error = noisy - sigmas * velocity - images if self.precondition else velocity - (noise - images)
        return (compute_loss_weighting_for_sd3(self.weighting, sigmas) * error.square()).mean(dim=(1, 2, 3))


_STATE = "learner.pt"
_GLOBAL, _NOISE, _FIXED = 1, 2, 3
_FIXED_TIMES = 8
_RECENT = 20


@dataclass(frozen=True)
class TrainingSet:
    """Latent images and their prompt."""

    images: LatentImages
    prompt: PromptEmbedding


class DreamBoothTrainer:
    """Training of one adapter.

    Every forward pass draws image, noise and time from `(seed, step, pass)` alone, so that a resumed run repeats them.
    The images of a subject come in a new order each epoch; an epoch is one pass over them.

    Args:
        model: From `adapt_headless`.
        config: Resolved settings.
        loss: The loss.
        subject: Images of the subject.
        classes: Images of its class; None without prior preservation.
        run: Where checkpoints go.
        device: Where to train.

    Attributes:
        history: One row a step: `step`, `loss`, `grad_norm`, `budget`.
        loss_before: Loss on fixed noise and times before the first step.
        loss_after: The same after the last.
        allocator: Allocates the budget; None for methods without one.
    """

    def __init__(
        self,
        model: nn.Module,
        config: DreamBoothConfig,
        loss: FlowMatching,
        subject: TrainingSet,
        classes: TrainingSet | None,
        run: DreamBoothFolder,
        device: torch.device,
    ) -> None:
        # as transformers does: accelerate keeps the settings of the process's first Accelerator otherwise
        AcceleratorState._reset_state(reset_partial_state=True)
        precision = "bf16" if config.precision == "bf16" else "no"
        self.accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision)
        self.model, self.config, self.loss, self.run_folder, self.device = model.to(device), config, loss, run, device
        self.subject, self.classes = subject, classes
        if config.gradient_checkpointing:
            _transformer(model).enable_gradient_checkpointing()
        self.optimizer, self.optimizer_name = build_low_bit_optimizer(
            model,
            config.optimizer,
            device,
            lr=config.lr or 0.0,
            scalar_lr=config.scalar_lr,
            weight_decay=config.weight_decay,
        )
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.loss_before, self.loss_after = math.nan, math.nan
        self._earlier_s, self._start = 0.0, time.monotonic()
        self.allocator: BudgetAllocator | None = None
        if matrices_of(model):
            effective_batch_size = config.batch_size * config.accumulation
            steps_per_epoch = math.ceil(len(subject.images) / effective_batch_size)
            self.allocator = BudgetAllocator(
                model,
                total_epochs=math.ceil(config.steps / steps_per_epoch),
                steps_per_epoch=steps_per_epoch,
                total_steps=config.steps,
            )
            self.allocator.has_exact_steps = True

    @property
    def elapsed_s(self) -> float:
        """Seconds spent, those before an interruption included."""
        return self._earlier_s + time.monotonic() - self._start

    def run(self, console: Console, interrupt: InterruptCallback) -> None:
        """Train up to the last step.

        Raises:
            KeyboardInterrupt: Ctrl-C; a checkpoint is saved.
            NonFiniteLossError: Loss or gradient are not finite; nothing of that step is kept.
        """
        if math.isnan(self.loss_before):
            self.loss_before = self.fixed_loss()
        prepared, optimizer = self.accelerator.prepare(self.model, self.optimizer)
        if self.allocator is not None:
            self.allocator.attach(optimizer)
        prepared.train()
        with self._bar(console) as show:
            while self.step < self.config.steps:
                self._take_step(prepared, optimizer)
                show()
                is_due = self.step % self.config.save_every == 0 or self.step == self.config.steps
                if is_due or interrupt.is_requested:
                    self.save()
                if is_due:
                    print_line(console, self._line())
                if interrupt.is_requested and self.step < self.config.steps:
                    raise KeyboardInterrupt
        if self.allocator is not None:
            self.allocator.detach()
        self.accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        self.model.eval()
        self.loss_after = self.fixed_loss()

    def save(self) -> None:
        """Write a checkpoint atomically, and then remove the older ones.

        Raises:
            CheckpointError: Writing failed, as on a full disk; the last checkpoint is kept.
        """
        folder, name = self.run_folder.checkpoints, f"checkpoint-{self.step}"
        if (folder / name).is_dir():
            return
        state = {
            "step": self.step,
            "history": self.history,
            "loss_before": self.loss_before,
            "elapsed_s": self.elapsed_s,
            "optimizer": self.optimizer.state_dict(),
        }
        with staged(folder, name) as staging:
            save_trained(self.model, staging / name)
            torch.save(state, staging / name / _STATE)
        remove_incomplete(folder)

    def load(self, checkpoint: Path) -> None:
        """Load a checkpoint.

        Raises:
            CheckpointError: It was written with another optimizer, or holds something else than a learner's state.
        """
        with reading_checkpoint(checkpoint):
            load_trained_into(self.model, checkpoint)
            state = torch.load(checkpoint / _STATE, map_location=self.device, weights_only=True)
            self.step, self.history, self.loss_before = state["step"], state["history"], state["loss_before"]
            self._earlier_s = state["elapsed_s"]
            self.optimizer.load_state_dict(state["optimizer"])

    @torch.no_grad()
    def fixed_loss(self) -> float:
        """Mean loss over all images of the subject at evenly spaced times, with fixed noise."""
        was_training = self.model.training
        self.model.eval()
        generator = torch.Generator().manual_seed(mix_seed(self.config.seed, _FIXED))
        values = []
        for index in range(len(self.subject.images)):
            for number in range(_FIXED_TIMES):
                time_of_it = torch.tensor([(number + 0.5) / _FIXED_TIMES])
                values.append(self._losses(self.model, self.subject, [index], time_of_it, generator).mean().item())
        self.model.train(was_training)
        return math.fsum(values) / len(values)

    def _take_step(self, model: nn.Module, optimizer: Any) -> None:
        """One optimizer step: several passes forward and backward, clipping, the update."""
        config, total = self.config, 0.0
        for number in range(config.accumulation):
            torch.manual_seed(mix_seed(config.seed, _GLOBAL, self.step, number))
            generator = torch.Generator().manual_seed(mix_seed(config.seed, _NOISE, self.step, number))
            loss = self._pass_loss(model, self.subject, self.step * config.accumulation + number, generator)
            if self.classes is not None:
                position = self.step * config.accumulation + number
                loss = loss + config.prior_weight * self._pass_loss(model, self.classes, position, generator)
            self._check("the loss", loss.item())
            total += loss.item() / config.accumulation
            self.accelerator.backward(loss / config.accumulation)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        norm = self.accelerator.clip_grad_norm_(trained, config.max_grad_norm or math.inf)
        grad_norm = 0.0 if norm is None else float(norm)
        self._check("the gradient", grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        self.step += 1
        self.history.append({"step": self.step, "loss": total, "grad_norm": grad_norm, "budget": self._budget()})

    def _pass_loss(
        self, model: nn.Module, training_set: TrainingSet, position: int, generator: torch.Generator
    ) -> Tensor:
        """Mean loss of the images of micro-batch number `position`."""
        count = self.config.batch_size
        chosen = [_epoch_index(len(training_set.images), self.config.seed, position * count + k) for k in range(count)]
        return self._losses(model, training_set, chosen, self.loss.draw_times(count, generator), generator).mean()

    def _losses(
        self, model: nn.Module, training_set: TrainingSet, indices: list[int], times: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Loss of each of these images at these times."""
        images = training_set.images.draw(indices, generator)
        noise = torch.randn(images.shape, generator=generator)
        with self.accelerator.autocast():
            return self.loss.losses(model, images.to(self.device), noise.to(self.device), times, training_set.prompt)

    def _budget(self) -> int | None:
        """Weights kept at present, over all matrices."""
        return None if self.allocator is None else sum(self.allocator.budgets.values())

    def _check(self, what: str, value: float) -> None:
        """Refuse values that are not finite."""
        if math.isfinite(value):
            return
        rates = {name: getattr(self.config, name) for name in ("lr", "scalar_lr", "scaling")}
        shown = ", ".join(f"--{name.replace('_', '-')} (now {rate:g})" for name, rate in rates.items() if rate)
        raise NonFiniteLossError(
            f"{what} became {value} in step {self.step + 1} of {self.config.steps}; the last checkpoint in "
            f"{self.run_folder.checkpoints} is kept; start a new run with a lower {shown}"
        )

    def _line(self) -> str:
        """The state of training, human-readable."""
        recent = [row["loss"] for row in self.history[-_RECENT:]]
        text = f"step {self.step:>5}/{self.config.steps}  loss {math.fsum(recent) / len(recent):.5f}"
        if self.allocator is not None:
            text += f"  budget {self._budget() / self.allocator.total_weights:.1%}"  # type: ignore[operator]
        return text

    @contextmanager
    def _bar(self, console: Console) -> Iterator[Callable[[], None]]:
        """A progress bar on a terminal; yields the function that updates it."""
        if not (self.config.progress and console.is_terminal):
            yield lambda: None
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("training", total=self.config.steps, completed=self.step)
            yield lambda: bar.update(task, completed=self.step, description=self._line())


def _epoch_index(count: int, seed: int, position: int) -> int:
    """The index of the image at a position: each comes once per epoch, in the epoch's order."""
    order = EpochSampler(count, seed)
    order.set_epoch(position // count)
    return list(order)[position % count]


def _transformer(model: nn.Module) -> Any:
    """The transformer within an adapter."""
    return getattr(model, "get_base_model", lambda: model)()
