"""`snella compare`: train what is missing, then draw the table and the page."""

import os
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from snella._text import seconds_text
from snella.backbones import create_backbone
from snella.comparison import CellsFailedError
from snella.comparison.cells import Cell
from snella.comparison.executors import Executor, InProcesses, InThisProcess, OnRay, import_ray
from snella.comparison.experiment import FILE, DataEntry, Experiment, MethodEntry, config_of
from snella.comparison.experiment_files import read_experiment
from snella.comparison.plan import Hopeless, Plan
from snella.comparison.report import print_published, write_markdown, write_page
from snella.comparison.run_cell import probe_images, record_death
from snella.comparison.search import Candidate
from snella.comparison.store import LOCKS, cell_lock, collect, drop_failed, is_locked, read_row
from snella.comparison.summary import print_summary, summarize
from snella.runs import TrainingInterrupted
from snella.runs.build import choose_device, load_splits
from snella.runs.console import counted, make_console, print_line
from snella.runs.protocol import protocol_of
from snella.runs.session import NonFiniteLossError
from snella.tasks import create_task


class ComparisonProgress:
    """Lines and, on a terminal, a bar.

    Args:
        console: Where to write.
        plan: What is done and what is left.
        slots: Cells at a time.
    """

    def __init__(self, console: Console, plan: Plan, slots: int) -> None:
        self._console, self._plan, self._slots = console, plan, slots
        self._durations: dict[tuple[str, str], list[float]] = {}
        self._is_waiting = False
        for row in plan.rows.values():
            self._note(row)
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=console, transient=True
        )
        self._task = self._bar.add_task("", total=1)
        self._running: dict[str, float] = {}

    def __enter__(self) -> "ComparisonProgress":
        if self._console.is_terminal:
            self._bar.start()
        self._refresh()
        return self

    def __exit__(self, *error: object) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def started(self, cell: Cell) -> None:
        """A cell has begun."""
        self._is_waiting = False
        self._running[cell.title] = time.monotonic()
        self._refresh()

    def ended(self, cell: Cell, row: dict[str, Any], is_ours: bool = True) -> None:
        """A cell is done."""
        self._running.pop(cell.title, None)
        self._note(row)
        left = sum(count for _, count in self._plan.left())
        number = f"[{self._plan.done()}/{self._plan.done() + left}]"
        if row["status"] == "success":
            scores = {"validation": row["val_accuracy"], "test": row["test_accuracy"]}
            result = ", ".join(f"{part} {score:.4f}" for part, score in scores.items() if score is not None)
        else:
            result = f"FAILED, {row['error']}"
        remaining = f"; about {seconds_text(self._remaining_s())} left" if left else ""
        others = "" if is_ours else " by another process"
        origin = ", trained as the trial that was chosen" if row.get("trained_as") else ""
        text = f"{number} {cell.title}: {result} ({seconds_text(row['total_time'])}{others}{origin}){remaining}"
        print_line(self._console, text)
        self._refresh()

    def left_to_another(self, cell: Cell) -> None:
        """Another process has a cell that was to be ours."""
        self._running.pop(cell.title, None)
        self._refresh()

    def waiting(self, count: int) -> None:
        """Other processes have all that could be done now."""
        if not self._is_waiting:
            print_line(
                self._console, f"waiting for {count} cell{'s' if count != 1 else ''} that another process trains"
            )
        self._is_waiting = True

    def _note(self, row: dict[str, Any]) -> None:
        """Remember how long a cell took."""
        if row["status"] == "success":
            self._durations.setdefault((row["task_name"], row["experiment_name"]), []).append(row["total_time"])

    def _remaining_s(self) -> float:
        """An estimate: what is left of each pair, as long as its own cells took, or its task's, or all of them."""
        every = [s for found in self._durations.values() for s in found] or [0.0]
        total = 0.0
        for cell, count in self._plan.left():
            own = self._durations.get((cell.data.name, cell.method.name))
            near = [s for (task, _), found in self._durations.items() if task == cell.data.name for s in found]
            total += count * statistics.fmean(own or near or every)
        return total / self._slots

    def _refresh(self) -> None:
        """Move the bar."""
        done = self._plan.done()
        left = sum(count for _, count in self._plan.left())
        self._bar.update(
            self._task, completed=done, total=done + left, description=" | ".join(self._running) or "cells"
        )


_POLL_S = 2.0


