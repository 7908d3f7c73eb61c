"""Heat maps of timm models: gradient times activation for an output, and where a ViT attends, rolled out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

_OPACITY = (0.15, 0.65)


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
    return _sized(_grid(product.detach().float(), width, patch, images.shape[-2:]).clamp_min(0), images)


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
    return _sized(grid - grid.amin((1, 2), keepdim=True), images)


def _sized(grid: Tensor, images: Tensor) -> np.ndarray:
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


def _grid(product: Tensor, width: int, patch: tuple[int, int], size: torch.Size) -> Tensor:
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
    opacity = _OPACITY[0] + (_OPACITY[1] - _OPACITY[0]) * shares
    mixed = np.asarray(image.convert("RGB")) * (1 - opacity) + colors * opacity
    return Image.fromarray(mixed.round().astype(np.uint8))
