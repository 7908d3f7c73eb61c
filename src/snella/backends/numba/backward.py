"""Numba kernels of the backward pass, from ∂L/∂W to the factors and scalars; shape letters as in `forward`.

Functions with reassociated sums are inlined. Otherwise, Numba could compile a function twice, standalone and inside its
caller, with different orders of summation. A process that loads the caller from the disk cache could then use a
different order than an earlier process, and a resumed run would differ in the last bits.
"""

# ruff: noqa: D103
from __future__ import annotations

import math

import numpy as np
from numba import njit

from snella.backends.numba.compile import FASTMATH_REASSOC, FASTMATH_STRICT_ORDER, compiled, exponential
from snella.backends.numba.forward import (
    NONE,
    SOFT,
    ZERO,
    add_row,
    alloc_workspace,
    copy_tile,
    distances_p2_r8,
    is_p2_r8,
    merge_block,
    prefetch_row,
    squared_distances,
    weighted_distances,
)

ROWS = 4  # rows of the merged matrix per gradient accumulation
# workspace lines of the default kernel: 8 of A, 8 of its gradient, 8 of coefficients (two per row), then these
SCALE, MEAN, BY_DISTANCE, LINES = 24, 25, 26, 28


@njit(**FASTMATH_STRICT_ORDER)
def merge_block_and_gradient(
    tile,
    B,
    coeff,
    softmax,
    columns,
    start,
    w,
    grad,
    threshold,
    scaling,
    mode,
    writes_result,
    base,
    result,
    value,
    exps,
    scratch,
):
    # value[i, j] = G = grad·scaling·∂S/∂ΔW of the block, row by row; ΔW is computed from the column statistics,
    # bit-identical to that of `merge_block`; scratch = squares, Σ_i G, Σ_i G·exps per column; if writes_result, also
    # result = base + scaling·S
    inv_temperature, linear, _, beta, has_softmax = softmax
    squares, total, mean = scratch[0], scratch[1], scratch[2]
    m = B.shape[0]
    slope, offset = np.float32(1), ZERO
    if mode == SOFT:
        slope, offset = np.float32(2), threshold
    elif mode == NONE:
        slope, offset = ZERO, np.float32(-1)
    for j in range(w):
        total[j] = mean[j] = ZERO
    is_default = is_p2_r8(tile, coeff)
    for i in range(m):
        prefetch_row(grad, i, start, w)
        if is_default:
            distances_p2_r8(tile, B, coeff, i, w, value, i)
        else:
            weighted_distances(tile, B, coeff, i, w, value, i, squares)
        if has_softmax:
            for j in range(w):
                column = np.uintp(start + j)
                exp = exponential(value[i, j] * inv_temperature - columns[0, column])
                exps[i, j] = exp
                value[i, j] = linear * value[i, j] + columns[1, column] * exp + beta
        if writes_result:
            prefetch_row(base, i, start, w)
            prefetch_row(result, i, start, w)
            add_row(base, value, i, i, start, w, threshold, scaling, mode, result)
        for j in range(w):
            magnitude = abs(value[i, j])
            grad_entry = (
                grad[i, np.uintp(start + j)] * scaling * (slope * magnitude - offset) if magnitude > threshold else ZERO
            )
            value[i, j] = grad_entry
            total[j] += grad_entry
        if has_softmax:
            for j in range(w):
                mean[j] += value[i, j] * exps[i, j]


