"""Compile every Triton kernel for a GPU that need not be there: `python compile_triton.py 90` (compute capability).

Triton's interpreter accepts code that its compiler does not. Run without TRITON_INTERPRET.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from snella.backends.triton import backend, backward, forward

INTEGERS = {"n": "i32", "m": "i32", "num_kept": "i32", "num_tiles": "i32", "scaling": "fp32"}
TABLES = dict.fromkeys(("layout", "counts", "high", "middle", "low", "state"), "*i32")
TILE, STATISTICS = backend.TILE, backend.STATISTICS


def variants() -> Iterator[tuple[Any, dict[str, Any]]]:
    """Each kernel with the settings that choose between branches."""
    plain = {"P": 2, "R": 8, "HAS_TEMPERATURE": False, "temperature": None, "AXIS": 0}
    warm = {"P": 3, "R": 6, "HAS_TEMPERATURE": True, "AXIS": 1}
    no_softmax = {"peak": None, "inverse_sum": None, "SOFTMAX": False, "LINEAR_TERM": True}
    for axis in (plain, warm):
        yield forward.softmax_statistics, axis | STATISTICS
        merge = axis | TILE | {"SOFTMAX": True, "LINEAR_TERM": axis is plain, "CENTER": axis is warm, "TILES": 4}
        yield forward.merge, merge | {"COUNT": True}
        yield forward.merge, merge | {"COUNT": False, "counts": None}
        yield forward.merge, merge | no_softmax | {"COUNT": True, "alpha": None, "beta": None}
        yield backward.softmax_weighted_sums, axis | TILE | {"MODE": 0 if axis is plain else 1}
        terms = {"SOFTMAX": True, "LINEAR_TERM": axis is plain, "MODE": 0 if axis is plain else 1}
        yield backward.factor_gradients, axis | TILE | terms
        yield backward.scalar_gradients, axis | {"SOFTMAX": True, "CENTER": axis is warm, "BLOCK": 512}
    nothing = no_softmax | {"alpha": None, "weighted_sum": None, "MODE": 2}
    yield backward.factor_gradients, plain | TILE | nothing
    for targets in (1, 2):
        yield forward.add_sparse, {"MODE": targets - 1, "BLOCK": 2048}
        yield forward.count_within_bin, {"TARGETS": targets, "LEVEL": targets, "BLOCK": 4096}
        yield forward.finish_thresholds, {"TARGETS": targets}


def compile_for(capability: int, kernel: Any, settings: dict[str, Any]) -> None:
    """Compile one kernel to machine code."""
    signature, constants = {}, {}
    for parameter in kernel.params:
        name = parameter.name
        if parameter.is_constexpr or settings.get(name, 0) is None:
            signature[name], constants[name] = "constexpr", settings[name]
        elif name in INTEGERS | TABLES:
            signature[name] = (INTEGERS | TABLES)[name]
        else:
            signature[name] = "*bf16" if name in ("base", "out", "grad", "A") else "*fp32"
    options = backend.LAUNCH
    compiled = triton.compile(
        ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32), options=options
    )
    if not compiled.asm["cubin"]:
        raise RuntimeError(f"no machine code for {kernel.__name__} with {settings}")


if __name__ == "__main__":
    found = list(variants())
    for number, (kernel, settings) in enumerate(found, 1):
        print(number, kernel.__name__, flush=True)
        compile_for(int(sys.argv[1]), kernel, settings)
    print(f"{len(found)} compiled")
