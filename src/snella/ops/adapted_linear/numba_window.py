"""A threshold looked for where the last one was, compiled by numba; letters as in `numba_loops`.

From one training step to the next a threshold moves little. One pass that counts the magnitudes above a narrow window
and collects those inside finds it exactly, if it is there, and has no need to write the matrix.
"""

# ruff: noqa: D103
from __future__ import annotations

import numpy as np

from .numba_compiling import IN_ORDER, compiled
from .numba_loops import merge_block


@compiled(IN_ORDER)
def merge_and_collect(first, last, width, A, B, coeff, softmax, low, high, candidates, inside, above):
    # candidates[block] = magnitudes in [low, high], inside[block] of them, −1 for more than there is room for;
    # above[block] = how many exceed high
    m, n = B.shape[0], A.shape[1]
    value, shares = np.empty((m, width), np.float32), np.empty((m, width), np.float32)
    inv_sum, scratch = np.empty(width, np.float32), np.empty((2, width), np.float32)
    for block in range(first, last):
        start, stop = block * width, min(block * width + width, n)
        merge_block(A, B, coeff, softmax, start, stop, value, shares, inv_sum, scratch)
        into = candidates[block]
        at, total = 0, 0
        for i in range(m):
            row = value[i]
            at_least, more = np.int32(0), np.int32(0)
            for j in range(stop - start):
                magnitude = abs(row[j])
                at_least += magnitude >= low
                more += magnitude > high
            total += more
            found = at_least - more
            if found == 0:
                continue
            if at + found > len(into):
                at = -1
                break
            for j in range(stop - start):
                magnitude = abs(row[j])
                if low <= magnitude <= high:
                    into[at] = magnitude
                    at += 1
        inside[block], above[block] = at, total
