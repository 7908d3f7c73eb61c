"""Image transforms: timm's evaluation preprocessing, and augmentation for training."""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from snella_app.data.images import PILLOW_MODES

Augment = Literal["none", "flip", "crop", "crop-no-flip", "imagenet", "randaugment", "trivialaugment", "3augment"]
CropMode = Literal["center", "squash"]
_CROP_SCALES = {
    "imagenet": (0.08, 1.0),
    **dict.fromkeys(("crop", "crop-no-flip", "randaugment", "trivialaugment", "3augment"), (0.5, 1.0)),
}
"""Range of the fraction of the image area that a random crop keeps, by augmentation."""
_COLOR_JITTER = 0.4
_COLOR_JITTER_3AUGMENT = 0.3
_BLUR_KERNEL = 9
_BLUR_SIGMAS = (0.1, 2.0)


def build_transform(
    data_config: dict[str, Any], *, augment: Augment = "none", random_erasing: float = 0.0
) -> Callable[[Image.Image], Tensor]:
    """Build a model's evaluation transform as in timm, or a training transform with augmentation.

    Evaluation resizes the short side to `input_size / crop_pct` (both sides for `crop_mode="squash"`), center-crops,
    and normalizes to `(pixel / 255 - mean) / std`. Augmentation uses torch's default generator.

    Args:
        data_config: `timm.data.resolve_model_data_config(model)`, with `input_size`, `mean`, `std`, `interpolation`,
            `crop_pct` and `crop_mode`.
        augment: Augmentation for training:

            - "none": the evaluation transform
            - "flip": the evaluation transform, and horizontal flip with probability 0.5
            - "crop": random resized crop of 50 to 100% of the area, and flip
            - "crop-no-flip": "crop" without flip, e.g. for letters
            - "imagenet": random resized crop of 8 to 100% of the area, flip, and color jitter of 0.4 (brightness,
              contrast, saturation), as in ImageNet training and SNELLA's FGVC runs
            - "randaugment": "crop" and two random operations at magnitude 9 (Cubuk et al., arXiv 1909.13719)
            - "trivialaugment": "crop" and one operation at a random magnitude (Müller and Hutter, arXiv 2103.10158)
            - "3augment": "crop", color jitter, and one of grayscale, solarization and blur (DeiT III, arXiv 2204.07118)
        random_erasing: Probability of erasing a random rectangle as the last step (Zhong et al., arXiv 1708.04896).

    Returns:
        Picklable transform from an image to float32 `[channels, height, width]`, one channel per entry of `mean`.

    Raises:
        ValueError: If the augmentation, interpolation or crop mode is unknown, or `data_config` is incomplete.
        NotImplementedError: If the input is not square.
    """
    if augment not in get_args(Augment):
        raise ValueError(f"augment must be one of {', '.join(get_args(Augment))}, got {augment!r}")
    missing = [key for key in ("input_size", "mean", "std") if key not in data_config]
    if missing:
        raise ValueError(
            f"data_config must contain {', '.join(missing)}; use timm.data.resolve_model_data_config(model)"
        )
    *_, size, width = data_config["input_size"]
    if size != width:
        raise NotImplementedError(f"input_size must be square, got {[size, width]}; set the backbone's img_size")
    modes = [mode.value for mode in InterpolationMode]
    name = data_config.get("interpolation", "bicubic")
    if name not in modes:
        raise ValueError(f"interpolation must be one of {', '.join(modes)}, got {name!r}")
    interpolation = InterpolationMode(name)
    mode = data_config.get("crop_mode") or "center"
    if mode not in get_args(CropMode):
        raise ValueError(f"crop_mode must be one of {', '.join(get_args(CropMode))}, got {mode!r}")
    steps: list[Callable[[Any], Any]]
    if augment in _CROP_SCALES:
        scale = _CROP_SCALES[augment]
        steps = [v2.RandomResizedCrop(size, scale=scale, interpolation=interpolation, antialias=True)]
    else:
        resized_side = math.floor(size / (data_config.get("crop_pct") or 1.0))
        target = [resized_side, resized_side] if mode == "squash" else [resized_side]
        steps = [v2.Resize(target, interpolation=interpolation, antialias=True)]
        if mode != "squash" or resized_side != size:
            steps.append(v2.CenterCrop(size))
    if has_flips(augment):
        steps.append(v2.RandomHorizontalFlip())
    if augment == "imagenet":
        steps.append(v2.ColorJitter(_COLOR_JITTER, _COLOR_JITTER, _COLOR_JITTER))
    if augment == "randaugment":
        steps.append(v2.RandAugment(interpolation=InterpolationMode.BILINEAR))
    if augment == "trivialaugment":
        steps.append(v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR))
    if augment == "3augment":
        gray = v2.Grayscale(len(data_config["mean"]))
        choices = [gray, v2.RandomSolarize(128, p=1.0), v2.GaussianBlur(_BLUR_KERNEL, _BLUR_SIGMAS)]
        steps += [v2.RandomChoice(choices), v2.ColorJitter(*[_COLOR_JITTER_3AUGMENT] * 3)]
    mean = list(data_config["mean"])
    std = list(data_config["std"])
    steps += [
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        # in place, except for arrays, which may be cached and must not change
        v2.Normalize(mean, std, inplace=len(mean) in PILLOW_MODES),
    ]
    if random_erasing:
        steps.append(v2.RandomErasing(random_erasing))
    return v2.Compose(steps)


def has_flips(augment: str) -> bool:
    """Return whether an augmentation flips images horizontally."""
    return augment not in ("none", "crop-no-flip")
