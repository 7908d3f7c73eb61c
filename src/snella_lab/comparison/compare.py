"""Comparison driver: train the missing runs of an experiment, then write the table and the HTML report."""

import os
import shutil
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from snella_app.backbones import create_backbone
from snella_app.config import AUTO_METHOD, TrainConfig
from snella_app.console import counted, make_console, print_line
from snella_app.data.load import is_unbalanced
from snella_app.data.protocol import get_protocol
from snella_app.device import choose_device
from snella_app.methods.defaults import CHOICE_METHODS
from snella_app.records import CellRow
from snella_app.runs import RunFolder
from snella_app.runs.images import load_splits
from snella_app.tasks import create_task
from snella_app.text import seconds_text
from snella_app.training.distributed import refuse_several_processes
from snella_app.training.session import NonFiniteLossError, TrainingInterrupted
from snella_lab.comparison import CellsFailedError
from snella_lab.comparison.cells import BlockedRun, Cell, Plan
from snella_lab.comparison.executors import Executor, InProcesses, InThisProcess, OnRay, import_ray
from snella_lab.comparison.experiment import (
    FILE,
    PROBE,
    SHARED_SETTINGS,
    DataEntry,
    Experiment,
    Grid,
    MethodEntry,
    make_config,
)
from snella_lab.comparison.experiment_files import read_experiment
from snella_lab.comparison.report import print_paper_comparison, print_paper_orderings, write_markdown, write_page
from snella_lab.comparison.run_cell import probe_images, record_crash
from snella_lab.comparison.search import Candidate
from snella_lab.comparison.statistics import Spread, average
from snella_lab.comparison.store import LOCKS, cell_lock, collect, drop_failed, is_locked, read_row
from snella_lab.comparison.summary import COSTS, cost_texts, print_summary, recommend, spread_text, summarize


