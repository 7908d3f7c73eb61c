"""Stable Diffusion 3 pipelines: loading, prompt embeddings, and image latents."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.training_utils import offload_models
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image, ImageOps
from torch import Tensor

from snella_app.backbones.create import cache_only_if_unreachable
from snella_app.files import expand_user
from snella_app.text import first_line, similar_paths
from snella_lab.recipes.pretrained import suppress_progress_bars

TEXT_COMPONENTS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
_OPTIONAL_COMPONENTS = ("text_encoder_3", "tokenizer_3")
_COMPONENTS = ("transformer", "scheduler", "vae", *TEXT_COMPONENTS)
_INDEX_FILE = "model_index.json"


@dataclass(frozen=True)
class PromptEmbedding:
    """Embedding of a prompt.

    Attributes:
        tokens: Embeddings of the tokens, `[1, L, D]`, float32.
        pooled: Pooled embedding, `[1, P]`, float32.
    """

    tokens: Tensor
    pooled: Tensor

    def repeated(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return both embeddings on `device`, repeated for `count` images."""
        return self.tokens.to(device).repeat(count, 1, 1), self.pooled.to(device).repeat(count, 1)


@dataclass(frozen=True)
class LatentImages:
    """Distributions of image latents z, as computed by the autoencoder.

    z = (mean + std · noise − shift) · scale

    Attributes:
        mean: Means, `[n, c, h, w]`.
        std: Standard deviations, `[n, c, h, w]`.
        shift: Shift factor of the autoencoder.
        scale: Scaling factor of the autoencoder.
    """

    mean: Tensor
    std: Tensor
    shift: float
    scale: float

    def __len__(self) -> int:
        return len(self.mean)

    def sample(self, indices: list[int], generator: torch.Generator) -> Tensor:
        """Sample latents of the images at `indices`, `[n, c, h, w]`."""
        mean = self.mean[indices]
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype)
        return (mean + self.std[indices] * noise - self.shift) * self.scale


@torch.no_grad()
def embed_prompts(
    pipeline: StableDiffusion3Pipeline, prompts: Iterable[str], device: torch.device, max_sequence_length: int
) -> list[PromptEmbedding]:
    """Embed prompts with the pipeline's two or three text encoders, which are temporarily moved to the device.

    Args:
        pipeline: Pipeline with text encoders and tokenizers.
        prompts: Prompts. diffusers truncates long ones with a warning.
        device: Device of the text encoders.
        max_sequence_length: Maximum prompt length of the third text encoder, in tokens.
    """
    encoders = [pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3]
    embeddings = []
    with offload_models(*(encoder for encoder in encoders if encoder is not None), device=device):
        for prompt in prompts:
            tokens, _, pooled, _ = pipeline.encode_prompt(
                prompt,  # one argument per text encoder
                prompt,
                prompt,
                device,
                do_classifier_free_guidance=False,
                max_sequence_length=max_sequence_length,
            )
            embeddings.append(PromptEmbedding(tokens.float().cpu(), pooled.float().cpu()))
    return embeddings


@torch.no_grad()
def encode_images(
    pipeline: StableDiffusion3Pipeline,
    images: Iterable[Image.Image],
    device: torch.device,
    resolution: int,
    *,
    flip: bool = False,
) -> LatentImages:
    """Encode images with the pipeline's autoencoder, which is temporarily moved to the device.

    Args:
        pipeline: Pipeline with the autoencoder.
        images: RGB images of any size, which are scaled to fill a square and center-cropped.
        device: Device of the autoencoder.
        resolution: Side of the square in pixels.
        flip: Append a mirrored copy of every image.

    Raises:
        ValueError: If the pipeline does not support this resolution. The message suggests one.
    """
    check_resolution(pipeline, resolution)
    all_images = list(images)
    if flip:
        all_images += [ImageOps.mirror(image) for image in all_images]
    vae = pipeline.vae
    means = []
    deviations = []
    with offload_models(vae, device=device):
        for image in all_images:
            pixels = pipeline.image_processor.preprocess(image, resolution, resolution, resize_mode="crop")
            latents = vae.encode(pixels.to(device, vae.dtype)).latent_dist
            means.append(latents.mean.float().cpu())
            deviations.append(latents.std.float().cpu())
    shift = getattr(vae.config, "shift_factor", None) or 0.0  # not every autoencoder has a shift
    return LatentImages(torch.cat(means), torch.cat(deviations), shift, vae.config.scaling_factor)


