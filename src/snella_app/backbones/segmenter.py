"""A timm backbone with a light decoder on top: class scores for every pixel."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snella_app.backbones.create import SAM_PREFIX, create_backbone

DECODER = "decoder"
"""Name of the part of a segmentation model that is always trained in full."""
_LEVELS = 4
_WIDTH = 128
_GROUPS = 8


class LightDecoder(nn.Module):
    """From feature maps of a few layers to class scores on a grid four times as fine.

    Each map is normalized over its channels and projected to 128 ones by a 1×1 convolution; the sum goes twice through
    (enlarge by 2, 3×3 convolution, group normalization, GELU) and a 1×1 convolution to the classes. Nothing in it
    depends on the batch or on the image's size.

    Args:
        channels: Channels of each map.
        num_classes: Classes, the background included.
    """

    def __init__(self, channels: list[int], num_classes: int) -> None:
        super().__init__()
        width = _WIDTH
        self.norms = nn.ModuleList(nn.GroupNorm(1, count) for count in channels)
        self.projections = nn.ModuleList(nn.Conv2d(count, width, 1) for count in channels)
        self.refine = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(_GROUPS, width), nn.GELU())
            for _ in range(2)
        )
        self.classify = nn.Conv2d(width, num_classes, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Class scores `[batch, classes, 4h, 4w]` from maps `[batch, channels, h, w]`; coarser maps are enlarged."""
        size = features[0].shape[-2:]
        # torch 2.13 ends the process in GroupNorm's backward pass where a channels-last input needs no gradient
        levels = zip(self.norms, self.projections, (level.contiguous() for level in features), strict=True)
        maps = [_resized(projection(norm(level)), size) for norm, projection, level in levels]
        x = torch.stack(maps).sum(0)
        for block in self.refine:
            x = block(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False))
        return self.classify(x)


class SegmentationModel(nn.Module):
    """A timm backbone and a decoder: `[batch, 3, H, W]` → class scores `[batch, classes, H, W]`.

    The decoder sees up to four layers, evenly spaced and the last one among them.

    Args:
        encoder: A timm model without head that has `forward_intermediates`.
        num_classes: Classes, the background included.

    Raises:
        NotImplementedError: The model does not hand out its intermediate features.
    """

    def __init__(self, encoder: nn.Module, num_classes: int) -> None:
        super().__init__()
        info = getattr(encoder, "feature_info", None)
        if not callable(getattr(encoder, "forward_intermediates", None)) or not info:
            raise NotImplementedError(
                f"{type(encoder).__name__} does not hand out feature maps (forward_intermediates), which segmentation "
                "needs; timm's ViT, DINOv2, Swin and ConvNeXt models do"
            )
        self.encoder = encoder
        channels = [int(entry["num_chs"]) for entry in info]
        self.layers = _evenly_spaced(len(channels), _LEVELS)
        self.decoder = LightDecoder([channels[layer] for layer in self.layers], num_classes)
        # segmentation shows the whole image: nothing is cut off
        self.pretrained_cfg = {**dict(encoder.pretrained_cfg), "crop_pct": 1.0, "crop_mode": "squash"}  # type: ignore[arg-type]
        self.default_cfg = self.pretrained_cfg

    def forward(self, images: Tensor) -> Tensor:
        """Class scores of every pixel."""
        features = self.encoder.forward_intermediates(  # type: ignore[operator]
            images, indices=self.layers, norm=True, intermediates_only=True, output_fmt="NCHW"
        )
        return _resized(self.decoder(features), images.shape[-2:])


def create_segmenter(
    name: str,
    *,
    num_classes: int,
    weights: str | None = None,
    pretrained: bool = True,
    img_size: int | None = None,
) -> nn.Module:
    """Build a backbone with a decoder; raises as `create_backbone` and `create_sam_segmenter`.

    Args:
        name: As for `create_backbone`: a timm model, for which a `LightDecoder` is made. Or `sam:PATH`: a SAM with its
            own decoder, always with its weights.
        num_classes: Classes of a pixel, the background included.
        weights: As for `create_backbone`.
        pretrained: As for `create_backbone`.
        img_size: As for `create_backbone`.
    """
    if name.startswith(SAM_PREFIX):
        from snella_app.backbones.sam import create_sam_segmenter  # transformers' SAM takes a while to import

        if weights is not None:
            raise ValueError(f"weights={weights!r} given, but backbone {name!r} comes with weights of its own")
        return create_sam_segmenter(name.removeprefix(SAM_PREFIX), num_classes=num_classes, img_size=img_size)
    options: dict[str, Any] = {"weights": weights, "pretrained": pretrained, "img_size": img_size}
    return SegmentationModel(create_backbone(name, num_classes=0, **options), num_classes)


def _resized(x: Tensor, size: torch.Size) -> Tensor:
    """A map of another size, as it is where it has that size."""
    return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)


def _evenly_spaced(count: int, wanted: int) -> list[int]:
    """Up to `wanted` of `count` layers, the last one among them."""
    wanted = min(wanted, count)
    return [round((k + 1) * count / wanted) - 1 for k in range(wanted)]
