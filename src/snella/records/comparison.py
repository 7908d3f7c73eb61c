"""What comparisons of methods and evaluations of generators write."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from snella.records.record import FORMAT, OPTIONAL, Record


@dataclass(frozen=True, kw_only=True)
class TriedCandidate:
    """One point of a search: its settings, the means over its seeds, and how many of them failed."""

    lr_factor: float
    lr: float
    head_lr: float
    weight_decay: float
    val_accuracy: float | None
    val_loss: float | None
    failed: int = 0


@dataclass(frozen=True, kw_only=True)
class SearchChoice:
    """How the learning rate and weight decay of a final run were chosen.

    Attributes:
        lr_factor: The best, times the method's default learning rate.
        lr_on_edge: Whether it is the smallest or the largest that was tried.
        weight_decay_on_edge: Whether the best weight decay is the largest of several.
        trials: All that were tried.
    """

    lr_factor: float | None
    lr_on_edge: bool = False
    weight_decay_on_edge: bool = False
    trials: list[TriedCandidate] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class CellResults:
    """What a finished run of a comparison gave; None where a value was not measured.

    Attributes:
        trained_as: The tuning run that it was made from.
        peft_config: PEFT's configuration of the adapter; None for methods outside PEFT.
        kept_weights: Budget of the adapted ones in the adapter.
        file_size: Bytes of the adapter.
        val: Scores by their names, which are columns such as `val_accuracy` in the file.
        test: Likewise of the test images, for final runs.
        split: SHA-256 of what was split, and how.
        changed_weights: Values of the backbone that are other than before, for final runs.
        peak_rss_mib: Of the process, where the run had one of its own.
        training_mib: What of it came after the libraries were loaded.
        forgetting: Share of other data's images that a linear probe loses, for final runs.
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


@dataclass(frozen=True, kw_only=True)
class CellRow(Record):
    """One run of a comparison: `cell.json` in its folder, and a line of `results.jsonl`.

    In the file, the results are columns among the others, and there are none of a failed run. Settings, versions and
    the machine have the names of PEFT's method comparison.

    Attributes:
        cell: Path of its folder below `cells/`.
        metric: Score that methods are compared by.
        task_name: The data.
        experiment_name: The method's label.
        tried_weight_decay: That of a tuning run; None for the method's default.
        search: How the settings of a final run were chosen.
        error: Of a failed run.
        total_time: Seconds, the tuning run that it was made from among them.
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
    lr: float = math.nan
    head_lr: float = math.nan
    weight_decay: float = math.nan
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
        """A result by its name in the file, such as `test_accuracy`; None where it was not measured."""
        split, _, score = name.partition("_")
        if self.results is None:
            return None
        return getattr(self.results, split).get(score) if split in _SPLITS else getattr(self.results, name)

    def score(self, split: str) -> float | None:
        """What methods are compared by, on `val` or `test`."""
        return self.column(f"{split}_{self.metric}")

    @classmethod
    def decoded(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The columns of a finished run as its results, those of a split as its scores."""
        if values.get("status") != "success":
            return values
        scores = {
            split: {name.removeprefix(f"{split}_"): v for name, v in values.items() if name.startswith(f"{split}_")}
            for split in _SPLITS
        }
        return {**values, "results": {**values, **scores}}

    def encoded(self, values: dict[str, Any]) -> dict[str, Any]:
        """And the other way round."""
        results = values.pop("results") or {}
        for name, value in results.items():
            values |= {f"{name}_{score}": v for score, v in value.items()} if name in _SPLITS else {name: value}
        return values


@dataclass(frozen=True)
class MethodResult:
    """One method of the demonstration; NaN or None where a value was not measured."""

    method: str
    split: str = "test"
    accuracy: float = math.nan
    balanced_accuracy: float = math.nan
    trainable_parameters: int | None = None
    train_s: float = math.nan
    adapter_bytes: int | None = None
    best_epoch: int | None = None


@dataclass(frozen=True)
class MethodResults(Record):
    """The methods that the demonstration compared: `comparison.json`."""

    file: ClassVar[str] = "comparison.json"

    format: int = FORMAT
    rows: list[MethodResult] = field(kw_only=True)


@dataclass(frozen=True)
class SubjectFidelity(Record):
    """What an evaluation of a personalized generator measured: `generation.json`."""

    file: ClassVar[str] = "generation.json"

    concept_alignment: float
    text_alignment: float
    text_alignment_without_token: float
    vendi: float
    vendi_by_prompt: float


@dataclass(frozen=True)
class TaskAccuracy:
    """Share of one task's questions that were answered correctly."""

    accuracy: float


@dataclass(frozen=True)
class AnswerScores(Record):
    """What an evaluation of a language model measured: `language.json`."""

    file: ClassVar[str] = "language.json"

    mean: float
    tasks: dict[str, TaskAccuracy]
