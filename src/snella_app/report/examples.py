"""Example images of a report: selection and encoding; what is laid over images: masks, and heat maps of timm models."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from snella_app.data.images import open_image
from snella_app.files import write_bytes
from snella_app.records import Prediction

_OPACITY = 0.45
_HEAT_OPACITY = (0.15, 0.65)
_TINTS = (0.0, 0.5, 0.75)
_GAP = 4
_LONGEST = 260


def mask_colors(count: int) -> np.ndarray:
    """Colors of `count` labels, `[count, 3]` uint8; black for the background, the same ones every time."""
    from matplotlib.colors import to_rgb

    from snella_app.report.style import COLORS, WARM  # matplotlib, which a classification does not wait for

    inks = np.array([to_rgb(ink) for ink in (WARM, *(color for color in COLORS if color != WARM))])
    labels = np.arange(max(count - 1, 0))
    lighter = np.array(_TINTS)[labels // len(inks) % len(_TINTS), None]  # where the inks are used up, tints of them
    colors = inks[labels % len(inks)] * (1 - lighter) + lighter
    return (np.concatenate([np.zeros((1, 3)), colors])[:count] * 255).round().astype(np.uint8)


def write_mask(labels: np.ndarray, path: Path) -> None:
    """Write labels `[height, width]` (uint8) as a palette PNG whose indices are the labels atomically."""
    image = Image.fromarray(labels.astype(np.uint8))
    image.putpalette(mask_colors(256).reshape(-1).tolist())
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    write_bytes(path, out.getvalue())


def read_mask(path: Path) -> Image.Image:
    """The palette PNG that `write_mask` wrote; its array holds the labels."""
    with open_image(path) as image:
        image.load()
        return image


def overlay(image: Image.Image, labels: np.ndarray) -> Image.Image:
    """Lay the colors of a mask over an image, with outlines; the background stays as it is.

    Args:
        image: RGB.
        labels: `[height, width]`, uint8; brought to the image's size by the nearest pixel.
    """
    sized = np.asarray(Image.fromarray(labels.astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST))
    pixels, colors = np.asarray(image.convert("RGB")).astype(float), mask_colors(256)[sized].astype(float)
    opacity = np.where(_outline(sized), 1.0, _OPACITY) * (sized > 0)
    mixed = pixels + opacity[..., None] * (colors - pixels)
    return Image.fromarray(mixed.round().astype(np.uint8))


def overlay_panels(image: Image.Image, masks: Sequence[np.ndarray]) -> Image.Image:
    """The image, and beside it the image under each of the masks; small pictures are enlarged, large ones shrunk."""
    scale = _LONGEST / max(image.size)
    size = (max(1, round(scale * image.width)), max(1, round(scale * image.height)))
    shown = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    panels = [shown, *(overlay(shown, mask) for mask in masks)]
    canvas = Image.new("RGBA", (len(panels) * (size[0] + _GAP) - _GAP, size[1]), (0, 0, 0, 0))
    for place, panel in enumerate(panels):
        canvas.paste(panel, (place * (size[0] + _GAP), 0))
    return canvas


def _outline(labels: np.ndarray) -> np.ndarray:
    """Pixels whose right or lower neighbor has another label."""
    edge = np.zeros(labels.shape, bool)
    edge[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    edge[:-1] |= labels[:-1] != labels[1:]
    return edge


ImageSource = Mapping[int, Image.Image | None] | Callable[[int], Image.Image | None]
"""Index of an image in its split → the picture, or None where there is none to show."""


@dataclass(frozen=True)
class Example:
    """One image with its prediction; without a picture, `problem` says why."""

    prediction: Prediction
    uri: str | None
    width: int
    height: int
    problem: str


def choose_examples(items: Sequence[Prediction], limit: int = 24) -> tuple[list[Prediction], list[Prediction]]:
    """Choose up to `limit` predictions: (wrong ones, right ones), half of each where there are as many.

    The wrong ones are those with the highest probability for the wrong class, the right ones are evenly spread over
    the split.
    """
    wrong = sorted((item for item in items if not item.is_right), key=lambda item: -item.probability)
    right = [item for item in items if item.is_right]
    n_wrong = min(len(wrong), max(limit // 2, limit - len(right)))
    n_right = min(len(right), limit - n_wrong)
    return wrong[:n_wrong], [right[i * len(right) // n_right] for i in range(n_right)]


def load_example(prediction: Prediction, images: ImageSource | None) -> Example:
    """Fetch the picture of a prediction; one that cannot be read is reported in its place, not raised."""
    return Example(prediction, *load_picture(prediction.index, images))


def load_picture(index: int, images: ImageSource | None, longest: int = 176) -> tuple[str | None, int, int, str]:
    """Fetch a picture: its URI, width and height, and, where there is none, the reason."""
    problem = "no picture"
    image = None
    try:
        if images is not None:
            image = images(index) if callable(images) else images.get(index)
        if image is not None:
            return *picture_uri(image, longest), ""
    except OSError as error:
        problem = f"cannot be read: {error}"
    return None, 0, 0, problem


def picture_uri(image: Image.Image, longest: int = 176) -> tuple[str, int, int]:
    """Return a picture as a base64 PNG of at most `longest` pixels a side, with its width and height.

    Small pictures keep their size; the page enlarges them without smoothing.
    """
    image = image.convert("RGBA" if "A" in image.getbands() or "transparency" in image.info else "RGB")
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii"), image.width, image.height


def heat_maps(model: nn.Module, images: Tensor, outputs: Tensor) -> np.ndarray:
    """The parts of images that raise an output: gradient times activation at the last layer with a grid.

    M[i, j] = max(0, Σ_c ∂y/∂A[c, i, j] · A[c, i, j])

    This is HiResCAM: Grad-CAM without the mean of the gradients over the grid, which can point at places that do not
    count. `A` is the last feature map of a convolutional network or a Swin, and the tokens that enter the last
    attention of a ViT (behind it only the class token counts).

    Args:
        model: From `build_method` or `load_trained`, of any method, in evaluation mode; or a plain timm model.
        images: `[images, channels, height, width]`, transformed.
        outputs: Index of the output to explain for each image, `[images]`.

    Returns:
        `[images, height, width]`, float32, each from 0 to 1; zeros where nothing speaks for the output.

    Raises:
        ValueError: A model without such a layer.
        ImportError: Captum is not installed.

    Sources:
        Draelos and Carin, Use HiResCAM instead of Grad-CAM (arXiv 2011.08891); Selvaraju et al., Grad-CAM (arXiv
        1610.02391). Computed by Captum's `LayerGradientXActivation`.
    """
    try:
        from captum.attr import LayerGradientXActivation
    except ImportError as error:
        raise ImportError("heat maps need captum; pip install 'snella[explain]'") from error
    layer, width, patch = explained_layer(model)
    wanted = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        product = LayerGradientXActivation(model, layer, multiply_by_inputs=True).attribute(
            wanted, target=outputs.to(images.device)
        )
    return _heat_of_size(_summed_grid(product.detach().float(), width, patch, images.shape[-2:]).clamp_min(0), images)


@torch.no_grad()
def attention_rollout(model: nn.Module, images: Tensor) -> np.ndarray:
    """Where the output of a ViT comes from through all its attentions, whatever the class.

    R = Â_L … Â_1,   Â_l = (mean over heads of A_l + I) / 2;   the rows of what the head pools, over the patches

    Args:
        model: A ViT of timm, from `build_method` or `load_trained` or plain, in evaluation mode.
        images: As for `heat_maps`.

    Returns:
        `[images, height, width]`, float32; the least of each is 0 and the most 1, so that what is common to all places
        does not hide the differences.

    Raises:
        ValueError: A model without such attentions, or with tokens of a method's own (prompts).

    Sources:
        Abnar and Zuidema, Quantifying Attention Flow in Transformers (arXiv 2005.00928).
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    blocks, patch = getattr(base, "blocks", None), getattr(getattr(base, "patch_embed", None), "patch_size", None)
    attentions: list[Any] = [getattr(block, "attn", None) for block in blocks or []]
    if (
        patch is None
        or not attentions
        or not all(hasattr(a, "attn_drop") and hasattr(a, "fused_attn") for a in attentions)
    ):
        raise ValueError(f"attention roll-out needs a ViT of timm, got {type(base).__name__}; take gradcam")
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
            attention.fused_attn = False  # the fused operation does not give its weights
        model(images)
    finally:
        for attention, was_fused, handle in zip(attentions, were_fused, handles, strict=True):
            attention.fused_attn = was_fused
            handle.remove()
    extra = rolled[0].shape[-1] - rows * columns - base.num_prefix_tokens
    if extra:
        raise ValueError(
            f"attention roll-out needs a model whose tokens are its patches', got {extra} prompts of its method; take "
            "gradcam"
        )
    first = base.num_prefix_tokens
    pooled = rolled[0][:, :1] if base.global_pool == "token" else rolled[0][:, first:]
    grid = pooled.mean(1)[:, first:].reshape(-1, rows, columns)
    return _heat_of_size(grid - grid.amin((1, 2), keepdim=True), images)


