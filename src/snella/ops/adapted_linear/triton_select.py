# mypy: ignore-errors
"""Exact selection of an order statistic of `|ΔW|` on the device: three histograms over the bits of the float.

The bits of a non-negative float32, read as an integer, are ordered as the float is. 31 bits are fixed in three steps of
11, 10 and 10: the first histogram is counted while the matrix is merged (`triton_kernels.merge`), each later one by a
pass that first works out, in every program alike, which bin of the one before holds the wanted rank, and counts the
entries of that bin only. Counts are integers: the order of the atomic additions cannot change them. A rank counts from
0 at the largest entry; not a number is larger than infinity, as it is for `numpy.partition` and `torch.kthvalue`.
"""

import triton
import triton.language as tl

from .triton_kernels import HIGH_BINS, HIGH_SHIFT, LAYOUT_FIELDS

LOW_BINS = tl.constexpr(1024)
LOW_BITS = tl.constexpr(10)


@triton.jit
def bin_of_rank(counts, rank, BINS: tl.constexpr):
    """The bin that holds the entry of this rank, and its rank within the bin."""
    bins = tl.arange(0, BINS)
    count = tl.load(counts + bins)
    at_least = tl.cumsum(count, 0, reverse=True)
    wanted = tl.sum((at_least > rank).to(tl.int32), 0) - 1
    above = tl.sum(tl.where(bins > wanted, count, 0), 0)
    return wanted, rank - above


@triton.jit
def leading_bits(layout, high, middle, state, group, target, TARGETS: tl.constexpr, LEVEL: tl.constexpr):
    """The bits known after `LEVEL` histograms of the wanted entry, and its rank among the entries that share them."""
    if LEVEL == 1:
        rank = tl.load(layout + group * LAYOUT_FIELDS + 3 + target)
        known, rank = bin_of_rank(high + group * HIGH_BINS, rank, HIGH_BINS)
    else:
        before = state + (group * TARGETS + target) * 2
        found, rank = bin_of_rank(middle + (group * TARGETS + target) * LOW_BINS, tl.load(before + 1), LOW_BINS)
        known = (tl.load(before) << LOW_BITS) | found
    return known, rank


@triton.jit
def count_within_bin(
    delta,
    layout,
    high,
    middle,
    low,
    state,
    n,
    TARGETS: tl.constexpr,
    LEVEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Histogram `[G, TARGETS, LOW_BINS]` of the next ten bits of the entries that begin as the wanted one does.

    `LEVEL` 1 reads `high` and writes `middle`, 2 reads `middle` and writes `low`. What level 1 found stays in `state`.
    """
    group = tl.program_id(1)
    start = tl.load(layout + group * LAYOUT_FIELDS).to(tl.int64)
    size = tl.load(layout + group * LAYOUT_FIELDS + 2) * n
    shift: tl.constexpr = HIGH_SHIFT - LOW_BITS * LEVEL
    for target in tl.static_range(TARGETS):
        known, rank = leading_bits(layout, high, middle, state, group, target, TARGETS, LEVEL)
        if LEVEL == 1:  # noqa: SIM102 - decided when the kernel is compiled
            if tl.program_id(0) == 0:
                tl.store(state + (group * TARGETS + target) * 2, known)
                tl.store(state + (group * TARGETS + target) * 2 + 1, rank)
        bins = tl.zeros([LOW_BINS], tl.int32)
        for first in range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK):
            entry = first + tl.arange(0, BLOCK)
            value = tl.load(delta + start * n + entry, mask=entry < size, other=0.0)
            bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
            same = (entry < size) & ((bits >> (shift + LOW_BITS)) == known)
            bins += tl.histogram((bits >> shift) & (LOW_BINS - 1), LOW_BINS, mask=same)
        out = middle if LEVEL == 1 else low
        out += (group * TARGETS + target) * LOW_BINS + tl.arange(0, LOW_BINS)
        tl.atomic_add(out, bins, mask=bins > 0, sem="relaxed")


@triton.jit
def order_statistic(layout, high, middle, low, state, group, target, TARGETS: tl.constexpr):
    """The wanted magnitude itself."""
    known, rank = leading_bits(layout, high, middle, state, group, target, TARGETS, 2)
    found, _ = bin_of_rank(low + (group * TARGETS + target) * LOW_BINS, rank, LOW_BINS)
    return ((known << LOW_BITS) | found).to(tl.float32, bitcast=True)


@triton.jit
def finish_thresholds(layout, high, middle, low, state, thresholds, TARGETS: tl.constexpr):
    """Threshold of each matrix, `[G]`: infinity without a budget, 0 where the whole matrix is kept (rank −1).

    With two targets it lies between them, by the fraction whose bits are the last field of `layout`.
    """
    group = tl.program_id(0)
    active = tl.load(layout + group * LAYOUT_FIELDS + 2)
    rank = tl.load(layout + group * LAYOUT_FIELDS + 3)
    threshold = order_statistic(layout, high, middle, low, state, group, 0, TARGETS)
    if TARGETS == 2:
        above = order_statistic(layout, high, middle, low, state, group, 1, TARGETS)
        fraction = tl.load(layout + group * LAYOUT_FIELDS + 5).to(tl.float32, bitcast=True)
        # from the nearer end, as torch.lerp does it
        upwards = threshold + fraction * (above - threshold)
        downwards = above - (above - threshold) * (1.0 - fraction)
        threshold = tl.where(fraction < 0.5, upwards, downwards)
    threshold = tl.where(rank < 0, 0.0, threshold)
    tl.store(thresholds + group, tl.where(active > 0, threshold, float("inf")))