def compare(
    experiment: Experiment | None,
    out: str | Path,
    *,
    workers: int = 1,
    threads: int | None = None,
    ray: bool = False,
    retry_failed: bool = False,
    draw_only: bool = False,
    console: Console | None = None,
) -> Path:
    """Train every cell of an experiment that is not done yet, and compare the methods.

    Several processes may work on one folder at once; each cell is trained once.

    Args:
        experiment: What to compare; None goes on with what the folder holds.
        out: Folder of the comparison; created.
        workers: Processes, one cell each; 0 trains in this process, one cell after the other, without measuring memory.
        threads: Threads of each; this machine's processors shared out if None.
        ray: Give the cells to Ray instead.
        retry_failed: Train failed cells again.
        draw_only: Train nothing; draw the table and the page from the rows that there are.
        console: Where to write; standard output if None.

    Returns:
        The page.

    Raises:
        FileExistsError: `out` holds something else.
        FileNotFoundError: Nothing to go on with.
        ImportError: Ray is asked for and not installed.
        ValueError: Settings that contradict each other, the folder's, or the data; all that is known beforehand.
        CellsFailedError: Everything was tried and drawn, and runs failed: final ones, or tuning runs for another reason
            than a loss that diverged, which only says that the learning rate was too high. Not with `draw_only`.
        TrainingInterrupted: Ctrl-C; what is done stays done.
    """
    console = console or make_console(endures=True)
    root = Path(out)
    if workers < 0 or (threads is not None and threads < 1):
        raise ValueError(f"workers must be at least 0 and threads at least 1, got {workers} and {threads}")
    if ray:
        import_ray()
    experiment = _settle(experiment, root)
    if not draw_only:
        check_parts(experiment, console)
    root.mkdir(parents=True, exist_ok=True)
    experiment = _store(root, experiment)
    if retry_failed:
        drop_failed(root)
    rows, notes = collect(root)
    for note in notes:
        print_line(console, f"note: {note}")
    plan = Plan(experiment, rows)
    if not draw_only:
        _train_all(root, plan, _executor(root, experiment, workers, threads, ray), console)
    rows, _ = collect(root)
    page = write_page(root, experiment, list(rows.values()))
    write_markdown(root, experiment, list(rows.values()))
    print_summary(console, experiment, list(rows.values()))
    print_published(console, experiment, summarize(experiment, list(rows.values())))
    warning = protocol_of(experiment.settings.get("protocol", "standard")).warning
    if warning:
        print_line(console, f"official protocol: {warning}")
    print_line(console, f"rows {root / 'results.jsonl'}, page {page}")
    failed = [row for row in rows.values() if row["status"] == "failed" and not _has_diverged(row)]
    if failed and not draw_only:
        first = min(failed, key=lambda row: (row["purpose"] != "final", str(row["cell"])))
        raise CellsFailedError(
            f"{len(failed)} of {counted(len(rows), 'cell')} failed, e.g. {first['cell']}: {first['error']}; the others "
            f"are in {page}; once the cause is mended, --retry-failed trains the failed ones again"
        )
    return page


def _has_diverged(row: Mapping[str, Any]) -> bool:
    """Whether a row is a tuning run whose loss stopped being finite, one of the results that a search expects."""
    return row["purpose"] == "trial" and str(row["error"]).startswith(NonFiniteLossError.__name__)


def check_parts(experiment: Experiment, console: Console) -> None:
    """Look at all data and the backbone before anything is trained.

    Raises:
        ValueError: Something is missing or does not fit; all errors in one message.
    """
    errors = []
    for data in experiment.data:
        try:
            _check_data(experiment, data, console)
        except (OSError, ValueError, ImportError) as error:
            errors.append(f"{data.name}: {error}")
    for name in {experiment.probe_data(data) for data in experiment.data} - {None}:
        try:
            probe_images(str(name), experiment.forgetting_images)
        except (OSError, ValueError, ImportError) as error:
            errors.append(f"forgetting: {error}")
    config = config_of(
        MethodEntry("linear", "linear"), experiment.data[0], experiment.settings, backbone=experiment.backbone, out="-"
    )
    try:
        choose_device(config.device)
        create_backbone(
            experiment.backbone,
            num_classes=2,
            weights=config.weights,
            pretrained=config.pretrained,
            img_size=config.img_size,
        )
    except (OSError, ValueError, ImportError) as error:
        errors.append(str(error))
    if errors:
        raise ValueError("; ".join(dict.fromkeys(errors)))


