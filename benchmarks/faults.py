"""Fault injection: interrupt and damage small training runs, and count the outcomes.

    make faults                                            all groups; appends a row to benchmarks/faults.jsonl
    python benchmarks/faults.py --quick --out row.jsonl    a few trials per group, without HTML reports

    killed      send SIGKILL at random times or before random file operations, sometimes twice; a resumed run must
                match an uninterrupted run bit for bit
    disk full   fail all writes from a random one on, or limit the file size; then resume with free space
    small disk  train on a small file system; then resume with free space
    finished    flip a bit in, truncate, zero, empty or remove a file of a finished run; then predict, evaluate, merge,
                inspect and train --resume
    checkpoint  the same damage to an unfinished run; then train --resume
    fuzzed      run random command lines and configuration files
    together    start a second process in the folder of an active run
    overwritten kill during --overwrite; then train --resume
    folds       kill and resume a cross-validation
    features    kill and resume a linear probe on cached features
    merged      kill and repeat merge and export
    limits      merge, export, explain, plot, predict and evaluate with a file size limit
    inodes      train on a file system with few inodes; then resume
    torchruns   start two torchrun commands in one folder

Groups in `untrusted_faults.py` use untrusted input:

    exchanged   checkpoints, settings and records of another run; unlisted files
    forged      changed values in run.json and adapter settings, with valid hashes
    objects     YAML that constructs Python objects
    bombs       decompression bombs and PostScript as images, masks and prediction input
    requests    six parallel requests with large images to `snella serve`
    markup      markup in the names of classes, files and folders; pages are opened in a browser

A command may report damage in a one-line error (noticed) or return the correct result (harmless). Other results,
tracebacks and runs that cannot be resumed are failures: the script prints the details and exits with status 1.

All processes except torchrun's are forked from this one after it has imported the libraries.
"""

import argparse
import functools
import hashlib
import importlib
import json
import operator
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from fault_harness import (
    FAILURES,
    LIMIT_S,
    TINY,
    Child,
    Finished,
    Harness,
    call_limited,
    call_until,
    command,
    die,
    fail_writes,
    files_of,
    fork,
    outcome,
    sha256_of,
    tiny_without,
    train_until,
)
from fuzzed_commands import fuzzed
from safetensors.torch import load_file
from untrusted_faults import bombs, exchanged, forged, markup, objects, requests

from snella_app.cli.main import main
from snella_app.cli.parser import COMMANDS
from snella_app.runs import folder as _run_folder  # noqa: F401 - imported before forking
from snella_app.training import train as _train  # noqa: F401 - imported before forking
from snella_lab.provenance import git_state, processor_name


def killed(harness: Harness) -> None:
    """Kill runs at random times and before random file operations."""
    for number, draw, folder in harness.trials("killed"):
        run = folder / "run"
        if number % 2:
            instant = draw.uniform(0.0, 1.05 * harness.duration_s)
            description = f"after {instant:.3f} s"
            fork(functools.partial(main, [*TINY, "--out", str(run)]), signal_after_s=instant)
        else:
            operation = draw.randint(1, harness.operations)
            description = f"before file operation {operation}"
            fork(functools.partial(train_until, run, operation, die))
        if draw.random() < 0.3 and run.exists():
            operation = draw.randint(1, harness.operations)
            description += f", resumed until before operation {operation}"
            fork(functools.partial(train_until, run, operation, die, ["train", "--resume"]))
        harness.resume("killed", description, run)


def count_full_disk(harness: Harness, group: str, description: str, result: Finished) -> bool:
    """Count the outcome of a run on a full disk; return False after a traceback."""
    if result.has_traceback:
        harness.count(group, "traceback", description, result.text)
    else:
        harness.count(group, "one line" if result.status else "no effect")
    return not result.has_traceback


def disk_full(harness: Harness) -> None:
    """Fail all writes from a random one on, or limit the file size."""
    for number, draw, folder in harness.trials("disk full"):
        run = folder / "run"
        if number % 2:
            limit = int(2 ** draw.uniform(0, 19))
            description = f"file size limit of {limit} bytes"
            result = fork(functools.partial(call_limited, [*TINY, "--out", str(run)], limit))
        else:
            operation = draw.randint(1, harness.operations)
            description = f"full after file operation {operation}"
            result = fork(functools.partial(train_until, run, operation, fail_writes))
        if count_full_disk(harness, "disk full", description, result):
            harness.resume("disk full", description, run)


