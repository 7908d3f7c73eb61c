"""Segmentation models: a timm backbone with a light decoder, or SAM (the Segment Anything Model)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snella_app.backbones.create import SAM_PREFIX, create_backbone

DECODER = "decoder"
"""Name of the decoder module, which is always fully trained."""
_LEVELS = 4
"""Maximum number of layers that the decoder reads."""
_WIDTH = 128
"""Number of channels inside the decoder."""


class LightDecoder(nn.Module):
    """Decoder that maps feature maps of several layers to class scores at four times the first map's resolution.

    Each map is normalized (GroupNorm with one group), projected to 128 channels by a 1×1 convolution, and resized to
    the size of the first. The sum passes twice through 2× upsampling, a 3×3 convolution, GroupNorm, and GELU, and then
    through a 1×1 convolution to the classes. The decoder supports any batch size and image size.

    Args:
        channels: Number of channels of each map.
        num_classes: Number of classes, including background.
    """

    def __init__(self, channels: list[int], num_classes: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(1, count) for count in channels)
        self.projections = nn.ModuleList(nn.Conv2d(count, _WIDTH, 1) for count in channels)
        self.refine = nn.ModuleList(
            nn.Sequential(nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1), nn.GroupNorm(8, _WIDTH), nn.GELU()) for _ in range(2)
        )
        self.classify = nn.Conv2d(_WIDTH, num_classes, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Compute class scores `[batch, classes, 4h, 4w]` if the first map is `[batch, channels, h, w]`."""
        size = features[0].shape[-2:]
        # torch 2.13 crashes in GroupNorm's backward pass for channels-last inputs without gradient
        levels = zip(self.norms, self.projections, (level.contiguous() for level in features), strict=True)
        maps = [_resized(projection(norm(level)), size) for norm, projection, level in levels]
        x = torch.stack(maps).sum(0)
        for block in self.refine:
            x = block(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False))
        return self.classify(x)


class SegmentationModel(nn.Module):
    """A timm backbone and a decoder: `[batch, 3, H, W]` → class scores `[batch, classes, H, W]`.

    The decoder reads up to four evenly spaced layers, including the last.

    Args:
        encoder: timm model without a head, with `forward_intermediates`.
        num_classes: Number of classes, including background.

    Raises:
        NotImplementedError: If the encoder lacks `forward_intermediates` or `feature_info`.
    """

    def __init__(self, encoder: nn.Module, num_classes: int) -> None:
        super().__init__()
        info = getattr(encoder, "feature_info", None)
        if not callable(getattr(encoder, "forward_intermediates", None)) or not info:
            raise NotImplementedError(
                f"segmentation requires feature maps (forward_intermediates), got {type(encoder).__name__}; "
                "use a timm ViT, DINOv2, Swin or ConvNeXt"
            )
        self.encoder = encoder
        channels = [int(entry["num_chs"]) for entry in info]
        levels = min(_LEVELS, len(channels))
        # evenly spaced, including the last
        self.layers = [round((k + 1) * len(channels) / levels) - 1 for k in range(levels)]
        self.decoder = LightDecoder([channels[layer] for layer in self.layers], num_classes)
        # segmentation uses the whole image without cropping
        self.pretrained_cfg = {**dict(encoder.pretrained_cfg), "crop_pct": 1.0, "crop_mode": "squash"}  # type: ignore[arg-type]
        self.default_cfg = self.pretrained_cfg

    def forward(self, images: Tensor) -> Tensor:
        """Compute the class scores of every pixel."""
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
    """Build a backbone with a decoder.

    `name` is either a name for `create_backbone`, whose model gets a `LightDecoder`, or `sam:PATH` for a pre-trained
    SAM with its own decoder. For a SAM, `weights` is not allowed, and `pretrained` is ignored. All other arguments and
    errors are those of `create_backbone` and `create_sam_segmenter`.
    """
    if name.startswith(SAM_PREFIX):
        from snella_app.backbones.sam import create_sam_segmenter  # lazy: importing transformers' SAM is slow

        if weights is not None:
            raise ValueError(f"weights must be omitted for backbone {name!r}, which includes weights, got {weights!r}")
        return create_sam_segmenter(name.removeprefix(SAM_PREFIX), num_classes=num_classes, img_size=img_size)
    encoder = create_backbone(name, num_classes=0, weights=weights, pretrained=pretrained, img_size=img_size)
    return SegmentationModel(encoder, num_classes)


def _resized(x: Tensor, size: torch.Size) -> Tensor:
    """Resize a map bilinearly, or return it unchanged if it already has this size."""
    return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)
