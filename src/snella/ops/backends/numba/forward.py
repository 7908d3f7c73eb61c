"""Loops that merge a matrix from its factors, compiled by numba; `backward` holds the way back.

A matrix is cut into blocks of columns, so that a block's softmax, which runs down the columns, is complete while its
numbers are still in the processor's cache: `ΔW` is read from memory only where it has to be selected from, and the
passes that know the threshold never write it. Once a column's largest `κ` and the sum of its exponentials are known, a
row can be merged alone (`merge_row`), along memory. Every function works on the blocks (or rows) `first … last − 1`, so
that several threads can share one matrix; the interpreter's lock is released. What is computed does not depend on how
the blocks are shared out, and a value has the same bits in every pass: `merge_block` and `merge_row` do the same
operations in the same order.

Shape letters: `m` outputs, `n` inputs, `P` pieces of width `R`, `K = P·R`, `w` columns of a block. `A` comes as `[K,
n]`, so that the innermost loop runs over memory; a block's part of it is copied to `tile` `[K, w]`.

Inside a row no array is sliced: merging with slices took 1.7 times as long in blocks of 128 columns, and 3.8 times in
blocks of 16. Loops over rows do one thing each: two loops over a block were quicker than one that did both. What is
called for each row is small, or inlined by force: distances whose function had grown took 27 ns a row more. A column of
the whole matrix is an unsigned number, for which numba asks not whether it is negative.
"""

# ruff: noqa: D103
from __future__ import annotations

import math

import numpy as np
from numba import njit

from snella.ops.backends.numba.compile import (
    AS_TORCH,
    IN_ORDER,
    bits_of_float,
    compiled,
    exponential,
    float_of_bits,
    narrowed,
    prefetch,
    widened,
)

ZERO = np.float32(0)
HISTOGRAM_SHIFT = np.int32(16)  # bins by exponent and the first 7 bits of the mantissa
HISTOGRAM_BINS = 1 << (31 - int(HISTOGRAM_SHIFT))
WIDTH_OF_ROWS = 768  # columns of a tile where rows are merged: 24 KiB at rank 8
AHEAD = 6  # how many rows before its turn a block's part of a row is asked for
_MAGNITUDE = np.int32(0x7FFFFFFF)
SOFT, OFFICIAL, NONE = 0, 1, 2  # the modes of `sparsify`


@njit(**IN_ORDER)
def copy_tile(A, start, w, tile):
    # tile = the block's columns of A
    for k in range(A.shape[0]):
        for j in range(w):
            tile[k, j] = A[k, np.uintp(start + j)]


@njit(**IN_ORDER)
def fetch_ahead(array, i, start, w):
    # have a later row's part of the block on its way from memory
    if i + AHEAD < array.shape[0]:
        for j in range(0, w, 16):
            prefetch(array, i + AHEAD, start + j)


@njit(**IN_ORDER)
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
        one = B[i, k]
        for j in range(w):
            difference = one - tile[k, j]
            squares[j] += difference * difference
        k += 1


@njit(**IN_ORDER)
def distances_of_two_fours(tile, B, coeff, i, w, value, at):
    # `weighted_distances` for two pieces of four, the default, in one go
    c0, b0, b1, b2, b3 = coeff[0], B[i, 0], B[i, 1], B[i, 2], B[i, 3]
    c1, b4, b5, b6, b7 = coeff[1], B[i, 4], B[i, 5], B[i, 6], B[i, 7]
    for j in range(w):
        d0, d1, d2, d3 = b0 - tile[0, j], b1 - tile[1, j], b2 - tile[2, j], b3 - tile[3, j]
        d4, d5, d6, d7 = b4 - tile[4, j], b5 - tile[5, j], b6 - tile[6, j], b7 - tile[7, j]
        first = math.sqrt((d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3))
        second = math.sqrt((d4 * d4 + d5 * d5) + (d6 * d6 + d7 * d7))
        value[at, j] = c0 * first + c1 * second


@njit(**IN_ORDER)
def weighted_distances(tile, B, coeff, i, w, value, at, squares):
    # value[at, j] = Σ_p coeff[p]·‖B[i, piece p] − tile[piece p, j]‖
    pieces = coeff.shape[0]
    R = tile.shape[0] // pieces
    for j in range(w):
        value[at, j] = ZERO
    for p in range(pieces):
        c = coeff[p]
        squared_distances(tile, B, i, p * R, (p + 1) * R, w, squares)
        for j in range(w):
            value[at, j] += c * math.sqrt(squares[j])


@njit(**IN_ORDER)
def are_two_fours(tile, coeff):
    return coeff.shape[0] == 2 and tile.shape[0] == 8


