"""Terminal summary of a run: status, scores, budgets, sparsity, sizes and settings."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError, safe_open

from snella_app.console import counted
from snella_app.records import (
    Allocation,
    AnswerScores,
    GeneratorMetrics,
    MatrixInfo,
    Metrics,
    RunInfo,
    SubjectFidelity,
    plain,
    read,
    read_if_present,
)
from snella_app.report.allocation import group_matrices
from snella_app.text import bytes_text, percent_text, plain_text, seconds_text

_REMEDY = "copy the adapter again, or train again with `--overwrite`"
_FILES = ("adapter_model.safetensors", "trainable.safetensors")
_FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_UNTRAINED = ("snella_budget", "positions")
_PART = re.compile(r"\.(?P<part>(?:snella|lora)_(?!embedding)\w+?)(?:\.weight|\.\d+)?$")


@dataclass(frozen=True)
class AdapterFile:
    """Header and configuration of an adapter file, without the values of its tensors.

    Attributes:
        path: File.
        shapes: Tensor shapes by name.
        value_bytes: Bytes per trained value: size of the widest floating-point dtype in the file.
        parts: Number of values by tensor type: `snella_A`, `snella_B`, the scalars, `positions` (indices of
            individually trained entries) and `other` (the head).
        config: Configuration saved with the adapter.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    value_bytes: int
    parts: Mapping[str, int]
    config: Mapping[str, Any]

    @property
    def parameters(self) -> int:
        """Number of trained values, excluding budgets, masks and positions."""
        return sum(count for part, count in self.parts.items() if part not in _UNTRAINED)


def read_adapter(run: str | Path) -> AdapterFile | None:
    """Read the adapter's header and configuration; None if no adapter is saved yet.

    Raises:
        ValueError: If a file is damaged.
    """
    folder = Path(run) / "adapter"
    path = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if path is None:
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  not a mapping
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            sizes = [_FLOAT_BYTES.get(str(part.get_dtype()), 0) for part in slices.values()]
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}; {_REMEDY}") from error
    parts: dict[str, int] = {}
    for name, shape in shapes.items():
        match = _PART.search(name)
        part = match["part"] if match else "positions" if name.endswith(".indices") else "other"
        parts[part] = parts.get(part, 0) + math.prod(shape)
    return AdapterFile(path, shapes, max(sizes, default=0) or 4, parts, _read_settings(folder))


def saved_budgets(adapter: AdapterFile, matrices: Sequence[MatrixInfo]) -> dict[str, int]:
    """Return the budgets stored in the adapter by matrix name; empty for methods without budgets.

    `snella_budget` of a fused layer has one entry per matrix, in order.

    Raises:
        ValueError: If the layers in the file do not match `matrices`.
    """
    budgets: dict[str, int] = {}
    with safe_open(adapter.path, framework="numpy") as file:
        keys = [key for key in adapter.shapes if key.endswith(".snella_budget")]
        modules = {key.removesuffix(".snella_budget").removeprefix("base_model.model."): key for key in keys}
        for module, key in modules.items():
            fused = [m.name for m in matrices if m.name.rpartition(".")[0] == module and m.name not in modules]
            names = [m.name for m in matrices if m.name == module] + fused
            values = [int(value) for value in file.get_tensor(key).reshape(-1)]
            if len(names) != len(values):
                raise ValueError(
                    f"{adapter.path}: '{key}' holds {len(values)} budgets, but allocation.json lists "
                    f"{len(names)} matrices of '{module}'; the file belongs to another run; train again with "
                    "`--overwrite`"
                )
            budgets.update(zip(names, values, strict=True))
    return budgets


def current_budgets(adapter: AdapterFile | None, allocation: Allocation | None) -> dict[str, int]:
    """Return the budget of each matrix by name, from the saved adapter if present, else from `allocation.json`."""
    if allocation is None:
        return {}
    saved = {} if adapter is None else saved_budgets(adapter, allocation.matrices)
    return {matrix.name: matrix.budget for matrix in allocation.matrices} | saved


def _read_settings(folder: Path) -> dict[str, Any]:
    """Return the configuration saved with the adapter; empty if absent."""
    for name in ("adapter_config.json", "method.json"):
        file = folder / name
        if file.is_file():
            try:
                values = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{file} is damaged: {error}; {_REMEDY}") from error
            return values if isinstance(values, dict) else {}
    return {}


