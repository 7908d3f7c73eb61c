"""Numba backend: multithreaded piecewise kernels on the CPU.

The Numba kernels in `forward` and `backward` process a matrix in blocks of columns. The column statistics are the
maximum logit, the scale (`α` times the inverse sum), and the inverse sum of exponentials of each column's softmax. The
shape letters are defined in `forward`.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache, partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from snella.backends import Backend, Gradients, Prepared, Product
from snella.backends.numba import backward, forward
from snella.kernels import Factors, MixK, NormalizedRBF, PLinear
from snella.sparsify import KEEP_ALL
from snella.update import Update, UpdateSpec

_MAX_WIDTH = 192  # columns of a block
_MIN_WIDTH = 96
_MIN_BLOCKS = 6  # if the matrix is wide enough: parallelism for a few threads
_WORKSPACE_ENTRIES = 1 << 20  # entries of a block's two matrices, which should fit in the cache
_MAX_CHUNKS = 16  # each chunk allocates a partial gradient of B
_MIN_ENTRIES_FOR_THREADS = 1 << 17  # smaller matrices are processed by one thread
_TASKS_PER_THREAD = 4  # balances the load between threads
_SDDMM_DENSITY = 0.1  # below this density, compute a weight gradient only at the nonzero entries
_TOKENS = 256  # tokens per pass over the nonzero entries
_MODES = {"soft": forward.SOFT, "official": forward.OFFICIAL, "none": forward.NONE}
_STORED_DTYPES = (torch.float32, torch.bfloat16)  # dtypes that the kernels read and write in place
_EMPTY = np.empty((0, 0), np.float32)  # unused argument of a Numba kernel
_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)  # type of the function that an OpenMP thread calls


class PackedFactors(NamedTuple):
    """Inputs of the Numba kernels for one matrix: `A` `[n, K]`, `B` `[m, K]`, `coeff` `[P]`, and softmax scalars.

    `softmax` contains `1/γ`, the weight of the linear term, `α`, `β` (minus `α/m` if the softmax is centered), and
    whether the kernel function has a softmax. `KernelScalars` explains the symbols.
    """

    A: np.ndarray
    B: np.ndarray
    coeff: np.ndarray
    softmax: tuple[np.float32, np.float32, float, np.float32, bool]


class _Matrix(NamedTuple):
    """State of one matrix within a pass: packed factors, threshold, column statistics, and `ΔW` if it was merged."""

    packed: PackedFactors
    shape: tuple[int, int]
    threshold: np.float32
    stats: np.ndarray
    delta: np.ndarray | None = None


class NumbaBackend(Backend):
    """Backend for the kernels `mix_k`, `normalized_rbf`, and `p_linear` in float32 on the CPU.

    Only the threshold selection writes a merged matrix. With a known threshold, the backend computes the effective
    weight and the gradients directly from the factors. With `cache_delta`, autograd saves the effective weight instead
    of `ΔW`. For the factors' gradients, autograd also saves the column statistics, three numbers per column.
    """

    name = "numba"

    def unsupported_reason(self, spec: UpdateSpec, A: Tensor) -> str | None:  # noqa: D102
        if type(spec.kernel) not in (PLinear, NormalizedRBF, MixK):  # subclasses have other formulas
            return f"supports only the piecewise kernels, got kernel={spec.kernel.name!r}"
        if A.device.type != "cpu":
            return f"runs on the CPU, got factors on {str(A.device)!r}"
        if torch.promote_types(A.dtype, torch.float32) != torch.float32:
            return f"computes in float32, got factors in {A.dtype}"
        if isinstance(spec.kernel, NormalizedRBF) and spec.kernel.softmax_dim != 0:
            return f"normalizes over the outputs, got softmax_dim={spec.kernel.softmax_dim}"
        return None

    def prepare(self, update: Update, saved: tuple[Tensor | None, ...] = ()) -> Prepared:  # noqa: D102
        spec, factors, budgets, thresholds = update
        threshold_values = [None] * len(budgets) if thresholds is None else thresholds.tolist()
        columns = saved[0] if saved and thresholds is not None else None
        needs_stats = columns is None
        if columns is None:
            columns = torch.empty(len(budgets), 3, factors.A.shape[1], dtype=torch.float32, device="cpu")
        packed = pack_factors(spec, factors) if any(budgets) else [None] * len(budgets)
        workspace: list[_Matrix | None] = []
        for inputs, budget, threshold, stats in zip(packed, budgets, threshold_values, columns.numpy(), strict=True):
            matrix = _merge_matrix(spec, inputs, budget, threshold, stats, needs_stats) if inputs and budget else None
            workspace.append(matrix)
        if thresholds is None:
            computed = [np.float32(np.inf) if matrix is None else matrix.threshold for matrix in workspace]
            thresholds = torch.from_numpy(np.array(computed, np.float32))
        has_softmax = isinstance(spec.kernel, NormalizedRBF) and any(budgets)
        return Prepared(factors, budgets, thresholds, (), (columns,) if has_softmax else (), workspace)

    def add_update(self, spec: UpdateSpec, prepared: Prepared, base: Tensor, out: Tensor) -> None:  # noqa: D102
        is_supported = base.dtype in _STORED_DTYPES and out.dtype in _STORED_DTYPES
        for rows, matrix in zip(spec.rows, prepared.workspace, strict=True):
            if matrix is None:
                if out is not base:
                    out[rows] = base[rows]
            elif is_supported:
                _add_matrix(spec, matrix, as_array(base[rows]), as_array(out[rows]))
            else:  # add `scaling·S` in torch, which supports all dtypes
                sparse = torch.zeros(out[rows].shape, dtype=torch.float32, device="cpu")
                _add_matrix(spec, matrix, sparse.numpy(), sparse.numpy())
                torch.add(base[rows], sparse, out=out[rows])

    def grad_factors(self, spec: UpdateSpec, prepared: Prepared, grad_weight: Tensor) -> Gradients:  # noqa: D102
        return _gradients(spec, prepared, grad_weight, None)

    def add_and_grad_factors(  # noqa: D102
        self, spec: UpdateSpec, prepared: Prepared, grad_weight: Tensor, base: Tensor, out: Tensor
    ) -> Gradients | None:
        if base.dtype not in _STORED_DTYPES or out.dtype not in _STORED_DTYPES:
            return None
        return _gradients(spec, prepared, grad_weight, (base, out))

    def grad_where_nonzero(  # noqa: D102
        self, spec: UpdateSpec, prepared: Prepared, grad_y: Tensor, x: Tensor, product: Product
    ) -> Tensor:
        n, row_counts = x.shape[1], spec.row_counts
        flags = [use_sddmm(spec, budget, m * n) for budget, m in zip(prepared.budgets, row_counts, strict=True)]
        if not any(flags):
            return super().grad_where_nonzero(spec, prepared, grad_y, x, product)
        result = torch.zeros(spec.num_rows, n, dtype=torch.promote_types(x.dtype, torch.float32), device="cpu")
        for rows, matrix, budget, is_sparse in zip(spec.rows, prepared.workspace, prepared.budgets, flags, strict=True):
            if is_sparse:
                sddmm_weight_grad(matrix, budget, grad_y[:, rows], x, result[rows])
            elif budget:
                result[rows] = product(grad_y[:, rows], x)
        return result


def _gradients(
    spec: UpdateSpec, prepared: Prepared, grad_weight: Tensor, base_and_out: tuple[Tensor, Tensor] | None
) -> Gradients:
    """Return the gradients of factors and scalars.

    With `base_and_out`, also write `base + scaling·S` into `out` in the same pass.
    """
    grads = [None if f is None else torch.zeros(f.shape, dtype=torch.float32, device="cpu") for f in prepared.factors]
    arrays = [None if grad is None else as_array(grad) for grad in grads]
    for group, (rows, matrix) in enumerate(zip(spec.rows, prepared.workspace, strict=True)):
        buffers = None if base_and_out is None else [tensor[rows] for tensor in base_and_out]
        if matrix is not None:
            # the layout of `Factors`: all tensors by matrix, except B by row
            slices = [slice(group, group + 1), rows, *[slice(group, group + 1)] * 4]
            targets = [None if array is None else array[part] for array, part in zip(arrays, slices, strict=True)]
            _grad_matrix(spec, matrix, grad_weight[rows].detach(), buffers, targets)
        elif buffers is not None:
            buffers[1].copy_(buffers[0])
    pairs = zip(grads, prepared.factors, strict=True)
    return tuple([None if grad is None or f is None else grad.to(f.dtype) for grad, f in pairs])


def _merge_matrix(
    spec: UpdateSpec, packed: PackedFactors, budget: int, threshold: float | None, stats: np.ndarray, needs_stats: bool
) -> _Matrix:
    """Return a matrix's state, after selecting its threshold if it is `None`.

    The selection writes the column statistics into `stats`. With a known threshold, they are computed only if
    `needs_stats` is True and the kernel function has a softmax.
    """
    shape = (packed.B.shape[0], packed.A.shape[0])
    width, blocks = _blocks(shape)
    if threshold is None and spec.mode == "none":
        threshold = KEEP_ALL
    if threshold is not None:
        if needs_stats and packed.softmax[-1]:
            _run(forward.measure_column_stats, blocks, shape, width, *packed, stats)
        return _Matrix(packed, shape, np.float32(threshold), stats)
    delta, bins = np.empty(shape, np.float32), np.empty((blocks, forward.HISTOGRAM_BINS), np.int32)
    _run(forward.merge_and_count, blocks, shape, width, *packed, delta, bins, stats)
    if spec.mode == "soft":
        return _Matrix(packed, shape, select_threshold(delta, budget, bins), stats, delta)
    threshold = spec.find_threshold(torch.from_numpy(delta), budget).item()
    return _Matrix(packed, shape, np.float32(threshold), stats, delta)


def _add_matrix(spec: UpdateSpec, matrix: _Matrix, base: np.ndarray, out: np.ndarray) -> None:
    """Write a matrix's `base + scaling·S` into `out`, merging it row by row unless its `ΔW` is stored."""
    settings = (matrix.threshold, np.float32(spec.scaling), _MODES[spec.mode])
    shape = matrix.shape
    if matrix.delta is not None:
        _run(forward.add_sparse, shape[0], shape, base, matrix.delta, *settings, out)
    else:
        _run(forward.merge_and_add, shape[0], shape, *matrix.packed, matrix.stats, base, *settings, out)


