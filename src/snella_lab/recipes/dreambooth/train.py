"""DreamBooth training with bit-identical resume."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from rich.console import Console
from torch import Tensor, nn

from snella import BudgetAllocator
from snella_app.console import counted, make_console, print_line, print_rows
from snella_app.device import choose_device
from snella_app.methods import load_trained_into, save_trained
from snella_app.methods.registry import adapt_headless
from snella_app.records import BackboneInfo, DataInfo, FixedLoss, LossRow, RunInfo, read
from snella_app.training.checkpoints import (
    checkpoint_to_resume,
    convert_read_errors,
    convert_write_errors,
    remove_incomplete,
    stage_checkpoint,
)
from snella_app.training.results import (
    describe_allocation,
    describe_generator,
    matrices_of,
    sparsity_summary,
    trainable_parameters,
)
from snella_app.training.sampler import EpochSampler, mix_seed
from snella_app.training.session import (
    InterruptCallback,
    NonFiniteLossError,
    lock_run,
    record_status,
)
from snella_lab.recipes.dreambooth.config import DreamBoothConfig, DreamBoothFolder
from snella_lab.recipes.dreambooth.data import Concept, load_concept
from snella_lab.recipes.dreambooth.generate import SamplingConfig, adapter_source, generate_images, sampling_of
from snella_lab.recipes.dreambooth.pipeline import (
    LatentImages,
    PromptEmbedding,
    check_resolution,
    embed_prompts,
    encode_images,
    load_pipeline,
)
from snella_lab.recipes.dreambooth.report import write_generation_report
from snella_lab.recipes.run import build_optimizer, describe_run, progress_bar

_LOGIT_MEAN, _LOGIT_STD, _MODE_SCALE = 0.0, 1.0, 1.29


class FlowMatching:
    """Rectified flow between images and noise.

    z_σ = (1 − σ) z + σ ε,      loss = w(σ) · mean |v(z_σ, σ) − (ε − z)|²

    `v` is the transformer. With `precondition`, the loss compares the images z and z_σ − σ v, which weights the same
    error by σ².

    Args:
        scheduler: The pipeline's scheduler. It is recreated from its configuration, because sampling modifies it.
        weighting: Timestep sampling and loss weighting. `logit_normal` and `mode` sample timesteps non-uniformly.
            `sigma_sqrt` and `cosmap` sample uniformly and weight the loss. `uniform` does neither.
        precondition: Compute the loss on images instead of velocities.

    Source: Esser et al., arXiv 2403.03206, section 3, with the defaults of diffusers' DreamBooth training.
    """

    def __init__(self, scheduler: FlowMatchEulerDiscreteScheduler, weighting: str, precondition: bool) -> None:
        copy = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
        self.sigmas, self.times = copy.sigmas[: len(copy.timesteps)], copy.timesteps
        self.weighting = weighting
        self.precondition = precondition

    def sample_times(self, count: int, generator: torch.Generator) -> Tensor:
        """Sample `count` relative positions, in [0, 1), in the list of timesteps."""
        return compute_density_for_timestep_sampling(
            self.weighting, count, _LOGIT_MEAN, _LOGIT_STD, _MODE_SCALE, generator=generator
        )

    def losses(
        self, transformer: nn.Module, images: Tensor, noise: Tensor, times: Tensor, prompt: PromptEmbedding
    ) -> Tensor:
        """Compute the loss of each image.

        Args:
            transformer: Velocity model.
            images: Latents, `[n, c, h, w]`.
            noise: Noise, `[n, c, h, w]`.
            times: Relative positions in the list of timesteps, `[n]`, in [0, 1).
            prompt: Prompt shared by all images.

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
    """Image latents and their prompt."""

    images: LatentImages
    prompt: PromptEmbedding


