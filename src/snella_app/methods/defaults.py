"""Methods with a part of their own in other packages, and what help says of the default one, without any library."""

from typing import Any

DEFAULT_METHOD = "snella"
"""What `snella train` trains where no method is given."""
RECIPE_METHOD = "snella"
"""The same of `snella dreambooth` and `snella instruct`."""
PROBE_METHOD = "linear"
"""The linear probe: the yardstick of reports, and the features of a frozen backbone."""
REFERENCE_METHOD = "lora"
"""The method that a comparison's others are compared to."""
MEMORY_METHODS = ("snella-{r}", "lora-{r}", "full")
"""Whose memory `snella inspect --backbone` predicts, for ranks of `r`."""
CHOICE_METHODS = ("linear", "bias", "lora-8", "snella-matched")
"""What `--method auto` chooses among."""

SPARSE_DEFAULTS: dict[str, Any] = {
    "lr": 5e-3,
    "scalar_lr": 1e-4,
    "head_lr": 1e-3,
    "weight_decay": 0.0,
    "r": 8,
    "target_sparsity": 0.7,
    "scaling": 10.0,
}
"""`Method.defaults` of SNELLA and its variants."""
_SCRIPTS: dict[str, Any] = {
    "scaling": 1.0,
    "lr": 1e-3,
    "scalar_lr": 1e-3,
    "head_lr": 1e-3,
    "min_lr": 1e-5,
    "max_grad_norm": 0.0,
    "epochs": 100,
    "augment": "none",
    "head_init": "random",
    "final_head": "trained",
}
TRAIN_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {**_SCRIPTS, "method_options": {"preset": "paper"}},
    "official": {**_SCRIPTS, "method_options": {"preset": "official"}},
}
"""Defaults of `TrainConfig` by its `preset`. The paper has no `scaling`, and prints no learning rates or epochs for
classification; those are of its authors' released scripts for VTAB-1k."""
PRESET_METHODS = ("snella", "snell")
"""Methods that a preset is for."""
SPARSE_RECIPES: dict[str, dict[str, Any]] = {
    # the rate is the paper's (section A.8 of arXiv 2510.24037), which has no scaling; this one keeps the update of 500
    # steps near the size of LoRA's, as measured for SNELLA on a block of the real width (docs/generation.md)
    "generation": {"lr": 1e-4, "scalar_lr": 1e-4, "r": 8, "target_sparsity": 0.7, "scaling": 3.0},
    "language": {"lr": 1e-3, "scalar_lr": 1e-4, "r": 8, "target_sparsity": 0.7, "scaling": 10.0},  # untuned
}
"""`Method.recipes` of SNELLA and SNELL."""


def shown_defaults(purpose: str) -> dict[str, Any]:
    """What the default method of a kind of run takes where nothing is given, for help.

    Args:
        purpose: As `RunSettings.purpose`; empty for `snella train`.
    """
    return SPARSE_RECIPES[purpose] if purpose else SPARSE_DEFAULTS
