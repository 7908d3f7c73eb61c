"""`personalize`: one DreamBooth run, from configuration to report."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from rich.console import Console
from torch import nn

from snella import SnellaCallback
from snella._console import counted, make_console, print_line, print_rows
from snella.methods import save_trained
from snella.methods.registry import adapt_headless
from snella.recipes.dreambooth.config import DreamBoothConfig, DreamBoothFolder
from snella.recipes.dreambooth.data import Concept, load_concept
from snella.recipes.dreambooth.generate import SamplingConfig, adapter_source, generate_images
from snella.recipes.dreambooth.pipeline import check_resolution, embed_prompts, encode_images, load_pipeline
from snella.recipes.dreambooth.report import write_generation_report
from snella.recipes.dreambooth.trainer import DreamBoothTrainer, FlowMatching, TrainingSet
from snella.records import BackboneInfo, DataInfo, FixedLoss, GeneratorMetrics, LossRow, RunInfo, read
from snella.runs.config import command_line
from snella.runs.model import choose_device
from snella.training.checkpoints import reporting_write_errors
from snella.training.results import (
    describe_allocation,
    describe_generator,
    matrices_of,
    sparsity_summary,
    trainable_parameters,
    versions_of,
)
from snella.training.session import InterruptCallback, checkpoint_to_resume, lock_run, record_status


def draw_class_images(
    folder: Path,
    pipeline: StableDiffusion3Pipeline,
    config: DreamBoothConfig,
    drawing: SamplingConfig,
    device: torch.device,
    console: Console,
) -> Concept:
    """Generate the class images of prior preservation that do not exist yet.

    Args:
        folder: Of the images.
        pipeline: Without an adapter.
        config: Settings with a class prompt.
        drawing: Sampling settings.
        device: Where.
        console: For the progress bar.

    Returns:
        The images, to be trained on like the subject's.
    """
    seeds = range(config.class_images)
    source = str(config.pipeline)
    prompts = [str(config.class_prompt)]
    pictures = generate_images(
        folder, pipeline, prompts, seeds, drawing, device, console, source=source, show_bar=config.progress
    )
    return Concept(folder.name, [picture.path for picture in pictures])


_PACKAGES = ("snella", "torch", "peft", "diffusers", "transformers", "accelerate")


def describe_run(config: DreamBoothConfig, concept: Concept) -> RunInfo:
    """The record of a run that begins."""
    return RunInfo(
        status="running",
        task="generation",
        method=config.method,
        method_options=config.options_of_method(),
        backbone=BackboneInfo(name=str(config.pipeline), img_size=config.resolution),
        classes=[],
        data=DataInfo(
            spec=str(config.data),
            subject=concept.name,
            class_name=config.class_name,
            seed=config.seed,
            description=f"{counted(len(concept.paths), 'image')} of {concept.name}, learned as “{config.prompt}”",
            sizes={"train": len(concept.paths)},
            digest=concept.digest(),
            folder=str(concept.paths[0].parent),
            files=[path.name for path in concept.paths],
            notes=list(concept.notes),
        ),
        versions=versions_of(_PACKAGES),
        command=command_line(config, DreamBoothConfig(data="-", pipeline="-", out="-"), "dreambooth"),
    )


def describe_metrics(trainer: DreamBoothTrainer) -> GeneratorMetrics:
    """Losses and costs."""
    peak = torch.cuda.max_memory_allocated(trainer.device) / 2**20 if trainer.device.type == "cuda" else None
    return describe_generator(
        trainer.model,
        trainer.run_folder.adapter,
        train_s=round(trainer.elapsed_s, 3),
        peak_gpu_mib=peak,
        optimizer=trainer.optimizer_name,
        fixed_loss=FixedLoss(trainer.loss_before, trainer.loss_after),
        loss_history=[LossRow(**row) for row in trainer.history],
    )


def log_summary(
    console: Console,
    config: DreamBoothConfig,
    concept: Concept,
    model: nn.Module,
    optimizer: str,
    device: torch.device,
) -> None:
    """Print subject, prompts, model, method and steps."""
    matrices = matrices_of(model)
    adapted = f"; {len(matrices)} matrices, {sum(m.size for m in matrices):,} adapted weights" if matrices else ""
    effective_batch_size = counted(config.batch_size * config.accumulation, "image")
    rows = [
        ("subject", f"{concept.name}, {counted(len(concept.paths), 'image')}"),
        *(("note", note) for note in concept.notes),
        ("prompt", str(config.prompt)),
        *([("class", f"{config.class_prompt}, {config.class_images} images")] if config.prior_weight > 0 else []),
        ("pipeline", f"{config.pipeline}, {config.resolution}×{config.resolution} px"),
        ("method", f"{config.method}, {trainable_parameters(model):,} trainable parameters{adapted}"),
        ("training", f"{counted(config.steps, 'step')}, {effective_batch_size} each, lr {config.lr:g}, on {device}"),
        ("optimizer", optimizer),
    ]
    print_rows(console, rows)


def personalize(config: DreamBoothConfig, console: Console | None = None) -> DreamBoothFolder:
    """Fine-tune a Stable Diffusion 3 pipeline on one subject, and write a complete run folder.

    Args:
        config: The configuration. With `resume` a stored run is resumed from its last checkpoint, with its own
            settings.
        console: Where to write; standard output if None.

    Returns:
        The folder, its run finished.

    Raises:
        FileExistsError: The folder holds a run, and neither `resume` nor `overwrite` was asked for.
        RunInUseError: Another process is writing into the folder.
        FileNotFoundError: Images, subject or pipeline are not there.
        ValueError: Settings that contradict each other, broken images, or a resumed run whose images have changed.
        TrainingInterrupted: Ctrl-C; a checkpoint is saved.
        NonFiniteLossError: The loss or the gradient became infinite or NaN; the last checkpoint is kept.
        CheckpointError: The disk is full, and the last checkpoint is kept; or that of a resumed run is damaged.
    """
    console = console or make_console(survives_closed_output=True)
    run = DreamBoothFolder(str(config.out))
    with lock_run(run):
        return _personalize(config, run, console)


def _personalize(config: DreamBoothConfig, run: DreamBoothFolder, console: Console) -> DreamBoothFolder:
    """`personalize`, with the folder locked."""
    config, status = run.resolve_resume(config)
    if status == "finished":
        print_line(console, f"{run.path} is finished already; its report is {run.report}")
        if not run.report.is_file():
            write_generation_report(run.path)
        return run
    is_resumed = status is not None
    device = choose_device(config.device)
    concept = load_concept(str(config.data), config.subject, skip_corrupt=config.skip_corrupt)
    if is_resumed:
        _check_images(run, concept)
    config = config.named(concept.class_name)
    encoder_dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    pipeline = load_pipeline(str(config.pipeline), encoder_dtype=encoder_dtype)
    check_resolution(pipeline, config.resolution)
    run.prepare(config, is_resumed=is_resumed)
    run.write(describe_run(config, concept))
    with record_status(run, "dreambooth"), InterruptCallback() as interrupt:
        drawing = SamplingConfig(
            config.resolution,
            config.sample_steps,
            config.guidance,
            config.max_sequence_length,
            config.precision,
        )
        subject = _training_set(pipeline, config, device, str(config.prompt), concept)
        classes = None
        if config.prior_weight > 0:
            pictures = draw_class_images(run.path / "class_images", pipeline, config, drawing, device, console)
            classes = _training_set(pipeline, config, device, str(config.class_prompt), pictures)
        torch.manual_seed(config.seed)
        model = adapt_headless(config.method, pipeline.transformer, config.options_of_method())
        loss = FlowMatching(pipeline.scheduler, config.weighting, config.precondition)
        trainer = DreamBoothTrainer(model, config, loss, subject, classes, run, device)
        log_summary(console, config, concept, model, trainer.optimizer_name, device)
        if (checkpoint := checkpoint_to_resume(run, console)) is not None:
            trainer.load(checkpoint)
        trainer.run(console, interrupt)
        _finish(trainer, pipeline, drawing, run, console)
    return run


def _check_images(run: DreamBoothFolder, concept: Concept) -> None:
    """Refuse to resume with other images than those that the run began with."""
    stored = read(RunInfo, run.path).data
    if stored.digest not in (None, concept.digest()):
        then, now = stored.sizes.get("train"), len(concept.paths)
        raise ValueError(
            f"data must hold the images that {run.path} began with, {then} images, got {now} images in "
            f"{concept.paths[0].parent} and other content; restore them, or start a new run"
        )


def _training_set(
    pipeline: StableDiffusion3Pipeline, config: DreamBoothConfig, device: torch.device, prompt: str, concept: Concept
) -> TrainingSet:
    """Encoded images and prompt."""
    embedded = embed_prompts(pipeline, [prompt], device, config.max_sequence_length)[0]
    images = encode_images(pipeline, concept.images(), device, config.resolution, flip=config.flip)
    return TrainingSet(images, embedded)


def _finish(
    trainer: DreamBoothTrainer,
    pipeline: StableDiffusion3Pipeline,
    drawing: SamplingConfig,
    run: DreamBoothFolder,
    console: Console,
) -> None:
    """Save the adapter, generate sample images, write results and report."""
    config = trainer.config
    with reporting_write_errors(run.adapter):
        save_trained(trainer.model, run.adapter)
    allocator = trainer.allocator
    if allocator is not None:
        callback = SnellaCallback()
        callback.allocator = allocator
        run.write(describe_allocation(trainer.model, callback))
    run.write(describe_metrics(trainer))
    if config.samples:
        prompts = [str(config.prompt)]
        generate_images(
            run.path / "samples",
            pipeline,
            prompts,
            range(config.seed, config.seed + config.samples),
            drawing,
            trainer.device,
            console,
            source=adapter_source(run, config),
            overwrite=True,
            show_bar=config.progress,
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
