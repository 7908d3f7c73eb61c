"""Methods implemented as PEFT adapters, which wrap the adapted layers of a model."""

import dataclasses
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import peft
import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.optim import Optimizer

from snella.config import SnellaConfig
from snella.optimizer import create_snella_optimizer, store_in_state, unwrap
from snella.targets import block_number
from snella_app.methods.defaults import SPARSE_DEFAULTS, SPARSE_RECIPES
from snella_app.methods.method import Batches, Method, Options
from snella_app.methods.model_parts import adaptable_layers, freeze_running_statistics, is_inside, standardizes_weight
from snella_app.text import listed

Targets = Callable[[nn.Module, str], list[str] | str]
"""`(model, head) -> names or regular expression`: default target modules."""

# patterns of warnings about intended behavior
_HARMLESS = (
    # random projections are recomputed from the saved seed
    "Specified to not save",
    "Specified to not load",
    # `inject` rejects factors that BOFT would change to 1
    "Failed to load the CUDA extension",
    "Setting boft_n_butterfly_factor to 1",
    # LayerNorm and its subclasses are copied and trained despite the warning
    "Unsupported layer type .*LayerNorm",
)


def peft_method(
    summary: str,
    source: str,
    config: Callable[[str, Options], PeftConfig],
    options: tuple[str, ...],
    *,
    suffix: str | None = None,
    targets: Targets = adaptable_layers,
    **fields: Any,
) -> Method:
    """Create the `Method` of a PEFT adapter.

    `targets` selects the target modules if `target_modules` is not among the options. All other arguments are fields of
    `Method`.
    """

    def build(model: nn.Module, head: str, options: Options, batches: Batches | None) -> nn.Module:
        resolved = options
        if "target_modules" not in options:
            resolved = {"target_modules": targets(model, head), **options}
        peft_config: Any = config(head, resolved)
        if getattr(peft_config, "layers_to_transform", None) not in (None, []):
            _resolve_layers(peft_config, model)
        return inject(model, peft_config)

    return Method(summary, source, build, options, suffix=suffix, config=config, merge=merge_adapter, **fields)


def _resolve_layers(config: Any, model: nn.Module) -> None:
    """Check `layers_to_transform`, the indices of the blocks to adapt.

    For adapters other than SNELLA's, the option is replaced: `target_modules` is reduced to the modules in these
    blocks, because PEFT ignores `layers_to_transform` for full module names. Without `layers_pattern`, PEFT also finds
    no block index in names without a prefix, such as `blocks.0.attn.qkv`. A block's index is the first number after
    `layers_pattern` or, without a pattern, the first number in its name (in Swin, the stage).
    """
    layers = config.layers_to_transform
    blocks = {layers} if isinstance(layers, int) else set(layers)
    numbers = {name: block_number(f"{name}.", config.layers_pattern) for name, _ in model.named_modules()}
    indices = sorted({number for number in numbers.values() if number is not None})
    if config.layers_pattern and not indices:
        raise ValueError(f"layers_pattern must name a list of blocks of the model, got {config.layers_pattern!r}")
    if unknown := blocks - set(indices):
        known = f"indices from 0 to {indices[-1]}" if indices else "omitted for a model without numbered blocks"
        raise ValueError(f"layers_to_transform must be {known}, got {', '.join(map(str, sorted(unknown)))}")
    targets = config.target_modules
    if not isinstance(config, SnellaConfig):
        if targets is None or isinstance(targets, str):  # PEFT would ignore the option
            raise ValueError(f"target_modules must be a list with layers_to_transform, got {targets!r}")
        suffixes = tuple(f".{target}" for target in targets)
        config.target_modules = {
            name for name, number in numbers.items() if number in blocks and f".{name}".endswith(suffixes)
        }
        config.layers_to_transform = config.layers_pattern = None


def inject(model: nn.Module, config: PeftConfig) -> PeftModel:
    """Inject a PEFT adapter into a model and freeze the model's running statistics.

    Raises:
        ValueError: If PEFT cannot adapt a target module, or would replace BOFT's `boft_n_butterfly_factor` with 1.
        TypeError, NotImplementedError: If `SnellaModel` does not support a target module.
    """
    freeze_running_statistics(model)
    invariants = torch.sparse.check_sparse_tensor_invariants
    if str(getattr(config.peft_type, "value", config.peft_type)) == "SHIRA" and not invariants.is_enabled():
        invariants.disable()  # PEFT's indices are valid; this call prevents torch's warning
    with without_harmless_warnings():
        adapted = get_peft_model(model, config)
    factor = getattr(config, "boft_n_butterfly_factor", 1)
    if factor != 1 and any(getattr(module, "fbd_cuda_available", None) is False for module in adapted.modules()):
        raise ValueError(f"boft_n_butterfly_factor must be 1 if BOFT's CUDA extension is not available, got {factor}")
    return adapted


