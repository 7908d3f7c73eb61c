"""Updates with a fixed support: selected entries of a merged matrix, and a layer op that applies them.

A layer without such an adapter never enters this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from snella.backends.base import store_gradients, zero_gradients
from snella.budgets import seal_budgets
from snella.cache import pack_positions
from snella.update import Factors, LayerOp, LazyWeight, Update, UpdateSpec, without_view

if TYPE_CHECKING:
    from snella.layer import SnellaLayer


def set_support(layer: SnellaLayer, adapter_name: str, indices: Tensor) -> None:
    """Set the entries that an adapter with `fixed_support` updates.

    Args:
        layer: The layer.
        adapter_name: The adapter.
        indices: Positions in the flattened weight `[m, …]`, outputs first, integer.

    Raises:
        ValueError: If the adapter has no fixed support, or positions are out of range or repeated.
    """
    if adapter_name not in layer.snella_support:
        raise ValueError(
            f"adapter {adapter_name!r} must have a fixed support; create it with SnellaConfig(fixed_support=True)"
        )
    packed = layer.snella_support[adapter_name]
    packed.copy_(pack_positions(indices.to(packed.device), layer.out_features * layer.in_features))
    ends = torch.tensor([rows.stop * layer.in_features for rows in layer.matrix_rows(adapter_name)])
    below = torch.searchsorted(indices.cpu().long().sort().values, ends)
    counts = below.diff(prepend=below.new_zeros(1))
    layer.snella_budget[adapter_name].copy_(counts)
    seal_budgets(layer, adapter_name, tuple(counts.tolist()))
    layer.clear_cache()


def learnable_entries(
    layer: SnellaLayer, names: Sequence[str], fixed: Sequence[tuple[str, Update]]
) -> tuple[Tensor, Tensor]:
    """Return values and positions of the only active adapter, differentiable.

    Args:
        layer: The layer.
        names: All adapters of the call.
        fixed: Adapters with a fixed support, and their updates.

    Raises:
        NotImplementedError: If other adapters are also active.
    """
    if len(names) > 1:
        raise NotImplementedError(
            f"adapters {list(names)} cannot be trained together, because {[name for name, _ in fixed]} have a fixed "
            "support; activate only one"
        )
    ((name, update),) = fixed
    indices = layer._cache.positions(name, layer.snella_support[name])
    return merged_entries(update.spec, update.factors, indices), indices


def apply_entries(
    layer: SnellaLayer,
    x: Tensor,
    weight: Tensor | LazyWeight,
    bias: Tensor | None,
    values: Tensor,
    indices: Tensor,
) -> Tensor:
    """Apply the base layer with values added to selected entries of its weight, in the dtype of autocast or the weight.

    Args:
        layer: The layer.
        x: Input.
        weight: `[m, …]`.
        bias: `[m]` or `None`.
        values: See `learnable_entries`.
        indices: See `learnable_entries`.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    elif isinstance(weight, Tensor):
        x = x.to(weight.dtype)
    return layer_with_entries(x, weight, bias if bias is None else bias.to(x.dtype), values, indices, layer._op())


@torch.no_grad()
def add_entries(
    layer: SnellaLayer, total: Tensor | None, fixed: Sequence[tuple[str, Update]], shape: torch.Size
) -> Tensor:
    """Return a weight with the updates of all adapters with a fixed support, without gradient.

    Args:
        layer: The layer.
        total: `[m, …]`; `None` starts at zero.
        fixed: Adapters with a fixed support, and their updates.
        shape: Shape of the result.
    """
    for name, update in fixed:
        indices = layer._cache.positions(name, layer.snella_support[name])
        values = merged_entries(update.spec, update.factors, indices)
        total = fold_entries(values.new_zeros(shape) if total is None else total, values, indices)
    return cast(Tensor, total)


def merged_entries(spec: UpdateSpec, factors: Factors, indices: Tensor) -> Tensor:
    """Return the entries of `scaling·ΔW` at fixed positions, without saving a dense matrix for the backward pass.

        values[k] = scaling · ΔW[i, j],   indices[k] = i·n + j

    Args:
        spec: Kernel, rows and scaling; mode and backend are ignored.
        factors: Factors and scalars.
        indices: Positions in the flattened `[m, n]`, ascending, on the factors' device.

    Returns:
        `[len(indices)]`, dtype of the merge, differentiable with respect to `factors`.
    """
    return _MergedEntries.apply(spec, indices, *factors)


def _positions(spec: UpdateSpec, columns: int, indices: Tensor) -> list[tuple[slice, Tensor]]:
    """Return the slice of `indices` in each matrix, and the positions within the matrix."""
    starts = torch.tensor([rows.start * columns for rows in spec.rows] + [spec.num_rows * columns])
    bounds: Sequence[int] = torch.searchsorted(indices, starts.to(indices)).tolist()
    return [
        (slice(start, stop), indices[start:stop].long() - int(offset))
        for start, stop, offset in zip(bounds[:-1], bounds[1:], starts[:-1].tolist(), strict=True)
    ]


