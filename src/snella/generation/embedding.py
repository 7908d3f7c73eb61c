"""Embeddings of images and texts by CLIP, and of images by DINOv2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, Dinov2Model

from snella.backbones.hub import cache_only_if_unreachable
from snella.generation.quietness import quiet_libraries

_BATCH = 16


class ClipEmbedder:
    """CLIP's image and text embeddings in their common space.

    Args:
        name: Local folder in transformers' format, or a name on the hub.
        device: Where to compute.

    Raises:
        FileNotFoundError: A folder that lacks model, image processor or tokenizer.
        ConnectionError: No folder, and neither the hub nor its cache has it.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.device = device
        self.model = _load("clip", name, CLIPModel).to(device).eval()
        self.processor = _load("clip", name, AutoImageProcessor)
        self.tokenizer = _load("clip", name, AutoTokenizer)

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """Embeddings of images, `[n, d]`."""
        return _in_batches(images, lambda batch: self._features(self.model.get_image_features, self._pixels(batch)))

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of texts, `[n, d]`; a text is cut off where CLIP's length ends."""
        return _in_batches(texts, lambda batch: self._features(self.model.get_text_features, self._tokens(batch)))

    def _pixels(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Images as the model wants them."""
        return dict(self.processor(images=list(images), return_tensors="pt"))

    def _tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Texts as the model wants them."""
        length = self.model.config.text_config.max_position_embeddings
        return dict(self.tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt"))

    def _features(self, function: Callable[..., Any], inputs: dict[str, Tensor]) -> Tensor:
        """What a tower says, projected."""
        found = function(**{name: value.to(self.device) for name, value in inputs.items()})
        return found if isinstance(found, Tensor) else found.pooler_output


class DinoEmbedder:
    """DINOv2's image embeddings: the class token after the last norm.

    Args:
        name: Local folder in transformers' format, or a name on the hub.
        device: Where to compute.

    Raises:
        FileNotFoundError: A folder that lacks model or image processor.
        ConnectionError: No folder, and neither the hub nor its cache has it.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.device = device
        self.model = _load("dino", name, Dinov2Model).to(device).eval()
        self.processor = _load("dino", name, AutoImageProcessor)

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """Embeddings of images, `[n, d]`."""

        def embed(batch: Sequence[Image.Image]) -> Tensor:
            pixels = self.processor(images=list(batch), return_tensors="pt")["pixel_values"]
            return self.model(pixel_values=pixels.to(self.device)).pooler_output

        return _in_batches(images, embed)


@torch.no_grad()
def _in_batches(items: Sequence[Any], embed: Callable[[Sequence[Any]], Tensor]) -> Tensor:
    """Embeddings of many items, a few at a time, on the CPU."""
    return torch.cat([embed(items[k : k + _BATCH]).float().cpu() for k in range(0, len(items), _BATCH)])


def _load(option: str, name: str, kind: Any) -> Any:
    """A model or a processor, from a folder or the hub."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        try:
            with quiet_libraries():
                return kind.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as fault:
            raise FileNotFoundError(
                f"{option} must be a folder in transformers' format, got '{folder}', which gives no {kind.__name__}: "
                f"{str(fault).strip().splitlines()[0]}"
            ) from fault
    with cache_only_if_unreachable() as reason, quiet_libraries():
        try:
            return kind.from_pretrained(name, local_files_only=bool(reason))
        except (OSError, ValueError) as fault:
            raise ConnectionError(
                f"{option}={name!r} is no folder here, and "
                + (f"the hub could not be reached ({reason}), nor is it in its cache" if reason else "not on the hub")
                + "; pass a local folder in transformers' format"
            ) from fault
