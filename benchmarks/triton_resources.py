"""Registers, spills, shared memory, occupancy and instructions of the compiled Triton kernels; requires no GPU.

python benchmarks/triton_resources.py                         all capabilities and ranks; writes triton_resources.jsonl
python benchmarks/triton_resources.py --capabilities 90 --ranks 8 --warps 8          appends rows for another launch
python benchmarks/triton_resources.py --capabilities 90 --ranks 8 --check    only compiles

Each kernel is compiled with the settings that select its branches. Resources come from Triton's copy of `cuobjdump`.
Occupancy is the fraction of a multiprocessor's warps that registers, shared memory and the program limit allow. The
script also compiles for AMD's `gfx942`; those rows only report errors.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from snella.backends.triton import backend, backward, forward

ROWS = Path(__file__).with_suffix(".jsonl")
CAPABILITIES = (80, 86, 89, 90, 100, 120)
RANKS = (8, 16, 32)
INTEGERS = {"n": "i32", "m": "i32", "num_kept": "i32", "num_tiles": "i32", "scaling": "fp32"}
TABLES = dict.fromkeys(("layout", "counts", "high", "middle", "low", "state"), "*i32")
TILE, STATISTICS = backend.TILE, backend.STATISTICS
_WARP = 32
_REGISTERS, _REGISTER_UNIT = 65_536, 256
"""Registers per multiprocessor, and the allocation unit per warp."""
_LIMITS = {
    80: (64, 32, 164),
    86: (48, 16, 100),
    89: (48, 24, 100),
    90: (64, 32, 228),
    100: (64, 32, 228),
    120: (48, 24, 100),
}
"""Warps, programs and KiB of shared memory per multiprocessor, from the CUDA programming guide."""
_RESERVED_KIB = 1
"""Shared memory that CUDA reserves per program."""


@dataclass(frozen=True)
class Resources:
    """Resources of one compiled kernel.

    Attributes:
        registers: Registers per thread.
        spilled_bytes: Local memory per thread.
        shared_bytes: Shared memory per program.
        instructions: Number of machine instructions.
        occupancy: Active warps over the multiprocessor's warps.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions: int
    occupancy: float


