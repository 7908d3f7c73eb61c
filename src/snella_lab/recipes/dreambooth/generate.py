"""Image generation with a DreamBooth run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rich.console import Console

from snella_app.console import make_console
from snella_app.data.images import IMAGE_SUFFIXES
from snella_app.device import autocast, choose_device
from snella_app.files import write_json, write_png
from snella_app.methods import load_trained
from snella_app.records import RunInfo, read
from snella_app.runs.folder import adapter_digest
from snella_lab.recipes.dreambooth.config import DreamBoothConfig, DreamBoothFolder
from snella_lab.recipes.dreambooth.data import fill, read_prompt_file
from snella_lab.recipes.dreambooth.pipeline import PromptEmbedding, check_resolution, embed_prompts, load_pipeline
from snella_lab.recipes.run import progress_bar

_TEXT_COMPONENTS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")


@dataclass(frozen=True)
class SamplingConfig:
    """Sampling settings.

    Args:
        resolution: Image resolution in pixels.
        steps: Number of sampling steps.
        guidance: Guidance scale; values up to 1 disable guidance.
        max_sequence_length: Maximum prompt length of the third text encoder, in tokens; use the training value.
        precision: fp32, or bf16 for autocast.
        batch_size: Batch size.
    """

    resolution: int = 512
    steps: int = 28
    guidance: float = 7.0
    max_sequence_length: int = 77
    precision: str = "fp32"
    batch_size: int = 1


def sampling_of(
    config: DreamBoothConfig, steps: int | None = None, guidance: float | None = None, batch_size: int = 1
) -> SamplingConfig:
    """Return the run's sampling settings, with overrides."""
    return SamplingConfig(
        config.resolution,
        config.sample_steps if steps is None else steps,
        config.guidance if guidance is None else guidance,
        config.max_sequence_length,
        config.optim.precision,
        batch_size,
    )


def sample_images(
    pipeline: StableDiffusion3Pipeline,
    jobs: Sequence[tuple[str, int]],
    sampling: SamplingConfig,
    device: torch.device,
    on_image: Callable[[int, Image.Image], None],
) -> None:
    """Generate one image per job.

    Each distinct prompt is embedded once, before sampling. During sampling, only transformer and autoencoder are on the
    device.

    Args:
        pipeline: Pipeline with the adapter in its transformer.
        jobs: Prompt and seed of each image.
        sampling: Sampling settings.
        device: Torch device.
        on_image: Callback that receives job index and image, called after each batch.

    Raises:
        ValueError: If the pipeline does not support this resolution.
    """
    check_resolution(pipeline, sampling.resolution)
    prompts = list(dict.fromkeys(prompt for prompt, _ in jobs))
    is_guided = sampling.guidance > 1
    texts = [*prompts, *([""] if is_guided else [])]
    embedded = dict(zip(texts, embed_prompts(pipeline, texts, device, sampling.max_sequence_length), strict=True))
    image_pipeline = _without_text_encoders(pipeline, device)
    for start in range(0, len(jobs), sampling.batch_size):
        batch = jobs[start : start + sampling.batch_size]
        for number, image in enumerate(_generate_batch(image_pipeline, batch, embedded, sampling, device), start):
            on_image(number, image)


def _without_text_encoders(pipeline: StableDiffusion3Pipeline, device: torch.device) -> StableDiffusion3Pipeline:
    """Build a pipeline on the device without text encoders; diffusers infers the device from all components."""
    no_text: dict[str, Any] = dict.fromkeys(_TEXT_COMPONENTS)
    image_pipeline = StableDiffusion3Pipeline(
        transformer=pipeline.transformer.to(device).eval(),
        scheduler=type(pipeline.scheduler).from_config(pipeline.scheduler.config),
        vae=pipeline.vae.to(device),
        **no_text,
    )
    image_pipeline.set_progress_bar_config(disable=True)
    return image_pipeline