def small_disk(harness: Harness) -> None:
    """Train on a small file system, if mounting is allowed."""
    train_mounted(harness, "small disk", lambda draw: f"size={draw.randint(16, 1200) * 1024}", "size=64m")


def inodes(harness: Harness) -> None:
    """Train on a file system with few inodes, if mounting is allowed."""
    limits = f"size={2**26},nr_inodes="
    train_mounted(harness, "inodes", lambda draw: f"{limits}{draw.randint(3, 22)}", "nr_inodes=100000")


def train_mounted(harness: Harness, group: str, limits: Callable[[random.Random], str], free: str) -> None:
    """Train on file systems with the mount options `limits`, then resume with the options `free`."""
    for _, draw, folder in harness.trials(group):
        options = limits(draw)
        with mounted(folder, options) as is_mounted:
            if not is_mounted:
                harness.count(group, "mount failed")
                return
            result = command(*TINY, "--out", str(folder / "run"))
            if count_full_disk(harness, group, options, result):
                subprocess.run(["mount", "-o", f"remount,{free}", str(folder)], check=True)
                harness.resume(group, options, folder / "run")


def overwritten(harness: Harness) -> None:
    """Kill a run that overwrites an unfinished run with different settings."""
    for _, draw, folder in harness.trials("overwritten"):
        run = shutil.copytree(harness.unfinished_other, folder / "run", symlinks=True)
        operation = draw.randint(1, 30)
        description = f"before file operation {operation}"
        fork(functools.partial(train_until, run, operation, die, [*TINY, "--overwrite"]))
        result = command("train", "--out", str(run), "--resume")
        if result.has_traceback:
            harness.count("overwritten", "traceback", description, result.text)
        elif result.status and "--overwrite" in result.text:
            command(*TINY, "--out", str(run), "--overwrite")
            same = outcome(run) == harness.expected
            harness.count("overwritten", "needs overwrite" if same else "other results", description, result.text)
        elif result.status:
            harness.count("overwritten", "not resumed", description, result.text)
        else:
            results = outcome(run)
            known = {"old run resumed": harness.expected_of_other, "new run started": harness.expected}
            kind = next((name for name, expected in known.items() if results == expected), "other results")
            harness.count("overwritten", kind, description, result.text)


def folds(harness: Harness) -> None:
    """Kill and resume a cross-validation, whose folds are the test splits."""
    argv = [*tiny_without("--test-size"), "--folds", "2"]
    _killed_variant(harness, "folds", argv, lambda run: (run / "folds.json").read_bytes())


def features(harness: Harness) -> None:
    """Kill and resume a linear probe on cached features."""
    argv = [*tiny_without("--r"), "--method", "linear", "--augment", "none"]
    _killed_variant(harness, "features", argv, outcome)


def _killed_variant(harness: Harness, group: str, argv: list[str], read_results: Callable[[Path], object]) -> None:
    """Kill a training run before random file operations, resume it and compare the results."""
    if not harness.sizes[group]:
        return
    uninterrupted = harness.root / group / "uninterrupted"
    uninterrupted.parent.mkdir(parents=True)
    operations = harness.count_operations(uninterrupted, argv)
    expected = read_results(uninterrupted)
    for _, draw, folder in harness.trials(group):
        run, operation = folder / "run", draw.randint(1, operations)
        fork(functools.partial(train_until, run, operation, die, argv))
        description = f"before file operation {operation}"
        harness.resume(group, description, run, argv, lambda run=run: read_results(run) == expected)


