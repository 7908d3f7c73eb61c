"""Comparison driver.

`compare` trains the missing runs of an experiment, then writes the tables and the HTML report. `choose_method` uses a
small comparison to select the method of a run. A cell is one run of a comparison, and its row contains its results.
"""

import math
import os
import shlex
import shutil
import signal
import statistics
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from snella_app.backbones.create import build_sized, create_backbone
from snella_app.config.sections import AUTO_METHOD
from snella_app.config.train import TrainConfig
from snella_app.console import counted, make_console, print_line
from snella_app.data.load import is_imbalanced
from snella_app.data.protocol import PROTOCOLS
from snella_app.device import choose_device
from snella_app.files import write_text
from snella_app.methods.defaults import CHOICE_METHODS
from snella_app.records.record import read_if_present
from snella_app.records.run import RunInfo
from snella_app.runs import RunFolder
from snella_app.runs.images import (
    SPLITS,
    changed_sizes_text,
    changed_splits,
    load_splits,
    sizes_text,
    splits_digest,
)
from snella_app.tasks import create_task
from snella_app.training.distributed import require_single_process
from snella_app.training.session import TrainingInterrupted, lock_run
from snella_lab.comparison.cells import Cell, Plan, units
from snella_lab.comparison.executors import Executor, InProcesses, InThisProcess, OnRay, import_ray
from snella_lab.comparison.experiment import (
    FILE,
    LINEAR_PROBE,
    SHARED_SETTINGS,
    DataEntry,
    Experiment,
    Grid,
    MethodEntry,
)
from snella_lab.comparison.experiment_files import read_experiment
from snella_lab.comparison.options import ExecutionConfig
from snella_lab.comparison.progress import ComparisonProgress
from snella_lab.comparison.report import MARKDOWN_FILE, markdown_tables, print_paper, write_page
from snella_lab.comparison.rows import CellResults, CellRow
from snella_lab.comparison.run_cell import Outcome, probe_images, record_crash
from snella_lab.comparison.search import Candidate
from snella_lab.comparison.slurm import write_slurm_scripts
from snella_lab.comparison.statistics import Spread, mean_of_measured
from snella_lab.comparison.store import LOCKS, cell_lock, collect, drop_failed, is_locked, read_part, read_row
from snella_lab.comparison.summary import (
    FRACTIONS,
    Summary,
    cost_texts,
    print_summary,
    recommend,
    spread_text,
    summarize,
)


class CellsFailedError(RuntimeError):
    """Raised if runs of a comparison failed, or if another process is training a run that `choose_method` needs."""

    exit_status = 1


_POLL_S = 2.0
"""Maximum time in seconds between checks for overdue runs and for runs that other processes have finished."""


