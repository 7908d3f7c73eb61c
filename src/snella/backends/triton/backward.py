# mypy: ignore-errors
"""Triton kernels of the backward pass, from `∂L/∂W` to the factors and scalars.

The kernels recompute distances and softmax from the factors. Each program writes the partial sums of its tile; these
sums are added in a fixed order afterwards, without atomic float additions. The shape letters are those of `forward`,
plus `q` tiles of rows and `s` tiles of columns. In formulas (but not in shapes), `G` is `∂L/∂ΔW`, and `Z` is the
softmax, as in `DERIVATION.md`.
"""

import triton
import triton.language as tl

from snella.backends.triton.forward import (
    LAYOUT_FIELDS,
    NONE,
    SOFT,
    along_axis,
    clamp,
    distance,
    mean_prob,
    piecewise,
    scale_logits,
    softmax_probs,
)


@triton.jit
def delta_gradient(delta, grad, thresholds, group, start, i, j, inside, scaling, n, MODE: tl.constexpr):
    """Compute `G = ∂L/∂ΔW = scaling·∂S/∂ΔW ⊙ ∂L/∂W` on a tile."""
    first = start.to(tl.int64) * n
    entry = i[:, None] * n + j[None, :]
    magnitude = tl.abs(tl.load(delta + first + entry, mask=inside, other=0.0))
    threshold = tl.load(thresholds + group)
    slope = magnitude
    if MODE == SOFT:
        slope = 2 * magnitude - threshold
    elif MODE == NONE:
        slope = tl.zeros_like(magnitude) + 1.0
    slope = tl.where(inside & (magnitude > threshold), slope, 0.0)
    return slope * tl.load(grad + first + entry, mask=inside, other=0.0).to(tl.float32) * scaling


