"""Loops over a merged matrix, compiled by numba: each pass reads and writes memory once, intermediates stay in cache.

Every function works on the chunks `first … last − 1` of a matrix cut into `chunks` blocks of rows (`combine` and
`add_sparse`: on those rows), so that several threads can share one matrix; the interpreter's lock is released. Sums are
kept per chunk and added up by the caller in a fixed order: results do not depend on the number of threads. Shape
letters: `m` outputs, `n` inputs, `P` pieces of width `R`, `K = P·R`, `q` chunks. `A` comes as `[K, n]`, so that the
innermost loop runs over memory.
"""

# ruff: noqa: D103
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

# no flag that lets the compiler assume away NaN or infinity
_JIT: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"contract", "nsz", "arcp", "reassoc"},
}
# sums within a row may be regrouped, so that they use whole vectors; an exponential must keep its order of operations
_JIT_IN_ORDER: dict[str, Any] = {**_JIT, "fastmath": {"contract", "nsz"}}
# and `W0 + scaling·S` is rounded as torch rounds it, so that a merged weight is the base plus `get_delta_weight`
_JIT_AS_TORCH: dict[str, Any] = {**_JIT, "fastmath": {"nsz"}}
_ZERO, _ONE = np.float32(0), np.float32(1)
HISTOGRAM_SHIFT = np.int32(16)  # bins by exponent and the first 7 bits of the mantissa
HISTOGRAM_BINS = 1 << (31 - int(HISTOGRAM_SHIFT))