@njit(**FASTMATH_REASSOC, inline="always")
def row_grad_coefs(i, q, w, R, tile, B, coeff, softmax, value, exps, scale, mean, rows, coefs, sums, chunk):
    # coefs[q, p] = ∂L/∂κ_p·coeff[p] / distance of row i; multiplied by B − tile, it is the contribution to the gradient
    # of B and, negated, to that of A; sums[chunk] accumulates the row's contribution to the scalars' gradients
    _, linear, _, _, has_softmax = softmax
    pieces = coeff.shape[0]
    from_softmax, from_value, squares = rows[0], rows[1], rows[2]
    for j in range(w):
        from_softmax[j] = scale[j] * exps[i, j] * (value[i, j] - mean[j]) if has_softmax else ZERO
        from_value[j] = linear * value[i, j] + from_softmax[j]
    by_value = ZERO
    for p in range(pieces):
        c, by_distance, by_softmax = coeff[p], ZERO, ZERO
        k = p * R
        if R == 4:
            b0, b1, b2, b3 = B[i, k], B[i, k + 1], B[i, k + 2], B[i, k + 3]
            for j in range(w):
                d0, d1, d2, d3 = b0 - tile[k, j], b1 - tile[k + 1, j], b2 - tile[k + 2, j], b3 - tile[k + 3, j]
                distance = math.sqrt((d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3))
                by_distance += from_value[j] * distance
                by_softmax += from_softmax[j] * distance
                coefs[q, p, j] = c * from_value[j] / distance if distance > ZERO else ZERO
        else:
            squared_distances(tile, B, i, k, k + R, w, squares)
            for j in range(w):
                distance = math.sqrt(squares[j])
                by_distance += from_value[j] * distance
                by_softmax += from_softmax[j] * distance
                coefs[q, p, j] = c * from_value[j] / distance if distance > ZERO else ZERO
        sums[chunk, p] += by_distance
        by_value += c * by_softmax
    sums[chunk, pieces] += by_value


@njit(**FASTMATH_REASSOC, inline="always")
def accumulate_factor_grads(i, num_rows, w, R, tile, B, coefs, grad_A_acc, grad_B, chunk):
    # add coefs·(B − tile) of the rows i … i + num_rows − 1, num_rows ≤ ROWS, to grad_A_acc and grad_B[chunk];
    # one loop over several rows reads tile and grad_A_acc only once
    pieces, m = coefs.shape[1], B.shape[0]
    i1, i2, i3 = min(i + 1, m - 1), min(i + 2, m - 1), min(i + 3, m - 1)
    for p in range(pieces):
        for k in range(p * R, (p + 1) * R):
            b0, b1, b2, b3 = B[i, k], B[i1, k], B[i2, k], B[i3, k]
            t0, t1, t2, t3 = ZERO, ZERO, ZERO, ZERO
            for j in range(w):
                a = tile[k, j]
                x0 = coefs[0, p, j] * (b0 - a)
                x1 = coefs[1, p, j] * (b1 - a)
                x2 = coefs[2, p, j] * (b2 - a)
                x3 = coefs[3, p, j] * (b3 - a)
                grad_A_acc[k, j] += (x0 + x1) + (x2 + x3)
                t0 += x0
                t1 += x1
                t2 += x2
                t3 += x3
            grad_B[chunk, i, k] += t0
            if num_rows > 1:
                grad_B[chunk, i1, k] += t1
            if num_rows > 2:
                grad_B[chunk, i2, k] += t2
            if num_rows > 3:
                grad_B[chunk, i3, k] += t3


@njit(**FASTMATH_REASSOC, inline="always")
def row_grad_coefs_p2_r8(i, line, w, lines, B, coeff, linear, value, exps):
    # `row_grad_coefs` for two pieces of width four, the default, in one loop; writes the coefficients to lines `line`
    # and `line + 1`. The compiler vectorizes the loop only if it knows which lines of which array the loop accesses
    c0, c1 = coeff[0], coeff[1]
    b0, b1, b2, b3 = B[i, 0], B[i, 1], B[i, 2], B[i, 3]
    b4, b5, b6, b7 = B[i, 4], B[i, 5], B[i, 6], B[i, 7]
    for j in range(w):
        grad_value = linear * value[i, j] + lines[SCALE, j] * exps[i, j] * (value[i, j] - lines[MEAN, j])
        d0, d1, d2, d3 = b0 - lines[0, j], b1 - lines[1, j], b2 - lines[2, j], b3 - lines[3, j]
        d4, d5, d6, d7 = b4 - lines[4, j], b5 - lines[5, j], b6 - lines[6, j], b7 - lines[7, j]
        first = math.sqrt((d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3))
        second = math.sqrt((d4 * d4 + d5 * d5) + (d6 * d6 + d7 * d7))
        lines[BY_DISTANCE, j] += grad_value * first
        lines[BY_DISTANCE + 1, j] += grad_value * second
        lines[line, j] = c0 * grad_value / first if first > ZERO else ZERO
        lines[line + 1, j] = c1 * grad_value / second if second > ZERO else ZERO


