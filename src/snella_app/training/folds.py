"""Cross-validation: one run per fold, and a table of the results."""

import dataclasses
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from rich.console import Console

from snella_app.config.train import SESSION_FIELDS, TrainConfig
from snella_app.console import make_console, make_table, print_line
from snella_app.files import write_text
from snella_app.records.record import plain, read, read_if_present
from snella_app.records.run import FoldResults, FoldRow, Metrics, RunInfo
from snella_app.report.report import write_page
from snella_app.runs.folder import RunFolder
from snella_app.runs.images import check_splits, find_data, load_splits
from snella_app.training.distributed import require_single_process
from snella_app.training.session import TrainingInterrupted, lock_run, resume_command
from snella_app.training.train import train


def train_folds(config: TrainConfig, console: Console | None = None, **options: Any) -> FoldResults:
    """Train one run per fold in `OUT/fold-1`, `OUT/fold-2`, …, and write a table of the results.

    Each of K folds holds out about 1/K of the images, stratified by class. Images of a group stay together. Each fold
    is an ordinary run, e.g. for `snella evaluate OUT/fold-2`: the held-out images are its test split, and a separate
    validation split is used for epoch selection. If the data already has a test split, the held-out images are the
    validation split instead, and all models are evaluated on the test split.

    Args:
        config: Settings as for `train`, with `folds`. With `resume`, only unfinished folds are trained.
        console: Output console. Defaults to standard output.
        **options: Options of `train`.

    Returns:
        The content of `OUT/folds.json`; `folds.md` and `folds.html` present it as tables.

    Raises:
        FileExistsError: If `out` is a file, or contains a single run or other files. Also if it contains folds,
            and neither `resume` nor `overwrite` is set.
        FileNotFoundError: If `resume` is set, the folder contains no folds, and `data` or `backbone` is not set.
        ValueError: If the settings or images of resumed folds have changed.
        NotImplementedError: If the world size is larger than 1.

    Other errors as for `train`.
    """
    require_single_process("a cross-validation")
    console = console or make_console(survives_closed_output=True)
    folder = RunFolder(str(config.run.out))
    config = _prepare_config(config, folder)
    num_folds = int(config.data.folds or 0)
    has_dataset = options.get("data") is not None
    stored = read(FoldResults, folder.path)
    results = FoldResults(num_folds)
    page = folder.path / "folds.html"
    is_changed = not page.is_file()  # unchanged tables are not written again, since the disk may be read-only
    runs = [RunFolder(folder.path / f"fold-{fold}") for fold in range(1, num_folds + 1)]
    if config.run.resume and any(run.status is None for run in runs):
        _check_images(runs, config, options.get("data"))
    for fold, run in enumerate(runs, 1):
        if run.status != "finished":
            print_line(console, f"fold {fold} of {num_folds}")
            try:
                train(_fold_config(config, fold, run), console, **options)
            except TrainingInterrupted as error:
                # resume all folds, not only this one
                resume = partial(resume_command, "train", has_dataset=has_dataset)
                raise TrainingInterrupted(str(error).replace(resume(run.path), resume(folder.path))) from None
        metrics = read(Metrics, run.path)
        held_out = read(RunInfo, run.path).data.fold_part or "test"
        held_out_scores = _scalar_metrics(metrics.test if held_out == "test" else metrics.val)
        test_scores = _scalar_metrics(metrics.test) if held_out == "val" else {}
        row = FoldRow(fold, run.path.name, metrics.best_epoch, held_out_scores, test_scores)
        results = FoldResults(num_folds, held_out, [*results.rows, row])
        if results.rows != stored.rows[:fold]:
            folder.write(results)
            is_changed = True
    results = read(FoldResults, folder.path)
    columns, rows = _cells(results)
    if is_changed:
        lines = ["| " + " | ".join(cells) + " |" for cells in (columns, ["---:"] * len(columns), *rows)]
        write_text(folder.path / "folds.md", "\n".join(lines) + "\n")
        title = f"{num_folds} folds of {config.data.spec} by {config.method.name}"
        context = {"title": title, "columns": columns, "rows": rows, "folders": [row.folder for row in results.rows]}
        page = write_page(folder.path, "snella_app.report", context, page.name)
    table = make_table(columns, rows[:-1], left=0)
    table.add_section()
    table.add_row(*rows[-1])
    console.print(table)
    print_line(console, f"table {page}; snella predict {folder.path} averages all models")
    return results