def merged(harness: Harness) -> None:
    """Kill merge and export: files with final names must be complete, and a second call must succeed."""
    commands = {
        "m.safetensors": ["merge", str(harness.finished)],
        "m": ["merge", str(harness.finished)],
        "s.safetensors": ["export", str(harness.finished), "--format", "sparse"],
    }
    for number, draw, folder in harness.trials("merged"):
        name = list(commands)[number % len(commands)]
        target = folder / name
        argv = [*commands[name], "--out", str(target), "--overwrite"]
        operation = draw.randint(1, 8)
        fork(functools.partial(call_until, folder, operation, die, argv))
        remaining = contents_of(target)
        result = command(*argv)
        description = f"{argv[0]} to {name}, killed before file operation {operation}"
        if result.has_traceback or result.status:
            harness.count("merged", "traceback" if result.has_traceback else "not resumed", description, result.text)
        elif remaining and remaining != contents_of(target) and (target.is_file() or "config.json" in remaining):
            harness.count("merged", "other results", description, str(sorted(remaining)))
        elif any(path.name.endswith(".tmp") for path in folder.iterdir()):
            harness.count("merged", "leftover files", description, str(list(folder.iterdir())))
        else:
            harness.count("merged", "complete after retry")


def limits(harness: Harness) -> None:
    """Limit the file size: commands must print a one-line error with a path and leave no empty folder."""
    run, images = str(harness.finished), str(harness.images)
    commands = {
        "m.safetensors": ["merge", run],
        "m": ["merge", run],
        "s.safetensors": ["export", run, "--format", "sparse"],
        "maps": ["explain", run, images],
        "plots": ["plot", "allocation", run],
        "p.csv": ["predict", run, images],
        "e.json": ["evaluate", run],
    }
    for number, draw, folder in harness.trials("limits"):
        name = list(commands)[number % len(commands)]
        argv = [*commands[name], "--out", str(folder / "new" / name)]
        limit = draw.choice([0, 10, 200])
        result = fork(functools.partial(call_limited, argv, limit))
        description = f"{' '.join(argv)} with a file size limit of {limit} bytes"
        empty = [path for path in folder.rglob("*") if path.is_dir() and not any(path.iterdir())]
        if result.has_traceback:
            harness.count("limits", "traceback", description, result.text)
        elif result.status == 0:
            harness.count("limits", "no effect")
        elif empty or not any(path in result.text.strip().splitlines()[-1] for path in (str(folder), "/dev/shm")):
            harness.count("limits", "leftover files" if empty else "no path", description, f"{empty} {result.text}")
        else:
            harness.count("limits", "one line with path")


def torchruns(harness: Harness) -> None:
    """Start two torchrun commands, with two processes each, in one folder."""
    if not harness.sizes["torchruns"]:
        return
    uninterrupted = harness.root / "torchruns-uninterrupted"
    if torchrun(uninterrupted).wait(LIMIT_S * 3):
        raise SystemExit("the uninterrupted torchrun failed")
    expected = outcome(uninterrupted)
    for _, draw, folder in harness.trials("torchruns"):
        first = torchrun(folder / "run")
        time.sleep(draw.uniform(0.0, 3.0))
        processes = (first, torchrun(folder / "run"))
        outputs = [process.communicate(timeout=LIMIT_S * 3)[0] for process in processes]
        statuses = [process.returncode for process in processes]
        if 0 not in statuses:
            harness.count("torchruns", "not resumed", "two torchruns", "".join(outputs))
        elif outcome(folder / "run") != expected:
            harness.count("torchruns", "other results", "two torchruns", "".join(outputs))
        else:
            harness.count("torchruns", "one succeeded" if any(statuses) else "sequential")


def damaged_run(harness: Harness) -> None:
    """Damage a finished run, then run every command on it."""
    expected = {}
    for name, result, text in run_commands(harness, harness.finished):
        if result.status:
            raise SystemExit(f"an undamaged run was rejected by {name}: {text}")
        expected[name] = text
    for _, draw, folder in harness.trials("finished"):
        run = shutil.copytree(harness.finished, folder / "run", symlinks=True)
        damaged = damage(draw, run, [path for path in files_of(run) if "checkpoints" not in path.parts])
        for name, result, text in run_commands(harness, run):
            if name == "inspect" and result.status == 0 and "The adapter is missing" in text:
                harness.count("finished", "noticed")
                continue
            is_same = functools.partial(operator.eq, text, expected[name])
            harness.count_command("finished", f"{damaged}: {name}", result, is_same, rejected="noticed")


