"""From what was asked for on the command line to an experiment."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from snella.comparison.experiment import FILE, Experiment, listed
from snella.comparison.experiment_files import merged, read_experiment

_NONE = "none"
_TRAIN = (
    *("epochs", "batch_size", "img_size", "train_size", "val_size", "test_size", "augment", "weights", "pretrained"),
    *("head_start", "ema", "device", "precision"),
)
"""Settings that all runs share; `workers` is not that of their loaders."""


def experiment_of(asked: Mapping[str, Any]) -> Experiment | None:
    """The experiment that is meant: the file's, or the folder's, or a new one, changed as asked.

    Args:
        asked: Settings of `snella compare` by name; what is None was not asked for.

    Returns:
        None where nothing but the folder was named.

    Raises:
        FileNotFoundError: No such experiment.
        ValueError: Settings that are missing, unknown or out of range; a number that is none.
    """
    changes = _changes(asked)
    if asked["experiment"] is not None:
        return read_experiment(asked["experiment"], changes)
    if not changes:
        return None
    stored = Path(asked["out"]) / FILE
    base = read_experiment(str(stored)).as_dict() if stored.is_file() else {}
    return Experiment.from_dict(merged(base, changes))


def _changes(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for, as an experiment file would say it."""
    given = {name: value for name, value in asked.items() if value is not None}
    changes: dict[str, Any] = {key: given[key] for key in ("backbone", "seeds", "reference") if key in given}
    changes.update({key: listed(given[key]) for key in ("methods", "data") if key in given})
    if "forgetting" in given:
        changes["forgetting"] = [] if given["forgetting"] == _NONE else listed(given["forgetting"])
    grid = {
        name: given[key] for key, name in (("tune_seeds", "seeds"), ("extensions", "max_extensions")) if key in given
    }
    grid.update({key: _numbers(key, given[key]) for key in ("lr_factors", "weight_decays") if key in given})
    train = {key: given[key] for key in _TRAIN if key in given}
    return changes | ({"grid": grid} if grid else {}) | ({"train": train} if train else {})


def _numbers(name: str, text: str) -> list[float]:
    """Numbers between commas."""
    words = [] if text == _NONE else listed(text)
    try:
        return [float(word) for word in words]
    except ValueError:
        raise ValueError(f"{name} must be numbers with commas between, e.g. 0.3,1,3, got {text!r}") from None