def check_gradients(model: nn.Module, method: str) -> None:
    """Check after a backward pass that all layers with a PEFT adapter other than SNELLA's have gradients.

    Some timm models (BEiT, EVA, Swin V2) read a layer's weight instead of calling the layer, bypassing the adapter.

    Raises:
        ValueError: If the adapter of a layer has no gradient.
    """
    if not isinstance(model, PeftModel) or isinstance(model.peft_config["default"], SnellaConfig):
        return
    unused: list[str] = []
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and _lacks_gradient(layer):
            unused.append(name.removeprefix("base_model.model."))
    if unused:
        raise ValueError(
            f"{method} has no effect on {listed(unused)}, which got no gradient: the model does not call these layers, "
            "although it may read their weights; use snella, or list other layers in target_modules"
        )


def _lacks_gradient(layer: BaseTunerLayer) -> bool:
    """Return whether any trainable adapter parameter of the layer has no gradient."""
    for attribute in layer.adapter_layer_names:
        module = getattr(layer, attribute, None)
        if not isinstance(module, nn.Module):
            continue
        if any(parameter.requires_grad and parameter.grad is None for parameter in module.parameters()):
            return True
    return False


@contextmanager
def without_harmless_warnings() -> Iterator[None]:
    """Suppress PEFT warnings about intended behavior."""
    with warnings.catch_warnings():
        for message in _HARMLESS:
            warnings.filterwarnings("ignore", message)
        yield


def merge_adapter(model: Any) -> nn.Module:
    """Merge the adapter of a `PeftModel` into the weights and return the backbone.

    Raises:
        ValueError: If an adapted layer standardizes its weight, because the merged update would be standardized, too.
    """
    inner: nn.Module = model.base_model.model
    layers = [
        (name, module.get_base_layer()) for name, module in inner.named_modules() if isinstance(module, BaseTunerLayer)
    ]
    if standardized := [repr(name) for name, base in layers if standardizes_weight(base)]:
        raise ValueError(
            f"the adapter cannot be merged into {type(inner).__name__}: the forward pass standardizes the weights of "
            f"{listed(standardized, 1)}; keep the adapter and load it with load_trained"
        )
    for name, module in list(inner.named_modules()):
        # PEFT's LN tuning leaves the head wrapped; callers expect a plain layer
        if isinstance(module, ModulesToSaveWrapper):
            inner.set_submodule(name, module.modules_to_save[module.active_adapters[0]])
    merged: nn.Module = model.merge_and_unload()
    return merged


def _config_fields(config: type[PeftConfig]) -> tuple[str, ...]:
    """Return the names of the init fields that a configuration adds to `PeftConfig`, except `modules_to_save`."""
    base = {f.name for f in dataclasses.fields(PeftConfig)} | {"modules_to_save"}
    return tuple(f.name for f in dataclasses.fields(config) if f.name not in base and f.init)


_SNELLA_OPTIONS = _config_fields(SnellaConfig)
_SPARSITY_OPTIONS = (
    *("target_sparsity", "init_sparsity", "sparsify_mode", "allocation", "schedule", "schedule_end", "importance"),
    *("realloc_every", "beta1", "beta2", "min_layer_share", "zero_init_ema"),
)


def _snella_config(head: str, options: Options, **defaults: Any) -> PeftConfig:
    """Return the SNELLA configuration with a trainable head. `defaults` are the options that define a variant."""
    return SnellaConfig(modules_to_save=[head] if head else None, **{**defaults, **options})


SNELLA = peft_method(
    "sparse high-rank updates with competition-based budgets",
    "SNELLA, Shen et al., arXiv 2510.24037",
    _snella_config,
    _SNELLA_OPTIONS,
    suffix="r",
    defaults=SPARSE_DEFAULTS,
    recipes=SPARSE_RECIPES,
    has_budgets=True,
    optimizer=create_snella_optimizer,
)
"""SNELLA: trains the factors `A` and `B` and the scalars of every adapted matrix, and the head.

    W = W0 + scaling · S    S[i, j] = ΔW[i, j] · max(|ΔW[i, j]| − t, 0)    ΔW[i, j] = κ(A[j], B[i])

The kernel κ is Mix-K by default. The threshold `t` keeps as many entries as the matrix's budget allows. See
docs/method.md.
"""