def compare(
    experiment: Experiment | None,
    out: str | Path,
    execution: ExecutionConfig | None = None,
    console: Console | None = None,
) -> Path:
    """Train every unfinished run of an experiment and compare the methods.

    Several processes can share one folder. Each run is trained only once.

    Args:
        experiment: The experiment. None resumes the one stored in `out`.
        out: Output folder, which is created if missing.
        execution: Which runs to train, and how. By default, one worker process trains them. Process memory is measured
            only in worker processes.
        console: Output console, by default stdout.

    Returns:
        Path of the report. With `part`, the path of the folder; with `emit`, the path of the submission script.

    Raises:
        FileExistsError: If `out` contains files but no comparison, or `emit_to` contains files that have the
            scripts' names but were not written for `out`.
        FileNotFoundError: If `experiment` is None and `out` contains no comparison.
        ImportError: If `ray` is set and Ray is not installed.
        ConnectionError: If `ray` is set and the cluster at `RAY_ADDRESS` is unreachable.
        NotImplementedError: If `torchrun` or `accelerate` started several processes.
        TimeoutError: If `retry_failed` is set and another process is writing the results file.
        ValueError: If the data, the device, or the backbone is invalid, settings conflict with each other, with the
            stored experiment, or with the Ray cluster, or the data differs from that of the finished runs.
        CellsFailedError: If a final run failed, or a tuning run failed for a reason other than a diverged loss. The
            error is raised after the report is written, and never with `draw_only`, `part`, or `emit`.
        TrainingInterrupted: On Ctrl-C or SIGTERM; finished runs remain stored.
    """
    require_single_process("a comparison")
    execution = execution or ExecutionConfig()
    root = Path(out)
    console = console or make_console(survives_closed_output=True)
    if execution.ray:
        import_ray()
    if execution.part is not None and (experiment is not None or execution.retry_failed):
        raise ValueError(
            f"part trains the experiment stored in out={str(out)!r} and cannot be combined with an experiment or "
            "retry_failed; start the comparison with emit, then train its parts"
        )
    requested = experiment
    experiment = _resolve_experiment(experiment, root)
    part = execution.part_and_count
    if part is not None:
        index, num_parts = part
        planned = units(experiment)[index::num_parts]
        rows = read_part(root, [(data, method) for data, method, _ in planned])
        _check_unchanged_data(root, experiment, rows.values())
        _train_all(root, Plan(experiment, rows, planned), rows.values(), execution, console)
        return root
    if not execution.draw_only:
        validate_inputs(experiment, console, checks_device=execution.emit is None)
    root.mkdir(parents=True, exist_ok=True)
    rows, notes = collect(root)
    if not execution.draw_only:
        _check_unchanged_data(root, experiment, rows.values())
    experiment = _store(root, experiment)
    if requested is not None:
        _print_additional_entries(requested, experiment, console)
    if execution.retry_failed:
        drop_failed(root)
        rows, _ = collect(root)
    names = {method.name for method in experiment.methods}
    finished = [row.cell for row in rows.values() if row.status == "success" and row.experiment_name in names]
    missing = sum(not (root / "cells" / cell).is_dir() for cell in finished)
    if 0 < missing < len(finished):  # rows may also be stored without their run folders
        verb = "is" if missing == 1 else "are"
        notes.append(f"{counted(missing, 'run folder')} {verb} missing; the results are still used")
    for note in notes:
        print_line(console, f"note: {note}")
    if execution.emit is not None:
        script = write_slurm_scripts(root, experiment, execution)
        left = Plan(experiment, rows).left
        print_line(console, f"{counted(left, 'run')} to train; submit with: bash {shlex.quote(str(script))}")
        return script
    if not execution.draw_only:
        _train_all(root, Plan(experiment, rows), rows.values(), execution, console)
        rows, _ = collect(root)
    summary = summarize(experiment, list(rows.values()))
    page = _write_reports(root, summary, console)
    failed = [row for row in summary.failed if not row.is_diverged_trial]
    if failed and not execution.draw_only:
        example = min(failed, key=lambda row: (row.purpose != "final", row.cell))
        raise CellsFailedError(
            f"{counted(len(failed), 'run')} failed, e.g. {example.cell}: {example.error}; "
            f"{page} lists all errors; fix the cause and add --retry-failed to train the failed runs again, or remove "
            f"the method or the data from {root / FILE}"
        )
    return page


def _write_reports(root: Path, summary: Summary, console: Console) -> Path:
    """Write the HTML report and the Markdown tables, print the results, and return the path of the report."""
    page = write_page(root, summary)
    write_text(root / MARKDOWN_FILE, markdown_tables(summary))
    print_summary(console, summary)
    print_paper(console, summary)
    warning = PROTOCOLS[summary.experiment.settings.get("protocol", "standard")].warning
    if warning:
        print_line(console, f"official protocol: {warning}")
    print_line(console, f"rows: {root / 'results.jsonl'}, report: {page}")
    return page


def validate_inputs(experiment: Experiment, console: Console, checks_device: bool = True) -> None:
    """Validate the data, the device, and the backbone before training, and print a description of each data entry.

    Pass `checks_device=False` if only the machines of a cluster have the device.

    Raises:
        ValueError: If the data, the device, or the backbone is missing, invalid, or not supported. The message lists
            all errors.
    """
    errors = []
    for data in experiment.data:
        try:
            _check_data(experiment, data, console)
        except (OSError, ValueError, ImportError) as error:
            is_named = data.name == data.data and data.data in str(error)
            errors.append(str(error) if is_named else f"{data.name}: {error}")
    probes = [experiment.probe_data(data) for data in experiment.data]
    for probe in dict.fromkeys(probes):  # each once, in a fixed order
        if probe is None:
            continue
        try:
            probe_images(str(probe), experiment.forgetting_images)
        except (OSError, ValueError, ImportError) as error:
            errors.append(str(error) if str(error).startswith("forgetting") else f"forgetting: {error}")
    config = experiment.config(LINEAR_PROBE, experiment.data[0])
    model = config.model
    options: dict[str, Any] = {"weights": model.weights, "pretrained": model.pretrained, "img_size": model.img_size}
    build = partial(create_backbone, experiment.backbone, num_classes=2, **options)
    try:
        if checks_device:
            choose_device(config.run.device)
        build_sized(build, experiment.backbone, model.img_size)
    except (OSError, ValueError, ImportError, NotImplementedError) as error:
        errors.append(str(error))
    if errors:
        raise ValueError("; ".join(dict.fromkeys(errors)))


