"""Stable Diffusion 3 pipelines: loading, prompt embeddings and latent images."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.training_utils import offload_models
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image, ImageOps
from torch import Tensor

from snella_app.backbones.create import cache_only_if_unreachable
from snella_app.text import near_siblings


@dataclass(frozen=True)
class PromptEmbedding:
    """The embedding of a prompt.

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
        shift: What the transformer's inputs are centered by.
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
    """Embed prompts with the pipeline's three text encoders, which are on the device only meanwhile.

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
    """Encode images with the pipeline's autoencoder, which is on the device only meanwhile.

    Args:
        pipeline: Its autoencoder is used.
        images: RGB, of any size; scaled so that the shorter side fits, and cut to a square about the center.
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


@contextmanager
def suppress_progress_bars() -> Iterator[None]:
    """Hide the progress bars of diffusers and transformers while models load."""
    logs = (diffusers.utils.logging, transformers.utils.logging)
    were_shown = [log.is_progress_bar_enabled() for log in logs]
    for log in logs:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, was_shown in zip(logs, were_shown, strict=True):
            if was_shown:
                log.enable_progress_bar()


_INDEX = "model_index.json"
_OPTIONAL = ("text_encoder_3", "tokenizer_3", "image_encoder", "feature_extractor")
_NEEDED = (
    "transformer",
    "scheduler",
    "vae",
    "text_encoder",
    "tokenizer",
    "text_encoder_2",
    "tokenizer_2",
    "text_encoder_3",
    "tokenizer_3",
)


def load_pipeline(name: str, *, encoder_dtype: torch.dtype = torch.float32) -> StableDiffusion3Pipeline:
    """Load a pipeline onto the CPU; transformer and image autoencoder in float32.

    Args:
        name: A local folder in diffusers' format, or a name on the hub, `owner/repo`.
        encoder_dtype: Dtype of the three text encoders, which are never trained. The third may be missing, as diffusers
            allows.

    Raises:
        FileNotFoundError: A folder that is not there, or one that lacks components; all of them are named.
        ValueError: A folder of another pipeline, or the hub does not give it out.
        ConnectionError: No folder, and neither the hub nor its cache has it.
    """
    folder = Path(name).expanduser()
    dtypes: dict[str, Any] = {"default": torch.float32}
    dtypes |= dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3"), encoder_dtype)
    if folder.is_dir():
        absent = dict.fromkeys(_check_folder(folder))
        with suppress_progress_bars():
            return StableDiffusion3Pipeline.from_pretrained(folder, dtype=dtypes, local_files_only=True, **absent)
    if name.count("/") != 1 or name.startswith((".", "~", "/")):
        near = near_siblings(folder, folders_alone=True)
        raise FileNotFoundError(f"pipeline must be a folder or a hub name (owner/repo), got {name!r}{near}")
    with cache_only_if_unreachable() as reason, suppress_progress_bars():
        try:
            return StableDiffusion3Pipeline.from_pretrained(name, dtype=dtypes, local_files_only=bool(reason))
        except (OSError, ValueError, HfHubHTTPError) as error:
            if reason is None:
                raise ValueError(
                    f"the hub does not give out pipeline {name!r}: {_first_line(error)}; accept its license there, or "
                    "download it elsewhere and pass the folder"
                ) from error
            raise ConnectionError(
                f"pipeline {name!r} is no folder here, and the hub could not be reached ({reason}), nor is it in its "
                f"cache; pass a local folder in diffusers' format (it holds {_INDEX}, transformer/, vae/, …)"
            ) from error


def _check_folder(folder: Path) -> list[str]:
    """Refuse a folder that is no such pipeline or lacks something, all errors in one message.

    Returns:
        Optional components that are absent, which diffusers needs to know.
    """
    index = folder / _INDEX
    if not index.is_file():
        raise FileNotFoundError(
            f"pipeline folder '{folder}' has no {_INDEX}; it must be in diffusers' format, as "
            "pipeline.save_pretrained writes it"
        )
    try:
        components = json.loads(index.read_text(encoding="utf-8"))
        kind = components.get("_class_name")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"'{index}' is damaged: {error}; copy the folder again") from None
    if kind != StableDiffusion3Pipeline.__name__:
        raise ValueError(
            f"pipeline folder '{folder}' must hold a StableDiffusion3Pipeline, got {kind}; SNELLA's generation is "
            "written for Stable Diffusion 3"
        )
    absent = [part for part in _NEEDED if part not in components or components[part][0] is None]
    errors = [f"{part} is missing from {_INDEX}" for part in absent if part not in _OPTIONAL]
    for part in _NEEDED:
        if part not in absent:
            errors += _component_errors(folder / part)
    if errors:
        raise FileNotFoundError(
            f"pipeline folder '{folder}' is incomplete: {'; '.join(errors)}; copy or download it again"
        )
    return absent


def _component_errors(folder: Path) -> list[str]:
    """What a component's folder lacks."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return [f"there is no {folder.name}/"]
    if folder.name.startswith("tokenizer") or folder.name == "scheduler":
        return [] if any(folder.glob("*.json")) else [f"{folder.name}/ holds no configuration"]
    errors = [] if (folder / "config.json").is_file() else [f"{folder.name}/ holds no config.json"]
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    return errors if weights else [*errors, f"{folder.name}/ holds no weights"]


def _first_line(error: BaseException) -> str:
    """The first line of an error, which says what happened."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