SNELLA_MATCHED = peft_method(
    "SNELLA with update steps scaled to the weight magnitude",
    "SNELLA, Shen et al., arXiv 2510.24037; the matched preset is an extension of this package",
    partial(_snella_config, preset="matched"),
    _SNELLA_OPTIONS,
    suffix="r",
    defaults=SPARSE_DEFAULTS,
    has_budgets=True,
    optimizer=create_snella_optimizer,
)
"""SNELLA with the setting `preset="matched"` of `SnellaConfig`.

An optimizer step changes `scaling·S` by about the learning rate times the magnitude of `W0`. The budget reaches its
target after 70% of training. See docs/method.md.
"""

SNELL = peft_method(
    "sparse updates with uniform sparsity",
    "SNELL, Shen et al., arXiv 2411.01800",
    partial(_snella_config, kernel="p_linear", allocation="uniform"),
    tuple(option for option in _SNELLA_OPTIONS if option not in ("kernel", "allocation")),
    suffix="r",
    defaults=SPARSE_DEFAULTS,
    recipes=SPARSE_RECIPES,
    has_budgets=True,
    optimizer=create_snella_optimizer,
)
"""SNELLA with κ = P-Linear, `ΔW[i, j] = Σ_p α_p ‖A[j, piece p] − B[i, piece p]‖`, and uniform sparsity."""

KLORA = peft_method(
    "dense high-rank kernel updates",
    "kernelized LoRA (KLoRA) of SNELLA, Shen et al., arXiv 2510.24037, Tables VII to IX",
    partial(_snella_config, sparsify_mode="none", target_sparsity=0.0),
    tuple(option for option in _SNELLA_OPTIONS if option not in _SPARSITY_OPTIONS),
    suffix="r",
    defaults={"lr": 2e-3, "scalar_lr": 1e-4, "head_lr": 1e-3, "weight_decay": 0.0, "r": 8},
    optimizer=create_snella_optimizer,
)
"""Kernelized LoRA: SNELLA's parameters with a dense update, `W = W0 + scaling · ΔW`, `ΔW[i, j] = κ(A[j], B[i])`.

`kernel` is mix_k (default), p_linear, rbf, …, or linear, which is LoRA with two random factors. `ΔW` is not zero at
initialization: with mix_k, its entries are about 1/m for a matrix with m outputs.
"""


_LORA_OPTIONS = (
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_rslora", "use_dora", "bias"),
)


def _lora_config(head: str, options: Options, **defaults: Any) -> PeftConfig:
    """Return the LoRA configuration: W = W0 + s B A.

    s = lora_alpha / r, or lora_alpha / √r with `use_rslora`; `lora_alpha` is r by default. `use_dora` gives DoRA:
    W = m ⊙ (W0 + s B A) / ‖W0 + s B A‖ with row norms; m starts as ‖W0‖.
    """
    rank = options.get("r", 8)
    return LoraConfig(modules_to_save=[head] if head else None, **{"r": 8, "lora_alpha": rank, **defaults, **options})


_LOW_RANK: dict[str, Any] = {"weight_decay": 1e-4, "r": 8}
_LORA_RECIPES: dict[str, dict[str, Any]] = {
    "generation": {"lr": 1e-4, "r": 8},  # learning rate of the SNELLA paper
    "language": {"lr": 3e-4, "r": 8},  # learning rate of LLM-Adapters' LoRA examples
}

LORA = peft_method(
    "low-rank updates",
    "LoRA, Hu et al., arXiv 2106.09685; PEFT's implementation",
    _lora_config,
    _LORA_OPTIONS,
    suffix="r",
    defaults=_LOW_RANK,
    recipes=_LORA_RECIPES,
)
DORA = peft_method(
    "low-rank updates of the direction and one magnitude per output",
    "DoRA, Liu et al., arXiv 2402.09353; PEFT's implementation",
    partial(_lora_config, use_dora=True),
    tuple(option for option in _LORA_OPTIONS if option != "use_dora"),
    suffix="r",
    defaults=_LOW_RANK,
    recipes=_LORA_RECIPES,
)


_STATE_KEY = "adalora_ranks"
_WARMUP_SHARE = 0.1  # default of `tinit`, relative to all steps
_FINAL_SHARE = 0.5  # default of `tfinal`, relative to all steps
_ADALORA_OPTIONS = (
    *("r", "init_r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules"),
    *("tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight"),
)


