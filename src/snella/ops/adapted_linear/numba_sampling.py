"""The weight's gradient at the kept entries alone, compiled by numba; letters as in `numba_loops`.

∂L/∂W = grad_yᵀ x is needed only where `S` is not zero. Where few entries are kept, one scalar product of a column of
`grad_y` with a column of `x` for each of them is less work than the whole matrix.
"""

# ruff: noqa: D103
from __future__ import annotations

import numpy as np

from .numba_compiling import IN_ORDER, REGROUPED, compiled
from .numba_loops import ZERO, copy_tile, merge_block, scratch_of


@compiled(IN_ORDER)
def list_kept(first, last, width, A, B, coeff, softmax, threshold, rows, columns, counts):
    # positions of the entries of each block that exceed the threshold, counts[block] of them
    m, n = B.shape[0], A.shape[1]
    tile, value, shares, inv_sum, scratch = scratch_of(m, A.shape[0], width)
    for block in range(first, last):
        start = block * width
        w = min(width, n - start)
        copy_tile(A, start, w, tile)
        merge_block(tile, B, coeff, softmax, w, value, shares, inv_sum, scratch)
        at = 0
        for i in range(m):
            found = np.int32(0)
            for j in range(w):
                found += abs(value[i, j]) > threshold
            if found == 0:
                continue
            for j in range(w):
                if abs(value[i, j]) > threshold:
                    rows[block, at], columns[block, at] = i, start + j
                    at += 1
        counts[block] = at


@compiled(REGROUPED)
def add_products(first, last, grad_y, x, rows, columns, counts, sums):
    # sums[block, e] += Σ_t grad_y[rows[e], t]·x[columns[e], t]; both come with their tokens t side by side
    tokens = x.shape[1]
    for block in range(first, last):
        where_i, where_j, total = rows[block], columns[block], sums[block]
        for e in range(counts[block]):
            left, right = grad_y[where_i[e]], x[where_j[e]]
            one = ZERO
            for t in range(tokens):
                one += left[t] * right[t]
            total[e] += one


@compiled(IN_ORDER)
def scatter(first, last, rows, columns, counts, sums, result):
    for block in range(first, last):
        where_i, where_j, total = rows[block], columns[block], sums[block]
        for e in range(counts[block]):
            result[where_i[e], where_j[e]] = total[e]
