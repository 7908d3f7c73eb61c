"""Cells of a comparison: one run each, its configuration, its folder and its row."""

import functools
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias

import torch

import snella
from snella.comparison.experiment import MEASURES, DataEntry, Experiment, MethodEntry, folder_name, make_config
from snella.comparison.search import Candidate, TuningResult
from snella.methods import find_method, parse_method
from snella.records import CellResults, CellRow, Metrics, RunInfo, SearchChoice, SplitScores, read
from snella.runs import RunFolder, TrainConfig

GitState: TypeAlias = tuple[str | None, bool | None]
_state: GitState | None = None
_PACKAGES = ("snella", "peft", "transformers", "accelerate", "torch", "timm", "numpy", "scikit-learn", "numba")


def package_info() -> dict[str, str | None]:
    """Versions under the keys of PEFT's method comparison (`torch-version`), and the commit of snella's checkout."""
    versions: dict[str, str | None] = {f"{name}-version": _version(name) for name in _PACKAGES}
    commit, is_dirty = git_state()
    return {**versions, "snella-commit-hash": commit, "snella-is-dirty": None if is_dirty is None else str(is_dirty)}


def system_info() -> dict[str, Any]:
    """The machine, under the keys of PEFT's method comparison, with cores and torch's threads."""
    return {
        "system": platform.system(),
        "release": platform.release(),
        "machine": platform.machine(),
        "processor": _processor(),
        "accelerator": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "N/A",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def git_state() -> GitState:
    """Commit of the checkout that snella was imported from, and whether tracked files differ; None outside of one.

    Queried once per process; a worker gets it from its parent.
    """
    global _state
    if _state is None:
        _state = _query_git()
    return _state


def set_git_state(state: GitState) -> None:
    """Set the state that the parent process has found: the code that runs here was loaded then."""
    global _state
    _state = state


def _query_git() -> GitState:
    """The current state of the checkout."""
    root = Path(snella.__file__).parents[2]
    if not (root / ".git").exists():
        return None, None
    commit = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return commit, None if changes is None else bool(changes)


def _git(root: Path, *words: str) -> str | None:
    """Output of a git command; None where it fails."""
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    """Version of a package, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@functools.cache
def _processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


TEST_SEED = 0
"""Decides the test images of every cell: other seeds draw other training and validation images, never a test image, so
that hyperparameters tuned with one seed have not seen the test images of another."""


@dataclass(frozen=True)
class Cell:
    """One run: a method on a task with a seed, for tuning or for the table.

    Args:
        data: The task.
        method: The method.
        seed: Of training and validation images, initial values, order, augmentation.
        candidate: Learning-rate factor and weight decay.
        is_final: Whether this is a row of the table, which alone measures the test images.
        search: How its hyperparameters were tuned, for the row of a final run.
    """

    data: DataEntry
    method: MethodEntry
    seed: int
    candidate: Candidate
    is_final: bool
    search: SearchChoice | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """Path of the cell's folder below `cells/`; the same for a final run whatever hyperparameters were chosen."""
        place = f"{folder_name(self.data.name)}/{folder_name(self.method.name)}"
        if self.is_final:
            return f"{place}/seed-{self.seed}"
        return f"{place}/trials/{self.candidate.label}_seed-{self.seed}"

    @property
    def title(self) -> str:
        """The run, human-readable."""
        what = "final" if self.is_final else f"tuning {self.candidate.label.replace('_', ' ')}"
        return f"{self.data.name} · {self.method.name} · {what} · seed {self.seed}"

    def folder(self, root: Path) -> Path:
        """The folder of its run."""
        return root / "cells" / self.name

    def config(self, experiment: Experiment, out: Path | str) -> TrainConfig:
        """The settings of its run."""
        rates = tuned_settings(experiment, self.data, self.method, self.candidate)
        settings = {"test_seed": TEST_SEED, **experiment.settings}
        if settings.get("protocol") == "final":  # tuned on images that the final run then trains on
            if self.is_final:
                settings.pop("val_size", None)
            else:
                settings["protocol"] = "standard"
        return make_config(
            self.method,
            self.data,
            settings,
            backbone=experiment.backbone,
            out=str(out),
            seed=self.seed,
            **rates,
        )


def tuned_settings(
    experiment: Experiment, data: DataEntry, method: MethodEntry, candidate: Candidate
) -> Mapping[str, Any]:
    """`lr`, `head_lr` and `weight_decay` of a candidate, from the method's own defaults.

    The factor multiplies the learning rate of what the method adds or changes; the head's rate stays, except where
    nothing but the head is trained.
    """
    base = make_config(method, data, experiment.settings, backbone=experiment.backbone, out="-")
    lr = base.lr or 0.0
    head_lr = lr if base.head_lr is None else base.head_lr
    is_head_only = find_method(method.method).is_head_only
    decay = base.weight_decay or 0.0
    return {
        "lr": _rounded(lr * candidate.lr_factor),
        "head_lr": _rounded(head_lr * candidate.lr_factor) if is_head_only else head_lr,
        "weight_decay": decay if candidate.weight_decay is None else candidate.weight_decay,
    }


def _rounded(rate: float) -> float:
    """Six digits: 0.009 for three times 0.003."""
    return float(f"{rate:.6g}")


def row_header(cell: Cell, experiment: Experiment, created_at: str) -> dict[str, Any]:
    """The fields of a `CellRow` that are known before training."""
    rates = tuned_settings(experiment, cell.data, cell.method, cell.candidate)
    peft_type = find_method(cell.method.method).peft_type or parse_method(cell.method.method)[0].upper()
    packages = package_info()
    return {
        "cell": cell.name,
        "purpose": "final" if cell.is_final else "trial",
        "metric": experiment.metric,
        "task_name": cell.data.name,
        "group": cell.data.group,
        "experiment_name": cell.method.name,
        "comparison": experiment.name,
        "method": cell.method.method,
        "peft_type": peft_type,
        "model_id": experiment.backbone,
        "seed": cell.seed,
        "lr_factor": cell.candidate.lr_factor,
        "tried_weight_decay": cell.candidate.weight_decay,
        **rates,
        "search": cell.search,
        "train_config": cell.config(experiment, cell.name).stored(),
        **{f"{name}_version": packages[f"{name}-version"] for name in ("peft", "transformers", "torch", "snella")},
        "git_dirty": git_state()[1],
        "package_info": packages,
        "system_info": system_info(),
        "created_at": created_at,
    }


def read_results(run: RunFolder) -> CellResults:
    """What the files of a finished run say."""
    metrics, data = read(Metrics, run.path), read(RunInfo, run.path).data
    best = next(row for row in metrics.history if row.epoch == metrics.adapter_epoch)
    return CellResults(
        peft_config=_adapter_config(run.adapter),
        num_trainable_params=metrics.trainable_parameters,
        adapted_weights=metrics.adapted_weights,
        kept_weights=best.budget,
        file_size=metrics.adapter_bytes,
        train_time=metrics.train_s,
        step_time=metrics.step_s,
        accelerator_memory_max=metrics.accelerator_memory_max,
        accelerator_memory_reserved_avg=metrics.accelerator_memory_reserved_avg,
        accelerator_memory_reserved_99th=metrics.accelerator_memory_reserved_99th,
        train_loss=best.train_loss,
        train_samples=len(metrics.history) * data.sizes["train"],
        epochs=len(metrics.history),
        best_epoch=metrics.best_epoch,
        protocol=metrics.protocol,
        selected_on=metrics.selected_on,
        ema=metrics.ema,
        val=_scores(metrics.val),
        test=_scores(metrics.test),
        sizes=data.sizes,
        split=data.digest,
    )


def _scores(scores: SplitScores | None) -> dict[str, float | None]:
    """The scores of one split by name; None for what its task does not measure."""
    of_tasks = [name for measures in MEASURES.values() for name in measures if hasattr(scores, name)]
    names = dict.fromkeys(("accuracy", "balanced_accuracy", "loss", *of_tasks))
    return {name: getattr(scores, name, None) for name in names}


def tuning_result(row: CellRow) -> TuningResult:
    """The result of a tuning run, from its row."""
    return TuningResult(row.score("val"), row.column("val_loss"))


def _adapter_config(adapter: Path) -> dict[str, Any] | None:
    """PEFT's configuration of an adapter; None for methods outside PEFT."""
    path = adapter / "adapter_config.json"
    return json.loads(path.read_text()) if path.is_file() else None