def variants(rank: int = 8) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Yield the name, the kernel and the settings of each branch."""
    plain = {"P": 2, "R": rank, "HAS_TEMPERATURE": False, "temperature": None, "AXIS": 0}
    warm = {"P": 4 if rank > 8 else 3, "R": rank if rank > 8 else 6, "HAS_TEMPERATURE": True, "AXIS": 1}
    no_softmax = {"max_logit": None, "inverse_sum": None, "SOFTMAX": False, "LINEAR_TERM": True}
    for label, axis in (("mix-k", plain), ("normalized rbf", warm)):
        yield f"softmax statistics, {label}", forward.softmax_statistics, axis | STATISTICS
        merge = axis | TILE | {"SOFTMAX": True, "LINEAR_TERM": axis is plain, "CENTER": axis is warm, "TILES": 4}
        yield f"merge and count, {label}", forward.merge, merge | {"COUNT": True}
        yield f"merge, {label}", forward.merge, merge | {"COUNT": False, "counts": None}
        linear = merge | no_softmax | {"COUNT": True, "alpha": None, "beta": None}
        yield f"merge and count, p-linear {axis['P']} pieces", forward.merge, linear
        mode = 0 if axis is plain else 1
        yield f"softmax sums, {label}", backward.softmax_weighted_sums, axis | TILE | {"MODE": mode}
        terms = {"SOFTMAX": True, "LINEAR_TERM": axis is plain, "MODE": mode}
        yield f"factor gradients, {label}", backward.factor_gradients, axis | TILE | terms
        scalar = axis | {"SOFTMAX": True, "CENTER": axis is warm, "BLOCK": 512}
        yield f"scalar gradients, {label}", backward.scalar_gradients, scalar
    plain_linear = no_softmax | {"alpha": None, "weighted_sum": None, "MODE": 2}
    yield "factor gradients, p-linear", backward.factor_gradients, plain | TILE | plain_linear
    for targets, mode_name in ((1, "soft"), (2, "official")):
        yield f"add sparse, {mode_name}", forward.add_sparse, {"MODE": targets - 1, "BLOCK": 2048}
        counting = {"TARGETS": targets, "LEVEL": targets, "BLOCK": 4096}
        yield f"count within bin, {mode_name}", forward.count_within_bin, counting
        yield f"finish thresholds, {mode_name}", forward.finish_thresholds, {"TARGETS": targets}


def compile_for(target: GPUTarget, kernel: Any, settings: dict[str, Any]) -> Any:
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
    compiled = triton.compile(ASTSource(kernel, signature, constants), target=target, options=backend.LAUNCH)
    if not (compiled.asm.get("cubin") or compiled.asm.get("hsaco")):
        raise RuntimeError(f"no machine code for {kernel.__name__} with {settings}")
    return compiled


def resources_of(compiled: Any, capability: int) -> Resources:
    """Read the resources of a compiled kernel with `cuobjdump`."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
        code = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    text = usage.stdout + usage.stderr
    numbers = {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    # dynamic shared memory is requested at launch and not part of the machine code
    shared = max(numbers["SHARED"], int(compiled.metadata.shared))
    instructions = len(re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/", code, re.MULTILINE))
    share = occupancy(numbers["REG"], shared, int(backend.LAUNCH["num_warps"]), capability)
    return Resources(numbers["REG"], numbers["STACK"] + numbers["LOCAL"], shared, instructions, share)


def occupancy(registers: int, shared_bytes: int, warps: int, capability: int) -> float:
    """Compute the occupancy: active warps over the multiprocessor's warps, for programs with `warps` warps."""
    max_warps, max_programs, shared_kib = _LIMITS[capability]
    warp_registers = -(-registers * _WARP // _REGISTER_UNIT) * _REGISTER_UNIT
    by_registers = _REGISTERS // warp_registers // warps if warp_registers else max_programs
    by_shared = shared_kib * 1024 // (shared_bytes + _RESERVED_KIB * 1024)
    programs = min(max_programs, max_warps // warps, by_registers, by_shared)
    return round(programs * warps / max_warps, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capabilities", nargs="+", type=int, choices=CAPABILITIES, default=list(CAPABILITIES))
    parser.add_argument("--ranks", nargs="+", type=int, default=list(RANKS))
    parser.add_argument(
        "--warps", type=int, help="warps per program, overrides the backend's setting; appends rows to the file"
    )
    parser.add_argument("--check", action="store_true", help="only compile")
    parser.add_argument("--out", type=Path, default=ROWS)
    args = parser.parse_args()
    if args.warps:
        backend.LAUNCH["num_warps"] = args.warps
    rows, count = [], 0
    for rank in args.ranks:
        for name, kernel, settings in variants(rank):
            for capability in args.capabilities:
                compiled = compile_for(GPUTarget("cuda", capability, _WARP), kernel, settings)
                count += 1
                print(f"{count} {name}, r {rank}, {capability}", flush=True)
                if args.check:
                    continue
                row = {"kernel": name, "rank": rank, "capability": capability}
                rows.append({**row, **asdict(resources_of(compiled, capability))})
    if args.check:
        print(f"{count} compiled")
        return
    for name, kernel, settings in [] if args.warps else variants(args.ranks[0]):
        try:
            compile_for(GPUTarget("hip", "gfx942", 64), kernel, settings)
            error = ""
        except Exception as problem:  # the row records any error of Triton's AMD backend
            error = f"{type(problem).__name__}: {str(problem).splitlines()[0][:200] if str(problem) else ''}"
        rows.append({"kernel": name, "rank": args.ranks[0], "capability": "gfx942", "error": error})
    versions = {"triton": triton.__version__, "tile": TILE, "warps": backend.LAUNCH["num_warps"]}
    earlier = args.out.read_text() if args.warps else ""
    args.out.write_text(earlier + "".join(json.dumps({**row, **versions}) + "\n" for row in rows))


if __name__ == "__main__":
    main()
