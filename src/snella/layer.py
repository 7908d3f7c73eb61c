"""`SnellaLayer`, `Linear` and `Conv2d`: a layer whose weight carries sparse updates."""

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
    """One adapted weight and its layer op, for any number of adapters.

        y = op(x, W0 + Σ scaling·S) + bias

    Base layer and updates are folded into one op; an update with dropout on its input or drop-path on its output is a
    branch of its own in training. A weight `[m, …]` is seen as `G` matrices one above the other (3 in a fused qkv
    layer). Every adapter has `snella_A` `[G, n, r]`, `snella_B` `[m, r]`, the kernel's scalars `[G]` or `[G, P]`, and
    `snella_budget` `[G]`, which is saved with the adapter so that a reloaded one keeps exactly the same weights.

    Averages of models may average their buffers too (`AveragedModel(use_buffers=True)`, timm's `ModelEmaV2`). A mean of
    budgets does not fit its `snella_seal` `[G]`, and the budgets that were last set replace it.
    """

    adapter_layer_names = tuple(f"snella_{name}" for name in Factors._fields)
    largest_start = 0.15
    """Bound of `√n · rms(S) / rms(W0)` for the first update `S`: more than the layers of a ViT or Swin start with."""

    is_applied = False
    """Whether a forward pass, or a model that read the weight, has used an update since the layer was adapted."""

    other_param_names = ("snella_budget", "snella_seal", "snella_support", "snella_config", "scaling", "row_counts")
    saved_names = (*adapter_layer_names, "snella_budget", "snella_support")
    """Parameters and buffers of an adapter, as its file has them."""

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
        # `has_hooks` written out: a call less in every pass
        if base is not None and (
            "forward" in base.__dict__ or base._forward_hooks or base._forward_pre_hooks or base._backward_hooks
        ):
            return self._inside_hooks(base, names, x, *args, **kwargs)
        return self._with_updates(x, self._weight(), names)

    def _inside_hooks(self, base: nn.Module, names: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`_with_updates` inside the hooks of the base layer, which may bring its weight for this call alone."""
        used: list[Any] = []

        def forward(x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
            weight: Any = base.weight
            used[:] = [weight, weight.dtype, weight.device]
            own = self._weight()
            if isinstance(own, Tensor) and not own.requires_grad:
                own = own.detach()  # for the backward pass: a hook may give the parameter other data afterwards
            with onloaded(self, with_base=False):
                return self._with_updates(x, own, names)

        y: Tensor = call_inside_hooks(base, forward, x, *args, **kwargs)
        weight: Any = base.weight
        if weight is not used[0] or [weight.dtype, weight.device] != used[1:]:
            self._cache.clear()  # or the effective weight would stay where the base weight must not
        return y

    def _with_updates(self, x: Tensor, weight: Tensor | LazyWeight, names: list[str]) -> Tensor:
        """The layer op with the updates of these adapters."""
        self.__dict__["is_applied"] = True  # not by setattr, which is a call in every pass
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
        """The error that says that the base weight is not there, or of a dtype that cannot be added to."""
        if dtype.itemsize == 1:
            return NotImplementedError(
                f"the weight of {self.module_name!r} is {dtype}, to which no update can be added; merge before "
                "enable_layerwise_casting, which widens weights in forward passes alone, or load the model in bfloat16"
            )
        return NotImplementedError(
            f"the weight of {self.module_name!r} is on the meta device when it is used; load it, or offload it by "
            "accelerate.cpu_offload or a device_map, whose hooks bring it when the layer is called"
        )

    def _check_weight(self, weight: Tensor | LazyWeight) -> None:
        """Refuse a base weight to which no update can be added."""
        if isinstance(weight, Tensor) and (weight.dtype.itemsize == 1 or weight.is_meta):
            raise self._unusable_weight(weight.dtype)

    def _names_in_use(self) -> list[str]:
        """The active adapters, none where they are disabled or merged; a layer that is both is unmerged."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in self.snella_A]

    def _without_updates(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer as it is."""
        if self.quantization is None or self.quantization.is_safe_to_apply(self.get_base_layer()):
            return self.base_layer(x, *args, **kwargs)
        wide = self._input_of_op(x, self._op_dtype(x))
        y, _ = adapted_layer(wide, self._weight(), self._base_bias(), [], self._op())
        return y if torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)

    def _apply_cached(self, x: Tensor, weight: Tensor | LazyWeight, names: list[str]) -> Tensor:
        """The layer op with the effective weight, which evaluation caches unless the base is quantized.

        Whoever quantizes a model has no room for its matrices in evaluation either. They are then recomputed in each
        pass and released; with `cache_delta` they are cached.
        """
        is_autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if is_autocast else x.dtype
        if isinstance(weight, Tensor) or any([self.snella_config[name].cache_delta for name in names]):
            effective: Tensor | LazyWeight = self._cached_weight(names, dtype)
        else:
            self._cache.release_effective_weight()
            made_of = (*weight.tensors, *self._adapter_tensors(names))
            effective = LazyWeight(weight.shape, made_of, lambda: self._effective(weight, names, dtype=dtype))
        return adapted_layer(x, effective, self._base_bias(), [], self._op())[0]

    def _apply_learning(self, x: Tensor, weight: Tensor | LazyWeight, names: list[str], bias: Tensor | None) -> Tensor:
        """Base layer and updates in one op, differentiable; in training, regularized updates are branches."""
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
        """The op with these adapters' updates, whose thresholds are cached while nothing changes."""
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
        for state, found in zip(states, thresholds, strict=True):
            state.thresholds = found
        return y

    def _apply_entries(self, x: Tensor, weight: Tensor | LazyWeight, bias: Tensor | None, names: list[str]) -> Tensor:
        """Base layer and the update of one adapter with a fixed support."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        elif isinstance(weight, Tensor):
            x = x.to(weight.dtype)
        values, indices = self._entries(names)
        return layer_with_entries(x, weight, bias if bias is None else bias.to(x.dtype), values, indices, self._op())

    def _entries(self, names: list[str]) -> tuple[Tensor, Tensor]:
        """Values and positions of the one adapter with a fixed support.

        Raises:
            NotImplementedError: Other adapters are active besides it.
        """
        if len(names) > 1:
            raise NotImplementedError(
                f"adapters {names} cannot be trained together, as the support of "
                f"{[name for name in names if name in self.snella_support]} is fixed; activate one"
            )
        indices = self._cache.positions(names[0], self.snella_support[names[0]])
        return merged_entries(self._spec(names[0]), self._factors(names[0]), indices), indices

    def _drop_path(self, y: Tensor, name: str) -> Tensor:
        """Leave the update out for whole samples, and scale the others up."""
        rate = self.snella_config[name].update_drop_path or 0.0
        if rate == 0:
            return y
        keep = torch.rand((y.shape[0],) + (1,) * (y.ndim - 1), device=y.device) >= rate
        return y * keep.to(y.dtype) / (1 - rate)

    def _is_regularized(self, name: str) -> bool:
        """Whether dropout or drop-path acts on this adapter's update, so that it cannot be folded."""
        config = self.snella_config[name]
        return bool(config.update_drop_path or (config.update_dropout and self._update_dropout(name)))

    def _update_dropout(self, name: str) -> float:
        """Dropout on the update's input in this very layer."""
        config = self.snella_config[name]
        excluded = any(
            self.module_name == s or self.module_name.endswith(f".{s}") for s in config.dropout_exclude or []
        )
        return 0.0 if excluded else config.update_dropout or 0.0

    def _needs_gradients(self, names: list[str]) -> bool:
        """Whether autograd will ask for gradients of anything that the effective weight is made of."""
        if not torch.is_grad_enabled():
            return False
        tensors = [self.get_base_layer().weight, *self._adapter_tensors(names)]
        return any([tensor.requires_grad for tensor in tensors])

    def _forward_in_graph(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`forward` for `torch.compile`: nothing is cached between calls, since a graph cannot see what changed."""
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
        # the first folded update goes into the base weight, and the others come on top
        first, others = folded[:1], folded[1:]
        y = self._update_in_graph(x, first[0], op, weight, bias) if first else op(x, weight.to(x.dtype), bias)
        for name in others:
            y = y + self._update_in_graph(x, name, op).to(y.dtype)
        for name in branches:
            dropped = F.dropout(x, self._update_dropout(name), training=True)
            y = y + self._drop_path(self._update_in_graph(dropped, name, op), name).to(y.dtype)
        return y if is_autocast else y.to(dtype)

    def _note_applied_in_graph(self) -> None:
        """Set `is_applied`; an exported program has no such attribute to set."""
        if not torch.compiler.is_exporting():
            self.is_applied = True

    @torch.compiler.disable
    def _forward_outside_graphs(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`forward`, of which a graph sees nothing."""
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
        """The layer op with one update, and the base weight or without it."""
        spec, factors, budgets = self._spec(name), self._factors(name), self.snella_budget[name]
        shape = self._oriented_weight().shape if shape is None else shape
        return adapted_layer_in_graph(x, weight, bias, spec, factors, budgets, op, shape)

    # the base layer ------------------------------------------------------------------------------------------------

    def _op(self) -> LayerOp:
        """The op of the base layer."""
        raise NotImplementedError

    def _input_of_op(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The input as the op takes it; under autocast that casts it itself, once, and knows how it was computed."""
        is_autocast = torch.is_autocast_enabled(x.device.type)
        return self._prepare_input(x if is_autocast else self._cast_input_dtype(x, dtype))

    def _prepare_input(self, x: Tensor) -> Tensor:
        """What the base layer does to its input before the op."""
        return x

    def _op_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype that a layer with a quantized weight computes in, autocast aside."""
        return cast(Quantization, self.quantization).product_dtype(self.get_base_layer(), x.dtype)

    def _base_bias(self) -> Tensor | None:
        """The bias of the base layer."""
        base: Any = self.get_base_layer()
        bias: Tensor | None = base.bias
        return bias

    def _weight(self) -> Tensor | LazyWeight:
        """The base weight `[m, …]` as the op takes it: a view, or where it comes from if it is quantized."""
        if self.quantization is None:
            return self._oriented_weight()
        return self.quantization.source(self.get_base_layer())

    def _oriented_weight(self) -> Tensor:
        """The base weight, not quantized, with its outputs first, `[m, …]`; a view that shares memory with it."""
        base: Any = self.get_base_layer()
        weight: Tensor = base.weight
        return weight

    def _base_layout(self, oriented: Tensor) -> Tensor:
        """Turn a matrix `[m, …]` into the layout of the base layer's own weight."""
        return oriented

    def _set_base_weight(self, oriented: Tensor) -> None:
        """Write into the base weight, in place, so that ties and views stay."""
        self._oriented_weight().data.copy_(oriented)

    def _matrix_shape(self) -> tuple[int, int]:
        """`(m, n)` of the weight seen as a matrix."""
        shape = self._weight().shape
        return shape[0], shape[1:].numel()

    # adapters ------------------------------------------------------------------------------------------------------

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, torch.dtype | None]:
        """Where the factors go, and in which dtype; one of eight bits is a base weight's alone."""
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        return device, torch.float32 if dtype is not None and dtype.itemsize == 1 else dtype

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter to the base weight, its buffers only where that is not offloaded."""
        with self.buffers_off_meta():
            super()._move_adapter_to_device_of_base_layer(adapter_name, device)

    @contextmanager
    def buffers_off_meta(self) -> Iterator[None]:
        """Keep budgets, seals and supports in place if a move sends them to the meta device, as accelerate's does."""
        before = [(d, name, d[name]) for d in (self.snella_budget, self.snella_seal, self.snella_support) for name in d]
        yield
        for values, name, buffer in before:
            if values[name].is_meta:
                values[name] = buffer

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation; the weight cached for evaluation is released."""
        if mode != self.training:
            self._cache.clear()
            self._restore_budgets()  # a compiled graph reads the buffers itself
        return super().train(mode)

    def clear_cache(self) -> None:
        """Let go of what is kept while nothing changes, such as the effective weight of evaluation."""
        self._cache.clear()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from this layer."""
        super().delete_adapter(adapter_name)
        self._specs.pop(adapter_name, None)
        self._cache.clear()

    def drop_adapter(self, adapter_name: str) -> None:
        """Drop what `update_layer` gave; which adapters are active stays as it is."""
        for attribute in (*self.adapter_layer_names, *self.other_param_names):
            if adapter_name in (values := getattr(self, attribute)):
                del values[adapter_name]
        self._specs.pop(adapter_name, None)
        self._cache.clear()

    def update_layer(self, adapter_name: str, config: SnellaConfig, row_counts: tuple[int, ...]) -> None:
        """Give the layer one more adapter, or replace it.

        Args:
            adapter_name: Its name.
            config: Its settings.
            row_counts: Rows of each matrix of the weight; they sum to `m`.
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
        wanted = [parse_weight_gradient(config.weight_gradient) for config in self.snella_config.values()]
        self.linear_op = LinearOp(max(share for share, _ in wanted), all(is_rounded for _, is_rounded in wanted))
        self._specs.pop(adapter_name, None)
        self._choose_backends()
        self._cache.clear()
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _init_parameters(self, adapter_name: str) -> None:
        """Draw an adapter's first values, with an update at most as large as `largest_start` says."""
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
        """Name of the adapted parameter in the model without adapters, where this layer is called `name`."""
        return f"{name}.weight"

    def matrix_rows(self, adapter_name: str) -> list[slice]:
        """Rows of the weight that each matrix occupies."""
        ends = accumulate(self.row_counts[adapter_name], initial=0)
        return [slice(start, stop) for start, stop in pairwise(ends)]

    def set_budget(self, adapter_name: str, budgets: Iterable[int]) -> None:
        """Let each matrix keep that many entries, from the next forward pass on.

        Raises:
            ValueError: The adapter's support is fixed, and with it how many entries it has.
        """
        if adapter_name in self.snella_support:
            raise ValueError(
                f"adapter {adapter_name!r} has a fixed support of {list(self.budgets(adapter_name))} entries in "
                f"{self.module_name!r}, which no budget can change; train it without a BudgetAllocator"
            )
        buffer, integers = self.snella_budget[adapter_name], tuple(map(int, budgets))
        buffer.copy_(torch.tensor(integers, dtype=buffer.dtype))
        self._cache.clear()
        self.seal_budgets(adapter_name, integers)

    def set_support(self, adapter_name: str, indices: Tensor) -> None:
        """Say which entries an adapter with `fixed_support` may change.

        Args:
            adapter_name: The adapter.
            indices: Positions in the weight `[m, …]` as it is seen here, outputs first, flattened; integer.

        Raises:
            ValueError: The adapter's entries compete, or positions are out of range or repeated.
        """
        if adapter_name not in self.snella_support:
            raise ValueError(
                f"adapter {adapter_name!r} lets its entries compete; make it with SnellaConfig(fixed_support=True)"
            )
        packed = self.snella_support[adapter_name]
        packed.copy_(pack_positions(indices.to(packed.device), self.out_features * self.in_features))
        ends = torch.tensor([rows.stop * self.in_features for rows in self.matrix_rows(adapter_name)])
        below = torch.searchsorted(indices.cpu().long().sort().values, ends)
        self.snella_budget[adapter_name].copy_(below.diff(prepend=below.new_zeros(1)))
        self.seal_budgets(adapter_name)
        self._cache.clear()

    def budgets(self, adapter_name: str) -> tuple[int, ...]:
        """Entries that each matrix may keep."""
        return self._cache.budgets(adapter_name, self.snella_budget[adapter_name], self._read_budgets)

    def _read_budgets(self, adapter_name: str) -> tuple[int, ...]:
        """The budgets in the buffer, after the live ones have replaced averages."""
        buffer, seals = self.snella_budget[adapter_name], self.snella_seal[adapter_name]
        budgets, found = torch.stack((buffer, seals.to(buffer.device))).tolist()  # one transfer
        is_sealed = found == [seal_of(budget) for budget in budgets]
        if is_sealed and not self._cache.is_written_without_seal(adapter_name, buffer, seals):
            self._cache.note_seal(adapter_name, buffer, seals)
            return tuple(budgets)
        buffer.copy_(torch.tensor(self._live_budgets[adapter_name], dtype=buffer.dtype))
        self.seal_budgets(adapter_name)
        return self._live_budgets[adapter_name]

    def _restore_budgets(self) -> None:
        """Replace averages of budgets in the buffers, for those who read these themselves."""
        for name, buffer in self.snella_budget.items():
            if not buffer.is_meta and not self.snella_seal[name].is_meta:
                self._read_budgets(name)

    def seal_budgets(self, adapter_name: str, budgets: tuple[int, ...] | None = None) -> None:
        """Record the buffer's values as the live budgets. Call it after every write to `snella_budget`.

        Args:
            adapter_name: The adapter.
            budgets: The values, which are read from the device if not given.
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
        """Save budgets, not averages of them."""
        self._restore_budgets()
        super()._save_to_state_dict(*args, **kwargs)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the factor before the update to `scale` times the configured one; other adapters stay as they are."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.snella_config[adapter].scaling
            self._choose_backends()

    def scale_layer(self, scale: float) -> None:
        """Multiply the factor before the update of every active adapter by `scale`."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.scaling[adapter] *= scale
        self._choose_backends()

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the factors by `scale`, or return to the configured ones."""
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
        """Make the specs, where scaling, device or dtype of the factors is another than before."""
        for name in self.snella_A:
            if not self.snella_A[name].is_meta:
                self._spec(name)

    def _spec(self, adapter_name: str) -> UpdateSpec:
        """How the update of one adapter is computed; made at injection, and again for another device or dtype."""
        A, known = self.snella_A[adapter_name], self._specs.get(adapter_name)
        if known is None or known[1] != A.device or known[2] != A.dtype:
            config = self.snella_config[adapter_name]
            spec = UpdateSpec(
                config.make_kernel(), self.row_counts[adapter_name], cast(SparsifyMode, config.sparsify_mode)
            )
            backend, reason = choose_backend(config.impl, spec, A)
            log_backend(backend, reason, str(A.device))
            known = self._specs[adapter_name] = (replace(spec, backend=backend), A.device, A.dtype)
        spec = known[0]
        if spec.scaling != self.scaling[adapter_name]:
            spec = replace(spec, scaling=self.scaling[adapter_name])
            self._specs[adapter_name] = (spec, *known[1:])
        return spec

    def _factors(self, adapter_name: str) -> Factors:
        """Factors and scalars of one adapter."""
        modules = self._modules
        tensors: list[Any] = [getattr(modules[name], adapter_name, None) for name in self.adapter_layer_names]
        return Factors(*tensors)

    def _adapter_tensors(self, names: list[str]) -> list[Tensor]:
        """Every tensor that the updates of these adapters depend on."""
        attributes = [getattr(self, name) for name in self.saved_names]
        return [tensors[name] for name in names for tensors in attributes if name in tensors]

    def _updates(self, names: list[str]) -> tuple[list[Update], list[AdapterState]]:
        """The adapters' updates, with thresholds where they are known, and the states in which to store them."""
        if len(names) > 1:
            self._check_one_impl(names)
        if not self.training:
            self._check_written(names)
        updates, states = [], []
        for name in names:
            spec, factors, budgets = self._spec(name), self._factors(name), self.budgets(name)
            # Lightning sets `training` without `train()`, after it has exchanged the factors through `.data`
            state = self._cache.adapter(name, factors, budgets, (spec.mode, self.training))
            updates.append(Update(spec, factors, budgets, state.thresholds))
            states.append(state)
        return updates, states

    def get_update(self, adapter_name: str) -> Update:
        """One adapter's update as `snella` takes it."""
        (update,), _ = self._updates([adapter_name])
        return update

    # the effective weight ------------------------------------------------------------------------------------------

    def backend(self, adapter_name: str) -> str:
        """Which implementation computes this adapter's update, and why."""
        if adapter_name in self.snella_support:
            return "'eager' (for a fixed support)"
        impl, spec = self.snella_config[adapter_name].impl, self._spec(adapter_name)
        return f"{spec.backend!r} ({choose_backend(impl, spec, self.snella_A[adapter_name])[1]})"

    def backend_name(self, adapter_name: str) -> str:
        """Which backend computes this adapter's update: `"eager"`, `"reference"`, `"numba"` or `"triton"`."""
        return "eager" if adapter_name in self.snella_support else self._spec(adapter_name).backend

    def sparse_updates(self, adapter_name: str) -> list[Tensor]:
        """`S` of each matrix of one adapter, `[rows, n]`, without `scaling` and gradient."""
        if adapter_name in self.snella_support:
            whole = self._effective(None, [adapter_name], torch.Size(self._matrix_shape())) / self.scaling[adapter_name]
            return [whole[rows] for rows in self.matrix_rows(adapter_name)]
        (update,), (state,) = self._updates([adapter_name])
        update = update._replace(spec=replace(update.spec, scaling=1.0))
        whole, (state.thresholds,) = compute_effective_weight(None, [update], torch.Size(self._matrix_shape()))
        return [whole[rows] for rows in self.matrix_rows(adapter_name)]

    @torch.compiler.disable
    def get_delta_weight(self, adapter: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return `scaling·S` of one adapter in the layout of the base weight.

        Args:
            adapter: The adapter.
            dtype: Dtype of the result, default that of the factors; it is computed in at least float32.
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
        """`W0 + Σ scaling·S`, without gradient; the same bits that the forward pass uses.

        `dtype` is the result's where the weight is a `LazyWeight`.
        """
        shape = shape or self._weight().shape
        fixed = [name for name in adapter_names if name in self.snella_support]
        if fixed:
            return self._effective_on_support(weight, adapter_names, fixed, shape, dtype)
        updates, states = self._updates(adapter_names)
        total, thresholds = compute_effective_weight(weight, updates, shape, dtype)
        for state, found in zip(states, thresholds, strict=True):
            state.thresholds = found
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
        """The same where the support of some adapters is fixed."""
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
        """Drop what evaluation caches where factors were written past torch."""
        self._cache.check_written(names, [f for name in names for f in self._factors(name) if f is not None])

    def _cached_weight(self, names: list[str], dtype: torch.dtype = torch.float32) -> Tensor:
        """The effective weight without gradient, computed once for the present state of everything it is made of.

        `dtype` is that of the layer op, which decides for a quantized base weight.
        """
        self._check_written(names)
        weight = self._weight()
        settings: tuple[Any, ...] = tuple((name, self.scaling[name]) for name in names)
        base: Any = self.get_base_layer()
        of_base: tuple[Tensor, ...] = (base.weight,)
        if isinstance(weight, LazyWeight):
            of_base, settings = weight.tensors, (*settings, dtype)
        return self._cache.effective_weight(
            (*of_base, *self._adapter_tensors(names)),
            settings,
            lambda: self._effective(weight, names, dtype=dtype),
        )

    def _check_one_impl(self, names: list[str]) -> None:
        """Raise `ValueError` where these adapters ask for different implementations."""
        impls = {name: self.snella_config[name].impl for name in names}
        if len(set(impls.values())) > 1:
            raise ValueError(f"impl must be the same in all active adapters, got {impls}")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates to the base weight. A copy of the weight is kept, so that `unmerge` restores every bit.

        A quantized weight is dequantized, added to and quantized again, with a warning that says what that lost.

        Args:
            safe_merge: Look at the result first and refuse one that is not finite.
            adapter_names: Adapters to merge, default the active ones.

        Raises:
            ValueError: `safe_merge` found a value that is not finite.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.snella_A]
        if not names:
            return
        with torch.no_grad():
            # one sum from the untouched weight: merging one after the other would round at each step
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
        """Let values that were written into an adapter in place take effect, also where it is merged.

        A merged weight is written anew from the copy that `merge` kept: no rounding adds up, and the weight stays the
        same tensor that a compiled graph computes with.

        Args:
            adapter_name: The adapter.
            cache: Of these very values in this layer, from an earlier call.
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
            torch.autograd.graph.increment_version(weight)  # kernels write past torch

    def _original_weight(self) -> Tensor | LazyWeight:
        """The base weight before any merge; a copy, unless it is quantized and will be replaced instead of changed."""
        if self._unmerged_quantized is not None:
            return self._unmerged_quantized[0]
        if self._unmerged_weight is not None:
            return self._unmerged_weight
        weight = self._weight()
        return weight.detach().clone() if isinstance(weight, Tensor) else weight

    def _quantize(self, merged: Tensor, original: LazyWeight) -> None:
        """Store a sum in the quantized base layer, and say what of it is lost."""
        base, quantization = self.get_base_layer(), cast(Quantization, self.quantization)
        if self._unmerged_quantized is None:
            self._unmerged_quantized = (original, quantization.snapshot(base))
        quantization.write(base, merged)
        stored = quantization.source(base).materialize()
        loss = measure_requantization(self.module_name, quantization.name, original.materialize(), merged, stored)
        report_requantization(loss)

    def unmerge(self) -> None:
        """Restore the base weight to the bits it had before `merge`."""
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
        """The weight with the updates of all active adapters, differentiable, for models that read it themselves.

        Base weight where it is quantized. `F.linear` of it is computed as a call of the layer is; elsewhere dropout and
        drop-path do not act on an update that is read, and the weight is kept for the backward pass.
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
        """`F.linear` of an input and the weight that is read, in training or with gradients; `None` elsewhere."""
        names = self._names_in_use()
        if not names or not (self.training or self._needs_gradients(names)):
            return None
        weight = self._oriented_weight()
        self._check_weight(weight)
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            return None  # torch's own error
        self.__dict__["is_applied"] = True
        return self._apply_learning(x, weight, names, bias)

    def _read(self, names: list[str]) -> Tensor:
        """`W0 + Σ scaling·S`, `[m, …]`; cached in evaluation without gradients, as for a forward pass."""
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
        """The same for `torch.compile`: the product with the identity, which the compiler drops where it is unused."""
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
        """Whether PEFT's `convert_to_lora` can fit the update: only of linear layers, the kind that it knows."""
        return False


class Linear(SnellaLayer):
    """A linear layer, or transformers' `Conv1D`, which stores its weight transposed."""

    @property
    def is_transposed(self) -> bool:
        """Whether the base weight is stored as `[in, out]`."""
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
        """The update is a plain addition to the weight of a linear layer, which a low-rank fit can approximate."""
        return True

    def __repr__(self) -> str:
        return "snella." + super().__repr__()


class Conv2d(SnellaLayer):
    """A two-dimensional convolution, its weight `[m, c/groups, kh, kw]` seen as `[m, c/groups·kh·kw]`."""

    # convolutions mostly see rectified inputs, whose mean adds up over the update's mostly positive entries
    largest_start = 0.002

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # refuse here what the backward pass could not do
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
    """Refuse what can neither record nor transform the way an update is merged and differentiated.

    Raises:
        NotImplementedError: `torch.jit.trace`, and with it ONNX's TorchScript exporter, or a `torch.func` transform.
    """
    if torch.jit.is_tracing():
        raise NotImplementedError(
            f"torch.jit.trace (and torch.onnx.export with dynamo=False) cannot record the update of {module_name!r}; "
            "trace model.merge_and_unload(), which gives the same outputs"
        )
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            f"torch.func (grad, vmap, jvp, …) cannot transform the update of {module_name!r}, whose backward pass is "
            "written by hand; use torch.autograd.grad, or model.merge_and_unload() where no factor is differentiated"
        )


@lru_cache(maxsize=64)
def log_backend(backend: str, reason: str, device: str) -> None:
    """Say once what computes updates on a device."""
    logger.info("updates on %r are computed by %r (%s)", device, backend, reason)


__all__ = ["Conv2d", "Linear", "SnellaLayer"]
