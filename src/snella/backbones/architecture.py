"""Which network of timm a weight file alone belongs to."""

from snella.backbones.checkpoint import Checkpoint
from snella.backbones.convnext_shapes import infer_convnext, is_convnext
from snella.backbones.inferred import InferredArchitecture
from snella.backbones.swin_shapes import infer_swin, is_swin
from snella.backbones.vit_shapes import infer_vit

__all__ = ["infer_architecture"]


def infer_architecture(checkpoint: Checkpoint, *, source: str) -> InferredArchitecture:
    """Find timm's ViT, Swin or ConvNeXt by names and shapes, in timm's names or those of the authors.

    Args:
        checkpoint: What `read_checkpoint` returned.
        source: The file as the user typed it, for messages.

    Raises:
        ValueError: Another network, or a ViT that timm has no plain name for; the message says what was seen.
    """
    state = checkpoint.state
    if is_swin(state):
        return infer_swin(state)
    if is_convnext(state):
        return infer_convnext(state)
    return infer_vit(state, source=source, num_heads=checkpoint.num_heads)