class RankSchedule:
    """Rank schedule of AdaLoRA, which calls PEFT's `update_and_allocate` after each optimizer step.

    Ranks stay at `init_r` for `tinit` steps, decrease cubically to a mean of `r`, and stay constant for the last
    `tfinal` steps. If `tinit` and `tfinal` are 0 (the default), they become 10% and 50% of all steps. The allocator
    state is saved with the optimizer state, so that a resumed run continues exactly.

    Args:
        model: Model with an AdaLoRA adapter.
        total_steps: Total number of optimizer steps.

    Attributes:
        step: Number of completed steps.

    Raises:
        TypeError: If the model has no AdaLoRA adapter.
        ValueError: If `tinit + tfinal` is not less than `total_steps`.
    """

    def __init__(self, model: nn.Module, total_steps: int) -> None:
        if not isinstance(model, PeftModel) or not isinstance(model.base_model, AdaLoraModel):
            actual = model.base_model if isinstance(model, PeftModel) else model
            raise TypeError(f"model must have an AdaLoRA adapter, got {type(actual).__name__}")
        self.tuner: AdaLoraModel = model.base_model
        self.config: AdaLoraConfig = self.tuner.peft_config[self.tuner.trainable_adapter_name]  # type: ignore[assignment]
        self.step = 0
        if self.config.tinit == 0 and self.config.tfinal == 0:
            self.config.tinit = min(round(_WARMUP_SHARE * total_steps), total_steps - 1)
            self.config.tfinal = min(max(1, round(_FINAL_SHARE * total_steps)), total_steps - 1 - self.config.tinit)
        self.config.total_step = total_steps
        if self.config.tinit + self.config.tfinal >= total_steps:
            raise ValueError(
                f"tinit + tfinal must be less than the {total_steps} steps of the run, got {self.config.tinit} + "
                f"{self.config.tfinal}; train longer or lower them"
            )

    def attach(self, optimizer: Optimizer) -> Self:
        """Register hooks on the optimizer that step the schedule and save its state.

        If Accelerate wraps the optimizer, the hooks are registered on the inner optimizer.
        """
        optimizer = unwrap(optimizer)
        optimizer.register_step_post_hook(self._after_step)
        store_in_state(optimizer, _STATE_KEY, self.state_dict, self.load_state_dict)
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the schedule and the allocator."""
        allocator = self.tuner.rankallocator
        return {
            "step": self.step,
            "rank_pattern": self.config.rank_pattern,
            "sensitivity": dict(allocator.exp_avg_ipt),
            "uncertainty": dict(allocator.exp_avg_unc),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of the schedule and the allocator."""
        allocator = self.tuner.rankallocator
        self.step = state["step"]
        self.config.rank_pattern = state["rank_pattern"]
        devices = {name: parameter.device for name, parameter in self.tuner.model.named_parameters()}
        allocator.exp_avg_ipt = {name: value.to(devices[name]) for name, value in state["sensitivity"].items()}
        allocator.exp_avg_unc = {name: value.to(devices[name]) for name, value in state["uncertainty"].items()}
        allocator.ipt = {name: torch.zeros_like(value) for name, value in allocator.exp_avg_ipt.items()}

    def _after_step(self, *_: Any) -> None:
        """Update the ranks after an optimizer step (step post-hook)."""
        self.tuner.update_and_allocate(self.step)
        self.step += 1


@contextmanager
def full_size_factors(config: PeftConfig) -> Iterator[None]:
    """Make PEFT save and load AdaLoRA factors at full size, with zeros for pruned ranks."""
    if not isinstance(config, AdaLoraConfig):
        yield
        return
    pattern = config.rank_pattern
    config.rank_pattern = None
    try:
        yield
    finally:
        config.rank_pattern = pattern


def orthogonality(model: nn.Module) -> Tensor:
    """Compute AdaLoRA's orthogonality penalty, a term of its training loss.

    orth_reg_weight · mean over all factors of ‖A Aᵀ − I‖_F and ‖Bᵀ B − I‖_F
    """
    tuner: AdaLoraModel = model.base_model  # type: ignore[assignment]
    adapter = tuner.trainable_adapter_name
    config: AdaLoraConfig = tuner.peft_config[adapter]  # type: ignore[assignment]
    norms = []
    for name, parameter in tuner.model.named_parameters():
        if name.endswith((f"lora_A.{adapter}", f"lora_B.{adapter}")):
            gram = parameter @ parameter.T if "lora_A" in name else parameter.T @ parameter
            norms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device, dtype=gram.dtype)))
    return config.orth_reg_weight * torch.stack(norms).mean()


