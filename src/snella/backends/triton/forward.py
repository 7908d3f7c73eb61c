# mypy: ignore-errors
"""Triton kernels for the forward pass: merge the factors into `ΔW`, find its threshold, and write `W0 + scaling·S`.

A weight `W0` `[m, n]` (`m` outputs, `n` inputs) stacks `G` matrices, e.g. 3 in a fused qkv layer. The factors are `A`
`[G, n, R]` and `B` `[m, R]`, of rank `R`, split into `P` pieces of width `R / P`. The scalars are `coeff` `[G, P]`, and
`alpha` (α), `beta` (β), and `temperature` (γ, 1 if absent), each `[G]`. For each matrix, with its rows of `W0` and `B`:

    d_p[i, j] = ‖B[i, piece p] − A[j, piece p]‖₂         distance in piece p
    κ[i, j]   = Σ_p coeff[p]·d_p[i, j]                   weighted distance, called `value` in the code
    ΔW        = κ                                        kernel `p_linear`
                α·softmax(κ/γ) + β                       kernel `normalized_rbf`
                κ + α·softmax(κ/γ) + β                   kernel `mix_k`
    S         = ΔW·max(|ΔW| − t, 0)                      mode `SOFT`: t is the (budget + 1)-th largest |ΔW|
                ΔW·|ΔW|·1[|ΔW| > t]                      mode `OFFICIAL`: t is the (1 − budget/size)-quantile of |ΔW|
                ΔW                                       mode `NONE`: t is −1, which every |ΔW| exceeds

The budget is the maximum number of nonzero entries of `S`, and `size` is the number of entries of the matrix. A matrix
with budget 0 has no update.

Every kernel processes all `G` matrices in one launch; `group` is the index of a matrix. The int32 table `layout`
`[G, 6]` contains for each matrix:

- 0: its first row in the weight (`start`)
- 1: its number of rows
- 2: its number of rows with an update (`active`): all, or 0 if its budget is 0
- 3: in mode `SOFT`, the rank of the entry at the threshold, or −1 for a full budget, where the threshold is 0; in mode
  `OFFICIAL`, the rank of the largest entry up to the quantile
- 4: in mode `OFFICIAL`, the rank of the next larger entry
- 5: in mode `OFFICIAL`, the position of the quantile between these two entries, from 0 to 1: the bits of a float32

The rank of an entry is its position in the order of descending `|ΔW|`, from 0.

Products and sums are fused only by explicit `tl.fma` (`enable_fp_fusion=False` at every launch), so distances are
bit-identical in all kernels.
"""

import triton
import triton.language as tl

