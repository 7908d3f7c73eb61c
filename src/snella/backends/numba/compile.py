"""How Numba kernels are compiled, and the few operations on single numbers that they share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

# No flag that lets the compiler assume away NaN or infinity. Sums may be regrouped, so that they use whole vectors …
FASTMATH_REASSOC: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"contract", "nsz", "arcp", "reassoc"},
}
# … but what is computed in several passes must have the same bits in each of them, and an exponential its own order
FASTMATH_STRICT_ORDER: dict[str, Any] = {**FASTMATH_REASSOC, "fastmath": {"contract", "nsz"}}
# and `W0 + scaling·S` is rounded as torch rounds it, so that a merged weight is the base plus `get_delta_weight`
NO_CONTRACT: dict[str, Any] = {**FASTMATH_REASSOC, "fastmath": {"nsz"}}
_ROUNDS_TO_WHOLE = np.float32(3 << 22)  # where float32 numbers lie one apart


def compiled(settings: dict[str, Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Compile at the first call, and keep the result on disk where there is a folder to write to."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        try:
            dispatcher = njit(**settings, cache=True)(function)
            remove_stale_index(function, Path(dispatcher.stats.cache_path))
            return dispatcher
        except (RuntimeError, OSError):  # no folder for the cache: compile in every process
            return njit(**settings)(function)

    return decorate


def remove_stale_index(function: Callable[..., None], folder: Path) -> None:
    """Remove numba's index of what it compiled from `function` before any file of kernels changed.

    Numba looks at the function's own file alone: one compiled with an older helper from another file would be taken
    from the disk, and both helpers, of one name, mixed in one process.
    """
    newest = max(file.stat().st_mtime for file in Path(__file__).parent.glob("*.py"))
    for index in folder.glob(f"{Path(function.__code__.co_filename).stem}.{function.__name__}-*.nbi"):
        if index.stat().st_mtime < newest:
            index.unlink(missing_ok=True)


@intrinsic
def float_of_bits(typing_context: Any, bits: Any) -> Any:
    """The float32 with the bit pattern of an int32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def bits_of_float(typing_context: Any, value: Any) -> Any:
    """The bit pattern of a float32 as an int32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), generate


@intrinsic
def prefetch(typing_context: Any, array: Any, i: Any, j: Any) -> Any:
    """Have the cache line of `array[i, j]` on its way from memory; a hint, which changes no value."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        of_array, *of_indices = signature.args
        values = zip(args[1:], of_indices, strict=True)
        indices = [context.cast(builder, value, kind, types.intp) for value, kind in values]
        array = context.make_array(of_array)(context, builder, args[0])
        place = cgutils.get_item_pointer(context, builder, of_array, array, indices, wraparound=False)
        address, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [address, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        to_read, keep, data = number(0), number(3), number(1)
        builder.call(function, [builder.bitcast(place, address), to_read, keep, data])
        return context.get_dummy_value()

    return types.void(array, i, j), generate


def load_as_f32(stored):
    """A float32 from what an array holds: itself, or the upper 16 bits of one (bfloat16, seen as int16)."""
    raise NotImplementedError


@overload(load_as_f32)
def _load_as_f32(stored):
    if stored == types.int16:
        return lambda stored: float_of_bits(np.int32(np.int32(stored) << np.int32(16)))
    return lambda stored: stored


def store_from_f32(value, like):
    """What an array holds for a float32, rounded to the nearest even where that is a bfloat16; `like` is an entry."""
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
    """`exp(x)` for `x ≤ 0` to within two units in the last place; below −87 it is taken at −87.

    2^k·exp(r) with `|r| ≤ ln 2 / 2`, `k·ln 2` subtracted in two parts, exp(r) by its Taylor series to the 7th power.
    Sums in their written order only: what is added to round to a whole `k`, which the last bits of the sum then hold,
    is subtracted again at once.
    """
    x = max(x, np.float32(-87))
    shifted = x * np.float32(1.4426950408889634) + _ROUNDS_TO_WHOLE
    k = shifted - _ROUNDS_TO_WHOLE
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