def check_resolution(pipeline: StableDiffusion3Pipeline, resolution: int) -> None:
    """Check that the pipeline supports a resolution.

    Raises:
        ValueError: If the resolution is not a multiple of the patch size in pixels, or exceeds the range of the
            position embeddings.
    """
    multiple = pipeline.vae_scale_factor * pipeline.patch_size
    max_resolution = multiple * getattr(pipeline.transformer.config, "pos_embed_max_size", 0)  # 0 without a maximum
    nearest = max(multiple, resolution // multiple * multiple)
    limit = ""
    if max_resolution:
        nearest = min(nearest, max_resolution)
        limit = f" up to {max_resolution}"
    if resolution % multiple or (max_resolution and resolution > max_resolution):
        raise ValueError(
            f"resolution must be a multiple of {multiple}{limit} for this pipeline, got {resolution}; use {nearest}"
        )


def load_pipeline(name: str, precision: str = "fp32") -> StableDiffusion3Pipeline:
    """Load a pipeline onto the CPU, with the transformer and the autoencoder in float32.

    Args:
        name: Local folder in diffusers format, or hub name `owner/repo`.
        precision: Precision of the text encoders: fp32 or bf16.

    Raises:
        FileNotFoundError: If the folder does not exist or lacks components. The message lists missing components.
        ValueError: If the folder contains a different kind of pipeline or a damaged index, or if the hub is reachable,
            but the pipeline cannot be loaded from it.
        ConnectionError: If the pipeline is neither local nor cached, and the hub is unreachable.
    """
    folder = expand_user(name)
    dtypes: dict[str, Any] = {"default": torch.float32}
    if precision == "bf16":
        dtypes |= dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3"), torch.bfloat16)
    if folder.is_dir():
        absent = dict.fromkeys(_check_folder(folder))
        with suppress_progress_bars(diffusers):
            return StableDiffusion3Pipeline.from_pretrained(folder, dtype=dtypes, local_files_only=True, **absent)
    if name.count("/") != 1 or name.startswith((".", "~", "/")):  # not a hub name
        suggestion = similar_paths(folder, folders_only=True)
        raise FileNotFoundError(f"pipeline must be a folder or a hub name (owner/repo), got {name!r}{suggestion}")
    # `reason` is None if the hub is reachable
    with cache_only_if_unreachable() as reason, suppress_progress_bars(diffusers):
        try:
            return StableDiffusion3Pipeline.from_pretrained(name, dtype=dtypes, local_files_only=bool(reason))
        except (OSError, ValueError, HfHubHTTPError) as error:
            if reason is None:
                raise ValueError(
                    f"pipeline {name!r} cannot be loaded from the hub: {first_line(error)}; check the name, accept the "
                    "license on the hub, or download the pipeline elsewhere and pass the folder"
                ) from error
            raise ConnectionError(
                f"pipeline {name!r} is not a local folder and not cached, and the hub is unreachable ({reason}); pass "
                f"a local folder in diffusers format (with {_INDEX_FILE}, transformer/, vae/, …)"
            ) from error


def _check_folder(folder: Path) -> list[str]:
    """Validate a pipeline folder. If anything is missing, the error lists all of it.

    Returns:
        Missing optional components, for which diffusers requires explicit None arguments.
    """
    index_file = folder / _INDEX_FILE
    if not index_file.is_file():
        raise FileNotFoundError(
            f"pipeline folder '{folder}' has no {_INDEX_FILE}, so it is not in diffusers format; write the folder "
            "with pipeline.save_pretrained"
        )
    try:
        index = json.loads(index_file.read_text(encoding="utf-8"))
        kind = index.get("_class_name")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"'{index_file}' is damaged: {error}; copy the folder again") from None
    if kind != StableDiffusion3Pipeline.__name__:
        raise ValueError(
            f"pipeline folder '{folder}' must contain a StableDiffusion3Pipeline, got {kind}; snella dreambooth "
            "supports Stable Diffusion 3 only"
        )
    absent = []
    for component in _COMPONENTS:
        entry = index.get(component) or [None]  # [library, class], or [None, None] for an absent component
        if not entry[0]:
            absent.append(component)
    errors = [f"{name} is missing from {_INDEX_FILE}" for name in absent if name not in _OPTIONAL_COMPONENTS]
    for component in _COMPONENTS:
        if component not in absent:
            errors += _component_errors(folder / component)
    if errors:
        raise FileNotFoundError(
            f"pipeline folder '{folder}' is incomplete: {'; '.join(errors)}; copy or download it again"
        )
    return absent


def _component_errors(folder: Path) -> list[str]:
    """Return errors for missing files in a component's folder."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return [f"{folder.name}/ is missing"]
    if folder.name.startswith("tokenizer") or folder.name == "scheduler":  # components without weights
        return [] if any(folder.glob("*.json")) else [f"{folder.name}/ has no configuration"]
    errors = []
    if not (folder / "config.json").is_file():
        errors.append(f"{folder.name}/ has no config.json")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        errors.append(f"{folder.name}/ has no weights")
    return errors
