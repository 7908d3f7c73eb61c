"""A trial that is already the training of a final cell: measured on the test images instead of trained again.

The trial with the chosen rates and the final cell of the same seed have the same settings. The best trial of every
seed keeps its adapter until its final cell is done.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from snella.comparison.cells import Cell
from snella.comparison.experiment import Experiment
from snella.comparison.provenance import package_info, system_info
from snella.comparison.rows import trial_result
from snella.comparison.store import CELL_FILE, read_row
from snella.runs import RunFolder
from snella.runs.evaluate import evaluate

MEMORY = ("peak_rss_mib", "training_mib")


def finish_trial(root: Path, experiment: Experiment, cell: Cell, folder: Path) -> dict[str, Any] | None:
    """Make a final cell's run from the trial that it would repeat, and measure its test images.

    Args:
        root: Folder of the comparison.
        experiment: What the cell belongs to.
        cell: The final cell.
        folder: Where its run shall lie; must not exist.

    Returns:
        The trial's row; None where there is no such trial, where its adapter is gone, or where it was trained with
        other settings, by other versions or on another machine.
    """
    trial = replace(cell, is_final=False, search=None)
    if not cell.is_final or cell.config(experiment, "-") != trial.config(experiment, "-"):
        return None  # under the final protocol it also learns from the images that chose the rates
    run = RunFolder(trial.folder(root))
    row = read_row(run.path)
    if row is None or row["status"] != "success" or not run.adapter.is_dir():
        return None
    trained = (row["train_config"], row["package_info"], row["system_info"])
    if trained != (trial.config(experiment, trial.name).stored(), package_info(), system_info()):
        return None
    shutil.copytree(run.path, folder, ignore=shutil.ignore_patterns(CELL_FILE))
    own = RunFolder(folder)
    config = replace(own.read_config(), out=str(folder))
    own.write_config(config)
    scores = evaluate(folder, split="test", batch_size=config.images_per_step, device=config.device)
    metrics = own.read_json("metrics.json")
    own.write_json("metrics.json", {**metrics, "test": {k: v for k, v in scores.items() if k in metrics["val"]}})
    return row


def drop_adapters(root: Path, experiment: Experiment, cell: Cell) -> None:
    """Remove the adapters that no final cell can want any more: all but the best trial's, none once it is done.

    Args:
        root: Folder of the comparison.
        experiment: What the cell belongs to.
        cell: The one that was just finished; its method's trials of its seed are looked at.
    """
    place = replace(cell, is_final=False).folder(root).parent
    rows = {path.parent: read_row(path.parent) for path in place.glob(f"*_seed-{cell.seed}/{CELL_FILE}")}
    ranks = {folder: trial_result(row).rank for folder, row in rows.items() if row is not None}
    is_wanted = not cell.is_final and cell.seed < experiment.seeds
    for folder, rank in ranks.items():
        if not is_wanted or rank < max(ranks.values()):
            shutil.rmtree(RunFolder(folder).adapter, ignore_errors=True)
