"""Registers, spills, shared memory, occupancy and instructions of compiled Triton kernels; no GPU required.

python benchmarks/triton_resources.py                         all capabilities and ranks; replaces the rows
python benchmarks/triton_resources.py --capabilities 90 --launch 8 64        appends rows for another launch
python benchmarks/triton_resources.py --candidates                           appends rows for other tiles and launches
python benchmarks/triton_resources.py --choose                               ranks these rows by predicted clocks
python benchmarks/triton_resources.py --capabilities 90 --ranks 8 --check    only compiles

Each branch of each kernel is compiled with pointers and sizes divisible by 16 (`aligned`); for capability 9.0, also
without this alignment. Resources come from Triton's copy of `cuobjdump`. Occupancy is the fraction of a
multiprocessor's warps that registers, shared memory and the program limit allow. The script also compiles for
AMD's `gfx942`; those rows record only compilation errors. `source` is a digest of the kernel and its
launch (`source_digest`).
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import math
import re
import subprocess
import tempfile
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from snella.backends.triton import backend, backward, forward
from snella_lab.bench.rows import append_rows, read_rows
from snella_lab.provenance import git_state

ROWS = Path(__file__).with_suffix(".jsonl")
CAPABILITIES = (80, 86, 89, 90, 100, 120)
RANKS = (8, 16, 32)
INTEGERS = {"n": "i32", "m": "i32", "R": "i32", "num_sums": "i32", "num_tiles": "i32", "scaling": "fp32"}
_ALIGNED_SIZES = {"n", "num_sums"}
TABLES = dict.fromkeys(("layout", "counts", "high", "middle", "low", "state"), "*i32")
TILE, STATISTICS = backend.TILE, backend.STATISTICS
_WARP = 32
_REGISTERS, _REGISTER_UNIT = 65_536, 256
"""Registers per multiprocessor, and allocation unit per warp."""
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
CANDIDATE_TILES = ((32, 64), (16, 64), (32, 32), (64, 64))
CANDIDATE_LAUNCHES = ((4, 128), (8, 80), (8, None), (16, 64))
"""Tiles, and warps per program with registers per thread, that `--candidates` compiles for 9.0, `mix_k` and `r = 8`."""
_ISSUED, _BYTES = 128, 14.0
"""Thread instructions that a multiprocessor issues, and bytes that it moves, per clock (H100 datasheet)."""
_LATENCY = {"factor gradients": (250, 280)}
_DEFAULT_LATENCY = (40, 35)
"""Clocks until the operands of a step over the rank arrive, and instructions of such a step (estimates)."""


@dataclass(frozen=True)
class Resources:
    """Resources of one compiled kernel: registers and spills per thread, shared memory per program.

    Attributes:
        executed: Instructions that a thread executes per entry of its tile. Loops over pieces and their widths count
            once per iteration; the loop over tiles counts once.
        occupancy: Active warps over the multiprocessor's warps.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions: int
    executed: float
    occupancy: float


