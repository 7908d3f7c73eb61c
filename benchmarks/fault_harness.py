"""Processes, counts and interrupted runs of the fault injection in `faults.py`."""

import functools
import gc
import hashlib
import importlib
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", HF_HUB_OFFLINE="1", COLUMNS="200", NO_COLOR="1")

import numpy as np
import torch
from PIL import Image

from snella_app.cli.main import main

TINY = [
    "train", "--data", "digits", "--backbone", "test_vit", "--pretrained", "false", "--img-size", "32", "--r", "2",
    "--train-size", "40", "--val-size", "20", "--test-size", "20", "--batch-size", "20", "--epochs", "3",
    "--head-init", "random", "--monitor", "loss", "--lr", "0.02", "--device", "cpu", "--progress", "false",
]  # fmt: skip
"""Tiny run. Its last epoch is the best and the only one at the target sparsity."""

LIMIT_S = 120


def tiny_without(*options: str) -> list[str]:
    """Return the command line of a tiny run without some options and their values."""
    pairs = zip(TINY[1::2], TINY[2::2], strict=True)
    return [TINY[0], *(arg for pair in pairs if pair[0] not in options for arg in pair)]


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
        """True after an unhandled exception, a crash, a fatal signal or a timeout."""
        return "Traceback (most recent call last)" in self.text or self.status < 0 or self.status == CRASHED


CRASHED = 70


def fork(work: Callable[[], int], signal_after_s: float | None = None, limit_s: float = LIMIT_S) -> Finished:
    """Run `work`, which returns the exit status, in a forked process; kill it after `signal_after_s` or `limit_s`."""
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
    """Install an audit hook that calls `action` before file operation `number` (from 1) in a folder; None only counts.

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
    """Make all further writes to files fail."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


def outcome(run: Path) -> dict[str, object]:
    """Return the results of a run without times and paths, for exact comparison."""
    metrics = json.loads((run / "metrics.json").read_text())
    allocation = run / "allocation.json"
    return {
        "adapter": {path.name: sha256_of(path) for path in sorted((run / "adapter").glob("*.safetensors"))},
        "metrics": {name: metrics[name] for name in ("best_epoch", "history", "val", "test")},
        "allocation": sha256_of(allocation) if allocation.is_file() else None,
        "predictions": sha256_of(run / "predictions.json"),
        "report": (run / "report.html").is_file(),
    }


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass
class Harness:
    """Fault injection: folders, seed, number of trials and counts."""

    root: Path
    seed: int
    sizes: dict[str, int]
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

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


def call_until(folder: Path, operation: int, action: Callable[[], None], argv: list[str]) -> int:
    """Run a command and call `action` before a file operation."""
    call_at_file_operation(folder, operation, action)
    return main(argv)


def call_limited(argv: list[str], limit: int) -> int:
    """Run a command with a file size limit in bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    return main(argv)


def train_until(run: Path, operation: int, action: Callable[[], None], argv: list[str] = TINY) -> int:
    """Train and call `action` before a file operation."""
    return call_until(run, operation, action, [*argv, "--out", str(run)])


def files_of(folder: Path) -> list[Path]:
    """Return all files in a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())
