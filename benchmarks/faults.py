"""Fault injection: interrupt and damage small training runs, and count the outcomes.

    make faults                                            all groups; appends a row to benchmarks/faults.jsonl
    python benchmarks/faults.py --quick --out row.jsonl    a few trials per group, without HTML reports

    killed      send SIGKILL at random times or before random file operations, sometimes twice; a resumed run must
                match an uninterrupted run bit for bit
    disk full   fail all writes after a random one, or limit the file size; then resume with free space
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

All processes are forked from this one after importing the libraries.
"""

import argparse
import functools
import gc
import hashlib
import importlib
import json
import operator
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", HF_HUB_OFFLINE="1", COLUMNS="200", NO_COLOR="1")

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from untrusted_faults import bombs, exchanged, forged, markup, objects, requests

from snella_app.cli import parser as _parser
from snella_app.cli.main import main
from snella_app.cli.parser import COMMANDS
from snella_app.runs import folder as _run_folder  # noqa: F401 - imported before forking
from snella_app.training import train as _train  # noqa: F401 - imported before forking
from snella_lab.provenance import git_state, processor_name

TINY = [
    "train", "--data", "digits", "--backbone", "test_vit", "--pretrained", "false", "--img-size", "32", "--r", "2",
    "--train-size", "40", "--val-size", "20", "--test-size", "20", "--batch-size", "20", "--epochs", "3",
    "--device", "cpu", "--progress", "false",
]  # fmt: skip
LIMIT_S = 120
_COMPARED = ("other results", "traceback")
_RESUMED = (*_COMPARED, "not resumed")
FAILURES = {
    **dict.fromkeys(("killed", "disk full", "small disk", "overwritten", "folds", "features", "inodes"), _RESUMED),
    **dict.fromkeys(("finished", "checkpoint", "together", "exchanged"), _COMPARED),
    **dict.fromkeys(("fuzzed", "forged"), ("traceback",)),
    **dict.fromkeys(("objects", "bombs"), ("traceback", "executed")),
    "merged": (*_RESUMED, "leftover files"),
    "limits": ("traceback", "leftover files", "no path"),
    "torchruns": ("other results", "not resumed"),
    "requests": ("traceback", "out of memory", "no server"),
    "markup": ("traceback", "executed", "refused", "missing page", "no server"),
}
"""Results that count as failures, by group."""
FAILING_RESULTS = {result for results in FAILURES.values() for result in results}


@dataclass
class Finished:
    """Result of a forked process: exit status (negative for signals) and output."""

    status: int
    text: str

    @property
    def has_traceback(self) -> bool:
        """True after an unhandled exception, a crash or a fatal signal."""
        return "Traceback (most recent call last)" in self.text or self.status < 0 or self.status == CRASHED


CRASHED = 70


def fork(work: Callable[[], int], signal_after_s: float | None = None, limit_s: float = LIMIT_S) -> Finished:
    """Run `work`, which returns the exit status, in a forked process; optionally kill it after a delay."""
    return Child(work).wait(signal_after_s, limit_s)


def command(*argv: str) -> Finished:
    """Run a command in a forked process."""
    return fork(functools.partial(main, list(argv)))