_INDEX_BYTES = 4
_RESTORE = "restore it from a copy, or train again with `--overwrite`"
_MISSING = "missing; restore the folder `adapter` from a copy, or train again with `--overwrite`"


def inspect_summary(run: str | Path) -> dict[str, Any]:
    """Summarize the files of a run without loading its backbone or data.

    Args:
        run: Folder of the run, finished or not.

    Returns:
        JSON-serializable values: `status`, `task`, `method`, `method_options`, `backbone`, `data`, `classes`,
        `scores`, `best_epoch`, `protocol`, `selected_on`, `ema`, `train_s`, `learning` (losses of a generator),
        `adapter_missing` (finished run without adapter), `missing` (deleted files of a finished
        run), `sizes`, `parameters`, `settings`, and `budgets` (None for methods without budgets).

    Raises:
        FileNotFoundError: If the folder has no `run.json`, or results of a finished run are missing.
        ValueError: If a file is damaged or the adapter belongs to another run.
    """
    folder = Path(run)
    info = read(RunInfo, folder)
    written = [name for name in ("metrics.json", "allocation.json") if name in (info.files or {})]
    if missing := [name for name in written if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} is finished but has no {', '.join(missing)}; {_RESTORE}")
    metrics = read_if_present(Metrics, folder)
    allocation = read_if_present(Allocation, folder)
    adapter = read_adapter(folder)
    curve = None
    if info.task in _GENERATOR_TASKS:
        scores = _generator_scores(folder, info.task)
        curve = metrics and read(GeneratorMetrics, folder).learning()
    else:
        by_split = {"validation": metrics and metrics.val, "test": metrics and metrics.test}
        scores = {name: part and {**part.values(), "text": part.text()} for name, part in by_split.items()}
    summary: dict[str, Any] = {
        "run": str(folder),
        "status": info.status,
        "error": info.error,
        "task": info.task,
        "method": info.method,
        "method_options": info.method_options,
        "backbone": plain(info.backbone),
        "data": plain(info.data),
        "classes": info.classes,
        "command": info.command,
        "best_epoch": metrics and metrics.best_epoch,
        "epochs": metrics.history[-1].epoch if metrics and metrics.history else 0,
        "protocol": metrics and metrics.protocol,
        "selected_on": metrics and metrics.selected_on,
        "ema": metrics and metrics.ema,
        "train_s": metrics and metrics.train_s,
        "learning": curve,
        "scores": scores,
        "parameters": {
            "trainable": metrics and metrics.trainable_parameters,
            "in_adapter": adapter and adapter.parameters,
            "parts": dict(adapter.parts) if adapter else {},
        },
        "adapter_missing": adapter is None and info.is_finished,
        "missing": [name for name in info.files or {} if not (folder / name).is_file()],
        "sizes": {"adapter_bytes": adapter and adapter.path.stat().st_size},
        "settings": dict(adapter.config) if adapter else {},
        "budgets": None,
    }
    if allocation is not None:
        budgets, value_bytes = _summarize_budgets(allocation, adapter), adapter.value_bytes if adapter else 4
        summary["budgets"] = budgets
        summary["sizes"] |= {
            "sparse_update_bytes": budgets["budget"] * (value_bytes + _INDEX_BYTES),
            "adapted_weights_bytes": allocation.total_weights * value_bytes,
        }
    return summary


def inspect_run(run: str | Path) -> Group:
    """Return `inspect_summary` as tables for a rich console; raises the same errors."""
    summary = inspect_summary(run)
    budgets = summary["budgets"]
    parts: list[Table | Text] = [_overview(summary)]
    if budgets is not None:
        frozen = budgets["frozen"]
        names = f"Frozen ({len(frozen)} of {len(budgets['matrices'])}, budget 0): {', '.join(frozen)}"
        parts += [Text(), _grid_table(budgets)]
        parts.append(Text(f"\n{names}", "yellow") if frozen else Text("\nNo matrix is frozen."))
        if summary["adapter_missing"]:
            parts.append(Text("The adapter is missing; these budgets come from allocation.json.", "red"))
        else:
            parts.append(Text(_nonzeros_text(budgets), "red" if budgets["mismatches"] else ""))
    if summary["settings"]:
        rows = ((key, plain_text(value)) for key, value in summary["settings"].items() if value is not None)
        parts += [Text(), _facts_table(rows, title="Adapter settings", title_justify="left", title_style="bold")]
    return Group(*parts)


