"""One personalisation run, from settings to report."""

from __future__ import annotations

import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from rich.console import Console

from snella import SnellaCallback
from snella.data.dreambooth import Concept, load_concept
from snella.generation.class_images import draw_class_images
from snella.generation.conditioning import check_resolution, embed_prompts, encode_images
from snella.generation.config import DreamBoothConfig
from snella.generation.describing import announce, describe_metrics, describe_run
from snella.generation.drawing import Drawing
from snella.generation.flow_matching import FlowMatching
from snella.generation.folder import DreamBoothFolder
from snella.generation.generating import adapter_source
from snella.generation.learning import Learner, Lesson
from snella.generation.picture_folder import draw_into
from snella.generation.pipeline import load_pipeline
from snella.generation.report import write_generation_report
from snella.methods import save_trained
from snella.methods.headless import adapt_headless
from snella.training.assembly import choose_device
from snella.training.checkpoints import saving
from snella.training.console import make_console
from snella.training.results import describe_allocation, kept_text, matrices_of
from snella.training.session import checkpoint_to_continue, outcome_recorded, run_owned, settle_unfinished
from snella.training.stopping import InterruptCallback


def personalise(config: DreamBoothConfig, console: Console | None = None) -> DreamBoothFolder:
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
    console = console or make_console()
    run = DreamBoothFolder(str(config.out))
    with run_owned(run):
        return _personalise(config, run, console)


def _personalise(config: DreamBoothConfig, run: DreamBoothFolder, console: Console) -> DreamBoothFolder:
    """The work of `personalise`, in a folder that no other process writes into."""
    settled = settle_unfinished(run, config, console, f"its report is {run.report}")
    if settled is None:
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
    run.update("running", **describe_run(config, concept))
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
    stored = run.read_json("run.json").get("data", {})
    if stored.get("digest") not in (None, concept.digest()):
        then, now = stored.get("sizes", {}).get("train"), len(concept.paths)
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
        run.write_json("allocation.json", describe_allocation(learner.model, callback))
    run.write_json("metrics.json", describe_metrics(learner))
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
    console.print(
        f"loss on fixed noise: {learner.loss_before:.5f} before, {learner.loss_after:.5f} after {config.steps} steps",
        highlight=False,
        soft_wrap=True,
    )
    matrices = matrices_of(learner.model)
    if matrices:
        console.print(f"the update {kept_text(matrices)}", highlight=False, soft_wrap=True)
    console.print(f"adapter {run.adapter}, report {report}", highlight=False, soft_wrap=True)
