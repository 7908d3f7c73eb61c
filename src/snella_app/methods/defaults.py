"""Default methods and hyperparameters. Imports only the standard library, so that help is fast."""

from typing import Any

DEFAULT_METHOD = "snella"
"""Default method of `snella train`."""
RECIPE_METHOD = "snella"
"""Default method of `snella dreambooth` and `snella language`."""
PROBE_METHOD = "linear"
"""Linear probe: the baseline in reports, and the source of features of a frozen backbone."""
REFERENCE_METHOD = "lora"
"""Reference baseline in comparisons."""
MEMORY_METHODS = ("snella-{r}", "lora-{r}", "full")
"""Methods whose memory `snella inspect --backbone` predicts, where `{r}` stands for the rank."""
CHOICE_METHODS = ("linear", "bias", "lora-8", "snella-matched")
"""Candidates for `--method auto`."""

SPARSE_DEFAULTS: dict[str, Any] = {
    "lr": 5e-3,
    "scalar_lr": 1e-4,
    "head_lr": 1e-3,
    "weight_decay": 0.0,
    "r": 8,
    "target_sparsity": 0.7,
    "scaling": 10.0,
}
"""`Method.defaults` of `snella`, `snella-matched` and `snell`."""
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
"""Settings common to both presets, as in the authors' released scripts."""
TRAIN_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {**_SCRIPTS, "method_options": {"preset": "paper"}},
    "official": {**_SCRIPTS, "method_options": {"preset": "official"}},
}
"""Defaults of `TrainConfig` by `preset`. The SNELLA paper has no `scaling`, and gives no learning rates or epochs
for classification. The learning rates and epochs come from the authors' released scripts for VTAB-1k."""
PRESET_METHODS = ("snella", "snell")
"""Methods that accept a preset."""
SPARSE_RECIPES: dict[str, dict[str, Any]] = {
    # learning rate from section A.8 of arXiv 2510.24037; the paper has no scaling, but with 3.0, the size of the
    # update is within a factor of two of that of LoRA's update (docs/generation.md)
    "generation": {"lr": 1e-4, "scalar_lr": 1e-4, "r": 8, "target_sparsity": 0.7, "scaling": 3.0},
    "language": {"lr": 1e-3, "scalar_lr": 1e-4, "r": 8, "target_sparsity": 0.7, "scaling": 10.0},  # untuned
}
"""`Method.recipes` of SNELLA and SNELL."""
