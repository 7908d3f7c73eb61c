"""Training with 2 and 4 processes, compared with one process: engines × loops × options, on a tiny model with gloo.

python benchmarks/many_devices.py                          replaces many_devices.jsonl and the table in docs/notes
python benchmarks/many_devices.py --loops torchrun --engines DDP --options plain --counts 2 --out rows.jsonl
python benchmarks/many_devices.py --table                  rewrites the table from many_devices.jsonl

DeepSpeed must be importable, e.g. from a folder in PYTHONPATH; without it, ZeRO rows contain the ImportError. All
launches run in parallel, in 14 processes with about 0.7 GB each.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import peft.peft_model
import safetensors.torch
import torch
import torch.distributed as dist
from device_loops import (
    RESUMED_FROM,
    SAVED_AT,
    SINGLE,
    SINGLE_CAST,
    Cell,
    digest_of,
    make_model,
    rank_and_count,
    run_accelerate,
    run_torchrun,
)
from device_trainers import run_snella_train, run_trainer
from documents import markdown_table, put_between
from torch import Tensor

from snella.matrices import adapted_matrices
from snella_lab.bench.rows import append_rows, read_rows
from snella_lab.provenance import conditions

ROWS = Path(__file__).with_suffix(".jsonl")
NOTE = Path(__file__).parent.parent / "docs" / "notes" / "checks.md"
LOOPS = ("torchrun", "accelerate", "Trainer", "snella train")
ENGINES = ("DDP", "FSDP2", "FSDP1", "ZeRO-1", "ZeRO-2", "ZeRO-3", "shard")
OPTIONS = ("plain", "accumulation", "checkpointing", "bf16", "compile")
COUNTS = (2, 4)
RUNNERS = {"torchrun": run_torchrun, "accelerate": run_accelerate, "Trainer": run_trainer}
ENGINE_NAMES = {"shard": "`--shard`"}
LOOP_NAMES = {"snella train": "`snella train`"}


def digest(cell: Cell, state: dict[str, Tensor]) -> str:
    """Return a hash of this process's budgets and sparse updates, which depend on the thresholds."""
    plain = make_model(cell.has_allocator)
    names = dict(plain.state_dict())
    cleaned = {_plain_name(name): tensor for name, tensor in state.items()}
    unknown = sorted(set(cleaned) - set(names))
    if unknown:
        raise AssertionError(f"unknown names in the gathered state: {unknown[:3]}")
    plain.load_state_dict(cleaned, strict=False)
    matrices = adapted_matrices(plain)
    for matrix in matrices:
        if cell.budgets:
            matrix.layer.set_budget("default", [cell.budgets[matrix.name]])
    return digest_of(matrices)


def _plain_name(name: str) -> str:
    """Return a parameter name without the prefixes of wrappers."""
    for part in ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module."):
        name = name.replace(part, "")
    return name.removeprefix("module.")


def run_cell(cell: Cell) -> dict[str, Any]:
    """Run a cell and return the result of this process."""
    written: list[str] = []

    def save_file(tensors: Any, filename: Any, *args: Any, **kwargs: Any) -> None:
        written.append(str(filename))
        safetensors.torch.save_file(tensors, filename, *args, **kwargs)

    peft.peft_model.safe_save_file = save_file
    torch._dynamo.reset()
    _, count = rank_and_count()
    result: dict[str, Any] = {
        "loop": cell.loop,
        "engine": cell.engine,
        "option": cell.option,
        "processes": count,
        "has_allocator": cell.has_allocator,
        "resumed_from": RESUMED_FROM[count] if cell.first else None,
    }
    try:
        with mock.patch.dict(os.environ):  # TrainingArguments sets ACCELERATE_USE_FSDP for all later cells
            if cell.loop == "snella train":
                run_snella_train(cell)
            else:
                cell.digest = digest(cell, RUNNERS[cell.loop](cell))
        result |= {
            "losses": cell.losses,
            "budgets": cell.budgets,
            "digest": cell.digest,
            "bytes": cell.allocator_bytes,
            "adapter_files_written": cell.saved_adapters + sum("adapter_model" in name for name in written),
        }
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        first_line = next(iter(str(error).strip().splitlines()), "")
        result["error"] = f"{type(error).__name__}: {first_line}"[:300]
        result["raised_in"] = f"{Path(frame.filename).parent.name}/{Path(frame.filename).name}:{frame.lineno}"
    return result


