"""A threshold looked for where it is expected, compiled by numba; letters as in `numba_loops`.

From one training step to the next a threshold moves little. One pass that counts the magnitudes above a narrow window
and collects those inside finds it exactly, if it is there, and has no need to write the matrix.
"""

# ruff: noqa: D103
from __future__ import annotations

import numpy as np
from numba import njit

from .numba_compiling import IN_ORDER, compiled
from .numba_loops import copy_tile, keep_columns, merge_block, scratch_of

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