@njit(**FASTMATH_REASSOC, inline="always")
def rows_grad_p2_r8(i, num_rows, w, lines, B, coeff, linear, value, exps, grad_B, chunk):
    # `row_grad_coefs` and `accumulate_factor_grads` for the rows i … i + num_rows − 1, num_rows = ROWS or 1, for two
    # pieces of width four without the gradient of the temperature
    row_grad_coefs_p2_r8(i, 16, w, lines, B, coeff, linear, value, exps)
    if num_rows == ROWS:
        row_grad_coefs_p2_r8(i + 1, 18, w, lines, B, coeff, linear, value, exps)
        row_grad_coefs_p2_r8(i + 2, 20, w, lines, B, coeff, linear, value, exps)
        row_grad_coefs_p2_r8(i + 3, 22, w, lines, B, coeff, linear, value, exps)
    m = B.shape[0]
    i1, i2, i3 = min(i + 1, m - 1), min(i + 2, m - 1), min(i + 3, m - 1)
    for k in range(8):
        b0, b1, b2, b3 = B[i, k], B[i1, k], B[i2, k], B[i3, k]
        t0, t1, t2, t3 = ZERO, ZERO, ZERO, ZERO
        coef_line = 16 + k // 4
        if num_rows == ROWS:
            for j in range(w):
                a = lines[k, j]
                x0 = lines[coef_line, j] * (b0 - a)
                x1 = lines[coef_line + 2, j] * (b1 - a)
                x2 = lines[coef_line + 4, j] * (b2 - a)
                x3 = lines[coef_line + 6, j] * (b3 - a)
                lines[8 + k, j] += (x0 + x1) + (x2 + x3)
                t0 += x0
                t1 += x1
                t2 += x2
                t3 += x3
            grad_B[chunk, i1, k] += t1
            grad_B[chunk, i2, k] += t2
            grad_B[chunk, i3, k] += t3
        else:
            for j in range(w):
                x0 = lines[coef_line, j] * (b0 - lines[k, j])
                lines[8 + k, j] += x0
                t0 += x0
        grad_B[chunk, i, k] += t0


@njit(**FASTMATH_REASSOC, inline="always")
def block_grad_p2_r8(w, lines, tile, scale, mean, B, coeff, linear, value, exps, grad_A_acc, grad_B, sums, chunk):
    # gradients of a block's factors and coefficients, ROWS rows at a time; the remaining rows follow one by one
    m = B.shape[0]
    for j in range(w):
        lines[SCALE, j], lines[MEAN, j] = scale[j], mean[j]
        lines[BY_DISTANCE, j] = lines[BY_DISTANCE + 1, j] = ZERO
    for k in range(8):
        for j in range(w):
            lines[k, j], lines[8 + k, j] = tile[k, j], ZERO
    num_full = m - m % ROWS
    for i in range(0, num_full, ROWS):
        rows_grad_p2_r8(i, ROWS, w, lines, B, coeff, linear, value, exps, grad_B, chunk)
    for i in range(num_full, m):
        rows_grad_p2_r8(i, 1, w, lines, B, coeff, linear, value, exps, grad_B, chunk)
    for p in range(2):
        for j in range(w):
            sums[chunk, p] += lines[BY_DISTANCE + p, j]
    for k in range(8):
        for j in range(w):
            grad_A_acc[k, j] = lines[8 + k, j]


