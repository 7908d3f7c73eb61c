"""Hyper-parameters of each method, where the user gives none. The one place to change them."""

from typing import Any

METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "linear": {"lr": 3e-3, "head_lr": 3e-3, "weight_decay": 1e-4},
    "bias": {"lr": 1e-3, "head_lr": 1e-3, "weight_decay": 0.0},
    "full": {"lr": 5e-5, "head_lr": 1e-3, "weight_decay": 1e-2},
    "lora": {"lr": 1e-3, "head_lr": 1e-3, "weight_decay": 1e-4, "r": 8},
    "snella": {
        "lr": 5e-3,
        "scalar_lr": 1e-4,
        "head_lr": 1e-3,
        "weight_decay": 0.0,
        "r": 8,
        "target_sparsity": 0.7,
        "scaling": 10.0,
    },
    "snell": {
        "lr": 5e-3,
        "scalar_lr": 1e-4,
        "head_lr": 1e-3,
        "weight_decay": 0.0,
        "r": 8,
        "target_sparsity": 0.7,
        "scaling": 10.0,
    },
}
"""By family: optimiser settings (`lr` for factors or weights, `scalar_lr` for the kernels' scalars, `head_lr` for the
head, `weight_decay` for matrices) and options of the method. They are values for AdamW with warm-up and a cosine."""