@torch.no_grad()
def _generate_batch(
    pipeline: StableDiffusion3Pipeline,
    jobs: Sequence[tuple[str, int]],
    embedded: dict[str, PromptEmbedding],
    sampling: SamplingConfig,
    device: torch.device,
) -> list[Image.Image]:
    """Generate one batch of images."""

    def stacked(prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.cat([embedded[prompt].tokens for prompt in prompts])
        return tokens.to(device), torch.cat([embedded[prompt].pooled for prompt in prompts]).to(device)

    tokens, pooled = stacked([prompt for prompt, _ in jobs])
    negative = stacked([""] * len(jobs)) if sampling.guidance > 1 else (None, None)
    with autocast(device, sampling.precision):
        return pipeline(
            prompt_embeds=tokens,
            pooled_prompt_embeds=pooled,
            negative_prompt_embeds=negative[0],
            negative_pooled_prompt_embeds=negative[1],
            height=sampling.resolution,
            width=sampling.resolution,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            generator=[torch.Generator().manual_seed(seed) for _, seed in jobs],
        ).images


MANIFEST = "images.json"


@dataclass(frozen=True)
class GeneratedImage:
    """A generated image."""

    path: Path
    prompt: str
    seed: int


def generate_images(
    folder: Path,
    pipeline: StableDiffusion3Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: SamplingConfig,
    device: torch.device,
    console: Console,
    *,
    source: str,
    overwrite: bool = False,
    show_bar: bool = True,
) -> list[GeneratedImage]:
    """Generate an image for each prompt and seed, skipping those from an interrupted call.

    Args:
        folder: Output folder for `PROMPT-SEED.png` and `images.json`; created if missing.
        pipeline: Pipeline with the adapter in its transformer.
        prompts: Prompts.
        seeds: Seeds.
        sampling: Sampling settings.
        device: Torch device.
        console: Output console; the progress bar appears only on a terminal.
        source: Pipeline and digest of the adapter; images from another source are an error unless `overwrite` is set.
        overwrite: Replace other generated images in the folder.
        show_bar: Show a progress bar.

    Raises:
        FileExistsError: If the folder contains images from other prompts, seeds or settings, or another adapter.
        ValueError: If the pipeline does not support this resolution.
    """
    width = max(2, len(str(len(prompts) - 1)))
    images = [
        GeneratedImage(folder / f"{number:0{width}}-{seed}.png", prompt, seed)
        for number, prompt in enumerate(prompts)
        for seed in seeds
    ]
    content = {
        "format": 1,
        "source": source,
        "drawing": {name: value for name, value in asdict(sampling).items() if name != "batch_size"},
        "images": [{"file": image.path.name, "prompt": image.prompt, "seed": image.seed} for image in images],
    }
    check_image_folder(folder, content, overwrite=overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    if _read_manifest(folder) != content:
        for path in folder.iterdir():
            if path.suffix.lower() in IMAGE_SUFFIXES:
                path.unlink()
        write_json(folder / MANIFEST, content)
    missing = [image for image in images if not image.path.is_file()]
    with progress_bar(console, is_shown=show_bar) as bar:
        task = bar.add_task("generating", total=len(images), completed=len(images) - len(missing))

        def on_image(number: int, image: Image.Image) -> None:
            _write(missing[number], image)
            bar.advance(task)

        if missing:
            sample_images(pipeline, [(image.prompt, image.seed) for image in missing], sampling, device, on_image)
    return images


def check_image_folder(folder: Path, content: dict[str, Any], *, overwrite: bool) -> None:
    """Check that generated images can be written to a folder.

    Args:
        folder: Output folder; need not exist.
        content: Expected content of `images.json`.
        overwrite: Allow replacing other generated images.

    Raises:
        FileExistsError: If the folder contains other files, or other images and `overwrite` is not set.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"out must be a folder, got the file {folder}; choose another name")
    manifest = _read_manifest(folder)
    if manifest == content:
        return
    if manifest is None and any(folder.iterdir()):
        raise FileExistsError(f"out={folder} contains other files; choose an empty or new folder")
    if manifest is not None and not overwrite:
        changed = [name for name in ("source", "drawing", "images") if manifest.get(name) != content[name]]
        reasons = {"source": "another adapter", "drawing": "other settings", "images": "other prompts or seeds"}
        raise FileExistsError(
            f"out={folder} contains images from {' and '.join(reasons[name] for name in changed)}; choose another "
            "folder, or pass --overwrite"
        )


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read `images.json`; None if it is missing or damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def _write(target: GeneratedImage, image: Image.Image) -> None:
    """Write a PNG file atomically, with prompt and seed as metadata."""
    info = PngInfo()
    info.add_itxt("prompt", target.prompt)
    info.add_itxt("seed", str(target.seed))
    write_png(target.path, image, pnginfo=info)


@dataclass(frozen=True)
class LoadedGenerator:
    """A run's pipeline with its adapter."""

    run: DreamBoothFolder
    config: DreamBoothConfig
    pipeline: StableDiffusion3Pipeline
    device: torch.device
    source: str


def load_generator(run: str | Path, *, pipeline: str | None = None, device: str = "auto") -> LoadedGenerator:
    """Load a run's pipeline with its adapter.

    Args:
        run: Run folder.
        pipeline: Path or hub name of the pipeline; None uses the run's.
        device: auto, or a torch device such as cpu, cuda:1 or mps.

    Raises:
        FileNotFoundError: If the folder is not a run, or the run has no adapter yet.
        ValueError: If the run belongs to another command.
        AdapterFileError: If the adapter is damaged or does not fit the pipeline.
    """
    folder = DreamBoothFolder(run)
    if read(RunInfo, folder.path).task != "generation":
        raise ValueError(f"run must be a snella dreambooth run folder, got {run}, a run of another task")
    folder.check_adapter()
    config = folder.read_config()
    name = str(pipeline or config.pipeline)
    loaded = load_pipeline(name, encoder_dtype=torch.bfloat16 if config.optim.precision == "bf16" else torch.float32)
    load_trained(folder.adapter, loaded.transformer)
    return LoadedGenerator(folder, config, loaded, choose_device(device), adapter_source(folder, config))


def adapter_source(run: DreamBoothFolder, config: DreamBoothConfig) -> str:
    """Return the pipeline's name and the digest of the adapter's weights."""
    return f"{config.pipeline} with adapter {adapter_digest(run.adapter)}"


def generate(
    run: str | Path,
    prompts: Sequence[str],
    out: str | Path,
    *,
    pictures: int = 4,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    batch_size: int = 1,
    pipeline: str | None = None,
    device: str = "auto",
    overwrite: bool = False,
    console: Console | None = None,
) -> list[GeneratedImage]:
    """Generate images with the pipeline and adapter of a run.

    The arguments are the options of `snella generate`, with filled-in `prompts`, and a console for the progress bar. An
    image depends only on its prompt and seed.

    Raises:
        ValueError: If `prompts` is empty, or a number is out of range.
        FileNotFoundError: If the folder is not a run, or the run has no adapter yet.
        FileExistsError: If `out` contains other images.
    """
    minimums = {"pictures": (pictures, 1), "seed": (seed, 0), "batch_size": (batch_size, 1), "steps": (steps, 1)}
    errors = [
        f"{name} must be at least {minimum}, got {value}"
        for name, (value, minimum) in minimums.items()
        if value is not None and value < minimum
    ]
    errors += [] if prompts else ["prompt is required, e.g. 'a photo of sks dog on the beach', got none"]
    if errors:
        raise ValueError("; ".join(errors))
    loaded = load_generator(run, pipeline=pipeline, device=device)
    return generate_images(
        Path(out),
        loaded.pipeline,
        prompts,
        range(seed, seed + pictures),
        sampling_of(loaded.config, steps, guidance, batch_size),
        loaded.device,
        console or make_console(),
        source=loaded.source,
        overwrite=overwrite,
    )


def select_prompts(run: str | Path, prompt: str | None, file: str | Path | None, live: bool | None = None) -> list[str]:
    """Return the prompt, or a file's prompts with the run's token and class filled in.

    Args:
        run: Run folder.
        prompt: Filled-in prompt; mutually exclusive with `file`.
        file: Prompt file; mutually exclusive with `prompt`.
        live: Use the file's prompts for live subjects; None uses them for cats and dogs.

    Raises:
        ValueError: If neither or both of `prompt` and `file` are set, or the file has no valid prompts.
        FileNotFoundError: If the file or run does not exist.
    """
    if (prompt is None) == (file is None):
        raise ValueError(
            f"exactly one of prompt and prompts must be set, got {'neither' if prompt is None else 'both'}; "
            "pass e.g. --prompt 'a photo of sks dog on the beach'"
        )
    if prompt is not None:
        return [prompt]
    config = DreamBoothFolder(run).read_config()
    templates = read_prompt_file(str(file)).templates(config.class_name, live)
    return [fill(template, config.token, config.class_name or "") for template in templates]