@triton.jit
def softmax_weighted_sums(
    A,
    B,
    coeff,
    temperature,
    layout,
    max_logit,
    inverse_sum,
    delta,
    thresholds,
    grad,
    partial,
    scaling,
    n,
    num_sums,
    P: tl.constexpr,
    R: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    AXIS: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write `Σ_axis G ⊙ Z` of each tile: `partial` `[q, num_sums = G·n]` for `AXIS` 0, `[s, num_sums = m]` for 1."""
    group = tl.program_id(2)
    start = tl.load(layout + group * LAYOUT_FIELDS)
    active = tl.load(layout + group * LAYOUT_FIELDS + 2)
    i = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i_inside, j_inside = i < active, j < tl.where(active > 0, n, 0)
    inside = i_inside[:, None] & j_inside[None, :]
    value = piecewise(B + start * R, A + group * n * R, coeff + group * P, clamp(i, active), clamp(j, n), R // P, P, R)
    probs = softmax_probs(
        value, temperature, max_logit, inverse_sum, group, start, i, j, i_inside, j_inside, n, HAS_TEMPERATURE, AXIS
    )
    gradient = delta_gradient(delta, grad, thresholds, group, start, i, j, inside, scaling, n, MODE)
    weighted = tl.where(inside, gradient * probs, 0.0)
    if AXIS == 0:
        tl.store(partial + tl.program_id(1) * num_sums + group * n + j, tl.sum(weighted, 0), mask=j < n)
    else:
        tl.store(partial + tl.program_id(0) * num_sums + start + i, tl.sum(weighted, 1), mask=i_inside)


@triton.jit(do_not_specialize=["R"])
def factor_gradients(
    A,
    B,
    coeff,
    alpha,
    temperature,
    layout,
    max_logit,
    inverse_sum,
    weighted_sum,
    delta,
    thresholds,
    grad,
    grad_A,
    grad_B,
    sums,
    scaling,
    n,
    m,
    R,
    P: tl.constexpr,
    SOFTMAX: tl.constexpr,
    LINEAR_TERM: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    AXIS: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write each tile's partial gradients: `grad_A` `[q, G, n, R]`, `grad_B` `[s, m, R]`, `sums` `[G, q·s, P + 3]`.

    `sums` contains `Σ ∂L/∂κ·d_p` for each piece, then `Σ G`, `Σ G⊙Z`, and `Σ ∂L/∂(κ/γ)·κ/γ`. The rank is a runtime
    argument, because the compiler would unroll loops of constant length and keep their factors in up to 255 registers.
    """
    group = tl.program_id(2)
    width = R // P
    start = tl.load(layout + group * LAYOUT_FIELDS)
    count = tl.load(layout + group * LAYOUT_FIELDS + 1)
    active = tl.load(layout + group * LAYOUT_FIELDS + 2)
    i = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i_inside, j_inside = i < active, j < tl.where(active > 0, n, 0)
    inside = i_inside[:, None] & j_inside[None, :]
    first, second, i_load, j_load = B + start * R, A + group * n * R, clamp(i, active), clamp(j, n)
    gradient = delta_gradient(delta, grad, thresholds, group, start, i, j, inside, scaling, n, MODE)
    tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    sums += (group * tl.num_programs(1) * tl.num_programs(0) + tile) * (P + 3)
    tl.store(sums + P, tl.sum(gradient))
    if SOFTMAX:
        value = piecewise(first, second, coeff + group * P, i_load, j_load, width, P, R)
        probs = softmax_probs(
            value, temperature, max_logit, inverse_sum, group, start, i, j, i_inside, j_inside, n, HAS_TEMPERATURE, AXIS
        )
        axis_sum = along_axis(weighted_sum, group, start, i, j, i_inside, j_inside, n, AXIS)
        weighted = tl.where(inside, gradient * probs, 0.0)
        grad_logits = tl.load(alpha + group).to(tl.float32) * (weighted - probs * axis_sum)
        grad_logits = tl.where(inside, grad_logits, 0.0)
        tl.store(sums + P + 1, tl.sum(weighted))
        if HAS_TEMPERATURE:
            logits = scale_logits(value, temperature, group, HAS_TEMPERATURE)
            tl.store(sums + P + 2, tl.sum(tl.where(inside, grad_logits * logits, 0.0)))
            grad_logits = scale_logits(grad_logits, temperature, group, HAS_TEMPERATURE)
        grad_value = grad_logits + gradient if LINEAR_TERM else grad_logits
    else:
        grad_value = gradient
    grad_B += (tl.program_id(0).to(tl.int64) * m + start) * R
    grad_A += (tl.program_id(1).to(tl.int64) * tl.num_programs(2) + group) * n * R
    for p in range(P):
        dist = distance(first, second, i_load, j_load, p, width, R)
        tl.store(sums + p, tl.sum(tl.where(inside, grad_value * dist, 0.0)))
        # zero distances have no gradient
        coef = tl.load(coeff + group * P + p).to(tl.float32) * grad_value
        coef = tl.where(dist == 0.0, 0.0, tl.div_rn(coef, tl.where(dist == 0.0, 1.0, dist)))
        coef = tl.where(inside, coef, 0.0)
        for k in range(p * width, (p + 1) * width):
            b = tl.load(first + i_load * R + k).to(tl.float32)
            a = tl.load(second + j_load * R + k).to(tl.float32)
            grad_diff = coef * (b[:, None] - a[None, :])
            tl.store(grad_B + i * R + k, tl.where(i_inside, tl.sum(grad_diff, 1), 0.0), mask=i < count)
            tl.store(grad_A + j * R + k, tl.where(j_inside, -tl.sum(grad_diff, 0), 0.0), mask=j < n)


@triton.jit
def scalar_gradients(
    sums,
    layout,
    temperature,
    grad_coeff,
    grad_alpha,
    grad_beta,
    grad_temperature,
    n,
    num_tiles,
    P: tl.constexpr,
    SOFTMAX: tl.constexpr,
    CENTER: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    AXIS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradients of each matrix's scalars from its tiles' sums, added in float64."""
    group = tl.program_id(0)
    active = tl.load(layout + group * LAYOUT_FIELDS + 2)
    sums += group * num_tiles * (P + 3)
    for p in tl.static_range(P):
        store_as(grad_coeff + group * P + p, strided_sum(sums + p, num_tiles, P + 3, BLOCK))
    if SOFTMAX:
        grad_sum = strided_sum(sums + P, num_tiles, P + 3, BLOCK)
        alpha_grad = strided_sum(sums + P + 1, num_tiles, P + 3, BLOCK)
        if CENTER:
            alpha_grad -= grad_sum * mean_prob(active, n, AXIS).to(tl.float64)
        store_as(grad_alpha + group, alpha_grad)
        store_as(grad_beta + group, grad_sum)
        if HAS_TEMPERATURE:
            gamma = tl.load(temperature + group).to(tl.float64)
            store_as(grad_temperature + group, -strided_sum(sums + P + 2, num_tiles, P + 3, BLOCK) / gamma)


@triton.jit
def strided_sum(values, count, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Sum `count` numbers with stride `STRIDE` in float64."""
    lanes = tl.zeros([BLOCK], tl.float64)
    for first in range(0, count, BLOCK):
        position = first + tl.arange(0, BLOCK)
        lanes += tl.load(values + position * STRIDE, mask=position < count, other=0.0).to(tl.float64)
    return tl.sum(lanes, 0)


@triton.jit
def store_as(target, value):
    """Store a value in the dtype of the target."""
    tl.store(target, value.to(tl.float32).to(target.dtype.element_ty))
