"""Image generation with a DreamBooth run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.training_utils import offload_models
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rich.console import Console
from torch import Tensor

from snella_app.console import make_console, track_progress
from snella_app.device import autocast, choose_device
from snella_app.files import write_json, write_png
from snella_app.methods import load_trained
from snella_app.records.record import read
from snella_app.records.run import RunInfo
from snella_app.runs.folder import adapter_digest
from snella_lab.recipes.dreambooth.config import DreamBoothConfig, DreamBoothFolder, GenerateOptions, GenerationOptions
from snella_lab.recipes.dreambooth.data import fill, read_prompt_file
from snella_lab.recipes.dreambooth.pipeline import TEXT_COMPONENTS, check_resolution, embed_prompts, load_pipeline

MANIFEST = "images.json"
"""Manifest of a folder of generated images, with their prompts, seeds, settings, and source."""


@dataclass(frozen=True)
class SamplingConfig:
    """Settings for sampling images.

    Args:
        resolution: Image resolution in pixels.
        steps: Number of sampling steps.
        guidance: Guidance scale. Values up to 1 disable guidance.
        max_sequence_length: Maximum prompt length of the third text encoder, in tokens, as in training.
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
    """Return the sampling settings of a run, overridden by the arguments that are not None."""
    return SamplingConfig(
        resolution=config.resolution,
        steps=config.sample_steps if steps is None else steps,
        guidance=config.guidance if guidance is None else guidance,
        max_sequence_length=config.max_sequence_length,
        precision=config.optim.precision,
        batch_size=batch_size,
    )


