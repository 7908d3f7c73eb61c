"""Numba kernels of the forward pass: merge factors into `ΔW`, sparsify it to `S`, and add `scaling·S` to a weight.

A matrix is split into blocks of columns, so that the softmax of each column completes while its block is in the cache.
Only passes that select the threshold write `ΔW`. With known column statistics, rows can be merged one at a time,
contiguously in memory (`merge_row`). Every `compiled` function works on the blocks (or rows) `first … last − 1` without
the GIL, so that several threads can share a matrix. Results do not depend on how blocks are distributed over threads,
and `ΔW` is bit-identical in every pass: `merge_block` and `merge_row` perform the same operations in the same order.

Shape letters: `m` outputs, `n` inputs, `P` pieces of width `R`, `K = P·R`, `w` columns of a block. A block's
part of `A` `[n, K]` is transposed into `tile` `[K, w]`, so that the innermost loop is contiguous.
"""

# ruff: noqa: D103
from __future__ import annotations

import math

import numpy as np
from numba import njit

from snella.backends.numba.compile import (
    FASTMATH_STRICT_ORDER,
    NO_CONTRACT,
    bits_of_float,
    compiled,
    exponential,
    float_of_bits,
    load_as_f32,
    prefetch,
    store_from_f32,
)

ZERO = np.float32(0)
HISTOGRAM_BINS = 1 << 12  # exponent and leading 7 bits of the mantissa, for 32 exponents
_HISTOGRAM_SHIFT, _FIRST_BIN = np.int32(16), np.int32((127 - 30) << 7)  # the first bin starts at 2^-30
ROW_TILE_WIDTH = 768  # tile width of row-wise merges: 24 KiB at rank 8
PREFETCH_DISTANCE = 6  # rows to prefetch ahead
_MAGNITUDE = np.int32(0x7FFFFFFF)
SOFT, OFFICIAL, NONE = 0, 1, 2  # modes of `sparsify`


@njit(**FASTMATH_STRICT_ORDER, inline="always")
def histogram_bin(value):
    # monotonic in the magnitude; the first and last bins include out-of-range values
    leading = ((bits_of_float(value) & _MAGNITUDE) >> _HISTOGRAM_SHIFT) - _FIRST_BIN
    return min(max(leading, np.int32(0)), np.int32(HISTOGRAM_BINS - 1))


def bin_bit_range(index: int) -> tuple[np.int32, np.uint32]:
    """Return the lowest bit pattern of the magnitudes in a histogram bin, and the number of bit patterns."""
    lowest, end = ((int(_FIRST_BIN) + index + k) << int(_HISTOGRAM_SHIFT) for k in range(2))
    lowest, end = 0 if index == 0 else lowest, 1 << 31 if index == HISTOGRAM_BINS - 1 else end
    return np.int32(lowest), np.uint32(end - lowest)


@njit(**FASTMATH_STRICT_ORDER)
def copy_tile(A, start, w, tile):
    # tile = the block's rows of A, transposed
    for k in range(A.shape[1]):
        for j in range(w):
            tile[k, j] = A[np.uintp(start + j), k]


@njit(**FASTMATH_STRICT_ORDER)
def prefetch_row(array, i, start, w):
    # prefetch the block's part of a later row
    if i + PREFETCH_DISTANCE < array.shape[0]:
        for j in range(0, w, 16):
            prefetch(array, i + PREFETCH_DISTANCE, start + j)


@njit(**FASTMATH_STRICT_ORDER)
def squared_distances(tile, B, i, first, last, w, squares):
    # squares[j] = Σ_k (B[i, k] − tile[k, j])², k = first … last − 1, four at a time
    for j in range(w):
        squares[j] = ZERO
    k = first
    while k + 4 <= last:
        b0, b1, b2, b3 = B[i, k], B[i, k + 1], B[i, k + 2], B[i, k + 3]
        for j in range(w):
            d0, d1, d2, d3 = b0 - tile[k, j], b1 - tile[k + 1, j], b2 - tile[k + 2, j], b3 - tile[k + 3, j]
            squares[j] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)
        k += 4
    while k < last:
        b = B[i, k]
        for j in range(w):
            difference = b - tile[k, j]
            squares[j] += difference * difference
        k += 1


