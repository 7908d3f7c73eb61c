"""DreamBooth training that resumes bit-identically.

Prior preservation means that the model is also trained on generated images of the subject's class. The budget of an
adapted matrix is the number of its weights that the update may change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler

from snella import BudgetAllocator, SnellaCallback
from snella_app.console import counted, make_console, print_line, print_rows
from snella_app.device import choose_device
from snella_app.methods.model_parts import base_model
from snella_app.methods.registry import matrices_of
from snella_app.records.generators import FixedLoss, LossRow
from snella_app.records.run import BackboneInfo, DataInfo, RunInfo
from snella_app.training.build import EpochSampler, mix_seed
from snella_app.training.checkpoints import base_training_arguments, latest_checkpoint
from snella_app.training.plan import describe_method
from snella_app.training.session import lock_run, record_status
from snella_lab.recipes.dreambooth.config import DreamBoothConfig, DreamBoothFolder
from snella_lab.recipes.dreambooth.data import Concept, load_concept
from snella_lab.recipes.dreambooth.generate import ImageGenerator, adapter_source, sampling_of
from snella_lab.recipes.dreambooth.pipeline import (
    LatentImages,
    PromptEmbedding,
    check_resolution,
    embed_prompts,
    encode_images,
    load_pipeline,
)
from snella_lab.recipes.dreambooth.report import write_generation_report
from snella_lab.recipes.trainer import RecipeTrainer, adapt_headless, describe_run

_LOGIT_MEAN = 0.0
_LOGIT_STD = 1.0
_MODE_SCALE = 1.29
# the second part of a seed identifies the random number generator
_GLOBAL = 1  # PyTorch's global generator
_NOISE = 2  # for the latents, timesteps, and noise of a micro-batch
_FIXED = 3  # for the loss on fixed noise
_NUM_FIXED_TIMES = 8  # timesteps per image for that loss
_PACKAGES = ("snella", "torch", "peft", "diffusers", "transformers", "accelerate")


class FlowMatching(nn.Module):
    """Rectified-flow loss of a transformer on the straight path from images z to noise ε.

    z_σ = (1 − σ) z + σ ε,      loss = w(σ) · mean |v(z_σ, σ) − (ε − z)|²

    `v` is the transformer. With `precondition`, the loss compares the image z with its prediction z_σ − σ v, so the
    squared error is multiplied by σ².

    Args:
        transformer: Velocity model.
        scheduler: The pipeline's scheduler. It is recreated from its configuration, because sampling modifies it.
        weighting: Timestep sampling and loss weighting. `logit_normal` and `mode` sample timesteps non-uniformly.
            `sigma_sqrt` and `cosmap` sample uniformly and weight the loss. `uniform` samples uniformly without weights.
        precondition: Compute the loss on predicted images instead of velocities.

    Source: Esser et al., arXiv 2403.03206, section 3, with the defaults of diffusers' DreamBooth script.
    """

    def __init__(
        self, transformer: nn.Module, scheduler: FlowMatchEulerDiscreteScheduler, weighting: str, precondition: bool
    ) -> None:
        super().__init__()
        fresh_scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
        self.sigmas = fresh_scheduler.sigmas[: len(fresh_scheduler.timesteps)]
        self.times = fresh_scheduler.timesteps
        self.transformer = transformer
        self.weighting = weighting
        self.precondition = precondition

    def sample_times(self, count: int, generator: torch.Generator) -> Tensor:
        """Sample `count` positions in the list of timesteps, from 0 (its start) to 1 (its end)."""
        return compute_density_for_timestep_sampling(
            self.weighting, count, _LOGIT_MEAN, _LOGIT_STD, _MODE_SCALE, generator=generator
        )

    def forward(self, images: Tensor, noise: Tensor, times: Tensor, prompt: PromptEmbedding) -> Tensor:
        """Compute the loss of each image, `[n]` float32.

        Args:
            images: Latents, `[n, c, h, w]`.
            noise: Noise, `[n, c, h, w]`.
            times: Relative positions in the list of timesteps, `[n]`, in [0, 1].
            prompt: Embedding of the prompt that all images share.
        """
        device = images.device
        indices = (times * len(self.times)).long().clamp_max(len(self.times) - 1).cpu()
        sigmas = self.sigmas[indices].to(device)[:, None, None, None]
        noisy = (1.0 - sigmas) * images + sigmas * noise
        tokens, pooled = prompt.repeated(len(images), device)
        velocity = self.transformer(
            hidden_states=noisy,
            timestep=self.times[indices].to(device),
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            return_dict=False,
        )[0].float()
        error = noisy - sigmas * velocity - images if self.precondition else velocity - (noise - images)
        return (compute_loss_weighting_for_sd3(self.weighting, sigmas) * error.square()).mean(dim=(1, 2, 3))


@dataclass(frozen=True)
class TrainingSet:
    """Image latents and their prompt."""

    images: LatentImages
    prompt: PromptEmbedding


class _StepAllocation(SnellaCallback):
    """`SnellaCallback` that counts a pass over the subject's images as an epoch.

    For the Trainer, the whole training is one epoch, because the items of its dataset are micro-batches, not images.
    """

    def __init__(self, model: nn.Module, total_steps: int, steps_per_epoch: int) -> None:
        super().__init__()
        epochs = math.ceil(total_steps / steps_per_epoch)
        self.allocator = BudgetAllocator(
            model, total_epochs=epochs, steps_per_epoch=steps_per_epoch, total_steps=total_steps
        )
        self.allocator.has_exact_steps = True

    def on_train_begin(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Attach the allocator."""
        if self.allocator is not None:
            self.allocator.attach(optimizer)