def cells(arguments: argparse.Namespace, count: int) -> Iterator[Cell]:
    """Yield the cells of one launch; DeepSpeed comes last because it patches torch."""
    folder = Path(arguments.folder)
    pairs = sorted(itertools.product(arguments.loops, arguments.engines), key=lambda pair: pair[1].startswith("ZeRO"))
    pairs = [(loop, engine) for loop, engine in pairs if _has_engine(loop, engine)]
    if count == 1:
        references = {_reference(*pair, option) for pair in pairs for option in arguments.options if _runs(*pair)}
        for loop, engine, option, has_allocator in sorted(references):
            yield Cell(loop, engine, option, folder, has_allocator)
    for is_resumed in (False, True):  # resumed cells come last because they wait for other launches
        for loop, engine in pairs:
            yield from _cells_of(loop, engine, is_resumed, count, arguments)


def _cells_of(loop: str, engine: str, is_resumed: bool, count: int, arguments: argparse.Namespace) -> Iterator[Cell]:
    """Yield the cells of one loop and engine; expected errors run only with the fewest processes."""
    folder, is_deepspeed = Path(arguments.folder), engine.startswith("ZeRO")
    is_first = count == min(arguments.counts)
    if is_resumed:
        if _runs(loop, engine) and "plain" in arguments.options and RESUMED_FROM.get(count) in arguments.counts:
            yield Cell(loop, engine, "plain", folder, not is_deepspeed, SAVED_AT)
        return
    if not _runs(loop, engine):
        if is_first:
            yield Cell(loop, engine, "plain", folder, not is_deepspeed)
        return
    for option in arguments.options if count > 1 else ():
        if (option, loop) != ("compile", "snella train"):
            yield Cell(loop, engine, option, folder, not is_deepspeed)
    if is_deepspeed and is_first:
        yield Cell(loop, engine, "plain", folder)


def _has_engine(loop: str, engine: str) -> bool:
    """Return whether a loop has a setting for an engine; `--shard` belongs to `snella train`."""
    return engine in ("DDP", "shard") if loop == "snella train" else engine != "shard"


def _runs(loop: str, engine: str) -> bool:
    """Return whether a loop uses the engine on a CPU; Accelerate and the Trainer use only DDP."""
    return engine == "DDP" or loop in ("torchrun", "snella train")


def _reference(loop: str, engine: str, option: str) -> tuple[str, str, str, bool]:
    """Return loop, engine, option and allocator of the single-process run to compare with.

    All options without an effect on the precision are compared with the plain run.
    """
    is_cast = option == "bf16" and engine not in ("DDP", "shard")
    has_allocator = not engine.startswith("ZeRO")
    return loop, SINGLE_CAST if is_cast else SINGLE, "bf16" if option == "bf16" else "plain", has_allocator


def work(arguments: argparse.Namespace) -> None:
    """Run the cells of one launch and write the results of this process."""
    warnings.simplefilter("ignore")
    rank, count = rank_and_count()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=arguments.timeout))
    with (Path(arguments.folder) / f"{arguments.worker}-{count}-{rank}.jsonl").open("w") as stream:
        for cell in cells(arguments, count):
            if cell.first:
                _wait_for(_marker(cell, RESUMED_FROM[count]), arguments.timeout)
            stream.write(json.dumps(run_cell(cell)) + "\n")
            stream.flush()
            dist.barrier()
            if not cell.first:
                _marker(cell, count).touch()
    os._exit(0)  # gloo's threads occasionally deadlock at exit


def _marker(cell: Cell, count: int) -> Path:
    """Return the file that marks the end of a cell with `count` processes."""
    return cell.checkpoint(count).with_suffix(".done")


def _wait_for(marker: Path, timeout: float) -> None:
    """Wait until another launch has finished a cell; continue after `timeout` seconds."""
    end = time.monotonic() + timeout
    while not marker.exists() and time.monotonic() < end:
        time.sleep(1)


def run(command: Sequence[str], log: Path, environment: dict[str, str], timeout: float) -> bool:
    """Run a command with output to a file; kill it and its children after `timeout` seconds."""
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment, start_new_session=True)
        try:
            return process.wait(timeout) == 0
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return False


