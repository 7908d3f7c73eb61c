"""`generate`: images from a finished DreamBooth run."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from snella_app.console import make_console
from snella_app.data.images import IMAGE_SUFFIXES
from snella_app.device import choose_device
from snella_app.files import write_bytes, write_json
from snella_app.methods import load_trained
from snella_app.records import RunInfo, read
from snella_app.runs.folder import adapter_digest
from snella_lab.recipes.dreambooth.config import DreamBoothConfig, DreamBoothFolder
from snella_lab.recipes.dreambooth.data import fill, read_prompt_file
from snella_lab.recipes.dreambooth.pipeline import PromptEmbedding, check_resolution, embed_prompts, load_pipeline

_TEXT_PARTS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")


@dataclass(frozen=True)
class SamplingConfig:
    """Sampling settings.

    Args:
        resolution: In pixels.
        steps: Sampling steps.
        guidance: Guidance scale; up to 1 for none.
        max_sequence_length: Tokens of a prompt that the third text encoder sees; as in training.
        precision: fp32, or bf16 for autocast.
        batch_size: Images at a time.
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
    """Sampling settings: the run's, unless given."""
    return SamplingConfig(
        config.resolution,
        config.sample_steps if steps is None else steps,
        config.guidance if guidance is None else guidance,
        config.max_sequence_length,
        config.precision,
        batch_size,
    )


def draw_images(
    pipeline: StableDiffusion3Pipeline,
    jobs: Sequence[tuple[str, int]],
    drawing: SamplingConfig,
    device: torch.device,
    receive: Callable[[int, Image.Image], None],
) -> None:
    """Generate one image per job.

    Prompts are embedded first, each once; then only transformer and autoencoder stay on the device.

    Args:
        pipeline: With the adapter in its transformer.
        jobs: Prompt and seed of each image.
        drawing: How.
        device: Where.
        receive: Called with the number of the job and its image as soon as it is generated.

    Raises:
        ValueError: The pipeline cannot draw at this resolution.
    """
    check_resolution(pipeline, drawing.resolution)
    prompts = list(dict.fromkeys(prompt for prompt, _ in jobs))
    is_guided = drawing.guidance > 1
    wanted = [*prompts, *([""] if is_guided else [])]
    embedded = dict(zip(wanted, embed_prompts(pipeline, wanted, device, drawing.max_sequence_length), strict=True))
    drawer = _without_text_encoders(pipeline, device)
    for first in range(0, len(jobs), drawing.batch_size):
        batch = jobs[first : first + drawing.batch_size]
        for number, picture in enumerate(_draw(drawer, batch, embedded, drawing, device), first):
            receive(number, picture)


def _without_text_encoders(pipeline: StableDiffusion3Pipeline, device: torch.device) -> StableDiffusion3Pipeline:
    """The pipeline's drawing parts, on the device; a pipeline with parts elsewhere would mistake where it is."""
    absent: dict[str, Any] = dict.fromkeys(_TEXT_PARTS)
    drawer = StableDiffusion3Pipeline(
        transformer=pipeline.transformer.to(device).eval(),
        scheduler=type(pipeline.scheduler).from_config(pipeline.scheduler.config),
        vae=pipeline.vae.to(device),
        **absent,
    )
    drawer.set_progress_bar_config(disable=True)
    return drawer


