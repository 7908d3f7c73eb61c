"""Example images of the report, mask overlays, and heat maps of timm models."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from snella_app.data.images import open_image
from snella_app.files import write_png
from snella_app.methods.model_parts import base_model
from snella_app.records import Prediction

_OPACITY = 0.45
_HEAT_OPACITY = (0.15, 0.65)
_TINTS = (0.0, 0.5, 0.75)
_GAP = 4
_MAX_SIDE = 260


def mask_colors(count: int) -> np.ndarray:
    """Return one fixed color per label, `[count, 3]` uint8; the background is black."""
    from matplotlib.colors import to_rgb

    from snella_app.report.style import COLORS, WARM  # lazy: imports matplotlib

    palette = np.array([to_rgb(color) for color in (WARM, *(color for color in COLORS if color != WARM))])
    labels = np.arange(max(count - 1, 0))
    tint = np.array(_TINTS)[labels // len(palette) % len(_TINTS), None]  # a lighter tint for each palette cycle
    colors = palette[labels % len(palette)] * (1 - tint) + tint
    return (np.concatenate([np.zeros((1, 3)), colors])[:count] * 255).round().astype(np.uint8)


def write_mask(labels: np.ndarray, path: Path) -> None:
    """Atomically write labels `[height, width]` (uint8) as a palette PNG whose indices are the labels."""
    image = Image.fromarray(labels.astype(np.uint8))
    image.putpalette(mask_colors(256).reshape(-1).tolist())
    write_png(path, image, optimize=True)


def read_mask(path: Path) -> Image.Image:
    """Read a palette PNG written by `write_mask`; its array holds the labels."""
    with open_image(path) as image:
        image.load()
        return image


def overlay(image: Image.Image, labels: np.ndarray) -> Image.Image:
    """Overlay the colors of a mask on an image, with outlines; the background is unchanged.

    Args:
        image: RGB.
        labels: `[height, width]`, uint8; resized to the image by nearest neighbor.
    """
    sized = np.asarray(Image.fromarray(labels.astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST))
    is_edge = np.zeros(sized.shape, bool)  # the right or lower neighbor has another label
    is_edge[:, :-1] |= sized[:, :-1] != sized[:, 1:]
    is_edge[:-1] |= sized[:-1] != sized[1:]
    pixels, colors = np.asarray(image.convert("RGB")).astype(float), mask_colors(256)[sized].astype(float)
    opacity = np.where(is_edge, 1.0, _OPACITY) * (sized > 0)
    mixed = pixels + opacity[..., None] * (colors - pixels)
    return Image.fromarray(mixed.round().astype(np.uint8))


def overlay_panels(image: Image.Image, masks: Sequence[np.ndarray]) -> Image.Image:
    """Return the image and one overlay per mask, side by side."""
    scale = _MAX_SIDE / max(image.size)
    size = (max(1, round(scale * image.width)), max(1, round(scale * image.height)))
    shown = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    panels = [shown, *(overlay(shown, mask) for mask in masks)]
    canvas = Image.new("RGBA", (len(panels) * (size[0] + _GAP) - _GAP, size[1]), (0, 0, 0, 0))
    for column, panel in enumerate(panels):
        canvas.paste(panel, (column * (size[0] + _GAP), 0))
    return canvas


ImageSource = Callable[[int], Image.Image | None]
"""Maps the index of an image in its split to the image, or to None if it is unavailable."""


@dataclass(frozen=True)
class EmbeddedImage:
    """Image embedded in a page as a data URI; `problem` explains a missing image."""

    uri: str | None = None
    width: int = 0
    height: int = 0
    problem: str = ""


def choose_examples(items: Sequence[Prediction], limit: int = 24) -> tuple[list[Prediction], list[Prediction]]:
    """Choose up to `limit` predictions, `(wrong, right)`, half of each if possible.

    Wrong predictions are the most confident ones; right predictions are evenly spaced over the split.
    """
    wrong = sorted((item for item in items if not item.is_right), key=lambda item: -item.probability)
    right = [item for item in items if item.is_right]
    n_wrong = min(len(wrong), max(limit // 2, limit - len(right)))
    n_right = min(len(right), limit - n_wrong)
    return wrong[:n_wrong], [right[i * len(right) // n_right] for i in range(n_right)]


def embed_image(index: int, images: ImageSource | None, max_side: int = 176) -> EmbeddedImage:
    """Load an image by its index and encode it; read errors are stored in `problem`."""
    try:
        image = None if images is None else images(index)
    except OSError as error:
        return EmbeddedImage(problem=f"cannot be read: {error}")
    return (
        EmbeddedImage(problem="image unavailable") if image is None else EmbeddedImage(*image_data_uri(image, max_side))
    )


def image_data_uri(image: Image.Image, max_side: int = 176) -> tuple[str, int, int]:
    """Return a base64 PNG of at most `max_side` pixels per side, with its width and height.

    Smaller images keep their size; the page enlarges them without smoothing.
    """
    image = image.convert("RGBA" if "A" in image.getbands() or "transparency" in image.info else "RGB")
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii"), image.width, image.height


def heat_maps(model: nn.Module, images: Tensor, outputs: Tensor) -> np.ndarray:
    """Return HiResCAM heat maps: gradient times activation at the last spatial layer.

    M[i, j] = max(0, Σ_c ∂y/∂A[c, i, j] · A[c, i, j])

    Unlike Grad-CAM, HiResCAM does not average gradients over the grid; averaging can highlight irrelevant regions.
    `A` is the last feature map of a convolutional network or a Swin. For a ViT, it is the input tokens of the last
    attention, after which only the class token matters.

    Args:
        model: Model from `build_method` or `load_trained` in evaluation mode, or a plain timm model.
        images: `[images, channels, height, width]`, transformed.
        outputs: Index of the output to explain for each image, `[images]`.

    Returns:
        `[images, height, width]`, float32 in [0, 1]; zeros if no region raises the output.

    Raises:
        ValueError: If the model has neither ViT blocks nor `feature_info`.
        ImportError: If Captum is not installed.

    Sources:
        Draelos and Carin, Use HiResCAM instead of Grad-CAM (arXiv 2011.08891); Selvaraju et al., Grad-CAM (arXiv
        1610.02391). Computed by Captum's `LayerGradientXActivation`.
    """
    try:
        from captum.attr import LayerGradientXActivation
    except ImportError as error:
        raise ImportError("heat maps need captum; pip install 'snella[explain]'") from error
    layer, width, patch = _target_layer(model)
    inputs = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        product = LayerGradientXActivation(model, layer).attribute(inputs, target=outputs.to(images.device))
    return _resized_heat(_summed_grid(product.detach().float(), width, patch, images.shape[-2:]).clamp_min(0), images)


@torch.no_grad()
def attention_rollout(model: nn.Module, images: Tensor) -> np.ndarray:
    """Return attention rollout maps of a ViT, independent of the class.

    R = Â_L … Â_1,   Â_l = (mean over heads of A_l + I) / 2

    The map is the mean of R over the rows that the head pools, restricted to the patch columns.

    Args:
        model: timm ViT in evaluation mode, plain or from `build_method` or `load_trained`.
        images: As for `heat_maps`.

    Returns:
        `[images, height, width]`, float32; each map is scaled to a minimum of 0 and a maximum of 1.

    Raises:
        ValueError: If the model is not a timm ViT or its method adds tokens (prompts).

    Sources:
        Abnar and Zuidema, Quantifying Attention Flow in Transformers (arXiv 2005.00928).
    """
    base, blocks, patch = _vit_parts(model)
    attentions: list[Any] = [getattr(block, "attn", None) for block in blocks]
    is_vit = all(hasattr(attention, "attn_drop") and hasattr(attention, "fused_attn") for attention in attentions)
    if patch is None or not attentions or not is_vit:
        raise ValueError(f"attention rollout needs a timm ViT, got {type(base).__name__}; use gradcam")
    rows, columns = images.shape[-2] // patch[0], images.shape[-1] // patch[1]
    rolled: list[Tensor] = []

    def roll(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        mean = inputs[0].float().mean(1)  # [images, tokens, tokens]
        step = (mean + torch.eye(mean.shape[-1], device=mean.device)) / 2
        rolled[:] = [step @ rolled[0] if rolled else step]

    were_fused = [attention.fused_attn for attention in attentions]
    handles = [attention.attn_drop.register_forward_pre_hook(roll) for attention in attentions]
    try:
        for attention in attentions:
            attention.fused_attn = False  # fused attention does not expose its weights
        model(images)
    finally:
        for attention, was_fused, handle in zip(attentions, were_fused, handles, strict=True):
            attention.fused_attn = was_fused
            handle.remove()
    extra = rolled[0].shape[-1] - rows * columns - base.num_prefix_tokens
    if extra:
        raise ValueError(
            f"attention rollout needs a model with patch tokens only, got {extra} prompt tokens from its method; use "
            "gradcam"
        )
    first = base.num_prefix_tokens
    pooled = rolled[0][:, :1] if base.global_pool == "token" else rolled[0][:, first:]
    grid = pooled.mean(1)[:, first:].reshape(-1, rows, columns)
    return _resized_heat(grid - grid.amin((1, 2), keepdim=True), images)


def _resized_heat(grid: Tensor, images: Tensor) -> np.ndarray:
    """Scale a nonnegative grid `[images, rows, columns]` to a maximum of 1 and resize it to the images."""
    peaks = grid.amax((1, 2), keepdim=True)
    shares = grid / torch.where(peaks > 0, peaks, torch.ones_like(peaks))
    sized = F.interpolate(shares[:, None], images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    return sized.clamp(0, 1).cpu().numpy()


def _vit_parts(model: nn.Module) -> tuple[Any, Sequence[Any], Any]:
    """Return the model without its PEFT wrapper, its blocks and its patch size (empty or None if absent)."""
    base: Any = base_model(model)
    return base, getattr(base, "blocks", None) or (), getattr(getattr(base, "patch_embed", None), "patch_size", None)


def _target_layer(model: nn.Module) -> tuple[nn.Module, int, tuple[int, int]]:
    """Return the target layer of heat maps, its channel count, and its patch size ((1, 1) for feature maps)."""
    base, blocks, patch = _vit_parts(model)
    if blocks and hasattr(blocks[-1], "norm1") and patch is not None:
        return blocks[-1].norm1, int(base.embed_dim), (int(patch[0]), int(patch[1]))
    info = getattr(base, "feature_info", None)
    if not info:
        raise ValueError(f"heat maps need a timm model with feature_info, got {type(base).__name__}")
    last = info[-1] if isinstance(info, list) else info.info[-1]
    return base.get_submodule(last["module"]), int(last["num_chs"]), (1, 1)


def _summed_grid(product: Tensor, width: int, patch: tuple[int, int], size: torch.Size) -> Tensor:
    """Sum channels-first or channels-last maps, or tokens, over channels: `[images, rows, columns]`."""
    if product.ndim == 4:
        return product.sum(1) if product.shape[1] == width else product.sum(-1)
    rows, columns = size[0] // patch[0], size[1] // patch[1]
    sums = product.sum(-1)
    return sums[:, sums.shape[1] - rows * columns :].reshape(-1, rows, columns)  # class and prompt tokens come first


def overlay_heat(image: Image.Image, heat: np.ndarray) -> Image.Image:
    """Overlay a heat map on an image; opacity increases with the value.

    Args:
        image: RGB.
        heat: `[height, width]` in [0, 1]; resized to the image.
    """
    from matplotlib import colormaps

    values = Image.fromarray((heat * 255).round().astype(np.uint8)).resize(image.size, Image.Resampling.BICUBIC)
    shares = np.asarray(values)[..., None] / 255
    colors = colormaps["inferno"](shares[..., 0])[..., :3] * 255
    opacity = _HEAT_OPACITY[0] + (_HEAT_OPACITY[1] - _HEAT_OPACITY[0]) * shares
    mixed = np.asarray(image.convert("RGB")) * (1 - opacity) + colors * opacity
    return Image.fromarray(mixed.round().astype(np.uint8))