def use_sddmm(spec: UpdateSpec, budget: int, size: int) -> bool:
    """Return whether to compute the ∂L/∂W of a matrix with `size` entries only where the update is nonzero (SDDMM).

    Sampled dense-dense matrix multiplication computes one dot product per nonzero entry.
    """
    return spec.mode == "soft" and 0 < budget < _SDDMM_DENSITY * size


def sddmm_weight_grad(matrix: _Matrix, budget: int, grad_y: Tensor, x: Tensor, out: Tensor) -> None:
    """Write ∂L/∂W into `out`, only where a matrix's update is nonzero (SDDMM).

    Args:
        matrix: The matrix.
        budget: Maximum number of nonzero entries.
        grad_y: The matrix's columns of ∂L/∂y, `[tokens, rows]`.
        x: `[tokens, n]`, in the dtype of `grad_y`.
        out: Zeros, `[rows, n]`, float32 or float64.

    Raises:
        RuntimeError: If a block has more entries above the threshold than the budget allows, because the threshold
            does not belong to the current factors.
    """
    packed, shape = matrix.packed, matrix.shape
    width, blocks = _blocks(shape)
    capacity = min(budget, shape[0] * width)
    rows, columns = (np.empty((blocks, capacity), np.int32) for _ in range(2))
    counts, sums = np.empty(blocks, np.int64), np.zeros((blocks, capacity), np.float32)
    _run(backward.list_entries, blocks, shape, width, *packed, matrix.threshold, rows, columns, counts)
    if counts.min() < 0:  # more entries exceed the threshold than the budget allows
        raise RuntimeError(
            "the threshold is outdated because the factors were changed through `.data` without an optimizer; change "
            "them in place inside torch.no_grad()"
        )
    for start in range(0, x.shape[0], _TOKENS):
        arrays = (_to_float32_array(tensor[start : start + _TOKENS].T) for tensor in (grad_y, x))
        _run(backward.sddmm_accumulate, blocks, shape, *arrays, rows, columns, counts, sums)
    _run(backward.sddmm_scatter, blocks, shape, rows, columns, counts, sums, out.numpy())


