"""Self-contained HTML report of a DreamBooth run.

The budget of a matrix is the number of its weights that the update may change. A matrix with budget 0 is frozen.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from snella_app.data.images import DECODING_ERRORS, open_image
from snella_app.records.generators import GeneratorMetrics, LossRow
from snella_app.records.record import read, read_if_present
from snella_app.records.run import Allocation, Metrics, RunInfo
from snella_app.report.examples import image_data_uri
from snella_app.report.inspect import current_budgets, read_adapter
from snella_app.report.report import allocation_section, write_page
from snella_app.report.style import ACCENT, FIGURE_SIZE, MUTED, add_legend, inline_svg, new_figure
from snella_app.text import bytes_text, count_text, percent_text, plain_text, seconds_text
from snella_lab.recipes.dreambooth.generate import MANIFEST

_MAX_SIDE = 320  # of an image in the report, in pixels
_WINDOW = 20  # steps of the moving average


def write_generation_report(run: str | Path) -> Path:
    """Write `RUN/report.html` atomically from the run's files.

    Args:
        run: Folder of a `snella dreambooth` run.

    Returns:
        Path of the report.

    Raises:
        FileNotFoundError: If the folder does not contain a finished run.
        ValueError: If a file of the run is damaged.
    """
    folder = Path(run)
    info = read(RunInfo, folder)
    metrics = read(Metrics, folder)
    training = read(GeneratorMetrics, folder)
    losses = training.learning()
    allocation = read_if_present(Allocation, folder)
    budgets = current_budgets(read_adapter(folder), allocation)
    loss_before = plain_text(losses["fixed_before"])
    numbers = [
        ("loss on fixed noise", plain_text(losses["fixed_after"]), f"{loss_before} before training"),
        ("trainable parameters", count_text(metrics.trainable_parameters), ""),
        ("adapter file", bytes_text(metrics.adapter_bytes), "loaded into the pipeline"),
        ("training time", seconds_text(metrics.train_s), training.optimizer),
    ]
    if allocation is not None and budgets:
        num_changed = sum(budgets.values())
        num_weights = max(allocation.total_weights, 1)
        num_frozen = sum(budget == 0 for budget in budgets.values())
        fraction = percent_text(num_changed / num_weights)
        note = f"of {count_text(num_weights)} adapted weights ({fraction}), {num_frozen} matrices frozen"
        numbers.insert(2, ("budget", count_text(num_changed), note))
    data = info.data
    subject_paths = [Path(data.folder or "") / name for name in data.files or []]
    context = {
        "run": info,
        "title": f"{info.method} on {data.subject}",
        "quoted": shlex.quote(str(folder)),
        "pipeline": repr(info.backbone.name),
        "adapter": repr(str(folder / "adapter")),
        "numbers": [{"label": label, "value": value, "note": note} for label, value, note in numbers],
        "curve": inline_svg(loss_curve(training.loss_history), "curve-loss", f"Loss by step; {losses['steps']} steps."),
        "groups": [
            {"title": "Images of the subject", "note": data.description, "items": _image_entries(subject_paths)},
            {"title": "Images generated after training", "note": "", "items": _sample_entries(folder / "samples")},
        ],
        "allocation": allocation_section(info, metrics, allocation, budgets),
        "config": (folder / "config.yaml").read_text(encoding="utf-8"),
    }
    return write_page(folder, "snella_lab.recipes.dreambooth", context)


def loss_curve(history: Sequence[LossRow]) -> Figure:
    """Plot the loss of each step, and its moving average over the last 20 steps."""
    figure, axes = new_figure(2 * FIGURE_SIZE[0], FIGURE_SIZE[1], "Loss")
    steps = [row.step for row in history]
    losses = np.array([np.nan if row.loss is None else row.loss for row in history], dtype=float)
    averages: list[float] = []
    for end in range(1, len(losses) + 1):
        window = losses[max(0, end - _WINDOW) : end]
        averages.append(float(np.mean(window)))
    marker = "o" if len(steps) < 3 else ""  # a line of one or two points is hardly visible
    step_lines = axes.plot(steps, losses, color=MUTED, linewidth=0.8, marker=marker)
    average_lines = axes.plot(steps, averages, color=ACCENT, linewidth=2)
    axes.set_xlabel("step")
    axes.set_ylim(bottom=0.0)
    add_legend(figure, [*step_lines, *average_lines], ["each step", f"mean of the last {_WINDOW}"])
    return figure


def _sample_entries(folder: Path) -> list[dict[str, Any]]:
    """Return the report entries of the images that the run generated after training, if any."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return []
    samples = json.loads(manifest.read_text(encoding="utf-8"))["images"]
    entries = _image_entries(folder / sample["file"] for sample in samples)
    for entry, sample in zip(entries, samples, strict=True):
        entry["text"] = f"{sample['prompt']} · seed {sample['seed']}"
    return entries


def _image_entries(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Encode images as report entries. The entry of an unreadable image contains the error instead."""
    entries: list[dict[str, Any]] = []
    for path in paths:
        entry: dict[str, Any] = {"text": path.name, "uri": None, "problem": ""}
        try:
            with open_image(path) as image:
                entry["uri"], entry["width"], entry["height"] = image_data_uri(image, _MAX_SIDE)
        except DECODING_ERRORS as error:
            entry["problem"] = f"cannot be read: {error}"
        entries.append(entry)
    return entries