class ComparisonProgress:
    """Progress of a comparison: one line per run and, on a terminal, a progress bar.

    Args:
        console: Output.
        plan: Finished and remaining runs.
        slots: Number of parallel runs.
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
        left, done = sum(count for _, count in self._plan.left()), self._plan.done()
        if left:
            already = f", {done:,} already done" if done else ""
            print_line(self._console, f"{counted(left, 'run')} to train{already}")
        if self._console.is_terminal:
            self._bar.start()
        self._refresh()
        return self

    def __exit__(self, *error: object) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def started(self, cell: Cell) -> None:
        """Show that a run has started."""
        self._is_waiting = False
        self._running[cell.title] = time.monotonic()
        self._refresh()

    def ended(self, cell: Cell, row: CellRow, is_own: bool = True) -> None:
        """Print the result of a run."""
        self._running.pop(cell.title, None)
        self._note(row)
        left = sum(count for _, count in self._plan.left())
        number = f"[{self._plan.done()}/{self._plan.done() + left}]"
        if row.status == "success":
            scores = {"validation": row.score("val"), "test": row.score("test")}
            result = ", ".join(f"{part} {score:.4f}" for part, score in scores.items() if score is not None)
        else:
            result = f"FAILED, {row.error}"
        remaining = f"; about {seconds_text(self._remaining_s())} left" if left else ""
        others = "" if is_own else " by another process"
        origin = ", reused from the selected tuning run" if row.results and row.results.trained_as else ""
        text = f"{number} {cell.title}: {result} ({seconds_text(row.total_time)}{others}{origin}){remaining}"
        print_line(self._console, text)
        self._refresh()

    def claimed_elsewhere(self, cell: Cell) -> None:
        """Remove a run that another process has claimed."""
        self._running.pop(cell.title, None)
        self._refresh()

    def waiting(self, count: int) -> None:
        """Print that all remaining runs are claimed by other processes."""
        if not self._is_waiting:
            print_line(self._console, f"waiting for {count} run{'s' if count != 1 else ''} in other processes")
        self._is_waiting = True

    def _note(self, row: CellRow) -> None:
        """Record the time of a run."""
        if row.status == "success":
            self._durations.setdefault((row.task_name, row.experiment_name), []).append(row.total_time)

    def _remaining_s(self) -> float:
        """Estimate the remaining time from the mean duration of the same pair, else of the same task, else overall."""
        overall = [s for durations in self._durations.values() for s in durations] or [0.0]
        total = 0.0
        for cell, count in self._plan.left():
            same_pair = self._durations.get((cell.data.name, cell.method.name))
            same_task = [s for (task, _), values in self._durations.items() if task == cell.data.name for s in values]
            total += count * statistics.fmean(same_pair or same_task or overall)
        return total / self._slots

    def _refresh(self) -> None:
        """Update the bar."""
        done = self._plan.done()
        left = sum(count for _, count in self._plan.left())
        self._bar.update(self._task, completed=done, total=done + left, description=" | ".join(self._running) or "runs")


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
    """Train every unfinished run of an experiment and compare the methods.

    Several processes can share one folder; each run is trained once.

    Args:
        experiment: The experiment; None resumes the one stored in `out`.
        out: Output folder; created if missing.
        workers: Number of worker processes; 0 trains sequentially in this process and does not measure memory.
        threads: Threads per worker; None divides the CPU cores evenly.
        ray: Run on Ray instead of local processes.
        retry_failed: Train failed runs again.
        draw_only: Only write the table and the report from existing rows.
        console: Output; stdout if None.

    Returns:
        Path of the report.

    Raises:
        FileExistsError: If `out` holds other files.
        FileNotFoundError: If `experiment` is None and `out` holds no comparison.
        ImportError: If `ray` is set and Ray is not installed.
        ValueError: If settings contradict each other, the stored experiment or the data.
        CellsFailedError: If a final run failed, or a tuning run failed for another reason than a diverged loss. Raised
            after the report is written; not with `draw_only`.
        TrainingInterrupted: On Ctrl-C; finished runs are kept.
    """
    refuse_several_processes("a comparison")
    console = console or make_console(survives_closed_output=True)
    root = Path(out)
    if workers < 0 or (threads is not None and threads < 1):
        raise ValueError(f"workers must be at least 0 and threads at least 1, got {workers} and {threads}")
    if ray:
        import_ray()
    requested, experiment = experiment, _resolve_experiment(experiment, root)
    if not draw_only:
        check_parts(experiment, console)
    root.mkdir(parents=True, exist_ok=True)
    experiment = _store(root, experiment)
    if requested is not None:
        _note_what_else_is_trained(requested, experiment, console)
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
    print_paper_comparison(console, experiment, summarize(experiment, list(rows.values())))
    print_paper_orderings(console, experiment, list(rows.values()))
    warning = get_protocol(experiment.settings.get("protocol", "standard")).warning
    if warning:
        print_line(console, f"official protocol: {warning}")
    print_line(console, f"rows: {root / 'results.jsonl'}, report: {page}")
    failed = [row for row in rows.values() if row.status == "failed" and not _has_diverged(row)]
    if failed and not draw_only:
        first = min(failed, key=lambda row: (row.purpose != "final", row.cell))
        raise CellsFailedError(
            f"{len(failed)} of {counted(len(rows), 'run')} failed, e.g. {first.cell}: {first.error}; "
            f"{page} lists all errors; fix the cause and add --retry-failed to train the failed runs again"
        )
    return page


def _has_diverged(row: CellRow) -> bool:
    """Return True for a tuning run with a non-finite loss, which the search expects at high learning rates."""
    return row.purpose == "trial" and str(row.error).startswith(NonFiniteLossError.__name__)


def check_parts(experiment: Experiment, console: Console) -> None:
    """Validate all data and the backbone before training.

    Raises:
        ValueError: If data or backbone are missing or invalid; one message lists all errors.
    """
    errors = []
    for data in experiment.data:
        try:
            _check_data(experiment, data, console)
        except (OSError, ValueError, ImportError) as error:
            is_named = data.name == data.data and data.data in str(error)
            errors.append(str(error) if is_named else f"{data.name}: {error}")
    for name in {experiment.probe_data(data) for data in experiment.data} - {None}:
        try:
            probe_images(str(name), experiment.forgetting_images)
        except (OSError, ValueError, ImportError) as error:
            errors.append(f"forgetting: {error}")
    config = make_config(PROBE, experiment.data[0], experiment.settings, backbone=experiment.backbone, out="-")
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
    """Validate the splits of one task."""
    cell = Cell(data, PROBE, 0, Candidate(), True)
    config = cell.config(experiment, "-")
    splits = load_splits(config)
    create_task(config.task, splits.classes, **config.as_dict()).check_data(splits.train, data.data)
    if splits.test is None or (splits.val is None and config.protocol == "standard"):
        raise ValueError(f"data {data.data!r} must have a validation and a test part, got {splits.description}")
    if len(splits.train) < config.effective_batch_size and config.batch_size is not None:
        raise ValueError(
            f"batch_size must be at most {len(splits.train)}, the number of training images, got {config.batch_size}"
        )
    print_line(console, f"data: {splits.description}")
    for note in splits.notes:
        print_line(console, f"note: {note}")
    if experiment.metric == "accuracy" and is_unbalanced(splits.train.labels):
        print_line(
            console,
            "note: methods are compared by accuracy; add --monitor balanced_accuracy to compare by balanced accuracy",
        )


def _resolve_experiment(experiment: Experiment | None, root: Path) -> Experiment:
    """Return the experiment, merged with the one stored in the folder."""
    stored = read_experiment(str(root / FILE)) if (root / FILE).is_file() else None
    if stored is None:
        if experiment is None:
            raise FileNotFoundError(f"out={root} holds no comparison to continue; give methods, data and a backbone")
        if root.exists() and (not root.is_dir() or any(not p.name.startswith(".") for p in root.iterdir())):
            raise FileExistsError(f"out={root} holds files but no comparison; choose an empty or a new folder")
        return experiment
    return stored if experiment is None else experiment.joined_with(stored, root)


def _store(root: Path, experiment: Experiment) -> Experiment:
    """Store and return the experiment, merged with concurrent changes of other processes."""
    while True:
        with cell_lock(root / LOCKS, FILE) as is_acquired:
            if is_acquired:
                experiment = (
                    _resolve_experiment(experiment, root) if (root / FILE).is_file() else experiment.with_probes()
                )
                experiment.write(root)
                return experiment


def _note_what_else_is_trained(requested: Experiment, joined: Experiment, console: Console) -> None:
    """Print methods, tasks and seeds that only the stored experiment has; they are trained too."""
    extra = []
    for kind in ("methods", "data"):
        names = [entry.name for entry in getattr(requested, kind)]
        others = [entry.name for entry in getattr(joined, kind) if entry.name not in names]
        extra += [f"{kind} {', '.join(others)}"] if others else []
    if joined.seeds > requested.seeds:
        extra.append(f"{joined.seeds} seeds instead of {requested.seeds}")
    if extra:
        print_line(console, f"note: also training entries stored in the folder: {'; '.join(extra)}")


_CHOICE_SEEDS, _CHOICE_EPOCHS, _CHOICE_IMAGES = 2, 5, 400
CHOICE_FOLDER = "-choice"
"""Suffix of the folder that holds the method selection of a run."""


def choose_method(config: TrainConfig, console: Console | None = None) -> TrainConfig:
    """Replace method auto with the method that a small comparison on validation images recommends.

    The comparison trains linear, bias, lora-8 and snella-matched at their default learning rates with two seeds, for at
    most 5 epochs on at most 400 training images, each run in a separate process. It never uses test images. Among the
    methods within one standard error of the best, the one with the least memory wins, then the fastest. The runs are
    stored in `OUT-choice`; an interrupted selection resumes there.

    Args:
        config: Settings of a new run, with method auto.
        console: Output; stdout if None.

    Raises:
        FileExistsError: If `out` holds a run, or `OUT-choice` a selection with other settings.
        ValueError: If data or settings are invalid.
        CellsFailedError: If every method failed.
        TrainingInterrupted: On Ctrl-C; finished runs are kept.
    """
    refuse_several_processes("choosing a method")
    console = console or make_console(survives_closed_output=True)
    stored = RunFolder(str(config.out)).resolve_settings(replace(config, method=CHOICE_METHODS[0]))
    if config.resume and stored.method != AUTO_METHOD and RunFolder(str(config.out)).status is not None:
        return replace(config, method=stored.method)
    root = Path(f"{str(config.out).rstrip('/')}{CHOICE_FOLDER}")
    experiment = _choice_experiment(config)
    check_parts(experiment, console)
    if root.exists() and config.overwrite:
        shutil.rmtree(root)
    root.mkdir(parents=True, exist_ok=True)
    experiment = _store(root, _resolve_experiment(experiment, root))
    cells = [
        Cell(experiment.data[0], method, seed, Candidate(), False)
        for method in experiment.methods
        for seed in range(experiment.seeds)
    ]
    print_line(console, f"selecting a method: {counted(len(cells), 'short run')} in {root}")
    rows = [_trained_row(root, experiment, cell, console) for cell in cells]
    means, costs = {}, {}
    for method in experiment.methods:
        method_rows = [row for row in rows if row.experiment_name == method.name]
        values = [value for row in method_rows if row.status == "success" and (value := row.score("val")) is not None]
        if len(values) < len(method_rows):
            error = next(row.error for row in method_rows if row.status != "success")
            print_line(console, f"{method.name}: FAILED, {error}")
            continue
        means[method.name] = Spread(statistics.fmean(values), statistics.stdev(values), len(values))
        costs[method.name] = {column: average(method_rows, method.name, column) for column in _CHOICE_COSTS}
        texts = cost_texts({**dict.fromkeys(COSTS), **costs[method.name]})
        print_line(
            console,
            f"{method.name}: validation {experiment.measures[experiment.metric]} {spread_text(means[method.name])} %, "
            f"memory {texts['memory']}, time {texts['time']}",
        )
    if not means:
        raise CellsFailedError(f"every method failed in {root}, e.g. {rows[0].cell}: {rows[0].error}")
    chosen, text = recommend(means, costs, experiment.measures[experiment.metric])
    print_line(console, text)
    return replace(config, method=chosen)


_CHOICE_COSTS = ("accelerator_memory_max", "training_mib", "train_time")


def _choice_experiment(config: TrainConfig) -> Experiment:
    """Return the experiment of `choose_method`."""
    default = TrainConfig(data="-", backbone="-", out="-")
    shared = [name for name in SHARED_SETTINGS if getattr(config, name) != getattr(default, name)]
    settings: dict[str, Any] = {name: getattr(config, name) for name in shared if name not in ("protocol", "workers")}
    for name in ("early_stopping", "swa", "soup", "lr", "batch_size"):
        settings.pop(name, None)
    settings["epochs"] = min(config.epochs, _CHOICE_EPOCHS)
    settings["test_seed"] = config.seed if config.test_seed is None else config.test_seed
    splits = load_splits(replace(config, method=CHOICE_METHODS[0], protocol="standard"))
    if len(splits.train) > _CHOICE_IMAGES:
        settings["train_size"] = _CHOICE_IMAGES
    if isinstance(config.batch_size, int):
        settings["batch_size"] = min(config.batch_size, _CHOICE_IMAGES)
    data = DataEntry("data", str(config.data), "data")
    methods = tuple(MethodEntry(name, name) for name in CHOICE_METHODS)
    grid = Grid(lr_factors=(1.0,), weight_decays=(), max_extensions=0, seeds=_CHOICE_SEEDS)
    return Experiment(methods, (data,), str(config.backbone), "choice", _CHOICE_SEEDS, grid, settings, forgetting=())


def _trained_row(root: Path, experiment: Experiment, cell: Cell, console: Console) -> CellRow:
    """Return the row of a cell; train the cell in a separate process if it has none."""
    if (row := read_row(cell.folder(root))) is not None:
        return row
    executor = _executor(root, experiment, 1, None, False)
    try:
        executor.start(cell)
        while not (ended := executor.wait(_POLL_S)):
            pass
    except (KeyboardInterrupt, TrainingInterrupted):
        raise TrainingInterrupted(
            f"interrupted while selecting a method in {root}; resume with the same command"
        ) from None
    finally:
        executor.close()
    outcome = ended[0].outcome
    row = outcome.row if outcome else record_crash(root, experiment, cell, ended[0].error)
    if row is None:
        raise CellsFailedError(f"another process is training {cell.title} in {root}; wait for it, then start again")
    return row


def _executor(root: Path, experiment: Experiment, workers: int, threads: int | None, ray: bool) -> Executor:
    """Return the executor for these settings."""
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
    """Start runs until all are finished by this or other processes."""
    running: dict[str, Cell] = {}
    try:
        with ComparisonProgress(console, plan, executor.slots) as progress:
            while True:
                ready = plan.ready()
                if not ready and not running:
                    return
                claimed = _start(root, plan, [c for c in ready if _name(c) not in running], running, executor, progress)
                if not running and claimed == 0:
                    continue
                if not running:
                    progress.waiting(claimed)
                for ended in executor.wait(_POLL_S):
                    running.pop(ended.cell.name)
                    row = ended.outcome.row if ended.outcome else None
                    if ended.outcome is None:
                        row = record_crash(root, plan.experiment, ended.cell, ended.error)
                    if row is None:
                        progress.claimed_elsewhere(ended.cell)
                    else:
                        plan.record(row)
                        progress.ended(ended.cell, row, ended.outcome is None or ended.outcome.state == "trained")
    except (KeyboardInterrupt, TrainingInterrupted):
        raise TrainingInterrupted(
            f"interrupted after {counted(plan.done(), 'finished run')}; resume with: snella compare --out {root}"
        ) from None
    finally:
        executor.close()


def _start(
    root: Path,
    plan: Plan,
    ready: list[Cell | BlockedRun],
    running: dict[str, Cell],
    executor: Executor,
    progress: ComparisonProgress,
) -> int:
    """Start runs in free slots, record runs finished elsewhere, and return the number of runs claimed elsewhere."""
    claimed = 0
    for item in ready:
        cell = item.cell if isinstance(item, BlockedRun) else item
        row = read_row(cell.folder(root))
        if row is None and isinstance(item, BlockedRun):
            row = record_crash(root, plan.experiment, cell, item.error)
            is_own = True
        else:
            is_own = False
        if row is not None:
            plan.record(row)
            progress.ended(cell, row, is_own)
        elif is_locked(root / LOCKS, cell.name):
            claimed += 1
        elif len(running) < executor.slots:
            running[cell.name] = cell
            progress.started(cell)
            executor.start(cell)
            if executor.slots == 1:
                return claimed
    return claimed


def _name(item: Cell | BlockedRun) -> str:
    """Return the name of the cell."""
    return item.cell.name if isinstance(item, BlockedRun) else item.name
