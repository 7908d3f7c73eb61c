"""Compiler settings and scalar operations of the Numba kernels."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

# No flag may exclude NaN or infinity. Reassociation allows vectorized sums.
FASTMATH_REASSOC: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"contract", "nsz", "arcp", "reassoc"},
}
# Strict order: values computed in several passes must be bit-identical, and `exponential` relies on the order.
FASTMATH_STRICT_ORDER: dict[str, Any] = {**FASTMATH_REASSOC, "fastmath": {"contract", "nsz"}}
# No contraction: `W0 + scaling·S` is rounded as in torch, so a merged weight equals `W0` plus `get_delta_weight`.
NO_CONTRACT: dict[str, Any] = {**FASTMATH_REASSOC, "fastmath": {"nsz"}}
_ROUND_TO_INT = np.float32(3 << 22)  # float32 values near this constant have spacing 1


def compiled(settings: dict[str, Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that compiles a function at its first call, with a disk cache if the folder is writable."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        try:
            dispatcher = njit(**settings, cache=True)(function)
            remove_stale_index(function, Path(dispatcher.stats.cache_path))
            return dispatcher
        except (RuntimeError, OSError):  # no writable cache folder: compile in every process
            return njit(**settings)(function)

    return decorate


def remove_stale_index(function: Callable[..., None], folder: Path) -> None:
    """Remove Numba's cache index of `function` from `folder` if any source file of the kernels is newer.

    Numba checks only the file that defines the function. It could therefore load a function that was compiled with an
    outdated helper from another file, and one process would use both versions of the helper.
    """
    newest = max(file.stat().st_mtime for file in Path(__file__).parent.glob("*.py"))
    for index in folder.glob(f"{Path(function.__code__.co_filename).stem}.{function.__name__}-*.nbi"):
        with suppress(FileNotFoundError):  # removed by another process
            if index.stat().st_mtime < newest:
                index.unlink()


@intrinsic
def float_of_bits(typing_context: Any, bits: Any) -> Any:
    """Reinterpret an int32 as a float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def bits_of_float(typing_context: Any, value: Any) -> Any:
    """Reinterpret a float32 as an int32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), generate


@intrinsic
def prefetch(typing_context: Any, array: Any, i: Any, j: Any) -> Any:
    """Prefetch the cache line of `array[i, j]`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array_type, *index_types = signature.args
        values = zip(args[1:], index_types, strict=True)
        indices = [context.cast(builder, value, kind, types.intp) for value, kind in values]
        array = context.make_array(array_type)(context, builder, args[0])
        element_pointer = cgutils.get_item_pointer(context, builder, array_type, array, indices, wraparound=False)
        byte_pointer, int32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte_pointer, int32, int32, int32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        read, locality, cache_type = int32(0), int32(3), int32(1)
        builder.call(function, [builder.bitcast(element_pointer, byte_pointer), read, locality, cache_type])
        return context.get_dummy_value()

    return types.void(array, i, j), generate


def load_as_f32(stored):
    """Load a float32 from an array entry: a float32, or a bfloat16 stored as int16."""
    raise NotImplementedError


@overload(load_as_f32)
def _load_as_f32(stored):
    if stored == types.int16:
        return lambda stored: float_of_bits(np.int32(np.int32(stored) << np.int32(16)))
    return lambda stored: stored


def store_from_f32(value, like):
    """Convert a float32 to the type of the array entry `like`; bfloat16 rounds to nearest even."""
    raise NotImplementedError


@overload(store_from_f32)
def _store_from_f32(value, like):
    if like == types.int16:

        def round_to_bfloat16(value, like):
            bits = bits_of_float(value)
            rounded = bits + np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))
            return np.int16((rounded if value == value else np.int32(0x7FC00000)) >> np.int32(16))

        return round_to_bfloat16
    return lambda value, like: value


@njit(inline="always")
def exponential(x: Any) -> Any:
    """Compute `exp(x)` for `x ≤ 0` to within two units in the last place; `x` is clamped to at least −87.

    The result is `2^k·exp(r)`, where `r = x − k·ln 2` is at most `ln 2 / 2` in magnitude. `k·ln 2` is subtracted in two
    parts, and `exp(r)` is computed from its Taylor series up to degree 7. The order of operations must be strict:
    adding and subtracting a constant rounds `k` to an integer, and the low bits of the sum contain `k`.
    """
    x = max(x, np.float32(-87))
    shifted = x * np.float32(1.4426950408889634) + _ROUND_TO_INT
    k = shifted - _ROUND_TO_INT
    r = x - k * np.float32(0.693145751953125)
    r = r - k * np.float32(1.428606765330187e-06)
    p = np.float32(1 / 5040)
    p = p * r + np.float32(1 / 720)
    p = p * r + np.float32(1 / 120)
    p = p * r + np.float32(1 / 24)
    p = p * r + np.float32(1 / 6)
    p = p * r + np.float32(0.5)
    p = p * r * r + r + np.float32(1)
    return p * float_of_bits((bits_of_float(shifted) + np.int32(127)) << np.int32(23))