@njit(**IN_ORDER)
def merge_block(tile, B, coeff, softmax, w, value, shares, inv_sum, scratch):
    # value[i, j] = linear·κ_p + scale[j]·shares[i, j] + β, κ_p of `weighted_distances`;
    # shares = exp(κ_p/γ − top), inv_sum[j] = 1 / Σ_i shares; scratch = squares, top = the column's largest κ_p/γ,
    # scale = α·inv_sum
    inv_temperature, linear, alpha, beta, has_softmax = softmax
    m = B.shape[0]
    squares, top, scale = scratch[0], scratch[1], scratch[2]
    for j in range(w):
        top[j] = np.float32(-np.inf)
        inv_sum[j] = ZERO
    is_default = are_two_fours(tile, coeff)
    for i in range(m):
        if is_default:
            distances_of_two_fours(tile, B, coeff, i, w, value, i)
        else:
            weighted_distances(tile, B, coeff, i, w, value, i, squares)
        if has_softmax:
            for j in range(w):
                top[j] = max(top[j], value[i, j] * inv_temperature)
    if not has_softmax:
        return
    for i in range(m):
        for j in range(w):
            one = exponential(value[i, j] * inv_temperature - top[j])
            shares[i, j] = one
            inv_sum[j] += one
    for j in range(w):
        inverse = 1.0 / np.float64(inv_sum[j])
        inv_sum[j] = np.float32(inverse)
        scale[j] = np.float32(alpha * inverse)
    for i in range(m):
        for j in range(w):
            value[i, j] = linear * value[i, j] + scale[j] * shares[i, j] + beta


@njit(**IN_ORDER)
def merge_row(tile, B, coeff, softmax, i, w, columns, start, row, squares):
    # row[0, j] = the same value once more, to the last bit, from the columns' top and scale that `merge_block` found
    inv_temperature, linear, _, beta, has_softmax = softmax
    if are_two_fours(tile, coeff):
        distances_of_two_fours(tile, B, coeff, i, w, row, 0)
    else:
        weighted_distances(tile, B, coeff, i, w, row, 0, squares)
    if has_softmax:
        for j in range(w):
            at = np.uintp(start + j)
            share = exponential(row[0, j] * inv_temperature - columns[0, at])
            row[0, j] = linear * row[0, j] + columns[1, at] * share + beta


@njit(**IN_ORDER)
def keep_columns(scratch, start, w, columns):
    # columns = top and scale of the block's columns, for `merge_row`
    for j in range(w):
        at = np.uintp(start + j)
        columns[0, at], columns[1, at] = scratch[1, j], scratch[2, j]


@njit(**IN_ORDER)
def scratch_of(m, K, width):
    # what a thread needs for blocks of `width` columns: tile, value, shares, inv_sum and three rows
    block = (m, width)
    tile, value, shares = np.empty((K, width), np.float32), np.empty(block, np.float32), np.empty(block, np.float32)
    return tile, value, shares, np.empty(width, np.float32), np.empty((3, width), np.float32)


@compiled(IN_ORDER)
def merge_and_count(first, last, width, A, B, coeff, softmax, result, bins):
    # result = ΔW;  bins[block, h] = entries of the block whose magnitude's leading bits are h
    m, n = result.shape
    tile, value, shares, inv_sum, scratch = scratch_of(m, A.shape[0], width)
    leading = np.empty(width, np.int32)
    for block in range(first, last):
        start = block * width
        w = min(width, n - start)
        copy_tile(A, start, w, tile)
        merge_block(tile, B, coeff, softmax, w, value, shares, inv_sum, scratch)
        bins[block, :] = 0
        for i in range(m):
            for j in range(w):
                result[i, np.uintp(start + j)] = value[i, j]
                leading[j] = (bits_of_float(value[i, j]) & _MAGNITUDE) >> HISTOGRAM_SHIFT
            for j in range(w):
                bins[block, leading[j]] += 1


@compiled(IN_ORDER)
def count(first, last, width, value, bins):
    # the same counts for a matrix that is there already
    m, n = value.shape
    leading = np.empty(width, np.int32)
    for block in range(first, last):
        start = block * width
        w = min(width, n - start)
        bins[block, :] = 0
        for i in range(m):
            for j in range(w):
                leading[j] = (bits_of_float(value[i, np.uintp(start + j)]) & _MAGNITUDE) >> HISTOGRAM_SHIFT
            for j in range(w):
                bins[block, leading[j]] += 1


@compiled(IN_ORDER)
def collect(first, last, width, value, wanted, offsets, result):
    # the magnitudes whose leading bits are `wanted`, block by block from offsets[block] on
    m, n = value.shape
    for block in range(first, last):
        start = block * width
        w = min(width, n - start)
        at = offsets[block]
        for i in range(m):
            found = np.int32(0)
            for j in range(w):
                found += (bits_of_float(value[i, np.uintp(start + j)]) & _MAGNITUDE) >> HISTOGRAM_SHIFT == wanted
            if found == 0:
                continue
            for j in range(w):
                bits = bits_of_float(value[i, np.uintp(start + j)]) & _MAGNITUDE
                if bits >> HISTOGRAM_SHIFT == wanted:
                    result[at] = float_of_bits(bits)
                    at += 1


