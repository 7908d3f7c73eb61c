"""One personalization run, from settings to report."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from rich.console import Console
from torch import nn

from snella import SnellaCallback
from snella.methods import save_trained
from snella.methods.registry import adapt_headless
from snella.recipes.dreambooth.config import DreamBoothConfig, DreamBoothFolder
from snella.recipes.dreambooth.data import Concept, load_concept
from snella.recipes.dreambooth.generate import Drawing, adapter_source, draw_into
from snella.recipes.dreambooth.pipeline import check_resolution, embed_prompts, encode_images, load_pipeline
from snella.recipes.dreambooth.report import write_generation_report
from snella.recipes.dreambooth.trainer import FlowMatching, Learner, Lesson
from snella.records import BackboneInfo, DataInfo, FixedLoss, GeneratorMetrics, LossRow, RunInfo, read
from snella.runs.build import choose_device
from snella.runs.checkpoints import saving
from snella.runs.config import command_line
from snella.runs.console import counted, make_console, print_line, print_rows
from snella.runs.results import (
    describe_allocation,
    folder_bytes,
    kept_text,
    matrices_of,
    peak_rss_mib,
    trainable_parameters,
    versions_of,
)
from snella.runs.session import (
    InterruptCallback,
    checkpoint_to_continue,
    outcome_recorded,
    run_owned,
    settle_unfinished,
)


def draw_class_images(
    folder: Path,
    pipeline: StableDiffusion3Pipeline,
    config: DreamBoothConfig,
    drawing: Drawing,
    device: torch.device,
    console: Console,
) -> Concept:
    """Draw as many images of the class as the settings say, but for those that are there.

    Args:
        folder: Where they go.
        pipeline: Without an adapter.
        config: Settings with a class prompt.
        drawing: How pictures are drawn.
        device: Where.
        console: For the progress bar.

    Returns:
        The images, to be learned as the subject's are.
    """
    seeds = range(config.class_images)
    source = str(config.pipeline)
    prompts = [str(config.class_prompt)]
    pictures = draw_into(
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


def describe_metrics(learner: Learner) -> GeneratorMetrics:
    """Losses and costs."""
    matrices = matrices_of(learner.model)
    peak = torch.cuda.max_memory_allocated(learner.device) / 2**20 if learner.device.type == "cuda" else None
    return GeneratorMetrics(
        train_s=round(learner.elapsed_s, 3),
        trainable_parameters=trainable_parameters(learner.model),
        adapted_weights=sum(m.size for m in matrices) if matrices else None,
        adapter_bytes=folder_bytes(learner.run_folder.adapter),
        peak_rss_mib=peak_rss_mib(),
        peak_gpu_mib=peak,
        optimizer=learner.optimizer_name,
        fixed_loss=FixedLoss(learner.loss_before, learner.loss_after),
        loss_history=[LossRow(**row) for row in learner.history],
    )


def announce(
    console: Console,
    config: DreamBoothConfig,
    concept: Concept,
    model: nn.Module,
    optimizer: str,
    device: torch.device,
) -> None:
    """Print subject, prompts, model, what is trained and the steps."""
    matrices = matrices_of(model)
    adapted = f"; {len(matrices)} matrices, {sum(m.size for m in matrices):,} adapted weights" if matrices else ""
    looks = counted(config.batch_size * config.accumulation, "image")
    rows = [
        ("subject", f"{concept.name}, {counted(len(concept.paths), 'image')}"),
        *(("note", note) for note in concept.notes),
        ("prompt", str(config.prompt)),
        *([("class", f"{config.class_prompt}, {config.class_images} images")] if config.prior_weight > 0 else []),
        ("pipeline", f"{config.pipeline}, {config.resolution}×{config.resolution} px"),
        ("method", f"{config.method}, {trainable_parameters(model):,} trainable parameters{adapted}"),
        ("training", f"{counted(config.steps, 'step')}, {looks} each, lr {config.lr:g}, on {device}"),
        ("optimizer", optimizer),
    ]
    print_rows(console, rows)


def _finite(value: Any) -> Any:
    """None in place of a number that JSON lacks."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def personalize(config: DreamBoothConfig, console: Console | None = None) -> DreamBoothFolder:
    """Teach a Stable Diffusion 3 pipeline one subject, and leave a complete run folder behind.

    Args:
        config: What to do. With `resume` a stored run goes on from its last checkpoint, with its own settings.
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
    console = console or make_console(endures=True)
    run = DreamBoothFolder(str(config.out))
    with run_owned(run):
        return _personalize(config, run, console)


def _personalize(config: DreamBoothConfig, run: DreamBoothFolder, console: Console) -> DreamBoothFolder:
    """The work of `personalize`, in a folder that no other process writes into."""
    settled = settle_unfinished(run, config, console, f"its report is {run.report}")
    if settled is None:
        if not run.report.is_file():
            write_generation_report(run.path)
        return run
    config, is_resumed = settled
    device = choose_device(config.device)
    concept = load_concept(str(config.data), config.subject, skip_broken=config.skip_broken)
    if is_resumed:
        _check_images(run, concept)
    config = config.named(concept.class_name)
    encoder_dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    pipeline = load_pipeline(str(config.pipeline), encoder_dtype=encoder_dtype)
    check_resolution(pipeline, config.resolution)
    run.begin(config, is_resumed=is_resumed)
    run.write(describe_run(config, concept))
    with outcome_recorded(run, "dreambooth"), InterruptCallback() as interrupt:
        drawing = Drawing(
            config.resolution,
            config.sample_steps,
            config.guidance,
            config.max_sequence_length,
            config.precision,
        )
        subject = _lesson(pipeline, config, device, str(config.prompt), concept)
        classes = None
        if config.prior_weight > 0:
            pictures = draw_class_images(run.path / "class_images", pipeline, config, drawing, device, console)
            classes = _lesson(pipeline, config, device, str(config.class_prompt), pictures)
        torch.manual_seed(config.seed)
        model = adapt_headless(config.method, pipeline.transformer, config.options_of_method())
        loss = FlowMatching(pipeline.scheduler, config.weighting, config.precondition)
        learner = Learner(model, config, loss, subject, classes, run, device)
        announce(console, config, concept, model, learner.optimizer_name, device)
        if (checkpoint := checkpoint_to_continue(run, console)) is not None:
            learner.load(checkpoint)
        learner.run(console, interrupt)
        _finish(learner, pipeline, drawing, run, console)
    return run


def _check_images(run: DreamBoothFolder, concept: Concept) -> None:
    """Refuse to go on with other images than those that the run began with."""
    stored = read(RunInfo, run.path).data
    if stored.digest not in (None, concept.digest()):
        then, now = stored.sizes.get("train"), len(concept.paths)
        raise ValueError(
            f"data must hold the images that {run.path} began with, {then} images, got {now} images in "
            f"{concept.paths[0].parent} and other content; restore them, or start a new run"
        )


def _lesson(
    pipeline: StableDiffusion3Pipeline, config: DreamBoothConfig, device: torch.device, prompt: str, concept: Concept
) -> Lesson:
    """Images and prompt as training needs them."""
    embedded = embed_prompts(pipeline, [prompt], device, config.max_sequence_length)[0]
    images = encode_images(pipeline, concept.images(), device, config.resolution, flip=config.flip)
    return Lesson(images, embedded)


def _finish(
    learner: Learner, pipeline: StableDiffusion3Pipeline, drawing: Drawing, run: DreamBoothFolder, console: Console
) -> None:
    """Save the adapter, draw the sample pictures, write results and report."""
    config = learner.config
    with saving(run.adapter):
        save_trained(learner.model, run.adapter)
    allocator = learner.allocator
    if allocator is not None:
        callback = SnellaCallback()
        callback.allocator = allocator
        run.write(describe_allocation(learner.model, callback))
    run.write(describe_metrics(learner))
    if config.samples:
        prompts = [str(config.prompt)]
        draw_into(
            run.path / "samples",
            pipeline,
            prompts,
            range(config.seed, config.seed + config.samples),
            drawing,
            learner.device,
            console,
            source=adapter_source(run, config),
            overwrite=True,
            show_bar=config.progress,
        )
    run.finish()
    report = write_generation_report(run.path)
    print_line(
        console,
        f"loss on fixed noise: {learner.loss_before:.5f} before, {learner.loss_after:.5f} after {config.steps} steps",
    )
    matrices = matrices_of(learner.model)
    if matrices:
        print_line(console, f"the update {kept_text(matrices)}")
    print_line(console, f"adapter {run.adapter}, report {report}")