def _check_data(experiment: Experiment, data: DataEntry, console: Console) -> None:
    """Validate the splits of one data entry, and print their description."""
    cell = Cell(data, LINEAR_PROBE, 0, Candidate(), is_final=True)
    config = cell.config(experiment, "-")
    splits = load_splits(config.data, config.run.seed)
    batch_size = config.optim.batch_size
    task = create_task(config.data.task, splits.classes, **config.optim.task_options())
    task.check_data(splits.train, data.data)
    needs_val = config.data.protocol == "standard"
    if splits.test is None or (splits.val is None and needs_val):
        needed = "a validation and a test split" if needs_val else "a test split"
        raise ValueError(f"data {data.data!r} must have {needed}, got {splits.description}")
    num_train = len(splits.train)
    if config.data.protocol == "final" and experiment.has_search:  # tuning runs do not train on validation images
        num_train = len(load_splits(replace(config.data, protocol="standard"), config.run.seed).train)
    if isinstance(batch_size, int) and num_train < batch_size:
        raise ValueError(f"batch_size must be at most {num_train}, the number of training images, got {batch_size}")
    print_line(console, f"data: {splits.description}")
    for note in splits.notes:
        print_line(console, f"note: {note}")
    if experiment.metric == "accuracy" and is_imbalanced(splits.train.labels):
        print_line(
            console,
            "note: classes are imbalanced, and methods are compared by accuracy; consider --monitor balanced_accuracy",
        )


def _check_unchanged_data(root: Path, experiment: Experiment, rows: Iterable[CellRow]) -> None:
    """Check that the images and labels of each data entry are those of its finished runs.

    Only one run of each data entry is checked: a final run whose folder exists, if there is one.

    Raises:
        ValueError: If images or labels differ.
    """
    finished: dict[str, tuple[CellRow, CellResults]] = {}
    for row in sorted(rows, key=lambda row: (not (root / "cells" / row.cell).is_dir(), row.purpose != "final")):
        if row.results is not None and row.results.split is not None:
            finished.setdefault(row.task_name, (row, row.results))
    errors = []
    for data in experiment.data:
        if data.name not in finished:
            continue
        row, results = finished[data.name]
        cell = Cell(data, LINEAR_PROBE, row.seed, Candidate(), is_final=row.purpose == "final")
        config = cell.config(experiment, "-")
        splits = load_splits(config.data, config.run.seed)
        try:
            info = read_if_present(RunInfo, root / "cells" / row.cell)
        except ValueError:  # the row suffices if the file is damaged
            info = None
        expected = f"data {data.data!r} must be unchanged since the finished runs, e.g. {row.cell}"
        if results.split != splits_digest(splits):
            found = changed_sizes_text(results.sizes, splits)
            errors.append(f"{expected} ({sizes_text(results.sizes)}), got {found}")
        elif info is not None and (changed := changed_splits(info.data, splits, SPLITS)):
            errors.append(f"{expected}, got files with the same names but different contents ({', '.join(changed)})")
    if errors:
        raise ValueError(f"{'; '.join(errors)}; restore the data, or start a new comparison in another folder")


def _resolve_experiment(experiment: Experiment | None, root: Path) -> Experiment:
    """Return `experiment` merged with the one stored in the folder, or the only one of the two that exists.

    Raises FileNotFoundError if neither exists, and FileExistsError if the folder contains files but no comparison.
    """
    stored = read_experiment(str(root / FILE)) if (root / FILE).is_file() else None
    if stored is None:
        if experiment is None:
            raise FileNotFoundError(f"out={root} contains no comparison to resume; set methods, data and backbone")
        if root.exists() and (not root.is_dir() or any(not p.name.startswith(".") for p in root.iterdir())):
            raise FileExistsError(f"out={root} contains files but no comparison; choose an empty or new folder")
        return experiment
    return stored if experiment is None else experiment.merged_with(stored, root)


