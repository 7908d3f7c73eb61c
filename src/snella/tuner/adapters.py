"""What a layer holds for each of its adapters: factors, scalars, budgets and fixed supports."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate, pairwise
from typing import Any, Self

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from snella.ops.kernels import KernelScalars, make_kernel
from snella.ops.spec import LayerOp, LazyWeight, UpdateSpec
from snella.tuner.config import SnellaConfig
from snella.tuner.effective import EffectiveWeightCache
from snella.tuner.quantized import find_quantization
from snella.tuner.support import pack_positions

_FIRST_VALUES = {"alpha": 1.0, "beta": 0.0, "temperature": 1.0}
_PIECE_COEFF = 0.1
_START_SAMPLE = 64  # rows or columns that tell the size of the first update: its factors are drawn independently
_LEAST_START = 0.1  # of the paper's start, so that weights near zero keep an update that can grow


class AdapterHolder(nn.Module, BaseTunerLayer):
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
    largest_start = 0.15
    """Bound of `√n · rms(S) / rms(W0)` for the first update `S`: more than the layers of a ViT or Swin start with."""

    other_param_names = ("snella_budget", "snella_support", "snella_config", "scaling", "row_counts")

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
        self.snella_support = BufferDict({}, persistent=True)
        self.snella_config: dict[str, SnellaConfig] = {}
        self.scaling: dict[str, float] = {}
        self.row_counts: dict[str, tuple[int, ...]] = {}
        self.merged_adapters: list[str] = []
        self.frozen_peft_weight_names = {}
        self._disable_adapters = False
        self._specs: dict[str, tuple[UpdateSpec, torch.device, torch.dtype]] = {}
        self._cache = EffectiveWeightCache()
        self._unmerged_weight: Tensor | None = None
        self._unmerged_quantized: tuple[LazyWeight, Any] | None = None
        self.quantization = find_quantization(base_layer, module_name)
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
        self._specs.pop(adapter_name, None)
        self._cache.clear()

    def drop_adapter(self, adapter_name: str) -> None:
        """Let go of what `update_layer` gave; which adapters are active stays as it is."""
        for attribute in (*self.adapter_layer_names, *self.other_param_names):
            if adapter_name in (values := getattr(self, attribute)):
                del values[adapter_name]
        self._cache.clear()

    # what differs between layer types ------------------------------------------------------------------------------

    def _matrix_shape(self) -> tuple[int, int]:
        """`(m, n)` of the weight seen as a matrix."""
        shape = self._weight().shape
        return shape[0], shape[1:].numel()

    def _oriented_weight(self) -> Tensor:
        """The base weight, not quantised, with its outputs first, `[m, …]`; a view that shares memory with it."""
        return self._base_tensor("weight")

    def _weight(self) -> Tensor | LazyWeight:
        """The base weight `[m, …]` as the op takes it: a view, or where it comes from if it is quantised."""
        if self.quantization is None:
            return self._oriented_weight()
        return self.quantization.source(self.get_base_layer())

    def _base_tensor(self, name: str) -> Tensor:
        """A parameter of the base layer."""
        tensor: Tensor = getattr(self.get_base_layer(), name)
        return tensor

    def _product(self) -> LayerOp:
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
        r = config.rank_of(self.module_name)
        self.snella_A[adapter_name] = nn.Parameter(torch.empty(groups, n, r))
        self.snella_B[adapter_name] = nn.Parameter(torch.empty(m, r))
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
        if adapter_name in self.snella_support:
            del self.snella_support[adapter_name]
        if config.fixed_support:
            self.snella_support[adapter_name] = torch.zeros(-(-m * n // 8), dtype=torch.uint8)
            self.snella_budget[adapter_name] = torch.zeros_like(sizes)
        self.snella_config[adapter_name] = config
        self.scaling[adapter_name] = config.scaling
        self.row_counts[adapter_name] = row_counts
        self._reset_parameters(adapter_name, larger=not config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self._specs.pop(adapter_name, None)
        self._choose_backends()
        self._cache.clear()
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _choose_backends(self) -> None:
        """Choose what computes the updates, where device or dtype of the factors is another than before."""
        raise NotImplementedError

    def _reset_parameters(self, adapter_name: str, larger: bool = False) -> None:
        """Draw the factors uniformly from `±1/√(n·r/P)` (A) and `±1/√(rows·r/P)` (B); `larger` from `±1`.

        Factors and `α` are smaller where the update would be large beside the weight, see `largest_start`.
        """
        A, B = self.snella_A[adapter_name], self.snella_B[adapter_name]
        if A.device.type == "meta":
            return
        config = self.snella_config[adapter_name]
        width = max(A.shape[-1] // config.num_pieces, 1)
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
            if not larger:
                self._bound_start(adapter_name)

    @torch.no_grad()
    def _bound_start(self, adapter_name: str) -> None:
        """Shrink an update that is quadratic in `ΔW`, and with it in factors and `α`, to `largest_start`.

        The softmax adds up to 1 over the `m` outputs, so that `S` starts near `1/m²`: large where a layer is narrow.
        """
        config, A, B = self.snella_config[adapter_name], self.snella_A[adapter_name], self.snella_B[adapter_name]
        weight = self._weight()
        weight = weight if isinstance(weight, Tensor) else weight.materialize()
        kernel = make_kernel(
            config.kernel,
            num_pieces=config.num_pieces,
            softmax_dim=config.softmax_dim,
            center_softmax=config.center_softmax,
        )
        is_quadratic = config.sparsify_mode != "none" and not config.fixed_support
        if weight.is_meta or not is_quadratic or "piece_coeff" not in kernel.scalars:
            return
        values = [getattr(self, f"snella_{name}").get(adapter_name) for name in KernelScalars._fields]
        columns, outputs = (_START_SAMPLE, None) if config.softmax_dim == 0 else (None, _START_SAMPLE)
        for group, rows in enumerate(self.matrix_rows(adapter_name)):
            scalars = KernelScalars(*(value if value is None else value[group] for value in values))
            delta = kernel.merge(A[group][:columns], B[rows][:outputs], scalars)
            base = weight[rows].float().square().mean().sqrt()
            start = float(A.shape[1] ** 0.5 * delta.square().square().mean().sqrt().to(base.device) / base)
            if self.largest_start < start < float("inf"):
                shrink = max((self.largest_start / start) ** 0.5, _LEAST_START)
                for tensor in (A[group], B[rows], *(value[group] for value in values[1:2] if value is not None)):
                    tensor.mul_(shrink)

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
        buffer = self.snella_budget[adapter_name]
        buffer.copy_(torch.tensor(list(budgets), dtype=buffer.dtype))
        self._cache.clear()

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

    def _tensors(self, name: str) -> list[Tensor]:
        """Every tensor that the update of `name` depends on."""
        buffers = (self.snella_budget, self.snella_support)
        attrs = [*(getattr(self, attr) for attr in self.adapter_layer_names), *buffers]
        return [attr[name] for attr in attrs if name in attr]


__all__ = ["AdapterHolder"]
