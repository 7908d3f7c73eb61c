# mypy: ignore-errors
"""Triton kernels of the forward pass: distances, softmax over one axis, merge, `W0 + scaling·S`.

Every kernel processes all `G` matrices of a fused weight in one launch. `layout` `[G, 6]`, int32, contains for each
matrix: first row in the weight, number of rows, number of merged rows (0 without a budget), two ranks for the
selection, and the fraction between them. Products and sums are fused only by explicit `tl.fma`
(`enable_fp_fusion=False` at every launch), so distances are bit-identical in all kernels. Shape letters: `m` outputs,
`n` inputs, `R` rank, `P` pieces of width `R / P`.
"""

import triton
import triton.language as tl

LAYOUT_FIELDS = tl.constexpr(6)
HIGH_BINS = tl.constexpr(2048)  # bins of the first of three histograms: exponent and leading 3 bits of the mantissa
HIGH_SHIFT = tl.constexpr(20)
SOFT, OFFICIAL, NONE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # modes of `sparsify`


@triton.jit
def exp_nonpositive(x):
    """Compute `exp(x)` for `x ≤ 0` to within two units in the last place; `x` is clamped to [−87, 0].

    2^k·exp(r) with `|r| ≤ ln 2 / 2`, `k·ln 2` subtracted in two parts, exp(r) by its Taylor series to the 7th power.
    The clamp at 0 prevents overflow in lanes outside the matrix. The hardware exponential is off by up to `|x|` units
    in the last place.
    """
    x = tl.where(x < -87.0, -87.0, tl.where(x > 0.0, 0.0, x))
    k = tl.floor(x * 1.4426950408889634 + 0.5)
    k = tl.where(x == x, k, 0.0)
    r = tl.fma(k, -0.693145751953125, x)
    r = tl.fma(k, -1.428606765330187e-06, r)
    p = tl.fma(r, 1.0 / 5040, 1.0 / 720)
    p = tl.fma(p, r, 1.0 / 120)
    p = tl.fma(p, r, 1.0 / 24)
    p = tl.fma(p, r, 1.0 / 6)
    p = tl.fma(p, r, 0.5)
    p = tl.fma(p, r * r, r) + 1.0
    return p * ((k.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def clamp(position, count):
    """Replace positions outside the matrix with its last row or column.

    Loads of factors then need no mask, which would occupy one predicate register per row and column of a thread.
    """
    return tl.minimum(position, tl.maximum(count - 1, 0))


@triton.jit
def distance(first, second, i, j, piece, width, R):
    """Compute `d[i, j] = ‖first[i, piece] − second[j, piece]‖`; subtracts before squaring."""
    squares = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
    for k in range(width):
        b = tl.load(first + i * R + piece * width + k).to(tl.float32)
        a = tl.load(second + j * R + piece * width + k).to(tl.float32)
        difference = b[:, None] - a[None, :]
        squares = tl.fma(difference, difference, squares)
    return tl.sqrt_rn(squares)


@triton.jit
def piecewise(first, second, coeff, i, j, width, P: tl.constexpr, R):
    """Compute `κ[i, j] = Σ_p coeff[p]·d_p[i, j]` of rows and columns inside the matrix, see `clamp`.

    The loop over the pieces is not unrolled, so that only the factors of one piece occupy registers at a time.
    """
    value = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
    for p in range(P):
        weight = tl.load(coeff + p).to(tl.float32)
        value += weight * distance(first, second, i, j, p, width, R)
    return value


@triton.jit
def scale_logits(value, temperature, group, HAS_TEMPERATURE: tl.constexpr):
    """Divide by the temperature: `κ/γ`."""
    if HAS_TEMPERATURE:
        gamma = tl.load(temperature + group).to(tl.float32)
        value = tl.div_rn(value, gamma + tl.zeros_like(value))
    return value


@triton.jit
def along_axis(vector, group, start, i, j, i_inside, j_inside, n, AXIS: tl.constexpr):
    """Load the values of `vector` for the columns (`AXIS` 0, `[1, columns]`) or rows (1, `[rows, 1]`) of a tile."""
    if AXIS == 0:
        values = tl.load(vector + group * n + j, mask=j_inside, other=0.0)[None, :]
    else:
        values = tl.load(vector + start + i, mask=i_inside, other=0.0)[:, None]
    return values


@triton.jit
def softmax_probs(
    value,
    temperature,
    max_logit,
    inverse_sum,
    group,
    start,
    i,
    j,
    i_inside,
    j_inside,
    n,
    HAS_TEMPERATURE: tl.constexpr,
    AXIS: tl.constexpr,
):
    """Compute `softmax(κ/γ)` over `AXIS` on a tile, from the maximum logit and inverse sum of each column or row."""
    row_max = along_axis(max_logit, group, start, i, j, i_inside, j_inside, n, AXIS)
    scale = along_axis(inverse_sum, group, start, i, j, i_inside, j_inside, n, AXIS)
    return exp_nonpositive(scale_logits(value, temperature, group, HAS_TEMPERATURE) - row_max) * scale


@triton.jit
def softmax_statistics(
    A,
    B,
    coeff,
    temperature,
    layout,
    max_logit,
    inverse_sum,
    n,
    P: tl.constexpr,
    R: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    AXIS: tl.constexpr,
    ALONG: tl.constexpr,
    ACROSS: tl.constexpr,
):
    """Compute maximum logit and inverse sum of exponentials of each column (`AXIS` 0, `[G, n]`) or row (1, `[m]`).

    Each program handles `ACROSS` columns or rows and reads `ALONG` of their entries per step, with a running maximum
    and sum per lane. It reads and writes nothing of size `m·n`.
    """
    group = tl.program_id(1)
    start = tl.load(layout + group * LAYOUT_FIELDS)
    active = tl.load(layout + group * LAYOUT_FIELDS + 2)
    if AXIS == 0:
        outer, inner, num_outer, num_inner, position = A + group * n * R, B + start * R, n, active, group * n
    else:
        outer, inner, num_outer, num_inner, position = B + start * R, A + group * n * R, active, n, start
    j = tl.program_id(0) * ACROSS + tl.arange(0, ACROSS)
    j_inside = j < num_outer
    running_max = tl.full([ALONG, ACROSS], -3.0e38, tl.float32)
    total = tl.zeros([ALONG, ACROSS], tl.float32)
    for first in range(0, num_inner, ALONG):
        i = first + tl.arange(0, ALONG)
        i_inside = i < num_inner
        value = piecewise(inner, outer, coeff + group * P, clamp(i, num_inner), clamp(j, num_outer), R // P, P, R)
        logits = scale_logits(value, temperature, group, HAS_TEMPERATURE)
        inside = i_inside[:, None] & j_inside[None, :]
        new_max = tl.where(inside & (logits > running_max), logits, running_max)
        added = tl.where(inside, exp_nonpositive(logits - new_max), 0.0)
        total = tl.fma(total, exp_nonpositive(running_max - new_max), added)
        running_max = new_max
    highest = tl.max(running_max, 0)
    sums = tl.sum(total * exp_nonpositive(running_max - highest[None, :]), 0)
    sums = tl.where(sums == 0.0, 1.0, sums)
    tl.store(max_logit + position + j, highest, mask=j_inside)
    tl.store(inverse_sum + position + j, tl.div_rn(tl.full([ACROSS], 1.0, tl.float32), sums), mask=j_inside)


@triton.jit
def merge(
    A,
    B,
    coeff,
    alpha,
    beta,
    temperature,
    layout,
    max_logit,
    inverse_sum,
    delta,
    counts,
    n,
    P: tl.constexpr,
    R: tl.constexpr,
    SOFTMAX: tl.constexpr,
    LINEAR_TERM: tl.constexpr,
    CENTER: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    AXIS: tl.constexpr,
    COUNT: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write `ΔW` `[m, n]`; with `COUNT`, also count the leading bits of `|ΔW|` in `counts` `[G, HIGH_BINS]`."""
    group = tl.program_id(2)
    start = tl.load(layout + group * LAYOUT_FIELDS)
    active = tl.load(layout + group * LAYOUT_FIELDS + 2)
    j = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    j_inside = j < tl.where(active > 0, n, 0)
    delta += start.to(tl.int64) * n
    first_row = tl.program_id(1) * TILES * BLOCK_M
    bins = tl.zeros([HIGH_BINS], tl.int32)
    for first in range(first_row, tl.minimum(first_row + TILES * BLOCK_M, active), BLOCK_M):
        i = first + tl.arange(0, BLOCK_M)
        i_inside = i < active
        inside = i_inside[:, None] & j_inside[None, :]
        value = piecewise(
            B + start * R, A + group * n * R, coeff + group * P, clamp(i, active), clamp(j, n), R // P, P, R
        )
        if SOFTMAX:
            probs = softmax_probs(
                value,
                temperature,
                max_logit,
                inverse_sum,
                group,
                start,
                i,
                j,
                i_inside,
                j_inside,
                n,
                HAS_TEMPERATURE,
                AXIS,
            )
            if CENTER:
                probs -= mean_prob(active, n, AXIS)
            weighted = tl.load(alpha + group).to(tl.float32) * probs + tl.load(beta + group).to(tl.float32)
            value = weighted + value if LINEAR_TERM else weighted
        tl.store(delta + i[:, None] * n + j[None, :], value, mask=inside)
        if COUNT:
            leading = (value.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >> HIGH_SHIFT
            bins += tl.histogram(
                tl.reshape(leading, [BLOCK_M * BLOCK_N]),
                HIGH_BINS,
                mask=tl.reshape(inside, [BLOCK_M * BLOCK_N]),
            )
    if COUNT:
        tl.atomic_add(counts + group * HIGH_BINS + tl.arange(0, HIGH_BINS), bins, mask=bins > 0, sem="relaxed")


@triton.jit
def mean_prob(active, n, AXIS: tl.constexpr):
    """Return the mean of a softmax over `AXIS`."""
    length = n
    if AXIS == 0:
        length = active
    return tl.div_rn(1.0, tl.maximum(length, 1).to(tl.float32))


@triton.jit
def add_sparse(delta, thresholds, layout, base, out, scaling, n, MODE: tl.constexpr, BLOCK: tl.constexpr):
    """Write `out = base + scaling·S`, rounded once to the dtype of `out`; all `[m, n]`, `out` may be `base`."""
    group = tl.program_id(1)
    first = tl.load(layout + group * LAYOUT_FIELDS).to(tl.int64) * n
    rows = tl.load(layout + group * LAYOUT_FIELDS + 1)
    active = tl.load(layout + group * LAYOUT_FIELDS + 2)
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < rows * n
    value = tl.load(delta + first + entry, mask=entry < active * n, other=0.0)
    threshold = tl.load(thresholds + group)
    magnitude = tl.abs(value)
    # NaN propagates, because it is multiplied by 0
    sparse = scaling * (value * tl.where(magnitude > threshold, excess(magnitude, threshold, MODE), 0.0))
    source = tl.load(base + first + entry, mask=inside, other=0.0)
    wide = tl.float64 if base.dtype.element_ty == tl.float64 else tl.float32
    total = source.to(wide) + sparse.to(wide)
    tl.store(out + first + entry, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def excess(magnitude, threshold, MODE: tl.constexpr):
    """Return `S / ΔW` of entries above the threshold."""
    factor = magnitude
    if MODE == SOFT:
        factor = magnitude - threshold
    elif MODE == NONE:
        factor = tl.zeros_like(magnitude) + 1.0
    return factor


LOW_BINS = tl.constexpr(1024)
LOW_BITS = tl.constexpr(10)


@triton.jit
def find_bin(counts, rank, BINS: tl.constexpr):
    """Return the bin that contains the entry of this rank, and the rank of the entry within the bin."""
    bins = tl.arange(0, BINS)
    count = tl.load(counts + bins)
    cumulative = tl.cumsum(count, 0, reverse=True)
    bin_index = tl.sum((cumulative > rank).to(tl.int32), 0) - 1
    above = tl.sum(tl.where(bins > bin_index, count, 0), 0)
    return bin_index, rank - above


@triton.jit
def leading_bits(layout, high, middle, state, group, target, TARGETS: tl.constexpr, LEVEL: tl.constexpr):
    """Return the target entry's leading bits after `LEVEL` histograms, and its rank among entries with these bits."""
    if LEVEL == 1:
        rank = tl.load(layout + group * LAYOUT_FIELDS + 3 + target)
        prefix, rank = find_bin(high + group * HIGH_BINS, rank, HIGH_BINS)
    else:
        before = state + (group * TARGETS + target) * 2
        bin_index, rank = find_bin(middle + (group * TARGETS + target) * LOW_BINS, tl.load(before + 1), LOW_BINS)
        prefix = (tl.load(before) << LOW_BITS) | bin_index
    return prefix, rank


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
    """Compute the histogram `[G, TARGETS, LOW_BINS]` of the next ten bits of entries with the target's leading bits.

    `LEVEL` 1 reads `high` and writes `middle`, 2 reads `middle` and writes `low`. Level 1 also writes `state`.
    """
    group = tl.program_id(1)
    start = tl.load(layout + group * LAYOUT_FIELDS).to(tl.int64)
    size = tl.load(layout + group * LAYOUT_FIELDS + 2) * n
    shift: tl.constexpr = HIGH_SHIFT - LOW_BITS * LEVEL
    for target in tl.static_range(TARGETS):
        prefix, rank = leading_bits(layout, high, middle, state, group, target, TARGETS, LEVEL)
        if LEVEL == 1:  # noqa: SIM102 - evaluated at compile time
            if tl.program_id(0) == 0:
                tl.store(state + (group * TARGETS + target) * 2, prefix)
                tl.store(state + (group * TARGETS + target) * 2 + 1, rank)
        bins = tl.zeros([LOW_BINS], tl.int32)
        for first in range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK):
            entry = first + tl.arange(0, BLOCK)
            value = tl.load(delta + start * n + entry, mask=entry < size, other=0.0)
            bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
            is_match = (entry < size) & ((bits >> (shift + LOW_BITS)) == prefix)
            bins += tl.histogram((bits >> shift) & (LOW_BINS - 1), LOW_BINS, mask=is_match)
        out = middle if LEVEL == 1 else low
        out += (group * TARGETS + target) * LOW_BINS + tl.arange(0, LOW_BINS)
        tl.atomic_add(out, bins, mask=bins > 0, sem="relaxed")


@triton.jit
def order_statistic(layout, high, middle, low, state, group, target, TARGETS: tl.constexpr):
    """Return the target magnitude."""
    prefix, rank = leading_bits(layout, high, middle, state, group, target, TARGETS, 2)
    bin_index, _ = find_bin(low + (group * TARGETS + target) * LOW_BINS, rank, LOW_BINS)
    return ((prefix << LOW_BITS) | bin_index).to(tl.float32, bitcast=True)


@triton.jit
def finish_thresholds(layout, high, middle, low, state, thresholds, TARGETS: tl.constexpr):
    """Write the threshold of each matrix, `[G]`: infinity without a budget, 0 for a full budget (rank −1).

    With two targets, interpolate between them by the fraction in the last field of `layout`.
    """
    group = tl.program_id(0)
    active = tl.load(layout + group * LAYOUT_FIELDS + 2)
    rank = tl.load(layout + group * LAYOUT_FIELDS + 3)
    threshold = order_statistic(layout, high, middle, low, state, group, 0, TARGETS)
    if TARGETS == 2:
        above = order_statistic(layout, high, middle, low, state, group, 1, TARGETS)
        fraction = tl.load(layout + group * LAYOUT_FIELDS + 5).to(tl.float32, bitcast=True)
        # interpolate from the nearer end, like torch.lerp
        upwards = threshold + fraction * (above - threshold)
        downwards = above - (above - threshold) * (1.0 - fraction)
        threshold = tl.where(fraction < 0.5, upwards, downwards)
    threshold = tl.where(rank < 0, 0.0, threshold)
    tl.store(thresholds + group, tl.where(active > 0, threshold, float("inf")))