def _heat_of_size(grid: Tensor, images: Tensor) -> np.ndarray:
    """A grid of nonnegative values `[images, rows, columns]` at the size of the images, with a highest value of 1."""
    peaks = grid.amax((1, 2), keepdim=True)
    shares = grid / torch.where(peaks > 0, peaks, torch.ones_like(peaks))
    sized = F.interpolate(shares[:, None], images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    return sized.clamp(0, 1).cpu().numpy()


def explained_layer(model: nn.Module) -> tuple[nn.Module, int, tuple[int, int]]:
    """The layer that heat maps are taken at, its number of channels, and the size of its patches if it is of tokens.

    Args:
        model: As for `heat_maps`.

    Raises:
        ValueError: The model does not say where its features are, as timm's models do.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    blocks, patch = getattr(base, "blocks", None), getattr(getattr(base, "patch_embed", None), "patch_size", None)
    if blocks is not None and len(blocks) and hasattr(blocks[-1], "norm1") and patch is not None:
        return blocks[-1].norm1, int(base.embed_dim), (int(patch[0]), int(patch[1]))
    info = getattr(base, "feature_info", None)
    if not info:
        raise ValueError(
            f"a heat map needs a model that names its feature maps, as timm's do, got {type(base).__name__}"
        )
    last = info[-1] if isinstance(info, list) else info.info[-1]
    return base.get_submodule(last["module"]), int(last["num_chs"]), (1, 1)


def _summed_grid(product: Tensor, width: int, patch: tuple[int, int], size: torch.Size) -> Tensor:
    """The sum over channels, `[images, rows, columns]`, of a map in either order of dimensions, or of tokens."""
    if product.ndim == 4:
        return product.sum(1) if product.shape[1] == width else product.sum(-1)
    rows, columns = size[0] // patch[0], size[1] // patch[1]
    sums = product.sum(-1)
    return sums[:, sums.shape[1] - rows * columns :].reshape(-1, rows, columns)  # class tokens and prompts stand before


def overlay_heat(image: Image.Image, heat: np.ndarray) -> Image.Image:
    """An image under its heat map, from dark to bright colors; what counts little stays as it is.

    Args:
        image: RGB.
        heat: `[height, width]` from 0 to 1; brought to the image's size.
    """
    from matplotlib import colormaps

    values = Image.fromarray((heat * 255).round().astype(np.uint8)).resize(image.size, Image.Resampling.BICUBIC)
    shares = np.asarray(values)[..., None] / 255
    colors = colormaps["inferno"](shares[..., 0])[..., :3] * 255
    opacity = _HEAT_OPACITY[0] + (_HEAT_OPACITY[1] - _HEAT_OPACITY[0]) * shares
    mixed = np.asarray(image.convert("RGB")) * (1 - opacity) + colors * opacity
    return Image.fromarray(mixed.round().astype(np.uint8))
