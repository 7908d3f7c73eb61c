"""The weight of a layer with the updates of its adapters: computed, remembered, merged into the base and taken out."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any, Self, cast

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor

from snella.ops.backends import choose_backend
from snella.ops.fixed_support import fold_entries, merged_entries
from snella.ops.functional import adapted_layer, compute_effective_weight
from snella.ops.kernels import make_kernel
from snella.ops.sparsify import SparsifyMode
from snella.ops.spec import Factors, LayerOp, LazyWeight, Update, UpdateSpec
from snella.tuner.adapters import AdapterHolder
from snella.tuner.effective import AdapterState
from snella.tuner.merge_loss import measure_loss, report
from snella.tuner.quantized import Quantization

logger = logging.getLogger(__name__)
_SCALARS = ("piece_coeff", "alpha", "beta", "temperature")


@lru_cache(maxsize=64)
def log_backend(backend: str, reason: str, device: str) -> None:
    """Say once what computes updates on a device."""
    logger.info("updates on %r are computed by %r (%s)", device, backend, reason)


class AdaptedWeight(AdapterHolder):
    """The effective weight `W0 + Σ scaling·S` of a layer, and merging."""

    def get_update(self, adapter_name: str) -> Update:
        """One adapter's update as `snella.ops` takes it."""
        (update,), _ = self._updates([adapter_name])
        return update

    def _updates(self, names: list[str]) -> tuple[list[Update], list[AdapterState]]:
        """The adapters' updates, with thresholds where they are known, and the states in which to store them."""
        updates, states = [], []
        for name in names:
            spec, factors, budgets = self._spec(name), self._factors(name), self.budgets(name)
            state = self._cache.adapter(name, factors, budgets, spec.mode)
            updates.append(Update(spec, factors, budgets, state.thresholds))
            states.append(state)
        return updates, states

    def _apply_updates(
        self, x: Tensor, weight: Tensor | LazyWeight | None, bias: Tensor | None, names: list[str], op: LayerOp
    ) -> Tensor:
        """The layer op with these adapters' updates, whose thresholds are kept while nothing changes."""
        updates, states = self._updates(names)
        y, thresholds = adapted_layer(
            x,
            weight,
            bias,
            updates,
            op,
            weight_shape=self._weight().shape,
            cache_delta=any(self.snella_config[name].keep_delta for name in names),
            recompute=states[0].recompute if states else None,
        )
        for state, found in zip(states, thresholds, strict=True):
            state.thresholds = found
        return y

    def _factors(self, adapter_name: str) -> Factors:
        """Factors and scalars of one adapter."""
        scalars = [getattr(self, f"snella_{name}").get(adapter_name) for name in _SCALARS]
        return Factors(self.snella_A[adapter_name], self.snella_B[adapter_name], *scalars)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast the layer."""
        super()._apply(fn, recurse)
        self._choose_backends()
        return self

    def _choose_backends(self) -> None:
        for name in self.snella_A:
            if not self.snella_A[name].is_meta:
                self._spec(name)

    def _spec(self, adapter_name: str) -> UpdateSpec:
        """How the update of one adapter is computed; made at injection, and again for another device or dtype."""
        A, known = self.snella_A[adapter_name], self._specs.get(adapter_name)
        if known is None or known[1] != A.device or known[2] != A.dtype:
            config = self.snella_config[adapter_name]
            kernel = make_kernel(
                config.kernel,
                num_pieces=config.num_pieces,
                softmax_dim=config.softmax_dim,
                center_softmax=config.center_softmax,
            )
            spec = UpdateSpec(kernel, self.row_counts[adapter_name], cast(SparsifyMode, config.sparsify_mode))
            backend, reason = choose_backend(config.impl, spec, A)
            log_backend(backend, reason, str(A.device))
            known = self._specs[adapter_name] = (replace(spec, backend=backend), A.device, A.dtype)
        spec = known[0]
        if spec.scaling != self.scaling[adapter_name]:
            spec = replace(spec, scaling=self.scaling[adapter_name])
            self._specs[adapter_name] = (spec, *known[1:])
        return spec

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
        self._check_one_impl(adapter_names)
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
            if isinstance(original, LazyWeight):
                self._quantise(merged, original)
            else:
                self._unmerged_weight = original
                self._set_base_weight(merged)
        self.merged_adapters.extend(names)
        self._cache.clear()

    def _original_weight(self) -> Tensor | LazyWeight:
        """The base weight before any merge; a copy, unless it is quantised and will be replaced instead of changed."""
        if self._unmerged_quantized is not None:
            return self._unmerged_quantized[0]
        if self._unmerged_weight is not None:
            return self._unmerged_weight
        weight = self._weight()
        return weight.detach().clone() if isinstance(weight, Tensor) else weight

    def _quantise(self, merged: Tensor, original: LazyWeight) -> None:
        """Store a sum in the quantised base layer, and say what of it is lost."""
        base, quantization = self.get_base_layer(), cast(Quantization, self.quantization)
        if self._unmerged_quantized is None:
            self._unmerged_quantized = (original, quantization.snapshot(base))
        quantization.write(base, merged)
        stored = quantization.source(base).materialize()
        report(measure_loss(self.module_name, quantization.name, original.materialize(), merged, stored))

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

    def _weight_in_evaluation(self, names: list[str], dtype: torch.dtype) -> Tensor | LazyWeight:
        """The effective weight without gradient: remembered, unless the base weight is quantised.

        Whoever quantises a model has no room for its matrices in evaluation either. They are then made in each pass
        and let go; with `keep_delta` they are remembered.
        """
        weight = self._weight()
        if isinstance(weight, Tensor) or any(self.snella_config[name].keep_delta for name in names):
            return self._remembered_weight(names, dtype)
        self._cache.drop_effective_weight()
        made_of = (*weight.tensors, *(tensor for name in names for tensor in self._tensors(name)))
        return LazyWeight(weight.shape, made_of, lambda: self._effective(weight, names, dtype=dtype))

    def _remembered_weight(self, names: list[str], dtype: torch.dtype = torch.float32) -> Tensor:
        """The effective weight without gradient, computed once for the present state of everything it is made of.

        `dtype` is that of the product, which decides for a quantised base weight.
        """
        weight = self._weight()
        settings: tuple[Any, ...] = tuple((name, self.scaling[name]) for name in names)
        of_base: tuple[Tensor, ...] = (self._base_tensor("weight"),)
        if isinstance(weight, LazyWeight):
            of_base, settings = weight.tensors, (*settings, dtype)
        return self._cache.effective_weight(
            (*of_base, *(tensor for name in names for tensor in self._tensors(name))),
            settings,
            lambda: self._effective(weight, names, dtype=dtype),
        )

    def _check_one_impl(self, names: list[str]) -> None:
        """Raise `ValueError` where these adapters ask for different implementations."""
        impls = {name: self.snella_config[name].impl for name in names}
        if len(set(impls.values())) > 1:
            raise ValueError(f"impl must be the same in all active adapters, got {impls}")

    def _needs_gradients(self, names: list[str]) -> bool:
        """Whether autograd will ask for gradients of anything that the effective weight is made of."""
        weight = self._base_tensor("weight")
        return torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (weight, *(tensor for name in names for tensor in self._tensors(name)))
        )


__all__ = ["AdaptedWeight"]
