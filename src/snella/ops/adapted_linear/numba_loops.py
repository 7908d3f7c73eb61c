"""Loops that merge a matrix from its factors, compiled by numba; `numba_gradients` holds the way back.

A matrix is cut into blocks of columns, so that a block's softmax, which runs down the columns, is complete while its
numbers are still in the processor's cache: `ΔW` is read from memory only where it has to be selected from, and the
passes that know the threshold never write it. Every function works on the blocks (or rows) `first … last − 1`, so that
several threads can share one matrix; the interpreter's lock is released. What is computed does not depend on how the
blocks are shared out, and a value has the same bits in every pass, since all of them come from `merge_block`.

Shape letters: `m` outputs, `n` inputs, `P` pieces of width `R`, `K = P·R`, `w` columns of a block. `A` comes as
`[K, n]`, so that the innermost loop runs over memory; a block's part of it is copied to `tile` `[K, w]`.

Inside a row no array is sliced: merging with slices took 1.7 times as long in blocks of 128 columns, and 3.8 times in
blocks of 16. A column of the whole matrix is an unsigned number, for which numba asks not whether it is negative.
"""

# ruff: noqa: D103
from __future__ import annotations

import math

import numpy as np
from numba import njit

from .numba_compiling import AS_TORCH, IN_ORDER, bits_of_float, compiled, exponential, float_of_bits, narrowed, widened

ZERO = np.float32(0)
HISTOGRAM_SHIFT = np.int32(16)  # bins by exponent and the first 7 bits of the mantissa
HISTOGRAM_BINS = 1 << (31 - int(HISTOGRAM_SHIFT))
_MAGNITUDE = np.int32(0x7FFFFFFF)


@njit(**IN_ORDER)
def copy_tile(A, start, w, tile):
    # tile = the block's columns of A
    for k in range(A.shape[0]):
        for j in range(w):
            tile[k, j] = A[k, np.uintp(start + j)]


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
def weighted_distances(tile, B, coeff, i, w, value, squares):
    # value[i, j] = Σ_p coeff[p]·‖B[i, piece p] − tile[piece p, j]‖; pieces of four, the default, in one go
    pieces = coeff.shape[0]
    R = tile.shape[0] // pieces
    for p in range(pieces):
        c, k = coeff[p], p * R
        if R == 4:
            b0, b1, b2, b3 = B[i, k], B[i, k + 1], B[i, k + 2], B[i, k + 3]
            if p == 0:
                for j in range(w):
                    d0, d1, d2, d3 = b0 - tile[k, j], b1 - tile[k + 1, j], b2 - tile[k + 2, j], b3 - tile[k + 3, j]
                    value[i, j] = c * math.sqrt((d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3))
            else:
                for j in range(w):
                    d0, d1, d2, d3 = b0 - tile[k, j], b1 - tile[k + 1, j], b2 - tile[k + 2, j], b3 - tile[k + 3, j]
                    value[i, j] += c * math.sqrt((d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3))
            continue
        squared_distances(tile, B, i, k, k + R, w, squares)
        if p == 0:
            for j in range(w):
                value[i, j] = c * math.sqrt(squares[j])
        else:
            for j in range(w):
                value[i, j] += c * math.sqrt(squares[j])


@njit(**IN_ORDER)
def merge_block(tile, B, coeff, softmax, w, value, shares, inv_sum, scratch):
    # value[i, j] = linear·κ_p + scale[j]·shares[i, j] + β, κ_p of `weighted_distances`;
    # shares = exp(κ_p/γ − its largest in the column), inv_sum[j] = 1 / Σ_i shares, scale = α·inv_sum
    inv_temperature, linear, alpha, beta, has_softmax = softmax
    m = B.shape[0]
    squares, top = scratch[0], scratch[1]
    for j in range(w):
        top[j] = np.float32(-np.inf)
        inv_sum[j] = ZERO
    for i in range(m):
        weighted_distances(tile, B, coeff, i, w, value, squares)
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
        top[j] = np.float32(alpha * inverse)
    for i in range(m):
        for j in range(w):
            value[i, j] = linear * value[i, j] + top[j] * shares[i, j] + beta


@njit(**IN_ORDER)
def scratch_of(m, K, width):
    # what a thread needs for blocks of `width` columns: tile, value, shares, inv_sum and two rows
    block = (m, width)
    tile, value, shares = np.empty((K, width), np.float32), np.empty(block, np.float32), np.empty(block, np.float32)
    return tile, value, shares, np.empty(width, np.float32), np.empty((2, width), np.float32)


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
def add_row(base, value, i, start, w, threshold, scaling, is_soft, result):
    # result[i, start + j] = base + scaling·S of value[i, j], in the types that the two arrays hold
    if is_soft:
        for j in range(w):
            one, at = value[i, j], np.uintp(start + j)
            magnitude = abs(one)
            weight = magnitude - threshold if magnitude > threshold else ZERO
            result[i, at] = narrowed(widened(base[i, at]) + scaling * (one * weight), result[i, at])
    else:
        for j in range(w):
            one, at = value[i, j], np.uintp(start + j)
            magnitude = abs(one)
            weight = magnitude if magnitude > threshold else ZERO
            result[i, at] = narrowed(widened(base[i, at]) + scaling * (one * weight), result[i, at])


@compiled(AS_TORCH)
def add_sparse(first, last, base, value, threshold, scaling, is_soft, result):
    # result = base + scaling·S on the rows first … last − 1, S from a matrix that is there already
    for i in range(first, last):
        add_row(base, value, i, 0, value.shape[1], threshold, scaling, is_soft, result)


@compiled(AS_TORCH)
def merge_and_add(first, last, width, A, B, coeff, softmax, base, threshold, scaling, is_soft, result):
    # result = base + scaling·S, S merged on the way
    m, n = result.shape
    tile, value, shares, inv_sum, scratch = scratch_of(m, A.shape[0], width)
    for block in range(first, last):
        start = block * width
        w = min(width, n - start)
        copy_tile(A, start, w, tile)
        merge_block(tile, B, coeff, softmax, w, value, shares, inv_sum, scratch)
        for i in range(m):
            add_row(base, value, i, start, w, threshold, scaling, is_soft, result)
