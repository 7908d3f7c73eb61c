"""Pictures from a finished personalisation run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from rich.console import Console

from snella.data.prompt_file import fill, read_prompt_file
from snella.generation.config import DreamBoothConfig
from snella.generation.drawing import Drawing
from snella.generation.folder import DreamBoothFolder
from snella.generation.picture_folder import Picture, draw_into
from snella.generation.pipeline import load_pipeline
from snella.methods import load_trained
from snella.training.adapter_digest import adapter_digest
from snella.training.assembly import choose_device
from snella.training.console import make_console


@dataclass(frozen=True)
class LoadedGenerator:
    """A pipeline that knows the subject of a run."""

    run: DreamBoothFolder
    config: DreamBoothConfig
    pipeline: StableDiffusion3Pipeline
    device: torch.device
    source: str

    def drawing(self, steps: int | None = None, guidance: float | None = None, batch_size: int = 1) -> Drawing:
        """How pictures are drawn: as the run says, where nothing else is asked for."""
        return Drawing(
            self.config.resolution,
            self.config.sample_steps if steps is None else steps,
            self.config.guidance if guidance is None else guidance,
            self.config.max_sequence_length,
            self.config.precision,
            batch_size,
        )


def load_generator(run: str | Path, *, pipeline: str | None = None, device: str = "auto") -> LoadedGenerator:
    """Load the pipeline of a run with its adapter.

    Args:
        run: Folder of the run.
        pipeline: Where the pipeline lies now, if not where training found it.
        device: auto, cpu or cuda.

    Raises:
        FileNotFoundError: This is not the folder of such a run, or it holds no adapter yet.
        ValueError: The run is one of another kind.
        AdapterFileError: The adapter is damaged, or belongs to another pipeline.
    """
    folder = DreamBoothFolder(run)
    task = folder.read_json("run.json").get("task")
    if task != "generation":
        raise ValueError(f"run must be the folder of a run of snella dreambooth, got {run}, a run of another task")
    folder.check_adapter()
    config = folder.read_config()
    name = str(pipeline or config.pipeline)
    loaded = load_pipeline(name, encoder_dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32)
    load_trained(folder.adapter, loaded.transformer)
    return LoadedGenerator(folder, config, loaded, choose_device(device), adapter_source(folder, config))


def adapter_source(run: DreamBoothFolder, config: DreamBoothConfig) -> str:
    """What draws a run's pictures: the pipeline's name and a digest of the adapter's weights."""
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
) -> list[Picture]:
    """Draw pictures with the pipeline that a run has taught its subject.

    Args:
        run: Folder of the run.
        prompts: What to draw; the subject's word (`sks`) stands for it.
        out: Folder for the pictures.
        pictures: Pictures of each prompt, with seeds `seed`, `seed + 1`, …
        seed: The first seed; a picture depends on prompt and seed alone.
        steps: Steps of the sampler, the run's `sample_steps` if None.
        guidance: How strongly the sampler follows the prompt, the run's if None.
        batch_size: Pictures at a time.
        pipeline: Where the pipeline lies now, if not where training found it.
        device: auto, cpu or cuda.
        overwrite: Replace other pictures in `out`.
        console: For the progress bar; standard output if None.

    Raises:
        ValueError: No prompts, or a number out of range.
        FileNotFoundError: As for `load_generator`.
        FileExistsError: `out` holds other pictures.
    """
    checked = {"pictures": (pictures, 1), "seed": (seed, 0), "batch_size": (batch_size, 1), "steps": (steps, 1)}
    faults = [
        f"{name} must be at least {least}, got {value}"
        for name, (value, least) in checked.items()
        if value is not None and value < least
    ]
    faults += [] if prompts else ["prompt must say what to draw, e.g. 'a photo of sks dog on the beach', got none"]
    if faults:
        raise ValueError("; ".join(faults))
    loaded = load_generator(run, pipeline=pipeline, device=device)
    return draw_into(
        Path(out),
        loaded.pipeline,
        prompts,
        range(seed, seed + pictures),
        loaded.drawing(steps, guidance, batch_size),
        loaded.device,
        console or make_console(),
        source=loaded.source,
        overwrite=overwrite,
    )


def prompts_of(run: str | Path, prompt: str | None, file: str | Path | None, live: bool | None = None) -> list[str]:
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
            f"prompt or prompts must say what to draw, one of them, got {'neither' if prompt is None else 'both'}; "
            "e.g. --prompt 'a photo of sks dog on the beach'"
        )
    if prompt is not None:
        return [prompt]
    config = DreamBoothFolder(run).read_config()
    templates = read_prompt_file(str(file)).templates(config.class_name, live)
    return [fill(template, config.token, config.class_name or "") for template in templates]