def _store(root: Path, experiment: Experiment) -> Experiment:
    """Store and return the experiment, merged with changes that other processes made in the meantime."""
    with cell_lock(root / LOCKS, FILE, timeout_s=-1):
        experiment = _resolve_experiment(experiment, root) if (root / FILE).is_file() else experiment.with_probes()
        experiment.write(root)
    return experiment


def _print_additional_entries(requested: Experiment, merged: Experiment, console: Console) -> None:
    """Print the methods, data entries, and seeds that only the stored experiment has, because they are also trained."""
    additions: list[str] = []
    for kind in ("methods", "data"):
        requested_names = [entry.name for entry in getattr(requested, kind)]
        other_names = [entry.name for entry in getattr(merged, kind) if entry.name not in requested_names]
        if other_names:
            additions.append(f"{kind} {', '.join(other_names)}")
    clauses: list[str] = []
    if additions:
        clauses.append(f"also contains {' and '.join(additions)}")
    if merged.seeds > requested.seeds:
        clauses.append(f"uses {counted(merged.seeds, 'seed')} instead of {requested.seeds}")
    if clauses:
        print_line(console, f"note: the folder's experiment {'; it '.join(clauses)}")


_CHOICE_SEEDS = 2
_CHOICE_EPOCHS = 5
_CHOICE_IMAGES = 400
CHOICE_SUFFIX = "-choice"
"""Suffix of the folder that stores a run's method selection."""
_CHOICE_COSTS = ("accelerator_memory_max", "training_mib", "train_time")


def choose_method(config: TrainConfig, console: Console | None = None) -> TrainConfig:
    """Replace the method `auto` with the winner of a small comparison on validation images.

    The comparison trains linear, bias, lora-8, and snella-matched at their default `lr` with two seeds, for at most 5
    epochs on at most 400 training images, each run in a separate process. Test images are never used. Among the
    methods within one standard error of the best, the one with the lowest memory use wins. Ties in memory (within 5%)
    go to the fastest method. The runs, including failed ones, are stored in `OUT-choice`. An interrupted selection
    resumes from them. With `resume`, a run that has already started keeps its method.

    Args:
        config: Settings of a new or resumed run whose method is `auto`.
        console: Output console, by default stdout.

    Raises:
        FileExistsError: If `out` contains a run or other files, or `OUT-choice` contains files but no selection.
        FileNotFoundError: If the data does not exist.
        ImportError: If a package for the data is not installed.
        NotImplementedError: If `torchrun` or `accelerate` started several processes.
        ValueError: If data or settings are invalid, or `OUT-choice` contains a selection with different settings.
        CellsFailedError: If every method failed, or another process is training one of the runs.
        TrainingInterrupted: On Ctrl-C or SIGTERM; finished runs remain stored.
    """
    require_single_process("choosing a method")
    console = console or make_console(survives_closed_output=True)
    run = RunFolder(str(config.run.out))
    if config.run.resume and run.path.is_dir():
        with lock_run(run):
            run.complete_replacement()
    default_method = TrainConfig.settings()["method"].default  # agrees with any stored method
    stored_method = run.resolve_settings(config.replace(method=default_method)).method.name
    if config.run.resume and stored_method != AUTO_METHOD and run.status is not None:
        return config.replace(method=stored_method)
    root = Path(f"{str(config.run.out).rstrip('/')}{CHOICE_SUFFIX}")
    experiment = _choice_experiment(config)
    validate_inputs(experiment, console)
    if config.run.overwrite and (root / FILE).is_file() and read_experiment(str(root / FILE)).name == experiment.name:
        shutil.rmtree(root)
    root.mkdir(parents=True, exist_ok=True)
    experiment = _store(root, _resolve_experiment(experiment, root))
    cells = [
        Cell(experiment.data[0], method, seed, Candidate(), is_final=False)
        for method in experiment.methods
        for seed in range(experiment.seeds)
    ]
    print_line(console, f"selecting a method: {counted(len(cells), 'short run')} in {root}")
    rows = [_trained_row(root, experiment, cell) for cell in cells]
    means: dict[str, Spread] = {}
    costs: dict[str, dict[str, float | None]] = {}
    is_fraction = f"test_{experiment.metric}" in FRACTIONS
    for method in experiment.methods:
        method_rows = [row for row in rows if row.experiment_name == method.name]
        scores: list[float] = []
        for row in method_rows:
            score = row.score("val")
            if row.status == "success" and score is not None:
                scores.append(score)
        if len(scores) < len(method_rows):
            errors = (row.error for row in method_rows if row.status != "success")
            error = next(errors, f"no validation {experiment.measures[experiment.metric]}")
            print_line(console, f"{method.name}: FAILED, {error}")
            continue
        means[method.name] = Spread(statistics.fmean(scores), statistics.stdev(scores), len(scores))
        costs[method.name] = {}
        for name in _CHOICE_COSTS:
            costs[method.name][name] = mean_of_measured(row.column(name) for row in method_rows)
        unit = "%" if is_fraction else ""
        score_text = f"{spread_text(means[method.name], is_fraction)}{unit}"
        texts = cost_texts(costs[method.name])
        print_line(
            console,
            f"{method.name}: validation {experiment.measures[experiment.metric]} {score_text}, "
            f"memory {texts['memory']}, time {texts['time']}",
        )
    if not means:
        reason = rows[0].error or "no validation score"
        raise CellsFailedError(
            f"every method failed in {root}, e.g. {rows[0].cell}: {reason}; fix the cause, then delete {root}"
        )
    chosen, text = recommend(means, costs, experiment.measures[experiment.metric], is_fraction)
    print_line(console, text)
    return config.replace(method=chosen)


