"""Adapted layers: `SnellaLayer` and its subclasses `Linear` and `Conv2d`.

An adapter changes the weight `W0` of its base layer by a sparse update, `scaling·S`. A kernel function merges the
factors `A` and `B` into the matrix `ΔW`. `S` is nonzero only where the magnitude of `ΔW` exceeds a threshold, and the
budget is the maximum number of these entries. The effective weight is `W0` plus the updates of all active adapters.
The layer's op (see `snella.ops`) is the matrix product or convolution that applies a weight to the input.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from snella.autograd import adapted_layer, compute_effective_weight
from snella.backends import choose_backend
from snella.budgets import (
    BudgetBuffers,
    Budgets,
    budget_error,
    buffers_off_meta,
    link_budgets,
    read_budgets,
    restore_budgets,
    seal_all_budgets,
    seal_budgets,
    warn_about_missing_budgets,
    write_budgets,
)
from snella.cache import AdapterState, LayerCache
from snella.compat.compile import forward_in_graph, weight_in_graph
from snella.compat.hooks import call_inside_hooks, hook_dicts, onloaded
from snella.compat.quantization import Quantization, find_quantization
from snella.config import SnellaConfig
from snella.kernels import Factors
from snella.merge import EffectiveWeight, check_weight, merge_updates, merged_weight, unmerge_updates
from snella.ops import (
    Conv2dOp,
    LayerOp,
    LazyWeight,
    LinearOp,
    WeightOp,
    check_floating_point,
    orient,
    pad_input,
    parse_weight_gradient,
)
from snella.sparsify import SparsifyMode
from snella.update import Update, UpdateSpec, bound_initial_update, init_factors, row_slices

logger = logging.getLogger(__name__)


class UpdatePlan(NamedTuple):
    """Updates for one use of a layer: a forward pass, a merge, or a read of the weight.

    Args:
        names: Adapters whose updates are folded into the weight, i.e. added to it before the op.
        updates: Updates of these adapters, including any cached thresholds. In a compiled graph, `Update.budgets` is
            empty, because the graph reads the budgets from their buffer.
        states: Cached states that store the thresholds, one per folded update. Empty in a compiled graph, which caches
            nothing.
        branches: Adapters whose updates cannot be folded, because they use dropout or drop-path.
        cache_delta: True if a folded adapter sets `cache_delta`.
    """

    names: list[str]
    updates: list[Update]
    states: list[AdapterState]
    branches: list[str]
    cache_delta: bool

    def apply(
        self,
        x: Tensor,
        weight: Tensor | LazyWeight | None,
        bias: Tensor | None,
        op: LayerOp,
        weight_shape: torch.Size,
    ) -> Tensor:
        """Apply the op to the weight with the folded updates, and cache their thresholds."""
        y, thresholds = adapted_layer(
            x,
            weight,
            bias,
            self.updates,
            op,
            weight_shape=weight_shape,
            cache_delta=self.cache_delta,
            checkpoint_cache=self.states[0].checkpoint_cache if self.states else None,
        )
        self.cache_thresholds(thresholds)
        return y

    def add_branches(self, layer: SnellaLayer, y: Tensor, x: Tensor, apply: Callable[[Tensor, str], Tensor]) -> Tensor:
        """Return `y` plus the outputs of the branches.

        Dropout acts on the input of each branch, and drop-path on its output.

        Args:
            layer: Layer of this plan.
            y: Output of the layer without the branches.
            x: Input of the layer.
            apply: Applies the update of the adapter with the given name to an input.
        """
        for name in self.branches:
            config = layer.snella_config[name]
            branch = apply(F.dropout(x, config.dropout_of(layer.module_name), training=True), name)
            if rate := config.update_drop_path:
                keep = torch.rand((branch.shape[0],) + (1,) * (branch.ndim - 1), device=branch.device) >= rate
                branch = branch * keep.to(branch.dtype) / (1 - rate)
            y = y + branch.to(y.dtype)
        return y

    def cache_thresholds(self, thresholds: Iterable[Tensor]) -> None:
        """Cache the thresholds of each folded update."""
        for state, update_thresholds in zip(self.states, thresholds, strict=True):
            state.thresholds = update_thresholds


class SnellaLayer(nn.Module, BaseTunerLayer):
    """An adapted layer with any number of adapters.

        y = op(x, W0 + Σ scaling·S) + bias

    The updates are folded into the base weight, i.e. added to it before the op, so the layer runs a single op. In
    training, an update with dropout on its input or drop-path on its output is a separate branch instead.

    The weight `[m, …]` is treated as a matrix `[m, n]` that consists of `G` stacked matrices (3 in a fused qkv layer),
    each with its own budget. An adapter of rank `r` has `snella_A` `[G, n, r]`, `snella_B` `[m, r]`, the kernel's
    scalars (`[G, P]` for the coefficients of `P` pieces, `[G]` for all others), and `snella_budget` `[G]`. The budgets
    are saved with the adapter, so a reloaded adapter has exactly the same update. `snella.budgets` protects the budgets
    from model averaging.

    Args:
        base_layer: Layer to adapt, or one projection of an attention module.
        adapter_name: Name of the first adapter.
        config: Configuration of this adapter.
        row_counts: Rows of each stacked matrix; must sum to `m`.
        module_name: Full name of the layer in the model.
    """

    adapter_layer_names = tuple(f"snella_{name}" for name in Factors._fields)
    max_initial_ratio = 0.15
    """Bound on `√n · rms(S) / rms(W0)` for the initial update `S` of kernels with pieces; see `bound_initial_update`.

    Layers of ViT and Swin start below this bound anyway.
    """

    is_applied = False
    """True if a forward pass or a read of the weight has used an update since the layer was adapted."""

    other_param_names = ("snella_budget", "snella_seal", "snella_config", "scaling", "row_counts")
    saved_names = (*adapter_layer_names, "snella_budget")
    """Parameters and buffers that an adapter file contains."""

    pads_input: Any = False
    """True if the input must be padded before the op. `Conv2d` overrides it with a property."""
    linear_op: LinearOp
    """Op of a linear layer, configured by the `weight_gradient` of its adapters."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: SnellaConfig,
        row_counts: tuple[int, ...],
        module_name: str = "",
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.module_name = module_name
        self.snella_A = nn.ParameterDict({})
        self.snella_B = nn.ParameterDict({})
        self.snella_piece_coeff = nn.ParameterDict({})
        self.snella_alpha = nn.ParameterDict({})
        self.snella_beta = nn.ParameterDict({})
        self.snella_temperature = nn.ParameterDict({})
        self.snella_budget = BudgetBuffers(persistent=True)
        self.snella_seal = BudgetBuffers(persistent=False)
        self.snella_config: dict[str, SnellaConfig] = {}
        self.scaling: dict[str, float] = {}
        self.row_counts: dict[str, tuple[int, ...]] = {}
        self.merged_adapters: list[str] = []
        self.frozen_peft_weight_names = {}
        self._disable_adapters = False
        self._specs: dict[str, tuple[UpdateSpec, torch.device, torch.dtype]] = {}
        self._cache = LayerCache()
        self._budgets = Budgets()
        link_budgets(self)
        self.register_state_dict_pre_hook(restore_budgets)
        self.register_load_state_dict_pre_hook(warn_about_missing_budgets)
        self.register_load_state_dict_post_hook(seal_all_budgets)
        self._unmerged_weight: Tensor | None = None
        self._unmerged_quantized: tuple[LazyWeight, Any] | None = None
        # the hooks of the base layer, for compiled graphs; the `ProjectionView` of an attention module has none
        self._base_hook_dicts = hook_dicts(base_layer) if isinstance(base_layer, nn.Module) else ()
        self.quantization = find_quantization(base_layer, module_name)
        shape = self._weight().shape
        self.out_features, self.in_features = shape[0], shape[1:].numel()
        self._active_adapter = adapter_name
        self.cast_input_dtype_enabled = True
        self.update_layer(adapter_name, config, row_counts)

    # passes --------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the base layer with the updates of all active adapters."""
        if torch.compiler.is_compiling():
            return forward_in_graph(self, x, *args, **kwargs)
        names = self._names_in_use()
        if not names:
            return _forward_base(self, x, *args, **kwargs)
        if torch._C._is_tracing() or torch._C._are_functorch_transforms_active():
            reject_tracing(self.module_name)
        base = self._modules.get("base_layer")
        # `has_hooks` inlined to save a call per forward pass
        if base is not None and (
            "forward" in base.__dict__
            or base._forward_hooks
            or base._forward_pre_hooks
            or base._backward_hooks
            or base._backward_pre_hooks
        ):
            return _forward_in_hooks(self, base, names, x, *args, **kwargs)
        return _forward_updated(self, x, self._weight(), names)

    @property
    def weight(self) -> Tensor:
        """Differentiable weight with the updates of all active adapters, for models that read it directly.

        A quantized base weight is returned without updates. Outside compiled graphs, `F.linear` with the weight of a
        linear layer is computed like a call to the layer. In any other operation, dropout and drop-path have no effect
        on the update, and autograd saves the weight for the backward pass.
        """
        names = self._names_in_use()
        base = self.get_base_layer()
        weight: Tensor = super().weight
        if not names or self.quantization is not None:
            return weight
        if torch.compiler.is_compiling():
            return orient(base, weight_in_graph(self, names))
        reject_tracing(self.module_name)
        is_linear = weight.ndim == 2 and not isinstance(base, Conv1D)
        multiply = (lambda x, bias: _multiply_read(self, x, bias)) if is_linear else None
        return EffectiveWeight.of(weight, lambda: orient(base, _read(self, names)), multiply)

    def _plan_updates(self, names: list[str], *, with_branches: bool = False, in_graph: bool = False) -> UpdatePlan:
        """Plan the updates of these adapters.

        Args:
            names: Names of the adapters.
            with_branches: If True, updates with dropout or drop-path are branches in training. If False, all updates
                are folded.
            in_graph: If True, plan for a compiled graph, which caches nothing and reads the budgets from their buffers.

        Raises:
            ValueError: If the folded adapters have different values of `impl`. Compiled graphs skip this check.
        """
        if not (self.training or in_graph):
            check_written(self, names)
        folded = []
        branches = []
        updates = []
        states = []
        impls = {}
        cache_delta = False
        for name in names:
            config = self.snella_config[name]
            may_branch = with_branches and self.training and (config.update_dropout or config.update_drop_path)
            if may_branch and _is_regularized(self, name):
                branches.append(name)
                continue
            folded.append(name)
            factors = get_factors(self, name)
            spec = get_spec(self, name, factors.A)
            cache_delta = cache_delta or config.cache_delta
            if in_graph:
                updates.append(Update(spec, factors, ()))
                continue
            budgets = self.budgets(name)
            # `training` is part of the key: Lightning sets it without `train()`, after swapping factors through `.data`
            state = self._cache.adapter(name, factors, budgets, (spec.mode, self.training))
            updates.append(Update(spec, factors, budgets, state.thresholds))
            states.append(state)
            impls[name] = config.impl
        if len(set(impls.values())) > 1:
            raise ValueError(f"impl must be the same in all active adapters, got {impls}")
        return UpdatePlan(folded, updates, states, branches, cache_delta)

    def _names_in_use(self) -> list[str]:
        """Return the active adapters, or none if adapters are disabled or merged; if disabled, unmerge first."""
        if self._disable_adapters or self.merged_adapters:  # PEFT's properties would cost six calls
            if self._disable_adapters and self.merged_adapters:
                self.unmerge()
            return []
        active = self._active_adapter
        return list(filter(self.snella_config.__contains__, [active] if isinstance(active, str) else active))

    def _op(self) -> LayerOp:
        """Return the op of the base layer."""
        return self.linear_op

    def _weight(self) -> Tensor | LazyWeight:
        """Return the base weight as `[m, …]`: a tensor, or a `LazyWeight` if it is quantized."""
        base = get_base(self)
        if self.quantization is not None:
            return self.quantization.source(base)
        weight: Tensor = base.weight
        return weight.T if isinstance(base, Conv1D) else weight

    def _cached_weight(self, names: list[str], dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the detached effective weight, cached until one of its inputs changes.

        `dtype`, the dtype of the layer op, is the dtype of the result if the base weight is quantized.
        """
        check_written(self, names)
        weight = self._weight()
        settings: tuple[Any, ...] = tuple((name, self.scaling[name]) for name in names)
        base: Any = self.get_base_layer()
        base_tensors: tuple[Tensor, ...] = (base.weight,)
        if isinstance(weight, LazyWeight):
            base_tensors = weight.tensors
            settings = (*settings, dtype)
        return self._cache.weight(
            (*base_tensors, *adapter_tensors(self, names)),
            settings,
            lambda: merged_weight(self, weight, names, dtype=dtype),
        )

    # merging -------------------------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates to the base weight, and keep the original weight for a bit-exact `unmerge`.

        A quantized weight is dequantized, updated, and requantized, with a warning about the requantization error.

        Args:
            safe_merge: If True, check that the merged weight is finite before writing it.
            adapter_names: Adapters to merge; defaults to the active ones.

        Raises:
            ValueError: If `safe_merge` finds non-finite values, or the merged adapters have different values of `impl`.
            NotImplementedError: If the base weight is on the meta device, has 8 bits per entry but is not quantized, or
                is computed from other parameters (e.g. by `weight_norm`).
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.snella_A]
        if names:
            merge_updates(self, names, safe_merge=safe_merge)

    def unmerge(self) -> None:
        """Restore the base weight, bit for bit, to its state before `merge`."""
        unmerge_updates(self)

    @torch.compiler.disable
    def get_delta_weight(self, adapter: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return an adapter's `scaling·S` in the layout of the base weight, computed in at least float32.

        Args:
            adapter: Name of the adapter.
            dtype: Dtype of the result; defaults to the factors' dtype.
        """
        delta = merged_weight(self, None, [adapter])
        return orient(self.get_base_layer(), delta.to(dtype or self.snella_A[adapter].dtype))

    def sparse_updates(self, adapter_name: str) -> list[Tensor]:
        """Return an adapter's detached `S` for each matrix, `[rows, n]`, not multiplied by `scaling`."""
        plan = self._plan_updates([adapter_name])
        update = plan.updates[0]._replace(spec=replace(plan.updates[0].spec, scaling=1.0))
        shape = torch.Size((self.out_features, self.in_features))
        total, thresholds = compute_effective_weight(None, [update], shape)
        plan.cache_thresholds(thresholds)
        return [total[rows] for rows in update.spec.rows]

    # adapters ------------------------------------------------------------------------------------------------------

    def update_layer(self, adapter_name: str, config: SnellaConfig, row_counts: tuple[int, ...]) -> None:
        """Add or replace an adapter.

        Args:
            adapter_name: Name of the adapter.
            config: Configuration of the adapter.
            row_counts: Rows of each matrix of the weight; must sum to `m`.
        """
        m, n = self.out_features, self.in_features
        groups = len(row_counts)
        r = config.rank_of(self.module_name)
        self.snella_A[adapter_name] = nn.Parameter(torch.empty(groups, n, r, dtype=torch.float32))
        self.snella_B[adapter_name] = nn.Parameter(torch.empty(m, r, dtype=torch.float32))
        frozen_names = []
        for name in config.make_kernel().scalars:
            if name == "temperature" and not config.learn_temperature:
                continue
            shape = (groups, config.num_pieces) if name == "piece_coeff" else (groups,)
            getattr(self, f"snella_{name}")[adapter_name] = nn.Parameter(torch.empty(shape, dtype=torch.float32))
            if name == "piece_coeff" and not config.learn_piece_coeff:
                frozen_names.append("snella_piece_coeff")
        self.frozen_peft_weight_names = {**self.frozen_peft_weight_names, adapter_name: tuple(frozen_names)}
        sizes = torch.tensor([rows * n for rows in row_counts])
        self.snella_budget[adapter_name] = sizes - (sizes.float() * config.init_sparsity).long()
        seal_budgets(self, adapter_name)
        self.snella_config[adapter_name] = config
        self.scaling[adapter_name] = config.scaling
        self.row_counts[adapter_name] = row_counts
        with onloaded(self, with_base=True):
            _init_parameters(self, adapter_name)
            self._move_adapter_to_device_of_base_layer(adapter_name)
        _update_linear_op(self)
        self._specs.pop(adapter_name, None)
        update_specs(self)
        self.clear_cache()
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from this layer."""
        super().delete_adapter(adapter_name)
        drop_adapter(self, adapter_name)

    def set_budget(self, adapter_name: str, budgets: Iterable[int]) -> None:
        """Set the budget of each matrix, effective from the next forward pass.

        Raises:
            ValueError: If there is not one budget per matrix, or a budget is not between 0 and the matrix's size.
        """
        values = tuple(map(int, budgets))
        if (error := budget_error(self, adapter_name, values)) is not None:
            raise ValueError(f"budgets of {self.module_name!r} {error}")
        write_budgets(self, adapter_name, values)
        self.clear_cache()

    def budgets(self, adapter_name: str) -> tuple[int, ...]:
        """Return the budget of each matrix.

        A buffer is not read again until it changes, because reading it synchronizes with the device. Inference tensors
        do not track changes, so they are read in every call.
        """
        buffer: Any = self._modules["snella_budget"]._buffers[adapter_name]  # type: ignore[union-attr]
        record = self._budgets.records.get(adapter_name)
        if record is None or record.buffer is not buffer:
            return read_budgets(self, adapter_name)
        is_unchanged = record.address == buffer.data_ptr() and record.version == buffer._version
        return record.budgets if is_unchanged else read_budgets(self, adapter_name)

    def matrix_rows(self, adapter_name: str) -> tuple[slice, ...]:
        """Return the rows of the weight that belong to each matrix."""
        return row_slices(self.row_counts[adapter_name])

    def get_update(self, adapter_name: str) -> Update:
        """Return an adapter's update, with its thresholds if they are cached."""
        return self._plan_updates([adapter_name]).updates[0]

    def backend_name(self, adapter_name: str) -> str:
        """Return the backend of an adapter's update: `"eager"`, `"reference"`, `"numba"`, or `"triton"`."""
        return get_spec(self, adapter_name, self.snella_A[adapter_name]).backend

    def weight_name(self, name: str) -> str:
        """Return the adapted parameter's name in the model without adapters, given this layer's name."""
        return f"{name}.weight"

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's scaling to `scale` times the configured one; a merged weight does not change."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.snella_config[adapter].scaling
            update_specs(self)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of every active adapter by `scale`."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.scaling[adapter] *= scale
        update_specs(self)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of every active adapter by `scale`, or reset it to the configured one."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                configured = self.snella_config[adapter].scaling
                self.scaling[adapter] = configured if scale is None else self.scaling[adapter] / scale
        update_specs(self)

    # module --------------------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation.

        A change of the mode frees cached tensors. It also restores averaged budgets, as does every call with
        `mode=False`, because a compiled graph reads the buffers directly.
        """
        is_change = mode != self.training
        if is_change:
            self.clear_cache()
        if is_change or not mode:
            restore_budgets(self, only_changed=not is_change)
        return super().train(mode)

    def _replicate_for_data_parallel(self) -> Self:
        """Mark the original layer as used, because attributes that a replica sets are lost."""
        self.is_applied = True
        return cast(Self, super()._replicate_for_data_parallel())

    def clear_cache(self) -> None:
        """Free cached tensors, such as the effective weight in evaluation mode."""
        self._cache.clear()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast the layer and the stored unmerged weight, and free cached tensors."""
        super()._apply(fn, recurse)
        if self._unmerged_weight is not None:
            self._unmerged_weight = fn(self._unmerged_weight)
        self.clear_cache()
        update_specs(self)
        return self

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, torch.dtype | None]:
        """Return the device and dtype for the factors. The dtype is float32 if the base weight has 8 bits per entry."""
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        return device, torch.float32 if dtype is not None and dtype.itemsize == 1 else dtype

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter to the base weight's device; buffers stay in place if the base weight is offloaded."""
        with buffers_off_meta(self):
            super()._move_adapter_to_device_of_base_layer(adapter_name, device)