class DreamBoothTrainer:
    """DreamBooth training loop.

    Images, noise and timesteps of a micro-batch depend only on the seed, the step and the micro-batch index, so a
    resumed run samples the same values. Images are reshuffled each epoch.

    Args:
        model: Adapted model from `adapt_headless`.
        config: Resolved settings.
        loss: Flow-matching loss.
        subject: Images of the subject.
        classes: Class images; None without prior preservation.
        run: Run folder for checkpoints.
        device: Training device.

    Attributes:
        history: `step`, `loss`, `grad_norm` and `budget` of each step.
        loss_before: Loss on fixed noise and timesteps before the first step.
        loss_after: Loss on fixed noise and timesteps after the last step.
        allocator: Budget allocator; None for methods without budgets.
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
        # otherwise accelerate reuses the settings of the first Accelerator in the process
        AcceleratorState._reset_state(reset_partial_state=True)
        precision = "bf16" if config.optim.precision == "bf16" else "no"
        self.accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision)
        self.model, self.config, self.loss, self.run_folder, self.device = model.to(device), config, loss, run, device
        self.subject, self.classes = subject, classes
        if config.optim.gradient_checkpointing:
            transformer: Any = getattr(model, "get_base_model", lambda: model)()
            transformer.enable_gradient_checkpointing()
        self.optimizer, self.optimizer_name = build_optimizer(model, config.optim, device)
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.loss_before, self.loss_after = math.nan, math.nan
        self._earlier_s, self._start = 0.0, time.monotonic()
        self.allocator: BudgetAllocator | None = None
        if matrices_of(model):
            effective_batch_size = config.optim.batch_size * config.optim.accumulation
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
        """Training time in seconds, including the time before interruptions."""
        return self._earlier_s + time.monotonic() - self._start

    def run(self, console: Console, interrupt: InterruptCallback) -> None:
        """Train up to the last step.

        Raises:
            KeyboardInterrupt: If training was interrupted; a checkpoint is saved.
            NonFiniteLossError: If the loss or gradient is not finite; the step is discarded.
        """
        if math.isnan(self.loss_before):
            self.loss_before = self.fixed_loss()
        prepared, optimizer = self.accelerator.prepare(self.model, self.optimizer)
        if self.allocator is not None:
            self.allocator.attach(optimizer)
        prepared.train()
        with progress_bar(console, is_shown=self.config.run.progress) as bar:
            task = bar.add_task("training", total=self.config.steps, completed=self.step)
            while self.step < self.config.steps:
                self._take_step(prepared, optimizer)
                bar.update(task, completed=self.step, description=self._log_line())
                is_due = self.step % self.config.save_every == 0 or self.step == self.config.steps
                if is_due or interrupt.is_requested:
                    self.save()
                if is_due:
                    print_line(console, self._log_line())
                if interrupt.is_requested and self.step < self.config.steps:
                    raise KeyboardInterrupt
        if self.allocator is not None:
            self.allocator.detach()
        self.accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        self.model.eval()
        self.loss_after = self.fixed_loss()

    def save(self) -> None:
        """Write a checkpoint atomically, then delete older ones.

        Raises:
            CheckpointError: If writing failed, e.g. because the disk is full; the last checkpoint is kept.
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
        with stage_checkpoint(self.run_folder, name) as staging:
            save_trained(self.model, staging / name)
            torch.save(state, staging / name / _STATE)
        remove_incomplete(folder)

    def load(self, checkpoint: Path) -> None:
        """Load a checkpoint.

        Raises:
            CheckpointError: If the checkpoint contains another optimizer's state or no trainer state.
        """
        with convert_read_errors(checkpoint):
            load_trained_into(self.model, checkpoint)
            state = torch.load(checkpoint / _STATE, map_location=self.device, weights_only=True)
            self.step, self.history, self.loss_before = state["step"], state["history"], state["loss_before"]
            self._earlier_s = state["elapsed_s"]
            self.optimizer.load_state_dict(state["optimizer"])

    @torch.no_grad()
    def fixed_loss(self) -> float:
        """Compute the mean loss over the subject's images at evenly spaced timesteps, with fixed noise."""
        was_training = self.model.training
        self.model.eval()
        generator = torch.Generator().manual_seed(mix_seed(self.config.run.seed, _FIXED))
        values = []
        for image_index in range(len(self.subject.images)):
            for index in range(_FIXED_TIMES):
                times = torch.tensor([(index + 0.5) / _FIXED_TIMES])
                values.append(self._losses(self.model, self.subject, [image_index], times, generator).mean().item())
        self.model.train(was_training)
        return math.fsum(values) / len(values)

    def _take_step(self, model: nn.Module, optimizer: Any) -> None:
        """Run one optimizer step: accumulate gradients, clip and update."""
        config, total = self.config, 0.0
        for number in range(config.optim.accumulation):
            torch.manual_seed(mix_seed(config.run.seed, _GLOBAL, self.step, number))
            generator = torch.Generator().manual_seed(mix_seed(config.run.seed, _NOISE, self.step, number))
            position = self.step * config.optim.accumulation + number
            loss = self._micro_batch_loss(model, self.subject, position, generator)
            if self.classes is not None:
                loss = loss + config.prior_weight * self._micro_batch_loss(model, self.classes, position, generator)
            self._check_finite("the loss", loss.item())
            total += loss.item() / config.optim.accumulation
            self.accelerator.backward(loss / config.optim.accumulation)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        norm = self.accelerator.clip_grad_norm_(trained, config.optim.max_grad_norm or math.inf)
        grad_norm = 0.0 if norm is None else float(norm)
        self._check_finite("the gradient", grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        self.step += 1
        self.history.append({"step": self.step, "loss": total, "grad_norm": grad_norm, "budget": self._budget()})

    def _micro_batch_loss(
        self, model: nn.Module, training_set: TrainingSet, position: int, generator: torch.Generator
    ) -> Tensor:
        """Compute the mean loss of the micro-batch at a global position."""
        count, total = self.config.optim.batch_size, len(training_set.images)
        indices = [_epoch_index(total, self.config.run.seed, position * count + k) for k in range(count)]
        return self._losses(model, training_set, indices, self.loss.sample_times(count, generator), generator).mean()

    def _losses(
        self, model: nn.Module, training_set: TrainingSet, indices: list[int], times: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Compute the loss of each indexed image at the given timesteps."""
        images = training_set.images.sample(indices, generator)
        noise = torch.randn(images.shape, generator=generator)
        with self.accelerator.autocast():
            return self.loss.losses(model, images.to(self.device), noise.to(self.device), times, training_set.prompt)

    def _budget(self) -> int | None:
        """Return the current total budget."""
        return None if self.allocator is None else sum(self.allocator.budgets.values())

    def _check_finite(self, name: str, value: float) -> None:
        """Raise an error for a non-finite value."""
        if math.isfinite(value):
            return
        optim, scaling = self.config.optim, self.config.method.scaling
        options = {"lr": optim.lr, "scalar_lr": optim.scalar_lr, "scaling": scaling}
        suggestions = ", ".join(
            f"--{option.replace('_', '-')} (now {rate:g})" for option, rate in options.items() if rate
        )
        raise NonFiniteLossError(
            f"{name} became {value} in step {self.step + 1} of {self.config.steps}; the last checkpoint in "
            f"{self.run_folder.checkpoints} is kept; start a new run with a lower {suggestions}"
        )

    def _log_line(self) -> str:
        """Format step, recent loss and budget as a log line."""
        recent = [row["loss"] for row in self.history[-_RECENT:]]
        text = f"step {self.step:>5}/{self.config.steps}  loss {math.fsum(recent) / len(recent):.5f}"
        if self.allocator is not None:
            text += f"  budget {self._budget() / self.allocator.total_weights:.1%}"  # type: ignore[operator]
        return text


def _epoch_index(count: int, seed: int, position: int) -> int:
    """Return the image index at a global position; each epoch visits every image once in a new order."""
    order = EpochSampler(count, seed)
    order.set_epoch(position // count)
    return list(order)[position % count]


_PACKAGES = ("snella", "torch", "peft", "diffusers", "transformers", "accelerate")


def _describe_run(config: DreamBoothConfig, concept: Concept) -> RunInfo:
    """Build the record of a new run."""
    data = DataInfo(
        spec=str(config.data),
        subject=concept.name,
        class_name=config.class_name,
        seed=config.run.seed,
        description=f"{counted(len(concept.paths), 'image')} of {concept.name}, prompt “{config.prompt}”",
        sizes={"train": len(concept.paths)},
        digest=concept.digest(),
        folder=str(concept.paths[0].parent),
        files=[path.name for path in concept.paths],
        notes=list(concept.notes),
    )
    backbone = BackboneInfo(name=str(config.pipeline), img_size=config.resolution)
    return describe_run(config, "dreambooth", backbone, data, _PACKAGES)


def _print_summary(console: Console, trainer: DreamBoothTrainer, concept: Concept) -> None:
    """Print the data, model and settings of a run."""
    config, matrices = trainer.config, matrices_of(trainer.model)
    adapted = f"; {len(matrices)} matrices, {sum(m.size for m in matrices):,} adapted weights" if matrices else ""
    training = (
        f"{counted(config.steps, 'step')}, {counted(config.optim.batch_size * config.optim.accumulation, 'image')} each"
    )
    rows = [
        ("subject", f"{concept.name}, {counted(len(concept.paths), 'image')}"),
        *(("note", note) for note in concept.notes),
        ("prompt", str(config.prompt)),
        *([("class", f"{config.class_prompt}, {config.class_images} images")] if config.prior_weight > 0 else []),
        ("pipeline", f"{config.pipeline}, {config.resolution}×{config.resolution} px"),
        ("method", f"{config.method.name}, {trainable_parameters(trainer.model):,} trainable parameters{adapted}"),
        ("training", f"{training}, lr {config.optim.lr:g}, on {trainer.device}"),
        ("optimizer", trainer.optimizer_name),
    ]
    print_rows(console, rows)


def personalize(config: DreamBoothConfig, console: Console | None = None) -> DreamBoothFolder:
    """Fine-tune a Stable Diffusion 3 pipeline on a subject and write the run folder.

    Args:
        config: Settings. `resume` continues the stored run, with its settings, from the last checkpoint.
        console: Output console; stdout if None.

    Returns:
        The folder of the finished run.

    Raises:
        FileExistsError: If the folder contains a run, and neither `resume` nor `overwrite` is set.
        RunInUseError: If another process is writing to the folder.
        FileNotFoundError: If images, subject or pipeline do not exist.
        ValueError: If settings conflict, images are corrupt, or a resumed run's images have changed.
        TrainingInterrupted: If training was interrupted; a checkpoint is saved.
        NonFiniteLossError: If the loss or gradient became infinite or NaN; the last checkpoint is kept.
        CheckpointError: If the disk is full (the last checkpoint is kept), or the resumed checkpoint is damaged.
    """
    console = console or make_console(survives_closed_output=True)
    run = DreamBoothFolder(str(config.run.out))
    with lock_run(run):
        return _personalize(config, run, console)


def _personalize(config: DreamBoothConfig, run: DreamBoothFolder, console: Console) -> DreamBoothFolder:
    """Run `personalize` with the folder locked."""
    config, status = run.resolve_resume(config)
    if status == "finished":
        print_line(console, f"{run.path} is already finished; report {run.report}")
        if not run.report.is_file():
            write_generation_report(run.path)
        return run
    is_resumed = status is not None
    device = choose_device(config.run.device)
    concept = load_concept(str(config.data), config.subject, skip_corrupt=config.skip_corrupt)
    if is_resumed:
        _check_images(run, concept)
    config = config.with_class_name(concept.class_name)
    encoder_dtype = torch.bfloat16 if config.optim.precision == "bf16" else torch.float32
    pipeline = load_pipeline(str(config.pipeline), encoder_dtype=encoder_dtype)
    check_resolution(pipeline, config.resolution)
    run.prepare(config, is_resumed=is_resumed)
    run.write(_describe_run(config, concept))
    with record_status(run, "dreambooth"), InterruptCallback() as interrupt:
        sampling = sampling_of(config)
        subject = _training_set(pipeline, config, device, str(config.prompt), concept)
        classes = None
        if config.prior_weight > 0:
            class_images = generate_images(
                run.path / "class_images",
                pipeline,
                [str(config.class_prompt)],
                range(config.class_images),
                sampling,
                device,
                console,
                source=str(config.pipeline),
                show_bar=config.run.progress,
            )
            class_concept = Concept("class_images", [image.path for image in class_images])
            classes = _training_set(pipeline, config, device, str(config.class_prompt), class_concept)
        torch.manual_seed(config.run.seed)
        model = adapt_headless(config.method.name, pipeline.transformer, config.method.all_options())
        loss = FlowMatching(pipeline.scheduler, config.weighting, config.precondition)
        trainer = DreamBoothTrainer(model, config, loss, subject, classes, run, device)
        _print_summary(console, trainer, concept)
        if (checkpoint := checkpoint_to_resume(run, console)) is not None:
            trainer.load(checkpoint)
        trainer.run(console, interrupt)
        _finish(trainer, pipeline, sampling, run, console)
    return run


def _check_images(run: DreamBoothFolder, concept: Concept) -> None:
    """Check that a resumed run's images have not changed."""
    stored = read(RunInfo, run.path).data
    if stored.digest not in (None, concept.digest()):
        expected, actual = stored.sizes.get("train"), len(concept.paths)
        raise ValueError(
            f"data must contain the {expected} images that {run.path} was started with, got {actual} images in "
            f"{concept.paths[0].parent} with different content; restore them, or start a new run"
        )


def _training_set(
    pipeline: StableDiffusion3Pipeline, config: DreamBoothConfig, device: torch.device, prompt: str, concept: Concept
) -> TrainingSet:
    """Encode the images and the prompt."""
    embedded = embed_prompts(pipeline, [prompt], device, config.max_sequence_length)[0]
    images = encode_images(pipeline, concept.images(), device, config.resolution, flip=config.flip)
    return TrainingSet(images, embedded)


def _finish(
    trainer: DreamBoothTrainer,
    pipeline: StableDiffusion3Pipeline,
    sampling: SamplingConfig,
    run: DreamBoothFolder,
    console: Console,
) -> None:
    """Save the adapter, generate sample images, and write the results and the report."""
    config = trainer.config
    with convert_write_errors(run.adapter):
        save_trained(trainer.model, run.adapter)
    if trainer.allocator is not None:
        run.write(describe_allocation(trainer.model, trainer.allocator))
    peak = torch.cuda.max_memory_allocated(trainer.device) / 2**20 if trainer.device.type == "cuda" else None
    run.write(
        describe_generator(
            trainer.model,
            run.adapter,
            train_s=round(trainer.elapsed_s, 3),
            peak_gpu_mib=peak,
            optimizer=trainer.optimizer_name,
            fixed_loss=FixedLoss(trainer.loss_before, trainer.loss_after),
            loss_history=[LossRow(**row) for row in trainer.history],
        )
    )
    if config.samples:
        generate_images(
            run.path / "samples",
            pipeline,
            [str(config.prompt)],
            range(config.run.seed, config.run.seed + config.samples),
            sampling,
            trainer.device,
            console,
            source=adapter_source(run, config),
            overwrite=True,
            show_bar=config.run.progress,
        )
    run.finish()
    report = write_generation_report(run.path)
    print_line(
        console,
        f"loss on fixed noise: {trainer.loss_before:.5f} before, {trainer.loss_after:.5f} after {config.steps} steps",
    )
    matrices = matrices_of(trainer.model)
    if matrices:
        print_line(console, f"the update {sparsity_summary(matrices)}")
    print_line(console, f"adapter {run.adapter}, report {report}")