def _choice_experiment(config: TrainConfig) -> Experiment:
    """Return the experiment of `choose_method`: the settings of `config`, with fewer epochs and images."""
    values = config.flat()
    fields = TrainConfig.settings()
    changed = [name for name in SHARED_SETTINGS if values[name] != fields[name].default]
    settings: dict[str, Any] = {name: values[name] for name in changed if name not in ("protocol", "workers")}
    for name in ("early_stopping", "swa", "soup", "lr", "batch_size"):
        settings.pop(name, None)  # the short runs use the defaults; `batch_size` is set below
    settings["epochs"] = min(config.optim.epochs, _CHOICE_EPOCHS)
    settings["test_seed"] = config.run.seed if config.data.test_seed is None else config.data.test_seed
    splits = load_splits(replace(config.data, protocol="standard"), config.run.seed)
    if len(splits.train) > _CHOICE_IMAGES:
        settings["train_size"] = _CHOICE_IMAGES
    if isinstance(config.optim.batch_size, int):
        settings["batch_size"] = min(config.optim.batch_size, _CHOICE_IMAGES, len(splits.train))
    data = DataEntry("data", str(config.data.spec), "data")
    methods = tuple(MethodEntry(name, name) for name in CHOICE_METHODS)
    grid = Grid(lr_factors=(1.0,), weight_decays=(), max_extensions=0, seeds=_CHOICE_SEEDS)
    return Experiment(
        methods, (data,), str(config.model.backbone), "choice", _CHOICE_SEEDS, grid, settings, forgetting=()
    )


def _trained_row(root: Path, experiment: Experiment, cell: Cell) -> CellRow:
    """Return the row of a cell. If the row is missing, train the cell in a separate process first."""
    if (row := read_row(cell.folder(root))) is not None:
        return row
    executor = _executor(root, experiment, ExecutionConfig())
    try:
        with _interrupted_by_sigterm():
            executor.start(cell)
            while not (ended := executor.wait(_POLL_S)):
                pass
    except (KeyboardInterrupt, TrainingInterrupted):
        raise TrainingInterrupted(
            f"interrupted while selecting a method in {root}; resume with the same command"
        ) from None
    finally:
        executor.close()
    outcome = ended[0]
    row = record_crash(root, experiment, cell, outcome.error) if outcome.error else outcome.row
    if row is None:
        raise CellsFailedError(f"another process is training {cell.title} in {root}; wait for it, then start again")
    return row