@njit(**FASTMATH_STRICT_ORDER)
def distances_p2_r8(tile, B, coeff, i, w, value, row):
    # `weighted_distances` for two pieces of width four, the default
    c0, b0, b1, b2, b3 = coeff[0], B[i, 0], B[i, 1], B[i, 2], B[i, 3]
    c1, b4, b5, b6, b7 = coeff[1], B[i, 4], B[i, 5], B[i, 6], B[i, 7]
    for j in range(w):
        d0, d1, d2, d3 = b0 - tile[0, j], b1 - tile[1, j], b2 - tile[2, j], b3 - tile[3, j]
        d4, d5, d6, d7 = b4 - tile[4, j], b5 - tile[5, j], b6 - tile[6, j], b7 - tile[7, j]
        first = math.sqrt((d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3))
        second = math.sqrt((d4 * d4 + d5 * d5) + (d6 * d6 + d7 * d7))
        value[row, j] = c0 * first + c1 * second


@njit(**FASTMATH_STRICT_ORDER)
def weighted_distances(tile, B, coeff, i, w, value, row, squares):
    # value[row, j] = Σ_p coeff[p]·‖B[i, piece p] − tile[piece p, j]‖
    pieces = coeff.shape[0]
    R = tile.shape[0] // pieces
    for j in range(w):
        value[row, j] = ZERO
    for p in range(pieces):
        c = coeff[p]
        squared_distances(tile, B, i, p * R, (p + 1) * R, w, squares)
        for j in range(w):
            value[row, j] += c * math.sqrt(squares[j])


@njit(**FASTMATH_STRICT_ORDER)
def is_p2_r8(tile, coeff):
    return coeff.shape[0] == 2 and tile.shape[0] == 8


@njit(**FASTMATH_STRICT_ORDER)
def merge_block(tile, B, coeff, softmax, w, value, exps, inv_sum, scratch):
    # value[i, j] = linear·κ_p + scale[j]·exps[i, j] + β, or κ_p without a softmax; κ_p is that of `weighted_distances`,
    # exps = exp(κ_p/γ − max_logit), and inv_sum[j] = 1 / Σ_i exps; rows of scratch: squares,
    # max_logit[j] = max_i κ_p/γ, and scale = α·inv_sum
    inv_temperature, linear, alpha, beta, has_softmax = softmax
    m = B.shape[0]
    squares, max_logit, scale = scratch[0], scratch[1], scratch[2]
    for j in range(w):
        max_logit[j] = np.float32(-np.inf)
        inv_sum[j] = ZERO
    is_default = is_p2_r8(tile, coeff)
    for i in range(m):
        if is_default:
            distances_p2_r8(tile, B, coeff, i, w, value, i)
        else:
            weighted_distances(tile, B, coeff, i, w, value, i, squares)
        if has_softmax:
            for j in range(w):
                max_logit[j] = max(max_logit[j], value[i, j] * inv_temperature)
    if not has_softmax:
        return
    for i in range(m):
        for j in range(w):
            exp = exponential(value[i, j] * inv_temperature - max_logit[j])
            exps[i, j] = exp
            inv_sum[j] += exp
    for j in range(w):
        inverse = 1.0 / np.float64(inv_sum[j])
        inv_sum[j] = np.float32(inverse)
        scale[j] = np.float32(alpha * inverse)
    for i in range(m):
        for j in range(w):
            value[i, j] = linear * value[i, j] + scale[j] * exps[i, j] + beta


@njit(**FASTMATH_STRICT_ORDER)
def merge_row(tile, B, coeff, softmax, i, w, columns, start, row, squares):
    # row[0, j] = value[i, j] of `merge_block`, bit-identical, from the column's max_logit and scale
    inv_temperature, linear, _, beta, has_softmax = softmax
    if is_p2_r8(tile, coeff):
        distances_p2_r8(tile, B, coeff, i, w, row, 0)
    else:
        weighted_distances(tile, B, coeff, i, w, row, 0, squares)
    if has_softmax:
        for j in range(w):
            column = np.uintp(start + j)
            exp = exponential(row[0, j] * inv_temperature - columns[0, column])
            row[0, j] = linear * row[0, j] + columns[1, column] * exp + beta


@njit(**FASTMATH_STRICT_ORDER)
def store_column_stats(inv_sum, scratch, start, w, columns):
    # columns = max_logit, scale, and inv_sum of the block's columns, for `merge_row` and the backward pass
    for j in range(w):
        column = np.uintp(start + j)
        columns[0, column], columns[1, column], columns[2, column] = scratch[1, j], scratch[2, j], inv_sum[j]


@njit(**FASTMATH_STRICT_ORDER)
def alloc_workspace(m, K, width):
    # a thread's workspace for blocks of `width` columns: tile, value, exps, inv_sum, and three rows
    block = (m, width)
    tile, value, exps = np.empty((K, width), np.float32), np.empty(block, np.float32), np.empty(block, np.float32)
    return tile, value, exps, np.empty(width, np.float32), np.empty((3, width), np.float32)