@torch.no_grad()
def sample_images(
    pipeline: StableDiffusion3Pipeline, jobs: Sequence[tuple[str, int]], sampling: SamplingConfig, device: torch.device
) -> Iterator[Image.Image]:
    """Generate one image per job, in order.

    Each distinct prompt is embedded once, before sampling. During sampling, only the transformer and the autoencoder
    are on the device. Afterwards, only the autoencoder is moved back.

    Args:
        pipeline: Pipeline with the adapter in its transformer.
        jobs: Prompt and seed of each image.
        sampling: Sampling settings.
        device: Torch device.

    Raises:
        ValueError: If the pipeline does not support the resolution.
    """
    check_resolution(pipeline, sampling.resolution)
    has_guidance = sampling.guidance > 1
    texts = list(dict.fromkeys(prompt for prompt, _ in jobs))
    if has_guidance:
        texts.append("")
    embedded = dict(zip(texts, embed_prompts(pipeline, texts, device, sampling.max_sequence_length), strict=True))

    def stacked(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the token embeddings and the pooled embeddings of prompts, concatenated on the device."""
        tokens = torch.cat([embedded[prompt].tokens for prompt in prompts])
        pooled = torch.cat([embedded[prompt].pooled for prompt in prompts])
        return tokens.to(device), pooled.to(device)

    # no text encoders: diffusers may infer its device from any component, and the encoders are not on `device`
    no_text: dict[str, Any] = dict.fromkeys(TEXT_COMPONENTS)
    image_pipeline = StableDiffusion3Pipeline(
        transformer=pipeline.transformer.to(device).eval(),
        scheduler=type(pipeline.scheduler).from_config(pipeline.scheduler.config),  # sampling modifies it
        vae=pipeline.vae,
        **no_text,
    )
    image_pipeline.set_progress_bar_config(disable=True)
    with offload_models(pipeline.vae, device=device):
        for start in range(0, len(jobs), sampling.batch_size):
            batch = jobs[start : start + sampling.batch_size]
            tokens, pooled = stacked([prompt for prompt, _ in batch])
            negative_tokens: Tensor | None = None
            negative_pooled: Tensor | None = None
            if has_guidance:
                negative_tokens, negative_pooled = stacked([""] * len(batch))
            with autocast(device, sampling.precision):
                images = image_pipeline(
                    prompt_embeds=tokens,
                    pooled_prompt_embeds=pooled,
                    negative_prompt_embeds=negative_tokens,
                    negative_pooled_prompt_embeds=negative_pooled,
                    height=sampling.resolution,
                    width=sampling.resolution,
                    num_inference_steps=sampling.steps,
                    guidance_scale=sampling.guidance,
                    generator=[torch.Generator().manual_seed(seed) for _, seed in batch],  # one per image
                ).images
            yield from images


@dataclass(frozen=True)
class GeneratedImage:
    """File, prompt, and seed of a generated image."""

    path: Path
    prompt: str
    seed: int


@dataclass(frozen=True)
class ImageGenerator:
    """Pipeline and settings for generating images.

    Args:
        pipeline: Pipeline with the adapter in its transformer.
        device: Torch device.
        source: Name of the pipeline, with the digest of its adapter, if any. Existing images from a different source
            are not reused.
        sampling: Sampling settings.
        console: Console for the progress bar, or None for no bar.
    """

    pipeline: StableDiffusion3Pipeline
    device: torch.device
    source: str
    sampling: SamplingConfig
    console: Console | None = None

    def generate(
        self, folder: Path, prompts: Sequence[str], seeds: Sequence[int], *, overwrite: bool = False
    ) -> list[GeneratedImage]:
        """Generate an image for each prompt and seed, except images that an earlier call generated.

        Args:
            folder: Output folder for `NUMBER-SEED.png`, numbered by prompt, and `images.json`. Created if missing.
            prompts: Prompts.
            seeds: Seeds.
            overwrite: Replace all generated images in the folder if their prompts, seeds, settings, or source differ.

        Returns:
            The requested images, including those of earlier calls, ordered by prompt and then by seed.

        Raises:
            FileExistsError: If `folder` is a file, or contains files but no valid `images.json`. Without `overwrite`,
                also if its images differ in prompts, seeds, settings, or source. With `overwrite`, also if a file that
                is not listed in `images.json` has the name of a new image.
            ValueError: If the pipeline does not support the resolution.
        """
        num_digits = max(2, len(str(len(prompts) - 1)))
        images = [
            GeneratedImage(folder / f"{number:0{num_digits}}-{seed}.png", prompt, seed)
            for number, prompt in enumerate(prompts)
            for seed in seeds
        ]
        # images do not depend on the batch size
        settings = {name: value for name, value in asdict(self.sampling).items() if name != "batch_size"}
        entries = [{"file": image.path.name, "prompt": image.prompt, "seed": image.seed} for image in images]
        manifest = {"format": 1, "source": self.source, "drawing": settings, "images": entries}
        if not _matches(folder, manifest, overwrite=overwrite):
            folder.mkdir(parents=True, exist_ok=True)
            old_manifest = _manifest(folder) or {"images": []}
            old_names = {Path(entry["file"]).name for entry in old_manifest["images"]}
            for image in images:
                if image.path.exists() and image.path.name not in old_names:
                    raise FileExistsError(f"{image.path} is not a generated image; choose another folder")
            for name in old_names:
                (folder / name).unlink(missing_ok=True)
            write_json(folder / MANIFEST, manifest)
        missing = [image for image in images if not image.path.is_file()]
        if missing:
            jobs = [(image.prompt, image.seed) for image in missing]
            samples = sample_images(self.pipeline, jobs, self.sampling, self.device)
            samples_with_progress = track_progress(samples, "generating", len(missing), self.console)
            for target, sample in zip(missing, samples_with_progress, strict=True):
                _write(target, sample)
        return images


def _manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a folder, or None if it has no valid manifest."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_manifest = isinstance(manifest, dict) and manifest.keys() >= {"format", "source", "drawing", "images"}
    return manifest if is_manifest else None


def _matches(folder: Path, new_manifest: dict[str, Any], *, overwrite: bool) -> bool:
    """Return whether the manifest of a folder equals `new_manifest`.

    Raises:
        FileExistsError: If `folder` is a file, or has contents that must be kept.
    """
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise FileExistsError(f"out must be a folder, got the file {folder}; choose another name")
    manifest = _manifest(folder)
    if manifest == new_manifest:
        return True
    if manifest is None:
        if any(folder.iterdir()):
            raise FileExistsError(f"out={folder} contains other files; choose an empty or new folder")
    elif not overwrite:
        reasons = {
            "source": "a different pipeline or adapter",
            "drawing": "different settings",
            "images": "different prompts or seeds",
        }
        changed = [reason for name, reason in reasons.items() if manifest.get(name) != new_manifest[name]]
        difference = " and ".join(changed) or "a different version of snella"
        raise FileExistsError(
            f"out={folder} contains images generated with {difference}; choose another folder, or pass --overwrite"
        )
    return False


def _write(target: GeneratedImage, image: Image.Image) -> None:
    """Write a PNG file atomically, with the prompt and seed as metadata."""
    info = PngInfo()
    info.add_itxt("prompt", target.prompt)
    info.add_itxt("seed", str(target.seed))
    write_png(target.path, image, pnginfo=info)


def open_run(run: str | Path) -> DreamBoothFolder:
    """Return the folder of a DreamBooth run.

    Raises:
        FileNotFoundError: If the folder has no run.
        ValueError: If the run belongs to another command.
    """
    folder = DreamBoothFolder(run)
    if read(RunInfo, folder.path).task != "generation":
        raise ValueError(f"run must be a run folder created by `snella dreambooth`, got {run}, a run of another task")
    return folder


def load_generator(
    run: str | Path, options: GenerationOptions, console: Console | None = None, guidance: float | None = None
) -> tuple[ImageGenerator, DreamBoothConfig]:
    """Load a generator with the pipeline and adapter of a run, and return it with the run's settings.

    Args:
        run: Run folder.
        options: Pipeline, device, and sampling settings. Settings that are None default to the run's.
        console: Console for the progress bar, or None for no bar.
        guidance: Guidance scale. None selects the run's.

    Raises:
        FileNotFoundError: If the folder has no run, the run has no adapter yet, or the pipeline does not exist.
        ValueError: If the run belongs to another command, or the pipeline is invalid.
        ConnectionError: If the pipeline is neither local nor cached, and the hub is unreachable.
        AdapterFileError: If the adapter is damaged or does not fit the pipeline.
    """
    folder = open_run(run)
    folder.check_adapter()
    config = folder.read_config()
    name = str(options.pipeline or config.pipeline)
    pipeline = load_pipeline(name, config.optim.precision)
    load_trained(folder.adapter, pipeline.transformer)
    sampling = sampling_of(config, options.steps, guidance, options.batch_size)
    source = adapter_source(folder, name)
    return ImageGenerator(pipeline, choose_device(options.device), source, sampling, console), config


def adapter_source(run: DreamBoothFolder, pipeline: str) -> str:
    """Return the source of a run's images: the name of the pipeline, with the digest of the adapter's weights."""
    return f"{pipeline} with adapter {adapter_digest(run.adapter)}"


def generate(options: GenerateOptions, console: Console | None = None) -> list[GeneratedImage]:
    """Generate images with the pipeline and adapter of a run.

    For given settings, an image depends only on its prompt and seed, not on the other images.

    Args:
        options: Options of `snella generate`.
        console: Console for the progress bar, or None for stdout.

    Raises:
        FileNotFoundError: If the prompt file or run does not exist, or the run has no adapter yet.
        FileExistsError: See `ImageGenerator.generate`.
        ValueError: If the prompt file is invalid, or the run belongs to another command.
    """
    file = None if options.prompts is None else read_prompt_file(options.prompts)
    generator, config = load_generator(options.run, options, console or make_console(), options.guidance)
    if file is None:
        prompts = [str(options.prompt)]
    else:
        templates = file.templates(config.class_name, options.live)
        prompts = [fill(template, config.token, config.class_name or "") for template in templates]
    seeds = range(options.seed, options.seed + options.images_per_prompt)
    return generator.generate(Path(options.out), prompts, seeds, overwrite=options.overwrite)
