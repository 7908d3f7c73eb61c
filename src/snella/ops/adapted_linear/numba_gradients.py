"""The loop from ∂L/∂W back to the factors and the kernel's scalars, compiled by numba; letters as in `numba_loops`."""

# ruff: noqa: D103
from __future__ import annotations

import math

import numpy as np
from numba import njit

from .numba_compiling import REGROUPED, compiled
from .numba_loops import ZERO, add_row, copy_tile, merge_block, scratch_of, squared_distances


@njit(**REGROUPED)
def gradients_of_row(i, w, R, tile, B, coeff, softmax, value, shares, scale, mean, rows, pulls_A, grad_B, sums, chunk):
    # from G = value[i]: add to pulls_A, which is −∂L/∂A of the block, to grad_B[chunk, i] and to sums[chunk]
    _, linear, _, _, has_softmax = softmax
    pieces = coeff.shape[0]
    from_softmax, from_value, kappa, squares = rows[0], rows[1], rows[2], rows[3]
    for j in range(w):
        from_softmax[j] = scale[j] * shares[i, j] * (value[i, j] - mean[j]) if has_softmax else ZERO
        from_value[j] = linear * value[i, j] + from_softmax[j]
        kappa[j] = ZERO
    for p in range(pieces):
        c, by_distance = coeff[p], ZERO
        squared_distances(tile, B, i, p * R, (p + 1) * R, w, squares)
        for j in range(w):
            distance = math.sqrt(squares[j])
            by_distance += from_value[j] * distance
            kappa[j] += c * distance
            squares[j] = c * from_value[j] / distance if distance > ZERO else ZERO  # a pull's length over its distance
        sums[chunk, p] += by_distance
        for k in range(p * R, (p + 1) * R):
            one, total = B[i, k], ZERO
            for j in range(w):
                pull = squares[j] * (one - tile[k, j])
                total += pull
                pulls_A[k, j] += pull
            grad_B[chunk, i, k] += total
    by_value = ZERO
    for j in range(w):
        by_value += from_softmax[j] * kappa[j]
    sums[chunk, pieces] += by_value


@compiled(REGROUPED)
def factor_gradients(
    first,
    last,
    per_chunk,
    width,
    A,
    B,
    coeff,
    softmax,
    grad,
    threshold,
    scaling,
    is_soft,
    adds,
    base,
    result,
    grad_A,
    grad_B,
    means,
    sums,
):
    # G = ∂L/∂ΔW = grad·scaling·∂S/∂ΔW;  means[j] = Σ_i G·softmax;  if adds: result = base + scaling·S on the way
    # ∂L/∂κ_p = linear·G + (α/γ)·softmax·(G − means), softmax = shares·inv_sum
    # grad_A is whole; grad_B[q] and sums[q] are of the q-th chunk of `per_chunk` blocks:
    # sums[q, p] = Σ ∂L/∂κ_p·distance, sums[q, P] = Σ (softmax's part of ∂L/∂κ_p)·κ_p, sums[q, P + 1] = Σ G
    inv_temperature, _, alpha, _, has_softmax = softmax
    m, n = grad.shape
    pieces, K = coeff.shape[0], A.shape[0]
    R, blocks = K // pieces, (n + width - 1) // width
    tile, value, shares, inv_sum, scratch = scratch_of(m, K, width)
    pulls_A, rows = np.empty((K, width), np.float32), np.empty((4, width), np.float32)
    scale, mean = np.empty(width, np.float32), np.empty(width, np.float32)
    for chunk in range(first, last):
        grad_B[chunk, :, :] = ZERO
        sums[chunk, :] = 0.0
        for block in range(chunk * per_chunk, min((chunk + 1) * per_chunk, blocks)):
            start = block * width
            w = min(width, n - start)
            copy_tile(A, start, w, tile)
            merge_block(tile, B, coeff, softmax, w, value, shares, inv_sum, scratch)
            for j in range(w):
                mean[j] = ZERO
            for i in range(m):
                if adds:
                    add_row(base, value, i, start, w, threshold, scaling, is_soft, result)
                row_sum = ZERO
                for j in range(w):
                    magnitude = abs(value[i, j])
                    slope = magnitude + magnitude - threshold if is_soft else magnitude
                    one = grad[i, np.uintp(start + j)] * scaling * slope if magnitude > threshold else ZERO
                    value[i, j] = one
                    row_sum += one
                sums[chunk, pieces + 1] += row_sum
                if has_softmax:
                    for j in range(w):
                        mean[j] += value[i, j] * shares[i, j]
            for j in range(w):
                mean[j] *= inv_sum[j]
                means[np.uintp(start + j)] = mean[j]
                scale[j] = np.float32(alpha) * inv_temperature * inv_sum[j]
            pulls_A[:, :] = ZERO
            for i in range(m):
                gradients_of_row(
                    i, w, R, tile, B, coeff, softmax, value, shares, scale, mean, rows, pulls_A, grad_B, sums, chunk
                )
            for k in range(K):
                for j in range(w):
                    grad_A[k, np.uintp(start + j)] = -pulls_A[k, j]