def variants(rank: int = 8) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Yield name, kernel and settings of each branch."""
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
        scalar = axis | {"SOFTMAX": True, "CENTER": axis is warm, "BLOCK": backend.SUM_BLOCK}
        yield f"scalar gradients, {label}", backward.scalar_gradients, scalar
    plain_linear = no_softmax | {"alpha": None, "weighted_sum": None, "MODE": 2}
    yield "factor gradients, p-linear", backward.factor_gradients, plain | TILE | plain_linear
    for targets, mode_name in ((1, "soft"), (2, "official")):
        yield f"add sparse, {mode_name}", forward.add_sparse, {"MODE": targets - 1, "BLOCK": backend.ADD_BLOCK}
        counting = {"TARGETS": targets, "LEVEL": targets, "BLOCK": backend.COUNT_BLOCK}
        yield f"count within bin, {mode_name}", forward.count_within_bin, counting
        yield f"finish thresholds, {mode_name}", forward.finish_thresholds, {"TARGETS": targets}


@functools.cache
def kernel_code() -> str:
    """Return the code of all kernels without comments and docstrings."""
    ignored = {tokenize.COMMENT, tokenize.NL, tokenize.ENCODING}
    words = []
    for module in (forward, backward):
        with Path(str(module.__file__)).open("rb") as stream:
            tokens = [token for token in tokenize.tokenize(stream.readline) if token.type not in ignored]
        starts = (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
        for before, token in zip([None, *tokens], tokens, strict=False):
            is_docstring = token.type == tokenize.STRING and (before is None or before.type in starts)
            words += [] if is_docstring else [token.string.strip() or tokenize.tok_name[token.type]]
    return " ".join(words)


def source_digest(settings: dict[str, Any], launch: dict[str, Any]) -> str:
    """Return a digest of the code of all kernels, and of a row's settings and launch options."""
    options = (sorted((name, str(value)) for name, value in values.items()) for values in (settings, launch))
    return hashlib.sha256(repr((kernel_code(), *options)).encode()).hexdigest()[:16]


def compile_for(
    target: GPUTarget, kernel: Any, settings: dict[str, Any], launch: dict[str, Any], aligned: bool = True
) -> Any:
    """Compile one kernel to machine code."""
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr or (name in settings and settings[name] is None):
            signature[name], constants[name] = "constexpr", settings[name]
        elif name in INTEGERS | TABLES:
            signature[name] = (INTEGERS | TABLES)[name]
        else:
            signature[name] = "*bf16" if name in ("base", "out", "grad", "A") else "*fp32"
        if aligned and (signature[name].startswith("*") or name in _ALIGNED_SIZES):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=launch)
    if not (compiled.asm.get("cubin") or compiled.asm.get("hsaco")):
        raise RuntimeError(f"no machine code for {kernel.__name__} with {settings}")
    return compiled