def _fold_config(config: TrainConfig, fold: int, run: RunFolder) -> TrainConfig:
    """Return the settings of a fold. A fold that has started continues with its stored settings."""
    if run.status is None:  # the folder may have files of an old fold whose removal was interrupted
        return config.replace(fold=fold, out=str(run.path), resume=False, overwrite=True)
    values = config.flat()
    session = {name: values[name] for name in (*SESSION_FIELDS, "data")}
    return TrainConfig.from_flat(**{**session, "out": str(run.path), "resume": True, "overwrite": False})


def _check_images(runs: Sequence[RunFolder], config: TrainConfig, data: Any) -> None:
    """Check that the splits of the first fold that has started are unchanged, before other folds start."""
    for run in runs:
        if run.status is not None:
            info = read(RunInfo, run.path).data
            spec = find_data(run.path, str(config.data.spec), info.folder)
            splits = load_splits(dataclasses.replace(run.read_config().data, spec=spec), config.run.seed, data)
            check_splits(run.path, info, splits, ())  # without reading the images
            return


def _scalar_metrics(scores: Any) -> dict[str, float]:
    """Return the scalar metrics of a split, or an empty dictionary if it was not evaluated."""
    values = {} if scores is None else plain(scores)
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}


def _prepare_config(config: TrainConfig, folder: RunFolder) -> TrainConfig:
    """Return the stored settings of resumed folds; otherwise, prepare the folder for new folds and return `config`."""
    stored = read_if_present(FoldResults, folder.path)
    if stored is not None and config.run.resume:
        stored_config = folder.read_config()
        if config.data.spec:  # the images may have moved
            stored_config = stored_config.replace(data=config.data.spec)
        differences = config.differences(stored_config)
        if differences:
            raise ValueError(
                f"resume continues {folder.path} with its stored settings, but {'; '.join(differences)}; leave them out"
            )
        requested = config.flat()
        return stored_config.replace(**{name: requested[name] for name in SESSION_FIELDS})
    if folder.path.exists() and not folder.path.is_dir():
        raise FileExistsError(f"out must be a folder, got the file {str(folder.path)!r}; choose another name")
    if folder.status is not None:
        raise FileExistsError(f"out={folder.path} contains a single run; choose another folder for folds")
    if stored is not None and not config.run.overwrite:
        raise FileExistsError(
            f"out={folder.path} contains a cross-validation with {stored.folds} folds; continue it with --resume, "
            "choose another folder, or start over with --overwrite"
        )
    # `config.yaml` alone is accepted: a process that was killed before it wrote the results leaves this file
    names = [path.name for path in folder.path.iterdir()] if folder.path.is_dir() else []
    if stored is None and any(name != "config.yaml" and not name.startswith(".") for name in names):
        raise FileExistsError(f"out={folder.path} contains files but no cross-validation; choose a new or empty folder")
    if not config.data.spec or not config.model.backbone:
        raise FileNotFoundError(
            f"out must be the folder of a cross-validation to resume, got {folder.path}, which has none"
        )
    if stored is not None:
        runs = [RunFolder(folder.path / f"fold-{fold}") for fold in range(1, stored.folds + 1)]
        with ExitStack() as locks:
            for run in runs:  # all locks come first, so that nothing is removed while a fold is being trained
                locks.enter_context(lock_run(run))
            for run in runs:
                run.clear()
        for name in ("folds.md", "folds.html"):
            (folder.path / name).unlink(missing_ok=True)
    folder.path.mkdir(parents=True, exist_ok=True)
    config = config.replace(class_weights=config.optim.read_class_weights())  # all folds use the same weights
    folder.write_config(config)
    folder.write(FoldResults(int(config.data.folds or 0)))
    return config


def _cells(results: FoldResults) -> tuple[list[str], list[list[str]]]:
    """Build the columns and rows of the table. The last row contains means and sample standard deviations."""
    columns = ["fold"]
    rows = [[str(row.fold)] for row in results.rows]
    mean_row = ["mean ± standard deviation"]
    held_out_scores = [row.scores for row in results.rows]
    test_scores = [row.test for row in results.rows]
    for split, scores in ((results.held_out, held_out_scores), ("test", test_scores)):
        common_names = [name for name in scores[0] if all(name in fold_scores for fold_scores in scores)]
        for name in common_names:
            values = [fold_scores[name] for fold_scores in scores]
            columns.append(f"{split} {name.replace('_', ' ')}")
            digits, mean_digits = (0, 1) if name == "images" else (4, 4)
            for cells, value in zip(rows, values, strict=True):
                cells.append(f"{value:.{digits}f}")
            mean_row.append(f"{statistics.fmean(values):.{mean_digits}f} ± {statistics.stdev(values):.{mean_digits}f}")
    for cells, row in zip(rows, results.rows, strict=True):
        cells.append("–" if row.best_epoch is None else str(row.best_epoch))
    return [*columns, "best epoch"], [*rows, [*mean_row, ""]]
