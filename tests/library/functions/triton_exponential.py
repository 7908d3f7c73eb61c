"""Kernel that evaluates the Triton exponential, for accuracy tests."""

import triton
import triton.language as tl

from snella.backends.triton.forward import exp_nonpositive


@triton.jit
def exponentials(values, results, size, BLOCK: tl.constexpr):
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(values + entry, mask=entry < size, other=0.0)
    tl.store(results + entry, exp_nonpositive(value), mask=entry < size)