class Linear(SnellaLayer):
    """Adapted linear layer, or transformers' `Conv1D`, which stores its weight transposed."""

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return True: the update is added to a linear layer's weight, and a low-rank fit can approximate it."""
        return True

    def __repr__(self) -> str:
        return "snella." + super().__repr__()


class Conv2d(SnellaLayer):
    """Adapted 2D convolution; its weight `[m, c/groups, kh, kw]` is viewed as `[m, c/groups·kh·kw]`."""

    # most convolutions have rectified inputs, whose mean accumulates over the update's mostly positive entries
    max_initial_ratio = 0.002

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # raise an error for unsupported padding now instead of in the first forward pass
        self._op().padding_sizes(self._weight().shape)

    @property
    def pads_input(self) -> bool:
        """True unless the padding mode is `zeros`, the only mode that the op supports."""
        return cast(nn.Conv2d, self.get_base_layer()).padding_mode != "zeros"

    def _op(self) -> Conv2dOp:
        return Conv2dOp.of(cast(nn.Conv2d, self.get_base_layer()))

    def __repr__(self) -> str:
        return "snella." + super().__repr__()


# passes ------------------------------------------------------------------------------------------------------------


def _forward_updated(layer: SnellaLayer, x: Tensor, weight: Tensor | LazyWeight, names: list[str]) -> Tensor:
    """Apply the layer op with the updates of these adapters."""
    layer.__dict__["is_applied"] = True  # avoids the cost of nn.Module.__setattr__
    input_dtype = x.dtype
    op_dtype = weight.dtype if isinstance(weight, Tensor) else product_dtype(layer, x)
    # if both tensors are on the meta device, the pass computes only shapes and needs no values
    if isinstance(weight, Tensor) and (op_dtype.itemsize == 1 or (weight.is_meta and not x.is_meta)):
        check_weight(layer, weight)
    if input_dtype != op_dtype or layer.pads_input:
        x = _prepare_input(layer, x, op_dtype)
    bias = get_base(layer).bias
    if layer.training or needs_gradients(layer, names):
        y = _apply_differentiable(layer, x, weight, bias, names)
    else:
        y = _apply_cached(layer, x, weight, bias, names)
    return y if torch.is_autocast_enabled(x.device.type) else y.to(input_dtype)