def launch(launcher: str, count: int, folder: Path, arguments: argparse.Namespace) -> list[Result]:
    """Run a worker in `count` processes and return the results of all processes."""
    loops = [loop for loop in arguments.loops if (loop == "accelerate") == (launcher == "accelerate")]
    worker = [__file__, "--worker", launcher, "--folder", str(folder), "--loops", *loops]
    worker += ["--engines", *arguments.engines, "--options", *arguments.options]
    worker += ["--counts", *map(str, arguments.counts), "--timeout", str(arguments.timeout)]
    scripts = Path(sys.executable).parent
    if launcher == "accelerate" and count > 1:
        start = [str(scripts / "accelerate"), "launch", "--multi_gpu", "--num_processes", str(count)]
        start += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        start += ["--main_process_port", "0"]
    else:
        start = [str(scripts / "torchrun"), "--standalone", "--nproc-per-node", str(count)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    run([*start, *worker], folder / f"{launcher}-{count}.log", environment, arguments.timeout)
    files = [folder / f"{launcher}-{count}-{rank}.jsonl" for rank in range(count)]
    return [json.loads(line) for file in files if file.exists() for line in file.read_text().splitlines()]


Result = dict[str, Any]
Key = tuple[str, str, str, bool, int, bool]
"""Loop, engine, option, has an allocator, number of processes, is resumed."""


def measure(arguments: argparse.Namespace, folder: Path) -> list[Result]:
    """Run all launches and return one row per run."""
    planned = argparse.Namespace(**{**vars(arguments), "folder": str(folder)})
    by_key: dict[Key, list[Result]] = {  # runs without a result are errors
        (cell.loop, cell.engine, cell.option, cell.has_allocator, count, cell.first > 0): []
        for count in (*arguments.counts, 1)
        for cell in cells(planned, count)
    }
    launchers = sorted({"accelerate" if loop == "accelerate" else "torchrun" for loop in arguments.loops})
    launches = list(itertools.product(launchers, (*arguments.counts, 1)))
    with ThreadPoolExecutor(len(launches)) as pool:
        results = pool.map(lambda pair: launch(*pair, folder, arguments), launches)
        for result in itertools.chain.from_iterable(results):
            key = (
                *(result["loop"], result["engine"], result["option"], result["has_allocator"]),
                *(result["processes"], result["resumed_from"] is not None),
            )
            by_key[key].append(result)
    return [summarize(key, results, by_key) for key, results in by_key.items() if key[1] not in (SINGLE, SINGLE_CAST)]


def summarize(key: Key, results: list[Result], by_key: dict[Key, list[Result]]) -> Result:
    """Compare the processes of one run with each other and with a single process."""
    loop, engine, option, has_allocator, count, is_resumed = key
    row: Result = {"loop": loop, "engine": engine, "option": option, "allocator": has_allocator}
    row |= {"processes": count, "resumed_from": RESUMED_FROM[count] if is_resumed else None}
    errors = [result for result in results if "error" in result]
    if len(results) < count and not errors:
        return {**row, "error": f"{count - len(results)} of {count} processes exited without a result"}
    if errors:
        return {**row, "error": errors[0]["error"], "raised_in": errors[0].get("raised_in")}
    references = by_key.get((*_reference(loop, engine, option), 1, False))
    if not references:
        return {**row, "error": "one process exited without a result"}
    (reference,) = references
    if "error" in reference:
        return {**row, "error": f"one process: {reference['error']}"}
    losses = torch.tensor([result["losses"] for result in results], dtype=torch.float64).mean(0)
    expected = torch.tensor(reference["losses"], dtype=torch.float64)[-len(losses) :]
    budgets = results[0]["budgets"]
    moved = sum(abs(budgets[name] - number) for name, number in reference["budgets"].items()) // 2 if budgets else None
    per_step = [max(values) for values in zip(*(result["bytes"] for result in results), strict=True)]
    return {
        **row,
        "same_on_all_ranks": len({(result["digest"], json.dumps(result["budgets"])) for result in results}) == 1,
        "largest_loss_difference": float((losses - expected).abs().max()),
        "first_loss": float(expected[0]),
        "last_loss": float(expected[-1]),
        "budget_entries_moved": moved,
        "budget": sum(budgets.values()) if budgets else None,
        "matrices": len(budgets) or None,
        "allocator_bytes_per_step": per_step,
        "processes_that_saved": sum(result["adapter_files_written"] > 0 for result in results),
    }


def table(rows: list[Result]) -> str:
    """Format the Markdown table of the results and the table of the errors.

    Settings with equal results share a line.
    """
    grouped: dict[tuple[str, str, str, bool], list[Result]] = {}
    for row in rows:
        grouped.setdefault((row["engine"], row["loop"], row["option"], row["allocator"]), []).append(row)
    lines = []
    for (engine, loop, option, has_allocator), group in grouped.items():
        if any(row["resumed_from"] is None and "error" not in row for row in group):
            by_count = {(row["processes"], row["resumed_from"]): row for row in group}
            lines.append([*_names(engine, loop, has_allocator), option, *_results(by_count)])
    for column in (2, 0, 1):
        lines = _merge(lines, column)
    head = ["engine", "loop", "option", "same on all ranks", "loss, 2", "loss, 4", "saved", "2 → 4", "4 → 1"]
    errors = [
        [*_names(row["engine"], row["loop"], row["allocator"]), row["option"], _processes(row), _short(row["error"])]
        for row in rows
        if "error" in row
    ]
    for column in (2, 3, 0, 1):
        errors = _merge(errors, column)
    results = markdown_table([*head, "first step, bytes", "later steps, bytes"], lines)
    return f"{results}\n\n" + markdown_table(["engine", "loop", "option", "processes", "error"], errors)


def _names(engine: str, loop: str, has_allocator: bool) -> tuple[str, str]:
    """Return the table's names of an engine and a loop."""
    suffix = " with an allocator" if engine.startswith("ZeRO") and has_allocator else ""
    return ENGINE_NAMES.get(engine, engine) + suffix, LOOP_NAMES.get(loop, loop)


def _processes(row: Result) -> str:
    """Return the number of processes, with an arrow for resumed runs."""
    return str(row["processes"]) if row["resumed_from"] is None else f"{row['resumed_from']} → {row['processes']}"


def _merge(lines: list[list[str]], column: int) -> list[list[str]]:
    """Merge lines that differ only at `column`."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for line in lines:
        groups.setdefault((*line[:column], *line[column + 1 :]), []).append(line[column])
    return [[*rest[:column], ", ".join(dict.fromkeys(names)), *rest[column:]] for rest, names in groups.items()]


def _results(cells: dict[tuple[int, int | None], Result]) -> list[str]:
    """Return the columns with the results of one setting."""
    finished = [row for row in cells.values() if "error" not in row]
    fresh = [row for row in finished if row["resumed_from"] is None]
    same = "yes" if all(row["same_on_all_ranks"] for row in finished) else "**no**"
    files = sorted({row["processes_that_saved"] for row in fresh})
    saved = "once" if files == [1] else ", ".join(map(str, files))
    entries = [_difference(cells.get(key)) for key in ((2, None), (4, None), (4, 2), (1, 4))]
    first, later = "–", "–"
    if fresh[0]["matrices"]:
        first = _listed(row["allocator_bytes_per_step"][0] for row in fresh)
        later = _listed(max(row["allocator_bytes_per_step"][1:]) for row in fresh)
    return [same, *entries[:2], saved, *entries[2:], first, later]


def _listed(numbers: Iterable[int]) -> str:
    """List distinct numbers in ascending order."""
    return ", ".join(map(str, sorted(set(numbers))))


def _difference(row: Result | None) -> str:
    """Format the largest loss difference."""
    if row is None:
        return "–"
    return "error" if "error" in row else _magnitude(row["largest_loss_difference"])


def _magnitude(difference: float) -> str:
    """Round a difference up to a power of ten, so that settings with equal results share a line."""
    if difference == 0:
        return "0"
    return f"< {10.0 ** (math.floor(math.log10(difference)) + 1):.0e}"


def _short(error: str) -> str:
    """Shorten an error for the table."""
    text = re.sub(r"(/[\w.-]+){3,}/", "…/", error).replace("|", "/")
    return f"`{text if len(text) <= 130 else text[:129] + '…'}`"


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--loops", nargs="+", default=LOOPS, choices=LOOPS)
    command.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    command.add_argument("--options", nargs="+", default=OPTIONS, choices=OPTIONS)
    command.add_argument("--counts", nargs="+", type=int, default=COUNTS)
    command.add_argument("--timeout", type=float, default=3600, help="maximum seconds per launch")
    command.add_argument("--out", type=Path, default=ROWS)
    command.add_argument("--table", action="store_true", help="only write the table")
    command.add_argument("--worker", help=argparse.SUPPRESS)
    command.add_argument("--folder", help=argparse.SUPPRESS)
    return command


def main() -> None:
    """Run the benchmark, or one of its worker processes."""
    arguments = parser().parse_args()
    if arguments.worker:
        work(arguments)
        return
    chosen = [tuple(values) for values in (arguments.loops, arguments.engines, arguments.options, arguments.counts)]
    if not arguments.table and arguments.out == ROWS and chosen != [LOOPS, ENGINES, OPTIONS, COUNTS]:
        parser().error(f"--out is required for a part; {ROWS.name} contains all combinations")
    rows: list[Result] = []
    if not arguments.table:
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(arguments, Path(arguments.folder or folder))
    if rows:
        provenance = conditions("cpu")
        if arguments.out == ROWS:
            ROWS.unlink(missing_ok=True)
        append_rows(arguments.out, [{**row, **provenance} for row in rows])
    if arguments.out == ROWS:
        put_between(NOTE, "<!-- many devices begin -->", "<!-- many devices end -->", table(read_rows(ROWS)))


if __name__ == "__main__":
    main()
