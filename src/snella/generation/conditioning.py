"""What training and sampling are conditioned on, computed once: embedded prompts and images in latent space."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.training_utils import offload_models
from PIL import Image, ImageOps
from torch import Tensor


@dataclass(frozen=True)
class PromptEmbedding:
    """One prompt as the transformer sees it.

    Attributes:
        tokens: `[1, L, D]`, float32.
        pooled: `[1, P]`, float32.
    """

    tokens: Tensor
    pooled: Tensor

    def repeated(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tokens and pooled vector for `count` images."""
        return self.tokens.to(device).repeat(count, 1, 1), self.pooled.to(device).repeat(count, 1)


@dataclass(frozen=True)
class LatentImages:
    """Images as distributions in the autoencoder's latent space; each use draws a sample.

    z = (mean + std · noise − shift) · scale

    Attributes:
        mean: `[n, c, h, w]`.
        std: `[n, c, h, w]`.
        shift: What the transformer's inputs are centred by.
        scale: What they are scaled by.
    """

    mean: Tensor
    std: Tensor
    shift: float
    scale: float

    def __len__(self) -> int:
        return len(self.mean)

    def draw(self, indices: list[int], generator: torch.Generator) -> Tensor:
        """A sample of each of these images, `[n, c, h, w]`."""
        mean, std = self.mean[indices], self.std[indices]
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype)
        return (mean + std * noise - self.shift) * self.scale


@torch.no_grad()
def embed_prompts(
    pipeline: StableDiffusion3Pipeline, prompts: Iterable[str], device: torch.device, max_sequence_length: int
) -> list[PromptEmbedding]:
    """Embed prompts with the pipeline's three text encoders, which visit the device only meanwhile.

    Args:
        pipeline: Its text encoders and tokenizers are used.
        prompts: Each as a whole; what exceeds the encoders' length is cut off by them, with a note.
        device: Where to compute.
        max_sequence_length: Tokens that the third encoder sees.
    """
    encoders = [pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3]
    with offload_models(*(encoder for encoder in encoders if encoder is not None), device=device):
        found = [
            pipeline.encode_prompt(
                prompt,
                prompt,
                prompt,
                device,
                do_classifier_free_guidance=False,
                max_sequence_length=max_sequence_length,
            )
            for prompt in prompts
        ]
    return [PromptEmbedding(tokens.float().cpu(), pooled.float().cpu()) for tokens, _, pooled, _ in found]


@torch.no_grad()
def encode_images(
    pipeline: StableDiffusion3Pipeline,
    images: Iterable[Image.Image],
    device: torch.device,
    resolution: int,
    *,
    flip: bool = False,
) -> LatentImages:
    """Encode images with the pipeline's autoencoder, which visits the device only meanwhile.

    Args:
        pipeline: Its autoencoder is used.
        images: RGB, of any size; scaled so that the shorter side fits, and cut to a square about the centre.
        device: Where to compute.
        resolution: Side of the square in pixels.
        flip: Encode every image a second time, mirrored; these follow after the others.

    Raises:
        ValueError: The pipeline cannot work at this resolution; names one that it can.
    """
    check_resolution(pipeline, resolution)
    pictures = list(images)
    pictures += [ImageOps.mirror(image) for image in pictures] if flip else []
    vae, means, deviations = pipeline.vae, [], []
    with offload_models(vae, device=device):
        for picture in pictures:
            pixels = pipeline.image_processor.preprocess(picture, resolution, resolution, resize_mode="crop")
            found = vae.encode(pixels.to(device, vae.dtype)).latent_dist
            means.append(found.mean.float().cpu())
            deviations.append(found.std.float().cpu())
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return LatentImages(torch.cat(means), torch.cat(deviations), shift, vae.config.scaling_factor)


def check_resolution(pipeline: StableDiffusion3Pipeline, resolution: int) -> None:
    """Refuse a resolution that does not fit the pipeline.

    Raises:
        ValueError: Not a multiple of what latents and patches need, or beyond the transformer's positions.
    """
    unit = pipeline.vae_scale_factor * pipeline.patch_size
    most = unit * getattr(pipeline.transformer.config, "pos_embed_max_size", 0)
    near = max(unit, resolution // unit * unit)
    near = min(near, most) if most else near
    if resolution % unit or (most and resolution > most):
        limit = f" up to {most}" if most else ""
        raise ValueError(
            f"resolution must be a multiple of {unit}{limit} for this pipeline, got {resolution}; {near} would fit"
        )
