"""The piecewise kernels on the CPU in compiled loops: few passes over memory, exact selection, several threads."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from snella.ops.backends.base import FusedBackend, Merged
from snella.ops.backends.numba import backward, forward
from snella.ops.kernels import KernelScalars, MixK, NormalizedRBF, PLinear
from snella.ops.sparsify import KEEPS_EVERYTHING
from snella.ops.spec import GroupFactors, Guess, Update

_MAX_WIDTH, _LEAST_WIDTH = 192, 96
_LEAST_BLOCKS = 6  # so that a few threads have something to share
_SCRATCH_ENTRIES = 1 << 20  # of a block's two scratch matrices together, to stay in cache
_MAX_CHUNKS = 16  # each has its own partial gradient of B
_LEAST_ENTRIES_FOR_THREADS = 1 << 17
_PIECES_PER_THREAD = 4  # so that a thread that comes late does not hold up the others
_WINDOWS = (0.004, 0.06)  # narrowest and widest, relative to the threshold that is expected
_LEAST_CANDIDATES, _MOST_CANDIDATES = 256, 1 / 8  # room for the magnitudes in the window: entries, part of a block
_SAMPLED_DENSITY = (
    0.1  # below it a weight's gradient is sampled: 0.54 to 0.86 of the whole product's time there (README)
)
_TOKENS = 256  # of one pass over the kept entries
_MODES = {"soft": forward.SOFT, "official": forward.OFFICIAL, "none": forward.NONE}
_SUPPORTED = (torch.float32, torch.bfloat16)
_UNWRITTEN, _NOTHING = torch.empty(0), np.empty((0, 0), np.float32)


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


class _Factors(NamedTuple):
    """What the loops take for one matrix: `A` `[K, n]`, `B` `[m, K]`, `[P]`, and the numbers of its softmax."""

    A: np.ndarray
    B: np.ndarray
    coeff: np.ndarray
    softmax: tuple[np.float32, np.float32, float, np.float32, bool]

    @property
    def shape(self) -> tuple[int, int]:
        """`(m, n)`."""
        return self.B.shape[0], self.A.shape[1]


class _Prepared(NamedTuple):
    """A matrix that is not written: its factors, and top and scale of its columns `[2, n]` where they are known."""

    factors: _Factors
    columns: np.ndarray | None = None


class NumbaBackend(FusedBackend):
    """Mix-K, its normalised RBF and P-Linear in float32 on the CPU.

    A merged matrix is written only to find its threshold; once that is known, both the effective weight and the
    gradients are computed from the factors, block by block.
    """

    name = "numba"
    keeps_delta = False
    adds_while_differentiating = True

    def merge_groups(self, update: Update) -> list[Merged | None]:  # noqa: D102
        merged: list[Merged | None] = []
        for group, (factors, budget) in enumerate(zip(update.group_factors(), update.budgets, strict=True)):
            is_known = len(update.thresholds) > group
            if budget == 0:
                merged.append(None)
                if not is_known:
                    update.thresholds.append(update.B.new_full((), torch.inf))
                continue
            prepared = _Prepared(_prepare(update.kernel, factors))
            if is_known:
                merged.append(Merged(_UNWRITTEN, prepared))
                continue
            if update.mode == "none":
                update.thresholds.append(torch.tensor(KEEPS_EVERYTHING))
                merged.append(Merged(_UNWRITTEN, prepared))
                continue
            near = _threshold_where_expected(update, group, prepared.factors)
            if near is not None:
                update.thresholds.append(torch.tensor(near[0]))
                merged.append(Merged(_UNWRITTEN, prepared._replace(columns=near[1])))
                continue
            value, bins = _merge(prepared.factors)
            delta = torch.from_numpy(value)
            if update.mode == "soft":
                threshold = _threshold(value, budget, bins)
                _remember(update, group, threshold)
                update.thresholds.append(torch.tensor(threshold))
            else:
                update.threshold_of(group, delta)
            merged.append(Merged(delta, prepared))
        return merged

    def add_groups(  # noqa: D102
        self, update: Update, merged: Sequence[Merged | None], base: Tensor, out: Tensor
    ) -> None:
        for group, (rows, one) in enumerate(zip(update.rows, merged, strict=True)):
            if one is None:
                if out is not base:
                    out[rows] = base[rows]
            elif base.dtype in _SUPPORTED and out.dtype in _SUPPORTED:
                self._add(update, group, one, base[rows], out[rows])
            else:
                sparse = torch.zeros(out[rows].shape)
                self._add(update, group, one, sparse, sparse)
                torch.add(base[rows], sparse, out=out[rows])

    def _add(self, update: Update, group: int, merged: Merged, base: Tensor, out: Tensor) -> None:
        """Add one matrix."""
        how = (np.float32(update.thresholds[group].item()), np.float32(update.scaling), _MODES[update.mode])
        source, target, shape = _bits(base), _bits(out), tuple(out.shape)
        if merged.delta.numel():
            _share_out(forward.add_sparse, shape[0], shape, source, merged.delta.numpy(), *how, target)
            return
        factors, columns = merged.extra
        columns = _columns(factors) if columns is None else columns
        _share_out(forward.merge_and_add, shape[0], shape, *factors, columns, source, *how, target)

    def group_gradients(  # noqa: D102
        self,
        update: Update,
        merged: Sequence[Merged | None],
        grad: Tensor,
        base: Tensor | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        grads = [None if tensor is None else torch.zeros_like(tensor) for tensor in update.tensors()]
        can_add = all(tensor is None or tensor.dtype in _SUPPORTED for tensor in (base, out))
        if base is not None and out is not None and not can_add:
            self.add_groups(update, merged, base, out)
        for group, (rows, one) in enumerate(zip(update.rows, merged, strict=True)):
            adding = base is not None and out is not None and can_add
            if one is None:
                if adding:
                    out[rows] = base[rows]  # type: ignore[index]
                continue
            ends = (base[rows], out[rows]) if adding else None  # type: ignore[index]
            found = self._gradients(update, group, _factors_of(update, group, one), grad[rows].detach(), ends)
            for k, value in enumerate(found):
                into = grads[k]
                if value is not None and into is not None:
                    (into[rows] if k == 1 else into[group]).copy_(value)
        return tuple(grads)

    def samples_gradient(self, update: Update, group: int) -> bool:  # noqa: D102
        rows, n = update.row_counts[group], update.A.shape[1]
        return update.mode == "soft" and update.budgets[group] < _SAMPLED_DENSITY * rows * n

    def sample_gradient(  # noqa: D102
        self, update: Update, group: int, merged: Merged, grad_y: Tensor, x: Tensor, out: Tensor
    ) -> None:
        shape, budget = tuple(out.shape), update.budgets[group]
        width, blocks = _blocks(shape)
        capacity = min(budget, shape[0] * width)
        rows, columns = (np.empty((blocks, capacity), np.int32) for _ in range(2))
        counts, sums = np.empty(blocks, np.int64), np.zeros((blocks, capacity), np.float32)
        threshold = np.float32(update.thresholds[group].item())
        _share_out(
            backward.list_kept,
            blocks,
            shape,
            width,
            *_factors_of(update, group, merged),
            threshold,
            rows,
            columns,
            counts,
        )
        for tokens in range(0, x.shape[0], _TOKENS):
            columns_of = (part[tokens : tokens + _TOKENS].T.float().contiguous().numpy() for part in (grad_y, x))
            _share_out(backward.add_products, blocks, shape, *columns_of, rows, columns, counts, sums)
        _share_out(backward.scatter, blocks, shape, rows, columns, counts, sums, out.numpy())

    def _gradients(
        self, update: Update, group: int, factors: _Factors, grad: Tensor, ends: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of one matrix, in the order of `Update.tensors()`; adds it to the first of `ends` on the way."""
        (m, n), kernel = factors.shape, update.kernel
        (K, pieces), (width, blocks) = (len(factors.A), len(factors.coeff)), _blocks(factors.shape)
        per_chunk = -(-blocks // _MAX_CHUNKS)
        chunks = -(-blocks // per_chunk)
        grad_A, grad_B = np.empty((K, n), np.float32), np.empty((chunks, m, K), np.float32)
        means, sums = np.empty(n, np.float32), np.empty((chunks, pieces + 2), np.float64)
        _share_out(
            backward.factor_gradients,
            chunks,
            factors.shape,
            per_chunk,
            width,
            *factors,
            grad.to(torch.float32).contiguous().numpy(),
            np.float32(update.thresholds[group].item()),
            np.float32(update.scaling),
            _MODES[update.mode],
            ends is not None,
            *((_NOTHING, _NOTHING) if ends is None else map(_bits, ends)),
            grad_A,
            grad_B,
            means,
            sums,
        )
        *by_piece, by_softmax, total = sums.sum(0)
        of_factors = (torch.from_numpy(grad_A).T, torch.from_numpy(grad_B.sum(0)), torch.tensor(by_piece))
        if not isinstance(kernel, NormalizedRBF):
            return (*of_factors, None, None, None)
        of_alpha = float(means.sum(dtype=np.float64)) - (total / m if kernel.center_softmax else 0.0)
        inv_temperature = float(factors.softmax[0])
        return (*of_factors, torch.tensor(of_alpha), torch.tensor(total), torch.tensor(-by_softmax * inv_temperature))


def _prepare(kernel: Any, factors: GroupFactors) -> _Factors:
    """Contiguous arrays and plain numbers."""
    A, B, scalars = factors
    has_softmax = isinstance(kernel, NormalizedRBF)
    alpha = 0.0 if scalars.alpha is None else float(scalars.alpha)
    inv_temperature = 1.0 if scalars.temperature is None else 1.0 / float(scalars.temperature)
    beta = 0.0
    if has_softmax:
        beta = float(scalars.require("beta")[0]) - (alpha / B.shape[0] if kernel.center_softmax else 0.0)
    linear = 1.0 if isinstance(kernel, MixK) or not has_softmax else 0.0
    softmax = (np.float32(inv_temperature), np.float32(linear), alpha, np.float32(beta), has_softmax)
    return _Factors(_array(A.T), _array(B), _pieces(scalars), softmax)


def _factors_of(update: Update, group: int, merged: Merged) -> _Factors:
    """What `merge_groups` prepared; a matrix that was kept from the forward pass comes without."""
    return merged.extra.factors if merged.extra else _prepare(update.kernel, list(update.group_factors())[group])


def _columns(factors: _Factors) -> np.ndarray:
    """Top and scale of the columns' softmax, `[2, n]`."""
    columns = np.empty((2, factors.shape[1]), np.float32)
    width, blocks = _blocks(factors.shape)
    if factors.softmax[-1]:
        _share_out(forward.measure_columns, blocks, factors.shape, width, *factors, columns)
    return columns


def _merge(factors: _Factors) -> tuple[np.ndarray, np.ndarray]:
    """`ΔW` `[m, n]`, and how many of its magnitudes begin with which bits, by blocks."""
    width, blocks = _blocks(factors.shape)
    value, bins = np.empty(factors.shape, np.float32), np.empty((blocks, forward.HISTOGRAM_BINS), np.int32)
    _share_out(forward.merge_and_count, blocks, factors.shape, width, *factors, value, bins)
    return value, bins


def _threshold(value: np.ndarray, budget: int, bins: np.ndarray | None = None) -> np.float32:
    """The `(budget + 1)`-th largest magnitude: count by leading bits, then select within one bin."""
    if budget == value.size:
        return np.float32(0)
    width, blocks = _blocks(value.shape)
    if bins is None:
        bins = np.empty((blocks, forward.HISTOGRAM_BINS), np.int32)
        _share_out(forward.count, blocks, value.shape, width, value, bins)
    counts = bins.sum(0, dtype=np.int64)
    at_least = np.cumsum(counts[::-1])  # entries in this bin or a higher one, from the top
    position = int(np.searchsorted(at_least, budget, side="right"))
    wanted = forward.HISTOGRAM_BINS - 1 - position
    above = int(at_least[position]) - int(counts[wanted])
    ends = np.cumsum(bins[:, wanted], dtype=np.int64)
    candidates = np.empty(int(ends[-1]), np.float32)
    offsets = ends - bins[:, wanted]
    _share_out(forward.collect, blocks, value.shape, width, value, np.int32(wanted), offsets, candidates)
    rank = len(candidates) - 1 - (budget - above)
    candidates.partition(rank)
    return candidates[rank]


def _threshold_where_expected(update: Update, group: int, factors: _Factors) -> tuple[np.float32, np.ndarray] | None:
    """The same threshold and `_columns`, if it is where it was expected; `None`: it has to be looked for everywhere."""
    budget, m = update.budgets[group], factors.shape[0]
    if update.mode != "soft" or len(update.guesses) <= group or not update.guesses[group].window:
        return None
    _, expected, _, window = update.guesses[group]
    low, high = np.float32(expected * (1 - window)), np.float32(expected * (1 + window))
    width, blocks = _blocks(factors.shape)
    candidates = np.empty((blocks, max(_LEAST_CANDIDATES, int(m * width * _MOST_CANDIDATES))), np.float32)
    inside, above = np.empty(blocks, np.int64), np.empty(blocks, np.int64)
    columns = np.empty((2, factors.shape[1]), np.float32)
    _share_out(
        forward.merge_and_collect, blocks, factors.shape, width, *factors, columns, low, high, candidates, inside, above
    )
    rank = budget - int(above.sum())
    if inside.min() < 0 or not 0 <= rank < inside.sum():
        return None
    found = np.concatenate([part[:size] for part, size in zip(candidates, inside, strict=True)])
    position = len(found) - 1 - rank
    found.partition(position)
    _remember(update, group, found[position])
    return found[position], columns


def _remember(update: Update, group: int, threshold: np.float32) -> None:
    """Note where the threshold was, and where the next one is expected."""
    del update.guesses[len(update.row_counts) :]
    while len(update.guesses) <= group:
        update.guesses.append(Guess(0.0, 0.0))
    update.guesses[group] = update.guesses[group].follow(float(threshold), _WINDOWS)


def _pieces(scalars: KernelScalars) -> np.ndarray:
    """`piece_coeff` as an array."""
    return _array(scalars.require("piece_coeff")[0])


def _array(tensor: Tensor) -> np.ndarray:
    """A contiguous numpy array of a detached tensor."""
    return tensor.detach().to(torch.float32).contiguous().numpy()


def _bits(tensor: Tensor) -> np.ndarray:
    """A float32 tensor as an array, a bfloat16 one as its bit patterns; shares memory."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _blocks(shape: tuple[int, ...]) -> tuple[int, int]:
    """Columns of a block, and number of blocks; by shape alone, so that sums do not depend on the number of threads."""
    m, n = shape
    width = min(_MAX_WIDTH, -(-n // _LEAST_BLOCKS), max(_LEAST_WIDTH, _SCRATCH_ENTRIES // (2 * m)))
    width = max(_LEAST_WIDTH, (width + 15) // 16 * 16)
    return width, -(-n // width)


def _share_out(function: Callable[..., None], count: int, shape: tuple[int, ...], *arguments: Any) -> None:
    """Call `function(first, last, …)` over `count` pieces of work, a part of them on each thread."""
    threads = min(torch.get_num_threads(), count) if shape[0] * shape[1] >= _LEAST_ENTRIES_FOR_THREADS else 1
    pieces = min(count, _PIECES_PER_THREAD * threads) if threads > 1 else 1
    bounds = [count * k // pieces for k in range(pieces + 1)]
    run_together([partial(function, *ends, *arguments) for ends in pairwise(bounds)], threads)


_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_pools: dict[int, ThreadPoolExecutor] = {}
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)  # threads do not survive a fork


def run_together(tasks: Sequence[Callable[[], None]], threads: int) -> None:
    """Run all tasks, up to `threads` of them at a time, and wait for them.

    A task's error is raised here, once all others have ended.
    """
    if threads < 2 or len(tasks) < 2:
        for task in tasks:
            task()
        return
    remaining, faults = iter(tasks), []

    def work(_: object = None) -> None:
        for task in remaining:  # an iterator gives each task to one thread only
            try:
                task()
            except BaseException as fault:
                faults.append(fault)

    library = _torch_openmp()
    if library is not None:
        library.GOMP_parallel(_CALLBACK(work), None, threads, 0)
    else:
        pending = [_pool(threads).submit(work) for _ in range(threads - 1)]
        work()
        for one in pending:
            one.result()
    if faults:
        raise faults[0]


def _pool(threads: int) -> ThreadPoolExecutor:
    """Ordinary threads, kept for the next call."""
    if threads not in _pools:
        _pools[threads] = ThreadPoolExecutor(threads - 1, thread_name_prefix="snella")
    return _pools[threads]


@lru_cache(maxsize=1)
def _torch_openmp() -> ctypes.CDLL | None:
    """GNU's OpenMP runtime that torch has loaded, or `None`."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return None
    home = Path(torch.__file__).parent
    loaded = {line.split(maxsplit=5)[-1].strip() for line in maps.read_text().splitlines() if "libgomp" in line}
    own = sorted(path for path in loaded if Path(path).is_relative_to(home))
    others = sorted(loaded)
    # a wheel brings its own copy; elsewhere torch uses the only one there is
    path = own[0] if own else others[0] if len(others) == 1 else None
    if path is None:
        return None
    try:
        library = ctypes.CDLL(path)
        library.GOMP_parallel.argtypes = (_CALLBACK, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        library.GOMP_parallel.restype = None
    except (OSError, AttributeError):
        return None
    return library