def run_commands(harness: Harness, run: Path) -> Iterator[tuple[str, Finished, str]]:
    """Run all commands on a run; yield name, process, and results (a digest for tensors) or, after an error, output."""
    folder = run.parent
    commands = {
        "predict": ["predict", str(run), str(harness.images), "--out", str(folder / "p.csv"), "--overwrite"],
        "evaluate": ["evaluate", str(run), "--out", str(folder / "e.json"), "--overwrite"],
        "merge": ["merge", str(run), "--out", str(folder / "m.safetensors"), "--overwrite"],
        "inspect": ["inspect", str(run)],
        "resume": ["train", "--out", str(run), "--resume"],
    }
    for name, argv in commands.items():
        result = command(*argv)
        text = result.text
        if result.status == 0 and name == "predict":
            text = (folder / "p.csv").read_text()
        elif result.status == 0 and name == "evaluate":
            values = json.loads((folder / "e.json").read_text())
            text = json.dumps({key: value for key, value in values.items() if key != "notes"})
        elif result.status == 0 and name == "merge":
            tensors = load_file(folder / "m.safetensors")
            digest = hashlib.sha256()
            for key in sorted(tensors):
                digest.update(key.encode() + tensors[key].numpy().tobytes())
            text = digest.hexdigest()
        elif result.status == 0 and name == "resume":
            text = json.dumps(outcome(run), sort_keys=True)
        yield name, result, text.replace(str(folder), "")


def damaged_checkpoint(harness: Harness) -> None:
    """Damage an interrupted run, then resume it."""
    for _, draw, folder in harness.trials("checkpoint"):
        run = shutil.copytree(harness.unfinished, folder / "run", symlinks=True)
        description = damage(draw, run, files_of(run))
        result = command("train", "--out", str(run), "--resume")
        harness.count_command(
            "checkpoint", description, result, lambda run=run: outcome(run) == harness.expected, rejected="noticed"
        )


def together(harness: Harness) -> None:
    """Start a second process in the folder of an active run."""
    for number, draw, folder in harness.trials("together"):
        run = folder / "run"
        first = Child(functools.partial(main, [*TINY, "--out", str(run)]))
        option = ("--resume", "--overwrite", "")[number % 3]
        argv = ["train", "--out", str(run), "--resume"] if option == "--resume" else [*TINY, "--out", str(run)]
        argv += ["--overwrite"] if option == "--overwrite" else []
        instant = draw.uniform(0.0, harness.duration_s)
        time.sleep(instant)
        is_stopped = draw.random() < 0.3
        if is_stopped:
            os.kill(first.pid, signal.SIGSTOP)
        second = command(*argv)
        if is_stopped:
            os.kill(first.pid, signal.SIGCONT)
        result = first.wait()
        description = f"{option or 'no option'} after {instant:.3f} s"
        if second.has_traceback or result.has_traceback:
            harness.count("together", "traceback", description, second.text + result.text)
        elif outcome(run) != harness.expected:
            harness.count("together", "other results", description, second.text + result.text)
        elif f"process {first.pid}" in second.text or f"process {os.getpid()}" in second.text:
            harness.count("together", "rejected with process id")
        else:
            harness.count("together", "sequential")


