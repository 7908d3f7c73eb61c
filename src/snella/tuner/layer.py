"""The layers that carry sparse updates: `Linear` (also for transformers' `Conv1D`) and `Conv2d`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from snella.ops.adapted_linear import (
    Conv2dProduct,
    LinearProduct,
    Product,
    Update,
    adapted_product,
    choose_backend,
    effective_weight_of,
)
from snella.ops.kernels import KernelScalars, make_kernel
from snella.ops.sparsify import SparsifyMode

from .config import SnellaConfig
from .effective import EffectiveWeightCache

_SCALARS = ("piece_coeff", "alpha", "beta", "temperature")
_FIRST_VALUES = {"alpha": 1.0, "beta": 0.0, "temperature": 1.0}
_PIECE_COEFF = 0.1


class SnellaLayer(nn.Module, BaseTunerLayer):
    """Factors, scalars, budgets and the cache of one adapted weight, for any number of adapters.

    A weight `[m, …]` is seen as `G` matrices one above the other (3 in a fused qkv layer). Every adapter has `snella_A`
    `[G, n, r]`, `snella_B` `[m, r]`, the kernel's scalars `[G]` or `[G, P]`, and `snella_budget` `[G]`, which is saved
    with the adapter so that a reloaded one keeps exactly the same weights.
    """

    adapter_layer_names = (
        "snella_A",
        "snella_B",
        "snella_piece_coeff",
        "snella_alpha",
        "snella_beta",
        "snella_temperature",
    )
    other_param_names = ("snella_budget", "snella_config", "scaling", "row_counts")

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
        self.snella_config: dict[str, SnellaConfig] = {}
        self.scaling: dict[str, float] = {}
        self.row_counts: dict[str, tuple[int, ...]] = {}
        self.merged_adapters: list[str] = []
        self.frozen_peft_weight_names = {}
        self._disable_adapters = False
        self._cache = EffectiveWeightCache()
        self._unmerged_weight: Tensor | None = None
        self.out_features, self.in_features = self._matrix_shape()
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, row_counts)

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation; the weight computed for evaluation is let go."""
        if mode != self.training:
            self._cache.clear()
        return super().train(mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from this layer."""
        super().delete_adapter(adapter_name)
        self._cache.clear()

    # what differs between layer types ------------------------------------------------------------------------------

    def _matrix_shape(self) -> tuple[int, int]:
        """`(m, n)` of the weight seen as a matrix."""
        weight = self._oriented_weight()
        return weight.shape[0], weight.shape[1:].numel()

    def _oriented_weight(self) -> Tensor:
        """The base weight with its outputs first, `[m, …]`; a view that shares memory with it."""
        return self._base_tensor("weight")

    def _base_tensor(self, name: str) -> Tensor:
        """A parameter of the base layer."""
        tensor: Tensor = getattr(self.get_base_layer(), name)
        return tensor

    def _product(self) -> Product:
        """The product of the base layer."""
        raise NotImplementedError

    def _prepare_input(self, x: Tensor) -> Tensor:
        """What the base layer does to its input before the product."""
        return x

    # adapters ------------------------------------------------------------------------------------------------------

    def update_layer(self, adapter_name: str, config: SnellaConfig, row_counts: tuple[int, ...]) -> None:
        """Give the layer one more adapter, or replace it.

        Args:
            adapter_name: Its name.
            config: Its settings.
            row_counts: Rows of each matrix of the weight; they sum to `m`.
        """
        m, n = self._matrix_shape()
        groups = len(row_counts)
        kernel = make_kernel(config.kernel, num_pieces=config.num_pieces)
        self.snella_A[adapter_name] = nn.Parameter(torch.empty(groups, n, config.r))
        self.snella_B[adapter_name] = nn.Parameter(torch.empty(m, config.r))
        frozen = []
        for name in kernel.scalars:
            if name == "temperature" and not config.learn_temperature:
                continue
            shape = (groups, config.num_pieces) if name == "piece_coeff" else (groups,)
            getattr(self, f"snella_{name}")[adapter_name] = nn.Parameter(torch.empty(shape))
            if name == "piece_coeff" and not config.learn_piece_coeff:
                frozen.append("snella_piece_coeff")
        self.frozen_peft_weight_names = {**self.frozen_peft_weight_names, adapter_name: tuple(frozen)}
        sizes = torch.tensor([rows * n for rows in row_counts])
        self.snella_budget[adapter_name] = sizes - (sizes * config.init_sparsity).long()
        self.snella_config[adapter_name] = config
        self.scaling[adapter_name] = config.scaling
        self.row_counts[adapter_name] = row_counts
        self._reset_parameters(adapter_name, larger=not config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self._cache.clear()
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _reset_parameters(self, adapter_name: str, larger: bool = False) -> None:
        """Draw the factors uniformly from `±1/√(n·r/P)` (A) and `±1/√(rows·r/P)` (B); `larger` from `±1`."""
        A, B = self.snella_A[adapter_name], self.snella_B[adapter_name]
        if A.device.type == "meta":
            return
        config = self.snella_config[adapter_name]
        width = max(config.r // config.num_pieces, 1)
        with torch.no_grad():
            for group, rows in enumerate(self.matrix_rows(adapter_name)):
                for factor, fan in ((A[group], A.shape[1] * width), (B[rows], (rows.stop - rows.start) * width)):
                    factor.uniform_(-1, 1).mul_(1.0 if larger else fan**-0.5)
            for name, value in _FIRST_VALUES.items():
                if adapter_name in getattr(self, f"snella_{name}"):
                    getattr(self, f"snella_{name}")[adapter_name].fill_(value)
            if adapter_name in self.snella_piece_coeff:
                coeff = self.snella_piece_coeff[adapter_name]
                coeff.copy_(_PIECE_COEFF * (-1.0) ** torch.arange(coeff.shape[1]))

    def matrix_rows(self, adapter_name: str) -> list[slice]:
        """Rows of the weight that each matrix occupies."""
        ends = accumulate(self.row_counts[adapter_name], initial=0)
        return [slice(start, stop) for start, stop in pairwise(ends)]

    def set_budget(self, adapter_name: str, budgets: Iterable[int]) -> None:
        """Let each matrix keep that many entries, from the next forward pass on."""
        buffer = self.snella_budget[adapter_name]
        buffer.copy_(torch.tensor(list(budgets), dtype=buffer.dtype))
        self._cache.clear()

    def budgets(self, adapter_name: str) -> tuple[int, ...]:
        """Entries that each matrix may keep."""
        return self._cache.integers(adapter_name, self.snella_budget[adapter_name])

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the factor before the update to `scale` times the configured one; other adapters stay as they are."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.snella_config[adapter].scaling

    def scale_layer(self, scale: float) -> None:
        """Multiply the factor before the update of every active adapter by `scale`."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the factors by `scale`, or return to the configured ones."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                configured = self.snella_config[adapter].scaling
                self.scaling[adapter] = configured if scale is None else self.scaling[adapter] / scale

    # the update ----------------------------------------------------------------------------------------------------

    def _update(self, adapter_name: str) -> Update:
        """The op's description of one adapter; thresholds are shared between calls while nothing changes."""
        config = self.snella_config[adapter_name]
        kernel = make_kernel(
            config.kernel,
            num_pieces=config.num_pieces,
            softmax_dim=config.softmax_dim,
            center_softmax=config.center_softmax,
        )
        scalars = {name: getattr(self, f"snella_{name}") for name in _SCALARS}
        update = Update(
            A=self.snella_A[adapter_name],
            B=self.snella_B[adapter_name],
            scalars=KernelScalars(**{name: values.get(adapter_name) for name, values in scalars.items()}),
            kernel=kernel,
            budgets=self.budgets(adapter_name),
            row_counts=self.row_counts[adapter_name],
            scaling=self.scaling[adapter_name],
            mode=cast(SparsifyMode, config.sparsify_mode),
        )
        update.thresholds = self._cache.thresholds(adapter_name, update)
        return update

    def _effective(self, weight: Tensor | None, adapter_names: list[str], shape: torch.Size | None = None) -> Tensor:
        """`W0 + Σ scaling·S`, without gradient; the same bits that the forward pass uses."""
        updates = [self._update(name) for name in adapter_names]
        shape = shape or self._oriented_weight().shape
        return effective_weight_of(weight, updates, shape, self._common_impl(adapter_names))

    def backend(self, adapter_name: str) -> str:
        """Which implementation computes this adapter's update, and why."""
        impl = self.snella_config[adapter_name].impl
        if impl == "reference":
            return "'reference' (as asked for)"
        chosen, reason = choose_backend(impl, self._update(adapter_name))
        return f"{chosen.name!r} ({reason})"

    def sparse_updates(self, adapter_name: str) -> list[Tensor]:
        """`S` of each matrix of one adapter, `[rows, n]`, without `scaling` and gradient."""
        update = replace(self._update(adapter_name), scaling=1.0)
        whole = effective_weight_of(
            None, [update], torch.Size(self._matrix_shape()), self.snella_config[adapter_name].impl
        )
        return [whole[rows] for rows in self.matrix_rows(adapter_name)]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return `scaling·S` of one adapter in the layout of the base weight."""
        with torch.no_grad():
            delta = self._effective(None, [adapter], self._oriented_weight().shape)
        return self._base_layout(delta)

    def _base_layout(self, oriented: Tensor) -> Tensor:
        """Turn a matrix `[m, …]` into the layout of the base layer's own weight."""
        return oriented

    def _set_base_weight(self, oriented: Tensor) -> None:
        """Write into the base weight, in place, so that ties and views stay."""
        self._oriented_weight().data.copy_(oriented)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates to the base weight. A copy of the weight is kept, so that `unmerge` restores every bit.

        Args:
            safe_merge: Look at the result first and refuse one that is not finite.
            adapter_names: Adapters to merge, default the active ones.

        Raises:
            ValueError: `safe_merge` found a value that is not finite.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.snella_A]
        if not names:
            return
        weight = self._oriented_weight()
        with torch.no_grad():
            # one sum from the untouched weight: merging one after the other would round at each step
            original = weight.detach().clone() if self._unmerged_weight is None else self._unmerged_weight
            merged = self._effective(original, [*self.merged_adapters, *names])
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {names} seems to be broken")
            self._unmerged_weight = original
            self._set_base_weight(merged)
        self.merged_adapters.extend(names)
        self._cache.clear()

    def unmerge(self) -> None:
        """Restore the base weight to the bits it had before `merge`."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self._unmerged_weight is not None:
            self._set_base_weight(self._unmerged_weight)
        self._unmerged_weight = None
        self.merged_adapters.clear()
        self._cache.clear()

    # forward -------------------------------------------------------------------------------------------------------

    # what is remembered between calls depends on addresses and versions of tensors, which a compiled graph cannot see
    @torch.compiler.disable
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the base layer with the updates of all active adapters."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        names = [name for name in self.active_adapters if name in self.snella_A]
        if self.merged or not names:
            return self.base_layer(x, *args, **kwargs)
        if self.training and torch.is_grad_enabled():
            self._observe_training(names)
        branches = [name for name in names if self.training and self._is_regularised(name)]
        folded = [name for name in names if name not in branches]
        dtype = x.dtype
        x = self._prepare_input(self._cast_input_dtype(x, self._oriented_weight().dtype))
        y = self._folded(x, folded)
        for name in branches:
            y = y + self._branch(x, name).to(y.dtype)
        return y if torch.is_autocast_enabled(x.device.type) else y.to(dtype)

    def _observe_training(self, names: list[str]) -> None:
        """Let the watch of each adapter that is to become sparser know that it is being trained."""
        for name in names:
            config = self.snella_config[name]
            if config.target_sparsity > config.init_sparsity and self.snella_A[name].requires_grad:
                config.watch.observe_training(config.target_sparsity)

    def _folded(self, x: Tensor, names: list[str]) -> Tensor:
        """Base layer and updates in one product; evaluation computes the effective weight once."""
        weight, bias, product = self._oriented_weight(), self._base_tensor("bias"), self._product()
        if names and not self.training and not self._needs_gradients(names):
            effective = self._cache.effective_weight(
                (self._base_tensor("weight"), *(tensor for name in names for tensor in self._tensors(name))),
                tuple((name, self.scaling[name]) for name in names),
                lambda: self._effective(weight, names),
            )
            return adapted_product(x, effective, bias, [], product)
        self._cache.drop_effective_weight()
        return adapted_product(
            x,
            weight,
            bias,
            [self._update(name) for name in names],
            product,
            impl=self._common_impl(names),
            keep_delta=any(self.snella_config[name].keep_delta for name in names),
        )

    def _common_impl(self, names: list[str]) -> str:
        """The implementation that these adapters ask for.

        Raises:
            ValueError: They ask for different ones.
        """
        wanted = {name: self.snella_config[name].impl for name in names}
        if len(set(wanted.values())) > 1:
            raise ValueError(f"impl must be the same in all active adapters, got {wanted}")
        return next(iter(wanted.values()), "auto")

    def _needs_gradients(self, names: list[str]) -> bool:
        """Whether autograd will ask for gradients of anything that the effective weight is made of."""
        weight = self._base_tensor("weight")
        return torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (weight, *(tensor for name in names for tensor in self._tensors(name)))
        )

    def _branch(self, x: Tensor, name: str) -> Tensor:
        """The update alone, with dropout on its input and drop-path on its output."""
        config = self.snella_config[name]
        x = F.dropout(x, self._update_dropout(name), training=True)
        y = adapted_product(
            x,
            None,
            None,
            [self._update(name)],
            self._product(),
            weight_shape=self._oriented_weight().shape,
            impl=config.impl,
            keep_delta=config.keep_delta,
        )
        rate = config.update_drop_path or 0.0
        if rate == 0:
            return y
        keep = torch.rand((y.shape[0],) + (1,) * (y.ndim - 1), device=y.device) >= rate
        return y * keep.to(y.dtype) / (1 - rate)

    def _is_regularised(self, name: str) -> bool:
        """Whether dropout or drop-path acts on this adapter's update, so that it cannot be folded."""
        return bool(self._update_dropout(name) or self.snella_config[name].update_drop_path)

    def _update_dropout(self, name: str) -> float:
        """Dropout on the update's input in this very layer."""
        config = self.snella_config[name]
        excluded = any(
            self.module_name == s or self.module_name.endswith(f".{s}") for s in config.dropout_exclude or []
        )
        return 0.0 if excluded else config.update_dropout or 0.0

    def _tensors(self, name: str) -> list[Tensor]:
        """Every tensor that the update of `name` depends on."""
        attrs = [*(getattr(self, attr) for attr in self.adapter_layer_names), self.snella_budget]
        return [attr[name] for attr in attrs if name in attr]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """The update is a plain addition to the weight, which a low-rank fit can approximate."""
        return True


