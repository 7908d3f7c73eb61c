"""SAM without prompts: its image encoder to be adapted, its mask decoder to be trained in full."""

from pathlib import Path

import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from transformers import SamModel

from snella.backbones.sam_checkpoint import load_sam
from snella.backbones.segmenter import SAM_PREFIX

__all__ = ["SamMaskHead", "SamSegmenter", "create_sam_segmenter"]


class SamMaskHead(nn.Module):
    """SAM's mask decoder with nothing to prompt it: no point, no box, the embedding of "no mask" as the dense prompt.

    As in SAM-Adapter: decoder and dense embedding are learnt, the first of the mask tokens gives the mask.

    Args:
        sam: Where decoder, dense embedding and position encoding come from.
    """

    def __init__(self, sam: SamModel) -> None:
        super().__init__()
        self.masks = sam.mask_decoder  # no name that ends with "decoder": PEFT would wrap it a second time
        self.position_encoding = sam.shared_image_embedding
        self.no_mask = nn.Parameter(sam.prompt_encoder.no_mask_embed.weight.detach()[0].clone())

    def forward(self, embeddings: Tensor) -> Tensor:
        """Logits of the foreground `[batch, 1, 4h, 4w]` from image embeddings `[batch, channels, h, w]`."""
        batch, _, height, width = embeddings.shape
        dense = self.no_mask[None, :, None, None].expand(batch, -1, height, width)
        masks, _ = self.masks(
            image_embeddings=embeddings,
            image_positional_embeddings=self._positions(height, width, embeddings).expand(batch, -1, -1, -1),
            sparse_prompt_embeddings=None,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        return masks[:, 0]

    def _positions(self, height: int, width: int, like: Tensor) -> Tensor:
        """Encoded centres of the patches, `[1, channels, h, w]`."""
        y = (torch.arange(height, device=like.device, dtype=like.dtype) + 0.5) / height
        x = (torch.arange(width, device=like.device, dtype=like.dtype) + 0.5) / width
        centres = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # [h, w, 2], x first
        return self.position_encoding(centres).permute(2, 0, 1)[None]


class SamSegmenter(nn.Module):
    """`[batch, 3, S, S]` → scores of background (always 0) and foreground, `[batch, 2, S, S]`.

    With the background's score at 0, the softmax of both is the sigmoid of SAM's own logit.

    Args:
        sam: A SAM, taken apart.
        image_size: Side of its input in pixels.
    """

    def __init__(self, sam: SamModel, image_size: int) -> None:
        super().__init__()
        self.encoder = sam.vision_encoder
        self.decoder = SamMaskHead(sam)
        # as GPS's and SAM-Adapter's code prepares images: ImageNet's statistics, both sides resized
        self.pretrained_cfg = {
            "architecture": None,
            "input_size": (3, image_size, image_size),
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "squash",
        }
        self.default_cfg = self.pretrained_cfg

    def forward(self, images: Tensor) -> Tensor:
        """Scores of every pixel."""
        logits = self.decoder(self.encoder(images).last_hidden_state)
        logits = F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)
        return torch.cat([torch.zeros_like(logits), logits], dim=1)


def create_sam_segmenter(path: str, *, num_classes: int, img_size: int | None = None) -> nn.Module:
    """Build a segmentation model from SAM.

    Args:
        path: The authors' checkpoint, or a local folder in transformers' format; see `load_sam`.
        num_classes: Must be 2: background and foreground.
        img_size: Side of the input in pixels; the one of the weights (1024) if None.

    Raises:
        NotImplementedError: More than two classes.
        FileNotFoundError: There is no such file or folder.
        ValueError: Weights that are no SAM, or a size that its patches cannot tile.
    """
    if num_classes != 2:
        raise NotImplementedError(
            f"backbone {SAM_PREFIX}{path} gives one mask, of 2 classes, but the data has {num_classes}; a timm ViT as "
            "the backbone, with a decoder of its own, takes any number"
        )
    sam = load_sam(Path(path), image_size=img_size)
    return SamSegmenter(sam, next(iter(sam.vision_encoder.patch_embed.image_size)))