def _check_data(experiment: Experiment, data: DataEntry, console: Console) -> None:
    """Load the splits of one task, as its cells will."""
    cell = Cell(data, MethodEntry("linear", "linear"), 0, Candidate(), True)
    config = cell.config(experiment, "-")
    splits = load_splits(config)
    create_task(config.task, splits.classes, **config.as_dict()).check_data(splits.train, data.data)
    if splits.test is None or (splits.val is None and config.protocol == "standard"):
        raise ValueError(f"data {data.data!r} must have a validation and a test part, got {splits.description}")
    if len(splits.train) < config.images_per_step and config.batch_size is not None:
        raise ValueError(f"batch_size must be at most the {len(splits.train)} training images, got {config.batch_size}")
    print_line(console, f"data {splits.description}")


def _settle(experiment: Experiment | None, root: Path) -> Experiment:
    """The experiment, joined with what the folder holds."""
    stored = read_experiment(str(root / FILE)) if (root / FILE).is_file() else None
    if stored is None:
        if experiment is None:
            raise FileNotFoundError(f"out={root} holds no comparison to go on with; give methods, data and a backbone")
        if root.exists() and (not root.is_dir() or any(not p.name.startswith(".") for p in root.iterdir())):
            raise FileExistsError(f"out={root} holds files but no comparison; choose an empty or a new folder")
        return experiment
    return stored if experiment is None else experiment.joined_with(stored, root)


def _store(root: Path, experiment: Experiment) -> Experiment:
    """Write the experiment, joined with what another command may have stored since `_settle`; the joined one."""
    while True:
        with cell_lock(root / LOCKS, FILE) as is_acquired:
            if is_acquired:
                experiment = _settle(experiment, root) if (root / FILE).is_file() else experiment.with_probes()
                experiment.write(root)
                return experiment


def _executor(root: Path, experiment: Experiment, workers: int, threads: int | None, ray: bool) -> Executor:
    """Who trains."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    each = threads or max(1, cores // max(workers, 1))
    if ray:
        config = experiment.settings.get("device", "auto")
        gpus = 1.0 / max(workers, 1) if choose_device(config).type == "cuda" else 0.0
        return OnRay(root, experiment, workers if workers > 1 else None, threads or 1, gpus)
    if workers == 0:
        return InThisProcess(root, experiment)
    return InProcesses(root, experiment, workers, each)


def _train_all(root: Path, plan: Plan, executor: Executor, console: Console) -> None:
    """Hand out cells until all are done, by us or by others."""
    running: dict[str, Cell] = {}
    try:
        with ComparisonProgress(console, plan, executor.slots) as progress:
            while True:
                ready = plan.ready()
                if not ready and not running:
                    return
                foreign = _start(root, plan, [c for c in ready if _name(c) not in running], running, executor, progress)
                if not running and foreign == 0:
                    continue
                if not running:
                    progress.waiting(foreign)
                for ended in executor.wait(_POLL_S):
                    running.pop(ended.cell.name)
                    row = ended.outcome.row if ended.outcome else None
                    if ended.outcome is None:
                        row = record_death(root, plan.experiment, ended.cell, ended.error)
                    if row is None:
                        progress.left_to_another(ended.cell)
                    else:
                        plan.record(row)
                        progress.ended(ended.cell, row, ended.outcome is None or ended.outcome.state == "trained")
    except (KeyboardInterrupt, TrainingInterrupted):
        raise TrainingInterrupted(
            f"interrupted; {counted(plan.done(), 'cell')} of the comparison are done; "
            f"continue with: snella compare --out {root}"
        ) from None
    finally:
        executor.close()


def _start(
    root: Path,
    plan: Plan,
    ready: list[Cell | Hopeless],
    running: dict[str, Cell],
    executor: Executor,
    progress: ComparisonProgress,
) -> int:
    """Start cells in free slots, and note those that others have finished; how many others are at."""
    foreign = 0
    for item in ready:
        cell = item.cell if isinstance(item, Hopeless) else item
        row: dict[str, Any] | None = read_row(cell.folder(root))
        if row is None and isinstance(item, Hopeless):
            row = record_death(root, plan.experiment, cell, item.error)
            is_ours = True
        else:
            is_ours = False
        if row is not None:
            plan.record(row)
            progress.ended(cell, row, is_ours)
        elif is_locked(root / LOCKS, cell.name):
            foreign += 1
        elif len(running) < executor.slots:
            running[cell.name] = cell
            progress.started(cell)
            executor.start(cell)
            if executor.slots == 1:
                return foreign
    return foreign


def _name(item: Cell | Hopeless) -> str:
    """Name of a cell."""
    return item.cell.name if isinstance(item, Hopeless) else item.name