def _summarize_budgets(allocation: Allocation, adapter: AdapterFile | None) -> dict[str, Any]:
    """Return total budgets, budgets by matrix, and sparsity by matrix type and block."""
    budgets = current_budgets(adapter, allocation)
    grid = group_matrices(allocation.matrices, budgets)
    return {
        "total_weights": allocation.total_weights,
        "target": allocation.target_budget,
        "budget": sum(budgets.values()),
        "from_adapter": adapter is not None and "snella_budget" in adapter.parts,
        "allocations": len(allocation.history),
        "frozen": [m.name for m in allocation.matrices if budgets[m.name] == 0],
        "nonzeros": sum(m.nonzeros for m in allocation.matrices),
        "mismatches": [m.name for m in allocation.matrices if m.nonzeros != budgets[m.name]],
        "matrices": [
            {
                "name": m.name,
                "kind": m.kind,
                "depth": m.depth,
                "shape": list(m.shape),
                "size": m.size,
                "budget": budgets[m.name],
                "sparsity": 1 - budgets[m.name] / max(m.size, 1),
                "nonzeros": m.nonzeros,
            }
            for m in allocation.matrices
        ],
        "kinds": grid.kinds,
        "depths": grid.depths,
        "sparsity": {
            kind: [grid.cells[kind, d].sparsity if (kind, d) in grid.cells else None for d in grid.depths]
            for kind in grid.kinds
        },
    }


def _overview(summary: dict[str, Any]) -> Table:
    """Return status, data, results and sizes as a two-column table."""
    is_running = summary["status"] == "running"
    rows = [("run", summary["run"]), ("status", "running or killed" if is_running else summary["status"])]
    if summary["error"]:
        rows.append(("error", summary["error"]))
    rows += [("method", summary["method"]), ("options", plain_text(summary["method_options"]))]
    rows += _generator_rows(summary) if summary["task"] in _GENERATOR_TASKS else _epoch_rows(summary)
    sizes = summary["sizes"]
    parameters = summary["parameters"]
    if summary["missing"]:
        rows.append(("missing", f"{', '.join(summary['missing'])}; {_RESTORE}"))
    if parameters["trainable"] is not None:
        rows.append(("trainable", f"{parameters['trainable']:,} parameters"))
    if summary["adapter_missing"]:
        rows.append(("adapter", _MISSING))
    if sizes["adapter_bytes"] is not None:
        contents = ", ".join(f"{part} {count:,}" for part, count in parameters["parts"].items())
        rows.append(("adapter", f"{bytes_text(sizes['adapter_bytes'])}: {contents}"))
    budgets = summary["budgets"]
    if budgets is not None:
        share = percent_text(budgets["budget"] / max(budgets["total_weights"], 1))
        rows += [
            ("budget", f"{budgets['budget']:,} of {budgets['total_weights']:,} adapted weights ({share})"),
            ("target", f"{budgets['target']:,} after the last allocation, {budgets['allocations']} allocations so far"),
            (
                "as a sparse file",
                f"{bytes_text(sizes['sparse_update_bytes'])} (value and 32-bit index per weight); "
                f"dense adapted matrices {bytes_text(sizes['adapted_weights_bytes'])}",
            ),
        ]
    return _facts_table(rows, pad_edge=False)


def _facts_table(rows: Iterable[tuple[str, str]], **options: Any) -> Table:
    """Return a table of names and values without header."""
    table = Table(show_header=False, box=None, **options)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    return table