class _MergedEntries(torch.autograd.Function):
    """`scaling·ΔW[indices]`; the backward pass uses the kernel's `vjp` and recomputes ΔW."""

    @staticmethod
    def forward(ctx: Any, spec: UpdateSpec, indices: Tensor, *tensors: Tensor | None) -> Tensor:
        ctx.spec, factors = spec, Factors(*tensors)  # type: ignore[arg-type]
        ctx.save_for_backward(indices, *tensors)
        positions_by_matrix = _positions(spec, factors.A.shape[1], indices)
        parts = [
            spec.merge_matrix(matrix).flatten()[positions]
            for matrix, (_, positions) in zip(spec.matrices(factors), positions_by_matrix, strict=True)
        ]
        return torch.cat(parts) * spec.scaling

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        indices, *tensors = ctx.saved_tensors
        spec, factors = ctx.spec, Factors(*tensors)
        grads = zero_gradients(factors)
        matrices = zip(spec.matrices(factors), spec.rows, _positions(spec, factors.A.shape[1], indices), strict=True)
        with torch.autocast(grad.device.type, enabled=False):
            for group, (matrix, rows, (selected, positions)) in enumerate(matrices):
                if not len(positions):
                    continue
                dense = torch.zeros(len(matrix.B), len(matrix.A), dtype=matrix.A.dtype, device=grad.device)
                dense.view(-1)[positions] = (grad[selected] * spec.scaling).to(dense.dtype)
                store_gradients(grads, group, rows, spec.kernel.vjp(*matrix, dense))
        return None, None, *(g if need else None for g, need in zip(grads, ctx.needs_input_grad[2:], strict=True))


def layer_with_entries(
    x: Tensor, weight: Tensor | LazyWeight, bias: Tensor | None, values: Tensor, indices: Tensor, op: LayerOp
) -> Tensor:
    """Apply a layer with `values` added to selected entries of its weight.

        y = op(x, W) + bias,   W = weight, W[indices[k]] += values[k]

    Saves the input, the frozen weight and the values for the backward pass, which recomputes `W`.

    Args:
        x: Input of the layer, in the compute dtype.
        weight: `[m, …]`; both passes materialize a `LazyWeight`.
        bias: `[m]` or `None`.
        values: `[K]`, differentiable.
        indices: Unique positions in the flattened weight, `[K]`, integer.
        op: The layer's operation.
    """
    lazy = weight if isinstance(weight, LazyWeight) else None
    return _LayerWithEntries.apply(x, None if lazy else weight, bias, values, indices, op, lazy)


def fold_entries(weight: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    """Return `weight` with `values` added at the flat positions `indices`; each sum is rounded once to its dtype."""
    flat = weight.reshape(-1)
    positions = indices.long()
    sums = (flat[positions].to(values.dtype) + values).to(weight.dtype)
    return flat.index_put((positions,), sums).view(weight.shape)


class _LayerWithEntries(torch.autograd.Function):
    """`op(x, fold_entries(weight, values, indices)) + bias`; saves only the frozen weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        values: Tensor,
        indices: Tensor,
        op: LayerOp,
        lazy: LazyWeight | None,
    ) -> Tensor:
        ctx.op, ctx.x_shape, ctx.has_bias, ctx.lazy = op, x.shape, bias is not None, lazy
        ctx.lazy_versions = lazy and lazy.versions()
        needs_x = ctx.needs_input_grad[1] or (ctx.needs_input_grad[3] and len(values))
        ctx.save_for_backward(x if needs_x else None, weight, values, indices)
        with torch.autocast(x.device.type, enabled=False):
            effective = fold_entries(_matrix(weight, lazy), values, indices).to(x.dtype)
            return without_view(op(x, effective, bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        x, weight, values, indices = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_values = ctx.needs_input_grad[:4]
        op: LayerOp = ctx.op
        if ctx.lazy is not None:
            ctx.lazy.check_unchanged(ctx.lazy_versions)
        grad_x = grad_weight = grad_bias = grad_values = None
        with torch.autocast(grad_y.device.type, enabled=False):
            if needs_x:
                effective = fold_entries(_matrix(weight, ctx.lazy), values, indices).to(grad_y.dtype)
                grad_x = op.grad_input(grad_y, effective, ctx.x_shape)
                del effective
            if needs_bias and ctx.has_bias:
                grad_bias = op.grad_bias(grad_y)
            if x is not None:
                # a full product: computing only the selected entries is slower except for very sparse supports
                grad_weight = op.grad_weight(grad_y, x, (weight if ctx.lazy is None else ctx.lazy).shape)
            if needs_values:
                grad_values = torch.zeros_like(values)
                if grad_weight is not None:
                    grad_values.copy_(grad_weight.reshape(-1)[indices.long()])
        grad_weight = grad_weight.to(weight.dtype) if needs_weight and grad_weight is not None else None
        return grad_x, grad_weight, grad_bias, grad_values, None, None, None


def _matrix(weight: Tensor | None, lazy: LazyWeight | None) -> Tensor:
    """Return the weight; materialize a lazy one in at least float32."""
    return cast(Tensor, weight) if lazy is None else lazy.materialize_wide()
