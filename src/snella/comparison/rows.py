"""One row of the results: what a cell cost and reached.

Columns that PEFT's `method_comparison` has go by its names: task_name, experiment_name, model_id, train_config,
peft_type, peft_config, accelerator_memory_*, total_time, train_time, file_size, num_trainable_params, test_accuracy,
train_loss, train_samples, *_version, package_info, system_info, created_at.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from snella.comparison.cells import Cell, rates_of
from snella.comparison.experiment import Experiment
from snella.comparison.provenance import git_state, package_info, system_info
from snella.comparison.search import TrialResult
from snella.methods import parse_method
from snella.runs import RunFolder

_FULL = "full-finetuning"


def head_of_row(cell: Cell, experiment: Experiment, created_at: str) -> dict[str, Any]:
    """What is known before a cell is trained."""
    rates = rates_of(experiment, cell.data, cell.method, cell.candidate)
    family = parse_method(cell.method.method)[0]
    packages = package_info()
    return {
        "cell": cell.name,
        "purpose": "final" if cell.is_final else "trial",
        "task_name": cell.data.name,
        "group": cell.data.group,
        "experiment_name": cell.method.name,
        "comparison": experiment.name,
        "method": cell.method.method,
        "peft_type": _FULL if family == "full" else family.upper(),
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


def results_of(run: RunFolder) -> dict[str, Any]:
    """What a finished run says of itself."""
    metrics, info = run.read_json("metrics.json"), run.read_json("run.json")
    val, test = metrics["val"] or {}, metrics["test"] or {}
    best = next(row for row in metrics["history"] if row["epoch"] == metrics["best_epoch"])
    sizes = info["data"]["sizes"]
    return {
        "peft_config": _adapter_config(run.adapter),
        "num_trainable_params": metrics["trainable_parameters"],
        "adapted_weights": metrics["adapted_weights"],
        "kept_weights": best["budget"],
        "file_size": metrics["adapter_bytes"],
        "train_time": metrics["train_s"],
        "step_time": metrics["step_s"],
        **{key: value for key, value in metrics.items() if key.startswith("accelerator_memory_")},
        "train_loss": best["train_loss"],
        "train_samples": len(metrics["history"]) * sizes["train"],
        "epochs": len(metrics["history"]),
        "best_epoch": metrics["best_epoch"],
        "protocol": metrics["protocol"],
        "selected_on": metrics["selected_on"],
        "ema": metrics["ema"],
        "val_accuracy": val.get("accuracy"),
        "val_balanced_accuracy": val.get("balanced_accuracy"),
        "val_loss": val.get("loss"),
        "test_accuracy": test.get("accuracy"),
        "test_balanced_accuracy": test.get("balanced_accuracy"),
        "test_loss": test.get("loss"),
        "sizes": sizes,
        "split": info["data"]["digest"],
    }


def trial_result(row: Mapping[str, Any]) -> TrialResult:
    """What the search reads of a trial's row."""
    if row["status"] != "success":
        return TrialResult(None, None)
    return TrialResult(row["val_accuracy"], row["val_loss"])


def _adapter_config(adapter: Path) -> dict[str, Any] | None:
    """PEFT's configuration of an adapter; None for methods outside PEFT."""
    path = adapter / "adapter_config.json"
    return json.loads(path.read_text()) if path.is_file() else None