def _executor(root: Path, experiment: Experiment, execution: ExecutionConfig) -> Executor:
    """Return the executor that the settings select.

    The runs of a part save a checkpoint after each epoch, because a scheduler may preempt the part.
    """
    workers = execution.workers
    threads = execution.threads
    if execution.ray:
        slots = workers if workers > 1 else None  # 0 and 1 use the whole cluster
        return OnRay(root, experiment, slots, threads or 1, execution.gpus)
    if workers == 0:
        return InThisProcess(root, experiment, keep_checkpoints=execution.part is not None)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = threads or max(1, cores // workers)
    return InProcesses(root, experiment, workers, threads, keep_checkpoints=execution.part is not None)


def _train_all(root: Path, plan: Plan, rows: Iterable[CellRow], execution: ExecutionConfig, console: Console) -> None:
    """Train runs until this process and others have finished all runs of the plan."""
    executor = _executor(root, plan.experiment, execution)
    running: dict[str, Cell] = {}
    limit = _RunLimit(root, executor, execution.limit_s)
    try:
        with ComparisonProgress(console, plan, rows) as progress, _interrupted_by_sigterm():
            while True:
                claimed, recorded = _start(root, plan, running, executor, progress)
                if not running:
                    if not plan.left:
                        return
                    if recorded and not claimed:
                        continue  # the recorded rows may allow other runs to start
                    if claimed:
                        progress.waiting(claimed)
                ended = executor.wait(_POLL_S)
                overdue = limit.stop_overdue(running.values(), ended)
                for outcome in [*ended, *overdue]:
                    cell = outcome.cell
                    row = outcome.row
                    running.pop(cell.name)
                    if outcome.error:
                        is_overdue = outcome in overdue
                        row = record_crash(root, plan.experiment, cell, outcome.error, ignores_lock=is_overdue)
                    if row is None:
                        progress.removed(cell)
                    else:
                        plan.record(row)
                        progress.ended(cell, row, max(1, executor.slots), outcome.is_local)
    except (KeyboardInterrupt, TrainingInterrupted):
        command = f"snella compare --out {shlex.quote(str(root))}"
        command += "" if execution.part is None else f" --part {execution.part}"
        raise TrainingInterrupted(
            f"interrupted after {counted(plan.done, 'finished run')}; resume with: {command}"
        ) from None
    finally:
        executor.close()


class _RunLimit:
    """Time limit of each run. The clock starts when a worker locks the cell, so waiting for a worker does not count."""

    def __init__(self, root: Path, executor: Executor, limit_s: float) -> None:
        self._root = root
        self._executor = executor
        self._limit_s = limit_s
        self._started: dict[str, float] = {}

    def stop_overdue(self, running: Iterable[Cell], ended: Iterable[Outcome]) -> list[Outcome]:
        """Stop running cells that exceed the limit, and return their outcomes with an error."""
        if math.isinf(self._limit_s):
            return []
        overdue = []
        now = time.monotonic()
        ended_names = {outcome.cell.name for outcome in ended}
        for name in ended_names:
            self._started.pop(name, None)  # a retry gets the full time
        for cell in running:
            if cell.name in ended_names:
                continue
            if cell.name not in self._started and is_locked(self._root / LOCKS, cell.name):
                self._started[cell.name] = now
            if now - self._started.get(cell.name, now) > self._limit_s:
                self._executor.stop(cell)
                del self._started[cell.name]
                error = f"no result within {self._limit_s / 60:g} minutes (run_limit); the run was stopped"
                overdue.append(Outcome(cell, error=error))
        return overdue


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Treat SIGTERM, which schedulers send before ending a job, like Ctrl-C.

    Has no effect outside the main thread, because Python can set signal handlers only there.
    """
    is_main = threading.current_thread() is threading.main_thread()
    previous = signal.getsignal(signal.SIGTERM)
    can_restore = is_main and previous is not None  # None: C code set the handler
    if can_restore:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        if can_restore:
            signal.signal(signal.SIGTERM, previous)


def _start(
    root: Path, plan: Plan, running: dict[str, Cell], executor: Executor, progress: ComparisonProgress
) -> tuple[int, int]:
    """Start runs in free slots, and record blocked runs and runs that other processes have finished.

    Returns:
        Number of runs claimed by other processes, and number of recorded runs.
    """
    claimed = recorded = 0
    slots = executor.slots
    for cell in plan.ready():
        if len(running) >= slots:
            break
        if cell.name in running:
            continue
        row = stored = read_row(cell.folder(root))
        if stored is None and cell.blocked_by is not None:
            row = record_crash(root, plan.experiment, cell, cell.blocked_by)
        if row is not None:
            plan.record(row)
            progress.ended(cell, row, slots, is_local=stored is None)
            recorded += 1
        elif is_locked(root / LOCKS, cell.name):
            claimed += 1
        else:
            running[cell.name] = cell
            progress.started(cell)
            executor.start(cell)
    return claimed, recorded
