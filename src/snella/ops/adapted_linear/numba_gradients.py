"""The loop from ∂L/∂W back to the factors and the kernel's scalars, compiled by numba; letters as in `numba_loops`."""

# ruff: noqa: D103
from __future__ import annotations

import math

import numpy as np

from .numba_compiling import REGROUPED, compiled
from .numba_loops import ZERO, add_row, merge_block, squared_distances


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
    inv_temperature, linear, alpha, _, has_softmax = softmax
    m, n = grad.shape
    pieces, K = coeff.shape[0], A.shape[0]
    R, blocks = K // pieces, (n + width - 1) // width
    value, shares = np.empty((m, width), np.float32), np.empty((m, width), np.float32)
    inv_sum, scratch = np.empty(width, np.float32), np.empty((2, width), np.float32)
    squares, scale, mean = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    from_softmax, from_value = np.empty(width, np.float32), np.empty(width, np.float32)
    kappa, weight = np.empty(width, np.float32), np.empty(width, np.float32)
    for chunk in range(first, last):
        partial_B, partial_sums = grad_B[chunk], sums[chunk]
        partial_B[:] = ZERO
        partial_sums[:] = 0.0
        for block in range(chunk * per_chunk, min((chunk + 1) * per_chunk, blocks)):
            start, stop = block * width, min(block * width + width, n)
            w = stop - start
            merge_block(A, B, coeff, softmax, start, stop, value, shares, inv_sum, scratch)
            for j in range(w):
                mean[j] = ZERO
            for i in range(m):
                row, source = value[i], grad[i, start:stop]
                if adds:
                    add_row(base[i, start:stop], row, threshold, scaling, is_soft, result[i, start:stop])
                row_sum = ZERO
                for j in range(w):
                    magnitude = abs(row[j])
                    slope = magnitude + magnitude - threshold if is_soft else magnitude
                    row[j] = source[j] * scaling * slope if magnitude > threshold else ZERO
                    row_sum += row[j]
                partial_sums[pieces + 1] += row_sum
                if has_softmax:
                    share = shares[i]
                    for j in range(w):
                        mean[j] += row[j] * share[j]
            for j in range(w):
                mean[j] *= inv_sum[j]
                means[start + j] = mean[j]
                scale[j] = np.float32(alpha) * inv_temperature * inv_sum[j]
            for k in range(K):
                target = grad_A[k, start:stop]
                for j in range(w):
                    target[j] = ZERO
            for i in range(m):
                row, share, b = value[i], shares[i], B[i]
                if has_softmax:
                    for j in range(w):
                        from_softmax[j] = scale[j] * share[j] * (row[j] - mean[j])
                        from_value[j] = linear * row[j] + from_softmax[j]
                        kappa[j] = ZERO
                else:
                    for j in range(w):
                        from_value[j] = linear * row[j]
                for p in range(pieces):
                    squared_distances(A, b, p * R, (p + 1) * R, start, stop, squares)
                    c = coeff[p]
                    by_distance = ZERO
                    for j in range(w):
                        distance = math.sqrt(squares[j])
                        by_distance += from_value[j] * distance
                        squares[j] = distance
                        weight[j] = c * from_value[j] / distance if distance > ZERO else ZERO
                    partial_sums[p] += by_distance
                    if has_softmax:
                        for j in range(w):
                            kappa[j] += c * squares[j]
                    for k in range(p * R, (p + 1) * R):
                        one, a, target = b[k], A[k, start:stop], grad_A[k, start:stop]
                        total = ZERO
                        for j in range(w):
                            pull = weight[j] * (one - a[j])
                            total += pull
                            target[j] -= pull
                        partial_B[i, k] += total
                if has_softmax:
                    by_value = ZERO
                    for j in range(w):
                        by_value += from_softmax[j] * kappa[j]
                    partial_sums[pieces] += by_value