LAYOUT_FIELDS = tl.constexpr(6)
# bins of the first of three histograms: the leading 11 of 31 bits, i.e. the exponent and 3 bits of the mantissa
HIGH_BINS = tl.constexpr(2048)
# the number of remaining bits
HIGH_SHIFT = tl.constexpr(20)
# the modes of `snella.sparsify.sparsify`, see the formulas of `S` above; `OFFICIAL` is the mode of the authors' code
SOFT, OFFICIAL, NONE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def exp_nonpositive(x):
    """Compute `exp(x)` for `x ≤ 0` to within two units in the last place; `x` is clamped to [−87, 0].

    The result is `2^k·exp(r)`, where `k` is the integer closest to `x / ln 2`, and `r = x − k·ln 2` is at most
    `ln 2 / 2` in magnitude. `exp(r)` is computed from its Taylor series up to degree 7. The hardware exponential is not
    used, because it is off by up to `|x|` units in the last place.
    """
    # −87 keeps 2^k a normal number, and 0 prevents overflow in lanes outside the matrix; both comparisons keep NaN
    x = tl.where(x < -87.0, -87.0, tl.where(x > 0.0, 0.0, x))
    k = tl.floor(x * 1.4426950408889634 + 0.5)  # the factor is 1 / ln 2
    k = tl.where(x == x, k, 0.0)  # NaN must not be converted to an integer below; the result is NaN because of r
    # ln 2 as the sum of two numbers, because its rounding error in float32 would be multiplied by k
    r = tl.fma(k, -0.693145751953125, x)
    r = tl.fma(k, -1.428606765330187e-06, r)
    p = tl.fma(r, 1.0 / 5040, 1.0 / 720)
    p = tl.fma(p, r, 1.0 / 120)
    p = tl.fma(p, r, 1.0 / 24)
    p = tl.fma(p, r, 1.0 / 6)
    p = tl.fma(p, r, 0.5)
    p = tl.fma(p, r * r, r) + 1.0
    # the bits of 2^k: its biased exponent, above 23 bits of the mantissa
    return p * ((k.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def clamp(position, count):
    """Replace the indices of rows or columns outside the matrix with the index of the last row or column.

    Loading `A` and `B` then needs no mask. A mask would occupy one predicate register per row and column in every
    thread.
    """
    return tl.minimum(position, tl.maximum(count - 1, 0))


@triton.jit
def distance(first, second, i, j, piece, width, R):
    """Compute `d[i, j] = ‖first[i, piece] − second[j, piece]‖₂`; both arguments point to factors with `R` columns.

    The differences are squared directly, because the expansion `‖b‖² + ‖a‖² − 2⟨b, a⟩` loses all significant digits
    for nearly equal rows.
    """
    squares = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
    for k in range(width):
        b = tl.load(first + i * R + piece * width + k).to(tl.float32)
        a = tl.load(second + j * R + piece * width + k).to(tl.float32)
        difference = b[:, None] - a[None, :]
        squares = tl.fma(difference, difference, squares)
    return tl.sqrt_rn(squares)


@triton.jit
def piecewise(first, second, coeff, i, j, width, P: tl.constexpr, R):
    """Compute `κ[i, j] = Σ_p coeff[p]·d_p[i, j]`, where `width` is the width of a piece, `R / P`.

    All indices `i` and `j` must be inside the matrix (see `clamp`). The loop over the pieces is not unrolled, so that
    only the factors of one piece occupy registers at a time.
    """
    value = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
    for p in range(P):
        weight = tl.load(coeff + p).to(tl.float32)
        value += weight * distance(first, second, i, j, p, width, R)
    return value


@triton.jit
def scale_logits(value, temperature, group, HAS_TEMPERATURE: tl.constexpr):
    """Compute the logits `κ/γ` of the softmax; without a temperature, `κ`."""
    if HAS_TEMPERATURE:
        gamma = tl.load(temperature + group).to(tl.float32)
        # the scalar is broadcast explicitly
        value = tl.div_rn(value, gamma + tl.zeros_like(value))
    return value


@triton.jit
def along_axis(vector, group, start, i, j, i_inside, j_inside, n, AXIS: tl.constexpr):
    """Load one value per column or row of a tile, for a softmax over `AXIS`.

    If `AXIS` is 0, `vector` is `[G, n]`, and the values of the columns `j` are returned as `[1, columns]`. If it is 1,
    `vector` is `[m]`, and the values of the rows `i` are returned as `[rows, 1]`.
    """
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
    """Compute `softmax(κ/γ)` over `AXIS` on a tile, from the results of `softmax_statistics` and `value = κ`."""
    # `row_max` and `scale` belong to the columns of the tile if `AXIS` is 0, and to its rows if it is 1
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
    """Compute the maximum logit and the inverse sum of exponentials of each column or row of the softmax over `AXIS`.

    If `AXIS` is 0, `max_logit` and `inverse_sum` are `[G, n]`, with one value per column. If it is 1, they are `[m]`,
    with one value per row. The sum is that of `exp(logit − maximum)`.

    Each program handles `ACROSS` columns (or rows) and computes `ALONG` entries of each per step. Each lane has a
    running maximum and a sum of exponentials relative to this maximum; the lanes are combined at the end. The program
    reads and writes nothing of size `m·n`.
    """
    group = tl.program_id(1)
    start = tl.load(layout + group * LAYOUT_FIELDS)
    active = tl.load(layout + group * LAYOUT_FIELDS + 2)
    # a program's `ACROSS` values belong to rows of `outer`, and it loops over the rows of `inner`; `position` is the
    # offset of the results
    if AXIS == 0:
        outer, inner, num_outer, num_inner, position = A + group * n * R, B + start * R, n, active, group * n
    else:
        outer, inner, num_outer, num_inner, position = B + start * R, A + group * n * R, active, n, start
    j = tl.program_id(0) * ACROSS + tl.arange(0, ACROSS)
    j_inside = j < num_outer
    # almost the lowest float32, not −∞, because the difference of two infinities is NaN
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
        # the earlier sum, rescaled to the new maximum, plus the new term
        total = tl.fma(total, exp_nonpositive(running_max - new_max), added)
        running_max = new_max
    highest = tl.max(running_max, 0)
    sums = tl.sum(total * exp_nonpositive(running_max - highest[None, :]), 0)
    # without entries (a matrix with budget 0, or lanes outside it), the sum is 0 and must not be inverted
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
    """Merge the factors: write `ΔW` `[m, n]`, but only in the rows with an update.

        ΔW = κ                                                without `SOFTMAX`
        ΔW = [κ +] α·(softmax(κ/γ) [− its mean]) + β          with `SOFTMAX`

    `LINEAR_TERM` includes `κ`, and `CENTER` subtracts the mean of the softmax over `AXIS`. If `COUNT`, also add the
    histogram of the leading bits of `|ΔW|` to `counts` `[G, HIGH_BINS]`. Each program computes `TILES` tiles of
    `BLOCK_M` rows and `BLOCK_N` columns, one below the other, and adds their joint histogram once.
    """
    group = tl.program_id(2)
    start = tl.load(layout + group * LAYOUT_FIELDS)
    active = tl.load(layout + group * LAYOUT_FIELDS + 2)
    j = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    j_inside = j < tl.where(active > 0, n, 0)
    # int64, because a weight may have more than 2³¹ entries; positions within a matrix are int32
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
            # without the sign bit, the bits of floats have the order of their magnitudes
            leading = (value.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >> HIGH_SHIFT
            bins += tl.histogram(
                tl.reshape(leading, [BLOCK_M * BLOCK_N]),
                HIGH_BINS,
                mask=tl.reshape(inside, [BLOCK_M * BLOCK_N]),
            )
    if COUNT:
        # `relaxed`: the order of integer sums does not matter
        tl.atomic_add(counts + group * HIGH_BINS + tl.arange(0, HIGH_BINS), bins, mask=bins > 0, sem="relaxed")


@triton.jit
def mean_prob(active, n, AXIS: tl.constexpr):
    """Return the mean of a softmax over `AXIS`: 1 divided by the number of rows (`AXIS` 0) or columns (1).

    A matrix with budget 0 has no active rows; 1 replaces this divisor.
    """
    length = n
    if AXIS == 0:
        length = active
    return tl.div_rn(1.0, tl.maximum(length, 1).to(tl.float32))


@triton.jit
def add_sparse(delta, thresholds, layout, base, out, scaling, n, MODE: tl.constexpr, BLOCK: tl.constexpr):
    """Write `out = base + scaling·S`, rounded once to the dtype of `out`, where `base` is `W0`.

    `delta` (`ΔW`), `base` and `out` are `[m, n]`. `out` may be the same tensor as `base`. `thresholds` is `[G]`.
    """
    group = tl.program_id(1)
    first = tl.load(layout + group * LAYOUT_FIELDS).to(tl.int64) * n
    rows = tl.load(layout + group * LAYOUT_FIELDS + 1)
    active = tl.load(layout + group * LAYOUT_FIELDS + 2)
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < rows * n
    value = tl.load(delta + first + entry, mask=entry < active * n, other=0.0)
    threshold = tl.load(thresholds + group)
    magnitude = tl.abs(value)
    # entries up to the threshold are multiplied by 0 instead of replaced with 0, so that NaN propagates
    sparse = scaling * (value * tl.where(magnitude > threshold, excess(magnitude, threshold, MODE), 0.0))
    source = tl.load(base + first + entry, mask=inside, other=0.0)
    wide = tl.float64 if base.dtype.element_ty == tl.float64 else tl.float32
    total = source.to(wide) + sparse.to(wide)
    tl.store(out + first + entry, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def excess(magnitude, threshold, MODE: tl.constexpr):
    """Return `S / ΔW` of entries above the threshold: `|ΔW| − t` in mode `SOFT`, `|ΔW|` in `OFFICIAL`, 1 in `NONE`."""
    factor = magnitude
    if MODE == SOFT:
        factor = magnitude - threshold
    elif MODE == NONE:
        factor = tl.zeros_like(magnitude) + 1.0
    return factor


# Selection of the thresholds. `|ΔW|` has 31 bits, which three histograms determine from the leading ones on: `high`
# `[G, HIGH_BINS]` counts 11 bits; `middle` and `low`, both `[G, TARGETS, LOW_BINS]`, count the next ten bits each.
# `TARGETS` is the number of entries to find per matrix: 1 in mode `SOFT`, 2 (around the quantile) in `OFFICIAL`. Mode
# `NONE` needs no selection. `state` `[G, TARGETS, 2]` contains the leading 11 bits of each target, and its rank among
# the entries with these bits. All of these are int32.

LOW_BINS = tl.constexpr(1024)  # 2^LOW_BITS
LOW_BITS = tl.constexpr(10)


@triton.jit
def find_bin(counts, rank, BINS: tl.constexpr):
    """Return the bin that contains the entry of this rank, and the rank of the entry within the bin.

    Rank 0 is the largest entry. If no bin contains the entry, because the matrix has budget 0 (no entries are counted)
    or a full budget (rank −1), the result is not used.
    """
    bins = tl.arange(0, BINS)
    count = tl.load(counts + bins)
    cumulative = tl.cumsum(count, 0, reverse=True)  # number of entries in this bin and higher ones
    bin_index = tl.sum((cumulative > rank).to(tl.int32), 0) - 1
    above = tl.sum(tl.where(bins > bin_index, count, 0), 0)
    return bin_index, rank - above


@triton.jit
def leading_bits(layout, high, middle, state, group, target, TARGETS: tl.constexpr, LEVEL: tl.constexpr):
    """Return the leading bits of a target after `LEVEL` histograms, and its rank among the entries with these bits.

    These are 11 bits at level 1 and 21 bits at level 2. `target` is the index of the target, 0 or 1.
    """
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
    """Count the next ten bits of all entries that have the leading bits of a target.

    At `LEVEL` 1, the leading bits come from `high`, and the counts are added to `middle`. At `LEVEL` 2, they come from
    `state` and `middle`, and the counts are added to `low`. Level 1 also writes `state`, in one program per matrix.
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
            # without the sign bit, the bits of floats have the order of their magnitudes
            bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
            is_match = (entry < size) & ((bits >> (shift + LOW_BITS)) == prefix)
            bins += tl.histogram((bits >> shift) & (LOW_BINS - 1), LOW_BINS, mask=is_match)
        out = middle if LEVEL == 1 else low
        out += (group * TARGETS + target) * LOW_BINS + tl.arange(0, LOW_BINS)
        tl.atomic_add(out, bins, mask=bins > 0, sem="relaxed")


@triton.jit
def order_statistic(layout, high, middle, low, state, group, target, TARGETS: tl.constexpr):
    """Return the `|ΔW|` at the rank of a target, from all 31 bits."""
    prefix, rank = leading_bits(layout, high, middle, state, group, target, TARGETS, 2)
    bin_index, _ = find_bin(low + (group * TARGETS + target) * LOW_BINS, rank, LOW_BINS)
    return ((prefix << LOW_BITS) | bin_index).to(tl.float32, bitcast=True)


@triton.jit
def finish_thresholds(layout, high, middle, low, state, thresholds, TARGETS: tl.constexpr):
    """Write the threshold of each matrix, `[G]`.

    The threshold is the magnitude of the target. With two targets, it is interpolated between them by the fraction in
    `layout`. It is 0 for a full budget (rank −1), and infinity for budget 0, so that no entry exceeds it.
    """
    group = tl.program_id(0)
    active = tl.load(layout + group * LAYOUT_FIELDS + 2)
    rank = tl.load(layout + group * LAYOUT_FIELDS + 3)
    threshold = order_statistic(layout, high, middle, low, state, group, 0, TARGETS)
    if TARGETS == 2:
        # the next larger magnitude
        above = order_statistic(layout, high, middle, low, state, group, 1, TARGETS)
        fraction = tl.load(layout + group * LAYOUT_FIELDS + 5).to(tl.float32, bitcast=True)
        # interpolate from the nearer end, like torch.lerp
        upwards = threshold + fraction * (above - threshold)
        downwards = above - (above - threshold) * (1.0 - fraction)
        threshold = tl.where(fraction < 0.5, upwards, downwards)
    threshold = tl.where(rank < 0, 0.0, threshold)
    tl.store(thresholds + group, tl.where(active > 0, threshold, float("inf")))