def _epoch_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return rows for backbone, data, scores and epoch selection."""
    backbone, data = summary["backbone"], summary["data"]
    rows = [
        ("backbone", backbone["name"] + (f" ({backbone['weights']})" if backbone["weights"] else "")),
        ("data", f"{data['spec']}, {len(summary['classes'])} classes, {plain_text(data['sizes'])}"),
    ]
    for split, scores in summary["scores"].items():
        if scores:
            rows.append((split, f"{scores['text']}, {counted(scores['images'], 'image')}"))
    if summary["best_epoch"] is not None:
        rows.append(
            ("best epoch", f"{summary['best_epoch']} of {summary['epochs']}, {seconds_text(summary['train_s'])}")
        )
    if summary["selected_on"] == "test":
        text = f"{summary['protocol']}: the epoch was selected on the test images, so test scores are optimistic"
        rows.append(("protocol", text))
    elif summary["protocol"] not in (None, "standard"):
        rows.append(("protocol", f"{summary['protocol']}: last epoch, no selection"))
    if summary["ema"] is not None:
        rows.append(("average", f"exponential moving average of the weights, decay {summary['ema']:g}"))
    return rows


def _grid_table(budgets: dict[str, Any]) -> Table:
    """Return sparsity in percent, one row per block and one column per matrix type."""
    table = Table(title="Sparsity in percent (× frozen)", title_justify="left", title_style="bold", box=None)
    table.add_column("block", justify="right", style="dim")
    for kind in budgets["kinds"]:
        table.add_column(Text(kind), justify="right")
    for row, depth in enumerate(budgets["depths"]):
        cells = []
        for kind in budgets["kinds"]:
            sparsity = budgets["sparsity"][kind][row]
            text = "" if sparsity is None else f"{min(100 * sparsity, 99.9):.1f}"
            cells.append(Text("×", "yellow") if sparsity == 1 else Text(text))
        table.add_row("–" if depth is None else str(depth), *cells)
    return table


def _nonzeros_text(budgets: dict[str, Any]) -> str:
    """Compare the non-zero entries with the budgets."""
    source = "the adapter file" if budgets["from_adapter"] else "allocation.json"
    if budgets["mismatches"]:
        names = ", ".join(budgets["mismatches"][:5])
        count = counted(len(budgets["mismatches"]), "matrix", "matrices")
        return f"Non-zero entries differ from the budget in {count}: {names}"
    return f"Non-zero entries: {budgets['nonzeros']:,}, equal to the budget (from {source}) in every matrix."


_GENERATOR_TASKS = ("generation", "language")
"""Tasks whose runs report steps and loss instead of a best epoch and accuracy."""


def _generator_scores(run: str | Path, task: str) -> dict[str, Any]:
    """Return the evaluation scores of a generator by name; empty without an evaluation."""
    if task == "generation":
        fidelity = read_if_present(SubjectFidelity, run)
        return {} if fidelity is None else dataclasses.asdict(fidelity)
    answers = read_if_present(AnswerScores, run)
    if answers is None:
        return {}
    return {"mean": answers.mean} | {name: scores.accuracy for name, scores in answers.tasks.items()}


def _generator_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return rows for the model, data, steps, loss and scores of a generator."""
    backbone, data, curve = summary["backbone"], summary["data"], summary["learning"]
    is_image_generator = summary["task"] == "generation"
    size = f", {backbone['img_size']}×{backbone['img_size']} px" if backbone["img_size"] else ""
    n_held_out = data["sizes"].get("val") or 0
    rows = [
        ("pipeline" if is_image_generator else "model", backbone["name"] + size),
        ("data", f"{data['spec']}, {data['description']}" + (f", {n_held_out} held out" if n_held_out else "")),
    ]
    if curve is not None:
        epochs = "" if curve["epochs"] is None else f" ({plain_text(curve['epochs'])} epochs)"
        duration = f"{curve['steps']:,}{epochs} in {seconds_text(summary['train_s'])}"
        rows.append(("steps", duration + (f", {curve['optimizer']}" if curve["optimizer"] else "")))
        rows.append(("loss", _loss_text(curve)))
    scores = summary["scores"]
    if scores and is_image_generator:
        rows.append(("scores", ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in scores.items())))
    elif scores:
        each = ", ".join(f"{name} {percent_text(value)}" for name, value in scores.items() if name != "mean")
        rows.append(("accuracy", f"{percent_text(scores['mean'])}, the mean of {each}"))
    return rows


def _loss_text(curve: dict[str, Any]) -> str:
    """Describe the loss: on fixed noise if measured, else its first and last values."""
    if curve["fixed_after"] is not None:
        return f"{curve['fixed_after']:.5f} on fixed noise, {plain_text(curve['fixed_before'])} before training"
    if curve["last"] is None:
        return "not recorded"
    held_out = "" if curve["held_out"] is None else f"; {curve['held_out']:.4f} on held-out entries"
    return f"{curve['last']:.4f} at the end, {plain_text(curve['first'])} at the beginning{held_out}"