@compiled(FASTMATH_REASSOC)
def factor_gradients(
    first,
    last,
    per_chunk,
    width,
    A,
    B,
    coeff,
    softmax,
    columns,
    grad,
    threshold,
    scaling,
    mode,
    has_temperature,
    writes_result,
    base,
    result,
    grad_A,
    grad_B,
    means,
    sums,
):
    # G = ∂L/∂ΔW of `merge_block_and_gradient`;  means[j] = Σ_i G·softmax
    # ∂L/∂κ_p = linear·G + (α/γ)·softmax·(G − means), softmax = exps·inv_sum
    # grad_A is complete; grad_B[q] and sums[q] belong to the q-th chunk of `per_chunk` blocks:
    # sums[q, p] = Σ ∂L/∂κ_p·distance, sums[q, P + 1] = Σ G; with temperature also
    # sums[q, P] = Σ (softmax's part of ∂L/∂κ_p)·κ_p
    inv_temperature, linear, alpha, _, has_softmax = softmax
    m, n = grad.shape
    pieces, K = coeff.shape[0], A.shape[1]
    R, blocks = K // pieces, (n + width - 1) // width
    tile, value, exps, _, scratch = alloc_workspace(m, K, width)
    grad_A_acc, rows = np.empty((K, width), np.float32), np.empty((3, width), np.float32)
    coefs = np.empty((ROWS, pieces, width), np.float32)
    scale, mean = np.empty(width, np.float32), np.empty(width, np.float32)
    lines, is_default = np.empty((LINES, width), np.float32), is_p2_r8(tile, coeff) and not has_temperature
    if not has_softmax:
        exps[:, :] = ZERO
    for chunk in range(first, last):
        grad_B[chunk, :, :] = ZERO
        sums[chunk, :] = 0.0
        for block in range(chunk * per_chunk, min((chunk + 1) * per_chunk, blocks)):
            start = block * width
            w = min(width, n - start)
            copy_tile(A, start, w, tile)
            merge_block_and_gradient(
                tile, B, coeff, softmax, columns, start, w, grad, threshold, scaling, mode, writes_result, base, result,
                value, exps, scratch
            )  # fmt: skip
            for j in range(w):
                column = np.uintp(start + j)
                inverse = columns[2, column] if has_softmax else ZERO
                sums[chunk, pieces + 1] += scratch[1, j]
                mean[j] = scratch[2, j] * inverse
                means[column] = mean[j]
                scale[j] = np.float32(alpha) * inv_temperature * inverse
            if is_default:
                block_grad_p2_r8(
                    w, lines, tile, scale, mean, B, coeff, linear, value, exps, grad_A_acc, grad_B, sums, chunk
                )
            else:
                grad_A_acc[:, :] = ZERO
                for i in range(0, m, ROWS):
                    num_rows = min(ROWS, m - i)
                    for q in range(num_rows):
                        row_grad_coefs(
                            i + q, q, w, R, tile, B, coeff, softmax, value, exps, scale, mean, rows, coefs, sums, chunk
                        )
                    if num_rows < ROWS:
                        coefs[num_rows:, :, :] = ZERO
                    accumulate_factor_grads(i, num_rows, w, R, tile, B, coefs, grad_A_acc, grad_B, chunk)
            for k in range(K):
                for j in range(w):
                    grad_A[np.uintp(start + j), k] = -grad_A_acc[k, j]


@compiled(FASTMATH_STRICT_ORDER)
def list_entries(first, last, width, A, B, coeff, softmax, threshold, rows, columns, counts):
    # positions of each block's entries above the threshold; counts[block] is their number, or −1 if they do not fit
    m, n = B.shape[0], A.shape[0]
    tile, value, exps, inv_sum, scratch = alloc_workspace(m, A.shape[1], width)
    for block in range(first, last):
        start = block * width
        w = min(width, n - start)
        copy_tile(A, start, w, tile)
        merge_block(tile, B, coeff, softmax, w, value, exps, inv_sum, scratch)
        position = 0
        for i in range(m):
            num_hits = np.int32(0)
            for j in range(w):
                num_hits += abs(value[i, j]) > threshold
            if num_hits == 0:
                continue
            if position + num_hits > rows.shape[1]:
                position = -1
                break
            for j in range(w):
                if abs(value[i, j]) > threshold:
                    rows[block, position], columns[block, position] = i, start + j
                    position += 1
        counts[block] = position


@compiled(FASTMATH_REASSOC)
def sddmm_accumulate(first, last, grad_y, x, rows, columns, counts, sums):
    # sums[block, e] += Σ_t grad_y[rows[e], t]·x[columns[e], t]; tokens t are contiguous in both
    tokens = x.shape[1]
    for block in range(first, last):
        row_indices, column_indices, total = rows[block], columns[block], sums[block]
        for e in range(counts[block]):
            left, right = grad_y[row_indices[e]], x[column_indices[e]]
            dot = ZERO
            for t in range(tokens):
                dot += left[t] * right[t]
            total[e] += dot


@compiled(FASTMATH_STRICT_ORDER)
def sddmm_scatter(first, last, rows, columns, counts, sums, result):
    for block in range(first, last):
        row_indices, column_indices, total = rows[block], columns[block], sums[block]
        for e in range(counts[block]):
            result[row_indices[e], column_indices[e]] = total[e]