class Linear(SnellaLayer):
    """A linear layer, or transformers' `Conv1D`, which stores its weight transposed."""

    @property
    def is_transposed(self) -> bool:
        """Whether the base weight is stored as `[in, out]`."""
        return isinstance(self.get_base_layer(), Conv1D)

    def _oriented_weight(self) -> Tensor:
        weight = self._base_tensor("weight")
        return weight.T if self.is_transposed else weight

    def _base_layout(self, oriented: Tensor) -> Tensor:
        return oriented.T if self.is_transposed else oriented

    def _product(self) -> Product:
        return LinearProduct()

    def __repr__(self) -> str:
        return "snella." + super().__repr__()


class Conv2d(SnellaLayer):
    """A two-dimensional convolution, its weight `[m, c/groups, kh, kw]` seen as `[m, c/groups·kh·kw]`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # refuse here what the backward pass could not do
        self._product().padding_sizes(self._oriented_weight().shape)

    def _product(self) -> Conv2dProduct:
        base = cast(nn.Conv2d, self.get_base_layer())
        padding = base.padding if base.padding_mode == "zeros" else (0, 0)
        return Conv2dProduct(base.stride, padding, base.dilation, base.groups)

    def _prepare_input(self, x: Tensor) -> Tensor:
        base = cast(nn.Conv2d, self.get_base_layer())
        if base.padding_mode == "zeros":
            return x
        return F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)

    def __repr__(self) -> str:
        return "snella." + super().__repr__()


__all__ = ["Conv2d", "Linear", "SnellaLayer"]
