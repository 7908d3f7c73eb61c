"""Terminal summary of a run: status, scores, budgets, sparsity, sizes, and settings.

The budget of a matrix is the number of weights that its update may change. A matrix with budget 0 is frozen.
"""

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
from snella_app.records.generators import AnswerScores, GeneratorMetrics, SubjectFidelity
from snella_app.records.record import read, read_if_present
from snella_app.records.run import Allocation, MatrixInfo, Metrics, RunInfo, reject_cross_validation
from snella_app.report.allocation import MatrixGrid, group_matrices
from snella_app.text import bytes_text, listed, percent_text, plain_text, seconds_text

_GENERATOR_TASKS = ("generation", "language")
"""Tasks whose summary shows steps and losses instead of the best epoch."""
_REMEDY = "copy the adapter again, or train again with `--overwrite`"
_RESTORE = "restore from a copy, or train again with `--overwrite`"
_MISSING = "missing; restore the folder `adapter` from a copy, or train again with `--overwrite`"
_FILES = ("adapter_model.safetensors", "trainable.safetensors")
"""Names of the adapter file, for PEFT adapters and for other methods."""
_FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_INDEX_BYTES = 4
_PART = re.compile(r"\.(?P<part>(?:snella|lora)_(?!embedding)\w+?)(?:\.weight|\.\d+)?$")
"""Type of a tensor, such as `snella_A`, at the end of its name. LoRA's tensors for embeddings count as `other`."""


@dataclass(frozen=True)
class AdapterFile:
    """Header and configuration of an adapter file, without the values of its tensors.

    Attributes:
        path: Path of the file.
        shapes: Tensor shapes by name.
        value_bytes: Bytes per trained value: size of the widest floating-point dtype in the file.
        parts: Number of values by tensor type, e.g. `snella_A`, `lora_B`, `snella_budget`, `positions` (indices of
            individually trained entries), and `other`, such as the head.
        config: Configuration saved with the adapter.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    value_bytes: int
    parts: Mapping[str, int]
    config: Mapping[str, Any]


def read_adapter(run: str | Path) -> AdapterFile | None:
    """Read the header and configuration of the adapter file, or return None if the run has no adapter file.

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
            shapes = {name: tuple(tensor.get_shape()) for name, tensor in slices.items()}
            value_sizes = [_FLOAT_BYTES.get(str(tensor.get_dtype()), 0) for tensor in slices.values()]
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}; {_REMEDY}") from error
    parts: dict[str, int] = {}
    for name, shape in shapes.items():
        match = _PART.search(name)
        if match:
            part = match["part"]
        elif name.endswith(".indices"):
            part = "positions"
        else:
            part = "other"
        parts[part] = parts.get(part, 0) + math.prod(shape)
    value_bytes = max(value_sizes, default=0) or 4  # 4 if there are no floating-point tensors
    return AdapterFile(path, shapes, value_bytes, parts, _read_settings(folder))


def saved_budgets(adapter: AdapterFile, matrices: Sequence[MatrixInfo]) -> dict[str, int]:
    """Return the budgets in the adapter file, keyed by matrix name. The result is empty for methods without budgets.

    A fused layer contains several matrices, and its tensor `snella_budget` has one entry for each of them, in order.

    Raises:
        ValueError: If the layers in the file do not match `matrices`.
    """
    budgets: dict[str, int] = {}
    with safe_open(adapter.path, framework="numpy") as file:
        keys = [key for key in adapter.shapes if key.endswith(".snella_budget")]
        modules = {key.removesuffix(".snella_budget").removeprefix("base_model.model."): key for key in keys}
        for module, key in modules.items():
            # the matrices of a fused layer are named after the layer, e.g. `qkv.q`
            fused = [
                matrix.name
                for matrix in matrices
                if matrix.name.rpartition(".")[0] == module and matrix.name not in modules
            ]
            names = [matrix.name for matrix in matrices if matrix.name == module] + fused
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
    """Return the budget of each matrix by name, from the adapter if it has budgets, or else from `allocation.json`."""
    if allocation is None:
        return {}
    saved = {} if adapter is None else saved_budgets(adapter, allocation.matrices)
    return {matrix.name: matrix.budget for matrix in allocation.matrices} | saved


def _read_settings(folder: Path) -> dict[str, Any]:
    """Return the configuration saved with the adapter, or an empty dictionary if there is none."""
    for name in ("adapter_config.json", "method.json"):
        file = folder / name
        if file.is_file():
            try:
                values = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{file} is damaged: {error}; {_REMEDY}") from error
            return values if isinstance(values, dict) else {}
    return {}


