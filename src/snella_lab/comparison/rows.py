"""Rows of a comparison. A row contains the settings, results, and provenance of one run, which is called a cell."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from snella_app.records.record import OPTIONAL, Float, Record


@dataclass(frozen=True, kw_only=True)
class TriedCandidate:
    """Settings of a search candidate, its mean results over seeds, and the number of seeds that failed.

    `val_accuracy` is the validation score of the comparison's metric, even if that is not accuracy. The means are None
    if a seed failed.
    """

    lr_factor: float
    lr: Float
    head_lr: Float
    weight_decay: Float
    val_accuracy: float | None = None
    val_loss: float | None = None
    failed: int = 0


@dataclass(frozen=True, kw_only=True)
class SearchChoice:
    """Hyperparameter selection of a final run.

    Attributes:
        lr_factor: Best multiplier of the method's default learning rate.
        lr_on_edge: True if this multiplier is the smallest or largest of several candidates.
        weight_decay_on_edge: True if the best weight decay is the largest of several candidates.
        trials: Tried candidates. The list is empty if there was no search.
    """

    lr_factor: float | None
    lr_on_edge: bool = False
    weight_decay_on_edge: bool = False
    trials: list[TriedCandidate] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class CellResults:
    """Results of a finished comparison run. Values that were not measured are None.

    Attributes:
        trained_as: Name of the tuning run that this run reuses, if any.
        peft_config: PEFT configuration of the adapter. None for methods outside PEFT.
        adapted_weights: Number of weights in the adapted matrices, for SNELLA variants.
        kept_weights: Budget of the adapter, which is the number of adapted weights that may change.
        file_size: Size of the adapter in bytes.
        train_time: Training time in seconds.
        step_time: Median time of a training step in seconds.
        accelerator_memory_max: Peak reserved GPU memory in bytes.
        val: Validation scores by name, stored as columns such as `val_accuracy`.
        test: Test scores by name, stored in the same way. They are measured only for final runs.
        split: SHA-256 of the classes, image names, labels, sample weights, groups, and splits.
        changed_weights: Number of changed backbone values, for final runs of methods that can be merged.
        peak_rss_mib: Peak memory of the process, if the run had a separate process.
        training_mib: Growth of the process memory up to the peak, which excludes libraries loaded before the run.
        forgetting: Accuracy that a linear probe loses on other data, as a fraction, for final runs.
    """

    trained_as: str | None = None
    peft_config: dict[str, Any] | None = None
    num_trainable_params: int | None = None
    adapted_weights: int | None = None
    kept_weights: int | None = None
    file_size: int | None = None
    train_time: float | None = None
    step_time: float | None = None
    accelerator_memory_max: int | None = None
    accelerator_memory_reserved_avg: int | None = None
    accelerator_memory_reserved_99th: int | None = None
    train_loss: float | None = None
    train_samples: int | None = None
    epochs: int | None = None
    best_epoch: int | None = None
    protocol: str = "standard"
    selected_on: Literal["val", "test"] | None = None
    ema: float | None = None
    val: dict[str, float | None] = field(default_factory=dict)
    test: dict[str, float | None] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    split: str | None = None
    changed_weights: int | None = None
    peak_rss_mib: float | None = None
    training_mib: float | None = None
    forgetting: float | None = None
    forgetting_data: str | None = None
    probe_accuracy_frozen: float | None = field(default=None, metadata=OPTIONAL)
    probe_accuracy_adapted: float | None = field(default=None, metadata=OPTIONAL)


_SPLITS = ("val", "test")
# the types are strings, because annotations are not evaluated in this module
NUMBERS = tuple(entry.name for entry in fields(CellResults) if entry.type in ("int | None", "float | None"))
"""Names of the numeric results that are not scores."""


@dataclass(frozen=True, kw_only=True)
class CellRow(Record):
    """One run of a comparison: `cell.json` in its folder, and a line of `results.jsonl`.

    Both files store results as top-level columns. Rows of failed runs have no results. The columns for settings,
    versions, and the machine are named as in PEFT's method comparison.

    Attributes:
        cell: Path of the run folder below `cells/`.
        metric: Score used to compare methods.
        task_name: Label of the task.
        experiment_name: Label of the method.
        tried_weight_decay: Weight decay of the candidate. None for the method's default.
        search: Hyperparameter selection of a final run.
        total_time: Time of the run in seconds, including interrupted attempts and the reused tuning run.
    """

    file: ClassVar[str] = "cell.json"
    is_sealed: ClassVar[bool] = True

    cell: str
    purpose: Literal["final", "trial"]
    metric: str = "accuracy"
    task_name: str
    group: str = ""
    experiment_name: str
    comparison: str = ""
    method: str = ""
    peft_type: str = ""
    model_id: str = ""
    seed: int
    lr_factor: float = 1.0
    tried_weight_decay: float | None = None
    lr: Float = math.nan
    head_lr: Float = math.nan
    weight_decay: Float = math.nan
    search: SearchChoice | None = None
    train_config: dict[str, Any] = field(default_factory=dict)
    peft_version: str | None = None
    transformers_version: str | None = None
    torch_version: str | None = None
    snella_version: str | None = None
    git_dirty: bool | None = None
    package_info: dict[str, str | None] = field(default_factory=dict)
    system_info: dict[str, Any] = field(default_factory=dict)
    created_at: str
    status: Literal["success", "failed"]
    error: str | None = None
    total_time: float = 0.0
    results: CellResults | None = None

    def column(self, name: str) -> float | None:
        """Return a result by its name in the file, e.g. `test_accuracy`, or None if it was not measured."""
        if self.results is None:
            return None
        split, _, score = name.partition("_")
        if split in _SPLITS:
            return getattr(self.results, split).get(score)
        return getattr(self.results, name)

    @property
    def is_diverged_trial(self) -> bool:
        """True for a tuning run whose loss or gradient became infinite or NaN, e.g. at a high learning rate."""
        return self.purpose == "trial" and str(self.error).startswith("NonFiniteLossError")

    def score(self, split: str) -> float | None:
        """Return the score of the comparison's metric on `val` or `test`."""
        return self.column(f"{split}_{self.metric}")

    @classmethod
    def decoded(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Group the columns of a successful run into results, with the scores of each split.

        The row of a failed run has no results and is returned unchanged.
        """
        if values.get("status") != "success":
            return values
        scores: dict[str, dict[str, Any]] = {}
        for split in _SPLITS:
            prefix = f"{split}_"
            columns = {name: value for name, value in values.items() if name.startswith(prefix)}
            scores[split] = {name.removeprefix(prefix): value for name, value in columns.items()}
        return {**values, "results": {**values, **scores}}

    def encoded(self, values: dict[str, Any]) -> dict[str, Any]:
        """Flatten the results and the scores of each split into columns; the inverse of `decoded`."""
        results = values.pop("results") or {}
        for name, value in results.items():
            if name in _SPLITS:
                values |= {f"{name}_{score}": number for score, number in value.items()}
            else:
                values[name] = value
        return values