@compiled(FASTMATH_STRICT_ORDER)
def merge_and_count(first, last, width, A, B, coeff, softmax, result, bins, columns):
    # result = ΔW, columns = its column statistics
    # bins[block, h] = number of the block's entries in histogram bin h
    m, n = result.shape
    tile, value, exps, inv_sum, scratch = alloc_workspace(m, A.shape[1], width)
    row_bins = np.empty(width, np.uint16)
    for block in range(first, last):
        start = block * width
        w = min(width, n - start)
        copy_tile(A, start, w, tile)
        merge_block(tile, B, coeff, softmax, w, value, exps, inv_sum, scratch)
        store_column_stats(inv_sum, scratch, start, w, columns)
        bins[block, :] = 0
        for i in range(m):
            for j in range(w):
                result[i, np.uintp(start + j)] = value[i, j]
                row_bins[j] = histogram_bin(value[i, j])
            for j in range(w):
                bins[block, row_bins[j]] += 1


@compiled(FASTMATH_STRICT_ORDER)
def collect(first, last, width, value, lowest, span, offsets, result):
    # collect magnitudes with bit patterns lowest … lowest + span − 1; each block writes from offsets[block]
    m, n = value.shape
    for block in range(first, last):
        start = block * width
        w = min(width, n - start)
        position = offsets[block]
        for i in range(m):
            num_hits = np.int32(0)
            for j in range(w):
                num_hits += np.uint32((bits_of_float(value[i, np.uintp(start + j)]) & _MAGNITUDE) - lowest) < span
            if num_hits == 0:
                continue
            for j in range(w):
                bits = bits_of_float(value[i, np.uintp(start + j)]) & _MAGNITUDE
                if np.uint32(bits - lowest) < span:
                    result[position] = float_of_bits(bits)
                    position += 1


@njit(**NO_CONTRACT)
def add_row(base, value, source_row, i, start, w, threshold, scaling, mode, result):
    # result[i, start + j] = base + scaling·S, where ΔW = value[source_row, j], in the dtypes of the arrays
    if mode == SOFT:
        for j in range(w):
            entry, column = value[source_row, j], np.uintp(start + j)
            magnitude = abs(entry)
            weight = magnitude - threshold if magnitude > threshold else ZERO
            result[i, column] = store_from_f32(
                load_as_f32(base[i, column]) + scaling * (entry * weight), result[i, column]
            )
    elif mode == OFFICIAL:
        for j in range(w):
            entry, column = value[source_row, j], np.uintp(start + j)
            magnitude = abs(entry)
            weight = magnitude if magnitude > threshold else ZERO
            result[i, column] = store_from_f32(
                load_as_f32(base[i, column]) + scaling * (entry * weight), result[i, column]
            )
    else:
        for j in range(w):
            column = np.uintp(start + j)
            result[i, column] = store_from_f32(
                load_as_f32(base[i, column]) + scaling * value[source_row, j], result[i, column]
            )


@compiled(NO_CONTRACT)
def add_sparse(first, last, base, value, threshold, scaling, mode, result):
    # result = base + scaling·S on the rows first … last − 1, value = ΔW
    for i in range(first, last):
        add_row(base, value, i, i, 0, value.shape[1], threshold, scaling, mode, result)


@compiled(FASTMATH_STRICT_ORDER)
def measure_column_stats(first, last, width, A, B, coeff, softmax, columns):
    # columns = max_logit, scale, and inv_sum of every column
    m, n = B.shape[0], A.shape[0]
    tile, value, exps, inv_sum, scratch = alloc_workspace(m, A.shape[1], width)
    for block in range(first, last):
        start = block * width
        w = min(width, n - start)
        copy_tile(A, start, w, tile)
        merge_block(tile, B, coeff, softmax, w, value, exps, inv_sum, scratch)
        store_column_stats(inv_sum, scratch, start, w, columns)


@compiled(NO_CONTRACT)
def merge_and_add(first, last, A, B, coeff, softmax, columns, base, threshold, scaling, mode, result):
    # result = base + scaling·S on the rows first … last − 1, merging ΔW row by row
    n = result.shape[1]
    width = min(n, ROW_TILE_WIDTH)
    tile, row, squares = (
        np.empty((A.shape[1], width), np.float32),
        np.empty((1, width), np.float32),
        np.empty(width, np.float32),
    )
    for start in range(0, n, width):
        w = min(width, n - start)
        copy_tile(A, start, w, tile)
        for i in range(first, last):
            merge_row(tile, B, coeff, softmax, i, w, columns, start, row, squares)
            add_row(base, row, 0, i, start, w, threshold, scaling, mode, result)
