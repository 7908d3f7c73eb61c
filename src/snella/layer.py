"""`SnellaLayer`, `Linear` and `Conv2d`: layers with sparse weight updates."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from snella.backends import choose_backend
from snella.backends.base import MergeCache
from snella.cache import AdapterState, EffectiveWeight, LayerCache, LiveBudgets, pack_positions, seal_of
from snella.compat.compile import adapted_layer_in_graph
from snella.compat.hooks import call_inside_hooks, hook_dicts, is_hooked_in_graph, onloaded
from snella.compat.quantization import Quantization, find_quantization, measure_requantization, report_requantization
from snella.config import SnellaConfig
from snella.fixed_support import fold_entries, layer_with_entries, merged_entries
from snella.functional import adapted_layer, compute_effective_weight, write_effective_weight
from snella.initialization import bound_first_update, init_factors
from snella.memory.sampling import parse_weight_gradient
from snella.sparsify import SparsifyMode
from snella.update import Conv2dOp, Factors, LayerOp, LazyWeight, LinearOp, Update, UpdateSpec, WeightOp

logger = logging.getLogger(__name__)
LINEAR = LinearOp()


class SnellaLayer(nn.Module, BaseTunerLayer):
    """An adapted layer with any number of adapters.

        y = op(x, W0 + Σ scaling·S) + bias

    Base weight and updates are folded into one op. In training, an update with dropout on its input or drop-path on its
    output is a separate branch. A weight `[m, …]` consists of `G` stacked matrices (3 in a fused qkv layer). Every
    adapter has `snella_A` `[G, n, r]`, `snella_B` `[m, r]`, the kernel's scalars `[G]` or `[G, P]`, and `snella_budget`
    `[G]`, which is saved with the adapter so that a reloaded adapter keeps exactly the same weights.

    Model averaging may average buffers (`AveragedModel(use_buffers=True)`, timm's `ModelEmaV2`). An averaged budget
    does not match its `snella_seal` `[G]`; the layer then restores the last set budgets.
    """

    adapter_layer_names = tuple(f"snella_{name}" for name in Factors._fields)
    largest_start = 0.15
    """Bound of `√n · rms(S) / rms(W0)` for the initial update `S`; ViT and Swin layers start below it."""

    is_applied = False
    """True if a forward pass or a read of the weight has used an update since the layer was adapted."""

    other_param_names = ("snella_budget", "snella_seal", "snella_support", "snella_config", "scaling", "row_counts")
    saved_names = (*adapter_layer_names, "snella_budget", "snella_support")
    """Parameters and buffers that an adapter file contains."""

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
        self.snella_budget = BufferDict({}, persistent=True)
        self.snella_seal = BufferDict({}, persistent=False)
        self.snella_support = BufferDict({}, persistent=True)
        self.snella_config: dict[str, SnellaConfig] = {}
        self.scaling: dict[str, float] = {}
        self.row_counts: dict[str, tuple[int, ...]] = {}
        self.merged_adapters: list[str] = []
        self.frozen_peft_weight_names = {}
        self._disable_adapters = False
        self._specs: dict[str, tuple[UpdateSpec, torch.device, torch.dtype]] = {}
        self._cache = LayerCache()
        self._live_budgets = LiveBudgets()
        self.register_load_state_dict_post_hook(_seal_all_budgets)
        self._unmerged_weight: Tensor | None = None
        self._unmerged_quantized: tuple[LazyWeight, Any] | None = None
        self._around_base = hook_dicts(base_layer) if isinstance(base_layer, nn.Module) else ()
        self.quantization = find_quantization(base_layer, module_name)
        self.out_features, self.in_features = self._matrix_shape()
        self._active_adapter = adapter_name
        self.cast_input_dtype_enabled = True
        self.update_layer(adapter_name, config, row_counts)

    # forward -------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the base layer with the updates of all active adapters."""
        if torch.compiler.is_compiling():
            return self._forward_in_graph(x, *args, **kwargs)
        names = self._names_in_use()
        if not names:
            return self._without_updates(x, *args, **kwargs)
        refuse_tracing(self.module_name)
        base = self._modules.get("base_layer")
        # `has_hooks` inlined to save a call per forward pass
        if base is not None and (
            "forward" in base.__dict__ or base._forward_hooks or base._forward_pre_hooks or base._backward_hooks
        ):
            return self._inside_hooks(base, names, x, *args, **kwargs)
        return self._with_updates(x, self._weight(), names)

    def _inside_hooks(self, base: nn.Module, names: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run `_with_updates` inside the base layer's hooks, which may load the weight only for this call."""
        used: list[Any] = []

        def forward(x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
            weight: Any = base.weight
            used[:] = [weight, weight.dtype, weight.device]
            op_weight = self._weight()
            if isinstance(op_weight, Tensor) and not op_weight.requires_grad:
                op_weight = op_weight.detach()  # a hook may replace the parameter's data before the backward pass
            with onloaded(self, with_base=False):
                return self._with_updates(x, op_weight, names)

        y: Tensor = call_inside_hooks(base, forward, x, *args, **kwargs)
        weight: Any = base.weight
        if weight is not used[0] or [weight.dtype, weight.device] != used[1:]:
            self._cache.clear()  # an offloaded base weight must not leave its effective weight behind
        return y

    def _with_updates(self, x: Tensor, weight: Tensor | LazyWeight, names: list[str]) -> Tensor:
        """Apply the layer op with the updates of these adapters."""
        self.__dict__["is_applied"] = True  # avoids the cost of nn.Module.__setattr__
        dtype = x.dtype
        op_dtype = weight.dtype if isinstance(weight, Tensor) else self._op_dtype(x)
        if isinstance(weight, Tensor) and (op_dtype.itemsize == 1 or (weight.is_meta and not x.is_meta)):
            raise self._unusable_weight(op_dtype)
        x = self._input_of_op(x, op_dtype)
        if self.training or self._needs_gradients(names):
            y = self._apply_learning(x, weight, names, self._base_bias())
        else:
            y = self._apply_cached(x, weight, names)
        return y if torch.is_autocast_enabled(x.device.type) else y.to(dtype)

    def _unusable_weight(self, dtype: torch.dtype) -> NotImplementedError:
        """Error for a missing or 8-bit base weight."""
        if dtype.itemsize == 1:
            return NotImplementedError(
                f"the weight of {self.module_name!r} must not be {dtype}, to which no update can be added; merge "
                "before enable_layerwise_casting, which upcasts weights only in forward passes, or load the model in "
                "bfloat16"
            )
        return NotImplementedError(
            f"the weight of {self.module_name!r} is on the meta device; load it, or offload it with "
            "accelerate.cpu_offload or a device_map, whose hooks load it when the layer is called"
        )

    def _check_weight(self, weight: Tensor | LazyWeight) -> None:
        """Reject a base weight to which no update can be added."""
        if isinstance(weight, Tensor) and (weight.dtype.itemsize == 1 or weight.is_meta):
            raise self._unusable_weight(weight.dtype)

    def _names_in_use(self) -> list[str]:
        """Return the active adapters, or none if disabled or merged. A disabled merged layer is unmerged first."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in self.snella_A]

    def _without_updates(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the base layer without updates."""
        if self.quantization is None or self.quantization.is_safe_to_apply(self.get_base_layer()):
            return self.base_layer(x, *args, **kwargs)
        wide = self._input_of_op(x, self._op_dtype(x))
        y, _ = adapted_layer(wide, self._weight(), self._base_bias(), [], self._op())
        return y if torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)

    def _apply_cached(self, x: Tensor, weight: Tensor | LazyWeight, names: list[str]) -> Tensor:
        """Apply the layer op with the effective weight, which is cached in evaluation unless the base is quantized.

        With a quantized base, memory is scarce: the effective weight is recomputed in each pass and released, or cached
        with `cache_delta`.
        """
        is_autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if is_autocast else x.dtype
        if isinstance(weight, Tensor) or any([self.snella_config[name].cache_delta for name in names]):
            effective: Tensor | LazyWeight = self._cached_weight(names, dtype)
        else:
            self._cache.release_effective_weight()
            sources = (*weight.tensors, *self._adapter_tensors(names))
            effective = LazyWeight(weight.shape, sources, lambda: self._effective(weight, names, dtype=dtype))
        return adapted_layer(x, effective, self._base_bias(), [], self._op())[0]

    def _apply_learning(self, x: Tensor, weight: Tensor | LazyWeight, names: list[str], bias: Tensor | None) -> Tensor:
        """Apply base layer and updates in one differentiable op; regularized updates are branches in training."""
        self._cache.release_effective_weight()
        branches = [name for name in names if self.training and self._is_regularized(name)]
        folded = [name for name in names if name not in branches] if branches else names
        if any([name in self.snella_support for name in folded]):
            y = self._apply_entries(x, weight, bias, folded)
        else:
            y = self._apply_updates(x, weight, bias, folded, self._op())
        for name in branches:
            dropped = F.dropout(x, self._update_dropout(name), training=True)
            branch = self._apply_updates(dropped, None, None, [name], self._op())
            y = y + self._drop_path(branch, name).to(y.dtype)
        return y

    def _apply_updates(
        self, x: Tensor, weight: Tensor | LazyWeight | None, bias: Tensor | None, names: list[str], op: LayerOp
    ) -> Tensor:
        """Apply the op with these adapters' updates, and cache their thresholds."""
        updates, states = self._updates(names)
        y, thresholds = adapted_layer(
            x,
            weight,
            bias,
            updates,
            op,
            weight_shape=self._weight().shape if weight is None else weight.shape,
            cache_delta=any([self.snella_config[name].cache_delta for name in names]),
            recompute=states[0].recompute if states else None,
        )
        for state, update_thresholds in zip(states, thresholds, strict=True):
            state.thresholds = update_thresholds
        return y

    def _apply_entries(self, x: Tensor, weight: Tensor | LazyWeight, bias: Tensor | None, names: list[str]) -> Tensor:
        """Apply the base layer with the update of one fixed-support adapter."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        elif isinstance(weight, Tensor):
            x = x.to(weight.dtype)
        values, indices = self._entries(names)
        return layer_with_entries(x, weight, bias if bias is None else bias.to(x.dtype), values, indices, self._op())

    def _entries(self, names: list[str]) -> tuple[Tensor, Tensor]:
        """Return values and positions of the only adapter, which has a fixed support.

        Raises:
            NotImplementedError: If other adapters are also active.
        """
        if len(names) > 1:
            raise NotImplementedError(
                f"adapters {names} cannot be trained together, because "
                f"{[name for name in names if name in self.snella_support]} have a fixed support; activate only one"
            )
        indices = self._cache.positions(names[0], self.snella_support[names[0]])
        return merged_entries(self._spec(names[0]), self._factors(names[0]), indices), indices

    def _drop_path(self, y: Tensor, name: str) -> Tensor:
        """Drop the update for random samples and rescale the others."""
        rate = self.snella_config[name].update_drop_path or 0.0
        if rate == 0:
            return y
        keep = torch.rand((y.shape[0],) + (1,) * (y.ndim - 1), device=y.device) >= rate
        return y * keep.to(y.dtype) / (1 - rate)

    def _is_regularized(self, name: str) -> bool:
        """Return whether dropout or drop-path acts on this adapter's update, which then cannot be folded."""
        config = self.snella_config[name]
        return bool(config.update_drop_path or (config.update_dropout and self._update_dropout(name)))

    def _update_dropout(self, name: str) -> float:
        """Return the dropout probability on the update's input in this layer."""
        config = self.snella_config[name]
        excluded = any(
            self.module_name == s or self.module_name.endswith(f".{s}") for s in config.dropout_exclude or []
        )
        return 0.0 if excluded else config.update_dropout or 0.0

    def _needs_gradients(self, names: list[str]) -> bool:
        """Return whether the effective weight depends on a tensor that requires gradients."""
        if not torch.is_grad_enabled():
            return False
        tensors = [self.get_base_layer().weight, *self._adapter_tensors(names)]
        return any([tensor.requires_grad for tensor in tensors])

    def _forward_in_graph(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`forward` for `torch.compile`: no caching between calls, because a graph cannot detect changes."""
        names = [name for name in self.active_adapters if name in self.snella_A]
        if self.quantization is None and (self.disable_adapters or self.merged or not names):
            return self.base_layer(x, *args, **kwargs)
        base = self._modules.get("base_layer")
        is_opaque = self.quantization is not None or (base is not None and is_hooked_in_graph(base, self._around_base))
        if is_opaque or any(name in self.snella_support for name in names):
            return self._forward_outside_graphs(x, *args, **kwargs)
        self._note_applied_in_graph()
        weight, bias, dtype, op = self._oriented_weight(), self._base_bias(), x.dtype, self._op()
        x = self._input_of_op(x, weight.dtype)
        is_autocast = torch.is_autocast_enabled(x.device.type)
        x = x.to(torch.get_autocast_dtype(x.device.type) if is_autocast else weight.dtype)
        bias = bias if bias is None else bias.to(x.dtype)
        branches = [name for name in names if self.training and self._is_regularized(name)]
        folded = [name for name in names if name not in branches]
        # the first update is folded into the base weight; the others are added to the output
        first, others = folded[:1], folded[1:]
        y = self._update_in_graph(x, first[0], op, weight, bias) if first else op(x, weight.to(x.dtype), bias)
        for name in others:
            y = y + self._update_in_graph(x, name, op).to(y.dtype)
        for name in branches:
            dropped = F.dropout(x, self._update_dropout(name), training=True)
            y = y + self._drop_path(self._update_in_graph(dropped, name, op), name).to(y.dtype)
        return y if is_autocast else y.to(dtype)

    def _note_applied_in_graph(self) -> None:
        """Set `is_applied`, except in an exported program, which lacks the attribute."""
        if not torch.compiler.is_exporting():
            self.is_applied = True

    @torch.compiler.disable
    def _forward_outside_graphs(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run `forward` outside compiled graphs."""
        return self.forward(x, *args, **kwargs)

    def _update_in_graph(
        self,
        x: Tensor,
        name: str,
        op: LayerOp,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        shape: torch.Size | None = None,
    ) -> Tensor:
        """Apply the layer op with one update, with or without the base weight."""
        spec, factors, budgets = self._spec(name), self._factors(name), self.snella_budget[name]
        shape = self._oriented_weight().shape if shape is None else shape
        return adapted_layer_in_graph(x, weight, bias, spec, factors, budgets, op, shape)

    # base layer ----------------------------------------------------------------------------------------------------

    def _op(self) -> LayerOp:
        """Return the op of the base layer."""
        raise NotImplementedError

    def _input_of_op(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Prepare the input for the op. Under autocast the op casts it, because a cast here would hide its origin."""
        is_autocast = torch.is_autocast_enabled(x.device.type)
        return self._prepare_input(x if is_autocast else self._cast_input_dtype(x, dtype))

    def _prepare_input(self, x: Tensor) -> Tensor:
        """Apply the base layer's own input transformation, such as padding."""
        return x

    def _op_dtype(self, x: Tensor) -> torch.dtype:
        """Return the compute dtype of a layer with a quantized weight, ignoring autocast."""
        return cast(Quantization, self.quantization).product_dtype(self.get_base_layer(), x.dtype)

    def _base_bias(self) -> Tensor | None:
        """Return the bias of the base layer."""
        base: Any = self.get_base_layer()
        bias: Tensor | None = base.bias
        return bias

    def _weight(self) -> Tensor | LazyWeight:
        """Return the base weight `[m, …]` for the op: a view, or a `LazyWeight` if it is quantized."""
        if self.quantization is None:
            return self._oriented_weight()
        return self.quantization.source(self.get_base_layer())

    def _oriented_weight(self) -> Tensor:
        """Return a view of the unquantized base weight with outputs first, `[m, …]`."""
        base: Any = self.get_base_layer()
        weight: Tensor = base.weight
        return weight

    def _base_layout(self, oriented: Tensor) -> Tensor:
        """Convert a matrix `[m, …]` to the layout of the base layer's weight."""
        return oriented

    def _set_base_weight(self, oriented: Tensor) -> None:
        """Write into the base weight in place, which preserves ties and views."""
        self._oriented_weight().data.copy_(oriented)

    def _matrix_shape(self) -> tuple[int, int]:
        """Return `(m, n)` of the weight as a matrix."""
        shape = self._weight().shape
        return shape[0], shape[1:].numel()

    # adapters ------------------------------------------------------------------------------------------------------

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, torch.dtype | None]:
        """Return the factors' device and dtype; with an 8-bit base weight, the factors are float32."""
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        return device, torch.float32 if dtype is not None and dtype.itemsize == 1 else dtype

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter to the base weight's device; buffers stay in place if the base weight is offloaded."""
        with self.buffers_off_meta():
            super()._move_adapter_to_device_of_base_layer(adapter_name, device)

    @contextmanager
    def buffers_off_meta(self) -> Iterator[None]:
        """Keep budgets, seals and supports in place if a move, e.g. by accelerate, sends them to the meta device."""
        before = [(d, name, d[name]) for d in (self.snella_budget, self.snella_seal, self.snella_support) for name in d]
        yield
        for values, name, buffer in before:
            if values[name].is_meta:
                values[name] = buffer

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation, and release the effective weight cached for evaluation."""
        if mode != self.training:
            self._cache.clear()
            self._restore_budgets()  # a compiled graph reads the buffers directly
        return super().train(mode)

    def clear_cache(self) -> None:
        """Free cached tensors, such as the effective weight in evaluation."""
        self._cache.clear()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from this layer."""
        super().delete_adapter(adapter_name)
        self._specs.pop(adapter_name, None)
        self._cache.clear()

    def drop_adapter(self, adapter_name: str) -> None:
        """Undo `update_layer`; the active adapters do not change."""
        for attribute in (*self.adapter_layer_names, *self.other_param_names):
            if adapter_name in (values := getattr(self, attribute)):
                del values[adapter_name]
        self._specs.pop(adapter_name, None)
        self._cache.clear()

    def update_layer(self, adapter_name: str, config: SnellaConfig, row_counts: tuple[int, ...]) -> None:
        """Add or replace an adapter.

        Args:
            adapter_name: Name of the adapter.
            config: Configuration of the adapter.
            row_counts: Rows of each matrix of the weight; must sum to `m`.
        """
        m, n = self._matrix_shape()
        groups = len(row_counts)
        r = config.rank_of(self.module_name)
        self.snella_A[adapter_name] = nn.Parameter(torch.empty(groups, n, r))
        self.snella_B[adapter_name] = nn.Parameter(torch.empty(m, r))
        frozen = []
        for name in config.make_kernel().scalars:
            if name == "temperature" and not config.learn_temperature:
                continue
            shape = (groups, config.num_pieces) if name == "piece_coeff" else (groups,)
            getattr(self, f"snella_{name}")[adapter_name] = nn.Parameter(torch.empty(shape))
            if name == "piece_coeff" and not config.learn_piece_coeff:
                frozen.append("snella_piece_coeff")
        self.frozen_peft_weight_names = {**self.frozen_peft_weight_names, adapter_name: tuple(frozen)}
        sizes = torch.tensor([rows * n for rows in row_counts])
        self.snella_budget[adapter_name] = sizes - (sizes * config.init_sparsity).long()
        if adapter_name in self.snella_support:
            del self.snella_support[adapter_name]
        if config.fixed_support:
            self.snella_support[adapter_name] = torch.zeros(-(-m * n // 8), dtype=torch.uint8)
            self.snella_budget[adapter_name] = torch.zeros_like(sizes)
        self.seal_budgets(adapter_name)
        self.snella_config[adapter_name] = config
        self.scaling[adapter_name] = config.scaling
        self.row_counts[adapter_name] = row_counts
        with onloaded(self, with_base=True):
            self._init_parameters(adapter_name)
            self._move_adapter_to_device_of_base_layer(adapter_name)
        modes = [parse_weight_gradient(config.weight_gradient) for config in self.snella_config.values()]
        self.linear_op = LinearOp(max(share for share, _ in modes), all(is_rounded for _, is_rounded in modes))
        self._specs.pop(adapter_name, None)
        self._choose_backends()
        self._cache.clear()
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _init_parameters(self, adapter_name: str) -> None:
        """Initialize an adapter; `largest_start` bounds its initial update."""
        factors, rows, config = (
            self._factors(adapter_name),
            self.matrix_rows(adapter_name),
            self.snella_config[adapter_name],
        )
        if factors.A.is_meta:
            return
        init_factors(factors, rows, config.num_pieces, is_larger=not config.init_weights)
        is_quadratic = config.sparsify_mode != "none" and not config.fixed_support
        if config.init_weights and is_quadratic and factors.piece_coeff is not None:
            weight = self._weight()
            weight = weight if isinstance(weight, Tensor) else weight.materialize()
            if not weight.is_meta:
                bound_first_update(factors, rows, config.make_kernel(), weight, self.largest_start)

    def weight_name(self, name: str) -> str:
        """Return the adapted parameter's name in the model without adapters, given this layer's name."""
        return f"{name}.weight"

    def matrix_rows(self, adapter_name: str) -> list[slice]:
        """Return the weight's row slice of each matrix."""
        ends = accumulate(self.row_counts[adapter_name], initial=0)
        return [slice(start, stop) for start, stop in pairwise(ends)]

    def set_budget(self, adapter_name: str, budgets: Iterable[int]) -> None:
        """Set the budget of each matrix, starting with the next forward pass.

        Raises:
            ValueError: If the adapter has a fixed support.
        """
        if adapter_name in self.snella_support:
            raise ValueError(
                f"adapter {adapter_name!r} has a fixed support of {list(self.budgets(adapter_name))} entries in "
                f"{self.module_name!r}, so its budget cannot change; train it without a BudgetAllocator"
            )
        buffer, integers = self.snella_budget[adapter_name], tuple(map(int, budgets))
        buffer.copy_(torch.tensor(integers, dtype=buffer.dtype))
        self._cache.clear()
        self.seal_budgets(adapter_name, integers)

    def set_support(self, adapter_name: str, indices: Tensor) -> None:
        """Set the entries that an adapter with `fixed_support` updates.

        Args:
            adapter_name: The adapter.
            indices: Positions in the flattened weight `[m, …]`, outputs first, integer.

        Raises:
            ValueError: If the adapter has no fixed support, or positions are out of range or repeated.
        """
        if adapter_name not in self.snella_support:
            raise ValueError(
                f"adapter {adapter_name!r} must have a fixed support; create it with SnellaConfig(fixed_support=True)"
            )
        packed = self.snella_support[adapter_name]
        packed.copy_(pack_positions(indices.to(packed.device), self.out_features * self.in_features))
        ends = torch.tensor([rows.stop * self.in_features for rows in self.matrix_rows(adapter_name)])
        below = torch.searchsorted(indices.cpu().long().sort().values, ends)
        self.snella_budget[adapter_name].copy_(below.diff(prepend=below.new_zeros(1)))
        self.seal_budgets(adapter_name)
        self._cache.clear()

    def budgets(self, adapter_name: str) -> tuple[int, ...]:
        """Return the budget of each matrix."""
        return self._cache.budgets(adapter_name, self.snella_budget[adapter_name], self._read_budgets)

    def _read_budgets(self, adapter_name: str) -> tuple[int, ...]:
        """Return the budgets in the buffer; replace averaged ones with the live budgets first."""
        buffer, seals = self.snella_budget[adapter_name], self.snella_seal[adapter_name]
        budgets, stored_seals = torch.stack((buffer, seals.to(buffer.device))).tolist()  # one transfer
        is_sealed = stored_seals == [seal_of(budget) for budget in budgets]
        if is_sealed and not self._cache.is_written_without_seal(adapter_name, buffer, seals):
            self._cache.note_seal(adapter_name, buffer, seals)
            return tuple(budgets)
        buffer.copy_(torch.tensor(self._live_budgets[adapter_name], dtype=buffer.dtype))
        self.seal_budgets(adapter_name)
        return self._live_budgets[adapter_name]

    def _restore_budgets(self) -> None:
        """Replace averaged budgets in the buffers, for code that reads the buffers directly."""
        for name, buffer in self.snella_budget.items():
            if not buffer.is_meta and not self.snella_seal[name].is_meta:
                self._read_budgets(name)

    def seal_budgets(self, adapter_name: str, budgets: tuple[int, ...] | None = None) -> None:
        """Record the buffer's values as the live budgets. Call it after every write to `snella_budget`.

        Args:
            adapter_name: The adapter.
            budgets: The values; read from the device by default.
        """
        buffer = self.snella_budget[adapter_name]
        if buffer.is_meta:
            self.snella_seal[adapter_name] = torch.zeros_like(buffer)
            return
        budgets = tuple(buffer.tolist()) if budgets is None else budgets
        self._live_budgets[adapter_name] = budgets
        seals = torch.tensor([seal_of(budget) for budget in budgets], dtype=buffer.dtype, device=buffer.device)
        self.snella_seal[adapter_name] = seals
        self._cache.note_seal(adapter_name, buffer, seals)
        self._cache.note_budgets(adapter_name, buffer, budgets)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Save the live budgets instead of averaged ones."""
        self._restore_budgets()
        super()._save_to_state_dict(*args, **kwargs)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's scaling to `scale` times the configured one; other adapters do not change."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.snella_config[adapter].scaling
            self._choose_backends()

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of every active adapter by `scale`."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.scaling[adapter] *= scale
        self._choose_backends()

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of every active adapter by `scale`, or reset it to the configured one."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                configured = self.snella_config[adapter].scaling
                self.scaling[adapter] = configured if scale is None else self.scaling[adapter] / scale
        self._choose_backends()

    # specs ---------------------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast the layer."""
        super()._apply(fn, recurse)
        self._choose_backends()
        return self

    def _choose_backends(self) -> None:
        """Update the specs after a change of scaling, device or dtype."""
        for name in self.snella_A:
            if not self.snella_A[name].is_meta:
                self._spec(name)

    def _spec(self, adapter_name: str) -> UpdateSpec:
        """Return an adapter's update spec; created at injection and recreated for another device or dtype."""
        A, entry = self.snella_A[adapter_name], self._specs.get(adapter_name)
        if entry is None or entry[1] != A.device or entry[2] != A.dtype:
            config = self.snella_config[adapter_name]
            spec = UpdateSpec(
                config.make_kernel(), self.row_counts[adapter_name], cast(SparsifyMode, config.sparsify_mode)
            )
            backend, reason = choose_backend(config.impl, spec, A)
            log_backend(backend, reason, str(A.device))
            entry = self._specs[adapter_name] = (replace(spec, backend=backend), A.device, A.dtype)
        spec = entry[0]
        if spec.scaling != self.scaling[adapter_name]:
            spec = replace(spec, scaling=self.scaling[adapter_name])
            self._specs[adapter_name] = (spec, *entry[1:])
        return spec

    def _factors(self, adapter_name: str) -> Factors:
        """Return the factors and scalars of one adapter."""
        modules = self._modules
        tensors: list[Any] = [getattr(modules[name], adapter_name, None) for name in self.adapter_layer_names]
        return Factors(*tensors)

    def _adapter_tensors(self, names: list[str]) -> list[Tensor]:
        """Return all tensors that the updates of these adapters depend on."""
        attributes = [getattr(self, name) for name in self.saved_names]
        return [tensors[name] for name in names for tensors in attributes if name in tensors]

    def _updates(self, names: list[str]) -> tuple[list[Update], list[AdapterState]]:
        """Return the adapters' updates with cached thresholds, and the states that store the thresholds."""
        if len(names) > 1:
            self._check_one_impl(names)
        if not self.training:
            self._check_written(names)
        updates, states = [], []
        for name in names:
            spec, factors, budgets = self._spec(name), self._factors(name), self.budgets(name)
            # Lightning sets `training` without `train()`, after swapping the factors through `.data`
            state = self._cache.adapter(name, factors, budgets, (spec.mode, self.training))
            updates.append(Update(spec, factors, budgets, state.thresholds))
            states.append(state)
        return updates, states

    def get_update(self, adapter_name: str) -> Update:
        """Return one adapter's update."""
        (update,), _ = self._updates([adapter_name])
        return update

    # effective weight ----------------------------------------------------------------------------------------------

    def backend(self, adapter_name: str) -> str:
        """Describe the backend of this adapter's update and the reason for its choice."""
        if adapter_name in self.snella_support:
            return "'eager' (for a fixed support)"
        impl, spec = self.snella_config[adapter_name].impl, self._spec(adapter_name)
        return f"{spec.backend!r} ({choose_backend(impl, spec, self.snella_A[adapter_name])[1]})"

    def backend_name(self, adapter_name: str) -> str:
        """Return the backend of this adapter's update: `"eager"`, `"reference"`, `"numba"` or `"triton"`."""
        return "eager" if adapter_name in self.snella_support else self._spec(adapter_name).backend

    def sparse_updates(self, adapter_name: str) -> list[Tensor]:
        """Return `S` of each matrix of one adapter, `[rows, n]`, without `scaling` and gradient."""
        if adapter_name in self.snella_support:
            total = self._effective(None, [adapter_name], torch.Size(self._matrix_shape())) / self.scaling[adapter_name]
            return [total[rows] for rows in self.matrix_rows(adapter_name)]
        (update,), (state,) = self._updates([adapter_name])
        update = update._replace(spec=replace(update.spec, scaling=1.0))
        total, (state.thresholds,) = compute_effective_weight(None, [update], torch.Size(self._matrix_shape()))
        return [total[rows] for rows in self.matrix_rows(adapter_name)]

    @torch.compiler.disable
    def get_delta_weight(self, adapter: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return `scaling·S` of one adapter in the layout of the base weight.

        Args:
            adapter: The adapter.
            dtype: Dtype of the result; defaults to the factors' dtype. Computed in at least float32.
        """
        with torch.no_grad():
            delta = self._effective(None, [adapter])
        return self._base_layout(delta.to(dtype or self.snella_A[adapter].dtype))

    def _effective(
        self,
        weight: Tensor | LazyWeight | None,
        adapter_names: list[str],
        shape: torch.Size | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Return `W0 + Σ scaling·S` without gradient, bit-identical to the forward pass.

        `dtype` is the dtype of the result if the weight is a `LazyWeight`.
        """
        shape = shape or self._weight().shape
        fixed = [name for name in adapter_names if name in self.snella_support]
        if fixed:
            return self._effective_on_support(weight, adapter_names, fixed, shape, dtype)
        updates, states = self._updates(adapter_names)
        total, thresholds = compute_effective_weight(weight, updates, shape, dtype)
        for state, update_thresholds in zip(states, thresholds, strict=True):
            state.thresholds = update_thresholds
        return total

    @torch.no_grad()
    def _effective_on_support(
        self,
        weight: Tensor | LazyWeight | None,
        names: list[str],
        fixed: list[str],
        shape: torch.Size,
        dtype: torch.dtype,
    ) -> Tensor:
        """`_effective` for adapters of which some have a fixed support."""
        others = [name for name in names if name not in fixed]
        if others:
            total: Tensor | None = self._effective(weight, others, shape)
        else:
            total = weight.materialize_wide() if isinstance(weight, LazyWeight) else weight
        for name in fixed:
            indices = self._cache.positions(name, self.snella_support[name])
            values = merged_entries(self._spec(name), self._factors(name), indices)
            total = fold_entries(values.new_zeros(shape) if total is None else total, values, indices)
        return cast(Tensor, total).to(dtype) if isinstance(weight, LazyWeight) else cast(Tensor, total)

    def _check_written(self, names: list[str]) -> None:
        """Invalidate the caches of evaluation if factors were written without a version change."""
        self._cache.check_written(names, [f for name in names for f in self._factors(name) if f is not None])

    def _cached_weight(self, names: list[str], dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the effective weight without gradient, cached until one of its inputs changes.

        `dtype` is the dtype of the layer op; only a quantized base weight uses it.
        """
        self._check_written(names)
        weight = self._weight()
        settings: tuple[Any, ...] = tuple((name, self.scaling[name]) for name in names)
        base: Any = self.get_base_layer()
        base_tensors: tuple[Tensor, ...] = (base.weight,)
        if isinstance(weight, LazyWeight):
            base_tensors, settings = weight.tensors, (*settings, dtype)
        return self._cache.effective_weight(
            (*base_tensors, *self._adapter_tensors(names)),
            settings,
            lambda: self._effective(weight, names, dtype=dtype),
        )

    def _check_one_impl(self, names: list[str]) -> None:
        """Raise `ValueError` if these adapters have different values of `impl`."""
        impls = {name: self.snella_config[name].impl for name in names}
        if len(set(impls.values())) > 1:
            raise ValueError(f"impl must be the same in all active adapters, got {impls}")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates to the base weight, and keep a copy for a bit-exact `unmerge`.

        A quantized weight is dequantized, updated and requantized, with a warning about the requantization error.

        Args:
            safe_merge: Check that the merged weight is finite before writing it.
            adapter_names: Adapters to merge; defaults to the active ones.

        Raises:
            ValueError: If `safe_merge` finds non-finite values.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.snella_A]
        if not names:
            return
        with torch.no_grad():
            # one sum from the original weight: merging adapters one by one would round at each step
            original = self._original_weight()
            self._check_weight(original)
            merged = self._effective(original, [*self.merged_adapters, *names])
            if safe_merge and not torch.isfinite(merged).all():
                broken = ", ".join(names)
                raise ValueError(f"NaNs detected in the merged weights. The adapter {broken} seems to be broken")
            if isinstance(original, LazyWeight):
                self._quantize(merged, original)
            else:
                self._unmerged_weight = original
                self._set_base_weight(merged)
        self.merged_adapters.extend(names)
        self._cache.clear()

    def refresh(self, adapter_name: str, cache: MergeCache | None = None) -> None:
        """Apply values that were written into an adapter in place, even if it is merged.

        A merged weight is rewritten from the copy that `merge` kept. Rounding errors do not accumulate, and the weight
        stays the same tensor, which compiled graphs require.

        Args:
            adapter_name: The adapter.
            cache: Cache of an earlier call for the same values in this layer.
        """
        self._cache.clear()
        if adapter_name not in self.merged_adapters:
            return
        names, original = list(self.merged_adapters), self._unmerged_weight
        if original is None or len(names) > 1 or adapter_name in self.snella_support:
            self.unmerge()
            self.merge(adapter_names=names)
            return
        update = Update(self._spec(adapter_name), self._factors(adapter_name), self.budgets(adapter_name))
        weight = self._oriented_weight()
        write_effective_weight(original, update, weight, cache)
        if not weight.is_inference():
            torch.autograd.graph.increment_version(weight)  # kernels write without a version change

    def _original_weight(self) -> Tensor | LazyWeight:
        """Return the base weight before any merge: a copy, except for quantized weights, which a merge replaces."""
        if self._unmerged_quantized is not None:
            return self._unmerged_quantized[0]
        if self._unmerged_weight is not None:
            return self._unmerged_weight
        weight = self._weight()
        return weight.detach().clone() if isinstance(weight, Tensor) else weight

    def _quantize(self, merged: Tensor, original: LazyWeight) -> None:
        """Store a merged weight in the quantized base layer and report the requantization error."""
        base, quantization = self.get_base_layer(), cast(Quantization, self.quantization)
        if self._unmerged_quantized is None:
            self._unmerged_quantized = (original, quantization.snapshot(base))
        quantization.write(base, merged)
        stored = quantization.source(base).materialize()
        loss = measure_requantization(self.module_name, quantization.name, original.materialize(), merged, stored)
        report_requantization(loss)

    def unmerge(self) -> None:
        """Restore the base weight, bit for bit, to its state before `merge`."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self._unmerged_weight is not None:
            self._set_base_weight(self._unmerged_weight)
        if self._unmerged_quantized is not None and self.quantization is not None:
            self.quantization.restore(self.get_base_layer(), self._unmerged_quantized[1])
        self._unmerged_weight = self._unmerged_quantized = None
        self.merged_adapters.clear()
        self._cache.clear()

    @property
    def weight(self) -> Tensor:
        """Differentiable weight with the updates of all active adapters, for models that read it directly.

        A quantized base weight is returned without updates. `F.linear` of this weight is computed like a call of the
        layer. For any other operation, dropout and drop-path do not act on the update, and the weight is saved for the
        backward pass.
        """
        names = self._names_in_use()
        base: Tensor = super().weight
        if not names or self.quantization is not None:
            return base
        if torch.compiler.is_compiling():
            return self._base_layout(self._read_in_graph(names))
        refuse_tracing(self.module_name)
        multiply = None if base.ndim != 2 or isinstance(self.get_base_layer(), Conv1D) else self._multiply_read
        return EffectiveWeight.of(base, lambda: self._base_layout(self._read(names)), multiply)

    def _multiply_read(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """Return `F.linear` of an input and the read weight in training or with gradients, otherwise `None`."""
        names = self._names_in_use()
        if not names or not (self.training or self._needs_gradients(names)):
            return None
        weight = self._oriented_weight()
        self._check_weight(weight)
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            return None  # torch raises its own error
        self.__dict__["is_applied"] = True
        return self._apply_learning(x, weight, names, bias)

    def _read(self, names: list[str]) -> Tensor:
        """Return `W0 + Σ scaling·S`, `[m, …]`; cached in evaluation without gradients, like in a forward pass."""
        self._check_weight(self._weight())
        self.__dict__["is_applied"] = True
        if not self._needs_gradients(names):
            return self._effective(self._weight(), names) if self.training else self._cached_weight(names)
        if any(self._is_regularized(name) for name in names) and self.training:
            self.snella_config[names[0]].watch.on_weight_read(self.module_name)
        self._cache.release_effective_weight()
        weight = self._oriented_weight()
        with torch.autocast(weight.device.type, enabled=False):
            if any(name in self.snella_support for name in names):
                return fold_entries(weight, *self._entries(names))
            return self._apply_updates(weight.new_empty(0), weight, None, names, WeightOp())

    def _read_in_graph(self, names: list[str]) -> Tensor:
        """`_read` for `torch.compile`: a product with the identity, which the compiler removes if unused."""
        if any(name in self.snella_support for name in names):
            return torch.compiler.disable(self._read)(names)
        self._note_applied_in_graph()
        weight = self._oriented_weight()
        matrix = weight.reshape(weight.shape[0], -1)
        with torch.autocast(weight.device.type, enabled=False):
            identity = torch.eye(matrix.shape[1], dtype=weight.dtype, device=weight.device)
            total = self._update_in_graph(identity, names[0], LINEAR, matrix, shape=matrix.shape)
            for name in names[1:]:
                y = self._update_in_graph(identity, name, LINEAR, shape=matrix.shape)
                total = total + y.to(total.dtype)
        return total.T.reshape(weight.shape)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return whether PEFT's `convert_to_lora` supports this layer; it supports only linear layers."""
        return False


class Linear(SnellaLayer):
    """Adapted linear layer, or transformers' `Conv1D`, which stores its weight transposed."""

    @property
    def is_transposed(self) -> bool:
        """True if the base weight is stored as `[in, out]`."""
        return isinstance(self.get_base_layer(), Conv1D)

    def _oriented_weight(self) -> Tensor:
        base: Any = self.get_base_layer()
        weight: Tensor = base.weight
        return weight.T if isinstance(base, Conv1D) else weight

    def _base_layout(self, oriented: Tensor) -> Tensor:
        return oriented.T if self.is_transposed else oriented

    def _op(self) -> LayerOp:
        return self.linear_op

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return True: the update adds to a linear layer's weight, and a low-rank fit can approximate it."""
        return True

    def __repr__(self) -> str:
        return "snella." + super().__repr__()


class Conv2d(SnellaLayer):
    """Adapted 2D convolution; its weight `[m, c/groups, kh, kw]` is viewed as `[m, c/groups·kh·kw]`."""

    # convolutions mostly have rectified inputs, whose mean accumulates over the update's mostly positive entries
    largest_start = 0.002

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # reject unsupported padding before the backward pass
        self._op().padding_sizes(self._oriented_weight().shape)

    def _op(self) -> Conv2dOp:
        base = cast(nn.Conv2d, self.get_base_layer())
        padding = base.padding if base.padding_mode == "zeros" else (0, 0)
        return Conv2dOp(base.stride, padding, base.dilation, base.groups)

    def _prepare_input(self, x: Tensor) -> Tensor:
        base = cast(nn.Conv2d, self.get_base_layer())
        if base.padding_mode == "zeros":
            return x
        return F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)

    def __repr__(self) -> str:
        return "snella." + super().__repr__()


def _seal_all_budgets(layer: SnellaLayer, _: Any) -> None:
    """`load_state_dict` hook: seal the loaded budgets."""
    for name in layer.snella_budget:
        layer.seal_budgets(name)


def refuse_tracing(module_name: str) -> None:
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


@lru_cache(maxsize=64)
def log_backend(backend: str, reason: str, device: str) -> None:
    """Log once which backend computes the updates on a device."""
    logger.info("updates on %r use backend %r (%s)", device, backend, reason)


__all__ = ["Conv2d", "Linear", "SnellaLayer"]
