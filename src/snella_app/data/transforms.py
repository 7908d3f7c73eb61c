"""Image transforms: timm's evaluation preprocessing, with or without augmentation."""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

Augment = Literal["none", "flip", "crop", "crop-no-flip", "imagenet", "randaugment", "trivialaugment", "3augment"]
CropMode = Literal["center", "squash"]
_CROP_SCALES = {
    "imagenet": (0.08, 1.0),
    **dict.fromkeys(("crop", "crop-no-flip", "randaugment", "trivialaugment", "3augment"), (0.5, 1.0)),
}
_COLOR_JITTER, _COLOR_JITTER_3AUGMENT = 0.4, 0.3
_BLUR_KERNEL, _BLUR_SIGMAS = 9, (0.1, 2.0)
_INTERPOLATIONS = {
    "nearest": InterpolationMode.NEAREST,
    "bilinear": InterpolationMode.BILINEAR,
    "bicubic": InterpolationMode.BICUBIC,
    "lanczos": InterpolationMode.LANCZOS,
}


def build_transform(
    data_config: dict[str, Any], *, train: bool, augment: Augment, random_erasing: float = 0.0
) -> Callable[[Image.Image], Tensor]:
    """Build timm's evaluation transform for a model, or one with augmentation for training.

    Evaluation: the short side is resized to `input_size / crop_pct` (both sides with `crop_mode="squash"`), the center
    is cut out, values become `(pixel / 255 - mean) / std`. Everything random draws from torch's generator.

    Args:
        data_config: `timm.data.resolve_model_data_config(model)`; read are `input_size`, `mean`, `std`,
            `interpolation`, `crop_pct` and `crop_mode`.
        train: False leaves augmentation out, whatever `augment` says.
        augment: "none", "flip" (evaluation and a flip left to right in half of the cases) or "crop" (a random part of
            50 to 100 % of the area, and the flip), "crop-no-flip" (without the flip, for letters and other images that
            a flip changes) or "imagenet" (8 to 100 % of the area, the flip, and brightness,
            contrast and saturation changed by up to 40 %, as ImageNet's models and the authors' runs on FGVC have it).
            To what "crop" does are added: in "randaugment" two random operations of colors or geometry at magnitude 9
            (Cubuk et al., arXiv 1909.13719), in "trivialaugment" one at a random magnitude (Müller and Hutter, arXiv
            2103.10158), in "3augment" grayscale, solarization or blur, and changed colors (DeiT III, arXiv 2204.07118).
        random_erasing: Probability that a random rectangle becomes 0, after all else (Zhong et al., arXiv 1708.04896).

    Returns:
        From image to float32 `[channels, height, width]`, as many as `mean` has; picklable.

    Raises:
        ValueError: An unknown augmentation, interpolation or crop mode, or an incomplete configuration.
        NotImplementedError: An input that is not square.
    """
    if augment not in get_args(Augment):
        raise ValueError(f"augment must be one of {', '.join(get_args(Augment))}, got {augment!r}")
    size, interpolation = _size(data_config), _interpolation(data_config)
    steps: list[Callable[[Any], Any]]
    if train and augment in _CROP_SCALES:
        scale = _CROP_SCALES[augment]
        steps = [v2.RandomResizedCrop(size, scale=scale, interpolation=interpolation, antialias=True)]
    else:
        steps = _resize_and_cut(data_config, size, interpolation)
    if train and has_flips(augment):
        steps.append(v2.RandomHorizontalFlip())
    if train and augment == "imagenet":
        steps.append(v2.ColorJitter(_COLOR_JITTER, _COLOR_JITTER, _COLOR_JITTER))
    if train and augment == "randaugment":
        steps.append(v2.RandAugment(interpolation=InterpolationMode.BILINEAR))
    if train and augment == "trivialaugment":
        steps.append(v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR))
    if train and augment == "3augment":
        choices = [v2.Grayscale(3), v2.RandomSolarize(128, p=1.0), v2.GaussianBlur(_BLUR_KERNEL, _BLUR_SIGMAS)]
        steps += [v2.RandomChoice(choices), v2.ColorJitter(*[_COLOR_JITTER_3AUGMENT] * 3)]
    steps += [
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(list(data_config["mean"]), list(data_config["std"]), inplace=True),
    ]
    if train and random_erasing:
        steps.append(v2.RandomErasing(random_erasing))
    return v2.Compose(steps)


def has_flips(augment: str) -> bool:
    """Whether an augmentation flips images left to right."""
    return augment not in ("none", "crop-no-flip")


def _resize_and_cut(config: dict[str, Any], size: int, interpolation: InterpolationMode) -> list[Callable[[Any], Any]]:
    """The geometry of evaluation."""
    mode = config.get("crop_mode") or "center"
    if mode not in get_args(CropMode):
        raise ValueError(f"crop_mode must be one of {', '.join(get_args(CropMode))}, got {mode!r}")
    scaled = math.floor(size / (config.get("crop_pct") or 1.0))
    target = [scaled, scaled] if mode == "squash" else [scaled]
    resize = v2.Resize(target, interpolation=interpolation, antialias=True)
    return [resize] if mode == "squash" and scaled == size else [resize, v2.CenterCrop(size)]


def _size(config: dict[str, Any]) -> int:
    """Side of the square input."""
    missing = [key for key in ("input_size", "mean", "std") if key not in config]
    if missing:
        raise ValueError(f"data_config lacks {', '.join(missing)}; timm.data.resolve_model_data_config(model) has them")
    *_, height, width = config["input_size"]
    if height != width:
        raise NotImplementedError(f"input_size must be square, got {[height, width]}; give the backbone an img_size")
    return height


def _interpolation(config: dict[str, Any]) -> InterpolationMode:
    """Torchvision's constant for timm's word."""
    word = config.get("interpolation", "bicubic")
    if word not in _INTERPOLATIONS:
        raise ValueError(f"interpolation must be one of {', '.join(_INTERPOLATIONS)}, got {word!r}")
    return _INTERPOLATIONS[word]
