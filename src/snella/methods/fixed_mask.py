"""`fixed-mask`: SNELLA's merged matrix on a mask that is selected before training."""

from collections.abc import Mapping
from typing import cast

from peft import PeftConfig
from torch import Tensor, nn

from snella.methods import spt
from snella.methods.calibration import loss_of, rank_entries, selection_data, squared_gradients
from snella.methods.method import Batches, Method, Options, check_by, number, whole_number
from snella.methods.peft_methods import inject, merge_adapter, own_fields
from snella.tuner.config import SnellaConfig
from snella.tuner.layer import SnellaLayer
from snella.tuner.optimizer import create_snella_optimizer

_OF_THE_SELECTION = ("budget", "calibration_batches")
_OF_THE_COMPETITION = {
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "fixed_support",
    "target_sparsity",
    "init_sparsity",
    "sparsify_mode",
    "update_dropout",
    "update_drop_path",
    "dropout_exclude",
    "zero_init_ema",
    "allocation",
    "schedule",
    "importance",
    "realloc_every",
    "beta1",
    "beta2",
    "min_layer_share",
    "cache_delta",
    "weight_gradient",
    "impl",
    "preset",
}


def _config(head: str, options: Options) -> PeftConfig:
    """SNELLA with a fixed support."""
    own = {name: value for name, value in options.items() if name not in _OF_THE_SELECTION}
    return SnellaConfig(modules_to_save=[head], fixed_support=True, **own)


def _build(model: nn.Module, head: str, options: Options, batches: Batches | None) -> nn.Module:
    """Measure the sensitivity, rank all weights of the matrices, and give each layer its share of the mask."""
    data, layers = selection_data(batches), spt.matrix_layers(model, head)
    budget = spt.budget_of(options, model, head)
    weights = [f"{name}.weight" for name in layers]
    total = sum(model.get_parameter(name).numel() for name in weights)
    if budget > total:
        raise ValueError(
            f"budget must be at most {total / 1e6:g} million, the weights of the adapted matrices, got {budget / 1e6:g}"
        )
    found = squared_gradients(model, weights, data, loss_of(data), options.get("calibration_batches", 8))
    owners, positions = rank_entries([found[name] for name in weights], budget)
    wrapped = inject(model, _config(head, {"target_modules": layers, **options}))
    adapted = wrapped.get_base_model()
    for k, name in enumerate(layers):
        cast(SnellaLayer, adapted.get_submodule(name)).set_support("default", positions[owners == k])
    return wrapped


def _restore(model: nn.Module, head: str, options: Options, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The same structure, its mask still to be loaded."""
    return inject(model, _config(head, {"target_modules": spt.matrix_layers(model, head), **options}))


FIXED_MASK = Method(
    "SNELLA's merged matrix at the most sensitive weights, chosen before training",
    "SNELLA, Shen et al., arXiv 2510.24037, Table XVII; the mask is SPT's, He et al., arXiv 2303.08566",
    _build,
    (*(name for name in own_fields(SnellaConfig) if name not in _OF_THE_COMPETITION), *_OF_THE_SELECTION),
    suffix="r",
    check=check_by({"budget": number(1e-6), "calibration_batches": whole_number()}),
    config=_config,
    needs_batches=True,
    restore=_restore,
    merge=merge_adapter,
    defaults={"lr": 1e-3, "scalar_lr": 1e-4, "head_lr": 1e-3, "weight_decay": 0.0, "r": 8},
    optimizer=create_snella_optimizer,
)
"""Trains the factors and scalars of SNELLA and the head; the update is

    S[i, j] = scaling · ΔW[i, j]   where (i, j) is among the `budget` million weights of largest Σ_batches (∂loss/∂w)²

over all adapted matrices together, and 0 elsewhere: the paper's "pre-defined" row of Table XVII. Its kernels are
`kernel=p_linear` and `mix_k` (default). The paper does not give the size of its mask; the default is SPT's, 0.4 on a
ViT-B/16 and in proportion elsewhere. `ΔW` is not zero at the start (about 1/m with mix_k, m the outputs of the matrix),
so neither is `S`. The mask is saved with the adapter, a bit a weight.
"""