def resources_of(compiled: Any, capability: int, settings: dict[str, Any], warps: int) -> Resources:
    """Read the resources of a compiled kernel with `cuobjdump`."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
        code = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    text = usage.stdout + usage.stderr
    numbers = {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    # dynamic shared memory is requested at launch, not in the machine code
    shared = max(numbers["SHARED"], int(compiled.metadata.shared))
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", code, re.MULTILINE)
    instructions = [(int(address, 16), text) for address, text in lines]
    entries = settings.get("BLOCK", 0) or settings.get("BLOCK_M", 0) * settings.get("BLOCK_N", 0)
    entries = max(1, (entries or settings.get("ALONG", 0) * settings.get("ACROSS", 0)) // (_WARP * warps))
    executed = executed_instructions(instructions, entries, settings.get("P", 1), settings.get("R", 1)) / entries
    share = occupancy(numbers["REG"], shared, warps, capability)
    spilled = numbers["STACK"] + numbers["LOCAL"]
    return Resources(numbers["REG"], spilled, shared, len(instructions), round(executed, 1), share)


def executed_instructions(instructions: list[tuple[int, str]], entries: int, pieces: int, rank: int) -> float:
    """Count the instructions that a thread with `entries` entries executes.

    A backward branch ends a loop. The innermost loop with square roots iterates over the pieces, and a loop with only
    multiplications over the width of a piece. A partially unrolled loop contains more than one root or product per
    entry.
    """

    def count(first: int, last: int, operation: str) -> int:
        return sum(first <= address <= last and operation in text for address, text in instructions)

    loops = []
    for address, text in instructions:
        branch = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if branch and int(branch[1], 16) < address:
            loops.append((int(branch[1], 16), address))
    iterations = Counter[tuple[int, int]]()
    for first, last in loops:
        roots, products = count(first, last, "MUFU.RSQ"), count(first, last, "FMUL") or count(first, last, "FFMA")
        inner = [loop for loop in loops if loop != (first, last) and first <= loop[0] and loop[1] <= last]
        if roots and not any(count(*loop, "MUFU.RSQ") for loop in inner):
            iterations[first, last] = max(1, pieces // round(roots / entries))
        elif products and not roots:
            iterations[first, last] = max(1, rank // pieces // max(1, round(products / entries)))
    executed = 0
    for address, text in instructions:
        repeats = 0 if text.startswith("NOP") else 1
        for (first, last), number in iterations.items():
            repeats *= number if first <= address <= last else 1
        executed += repeats
    return executed


def occupancy(registers: int, shared_bytes: int, warps: int, capability: int) -> float:
    """Compute the occupancy, active warps over the multiprocessor's warps, for programs with `warps` warps."""
    max_warps, max_programs, shared_kib = _LIMITS[capability]
    warp_registers = -(-registers * _WARP // _REGISTER_UNIT) * _REGISTER_UNIT
    by_registers = _REGISTERS // warp_registers // warps if warp_registers else max_programs
    by_shared = shared_kib * 1024 // (shared_bytes + _RESERVED_KIB * 1024)
    programs = min(max_programs, max_warps // warps, by_registers, by_shared)
    return round(programs * warps / max_warps, 3)


def predicted_clocks(row: dict[str, Any]) -> float:
    """Predict the clocks of a multiprocessor per entry: the larger of the time to issue and the time to move bytes.

    clocks = max(executed / 128 · max(1, (1 + latency / step) / W), bytes / 14),  W = warps per scheduler

    Bytes count the matrices that a kernel reads or writes, and partial sums, which are written and read once. The
    result is infinite for a row that spills.
    """
    if row["spilled_bytes"]:
        return math.inf
    kernel, (height, width) = row["kernel"], row["tile"].values()
    moved = 4.0  # ΔW in float32
    if kernel.startswith("softmax sums"):
        moved += 2 + 8 / height  # ∂L/∂W in bfloat16, one sum per column
    elif kernel.startswith("factor gradients"):
        moved += 2 + 8 * row["rank"] * (1 / height + 1 / width)
    latency, step = next((value for name, value in _LATENCY.items() if kernel.startswith(name)), _DEFAULT_LATENCY)
    max_warps = _LIMITS[row["capability"]][0]
    warps_per_scheduler = row["occupancy"] * max_warps / 4
    issue = row["executed"] / _ISSUED * max(1.0, (1 + latency / step) / max(warps_per_scheduler, 0.25))
    return max(issue, moved / _BYTES)


def ranked_candidates(rows: list[dict[str, Any]]) -> dict[tuple[str, int], list[tuple[float, dict[str, Any]]]]:
    """Sort the rows of 9.0 by predicted clocks, for each tiled kernel and rank that was compiled with other tiles."""
    candidates: dict[tuple[str, int], list[tuple[float, dict[str, Any]]]] = {}
    for row in rows:
        if row["capability"] == 90 and row["aligned"]:
            candidates.setdefault((row["kernel"], row["rank"]), []).append((predicted_clocks(row), row))
    return {
        key: sorted(values, key=lambda value: value[0])
        for key, values in candidates.items()
        if len({tuple(row["tile"].values()) for _, row in values}) > 1
    }


def compile_candidates(out: Path) -> None:
    """Compile the tiled kernels of `mix_k` for 9.0 and `r = 8` with other tiles and launches, and append the rows."""
    common = {"triton": triton.__version__, "commit": (git_state()[0] or "")[:7]}
    tiled = [variant for variant in variants() if "BLOCK_M" in variant[2] and variant[0].endswith("mix-k")]
    for (name, kernel, settings), (height, width), (warps, registers) in itertools.product(
        tiled, CANDIDATE_TILES, CANDIDATE_LAUNCHES
    ):
        tile = {"BLOCK_M": height, "BLOCK_N": width}
        launch = backend.launch_options(kernel.__name__) | {"num_warps": warps, "maxnreg": registers}
        launch = {option: value for option, value in launch.items() if value is not None}
        compiled = compile_for(GPUTarget("cuda", 90, _WARP), kernel, settings | tile, launch)
        row = {"kernel": name, "rank": settings["R"], "capability": 90, "aligned": True}
        row |= {"source": source_digest(settings | tile, launch)}
        row |= asdict(resources_of(compiled, 90, settings | tile, warps))
        append_rows(out, [{**row, "warps": warps, "tile": tile, "launch": [warps, registers], **common}])
        print(f"{name}, {height}×{width}, {warps} warps, {registers} registers", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capabilities", nargs="+", type=int, choices=CAPABILITIES, default=list(CAPABILITIES))
    parser.add_argument("--ranks", nargs="+", type=int, default=list(RANKS))
    parser.add_argument(
        "--launch",
        nargs=2,
        type=int,
        metavar=("WARPS", "REGISTERS"),
        help="compile with this launch configuration and append the rows",
    )
    parser.add_argument("--check", action="store_true", help="only compile")
    parser.add_argument("--candidates", action="store_true", help="append rows for other tiles and launches")
    parser.add_argument("--choose", action="store_true", help="rank tiles and launches by predicted clocks")
    parser.add_argument("--out", type=Path, default=ROWS)
    args = parser.parse_args()
    if args.candidates:
        compile_candidates(args.out)
        return
    if args.choose:
        for (name, rank), candidates in ranked_candidates(read_rows(args.out)).items():
            for clocks, row in candidates[:5]:
                tile, launch = "×".join(map(str, row["tile"].values())), row["launch"] or "current launch"
                print(f"{name}, r {rank}: {clocks:.2f} clocks, tile {tile}, {launch}, occupancy {row['occupancy']:.0%}")
        return
    is_whole = set(CAPABILITIES) <= set(args.capabilities) and set(RANKS) <= set(args.ranks)
    if not is_whole and args.out == ROWS and not (args.launch or args.check):
        parser.error("a part of the capabilities or ranks would replace all rows; pass --out, --launch or --check")
    rows, count = [], 0
    for rank in args.ranks:
        for name, kernel, settings in variants(rank):
            unaligned = [(90, False)] if 90 in args.capabilities else []
            for capability, aligned in [*((capability, True) for capability in args.capabilities), *unaligned]:
                launch = backend.launch_options(kernel.__name__, settings.get("R", 1), settings.get("P", 1), aligned)
                if args.launch:
                    launch |= dict(zip(("num_warps", "maxnreg"), args.launch, strict=True))
                warps = launch["num_warps"]
                compiled = compile_for(GPUTarget("cuda", capability, _WARP), kernel, settings, launch, aligned)
                count += 1
                print(f"{count} {name}, r {rank}, {capability}", flush=True)
                if args.check:
                    continue
                row = {"kernel": name, "rank": rank, "capability": capability, "aligned": aligned}
                row |= {"source": source_digest(settings, launch)}
                rows.append({**row, **asdict(resources_of(compiled, capability, settings, warps)), "warps": warps})
    if args.check:
        print(f"{count} compiled")
        return
    for name, kernel, settings in [] if args.launch else variants(args.ranks[0]):
        launch = backend.launch_options(kernel.__name__, settings.get("R", 1), settings.get("P", 1))
        try:
            compile_for(GPUTarget("hip", "gfx942", 64), kernel, settings, launch)
            error = ""
        except Exception as exception:  # the row records any error of Triton's AMD backend
            error = f"{type(exception).__name__}: {str(exception).splitlines()[0][:200] if str(exception) else ''}"
        row = {"kernel": name, "rank": args.ranks[0], "capability": "gfx942", "error": error}
        rows.append({**row, "source": source_digest(settings, launch)})
    commit = (git_state()[0] or "")[:7]
    versions = {"triton": triton.__version__, "tile": TILE, "commit": commit, "launch": args.launch}
    if not args.launch:
        args.out.unlink(missing_ok=True)
    append_rows(args.out, [{**row, **versions} for row in rows])


if __name__ == "__main__":
    main()