def needs_gradients(layer: SnellaLayer, names: list[str]) -> bool:
    """Return whether gradients are enabled and the effective weight depends on a tensor that requires them."""
    if not torch.is_grad_enabled():
        return False
    tensors = [layer.get_base_layer().weight, *adapter_tensors(layer, names)]
    return any([tensor.requires_grad for tensor in tensors])


def _prepare_input(layer: SnellaLayer, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast and pad the input.

    Under autocast, `adapted_layer` casts it instead: a cast here would drop its `Mark` (see `snella.memory.origins`),
    from which the backward pass recomputes the input.
    """
    check_floating_point(x, layer.module_name)
    if not torch.is_autocast_enabled(x.device.type):
        x = layer._cast_input_dtype(x, dtype)
    return pad_input(layer.get_base_layer(), x)


def product_dtype(layer: SnellaLayer, x: Tensor) -> torch.dtype:
    """Return the compute dtype of a layer with a quantized weight, ignoring autocast."""
    return cast(Quantization, layer.quantization).product_dtype(layer.get_base_layer(), x.dtype)


def _forward_in_hooks(
    layer: SnellaLayer, base: nn.Module, names: list[str], x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Run `_forward_updated` inside the base layer's hooks, which may load the weight only for this call."""
    loaded: list[Any] = []  # weight, dtype, and device during the call

    def forward(x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        weight: Any = base.weight
        loaded[:] = [weight, weight.dtype, weight.device]
        op_weight = layer._weight()
        if isinstance(op_weight, Tensor) and not op_weight.requires_grad:
            op_weight = op_weight.detach()  # a hook may replace the parameter's data before the backward pass
        with onloaded(layer, with_base=False):
            return _forward_updated(layer, x, op_weight, names)

    y: Tensor = call_inside_hooks(base, forward, x, *args, **kwargs)
    weight: Any = base.weight
    if weight is not loaded[0] or [weight.dtype, weight.device] != loaded[1:]:
        layer.clear_cache()  # the hooks have offloaded or cast the base weight, so free the effective weight as well
    return y


def _forward_base(layer: SnellaLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Apply the base layer without updates."""
    base = layer.get_base_layer()
    y: Tensor
    if layer.quantization is None or layer.quantization.is_safe_to_apply(base):
        y = layer.base_layer(x, *args, **kwargs)
        return y
    # the base layer's own forward pass may change its weight, so multiply by the dequantized weight instead
    prepared = _prepare_input(layer, x, product_dtype(layer, x))
    y, _ = adapted_layer(prepared, layer._weight(), cast(Any, base).bias, [], layer._op())
    return y if torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)


def _apply_cached(
    layer: SnellaLayer, x: Tensor, weight: Tensor | LazyWeight, bias: Tensor | None, names: list[str]
) -> Tensor:
    """Apply the layer op with the cached effective weight.

    To save memory, the effective weight of a quantized layer is recomputed in each pass and released, unless an adapter
    sets `cache_delta`.
    """
    is_autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if is_autocast else x.dtype
    if isinstance(weight, Tensor) or any([layer.snella_config[name].cache_delta for name in names]):
        effective: Tensor | LazyWeight = layer._cached_weight(names, dtype)
    else:
        layer._cache.release_effective_weight()
        sources = (*weight.tensors, *adapter_tensors(layer, names))
        effective = LazyWeight(weight.shape, sources, lambda: merged_weight(layer, weight, names, dtype=dtype))
    return adapted_layer(x, effective, bias, [], layer._op())[0]


def _apply_differentiable(
    layer: SnellaLayer, x: Tensor, weight: Tensor | LazyWeight, bias: Tensor | None, names: list[str]
) -> Tensor:
    """Apply the base layer with these updates, differentiably.

    Updates folded into the base weight need only one op. In training, an update with dropout or drop-path is a branch.
    """
    layer._cache.release_effective_weight()
    plan = layer._plan_updates(names, with_branches=True)
    op = layer._op()
    y = plan.apply(x, weight, bias, op, weight.shape)
    if plan.branches:

        def apply(dropped: Tensor, name: str) -> Tensor:
            return layer._plan_updates([name]).apply(dropped, None, None, op, weight.shape)

        y = plan.add_branches(layer, y, x, apply)
    return y


def reject_tracing(module_name: str) -> None:
    """Reject `torch.jit.trace` and `torch.func`, which do not support the update's custom autograd function.

    Raises:
        NotImplementedError: If `torch.jit.trace` (or ONNX's TorchScript exporter) or a `torch.func` transform is
            active.
    """
    if torch.jit.is_tracing():
        raise NotImplementedError(
            f"torch.jit.trace (and torch.onnx.export with dynamo=False) cannot trace the update of {module_name!r}; "
            "trace model.merge_and_unload(), which has the same outputs"
        )
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            f"torch.func (grad, vmap, jvp, …) does not support the update of {module_name!r}, which has a custom "
            "backward pass; use torch.autograd.grad, or model.merge_and_unload() if no factor needs gradients"
        )


# reads of the weight -----------------------------------------------------------------------------------------------


def _multiply_read(layer: SnellaLayer, x: Tensor, bias: Tensor | None) -> Tensor | None:
    """Return `F.linear` of `x` and the effective weight, or `None` if the caller must compute the weight.

    Returns `None` if no adapter is in use, in evaluation mode without gradients (where the effective weight is cached),
    and, without autocast, if the dtypes differ.
    """
    names = layer._names_in_use()
    if not names or not (layer.training or needs_gradients(layer, names)):
        return None
    weight = cast(Tensor, layer._weight())
    check_weight(layer, weight)
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return None  # torch raises its own error
    layer.is_applied = True
    return _apply_differentiable(layer, x, weight, bias, names)


def _read(layer: SnellaLayer, names: list[str]) -> Tensor:
    """Return `W0 + Σ scaling·S`, `[m, …]`; like a forward pass, cache it in evaluation mode without gradients."""
    weight = cast(Tensor, layer._weight())
    check_weight(layer, weight)
    layer.is_applied = True
    if not needs_gradients(layer, names):
        return merged_weight(layer, weight, names) if layer.training else layer._cached_weight(names)
    if layer.training and any(_is_regularized(layer, name) for name in names):
        # warn that dropout and drop-path cannot act on a weight that the model reads
        layer.snella_config[names[0]].watch.on_weight_read(layer.module_name)
    layer._cache.release_effective_weight()
    plan = layer._plan_updates(names)
    # without autocast, so that the result has the dtype of the base weight
    with torch.autocast(weight.device.type, enabled=False):
        return plan.apply(weight.new_empty(0), weight, None, WeightOp(), weight.shape)


# tensors and specs of an adapter -----------------------------------------------------------------------------------


def _is_regularized(layer: SnellaLayer, adapter_name: str) -> bool:
    """Return whether dropout or drop-path acts on this adapter's update, so that it cannot be folded."""
    config = layer.snella_config[adapter_name]
    return bool(config.update_drop_path or config.dropout_of(layer.module_name))


def get_base(layer: SnellaLayer) -> Any:
    """Return `layer.get_base_layer()` with fewer Python calls."""
    base = layer._modules.get("base_layer")
    # the base layer of an attention projection is not an `nn.Module`, and any other base layer may wrap another
    return layer.get_base_layer() if base is None or "base_layer" in base._modules else base


def get_factors(layer: SnellaLayer, adapter_name: str) -> Factors:
    """Return the factors and scalars of an adapter."""
    tensors: list[Any] = []
    for name in layer.adapter_layer_names:
        values: Any = layer._modules[name]
        # subscripting, unlike `get`, lets ZeRO-3 gather the parameter
        tensor = values._parameters[adapter_name] if adapter_name in values._parameters else None  # noqa: SIM401
        # FSDP1 replaces the parameters with plain attributes during a pass
        tensors.append(values.__dict__.get(adapter_name) if tensor is None else tensor)
    return Factors(*tensors)


def adapter_tensors(layer: SnellaLayer, names: list[str]) -> list[Tensor]:
    """Return all tensors that the updates of these adapters depend on."""
    attributes = [getattr(layer, name) for name in layer.saved_names]
    return [tensors[name] for name in names for tensors in attributes if name in tensors]


def check_written(layer: SnellaLayer, names: list[str]) -> None:
    """Invalidate the evaluation caches if factors were written without a version change, e.g. through `.data`."""
    for name in names:
        layer._cache.check_written(name, [factor for factor in get_factors(layer, name) if factor is not None])


def get_spec(layer: SnellaLayer, adapter_name: str, A: Tensor) -> UpdateSpec:
    """Return an adapter's spec, recreated after a change of device or dtype and updated after a change of scaling."""
    entry = layer._specs.get(adapter_name)
    # the choice of the backend depends on the factors' device and dtype
    if entry is None or entry[1] != A.device or entry[2] != A.dtype:
        config = layer.snella_config[adapter_name]
        mode = cast(SparsifyMode, config.sparsify_mode)
        spec = UpdateSpec(config.make_kernel(), layer.row_counts[adapter_name], mode)
        backend, reason = choose_backend(config.impl, spec, A)
        log_backend(backend, reason, str(A.device))
        entry = layer._specs[adapter_name] = (replace(spec, backend=backend), A.device, A.dtype)
    spec = entry[0]
    if spec.scaling != layer.scaling[adapter_name]:
        spec = replace(spec, scaling=layer.scaling[adapter_name])
        layer._specs[adapter_name] = (spec, *entry[1:])
    return spec


def update_specs(layer: SnellaLayer) -> None:
    """Update the specs after a change of scaling, device, or dtype."""
    for name, A in layer.snella_A.items():
        if not A.is_meta:
            get_spec(layer, name, A)


def _init_parameters(layer: SnellaLayer, adapter_name: str) -> None:
    """Initialize factors and scalars, and bound the initial update of a piecewise kernel (see `max_initial_ratio`).

    Does nothing if the factors are on the meta device, because loading the adapter fills them later.
    """
    factors = get_factors(layer, adapter_name)
    rows = layer.matrix_rows(adapter_name)
    config = layer.snella_config[adapter_name]
    if factors.A.is_meta:
        return
    init_factors(factors, rows, config.num_pieces, is_larger=not config.init_weights)
    # the bound assumes a piecewise kernel and an update that is quadratic in `ΔW`
    if config.init_weights and config.sparsify_mode != "none" and factors.piece_coeff is not None:
        weight = layer._weight()
        dense_weight = weight if isinstance(weight, Tensor) else weight.materialize()
        if not dense_weight.is_meta:
            bound_initial_update(factors, rows, config.make_kernel(), dense_weight, layer.max_initial_ratio)


def drop_adapter(layer: SnellaLayer, adapter_name: str) -> None:
    """Undo `update_layer`, except for the active adapters and the live budgets, which copies of the layer share."""
    for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
        values = getattr(layer, attribute)
        if adapter_name in values:
            del values[adapter_name]
    _update_linear_op(layer)
    layer.frozen_peft_weight_names.pop(adapter_name, None)
    layer._specs.pop(adapter_name, None)
    layer.clear_cache()


def _update_linear_op(layer: SnellaLayer) -> None:
    """Choose the settings of the op, which all adapters of the layer share.

    The token share is the largest among all adapters. bfloat16 gradients are used only if all adapters request them.
    """
    settings = [parse_weight_gradient(config.weight_gradient) for config in layer.snella_config.values()]
    shares = [share for share, _ in settings]
    are_all_rounded = bool(settings) and all(is_rounded for _, is_rounded in settings)
    layer.linear_op = LinearOp(max(shares, default=1.0), are_all_rounded)


@lru_cache(maxsize=64)
def log_backend(backend: str, reason: str, device: str) -> None:
    """Log once which backend computes the updates on a device."""
    logger.info("updates on %r use backend %r (%s)", device, backend, reason)


__all__ = ["Conv2d", "Linear", "SnellaLayer"]