def _compiled(settings: dict[str, Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Compile at the first call, and keep the result on disk where there is a folder to write to."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        try:
            return njit(**settings, cache=True)(function)
        except RuntimeError:  # no folder for the cache: compile in every process
            return njit(**settings)(function)

    return decorate


@intrinsic
def _float_of_bits(typing_context: Any, bits: Any) -> Any:
    """The float32 with the bit pattern of an int32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def _bits_of_float(typing_context: Any, value: Any) -> Any:
    """The bit pattern of a float32 as an int32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), generate


@njit(inline="always")
def _exp(x: Any) -> Any:
    """`exp(x)` for `x ≤ 0` to within two units in the last place; below −87 it is taken at −87.

    2^k·exp(r) with `|r| ≤ ln 2 / 2`, `k·ln 2` subtracted in two parts, exp(r) by its Taylor series to the 7th power.
    """
    x = max(x, np.float32(-87))
    k = np.float32(math.floor(x * np.float32(1.4426950408889634) + np.float32(0.5)))
    r = x - k * np.float32(0.693145751953125)
    r = r - k * np.float32(1.428606765330187e-06)
    p = np.float32(1 / 5040)
    p = p * r + np.float32(1 / 720)
    p = p * r + np.float32(1 / 120)
    p = p * r + np.float32(1 / 24)
    p = p * r + np.float32(1 / 6)
    p = p * r + np.float32(0.5)
    p = p * r * r + r + _ONE
    return p * _float_of_bits((np.int32(k) + np.int32(127)) << np.int32(23))


@njit(inline="always")
def _rows_of(chunk: Any, chunks: Any, m: Any) -> Any:
    """First and last row (exclusive) of a chunk."""
    per = (m + chunks - 1) // chunks
    return min(chunk * per, m), min((chunk + 1) * per, m)


@_compiled(_JIT)
def piecewise(first, last, A, B, coeff, inv_temperature, value, column_max):
    # value[i, j] = Σ_p coeff[p]·‖B[i, piece p] − A[piece p, j]‖;  column_max[q, j] = max over the chunk of value/γ
    m, n = value.shape
    pieces, chunks = coeff.shape[0], column_max.shape[0]
    width = A.shape[0] // pieces
    squares = np.empty(n, np.float32)
    for chunk in range(first, last):
        start, stop = _rows_of(chunk, chunks, m)
        top = column_max[chunk]
        for j in range(n):
            top[j] = np.float32(-np.inf)
        for i in range(start, stop):
            row = value[i]
            for p in range(pieces):
                for j in range(n):
                    squares[j] = _ZERO
                for k in range(p * width, (p + 1) * width):
                    b, a = B[i, k], A[k]
                    for j in range(n):
                        difference = b - a[j]
                        squares[j] += difference * difference
                c = coeff[p]
                if p == 0:
                    for j in range(n):
                        row[j] = c * math.sqrt(squares[j])
                else:
                    for j in range(n):
                        row[j] += c * math.sqrt(squares[j])
            for j in range(n):
                top[j] = max(top[j], row[j] * inv_temperature)


@_compiled(_JIT_IN_ORDER)
def exponentials(first, last, value, inv_temperature, shift, result, column_sum):
    # result = exp(value/γ − shift);  column_sum[q, j] = its sum over the chunk
    m, n = value.shape
    chunks = column_sum.shape[0]
    for chunk in range(first, last):
        start, stop = _rows_of(chunk, chunks, m)
        total = column_sum[chunk]
        for j in range(n):
            total[j] = _ZERO
        for i in range(start, stop):
            source, target = value[i], result[i]
            for j in range(n):
                exponential = _exp(source[j] * inv_temperature - shift[j])
                target[j] = exponential
                total[j] += exponential


@_compiled(_JIT)
def combine(first, last, linear, scale, beta, exponential, value):
    # value ← linear·value + scale[j]·exponential + beta
    n = value.shape[1]
    for i in range(first, last):
        row, other = value[i], exponential[i]
        for j in range(n):
            row[j] = linear * row[j] + scale[j] * other[j] + beta


@_compiled(_JIT)
def histogram(first, last, value, bins):
    # bins[q, h] = entries of the chunk whose magnitude's leading bits are h
    m, n = value.shape
    chunks = bins.shape[0]
    leading = np.empty(n, np.int32)
    for chunk in range(first, last):
        start, stop = _rows_of(chunk, chunks, m)
        counts = bins[chunk]
        counts[:] = 0
        for i in range(start, stop):
            row = value[i]
            for j in range(n):
                leading[j] = (_bits_of_float(row[j]) & np.int32(0x7FFFFFFF)) >> HISTOGRAM_SHIFT
            for j in range(n):
                counts[leading[j]] += 1


@_compiled(_JIT)
def collect(first, last, value, wanted, offsets, result):
    # the magnitudes whose leading bits are `wanted`, chunk by chunk from offsets[q] on
    m, n = value.shape
    chunks = offsets.shape[0]
    for chunk in range(first, last):
        start, stop = _rows_of(chunk, chunks, m)
        at = offsets[chunk]
        for i in range(start, stop):
            row = value[i]
            for j in range(n):
                bits = _bits_of_float(row[j]) & np.int32(0x7FFFFFFF)
                if bits >> HISTOGRAM_SHIFT == wanted:
                    result[at] = _float_of_bits(bits)
                    at += 1


@_compiled(_JIT_AS_TORCH)
def add_sparse(first, last, base, value, threshold, scaling, is_soft, result):
    # result = base + scaling·S
    n = base.shape[1]
    for i in range(first, last):
        source, row, target = base[i], value[i], result[i]
        if is_soft:
            for j in range(n):
                magnitude = abs(row[j])
                weight = magnitude - threshold if magnitude > threshold else _ZERO
                target[j] = source[j] + scaling * (row[j] * weight)
        else:
            for j in range(n):
                magnitude = abs(row[j])
                weight = magnitude if magnitude > threshold else _ZERO
                target[j] = source[j] + scaling * (row[j] * weight)


@_compiled(_JIT)
def slope_products(first, last, grad, value, threshold, scaling, is_soft, shares, has_shares, result, columns, totals):
    # result = grad·scaling·∂S/∂value;  columns[q, j] = Σ result·shares, totals[q] = Σ result over the chunk
    m, n = value.shape
    chunks = totals.shape[0]
    for chunk in range(first, last):
        start, stop = _rows_of(chunk, chunks, m)
        column = columns[chunk]
        for j in range(n):
            column[j] = _ZERO
        total = 0.0
        for i in range(start, stop):
            source, row, target = grad[i], value[i], result[i]
            row_total = _ZERO
            for j in range(n):
                magnitude = abs(row[j])
                slope = magnitude + magnitude - threshold if is_soft else magnitude
                product = source[j] * scaling * slope if magnitude > threshold else _ZERO
                target[j] = product
                row_total += product
            if has_shares:
                share = shares[i]
                for j in range(n):
                    column[j] += target[j] * share[j]
            total += row_total
        totals[chunk] = total


@_compiled(_JIT)
def factor_gradients(
    first, last, A, B, coeff, grad, linear, shares, has_shares, alpha, inv_sum, column_mean, grad_A, grad_B, sums
):
    # grad: ∂L/∂ΔW; ∂L/∂κ = linear·grad + alpha·share·(grad − column_mean), share = shares·inv_sum;
    # grad_A[q] and sums[q] are partial: sums[q, p] = Σ ∂L/∂κ·d_p, sums[q, P] = Σ (∂L/∂softmax's argument)·κ
    m, n = grad.shape
    pieces, chunks = coeff.shape[0], sums.shape[0]
    width = A.shape[0] // pieces
    grad_value, grad_softmax = np.empty(n, np.float32), np.empty(n, np.float32)
    distance, weight, value = np.empty(n, np.float32), np.empty(n, np.float32), np.empty(n, np.float32)
    for chunk in range(first, last):
        start, stop = _rows_of(chunk, chunks, m)
        partial_A = grad_A[chunk]
        partial_A[:] = _ZERO
        sums[chunk] = 0.0
        for i in range(start, stop):
            row = grad[i]
            if has_shares:
                share = shares[i]
                for j in range(n):
                    grad_softmax[j] = alpha * (share[j] * inv_sum[j]) * (row[j] - column_mean[j])
                    grad_value[j] = linear * row[j] + grad_softmax[j]
                    value[j] = _ZERO
            else:
                for j in range(n):
                    grad_value[j] = linear * row[j]
            for p in range(pieces):
                for j in range(n):
                    distance[j] = _ZERO
                for k in range(p * width, (p + 1) * width):
                    b, a = B[i, k], A[k]
                    for j in range(n):
                        difference = b - a[j]
                        distance[j] += difference * difference
                c = coeff[p]
                by_distance = _ZERO
                for j in range(n):
                    distance[j] = math.sqrt(distance[j])
                    by_distance += grad_value[j] * distance[j]
                    weight[j] = c * grad_value[j] / distance[j] if distance[j] > _ZERO else _ZERO
                sums[chunk, p] += by_distance
                if has_shares:
                    for j in range(n):
                        value[j] += c * distance[j]
                for k in range(p * width, (p + 1) * width):
                    b, a, target = B[i, k], A[k], partial_A[k]
                    total = _ZERO
                    for j in range(n):
                        pull = weight[j] * (b - a[j])
                        total += pull
                        target[j] -= pull
                    grad_B[i, k] = total
            if has_shares:
                by_value = _ZERO
                for j in range(n):
                    by_value += grad_softmax[j] * value[j]
                sums[chunk, pieces] += by_value