class Child:
    """A forked process with captured output."""

    def __init__(self, work: Callable[[], int]) -> None:
        self.source, target = os.pipe()
        self.started = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.source)
            os.dup2(target, 1)
            os.dup2(target, 2)
            os.close(target)
            sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            status = CRASHED
            try:
                torch.set_num_threads(1)
                status = work()
            except SystemExit as exit_:
                status = exit_.code if isinstance(exit_.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        os.close(target)

    def wait(self, signal_after_s: float | None = None, limit_s: float = LIMIT_S) -> Finished:
        """Wait for the process and collect its output."""
        chunks = []
        deadline = self.started + limit_s
        kill_at = None if signal_after_s is None else self.started + signal_after_s
        is_late = False
        while True:
            until = min(deadline, kill_at) if kill_at is not None else deadline
            if select.select([self.source], [], [], max(until - time.monotonic(), 0))[0]:
                chunk = os.read(self.source, 1 << 16)
                if not chunk:
                    break
                chunks.append(chunk)
            elif time.monotonic() >= until:
                is_late = kill_at is None or until < kill_at
                os.kill(self.pid, signal.SIGKILL)
                kill_at = None
        os.close(self.source)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        text = b"".join(chunks).decode(errors="replace")
        return Finished(status, text + ("\nTraceback (most recent call last): killed after timeout" if is_late else ""))


def call_at_file_operation(folder: Path, number: int | None, action: Callable[[], None]) -> list[int]:
    """Install an audit hook that calls `action` before file operation `number` (from 1) in a folder.

    Returns:
        A list with one entry, the running count of operations.
    """
    count = [0]
    root = str(folder)

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            counts = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            path, counts = arguments[0] if arguments else None, event in FILE_EVENTS
        if counts and isinstance(path, str | os.PathLike) and os.fspath(path).startswith(root):
            count[0] += 1
            if count[0] == number:
                action()

    sys.addaudithook(hook)
    return count


FILE_EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree", "shutil.move")


def die() -> None:
    """Kill this process, like a power failure."""
    os.kill(os.getpid(), signal.SIGKILL)


def fail_writes() -> None:
    """Make all further writes fail."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


def outcome(run: Path) -> dict[str, object]:
    """Return the results of a run without times and paths, for exact comparison."""
    metrics = json.loads((run / "metrics.json").read_text())
    allocation = run / "allocation.json"
    return {
        "adapter": {path.name: _sha256(path) for path in sorted((run / "adapter").glob("*.safetensors"))},
        "metrics": {name: metrics[name] for name in ("best_epoch", "history", "val", "test")},
        "allocation": _sha256(allocation) if allocation.is_file() else None,
        "predictions": _sha256(run / "predictions.json"),
        "report": (run / "report.html").is_file(),
    }


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass
class Harness:
    """Fault injection: folders, seed, number of trials and counts."""

    root: Path
    seed: int
    sizes: dict[str, int]
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    tiny = tuple(TINY)
    fork = staticmethod(fork)
    child = Child
    outcome = staticmethod(lambda run: outcome(run))

    def count_command(
        self, group: str, description: str, result: Finished, is_same: Callable[[], bool],
        same: str = "harmless", rejected: str = "one line",
    ) -> None:  # fmt: skip
        """Count the outcome of a command: a traceback, an error, or results, which `is_same` compares."""
        if result.has_traceback:
            self.count(group, "traceback", description, result.text)
        elif result.status:
            self.count(group, rejected, description, result.text)
        else:
            self.count(group, same if is_same() else "other results", description, result.text)

    def count(self, group: str, result: str, description: str = "", text: str = "") -> None:
        """Count the result of a trial, and record the details of failures."""
        self.counts.setdefault(group, Counter())[result] += 1
        if result in FAILING_RESULTS:
            self.failures.append(
                f"{group}: {description}: {result}\n    " + text.strip()[-1500:].replace("\n", "\n    ")
            )

    def trials(self, group: str) -> Iterator[tuple[int, random.Random, Path]]:
        """Yield the number, random generator and empty folder of each trial in a group."""
        for number in range(self.sizes[group]):
            folder = self.root / group.replace(" ", "-") / str(number)
            folder.mkdir(parents=True)
            yield number, random.Random(f"{self.seed}-{group}-{number}"), folder
            shutil.rmtree(folder)

    def prepare(self) -> None:
        """Train without faults to measure time and file operations, and create interrupted runs."""
        run = self.root / "uninterrupted" / "run"
        modules_file = self.root / "modules"

        def after() -> None:
            modules_file.write_text(json.dumps(list(sys.modules)))

        self.operations = self.count_operations(run, TINY, after)
        for name in json.loads(modules_file.read_text()):  # import lazily loaded modules once, for all processes
            if not name.startswith("triton"):  # it prints errors at exit
                with suppress(Exception):
                    importlib.import_module(name)
        gc.freeze()
        start = time.monotonic()
        command(*TINY, "--out", str(run), "--overwrite")
        self.duration_s = time.monotonic() - start
        self.finished, self.expected = run, outcome(run)
        self.unfinished = self.root / "cut" / "run"
        for number in range(self.operations // 2, self.operations):
            fork(functools.partial(train_until, self.unfinished, number, die))
            if list((self.unfinished / "checkpoints").glob("checkpoint-*")):
                break
            shutil.rmtree(self.unfinished, ignore_errors=True)
        self.unfinished_other = self.root / "other" / "run"
        fork(functools.partial(train_until, self.unfinished_other, number, die, [*TINY, "--seed", "1"]))
        if self.sizes["overwritten"]:
            complete = shutil.copytree(self.unfinished_other, self.root / "other" / "complete", symlinks=True)
            command("train", "--out", str(complete), "--resume")
            self.expected_of_other = outcome(complete)
        self.images = self.root / "images"
        self.images.mkdir()
        pixels = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), dtype=np.uint8)
        for index, image in enumerate(pixels):
            Image.fromarray(image).save(self.images / f"{index}.png")

    def count_operations(self, run: Path, argv: list[str], after: Callable[[], None] = lambda: None) -> int:
        """Train without faults and return the number of file operations; then call `after` in the process."""
        count_file = run.parent.parent / f"operations-{run.parent.name}"

        def work() -> int:
            count = call_at_file_operation(run, None, die)
            status = main([*argv, "--out", str(run)])
            count_file.write_text(str(count[0]))
            after()
            return status

        result = fork(work)
        if result.status:
            raise SystemExit(f"the uninterrupted run failed:\n{result.text}")
        return int(count_file.read_text())

    def resume(
        self, group: str, description: str, run: Path, argv: list[str] = TINY, is_same: Callable[[], bool] | None = None
    ) -> None:
        """Resume a run, or start it if it was killed before its start, and compare the results."""
        result = command("train", "--out", str(run), "--resume")
        needs_start = "which has no run" in result.text or (is_same is not None and "--overwrite" in result.text)
        if result.status == 2 and needs_start:
            result = command(*argv, "--out", str(run), "--overwrite")
        is_same = is_same or (lambda: outcome(run) == self.expected)
        self.count_command(group, description, result, is_same, "same bits", "not resumed")

    def killed(self) -> None:
        """Kill runs at random times and before random file operations."""
        for number, draw, folder in self.trials("killed"):
            run = folder / "run"
            if number % 2:
                instant = draw.uniform(0.0, 1.05 * self.duration_s)
                description = f"after {instant:.3f} s"
                fork(functools.partial(main, [*TINY, "--out", str(run)]), signal_after_s=instant)
            else:
                operation = draw.randint(1, self.operations)
                description = f"before file operation {operation}"
                fork(functools.partial(train_until, run, operation, die))
            if draw.random() < 0.3 and run.exists():
                operation = draw.randint(1, self.operations)
                description += f", resumed until before operation {operation}"
                fork(functools.partial(train_until, run, operation, die, ["train", "--resume"]))
            self.resume("killed", description, run)

    def count_full_disk(self, group: str, description: str, result: Finished) -> bool:
        """Count the outcome of a run on a full disk; return False after a traceback."""
        if result.has_traceback:
            self.count(group, "traceback", description, result.text)
        else:
            self.count(group, "one line" if result.status else "no effect")
        return not result.has_traceback

    def disk_full(self) -> None:
        """Fail all writes after a random one, or limit the file size."""
        for number, draw, folder in self.trials("disk full"):
            run = folder / "run"
            if number % 2:
                limit = int(2 ** draw.uniform(0, 19))
                description = f"file size limit of {limit} bytes"
                result = fork(functools.partial(call_limited, [*TINY, "--out", str(run)], limit))
            else:
                operation = draw.randint(1, self.operations)
                description = f"full after file operation {operation}"
                result = fork(functools.partial(train_until, run, operation, fail_writes))
            if self.count_full_disk("disk full", description, result):
                self.resume("disk full", description, run)

    def small_disk(self) -> None:
        """Train on a small file system, if mounting is allowed."""
        self.train_mounted("small disk", lambda draw: f"size={draw.randint(16, 1200) * 1024}", "size=64m")

    def inodes(self) -> None:
        """Train on a file system with few inodes, if mounting is allowed."""
        limits = f"size={2**26},nr_inodes="
        self.train_mounted("inodes", lambda draw: f"{limits}{draw.randint(3, 22)}", "nr_inodes=100000")

    def train_mounted(self, group: str, limits: Callable[[random.Random], str], free: str) -> None:
        """Train on file systems with the mount options `limits`, then resume with the options `free`."""
        for _, draw, folder in self.trials(group):
            options = limits(draw)
            with mounted(folder, options) as is_mounted:
                if not is_mounted:
                    self.count(group, "mount failed")
                    return
                result = command(*TINY, "--out", str(folder / "run"))
                if self.count_full_disk(group, options, result):
                    subprocess.run(["mount", "-o", f"remount,{free}", str(folder)], check=True)
                    self.resume(group, options, folder / "run")

    def overwritten(self) -> None:
        """Kill a run that overwrites an unfinished run with different settings."""
        for _, draw, folder in self.trials("overwritten"):
            run = shutil.copytree(self.unfinished_other, folder / "run", symlinks=True)
            operation = draw.randint(1, 30)
            description = f"before file operation {operation}"
            fork(functools.partial(train_until, run, operation, die, [*TINY, "--overwrite"]))
            result = command("train", "--out", str(run), "--resume")
            if result.has_traceback:
                self.count("overwritten", "traceback", description, result.text)
            elif result.status and "--overwrite" in result.text:
                command(*TINY, "--out", str(run), "--overwrite")
                same = outcome(run) == self.expected
                self.count("overwritten", "needs overwrite" if same else "other results", description, result.text)
            elif result.status:
                self.count("overwritten", "not resumed", description, result.text)
            else:
                results = outcome(run)
                known = {"old run resumed": self.expected_of_other, "new run started": self.expected}
                kind = next((name for name, expected in known.items() if results == expected), "other results")
                self.count("overwritten", kind, description, result.text)

    def folds(self) -> None:
        """Kill and resume a cross-validation."""
        argv = [arg for arg in TINY if arg != "--test-size"]
        del argv[argv.index("--val-size") + 2]  # value of --test-size; the folds are the test splits
        argv += ["--folds", "2"]
        self._killed_variant("folds", argv, lambda run: (run / "folds.json").read_bytes())

    def features(self) -> None:
        """Kill and resume a linear probe on cached features."""
        argv = [arg for arg in TINY if arg != "--r"]
        del argv[argv.index("--img-size") + 2]
        argv += ["--method", "linear", "--augment", "none"]
        self._killed_variant("features", argv, outcome)

    def _killed_variant(self, group: str, argv: list[str], read_results: Callable[[Path], object]) -> None:
        """Kill a training run before random file operations, resume it and compare the results."""
        if not self.sizes[group]:
            return
        uninterrupted = self.root / group / "uninterrupted"
        uninterrupted.parent.mkdir(parents=True)
        operations = self.count_operations(uninterrupted, argv)
        expected = read_results(uninterrupted)
        for _, draw, folder in self.trials(group):
            run, operation = folder / "run", draw.randint(1, operations)
            fork(functools.partial(train_until, run, operation, die, argv))
            description = f"before file operation {operation}"
            self.resume(group, description, run, argv, lambda run=run: read_results(run) == expected)

    def merged(self) -> None:
        """Kill merge and export: files with final names must be complete, and a second call must succeed."""
        commands = {
            "m.safetensors": ["merge", str(self.finished)],
            "m": ["merge", str(self.finished)],
            "s.safetensors": ["export", str(self.finished), "--format", "sparse"],
        }
        for number, draw, folder in self.trials("merged"):
            name = list(commands)[number % len(commands)]
            target = folder / name
            argv = [*commands[name], "--out", str(target), "--overwrite"]
            operation = draw.randint(1, 8)
            fork(functools.partial(call_until, folder, operation, die, argv))
            remaining = contents_of(target)
            result = command(*argv)
            description = f"{argv[0]} to {name}, killed before file operation {operation}"
            if result.has_traceback or result.status:
                self.count("merged", "traceback" if result.has_traceback else "not resumed", description, result.text)
            elif remaining and remaining != contents_of(target) and (target.is_file() or "config.json" in remaining):
                self.count("merged", "other results", description, str(sorted(remaining)))
            elif any(path.name.endswith(".tmp") for path in folder.iterdir()):
                self.count("merged", "leftover files", description, str(list(folder.iterdir())))
            else:
                self.count("merged", "complete after retry")

    def limits(self) -> None:
        """Limit the file size: commands must print a one-line error with a file name and leave no empty folder."""
        run, images = str(self.finished), str(self.images)
        commands = {
            "m.safetensors": ["merge", run],
            "m": ["merge", run],
            "s.safetensors": ["export", run, "--format", "sparse"],
            "maps": ["explain", run, images],
            "plots": ["plot", "allocation", run],
            "p.csv": ["predict", run, images],
            "e.json": ["evaluate", run],
        }
        for number, draw, folder in self.trials("limits"):
            name = list(commands)[number % len(commands)]
            argv = [*commands[name], "--out", str(folder / "new" / name)]
            limit = draw.choice([0, 10, 200])
            result = fork(functools.partial(call_limited, argv, limit))
            description = f"{' '.join(argv)} with a file size limit of {limit} bytes"
            empty = [path for path in folder.rglob("*") if path.is_dir() and not any(path.iterdir())]
            if result.has_traceback:
                self.count("limits", "traceback", description, result.text)
            elif result.status == 0:
                self.count("limits", "no effect")
            elif str(folder) not in result.text.strip().splitlines()[-1] or empty:
                self.count("limits", "leftover files" if empty else "no path", description, f"{empty} {result.text}")
            else:
                self.count("limits", "one line with path")

    def torchruns(self) -> None:
        """Start two torchrun commands, with two processes each, in one folder."""
        if not self.sizes["torchruns"]:
            return
        uninterrupted = self.root / "torchruns-uninterrupted"
        if torchrun(uninterrupted).wait(LIMIT_S * 3):
            raise SystemExit("the uninterrupted torchrun failed")
        expected = outcome(uninterrupted)
        for _, draw, folder in self.trials("torchruns"):
            first = torchrun(folder / "run")
            time.sleep(draw.uniform(0.0, 3.0))
            processes = (first, torchrun(folder / "run"))
            outputs = [process.communicate(timeout=LIMIT_S * 3)[0] for process in processes]
            statuses = [process.returncode for process in processes]
            if 0 not in statuses:
                self.count("torchruns", "not resumed", "two torchruns", "".join(outputs))
            elif outcome(folder / "run") != expected:
                self.count("torchruns", "other results", "two torchruns", "".join(outputs))
            else:
                self.count("torchruns", "one succeeded" if any(statuses) else "sequential")

    def damaged_run(self) -> None:
        """Damage a finished run, then run every command on it."""
        expected = {}
        for name, result, text in self.run_commands(self.finished):
            if result.status:
                raise SystemExit(f"an undamaged run was rejected by {name}: {text}")
            expected[name] = text
        for _, draw, folder in self.trials("finished"):
            run = shutil.copytree(self.finished, folder / "run", symlinks=True)
            damaged = damage(draw, run, [path for path in files_of(run) if "checkpoints" not in path.parts])
            for name, result, text in self.run_commands(run):
                if name == "inspect" and "The adapter is missing" in text:
                    self.count("finished", "noticed")
                    continue
                is_same = functools.partial(operator.eq, text, expected[name])
                self.count_command("finished", f"{damaged}: {name}", result, is_same, rejected="noticed")

    def run_commands(self, run: Path) -> Iterator[tuple[str, Finished, str]]:
        """Run all commands on a run; yield name, result, and the results or a digest, after an error the output."""
        folder = run.parent
        commands = {
            "predict": ["predict", str(run), str(self.images), "--out", str(folder / "p.csv"), "--overwrite"],
            "evaluate": ["evaluate", str(run), "--out", str(folder / "e.json")],
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

    def damaged_checkpoint(self) -> None:
        """Damage an interrupted run, then resume it."""
        for _, draw, folder in self.trials("checkpoint"):
            run = shutil.copytree(self.unfinished, folder / "run", symlinks=True)
            description = damage(draw, run, files_of(run))
            result = command("train", "--out", str(run), "--resume")
            self.count_command(
                "checkpoint", description, result, lambda run=run: outcome(run) == self.expected, rejected="noticed"
            )

    def fuzzed(self) -> None:
        """Run random command lines and configuration files."""
        for _, draw, folder in self.trials("fuzzed"):
            argv = fuzzed_command(draw, folder, self.finished, self.images)
            result = fork(functools.partial(run_fuzzed, argv, folder), limit_s=60)
            if result.has_traceback:
                self.count("fuzzed", "traceback", " ".join(map(repr, argv)), result.text)
            else:
                self.count("fuzzed", "accepted" if result.status in (0, REACHED) else "one line")

    def together(self) -> None:
        """Start a second process in the folder of an active run."""
        for number, draw, folder in self.trials("together"):
            run = folder / "run"
            first = Child(functools.partial(main, [*TINY, "--out", str(run)]))
            option = ("--resume", "--overwrite", "")[number % 3]
            argv = ["train", "--out", str(run), "--resume"] if option == "--resume" else [*TINY, "--out", str(run)]
            argv += ["--overwrite"] if option == "--overwrite" else []
            instant = draw.uniform(0.0, self.duration_s)
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
                self.count("together", "traceback", description, second.text + result.text)
            elif outcome(run) != self.expected:
                self.count("together", "other results", description, second.text + result.text)
            elif f"process {first.pid}" in second.text or f"process {os.getpid()}" in second.text:
                self.count("together", "rejected with process id")
            else:
                self.count("together", "sequential")


def torchrun(run: Path) -> "subprocess.Popen[str]":
    """Start a training run with two processes."""
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    tiny = [arg for arg in TINY if arg != "--r"]  # torchrun would parse it as an option
    tiny[tiny.index("--img-size") + 2] = "--method=snella-2"  # replaces the rank
    argv += ["-m", "snella_app.cli.main", *tiny, "--out", str(run)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def contents_of(path: Path) -> dict[str, str]:
    """Return the digests of a file, or of the files in a folder; empty if missing."""
    if path.is_file():
        return {path.name: _sha256(path)}
    return {file.name: _sha256(file) for file in files_of(path) if not file.name.startswith(".")}


def call_until(folder: Path, operation: int, action: Callable[[], None], argv: list[str]) -> int:
    """Run a command and call `action` before a file operation."""
    call_at_file_operation(folder, operation, action)
    return main(argv)


def call_limited(argv: list[str], limit: int) -> int:
    """Run a command with a file size limit in bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    return main(argv)


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


def train_until(run: Path, operation: int, action: Callable[[], None], argv: list[str] = TINY) -> int:
    """Train and call `action` before a file operation."""
    return call_until(run, operation, action, [*argv, "--out", str(run)])


def files_of(folder: Path) -> list[Path]:
    """Return all files in a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


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


ODD_VALUES = [
    "", " ", "0", "-1", "1", "2", "3.5", "1e400", "-0.0", "nan", "inf", "true", "null", "~", "[]", "{}", "[1, 2]",
    "{a: 1}", "{a: {b: c}}", "a" * 300, "\udce9", "\x1b[31m", "\n", "[/b]", "[bold]", "../x", "digits", "test_vit",
    "snella-2", "lora-0", "lora--3", "snella-99999999999", "folder:", "folder:nowhere", "masks:", "'", '"', "%s", "{",
    "]", "&x *x", "!!python/name:os.system", "999999999999999999999", "0x10", "1_0", "on", "é", "漢字", "--", "-",
    "a,b", "=", "*", "?", "(", "(a+)+$", "cpu", "cuda", "fp32",
]  # fmt: skip
CONFIGS = [
    "", "a", "[", "{}", "[]", "null", "- a\n- b", "data: digits\ndata: elpv", "data: [1]", "epochs: {a: 1}",
    "epochs: .nan",
    "method_options: 3", "method_options: {r: {}}", "method_options: {target_modules: '(a+)+$'}", "? [a]\n: b", "1: 2",
    "null: 1", "&a [*a]", "a: &a {b: *a}", "!!python/object/apply:os.system ['true']", "\x00", "\ufeffdata: digits",
    "data: digits\n\tepochs: 1", "[" * 3000, "{a: " * 2000, "- " * 3000, "data: 'x", "config: other.yaml", "lr: 1e-3",
    "lr: '1e-3'", "epochs: 1_0", "out: [a, b]", "resume: maybe", "seed: -1", "method_options: {kernel: nope}",
    "method_options: {1: 2}", "method_options: {r: .inf}", "method_options: {r: null, lora_alpha: []}",
    "backbone: {a: b}", "2001-01-01: 1", "seed: 2001-01-01", "data: !!binary aGVsbG8=", "epochs: !!set {a}",
]  # fmt: skip
REACHED = 71
"""Exit status of a fuzzed command that reached the training loop."""
MEMORY_BYTES = 8 * 2**30
EXPENSIVE = (
    *("compare", "demo", "bench", "dreambooth", "language"),
    *("generate", "evaluate-generation", "evaluate-language"),
)


def fuzzed_command(draw: random.Random, folder: Path, run: Path, images: Path) -> list[str]:
    """Mutate a valid command line."""
    name = draw.choice(list(COMMANDS)) if draw.random() < 0.6 else "train"
    argv = {
        "train": [*TINY, "--out", "run"],
        "evaluate": ["evaluate", str(run)],
        "predict": ["predict", str(run), str(images)],
        "merge": ["merge", str(run), "--out", "m.safetensors"],
        "inspect": ["inspect", str(run)],
        "data": ["data", "check", str(images)],
        "compare": [
            "compare",
            "--methods",
            "linear,lora-2",
            "--data",
            "digits",
            "--backbone",
            "test_vit",
            "--out",
            "c",
        ],
    }.get(name, [name])
    options = [option.typed.removeprefix("--") for option in _parser.options_of(COMMANDS[name].function)]
    options += ["config", "help", "version", "print-config", "method-options.kernel", "method-options.r"]
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        kind = draw.randrange(6)
        at = draw.randint(1, len(argv))
        option = "--" + draw.choice(options)
        if kind == 0:
            argv[at:at] = [option, draw.choice(ODD_VALUES)]
        elif kind == 1:
            argv[at:at] = [f"{option}={draw.choice(ODD_VALUES)}"]
        elif kind == 2 and len(argv) > 2:
            del argv[min(at, len(argv) - 1)]
        elif kind == 3 and len(argv) > 1:
            argv[min(at, len(argv) - 1)] = draw.choice(ODD_VALUES)
        elif kind == 4:
            argv[at:at] = [option[: draw.randint(1, len(option))]]
        else:
            text = draw.choice(CONFIGS) if draw.random() < 0.7 else fuzzed_yaml(draw)
            (folder / "config.yaml").write_bytes(text.encode(errors="surrogateescape"))
            argv[at:at] = ["--config", "config.yaml"]
    return argv


def fuzzed_yaml(draw: random.Random) -> str:
    """Mutate values and bytes of a configuration file."""
    values: dict[str, object] = {
        "data": "digits", "backbone": "test_vit", "pretrained": False, "epochs": 1, "method": "snella-2",
        "method_options": {"kernel": "rbf"}, "lr": 0.01, "img_size": 32, "out": "run",
    }  # fmt: skip
    odd_values = [None, [], {}, "", -1, 2**70, float("nan"), float("inf"), True, "a", [[1]], {"a": {}}, {1: 2}, b"x"]
    for name in draw.sample(list(values), draw.randint(1, 3)):
        values[name] = draw.choice(odd_values)
    text = bytearray(yaml.safe_dump(values).encode())
    for _ in range(draw.choice([0, 0, 1, 3])):
        text[draw.randrange(len(text))] = draw.randrange(256)
    return text.decode("latin-1")


def run_fuzzed(argv: list[str], folder: Path) -> int:
    """Run a command line up to the training loop; only parse the settings of expensive commands."""
    call = _parser.call

    def parse_only(name: str, settings: dict[str, object]) -> Callable[[], None]:
        bound = call(name, settings)
        return (lambda: None) if name in EXPENSIVE else bound

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    _parser.call = parse_only
    sys.modules["snella_app.training.train"].__dict__["_fit"] = lambda *arguments: os._exit(REACHED)
    os.chdir(folder)
    return main(argv)


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
        for group in (
            harness.killed, harness.disk_full, harness.small_disk, harness.damaged_run, harness.damaged_checkpoint,
            harness.fuzzed, harness.together, harness.overwritten, harness.folds, harness.features, harness.merged,
            harness.limits, harness.inodes, harness.torchruns,
            *(functools.partial(group, harness) for group in (exchanged, forged, objects, bombs, requests, markup)),
        ):  # fmt: skip
            group()
            group = getattr(group, "func", group)
            print(f"{time.monotonic() - start:.0f} s: {group.__name__}", file=sys.stderr, flush=True)
    for failure in harness.failures:
        print(failure)
    print(table(harness.counts))
    commit, is_dirty = git_state()
    row = {
        **{"commit": commit or "", "dirty": bool(is_dirty), "cpu": processor_name(), "torch": torch.__version__},
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