def inspect_run(run: str | Path, *, was_killed: bool = False) -> Group:
    """Describe the files of a run in tables for a rich console, without loading its backbone or data.

    Args:
        run: Folder of the run, finished or not.
        was_killed: True if the process of the run was killed, which leaves its status at `running`.

    Raises:
        FileNotFoundError: If `run.json`, or a finished run's `metrics.json` or `allocation.json`, is missing.
        ValueError: If a file is damaged, the adapter belongs to another run, or the run is a cross-validation.
    """
    folder = Path(run)
    reject_cross_validation(folder)
    info = read(RunInfo, folder)
    expected = [name for name in ("metrics.json", "allocation.json") if name in (info.files or {})]
    if missing := [name for name in expected if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} is finished but has no {', '.join(missing)}; {_RESTORE}")
    metrics = read_if_present(Metrics, folder)
    allocation = read_if_present(Allocation, folder)
    adapter = read_adapter(folder)
    rows = [("run", str(folder)), ("status", "killed" if was_killed else info.status)]
    if info.error:
        rows.append(("error", info.error))
    rows.append(("method", info.method))
    if info.method_options:
        rows.append(("options", plain_text(info.method_options)))
    if info.task in _GENERATOR_TASKS:
        rows += _generator_rows(folder, info, metrics)
    else:
        rows += _epoch_rows(info, metrics)
    rows += _file_rows(folder, info, metrics, adapter)
    details: list[Table | Text] = []
    if allocation is not None:
        budgets = current_budgets(adapter, allocation)
        rows += _budget_rows(allocation, sum(budgets.values()), adapter)
        details += [Text(), _grid_table(group_matrices(allocation.matrices, budgets)), _frozen_text(budgets)]
        if adapter is None and info.is_finished:
            details.append(Text("The adapter is missing; these budgets come from allocation.json.", "red"))
        else:
            details.append(_nonzeros_text(allocation, budgets, adapter))
    if adapter is not None and adapter.config:
        settings = ((key, plain_text(value)) for key, value in adapter.config.items() if value is not None)
        details += [Text(), _facts_table(settings, title="Adapter settings", title_justify="left", title_style="bold")]
    return Group(_facts_table(rows, pad_edge=False), *details)


def _facts_table(rows: Iterable[tuple[str, str]], **options: Any) -> Table:
    """Return a table of names and values without a header."""
    table = Table(show_header=False, box=None, **options)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    return table


def _epoch_rows(info: RunInfo, metrics: Metrics | None) -> list[tuple[str, str]]:
    """Return rows for the backbone, data, scores, and epoch selection."""
    backbone, data = info.backbone, info.data
    noun, plural = ("target", "targets") if info.task == "regression" else ("class", "classes")
    rows = [
        ("backbone", backbone.name + (f" ({backbone.weights})" if backbone.weights else "")),
        ("data", f"{data.spec}, {counted(len(info.classes), noun, plural)}, {plain_text(data.sizes)}"),
    ]
    if metrics is None:
        return rows
    for split, scores in (("validation", metrics.val), ("test", metrics.test)):
        if scores is not None:
            rows.append((split, f"{scores.text()}, {counted(scores.images, 'image')}"))
    if metrics.final_head is not None:
        rows.append(("head", metrics.final_head.text))
    if epochs := metrics.saved_epochs:
        if metrics.averaged is not None and metrics.averaged.is_saved:
            name = "saved"
        elif metrics.selected_on is None or metrics.replaces_best_epoch:
            name = "last epoch"
        else:
            name = "best epoch"
        rows.append((name, f"{epochs}, {seconds_text(metrics.train_s)}"))
    if metrics.selected_on == "test":
        text = f"{metrics.protocol}: the epoch was selected on the test images, so test scores are optimistic"
        rows.append(("protocol", text))
    elif metrics.protocol != "standard":
        rows.append(("protocol", f"{metrics.protocol}: no epoch selection; the last epoch is saved"))
    if metrics.ema is not None:
        rows.append(("average", f"exponential moving average of the weights, decay {metrics.ema:g}"))
    return rows


def _file_rows(
    folder: Path, info: RunInfo, metrics: Metrics | None, adapter: AdapterFile | None
) -> list[tuple[str, str]]:
    """Return rows for missing files, the number of trainable parameters, and the adapter file."""
    rows = []
    if missing := [name for name in info.files or {} if not (folder / name).is_file()]:
        rows.append(("missing", f"{', '.join(missing)}; {_RESTORE}"))
    if metrics is not None:
        rows.append(("trainable", f"{metrics.trainable_parameters:,} parameters"))
    if adapter is not None:
        contents = ", ".join(f"{part} {count:,}" for part, count in adapter.parts.items())
        rows.append(("adapter", f"{bytes_text(adapter.path.stat().st_size)}: {contents}"))
    elif info.is_finished:
        rows.append(("adapter", _MISSING))
    return rows