def _grad_matrix(
    spec: UpdateSpec,
    matrix: _Matrix,
    grad: Tensor,
    buffers: Sequence[Tensor] | None,
    targets: Sequence[Any],
) -> None:
    """Write a matrix's gradients into `targets`, in the order of `Factors`.

    With `buffers`, the rows of `base` and `out`, also write `base + scaling·S` into `out`.
    """
    packed, kernel, (m, n) = matrix.packed, spec.kernel, matrix.shape
    (K, pieces), (width, blocks) = (packed.B.shape[1], len(packed.coeff)), _blocks(matrix.shape)
    per_chunk = -(-blocks // _MAX_CHUNKS)
    chunks = -(-blocks // per_chunk)
    grad_A, grad_B, grad_coeff, grad_alpha, grad_beta, grad_temperature = targets
    partial_B = np.empty((chunks, m, K), np.float32)
    means, sums = np.empty(n, np.float32), np.empty((chunks, pieces + 2), np.float64)
    _run(
        backward.factor_gradients,
        chunks,
        matrix.shape,
        per_chunk,
        width,
        *packed,
        matrix.stats,
        _to_float32_array(grad),
        matrix.threshold,
        np.float32(spec.scaling),
        _MODES[spec.mode],
        grad_temperature is not None,
        buffers is not None,
        *((_EMPTY, _EMPTY) if buffers is None else map(as_array, buffers)),
        grad_A[0],
        partial_B,
        means,
        sums,
    )
    *by_piece, by_softmax, total = sums.sum(0)
    np.sum(partial_B, 0, out=grad_B)
    grad_coeff[:] = by_piece
    if isinstance(kernel, NormalizedRBF):
        if grad_alpha is not None:
            grad_alpha[:] = means.sum(dtype=np.float64) - (total / m if kernel.center_softmax else 0.0)
        if grad_beta is not None:
            grad_beta[:] = total
        if grad_temperature is not None:
            grad_temperature[:] = -by_softmax * float(packed.softmax[0])


def pack_factors(spec: UpdateSpec, factors: Factors) -> list[PackedFactors]:
    """Return the inputs of the Numba kernels for each matrix, or raise `ValueError` if a required scalar is missing."""
    kernel, (A, B, coeff, alpha, beta, temperature) = spec.kernel, factors
    has_softmax, num_matrices = isinstance(kernel, NormalizedRBF), len(spec.rows)
    if coeff is None or (has_softmax and (alpha is None or beta is None)):
        required = [name for name in kernel.scalars if name != "temperature"]
        raise ValueError(f"kernel {kernel.name!r} requires the scalars {required}, got None")
    scales, shifts = [[0.0] * num_matrices if s is None else s.detach().tolist() for s in (alpha, beta)]
    # computed in torch, because Python raises an error for a temperature of 0, and NumPy warns of an overflow
    inverses = [1.0] * num_matrices if temperature is None else (1 / temperature.detach().double()).float().tolist()
    linear = np.float32(1.0 if isinstance(kernel, MixK) or not has_softmax else 0.0)
    arrays = [as_array(tensor.to(torch.float32).contiguous()) for tensor in (A, B, coeff)]
    packed = []
    for group, (scale, shift, inverse) in enumerate(zip(scales, shifts, inverses, strict=True)):
        # a centered softmax term is the softmax minus its mean, 1/m
        constant = shift - (scale / spec.row_counts[group] if kernel.center_softmax else 0.0) if has_softmax else 0.0
        softmax = (np.float32(inverse), linear, scale, np.float32(constant), has_softmax)
        packed.append(PackedFactors(arrays[0][group], arrays[1][spec.rows[group]], arrays[2][group], softmax))
    return packed


def select_threshold(value: np.ndarray, budget: int, bins: np.ndarray) -> np.float32:
    """Return the `(budget + 1)`-th largest magnitude of `value`, or 0 for a full budget.

    The histograms `bins` of the blocks determine the bin of this magnitude, and only the entries in this bin are
    partitioned.
    """
    if budget == value.size:
        return np.float32(0)
    width, blocks = _blocks(value.shape)
    counts = np.add.reduce(bins, 0, np.int64)
    cumulative = counts[::-1].cumsum()  # number of entries in each bin and all higher ones, from the top
    position = int(cumulative.searchsorted(budget, side="right"))
    bin_index = forward.HISTOGRAM_BINS - 1 - position
    num_above = int(cumulative[position]) - int(counts[bin_index])
    ends = bins[:, bin_index].cumsum(dtype=np.int64)
    candidates = np.empty(int(ends[-1]), np.float32)
    offsets = ends - bins[:, bin_index]
    _run(forward.collect, blocks, value.shape, width, value, *forward.bin_bit_range(bin_index), offsets, candidates)
    rank = len(candidates) - 1 - (budget - num_above)  # in ascending order
    candidates.partition(rank)
    return candidates[rank]


def as_array(tensor: Tensor) -> np.ndarray:
    """Return an array view of a contiguous float32 tensor, or of the bit patterns of a bfloat16 tensor.

    Unlike `Tensor.numpy`, this does not lock the size of the tensor's storage, which FSDP changes.
    """
    tensor, shape = tensor.detach(), tuple(tensor.shape)
    dtype = np.dtype(np.float32 if tensor.dtype == torch.float32 else np.int16)
    if not tensor.numel():
        return np.empty(shape, dtype)
    interface = {"version": 3, "data": (tensor.data_ptr(), False), "shape": shape, "typestr": dtype.str}
    return np.asarray(SimpleNamespace(__array_interface__=interface, tensor=tensor))  # keeps the tensor alive


def _to_float32_array(tensor: Tensor) -> np.ndarray:
    """Convert a tensor to a contiguous float32 array."""
    return as_array(tensor.to(torch.float32).contiguous())


@lru_cache(maxsize=4096)
def _blocks(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the width and number of blocks.

    They depend only on the shape, so that the number of threads does not change the order of sums.
    """
    m, n = shape
    width = min(_MAX_WIDTH, -(-n // _MIN_BLOCKS), max(_MIN_WIDTH, _WORKSPACE_ENTRIES // (2 * m)))
    width = max(_MIN_WIDTH, (width + 15) // 16 * 16)
    return width, -(-n // width)


def _run(function: Callable[..., None], count: int, shape: tuple[int, ...], *arguments: Any) -> None:
    """Call `function(first, last, …)` on parts of `range(count)`, distributed over threads."""
    threads = min(torch.get_num_threads(), count) if shape[0] * shape[1] >= _MIN_ENTRIES_FOR_THREADS else 1
    if threads == 1:
        function(0, count, *arguments)
        return
    num_tasks = min(count, _TASKS_PER_THREAD * threads)
    bounds = [count * k // num_tasks for k in range(num_tasks + 1)]
    parallel_for([partial(function, first, last, *arguments) for first, last in pairwise(bounds)], threads)


def parallel_for(tasks: Sequence[Callable[[], None]], threads: int) -> None:
    """Run all tasks on up to `threads` threads and wait for them.

    Uses torch's OpenMP threads or, if they are unavailable, a thread pool. OpenMP threads spin for a few milliseconds
    after each product, so other threads would compete with them. Raises the first error after all tasks have ended.
    """
    remaining = iter(tasks)
    errors: list[BaseException] = []

    def work(_: object = None) -> None:  # OpenMP passes a pointer to data, which is not used
        for task in remaining:  # a shared iterator yields each task to one thread
            try:
                task()
            except BaseException as error:  # raised below, because OpenMP's threads cannot raise it
                errors.append(error)

    library = _torch_openmp()
    if library is not None:
        library.GOMP_parallel(_CALLBACK(work), None, threads, 0)
    else:
        pending = [_pool().submit(work) for _ in range(threads - 1)]
        work()
        for future in pending:
            future.result()
    if errors:
        raise errors[0]


@cache
def _pool() -> ThreadPoolExecutor:
    """Return the thread pool of this process, which starts its threads when they are needed."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="snella")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


@cache
def _torch_openmp() -> ctypes.CDLL | None:
    """Return the GNU OpenMP runtime that torch has loaded, or `None`."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return None
    torch_folder = Path(torch.__file__).parent
    loaded = {line.split(maxsplit=5)[-1].strip() for line in maps.read_text().splitlines() if "libgomp" in line}
    bundled = sorted(path for path in loaded if Path(path).is_relative_to(torch_folder))
    # wheels bundle a copy; other builds of torch use the system's library, which must be unique
    if bundled:
        path = bundled[0]
    elif len(loaded) == 1:
        (path,) = loaded
    else:
        return None
    try:
        library = ctypes.CDLL(path)
        library.GOMP_parallel.argtypes = (_CALLBACK, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        library.GOMP_parallel.restype = None
    except (OSError, AttributeError):
        return None
    return library