@torch.no_grad()
def _draw(
    pipeline: StableDiffusion3Pipeline,
    jobs: Sequence[tuple[str, int]],
    embedded: dict[str, PromptEmbedding],
    drawing: SamplingConfig,
    device: torch.device,
) -> list[Image.Image]:
    """The pictures of one batch."""

    def stacked(prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.cat([embedded[prompt].tokens for prompt in prompts])
        return tokens.to(device), torch.cat([embedded[prompt].pooled for prompt in prompts]).to(device)

    tokens, pooled = stacked([prompt for prompt, _ in jobs])
    negative = stacked([""] * len(jobs)) if drawing.guidance > 1 else (None, None)
    with autocast(device, drawing.precision):
        return pipeline(
            prompt_embeds=tokens,
            pooled_prompt_embeds=pooled,
            negative_prompt_embeds=negative[0],
            negative_pooled_prompt_embeds=negative[1],
            height=drawing.resolution,
            width=drawing.resolution,
            num_inference_steps=drawing.steps,
            guidance_scale=drawing.guidance,
            generator=[torch.Generator().manual_seed(seed) for _, seed in jobs],
        ).images


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Autocast for bf16, nothing for fp32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


MANIFEST = "images.json"


@dataclass(frozen=True)
class GeneratedImage:
    """One generated image."""

    path: Path
    prompt: str
    seed: int


def generate_images(
    folder: Path,
    pipeline: StableDiffusion3Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    drawing: SamplingConfig,
    device: torch.device,
    console: Console,
    *,
    source: str,
    overwrite: bool = False,
    show_bar: bool = True,
) -> list[GeneratedImage]:
    """Generate every prompt with every seed; images of an interrupted call are kept.

    Args:
        folder: Where they go, as `PROMPT-SEED.png`, with `images.json`; created.
        pipeline: With the adapter in its transformer.
        prompts: The prompts.
        seeds: One image of each prompt for each of them.
        drawing: How.
        device: Where.
        console: For the progress bar; it appears only if this is a terminal.
        source: Pipeline and digest of the adapter. Images of another source are not kept.
        overwrite: Generate everything again in a folder that holds other images.
        show_bar: Whether to show a bar.

    Raises:
        FileExistsError: The folder holds images of other prompts, seeds, settings or another adapter.
        ValueError: The pipeline cannot draw at this resolution.
    """
    width = max(2, len(str(len(prompts) - 1)))
    pictures = [
        GeneratedImage(folder / f"{number:0{width}}-{seed}.png", prompt, seed)
        for number, prompt in enumerate(prompts)
        for seed in seeds
    ]
    content = {
        "format": 1,
        "source": source,
        "drawing": {name: value for name, value in asdict(drawing).items() if name != "batch_size"},
        "images": [{"file": each.path.name, "prompt": each.prompt, "seed": each.seed} for each in pictures],
    }
    check_image_folder(folder, content, overwrite=overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    if _read_manifest(folder) != content:
        for path in folder.iterdir():
            if path.suffix.lower() in IMAGE_SUFFIXES:
                path.unlink()
        write_json(folder / MANIFEST, content)
    missing = [each for each in pictures if not each.path.is_file()]
    columns = (TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not (show_bar and console.is_terminal)) as bar:
        task = bar.add_task("generating", total=len(pictures), completed=len(pictures) - len(missing))

        def receive(number: int, picture: Image.Image) -> None:
            _write(missing[number], picture)
            bar.advance(task)

        if missing:
            draw_images(pipeline, [(each.prompt, each.seed) for each in missing], drawing, device, receive)
    return pictures


def check_image_folder(folder: Path, content: dict[str, Any], *, overwrite: bool) -> None:
    """Refuse a folder that holds something else.

    Args:
        folder: Need not exist.
        content: The content of `images.json`.
        overwrite: Whether other generated images may be removed.

    Raises:
        FileExistsError: It does.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"out={folder} must be a folder, got a file; choose another name")
    manifest = _read_manifest(folder)
    if manifest == content:
        return
    if manifest is None and any(folder.iterdir()):
        raise FileExistsError(f"out={folder} holds other files; choose an empty or a new folder")
    if manifest is not None and not overwrite:
        changed = [name for name in ("source", "drawing", "images") if manifest.get(name) != content[name]]
        names = {"source": "another adapter", "drawing": "other settings", "images": "other prompts or seeds"}
        raise FileExistsError(
            f"out={folder} holds images of {' and '.join(names[name] for name in changed)}; choose another folder, "
            "or generate again with --overwrite"
        )


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """What `images.json` says; None where there is none or it is damaged."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write(picture: GeneratedImage, image: Image.Image) -> None:
    """Write a PNG file atomically, with prompt and seed in its metadata."""
    info = PngInfo()
    info.add_itxt("prompt", picture.prompt)
    info.add_itxt("seed", str(picture.seed))
    content = io.BytesIO()
    image.save(content, format="PNG", pnginfo=info)
    write_bytes(picture.path, content.getvalue())


@dataclass(frozen=True)
class LoadedGenerator:
    """The pipeline of a run with its adapter."""

    run: DreamBoothFolder
    config: DreamBoothConfig
    pipeline: StableDiffusion3Pipeline
    device: torch.device
    source: str


def load_generator(run: str | Path, *, pipeline: str | None = None, device: str = "auto") -> LoadedGenerator:
    """Load the pipeline of a run with its adapter.

    Args:
        run: Folder of the run.
        pipeline: New place of the pipeline, if it was moved.
        device: auto, or a device of torch such as cpu, cuda:1 or mps.

    Raises:
        FileNotFoundError: This is not the folder of such a run, or it holds no adapter yet.
        ValueError: The run is one of another kind.
        AdapterFileError: The adapter is damaged, or belongs to another pipeline.
    """
    folder = DreamBoothFolder(run)
    if read(RunInfo, folder.path).task != "generation":
        raise ValueError(f"run must be the folder of a run of snella dreambooth, got {run}, a run of another task")
    folder.check_adapter()
    config = folder.read_config()
    name = str(pipeline or config.pipeline)
    loaded = load_pipeline(name, encoder_dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32)
    load_trained(folder.adapter, loaded.transformer)
    return LoadedGenerator(folder, config, loaded, choose_device(device), adapter_source(folder, config))


def adapter_source(run: DreamBoothFolder, config: DreamBoothConfig) -> str:
    """The pipeline's name and a digest of the adapter's weights."""
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

    Args:
        run: Folder of the run.
        prompts: The prompts, with the subject's token (`sks`).
        out: Folder for the images.
        pictures: Images of each prompt, with seeds `seed`, `seed + 1`, …
        seed: The first seed; an image depends on prompt and seed alone.
        steps: Sampling steps, the run's `sample_steps` if None.
        guidance: Guidance scale, the run's if None.
        batch_size: Images at a time.
        pipeline: New place of the pipeline, if it was moved.
        device: auto, or a device of torch such as cpu, cuda:1 or mps.
        overwrite: Replace other images in `out`.
        console: For the progress bar; standard output if None.

    Raises:
        ValueError: No prompts, or a number out of range.
        FileNotFoundError: As for `load_generator`.
        FileExistsError: `out` holds other images.
    """
    checked = {"pictures": (pictures, 1), "seed": (seed, 0), "batch_size": (batch_size, 1), "steps": (steps, 1)}
    errors = [
        f"{name} must be at least {least}, got {value}"
        for name, (value, least) in checked.items()
        if value is not None and value < least
    ]
    errors += [] if prompts else ["prompt must be given, e.g. 'a photo of sks dog on the beach', got none"]
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
    """The prompts that a user asks for: one, or those of a file with the run's subject in their places.

    Args:
        run: Folder of the run.
        prompt: A whole prompt.
        file: A file of prompts.
        live: Whether to use that file's prompts for animals; if None cats and dogs get them.

    Raises:
        ValueError: Neither is given or both are, or the file holds no usable prompts.
        FileNotFoundError: There is no such file or run.
    """
    if (prompt is None) == (file is None):
        raise ValueError(
            f"prompt or prompts must be given, one of them, got {'neither' if prompt is None else 'both'}; "
            "e.g. --prompt 'a photo of sks dog on the beach'"
        )
    if prompt is not None:
        return [prompt]
    config = DreamBoothFolder(run).read_config()
    templates = read_prompt_file(str(file)).templates(config.class_name, live)
    return [fill(template, config.token, config.class_name or "") for template in templates]