class DreamBoothTrainer(RecipeTrainer):
    """Trainer for DreamBooth.

    Images, noise, and timesteps of a micro-batch depend only on the seed and the index of the micro-batch, so a resumed
    run samples the same values. Images are reshuffled each epoch.

    Args:
        objective: Loss of the adapted transformer.
        config: Resolved settings.
        run: Run folder.
        console: Output console.
        subject: Latents and prompt of the subject's images.
        classes: Latents and prompt of the class images, or None if prior preservation is disabled.

    Attributes:
        loss_before: Loss on fixed noise and timesteps before the first step. NaN until it is computed.
    """

    def __init__(
        self,
        objective: FlowMatching,
        config: DreamBoothConfig,
        run: DreamBoothFolder,
        console: Console,
        subject: TrainingSet,
        classes: TrainingSet | None = None,
    ) -> None:
        self.objective: FlowMatching = objective
        self.subject = subject
        self.classes = classes
        self.loss_before = math.nan
        model = objective.transformer
        optim = config.optim
        steps_per_epoch = math.ceil(len(subject.images) / (optim.batch_size * optim.accumulation))
        allocation = _StepAllocation(model, config.steps, steps_per_epoch) if matrices_of(model) else None
        super().__init__(
            model,
            config,
            run,
            console,
            allocation,
            model=objective,
            train_dataset=range(config.steps * optim.accumulation),  # the items are the indices of micro-batches
            data_collator=lambda indices: {"index": indices[0]},
            args=base_training_arguments(
                run.checkpoints,
                choose_device(config.run.device),
                seed=config.run.seed,
                precision=optim.precision,
                max_steps=config.steps,
                per_device_train_batch_size=1,
                gradient_accumulation_steps=optim.accumulation,
                lr_scheduler_type="constant",
                max_grad_norm=optim.max_grad_norm,
                save_strategy="steps",
                save_steps=config.save_every,
                logging_steps=1,
            ),
        )
        self.model_accepts_loss_kwargs = False  # makes the Trainer average the loss over the micro-batches of a step

    def fit(self) -> None:
        """Train. If there is no checkpoint to resume from, compute the loss on fixed noise before the first step.

        Raises:
            KeyboardInterrupt: If training was interrupted. After the first signal, a checkpoint is saved.
        """
        if latest_checkpoint(self.run_folder.checkpoints) is None:
            self.loss_before = self.fixed_loss()
        super().fit()

    @torch.no_grad()
    def fixed_loss(self) -> float:
        """Compute the mean loss over the subject's images at evenly spaced timesteps, with fixed noise.

        This leaves the objective in evaluation mode.
        """
        self.objective.eval()
        generator = torch.Generator().manual_seed(mix_seed(self.args.seed, _FIXED))
        values = []
        for image_index in range(len(self.subject.images)):
            for time_index in range(_NUM_FIXED_TIMES):
                times = torch.tensor([(time_index + 0.5) / _NUM_FIXED_TIMES])
                with self.accelerator.autocast():
                    losses = self._losses(self.objective, self.subject, [image_index], times, generator)
                values.append(losses.mean().item())
        return math.fsum(values) / len(values)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss of micro-batch `inputs["index"]`, plus the weighted prior-preservation loss, if any."""
        index = inputs["index"]
        step, index_in_step = divmod(index, self.args.gradient_accumulation_steps)
        torch.manual_seed(mix_seed(self.args.seed, _GLOBAL, step, index_in_step))
        generator = torch.Generator().manual_seed(mix_seed(self.args.seed, _NOISE, step, index_in_step))
        loss = self._micro_batch_loss(model, self.subject, index, generator)
        if self.classes is not None:
            loss = loss + self.config.prior_weight * self._micro_batch_loss(model, self.classes, index, generator)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the values and the current total budget."""
        budget = None if self.allocator is None else sum(self.allocator.budgets.values())
        super().log({**logs, "budget": budget}, start_time)  # type: ignore[dict-item]

    def loss_history(self) -> list[LossRow]:
        """Return the loss, gradient norm, and budget of each step."""
        return [
            LossRow(step=int(row["step"]), loss=row["loss"], grad_norm=row["grad_norm"], budget=row["budget"])  # type: ignore[arg-type]
            for row in self.state.log_history
            if "loss" in row
        ]

    def _micro_batch_loss(
        self, model: nn.Module, training_set: TrainingSet, index: int, generator: torch.Generator
    ) -> Tensor:
        """Compute the mean loss of micro-batch `index`. The images are reshuffled each epoch."""
        batch_size = self.config.optim.batch_size
        num_images = len(training_set.images)
        sampler = EpochSampler(num_images, self.args.seed)
        indices = []
        for position in range(index * batch_size, (index + 1) * batch_size):
            sampler.set_epoch(position // num_images)
            indices.append(list(sampler)[position % num_images])
        times = self.objective.sample_times(batch_size, generator)
        return self._losses(model, training_set, indices, times, generator).mean()

    def _losses(
        self, model: nn.Module, training_set: TrainingSet, indices: list[int], times: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Compute the loss of each indexed image at the given timesteps."""
        images = training_set.images.sample(indices, generator)
        noise = torch.randn(images.shape, generator=generator)
        losses: Tensor = model(images.to(self.args.device), noise.to(self.args.device), times, training_set.prompt)
        return losses

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        """Return a sampler that yields the indices of the micro-batches in order."""
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def _write_state(self, checkpoint: Path, **values: Any) -> None:
        """Write the state with the loss before training, which a resumed run does not compute again."""
        super()._write_state(checkpoint, loss_before=self.loss_before, **values)

    def _read_state(self, checkpoint: Path) -> dict[str, Any]:
        """Load the state written by `_write_state`."""
        values = super()._read_state(checkpoint)
        self.loss_before = values["loss_before"]
        return values


def personalize(config: DreamBoothConfig, console: Console | None = None) -> DreamBoothFolder:
    """Fine-tune a Stable Diffusion 3 pipeline on a subject and write the run folder.

    Args:
        config: Settings. `resume` continues the stored run, with its settings, from the last checkpoint.
        console: Output console, or None for stdout.

    Returns:
        The folder of the finished run.

    Raises:
        FileExistsError: If the folder contains a run, and neither `resume` nor `overwrite` is set; if it has other
            contents; or if `out` is a file.
        RunInUseError: If another process is writing to the folder.
        FileNotFoundError: If the images, the subject, or the pipeline does not exist.
        ConnectionError: If the pipeline is neither local nor cached, and the hub is unreachable.
        ValueError: If settings conflict, images are corrupt, or a resumed run's images have changed.
        TrainingInterrupted: If a signal interrupts the run. The message names the last checkpoint, if any.
        NonFiniteLossError: If the loss or gradient becomes infinite or NaN. The last checkpoint is kept.
        CheckpointError: If a checkpoint or the adapter cannot be written, e.g. because the disk is full (the last
            checkpoint is kept), or if all checkpoints of a resumed run are damaged.
    """
    console = console or make_console(survives_closed_output=True)
    run = DreamBoothFolder(str(config.run.out))
    with lock_run(run):
        config, resumed = run.resolve_resume(config)
        if resumed is None or not resumed.is_finished:
            _personalize(config, run, console, resumed)
            return run
        print_line(console, f"{run.path} is already finished; report {run.report}")
        if not run.report.is_file():
            write_generation_report(run.path)
    return run


def _personalize(config: DreamBoothConfig, run: DreamBoothFolder, console: Console, resumed: RunInfo | None) -> None:
    """Train a new or resumed run, generate its samples, and write its report."""
    device = choose_device(config.run.device)
    concept = load_concept(str(config.data), config.subject, skip_corrupt=config.skip_corrupt)
    if resumed is not None:
        check_images(run, resumed.data, concept)
    config = config.with_class_name(concept.class_name)
    pipeline = load_pipeline(str(config.pipeline), config.optim.precision)
    check_resolution(pipeline, config.resolution)
    run.prepare(config, is_resumed=resumed is not None)
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
    run.write(describe_run(config, "dreambooth", backbone, data, _PACKAGES))
    with record_status(run, "dreambooth"):
        generator = ImageGenerator(
            pipeline, device, str(config.pipeline), sampling_of(config), console if config.run.progress else None
        )
        subject = _training_set(pipeline, config, device, str(config.prompt), concept)
        classes = None
        if config.prior_weight > 0:
            prompt = str(config.class_prompt)
            class_images = generator.generate(run.path / "class_images", [prompt], range(config.class_images))
            class_concept = Concept("class_images", [image.path for image in class_images])
            classes = _training_set(pipeline, config, device, prompt, class_concept)
        torch.manual_seed(config.run.seed)
        model = adapt_headless(config.method.name, pipeline.transformer, config.method.all_options()).to(device)
        if config.optim.gradient_checkpointing:
            base_model(model).enable_gradient_checkpointing()  # type: ignore[operator]
        objective = FlowMatching(model, pipeline.scheduler, config.weighting, config.precondition)
        trainer = DreamBoothTrainer(objective, config, run, console, subject, classes)
        _print_summary(trainer, concept)
        trainer.fit()
        loss_after = trainer.fixed_loss()
        trainer.save_results(fixed_loss=FixedLoss(trainer.loss_before, loss_after), loss_history=trainer.loss_history())
        if config.samples:
            seeds = range(config.run.seed, config.run.seed + config.samples)
            # the pipeline now contains the adapter
            adapted_generator = replace(generator, source=adapter_source(run, str(config.pipeline)))
            adapted_generator.generate(run.path / "samples", [str(config.prompt)], seeds, overwrite=True)
        run.finish()
    report = write_generation_report(run.path)
    losses = f"{trainer.loss_before:.5f} before, {loss_after:.5f} after {config.steps} steps"
    print_line(console, f"loss on fixed noise: {losses}")
    print_line(console, f"adapter {run.adapter}, report {report}")


def _print_summary(trainer: DreamBoothTrainer, concept: Concept) -> None:
    """Print the data, model, and settings of a run."""
    config = trainer.config
    images = counted(config.optim.batch_size * config.optim.accumulation, "image")
    steps = f"{counted(config.steps, 'step')}, {images} each"
    rows = [("subject", f"{concept.name}, {counted(len(concept.paths), 'image')}")]
    rows += [("note", note) for note in concept.notes]
    rows.append(("prompt", str(config.prompt)))
    if config.prior_weight > 0:
        rows.append(("class", f"{config.class_prompt}, {config.class_images} images"))
    rows += [
        ("pipeline", f"{config.pipeline}, {config.resolution}×{config.resolution} px"),
        ("method", describe_method(config.method.name, trainer.trained_model)),
        ("training", f"{steps}, lr {config.optim.lr:g}, on {trainer.args.device}"),
        ("optimizer", trainer.optimizer_name),
    ]
    print_rows(trainer.console, rows)


def check_images(run: DreamBoothFolder, stored: DataInfo, concept: Concept) -> None:
    """Raise a ValueError if the images of a run have changed since it was started.

    Runs without a stored digest are not checked.
    """
    if stored.digest not in (None, concept.digest()):
        expected = stored.sizes.get("train")
        actual = len(concept.paths)
        raise ValueError(
            f"data must contain the {expected} images that {run.path} was started with, got {actual} images in "
            f"{concept.paths[0].parent} with different content; restore them, or start a new run"
        )


def _training_set(
    pipeline: StableDiffusion3Pipeline, config: DreamBoothConfig, device: torch.device, prompt: str, concept: Concept
) -> TrainingSet:
    """Encode the images of a concept and their prompt."""
    embedded_prompt = embed_prompts(pipeline, [prompt], device, config.max_sequence_length)[0]
    images = encode_images(pipeline, concept.images(), device, config.resolution, flip=config.flip)
    return TrainingSet(images, embedded_prompt)
