"""Loops that merge a matrix from its factors, compiled by numba; `numba_gradients` holds the way back.

A matrix is cut into blocks of columns, so that a block's softmax, which runs down the columns, is complete while its
numbers are still in the processor's cache: `ΔW` is read from memory only where it has to be selected from, and the
passes that know the threshold never write it. Every function works on the blocks (or rows) `first … last − 1`, so that
several threads can share one matrix; the interpreter's lock is released. What is computed does not depend on how the
blocks are shared out, and a value has the same bits in every pass, since all of them come from `merge_block`.

Shape letters: `m` outputs, `n` inputs, `P` pieces of width `R`, `K = P·R`, `w` columns of a block. `A` comes as
`[K, n]`, so that the innermost loop runs over memory.
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
def squared_distances(A, b, first, last, start, stop, result):
    # result[j] = Σ_k (b[k] − A[k, start + j])², k = first … last − 1, four at a time
    w = stop - start
    k = first
    while k + 4 <= last:
        b0, b1, b2, b3 = b[k], b[k + 1], b[k + 2], b[k + 3]
        a0, a1, a2, a3 = A[k, start:stop], A[k + 1, start:stop], A[k + 2, start:stop], A[k + 3, start:stop]
        if k == first:
            for j in range(w):
                d0, d1, d2, d3 = b0 - a0[j], b1 - a1[j], b2 - a2[j], b3 - a3[j]
                result[j] = (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)
        else:
            for j in range(w):
                d0, d1, d2, d3 = b0 - a0[j], b1 - a1[j], b2 - a2[j], b3 - a3[j]
                result[j] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)
        k += 4
    while k < last:
        one, a = b[k], A[k, start:stop]
        if k == first:
            for j in range(w):
                difference = one - a[j]
                result[j] = difference * difference
        else:
            for j in range(w):
                difference = one - a[j]
                result[j] += difference * difference
        k += 1


@njit(**IN_ORDER)
def merge_block(A, B, coeff, softmax, start, stop, value, shares, inv_sum, scratch):
    # value[i, j] = linear·κ_p + scale[j]·shares[i, j] + β,  κ_p[i, j] = Σ_p coeff[p]·‖B[i, piece p] − A[piece p, j]‖;
    # shares = exp(κ_p/γ − its largest in the column), inv_sum[j] = 1 / Σ_i shares, scale = α·inv_sum
    inv_temperature, linear, alpha, beta, has_softmax = softmax
    m, pieces = B.shape[0], coeff.shape[0]
    R, w = A.shape[0] // pieces, stop - start
    squares, top = scratch[0], scratch[1]
    for j in range(w):
        top[j] = np.float32(-np.inf)
        inv_sum[j] = ZERO
    for i in range(m):
        row, b = value[i], B[i]
        for p in range(pieces):
            squared_distances(A, b, p * R, (p + 1) * R, start, stop, squares)
            c = coeff[p]
            if p == 0:
                for j in range(w):
                    row[j] = c * math.sqrt(squares[j])
            else:
                for j in range(w):
                    row[j] += c * math.sqrt(squares[j])
        if has_softmax:
            for j in range(w):
                top[j] = max(top[j], row[j] * inv_temperature)
    if not has_softmax:
        return
    for i in range(m):
        row, share = value[i], shares[i]
        for j in range(w):
            one = exponential(row[j] * inv_temperature - top[j])
            share[j] = one
            inv_sum[j] += one
    for j in range(w):
        inverse = 1.0 / np.float64(inv_sum[j])
        inv_sum[j] = np.float32(inverse)
        top[j] = np.float32(alpha * inverse)
    for i in range(m):
        row, share = value[i], shares[i]
        for j in range(w):
            row[j] = linear * row[j] + top[j] * share[j] + beta


@compiled(IN_ORDER)
def merge_and_count(first, last, width, A, B, coeff, softmax, result, bins):
    # result = ΔW;  bins[block, h] = entries of the block whose magnitude's leading bits are h
    m, n = result.shape
    value, shares = np.empty((m, width), np.float32), np.empty((m, width), np.float32)
    inv_sum, scratch = np.empty(width, np.float32), np.empty((2, width), np.float32)
    leading = np.empty(width, np.int32)
    for block in range(first, last):
        start, stop = block * width, min(block * width + width, n)
        merge_block(A, B, coeff, softmax, start, stop, value, shares, inv_sum, scratch)
        counts = bins[block]
        counts[:] = 0
        for i in range(m):
            row, target = value[i], result[i, start:stop]
            for j in range(stop - start):
                target[j] = row[j]
                leading[j] = (bits_of_float(row[j]) & _MAGNITUDE) >> HISTOGRAM_SHIFT
            for j in range(stop - start):
                counts[leading[j]] += 1


@compiled(IN_ORDER)
def count(first, last, width, value, bins):
    # the same counts for a matrix that is there already
    m, n = value.shape
    for block in range(first, last):
        start, stop = block * width, min(block * width + width, n)
        counts = bins[block]
        counts[:] = 0
        for i in range(m):
            row = value[i, start:stop]
            for j in range(stop - start):
                counts[(bits_of_float(row[j]) & _MAGNITUDE) >> HISTOGRAM_SHIFT] += 1


@compiled(IN_ORDER)
def collect(first, last, width, value, wanted, offsets, result):
    # the magnitudes whose leading bits are `wanted`, block by block from offsets[block] on
    m, n = value.shape
    for block in range(first, last):
        start, stop = block * width, min(block * width + width, n)
        at = offsets[block]
        for i in range(m):
            row = value[i, start:stop]
            found = np.int32(0)
            for j in range(stop - start):
                found += (bits_of_float(row[j]) & _MAGNITUDE) >> HISTOGRAM_SHIFT == wanted
            if found == 0:
                continue
            for j in range(stop - start):
                bits = bits_of_float(row[j]) & _MAGNITUDE
                if bits >> HISTOGRAM_SHIFT == wanted:
                    result[at] = float_of_bits(bits)
                    at += 1


@njit(**AS_TORCH)
def add_row(base, row, threshold, scaling, is_soft, result):
    # result = base + scaling·S, in the types that the two arrays hold
    if is_soft:
        for j in range(len(base)):
            magnitude = abs(row[j])
            weight = magnitude - threshold if magnitude > threshold else ZERO
            result[j] = narrowed(widened(base[j]) + scaling * (row[j] * weight), result[j])
    else:
        for j in range(len(base)):
            magnitude = abs(row[j])
            weight = magnitude if magnitude > threshold else ZERO
            result[j] = narrowed(widened(base[j]) + scaling * (row[j] * weight), result[j])


@compiled(AS_TORCH)
def add_sparse(first, last, base, value, threshold, scaling, is_soft, result):
    # result = base + scaling·S on the rows first … last − 1, S from a matrix that is there already
    for i in range(first, last):
        add_row(base[i], value[i], threshold, scaling, is_soft, result[i])


@compiled(AS_TORCH)
def merge_and_add(first, last, width, A, B, coeff, softmax, base, threshold, scaling, is_soft, result):
    # result = base + scaling·S, S merged on the way
    m, n = result.shape
    value, shares = np.empty((m, width), np.float32), np.empty((m, width), np.float32)
    inv_sum, scratch = np.empty(width, np.float32), np.empty((2, width), np.float32)
    for block in range(first, last):
        start, stop = block * width, min(block * width + width, n)
        merge_block(A, B, coeff, softmax, start, stop, value, shares, inv_sum, scratch)
        for i in range(m):
            add_row(base[i, start:stop], value[i], threshold, scaling, is_soft, result[i, start:stop])