def _budget_rows(allocation: Allocation, budget: int, adapter: AdapterFile | None) -> list[tuple[str, str]]:
    """Return rows for the total budget, its target, and the size of a file that stores only the changed weights."""
    total = allocation.total_weights
    value_bytes = adapter.value_bytes if adapter else 4
    sparse = bytes_text(budget * (value_bytes + _INDEX_BYTES))
    dense = bytes_text(total * value_bytes)
    allocations = counted(len(allocation.history), "allocation")
    return [
        ("budget", f"{budget:,} of {total:,} adapted weights ({percent_text(budget / max(total, 1))})"),
        ("target", f"{allocation.target_budget:,} at the end of the schedule; {allocations}"),
        ("sparse update", f"{sparse} (value and 32-bit index per weight); dense adapted matrices {dense}"),
    ]


def _grid_table(grid: MatrixGrid) -> Table:
    """Return a table of the sparsity in percent, with one row per block and one column per matrix type."""
    table = Table(title="Sparsity in percent (× frozen)", title_justify="left", title_style="bold", box=None)
    table.add_column("block", justify="right", style="dim")
    for kind in grid.kinds:
        table.add_column(Text(kind), justify="right")
    for depth in grid.depths:
        cells = []
        for kind in grid.kinds:
            cell = grid.cells.get((kind, depth))
            # rounding must not show 100 for a cell that is not frozen
            text = "" if cell is None else f"{min(100 * cell.sparsity, 99.9):.1f}"
            cells.append(Text("×", "yellow") if cell is not None and cell.is_frozen else Text(text))
        table.add_row("–" if depth is None else str(depth), *cells)
    return table


def _frozen_text(budgets: Mapping[str, int]) -> Text:
    """List the matrices with budget 0."""
    frozen = [name for name, budget in budgets.items() if budget == 0]
    if not frozen:
        return Text("\nNo matrix is frozen.")
    return Text(f"\nFrozen ({len(frozen)} of {len(budgets)}, budget 0): {', '.join(frozen)}", "yellow")


def _nonzeros_text(allocation: Allocation, budgets: Mapping[str, int], adapter: AdapterFile | None) -> Text:
    """State whether the number of nonzero entries of each matrix equals its budget."""
    if different := [matrix.name for matrix in allocation.matrices if matrix.nonzeros != budgets[matrix.name]]:
        count = counted(len(different), "matrix", "matrices")
        return Text(f"Non-zero entries differ from the budget in {count}: {listed(different)}", "red")
    nonzeros = sum(matrix.nonzeros for matrix in allocation.matrices)
    source = "the adapter file" if adapter is not None and "snella_budget" in adapter.parts else "allocation.json"
    return Text(f"Non-zero entries: {nonzeros:,}, equal to the budget (from {source}) in every matrix.")


def _generator_rows(folder: Path, info: RunInfo, metrics: Metrics | None) -> list[tuple[str, str]]:
    """Return rows for the model, data, steps, loss, and scores of a generator."""
    backbone, data = info.backbone, info.data
    is_image_generator = info.task == "generation"
    size = f", {backbone.img_size}×{backbone.img_size} px" if backbone.img_size else ""
    n_held_out = data.sizes.get("val") or 0
    held_out = f", {n_held_out} held out" if n_held_out else ""
    kind = "pipeline" if is_image_generator else "model"
    rows = [(kind, backbone.name + size), ("data", f"{data.spec}, {data.description}{held_out}")]
    if metrics is not None:
        curve = read(GeneratorMetrics, folder).learning()
        noun = "epoch" if curve["epochs"] == 1 else "epochs"
        epochs = "" if curve["epochs"] is None else f" ({plain_text(curve['epochs'])} {noun})"
        duration = f"{curve['steps']:,}{epochs} in {seconds_text(metrics.train_s)}"
        if curve["optimizer"]:
            duration += f", {curve['optimizer']}"
        rows.append(("steps", duration))
        rows.append(("loss", _loss_text(curve)))
    if is_image_generator and (fidelity := read_if_present(SubjectFidelity, folder)) is not None:
        values = dataclasses.asdict(fidelity)
        named_values = [f"{name.replace('_', ' ')} {value:.3f}" for name, value in values.items()]
        rows.append(("scores", ", ".join(named_values)))
    if not is_image_generator and (answers := read_if_present(AnswerScores, folder)) is not None:
        accuracies = ", ".join(f"{name} {percent_text(scores.accuracy)}" for name, scores in answers.tasks.items())
        rows.append(("accuracy", f"{percent_text(answers.mean)}, the mean of {accuracies}"))
    return rows


def _loss_text(curve: dict[str, Any]) -> str:
    """Describe the loss: on fixed noise if measured, or else at the end and the beginning of training."""
    if curve["fixed_after"] is not None:
        return f"{curve['fixed_after']:.5f} on fixed noise, {plain_text(curve['fixed_before'])} before training"
    if curve["last"] is None:
        return "not recorded"
    held_out = "" if curve["held_out"] is None else f"; {curve['held_out']:.4f} on held-out entries"
    return f"{curve['last']:.4f} at the end, {plain_text(curve['first'])} at the beginning{held_out}"