def torchrun(run: Path) -> "subprocess.Popen[str]":
    """Start a training run with two processes."""
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    # torchrun rejects --r and --monitor as ambiguous abbreviations of its own options
    tiny = [*tiny_without("--r", "--monitor"), "--method", "snella-2"]
    argv += ["-m", "snella_app.cli.main", *tiny, "--out", str(run)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def contents_of(path: Path) -> dict[str, str]:
    """Return the digests of a file, or of the files in a folder; empty if missing."""
    if path.is_file():
        return {path.name: sha256_of(path)}
    return {file.name: sha256_of(file) for file in files_of(path) if not file.name.startswith(".")}


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[bool]:
    """Mount a file system in memory at `folder`; yield False if mounting is not permitted."""
    argv = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    is_mounted = shutil.which("mount") is not None and subprocess.run(argv, capture_output=True).returncode == 0
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", str(folder)], check=True)


def damage(draw: random.Random, run: Path, files: list[Path]) -> str:
    """Damage a random file and describe the damage."""
    path = draw.choice(files)
    content = bytearray(path.read_bytes())
    name = path.relative_to(run)
    kind = draw.choices(["flip", "cut", "empty", "remove", "zeros"], [6, 2, 1, 1, 1])[0]
    if kind == "remove" or not content:
        path.unlink()
        return f"{name} removed"
    if kind == "empty":
        path.write_bytes(b"")
        return f"{name} emptied"
    at = draw.randrange(len(content))
    if kind == "cut":
        path.write_bytes(content[:at])
        return f"{name} cut at byte {at}"
    if kind == "zeros":
        path.write_bytes(content[:at] + bytes(len(content) - at))
        return f"{name} zero from byte {at}"
    bit = draw.randrange(8)
    content[at] ^= 1 << bit
    path.write_bytes(content)
    return f"{name} bit {bit} of byte {at} flipped"


def write_empty_report(run: Path, images: object = None, **options: object) -> Path:
    """Replacement for `write_report`: write an empty report."""
    (run / "report.html").write_text("<html></html>")
    return run / "report.html"


FULL = {
    "killed": 60, "disk full": 30, "small disk": 12, "finished": 120, "checkpoint": 60, "fuzzed": 600, "together": 15,
    "overwritten": 30, "folds": 12, "features": 12, "merged": 24, "limits": 21, "inodes": 10, "torchruns": 2,
    "exchanged": 40, "forged": 120, "objects": 6, "bombs": 12, "requests": 2, "markup": 1,
}  # fmt: skip

QUICK = {
    **dict.fromkeys(FULL, 0),
    **{"killed": 2, "disk full": 1, "finished": 2, "checkpoint": 1, "fuzzed": 12, "together": 1},
    **{"overwritten": 1, "merged": 1, "limits": 2, "exchanged": 5, "forged": 4, "objects": 1, "bombs": 2},
}


def table(counts: dict[str, Counter[str]]) -> str:
    """Format the results as Markdown, one row per group."""
    lines = ["| fault | trials | results |", "|---|---|---|"]
    for group, results in counts.items():
        text = ", ".join(f"{number} {result}" for result, number in sorted(results.items()))
        zeros = [f"0 {result}" for result in FAILURES[group] if not results[result]]
        lines.append(f"| {group} | {results.total()} | {'; '.join(filter(None, (text, ', '.join(zeros))))} |")
    return "\n".join(lines)


GROUPS = (
    *(killed, disk_full, small_disk, damaged_run, damaged_checkpoint, fuzzed, together, overwritten, folds, features),
    *(merged, limits, inodes, torchruns, exchanged, forged, objects, bombs, requests, markup),
)


def run_all(arguments: argparse.Namespace) -> int:
    """Run all groups, then print and store the counts."""
    sizes = QUICK if arguments.quick else FULL
    sizes = {name: round(size * arguments.times) for name, size in sizes.items()}
    if arguments.only:
        sizes = {name: size if name in arguments.only else 0 for name, size in sizes.items()}
    for name in ("train", "evaluate", "predict", "merge", "inspect", "data", "compare", "export", "serve"):
        importlib.import_module(COMMANDS[name].library)
    if arguments.quick:  # reports take half the time
        sys.modules["snella_app.training.finish"].__dict__["write_report"] = write_empty_report
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="snella-faults-") as folder:
        harness = Harness(Path(folder), arguments.seed, sizes)
        harness.prepare()
        for group in GROUPS:
            group(harness)
            print(f"{time.monotonic() - start:.0f} s: {group.__name__}", file=sys.stderr, flush=True)
    for failure in harness.failures:
        print(failure)
    print(table(harness.counts))
    commit, is_dirty = git_state()
    row = {
        **{"commit": commit or "", "dirty": bool(is_dirty), "cpu": processor_name(), "torch": version("torch")},
        "seed": arguments.seed,
        "quick": arguments.quick,
        "elapsed_s": round(time.monotonic() - start, 1),
        "counts": harness.counts,
    }
    if not arguments.only:
        with Path(arguments.out).open("a") as file:
            file.write(json.dumps(row) + "\n")
    return 1 if harness.failures else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few trials per group")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--times", type=float, default=1.0, help="multiplier for the number of trials")
    parser.add_argument(
        "--only", action="append", choices=list(FULL), help="run only this group, without writing a row"
    )
    parser.add_argument("--out", default=str(Path(__file__).with_name("faults.jsonl")))
    sys.exit(run_all(parser.parse_args()))
