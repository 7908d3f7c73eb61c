"""Images of the subject's class, drawn by the untrained pipeline, that keep the class from drifting."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from rich.console import Console

from snella.data.dreambooth import Concept
from snella.generation.config import DreamBoothConfig
from snella.generation.drawing import Drawing
from snella.generation.picture_folder import draw_into


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
