"""Drawing pictures with a pipeline; a picture depends on its prompt and its own seed alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from PIL import Image

from snella.generation.conditioning import PromptEmbedding, check_resolution, embed_prompts

_TEXT_PARTS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn.

    Args:
        resolution: Side in pixels.
        steps: Steps of the sampler.
        guidance: How strongly it follows the prompt; up to 1 it is not guided.
        max_sequence_length: Tokens of a prompt that the third text encoder sees; as in training.
        precision: fp32, or bf16 for autocast.
        batch_size: Pictures at a time.
    """

    resolution: int = 512
    steps: int = 28
    guidance: float = 7.0
    max_sequence_length: int = 77
    precision: str = "fp32"
    batch_size: int = 1


def draw_images(
    pipeline: StableDiffusion3Pipeline,
    jobs: Sequence[tuple[str, int]],
    drawing: Drawing,
    device: torch.device,
    receive: Callable[[int, Image.Image], None],
) -> None:
    """Draw one picture a job.

    Prompts are embedded first, each once; then only transformer and autoencoder stay on the device.

    Args:
        pipeline: With the adapter in its transformer.
        jobs: Prompt and seed of each picture.
        drawing: How.
        device: Where.
        receive: Called with the number of the job and its picture as soon as it is drawn.

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
        found = _draw(drawer, batch, embedded, drawing, device)
        for number, picture in enumerate(found, first):
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
    drawing: Drawing,
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
