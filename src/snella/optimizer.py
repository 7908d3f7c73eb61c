"""Parameter groups for SNELLA models, and optimizer steps scaled to the size of the base weights.

An adapter trains two factors, `A` and `B`, and the scalars of the kernel function that merges the factors into `ΔW`.
The update of a base weight `W0` is `scaling·S`, where `S` is the sparsified `ΔW`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Mapping
from itertools import islice
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.hooks import RemovableHandle

from snella.compat.hooks import onloaded
from snella.compat.tokens import token_adapters
from snella.config import MATCHED_KERNELS
from snella.importance import is_dtensor, is_sharded
from snella.layer import SnellaLayer

__all__ = ["StepMatcher", "create_snella_optimizer"]

MATCHER_ATTRIBUTE = "snella_step_matcher"
"""Optimizer attribute that holds the `StepMatcher`; also the key of the matcher's state in the first group."""


def create_snella_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer] = AdamW,
    *,
    lr: float,
    scalar_lr: float = 1e-4,
    head_lr: float | None = None,
    weight_decay: float = 0.0,
    head_weight_decay: float | None = None,
    match_update: bool | None = None,
    **optimizer_kwargs: Any,
) -> Optimizer:
    """Create an optimizer with parameter groups for a SNELLA model, as in `peft.optimizers`.

    The kernels' scalars need a smaller learning rate and no weight decay. `β` shifts every entry of `ΔW`, and an
    adaptive optimizer changes `β` by about one learning rate per step. At the factors' learning rate, `β` would soon
    exceed the standard deviation of `ΔW`, and the piece coefficients `α_p`, initially ±0.1, would change sign.

    Args:
        model: Any model. Trainable parameters outside SNELLA, e.g. of the head, form separate groups.
        optimizer_cls: Optimizer class.
        lr: Learning rate of the factors `A` and `B`.
        scalar_lr: Learning rate of `α`, `β`, `α_p`, and the temperature.
        head_lr: Learning rate of all other trainable parameters; defaults to `lr`.
        weight_decay: Weight decay of the factors.
        head_weight_decay: Weight decay of all other trainable weights; defaults to `weight_decay`. Biases, norms,
            `parameters_to_save`, and `trainable_token_indices` have no weight decay.
        match_update: If True, each step of the factors changes the update by about `lr` times the size of the adapted
            weights (see `StepMatcher`). Defaults to the setting in each adapter's configuration.
        optimizer_kwargs: Additional arguments of `optimizer_cls`.

    Returns:
        An optimizer with the nonempty groups among `factors`, `scalars`, `head`, and `head_no_decay`.

    Raises:
        ValueError: If a rate is negative or NaN, the model has no trainable parameter, or `match_update` finds no
            trainable factors or does not support the kernel.
        NotImplementedError: If `match_update` finds factors sharded by FSDP.
    """
    rates = {"lr": lr, "scalar_lr": scalar_lr, "head_lr": head_lr}
    rates |= {"weight_decay": weight_decay, "head_weight_decay": head_weight_decay}
    for name, rate in rates.items():
        if rate is not None and not rate >= 0:  # NaN as well
            raise ValueError(f"{name} must be at least 0, got {rate}")
    factors: list[nn.Parameter] = []
    scalars: list[nn.Parameter] = []
    for module in model.modules():
        if isinstance(module, SnellaLayer):
            for attribute in module.adapter_layer_names:
                parameters = factors if attribute in ("snella_A", "snella_B") else scalars
                parameters.extend(p for p in getattr(module, attribute).values() if p.requires_grad)
    adapter_ids = {id(parameter) for parameter in (*factors, *scalars)}
    other_params = [p for p in model.parameters() if p.requires_grad and id(p) not in adapter_ids]
    token_ids = {id(p) for token in token_adapters(model) for p in token.snella_token.values()}
    token_ids |= {id(p) for name, p in model.named_parameters() if ".trainable_tokens_delta." in name}
    sharded_shapes = _fsdp1_shapes(model)
    # weights have several axes, unlike biases and norms; trained tokens and token rows have no weight decay either
    matrix_ids = {id(p) for p in other_params if len(sharded_shapes.get(id(p), p.shape)) > 1} - token_ids
    decayed = [p for p in other_params if id(p) in matrix_ids]
    not_decayed = [p for p in other_params if id(p) not in matrix_ids]
    other_lr = lr if head_lr is None else head_lr
    other_weight_decay = weight_decay if head_weight_decay is None else head_weight_decay
    groups = [
        {"name": "factors", "params": factors, "lr": lr, "weight_decay": weight_decay},
        {"name": "scalars", "params": scalars, "lr": scalar_lr, "weight_decay": 0.0},
        {"name": "head", "params": decayed, "lr": other_lr, "weight_decay": other_weight_decay},
        {"name": "head_no_decay", "params": not_decayed, "lr": other_lr, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError(
            f"{type(model).__name__} has no trainable parameter; wrap it with get_peft_model(model, SnellaConfig(…)), "
            "check that the adapter is active, and load a saved adapter with is_trainable=True"
        )
    if head_lr is not None and not other_params:
        warnings.warn(
            f"head_lr={head_lr} has no effect: {type(model).__name__} trains only the adapter, so a new head "
            "keeps its random values; train it with e.g. SnellaConfig(modules_to_save=['head'])",
            stacklevel=2,
        )
    optimizer = optimizer_cls(groups, **optimizer_kwargs)
    adapters = _trained_adapters(model)
    matched = {name for layer, name in adapters if layer.snella_config[name].match_update}
    if match_update or (match_update is None and matched):
        StepMatcher(model, adapter_names=None if match_update else matched).attach(optimizer)
    return optimizer


def _fsdp1_shapes(model: nn.Module) -> dict[int, torch.Size]:
    """Return, by `id`, the full shapes of the parameters that FSDP1 shards, because the shards are flat."""
    shapes: dict[int, torch.Size] = {}
    for module in model.modules():
        flat_param = getattr(getattr(module, "_handle", None), "flat_param", None)
        if flat_param is not None and flat_param._params is not None:  # None without use_orig_params
            shapes.update(zip(map(id, flat_param._params), flat_param._shapes, strict=True))
    return shapes


def _trained_adapters(model: nn.Module) -> list[tuple[SnellaLayer, str]]:
    """Return all pairs of a layer and an adapter with trainable factors."""
    layers = [module for module in model.modules() if isinstance(module, SnellaLayer)]
    return [(layer, name) for layer in layers for name, A in layer.snella_A.items() if A.requires_grad]


def unwrap(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer inside Accelerate's wrappers."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def store_in_state(
    optimizer: Optimizer, key: str, save: Callable[[], dict[str, Any]], load: Callable[[dict[str, Any]], None]
) -> list[RemovableHandle]:
    """Include a state in an optimizer's state dict, as entry `key` of the first parameter group.

    `optimizer.state_dict` calls `save`, and `optimizer.load_state_dict` calls `load` if the entry exists. If the state
    dict has already been loaded, `load` is called immediately. Returns the handles of the hooks.
    """

    def save_into(_: Optimizer, state_dict: dict[str, Any]) -> None:
        state_dict["param_groups"][0][key] = save()

    def load_from(optimizer: Optimizer) -> None:
        state = optimizer.param_groups[0].get(key)
        if state is not None:
            load(state)
            del optimizer.param_groups[0][key]

    load_from(optimizer)
    return [
        optimizer.register_state_dict_post_hook(save_into),
        optimizer.register_load_state_dict_post_hook(load_from),
    ]


class StepMatcher:
    """Step scaling that makes each optimizer step change an update in proportion to its base weight.

    Except in mode `none`, `S` is quadratic in `ΔW`, so under Adam, the update grows with `(lr·steps)²`. How fast it
    grows relative to the base weights depends on `scaling`, the matrix's shape, and the size of the base weights. With
    the rank `r`, the piece coefficients `α_p`, and

        τ = lr·rms(W0)/|scaling|               the target change of S per step
        c = 2·√mean|S|                         about rms(dS/dΔW) without detaching; 1 in mode `none`
        δ = 2τ / (c + √(c² + 4τ))              solves c·δ + δ² = τ: the linear and the quadratic term
        step ← step · δ / (lr·rms(α_p)·√r)     an Adam step of lr in every entry changes ΔW by about lr·rms(α_p)·√r

    one step changes `scaling·S` by about `lr·rms(W0)` in every layer, for every backbone and scaling, throughout
    training. If `lr`, `scaling`, `W0`, or all `α_p` are zero, the step is not scaled. The forward pass and the file
    formats do not change. `mean|S|` is measured every `interval` steps, whereas the learning rate is read at each step.

    Args:
        model: Model with SNELLA layers.
        interval: Steps between measurements of `mean|S|`. One measurement costs about one merge of every matrix.
        adapter_names: Adapters whose steps are scaled; defaults to all trainable ones.

    Attributes:
        scales: Scale factors of the last step, one per matrix, by layer and adapter name.

    Raises:
        ValueError: If no factor is trainable, a kernel is not in `MATCHED_KERNELS`, or `interval` is below 1.
        NotImplementedError: If FSDP shards the factors.
    """

    def __init__(self, model: nn.Module, interval: int = 5, *, adapter_names: Collection[str] | None = None) -> None:
        if interval < 1:
            raise ValueError(f"interval must be at least 1, got {interval}")
        self.interval = interval
        trained = _trained_adapters(model)
        self._adapters = [pair for pair in trained if adapter_names is None or pair[1] in adapter_names]
        if not self._adapters:
            raise ValueError(f"match_update requires trainable SNELLA factors, but {type(model).__name__} has none")
        if any(is_sharded(layer.snella_A[name]) for layer, name in self._adapters):
            raise NotImplementedError(
                "match_update requires unsharded factors during the optimizer step, got factors sharded by FSDP; set "
                "match_update=False, train with DDP, or pass the factors to fully_shard as ignored_params"
            )
        for layer, name in self._adapters:
            kernel = layer.snella_config[name].kernel
            if kernel not in MATCHED_KERNELS:
                raise ValueError(f"match_update requires a kernel in {list(MATCHED_KERNELS)}, got {kernel!r}")
        self._weight_rms = [_measure_weight(layer, name) for layer, name in self._adapters]
        self._slopes: list[list[float]] = []
        self._previous_factors: list[tuple[Tensor, Tensor]] = []
        self.step = 0
        self.scales: dict[tuple[SnellaLayer, str], list[float]] = {}

    def attach(self, optimizer: Optimizer) -> Self:
        """Scale the steps of an optimizer and include the matcher in its state dict, for bit-exact resumption."""
        store_in_state(optimizer, MATCHER_ATTRIBUTE, self._state, self._load_state)
        setattr(optimizer, MATCHER_ATTRIBUTE, self)
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)
        return self

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Compute the scales of this step and copy the factors, so that `_after_step` can scale their changes."""
        if self.step % self.interval == 0:
            self._slopes = [_measure_slopes(layer, name) for layer, name in self._adapters]
        self.step += 1
        # read at each step, because accelerate's `prepare` replaces the groups
        lr_by_parameter = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        coeffs_by_adapter = [layer.snella_piece_coeff[name].detach().float() for layer, name in self._adapters]
        rms_by_adapter = [coeffs.square().mean(1).sqrt() for coeffs in coeffs_by_adapter]
        # in one tensor, so that reading the values synchronizes only once
        all_coeff_rms = iter(torch.cat([rms.to(rms_by_adapter[0].device) for rms in rms_by_adapter]).tolist())
        for (layer, name), weights_rms, slopes in zip(self._adapters, self._weight_rms, self._slopes, strict=True):
            lr = lr_by_parameter.get(id(layer.snella_A[name]), 0.0)
            scaling = abs(layer.scaling[name])
            rank = layer.snella_config[name].rank_of(layer.module_name)
            coeffs_rms = list(islice(all_coeff_rms, len(weights_rms)))
            scales = []
            for weight_rms, slope, coeff_rms in zip(weights_rms, slopes, coeffs_rms, strict=True):
                target_change = lr * weight_rms / scaling if scaling else 0.0
                step_change = lr * coeff_rms * math.sqrt(rank)
                scale = 1.0
                if target_change > 0 and step_change > 0:
                    scale = 2 * target_change / (slope + math.sqrt(slope**2 + 4 * target_change)) / step_change
                scales.append(scale)
            self.scales[layer, name] = scales
        self._previous_factors = [
            (layer.snella_A[name].detach().clone(), layer.snella_B[name].detach().clone())
            for layer, name in self._adapters
        ]

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        """Scale the step by interpolating between the factors before and after it."""
        for (layer, name), (A_before, B_before) in zip(self._adapters, self._previous_factors, strict=True):
            A = layer.snella_A[name]
            B = layer.snella_B[name]
            # computed on the CPU and copied asynchronously, because `repeat_interleave` on a GPU would synchronize
            scales = torch.tensor(self.scales[layer, name], dtype=A.dtype)
            by_row = scales.repeat_interleave(torch.tensor(layer.row_counts[name]))
            A.copy_(torch.lerp(A_before, A, scales.to(A.device, non_blocking=True)[:, None, None]))
            B.copy_(torch.lerp(B_before, B, by_row.to(B.device, non_blocking=True)[:, None]))
        self._previous_factors = []

    def _state(self) -> dict[str, Any]:
        """Return the state that is saved with the optimizer."""
        return {"step": self.step, "slopes": [list(slopes) for slopes in self._slopes]}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `_state`; raise `ValueError` if its matrix counts per layer differ from the model's."""
        expected = [len(layer.row_counts[name]) for layer, name in self._adapters]
        counts = [len(slopes) for slopes in state["slopes"]]
        if counts and counts != expected:
            raise ValueError(
                f"the optimizer's state has {counts} adapted matrices per layer, but the model has {expected}; load it "
                "into a model with the same target_modules and qkv_groups"
            )
        self.step = state["step"]
        self._slopes = [list(slopes) for slopes in state["slopes"]]


@torch.no_grad()
def _measure_weight(layer: SnellaLayer, name: str) -> list[float]:
    """Return `rms(W0)` of each matrix, after gathering a weight that FSDP2 shards."""
    with onloaded(layer, with_base=True):
        weight = layer._weight()
        W0 = weight if isinstance(weight, Tensor) else weight.materialize()
        W0 = W0.full_tensor() if is_dtensor(W0) else W0
        return torch.stack([W0[rows].float().square().mean().sqrt() for rows in layer.matrix_rows(name)]).tolist()


def _measure_slopes(layer: SnellaLayer, name: str) -> list[float]:
    """Return the slope `c` of each matrix (see `StepMatcher`)."""
    if layer.snella_config[name].sparsify_mode == "none":
        return [1.0] * len(layer.row_counts[name])
    means = torch.stack([S.abs().mean() for S in layer.sparse_updates(name)]).tolist()
    return [2 * math.sqrt(mean) for mean in means]
