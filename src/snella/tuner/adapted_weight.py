"""The weight of a layer with the updates of its adapters: computed, remembered, merged into the base and taken out."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor

from snella.ops.backends import choose_backend
from snella.ops.fixed_support import fold_entries, merged_entries
from snella.ops.functional import effective_weight_of
from snella.ops.kernels import KernelScalars, make_kernel
from snella.ops.sparsify import SparsifyMode
from snella.ops.spec import Update, WeightSource
from snella.tuner.adapters import AdapterHolder
from snella.tuner.merge_loss import measure_loss, report
from snella.tuner.quantized import Quantization

_SCALARS = ("piece_coeff", "alpha", "beta", "temperature")


class AdaptedWeight(AdapterHolder):
    """The effective weight `W0 + Σ scaling·S` of a layer, and merging."""

    def _update(self, adapter_name: str) -> Update:
        """The op's description of one adapter; thresholds are shared between calls while nothing changes."""
        update = self._described(adapter_name)
        update.budgets = self.budgets(adapter_name)
        self._cache.share(adapter_name, update)
        return update

    def _described(self, adapter_name: str) -> Update:
        """The op's description of one adapter, without its budgets and thresholds."""
        config = self.snella_config[adapter_name]
        kernel = make_kernel(
            config.kernel,
            num_pieces=config.num_pieces,
            softmax_dim=config.softmax_dim,
            center_softmax=config.center_softmax,
        )
        scalars = [getattr(self, f"snella_{name}") for name in _SCALARS]
        return Update(
            A=self.snella_A[adapter_name],
            B=self.snella_B[adapter_name],
            scalars=KernelScalars(*(values.get(adapter_name) for values in scalars)),
            kernel=kernel,
            budgets=(),
            row_counts=self.row_counts[adapter_name],
            scaling=self.scaling[adapter_name],
            mode=cast(SparsifyMode, config.sparsify_mode),
        )

    def _effective(
        self,
        weight: Tensor | WeightSource | None,
        adapter_names: list[str],
        shape: torch.Size | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """`W0 + Σ scaling·S`, without gradient; the same bits that the forward pass uses.

        `dtype` is the result's where the weight is a `WeightSource`.
        """
        shape = shape or self._weight().shape
        fixed = [name for name in adapter_names if name in self.snella_support]
        if fixed:
            return self._effective_on_support(weight, adapter_names, fixed, shape, dtype)
        updates = [self._update(name) for name in adapter_names]
        return effective_weight_of(weight, updates, shape, self._common_impl(adapter_names), dtype)

    @torch.no_grad()
    def _effective_on_support(
        self,
        weight: Tensor | WeightSource | None,
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
            total = weight.make_wide() if isinstance(weight, WeightSource) else weight
        for name in fixed:
            indices = self._cache.positions(name, self.snella_support[name])
            values = merged_entries(self._update(name), indices)
            total = fold_entries(values.new_zeros(shape) if total is None else total, values, indices)
        return cast(Tensor, total).to(dtype) if isinstance(weight, WeightSource) else cast(Tensor, total)

    def backend(self, adapter_name: str) -> str:
        """Which implementation computes this adapter's update, and why."""
        if adapter_name in self.snella_support:
            return "'eager' (for a fixed support)"
        impl = self.snella_config[adapter_name].impl
        if impl == "reference":
            return "'reference' (as asked for)"
        chosen, reason = choose_backend(impl, self._update(adapter_name))
        return f"{chosen.name!r} ({reason})"

    def sparse_updates(self, adapter_name: str) -> list[Tensor]:
        """`S` of each matrix of one adapter, `[rows, n]`, without `scaling` and gradient."""
        if adapter_name in self.snella_support:
            whole = self._effective(None, [adapter_name], torch.Size(self._matrix_shape())) / self.scaling[adapter_name]
            return [whole[rows] for rows in self.matrix_rows(adapter_name)]
        update = replace(self._update(adapter_name), scaling=1.0)
        whole = effective_weight_of(
            None, [update], torch.Size(self._matrix_shape()), self.snella_config[adapter_name].impl
        )
        return [whole[rows] for rows in self.matrix_rows(adapter_name)]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return `scaling·S` of one adapter in the layout of the base weight."""
        with torch.no_grad():
            delta = self._effective(None, [adapter])
        return self._base_layout(delta)

    def _base_layout(self, oriented: Tensor) -> Tensor:
        """Turn a matrix `[m, …]` into the layout of the base layer's own weight."""
        return oriented

    def _set_base_weight(self, oriented: Tensor) -> None:
        """Write into the base weight, in place, so that ties and views stay."""
        self._oriented_weight().data.copy_(oriented)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates to the base weight. A copy of the weight is kept, so that `unmerge` restores every bit.

        A quantised weight is dequantised, added to and quantised again, with a warning that says what that lost.

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
            merged = self._effective(original, [*self.merged_adapters, *names])
            if safe_merge and not torch.isfinite(merged).all():
                broken = ", ".join(names)
                raise ValueError(f"NaNs detected in the merged weights. The adapter {broken} seems to be broken")
            if isinstance(original, WeightSource):
                self._quantise(merged, original)
            else:
                self._unmerged_weight = original
                self._set_base_weight(merged)
        self.merged_adapters.extend(names)
        self._cache.clear()

    def _original_weight(self) -> Tensor | WeightSource:
        """The base weight before any merge; a copy, unless it is quantised and will be replaced instead of changed."""
        if self._unmerged_quantized is not None:
            return self._unmerged_quantized[0]
        if self._unmerged_weight is not None:
            return self._unmerged_weight
        weight = self._weight()
        return weight.detach().clone() if isinstance(weight, Tensor) else weight

    def _quantise(self, merged: Tensor, original: WeightSource) -> None:
        """Store a sum in the quantised base layer, and say what of it is lost."""
        base, quantization = self.get_base_layer(), cast(Quantization, self.quantization)
        if self._unmerged_quantized is None:
            self._unmerged_quantized = (original, quantization.snapshot(base))
        quantization.write(base, merged)
        stored = quantization.source(base).make()
        report(measure_loss(self.module_name, quantization.name, original.make(), merged, stored))

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

    def _weight_in_evaluation(self, names: list[str], dtype: torch.dtype) -> Tensor | WeightSource:
        """The effective weight without gradient: remembered, unless the base weight is quantised.

        Whoever quantises a model has no room for its matrices in evaluation either. They are then made in each pass
        and let go; with `keep_delta` they are remembered.
        """
        weight = self._weight()
        if isinstance(weight, Tensor) or any(self.snella_config[name].keep_delta for name in names):
            return self._remembered_weight(names, dtype)
        self._cache.drop_effective_weight()
        made_of = (*weight.tensors, *(tensor for name in names for tensor in self._tensors(name)))
        return WeightSource(weight.shape, made_of, lambda: self._effective(weight, names, dtype=dtype))

    def _remembered_weight(self, names: list[str], dtype: torch.dtype = torch.float32) -> Tensor:
        """The effective weight without gradient, computed once for the present state of everything it is made of.

        `dtype` is that of the product, which decides for a quantised base weight.
        """
        weight = self._weight()
        settings: tuple[Any, ...] = tuple((name, self.scaling[name]) for name in names)
        of_base: tuple[Tensor, ...] = (self._base_tensor("weight"),)
        if isinstance(weight, WeightSource):
            of_base, settings = weight.tensors, (*settings, dtype)
        return self._cache.effective_weight(
            (*of_base, *(tensor for name in names for tensor in self._tensors(name))),
            settings,
            lambda: self._effective(weight, names, dtype=dtype),
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


__all__ = ["AdaptedWeight"]
