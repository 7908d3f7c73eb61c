"""The piecewise kernels on the CPU in compiled loops: few passes over memory, exact selection, several threads."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from snella.ops.kernels import KernelScalars, MergeGradients, MixK, NormalizedRBF, PLinear

from . import numba_loops as loops
from .backends import Merged
from .update import GroupFactors, Update

_ENTRIES_PER_CHUNK = 1 << 16
_MAX_CHUNKS = 32  # more would only make the partial sums larger
_LEAST_ENTRIES_FOR_THREADS = 1 << 17
_pools: dict[int, ThreadPoolExecutor] = {}
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)  # threads do not survive a fork


def obstacle(update: Update) -> str | None:
    """Why this update cannot be computed here, or `None`."""
    if not isinstance(update.kernel, PLinear):
        return f"has the piecewise kernels only, got kernel={update.kernel.name!r}"
    if update.A.device.type != "cpu":
        return f"runs on the CPU, got factors on {str(update.A.device)!r}"
    if torch.promote_types(update.A.dtype, torch.float32) != torch.float32:
        return f"computes in float32, got factors in {update.A.dtype}"
    if isinstance(update.kernel, NormalizedRBF) and update.kernel.softmax_dim != 0:
        return f"normalises over the outputs, got softmax_dim={update.kernel.softmax_dim}"
    return None


class _Shares:
    """The softmax of a matrix in two parts: exponentials, and one over the sum of each column."""

    def __init__(self, exponential: np.ndarray, inv_sum: np.ndarray) -> None:
        self.exponential, self.inv_sum = exponential, inv_sum


class NumbaBackend:
    """Mix-K, its normalised RBF and P-Linear in float32 on the CPU."""

    name = "numba"

    def merge(self, update: Update, group: int, factors: GroupFactors) -> Merged:  # noqa: D102
        value, shares = _merge(update.kernel, factors)
        delta = torch.from_numpy(value)
        if len(update.thresholds) <= group:
            if update.mode == "soft":
                update.thresholds.append(torch.tensor(_threshold(value, update.budgets[group])))
            else:
                update.threshold_of(group, delta)
        return Merged(delta, shares)

    def add_sparse(  # noqa: D102
        self, update: Update, group: int, merged: Merged, base: Tensor, out: Tensor
    ) -> None:
        threshold = np.float32(update.thresholds[group].item())
        scaling, is_soft = np.float32(update.scaling), update.mode == "soft"
        value = merged.delta.numpy()
        if base.dtype != torch.float32:
            sparse = torch.zeros_like(merged.delta)
            _over_rows(
                loops.add_sparse, value.shape, sparse.numpy(), value, threshold, scaling, is_soft, sparse.numpy()
            )
            torch.add(base, sparse, out=out)
            return
        _over_rows(loops.add_sparse, value.shape, base.numpy(), value, threshold, scaling, is_soft, out.numpy())

    def factor_gradients(  # noqa: D102
        self, update: Update, group: int, factors: GroupFactors, merged: Merged, grad: Tensor
    ) -> MergeGradients:
        kernel, (A, B, scalars) = update.kernel, factors
        value = merged.delta.numpy()
        shares = merged.extra
        if shares is None and isinstance(kernel, NormalizedRBF):
            # ΔW was kept, its softmax was not
            shares = _merge(kernel, factors)[1]
        chunks, n = _num_chunks(value.shape), value.shape[1]
        threshold, scaling = np.float32(update.thresholds[group].item()), np.float32(update.scaling)
        slopes, totals = np.empty_like(value), np.empty(chunks, np.float64)
        columns = np.empty((chunks, n), np.float32)
        exponential, inv_sum = (value, columns[0]) if shares is None else (shares.exponential, shares.inv_sum)
        has_shares = shares is not None
        _over_chunks(
            loops.slope_products,
            chunks,
            value.shape,
            grad.detach().to(torch.float32).contiguous().numpy(),
            value,
            threshold,
            scaling,
            update.mode == "soft",
            exponential,
            has_shares,
            slopes,
            columns,
            totals,
        )
        column_mean = columns.sum(0) * inv_sum if has_shares else columns[0]
        alpha, inv_temperature = _softmax_scalars(scalars)
        grad_A = np.empty((chunks, A.shape[1], n), np.float32)
        grad_B, coeff = np.empty(tuple(B.shape), np.float32), _array(scalars.piece_coeff)
        sums = np.empty((chunks, len(coeff) + 1), np.float64)
        _over_chunks(
            loops.factor_gradients,
            chunks,
            value.shape,
            _array(A.T),
            _array(B),
            coeff,
            slopes,
            np.float32(_linear_weight(kernel)),
            exponential,
            has_shares,
            np.float32(alpha * inv_temperature),
            inv_sum,
            column_mean,
            grad_A,
            grad_B,
            sums,
        )
        total, by_scalar = totals.sum(), sums.sum(0)
        grads = MergeGradients(
            A=torch.from_numpy(grad_A.sum(0)).T,
            B=torch.from_numpy(grad_B),
            piece_coeff=torch.from_numpy(by_scalar[: len(coeff)].astype(np.float32)),
        )
        if not has_shares:
            return grads
        grad_alpha = column_mean.sum(dtype=np.float64) - (total / value.shape[0] if kernel.center_softmax else 0.0)
        temperature = None if scalars.temperature is None else _scalar(-by_scalar[-1] * inv_temperature)
        return grads._replace(alpha=_scalar(grad_alpha), beta=_scalar(total), temperature=temperature)


def _merge(kernel: Any, factors: GroupFactors) -> tuple[np.ndarray, _Shares | None]:
    """`ΔW` `[m, n]`, and the softmax that went into it."""
    A, B, scalars = factors
    shape = (B.shape[0], A.shape[0])
    chunks = _num_chunks(shape)
    value, extremes = np.empty(shape, np.float32), np.empty((chunks, shape[1]), np.float32)
    alpha, inv_temperature = _softmax_scalars(scalars)
    inv_gamma = np.float32(inv_temperature)
    coeff = _array(scalars.piece_coeff)
    _over_chunks(loops.piecewise, chunks, shape, _array(A.T), _array(B), coeff, inv_gamma, value, extremes)
    if not isinstance(kernel, NormalizedRBF):
        return value, None
    exponential, sums = np.empty(shape, np.float32), np.empty((chunks, shape[1]), np.float32)
    _over_chunks(loops.exponentials, chunks, shape, value, inv_gamma, extremes.max(0), exponential, sums)
    inv_sum = (1 / sums.sum(0, dtype=np.float64)).astype(np.float32)
    beta = float(scalars.require("beta")[0]) - (alpha / shape[0] if kernel.center_softmax else 0.0)
    linear, scale = np.float32(_linear_weight(kernel)), (alpha * inv_sum.astype(np.float64)).astype(np.float32)
    _over_rows(loops.combine, shape, linear, scale, np.float32(beta), exponential, value)
    return value, _Shares(exponential, inv_sum)


def _threshold(value: np.ndarray, budget: int) -> np.float32:
    """The `(budget + 1)`-th largest magnitude: count by leading bits, then select within one bin."""
    if budget == value.size:
        return np.float32(0)
    chunks = _num_chunks(value.shape)
    bins = np.empty((chunks, loops.HISTOGRAM_BINS), np.int32)
    _over_chunks(loops.histogram, chunks, value.shape, value, bins)
    counts = bins.sum(0, dtype=np.int64)
    at_least = np.cumsum(counts[::-1])  # entries in this bin or a higher one, from the top
    position = int(np.searchsorted(at_least, budget, side="right"))
    wanted = loops.HISTOGRAM_BINS - 1 - position
    above = int(at_least[position]) - int(counts[wanted])
    ends = np.cumsum(bins[:, wanted], dtype=np.int64)
    candidates = np.empty(int(ends[-1]), np.float32)
    _over_chunks(loops.collect, chunks, value.shape, value, np.int32(wanted), ends - bins[:, wanted], candidates)
    rank = len(candidates) - 1 - (budget - above)
    candidates.partition(rank)
    return candidates[rank]


def _linear_weight(kernel: Any) -> float:
    """Weight of `κ_p` itself: not in the normalised RBF kernel."""
    return 1.0 if isinstance(kernel, MixK) or not isinstance(kernel, NormalizedRBF) else 0.0


def _softmax_scalars(scalars: KernelScalars) -> tuple[float, float]:
    """`α` and `1/γ`."""
    alpha = 0.0 if scalars.alpha is None else float(scalars.alpha)
    return alpha, 1.0 if scalars.temperature is None else 1.0 / float(scalars.temperature)


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


def _array(tensor: Tensor | None) -> np.ndarray:
    """A contiguous numpy array of a detached tensor."""
    if tensor is None:
        raise ValueError("this kernel needs piece_coeff, got None")
    return tensor.detach().to(torch.float32).contiguous().numpy()


def _num_chunks(shape: tuple[int, ...]) -> int:
    """Blocks of rows; by size alone, so that sums do not depend on the number of threads."""
    return max(1, min(_MAX_CHUNKS, shape[0], shape[0] * shape[1] // _ENTRIES_PER_CHUNK))


def _over_chunks(function: Callable[..., None], chunks: int, shape: tuple[int, ...], *arguments: Any) -> None:
    """Call `function(first, last, …)` over all chunks, a part of them on each thread."""
    threads = min(torch.get_num_threads(), chunks) if shape[0] * shape[1] >= _LEAST_ENTRIES_FOR_THREADS else 1
    if threads < 2:
        function(0, chunks, *arguments)
        return
    bounds = [chunks * k // threads for k in range(threads + 1)]
    pool = _pools.get(threads)
    if pool is None:
        pool = _pools[threads] = ThreadPoolExecutor(threads - 1, thread_name_prefix="snella")
    pending = [pool.submit(function, bounds[k], bounds[k + 1], *arguments) for k in range(1, threads)]
    function(bounds[0], bounds[1], *arguments)
    for one in pending:
        one.result()


def _over_rows(function: Callable[..., None], shape: tuple[int, ...], *arguments: Any) -> None:
    """The same for functions that go by rows."""
    _over_chunks(function, shape[0], shape, *arguments)