def _adalora_config(head: str, options: Options) -> PeftConfig:
    """Return the AdaLoRA configuration, W = W0 + (lora_alpha / init_r) B diag(E) A. `r` is the final mean rank."""
    r = options.get("r", 8)
    values = {key: value for key, value in options.items() if key != "r"}
    # PEFT requires a number of steps, which `RankSchedule` replaces
    total_step = options.get("tinit", 0) + options.get("tfinal", 0) + 1
    defaults = {"init_r": max(r + 1, round(1.5 * r)), "lora_alpha": r, "total_step": total_step}
    return AdaLoraConfig(modules_to_save=[head] if head else None, target_r=r, **{**defaults, **values})


ADALORA = peft_method(
    "low-rank updates with adaptive ranks",
    "AdaLoRA, Zhang et al., arXiv 2303.10512; PEFT's implementation",
    _adalora_config,
    _ADALORA_OPTIONS,
    suffix="r",
    penalty=orthogonality,
    schedule=RankSchedule,
    defaults=_LOW_RANK,
)


def _from_peft(
    summary: str,
    source: str,
    kind: type[PeftConfig],
    defaults: Mapping[str, Any],
    suffix: str | None = None,
    targets: Targets = adaptable_layers,
    **config_defaults: Any,
) -> Method:
    """Create the `Method` of a PEFT configuration class. `config_defaults` replace the defaults of its fields."""

    def config(head: str, options: Options) -> PeftConfig:
        with without_harmless_warnings():
            return kind(modules_to_save=[head] if head else None, **{**config_defaults, **options})  # type: ignore[call-arg]

    source = f"{source}; PEFT's implementation"
    return peft_method(summary, source, config, _config_fields(kind), suffix=suffix, targets=targets, defaults=defaults)


def _layer_norms(model: nn.Module, head: str) -> str:
    """Return a regular expression for the LayerNorm modules outside the head.

    A list of names would not work, because PEFT also matches names as suffixes of other names.
    """
    names = [
        name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm) and not is_inside(name, head)
    ]
    if not names:
        raise ValueError(f"{type(model).__name__} has no LayerNorm outside its head {head!r}")
    return "|".join(re.escape(name) for name in names)


CATALOG: dict[str, Method] = {
    "shira": _from_peft(
        "random entries, r (m + n) of each m x n matrix",
        "SHiRA, Bhardwaj et al., arXiv 2406.13175",
        peft.ShiraConfig,
        {"r": 8},
        "r",
        r=8,
        random_seed=0,
    ),
    "supertuning": _from_peft(
        "the weights of largest magnitude", "Super-Tuning, arXiv 2607.09287", peft.SupertuningConfig, {}
    ),
    "fourierft": _from_peft(
        "a few 2D Fourier coefficients of each update",
        "FourierFT, Gao et al., arXiv 2405.03003",
        peft.FourierFTConfig,
        {"lr": 1e-1},
        "n_frequency",
        n_frequency=3000,
        scaling=300.0,
    ),
    "randlora": _from_peft(
        "scales of random low-rank bases with a full-rank sum",
        "RandLoRA, Albert et al., arXiv 2502.00987",
        peft.RandLoraConfig,
        {"r": 32},
        "r",
        save_projection=False,
    ),
    "vera": _from_peft(
        "two scaling vectors per layer for shared random factors",
        "VeRA, Kopiczko et al., arXiv 2310.11454",
        peft.VeraConfig,
        {"lr": 5e-3, "r": 256},
        "r",
        r=256,
        save_projection=False,
    ),
    "loha": _from_peft(
        "Hadamard products of two low-rank matrices",
        "FedPara / LoHa, Hyeon-Woo et al., arXiv 2108.06098",
        peft.LoHaConfig,
        _LOW_RANK,
        "r",
    ),
    "lokr": _from_peft("Kronecker products", "LoKr, Yeh et al., arXiv 2309.14859", peft.LoKrConfig, _LOW_RANK, "r"),
    "boft": _from_peft(
        "orthogonal factors in butterfly form",
        "BOFT, Liu et al., arXiv 2311.06243",
        peft.BOFTConfig,
        {},
        "boft_block_size",
    ),
    "hra": _from_peft(
        "chains of Householder reflections",
        "HRA, Yuan et al., arXiv 2405.17484",
        peft.HRAConfig,
        {"r": 8},
        "r",
    ),
    "delora": _from_peft(
        "low-rank updates with a learned norm",
        "DeLoRA, Bini et al., arXiv 2503.18225",
        peft.DeloraConfig,
        {"r": 8},
        "r",
    ),
    "ln_tuning": _from_peft(
        "weights and biases of the layer normalizations",
        "LN tuning, Zhao et al., arXiv 2312.11420",
        peft.LNTuningConfig,
        {},
        targets=_layer_norms,
    ),
}
"""Methods defined only by a PEFT configuration, by name."""