@njit(**AS_TORCH)
def add_row(base, value, of, i, start, w, threshold, scaling, mode, result):
    # result[i, start + j] = base + scaling·S of value[of, j], in the types that the two arrays hold
    if mode == SOFT:
        for j in range(w):
            one, at = value[of, j], np.uintp(start + j)
            magnitude = abs(one)
            weight = magnitude - threshold if magnitude > threshold else ZERO
            result[i, at] = narrowed(widened(base[i, at]) + scaling * (one * weight), result[i, at])
    elif mode == OFFICIAL:
        for j in range(w):
            one, at = value[of, j], np.uintp(start + j)
            magnitude = abs(one)
            weight = magnitude if magnitude > threshold else ZERO
            result[i, at] = narrowed(widened(base[i, at]) + scaling * (one * weight), result[i, at])
    else:
        for j in range(w):
            at = np.uintp(start + j)
            result[i, at] = narrowed(widened(base[i, at]) + scaling * value[of, j], result[i, at])


@compiled(AS_TORCH)
def add_sparse(first, last, base, value, threshold, scaling, mode, result):
    # result = base + scaling·S on the rows first … last − 1, S from a matrix that is there already
    for i in range(first, last):
        add_row(base, value, i, i, 0, value.shape[1], threshold, scaling, mode, result)


@compiled(IN_ORDER)
def measure_columns(first, last, width, A, B, coeff, softmax, columns):
    # top and scale of every column
    m, n = B.shape[0], A.shape[1]
    tile, value, shares, inv_sum, scratch = scratch_of(m, A.shape[0], width)
    for block in range(first, last):
        start = block * width
        w = min(width, n - start)
        copy_tile(A, start, w, tile)
        merge_block(tile, B, coeff, softmax, w, value, shares, inv_sum, scratch)
        keep_columns(scratch, start, w, columns)


@compiled(AS_TORCH)
def merge_and_add(first, last, A, B, coeff, softmax, columns, base, threshold, scaling, mode, result):
    # result = base + scaling·S on the rows first … last − 1, S merged on the way, along the rows as they lie in memory
    n = result.shape[1]
    width = min(n, WIDTH_OF_ROWS)
    tile, row, squares = (
        np.empty((A.shape[0], width), np.float32),
        np.empty((1, width), np.float32),
        np.empty(width, np.float32),
    )
    for start in range(0, n, width):
        w = min(width, n - start)
        copy_tile(A, start, w, tile)
        for i in range(first, last):
            merge_row(tile, B, coeff, softmax, i, w, columns, start, row, squares)
            add_row(base, row, 0, i, start, w, threshold, scaling, mode, result)


_TILE = 32  # entries that are looked at together; most tiles have nothing inside the window


@njit(**IN_ORDER)
def collect_row(value, i, w, low, high, candidates, block, at):
    # append the magnitudes of row i in [low, high] to candidates[block, :at] and return how many there are now, −1 if
    # there may be no room
    for start in range(0, w, _TILE):
        width = min(_TILE, w - start)
        found = np.int32(0)
        for j in range(width):
            magnitude = abs(value[i, np.uintp(start + j)])
            found += (magnitude >= low) & (magnitude <= high)
        if found == 0:
            continue
        if at + width > candidates.shape[1]:
            return -1
        for j in range(width):  # without a branch: what is not wanted is written over by the next
            magnitude = abs(value[i, np.uintp(start + j)])
            candidates[block, at] = magnitude
            at += (magnitude >= low) & (magnitude <= high)
    return at


@compiled(IN_ORDER)
def merge_and_collect(first, last, width, A, B, coeff, softmax, columns, low, high, candidates, inside, above):
    # columns = top and scale of every column; candidates[block] = magnitudes in [low, high], inside[block] of them, −1
    # if there may be more than there is room for; above[block] = how many exceed high
    m, n = B.shape[0], A.shape[1]
    tile, value, shares, inv_sum, scratch = scratch_of(m, A.shape[0], width)
    for block in range(first, last):
        start = block * width
        w = min(width, n - start)
        copy_tile(A, start, w, tile)
        merge_block(tile, B, coeff, softmax, w, value, shares, inv_sum, scratch)
        keep_columns(scratch, start, w, columns)
        total = 0
        for i in range(m):
            more = np.int32(0)
            for j in range(w):
                more += abs(value[i, j]) > high
            total += more
        at = 0
        for i in range(m):
            at = collect_row(value, i, w, low, high, candidates, block, at)
            if at < 0:
                break
        inside[block], above[block] = at, total
