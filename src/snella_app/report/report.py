"""Self-contained HTML report of a run."""

from __future__ import annotations

import base64
import hashlib
import math
import re
import shlex
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.colors import to_hex

from snella_app.data.images import open_image
from snella_app.methods.defaults import PROBE_METHOD
from snella_app.records import (
    Allocation,
    LabelSetScores,
    MaskPredictions,
    MaskScores,
    MethodResult,
    MethodResults,
    Metrics,
    OrdinalScores,
    Prediction,
    Predictions,
    RegressionScores,
    RunInfo,
    Scores,
    read,
    read_if_present,
)
from snella_app.report import figures, targets
from snella_app.report.allocation import (
    adapter_step,
    arrange,
    block_trend,
    budget_curve,
    budget_shares,
    epochs_of_allocation,
    frozen_curve,
    has_importance,
    importance_curves,
    sparsity_map,
)
from snella_app.report.examples import (
    ImageSource,
    choose_examples,
    load_example,
    load_image_uri,
    mask_colors,
    picture_uri,
)
from snella_app.report.figures import calibration_section, ranking_section
from snella_app.report.inspect import AdapterFile, current_budgets, read_adapter
from snella_app.report.style import inline_svg, write_atomically
from snella_app.text import (
    bytes_text,
    count_text,
    decimal_text,
    margin_text,
    measure_text,
    percent_text,
    plain_text,
    seconds_text,
)

_LONGEST = 800


def classes_section(metrics: Metrics | None) -> dict[str, Any] | None:
    """Return Dice and IoU by class, on the test split if there is one."""
    if metrics is None:
        return None
    split, scores = metrics.measured
    if not isinstance(scores, MaskScores):
        return None
    return {"split": split, "count": scores.images, "rows": scores.per_class}


def masks_section(folder: Path, info: RunInfo, images: ImageSource | None) -> dict[str, Any] | None:
    """Return sample images with true and predicted masks, worst first."""
    if info.task != "segmentation":
        return None
    predictions = read_if_present(MaskPredictions, folder)
    shown = [] if predictions is None else [item for item in predictions.items if item.mask]
    if predictions is None or not shown:
        return None
    shown.sort(key=lambda item: (math.isnan(item.dice), item.dice))
    items = []
    for item in shown:
        uri, width, height, problem = load_image_uri(item.index, images, _LONGEST)
        image = {"uri": uri, "width": width, "height": height, "problem": problem}
        items.append({"name": item.name, "dice": item.dice, "iou": item.iou, **image})
    colors = mask_colors(len(info.classes)) / 255
    return {
        "split": predictions.split_name,
        "note": f"{len(items)} of {len(predictions.items)} images: the worst, then others evenly spaced.",
        "legend": [
            {"name": name, "color": to_hex(color)} for name, color in zip(info.classes[1:], colors[1:], strict=True)
        ],
        "items": items,
    }


@dataclass(frozen=True)
class Fact:
    """A labeled value in the report, with an optional note."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Scale:
    """Accuracy scale: value, 95% confidence limits and named baselines, all in [0, 1]."""

    value: float
    low: float
    high: float
    marks: list[tuple[str, float]]


def results_section(metrics: Metrics | None, marks: Sequence[tuple[str, float]] = ()) -> dict[str, Any] | None:
    """Return the main score (test, or validation without a test split), its scale, other scores and adapter facts.

    Args:
        metrics: Metrics of the run.
        marks: Accuracy baselines, `(name, accuracy)`.
    """
    if metrics is None:
        return None
    splits = (("test", metrics.test), ("validation", metrics.val))
    facts = [Fact(*row) for split, scores in splits if scores is not None for row in scores.rows(split)]
    scale: Scale | None = None
    scores = metrics.measured[1]
    if isinstance(scores, Scores) and not isinstance(scores, OrdinalScores) and scores.images:
        ends = max(scores.accuracy - scores.margin, 0.0), min(scores.accuracy + scores.margin, 1.0)
        scale = Scale(scores.accuracy, *ends, list(marks))
    return {"hero": facts[0] if facts else None, "scale": scale, "others": facts[1:], "adapter": _adapter_text(metrics)}


def _adapter_text(metrics: Metrics) -> str:
    """Return the epoch, training time and file size of the saved adapter as one line."""
    parts = [] if metrics.best_epoch is None else [" ".join(filter(None, _kept_epoch(metrics)))]
    parts += [] if math.isnan(metrics.train_s) else [f"trained in {seconds_text(metrics.train_s)}"]
    parts += [f"adapter file {bytes_text(metrics.adapter_bytes)}"] if metrics.adapter_bytes else []
    return " · ".join(parts)


def method_facts(metrics: Metrics | None, allocation: Allocation | None, budgets: Mapping[str, int]) -> list[Fact]:
    """Return trainable parameters, budget, final head and peak memory."""
    if metrics is None:
        return []
    facts = [_count_fact("trainable parameters", metrics.trainable_parameters)]
    if allocation is not None:
        kept, total = sum(budgets.values()), allocation.total_weights
        frozen = sum(budget == 0 for budget in budgets.values())
        share = percent_text(kept / max(total, 1))
        note = f"of {count_text(total)} ({share}), {len(budgets)} matrices, {frozen} frozen"
        facts.append(Fact("adapted weights kept", count_text(kept), note))
    elif metrics.adapted_weights:
        facts.append(_count_fact("adapted weights", metrics.adapted_weights))
    if (head := metrics.final_head) is not None:
        value = f"{len(head.layers)} layers" if head.is_saved else "trained"
        facts.append(Fact("final head", value, f"{head.name}: {head.comparison}" if head.comparison else head.name))
    if not math.isnan(metrics.peak_rss_mib):
        facts.append(Fact("peak memory", bytes_text(metrics.peak_rss_mib * 2**20), "of the training process"))
    return facts


_SHORT_METRICS = {"map": "mAP", "mae": "MAE", "rmse": "RMSE", "r2": "R²"}


def _kept_epoch(metrics: Metrics) -> tuple[str, str, str]:
    """Return the label, value and note for the saved adapter's epoch and how it was selected."""
    total = f"of {metrics.history[-1].epoch}" if metrics.history else ""
    average = "" if metrics.ema is None else f"; average of the weights, decay {metrics.ema:g}"
    if (averaged := metrics.averaged) is not None and averaged.is_saved:
        kind = "(SWA over {})" if averaged.kind == "swa" else "(greedy soup of {})"
        offered = f"epochs {averaged.offered[0]} to {averaged.offered[-1]} {total}"
        return "averaged epochs", ", ".join(map(str, averaged.epochs)), kind.format(offered)
    if metrics.selected_on is None:
        return "epoch", str(metrics.best_epoch), f"{total}, last epoch, no selection{average}"
    split, _, metric = metrics.best_metric.partition("_")
    chosen_by = f"{'validation' if split == 'val' else split} {_SHORT_METRICS.get(metric, metric.replace('_', ' '))}"
    return "best epoch", str(metrics.best_epoch), (f"{total}, by {chosen_by}" if total else "") + average


def comparison_section(rows: list[MethodResult] | None) -> dict[str, Any] | None:
    """Return the accuracy and cost of the compared methods."""
    if not rows:
        return None
    accuracy = inline_svg(figures.comparison_bars(rows), "comparison-accuracy", "Accuracy of each method, as bars.")
    cost = inline_svg(figures.cost_bars(rows), "comparison-cost", "Training time of each method, as bars.")
    return {"rows": rows, "figures": [accuracy, cost]}


def curves_section(metrics: Metrics | None) -> list[Markup]:
    """Return loss and accuracy curves over the epochs."""
    if metrics is None or not metrics.history:
        return []
    last = metrics.history[-1]
    return [
        inline_svg(
            figures.loss_curves(metrics),
            "curve-loss",
            f"Loss by epoch; last epoch {last.epoch}: training {measure_text(last.train_loss)}, "
            f"{metrics.selection} {measure_text(last.val_loss)}.",
        ),
        *([] if metrics.selected_on is None else [_quality_curves(metrics)]),
    ]


_QUALITIES = {
    "dice": ("val_dice", "Dice"),
    "map": ("val_map", "mean average precision"),
    "kappa": ("val_kappa", "quadratic weighted kappa"),
    "error": ("val_mae", "mean absolute error"),
    "r2": ("val_r2", "R², mean over targets,"),
    "accuracy": ("val_accuracy", "accuracy"),
}
"""Names of `quality_curves`: required entry of an epoch's row and its label."""


def _quality_curves(metrics: Metrics) -> Markup:
    """Return the first validation-quality curves for which the history has values."""
    last = metrics.history[-1]
    candidates = (
        name
        for name, (entry, _) in _QUALITIES.items()
        if any(not math.isnan(getattr(r, entry)) for r in metrics.history)
    )
    name = next(candidates, "accuracy")
    if name == "error" and isinstance(metrics.val, RegressionScores) and len(metrics.val.per_target) > 1:
        name = "r2"  # targets have different units
    entry, label = _QUALITIES[name]
    value = getattr(last, entry)
    text = percent_text(value) if name in figures.SHARES else measure_text(value)
    return inline_svg(
        figures.quality_curves(metrics, name),
        f"curve-{name}",
        f"{metrics.selection.capitalize()} {label} by epoch; last epoch {last.epoch}: {text}.",
    )


def confusion_section(info: RunInfo, metrics: Metrics | None) -> dict[str, Any] | None:
    """Return the confusion matrix and per-class scores, on the test split if there is one."""
    if metrics is None:
        return None
    split, scores = metrics.measured
    if not isinstance(scores, Scores) or not scores.confusion:
        return None
    return {
        "split": split,
        "count": scores.images,
        "numbered": len(info.classes) <= figures.NUMBERED_CLASSES,
        "figure": inline_svg(
            figures.confusion_matrix(scores.confusion, info.classes),
            "confusion-matrix",
            f"Confusion matrix of {len(info.classes)} classes on the {split} images; values are in the table below.",
        ),
        "rows": sorted(_class_rows(info, scores), key=lambda row: (math.isnan(row["recall"]), row["recall"])),
        "pairs": _confused_pairs(info, scores),
    }


def groups_section(info: RunInfo, predictions: Predictions | None) -> dict[str, Any] | None:
    """Return accuracy by group (patient, site, video), lowest first; None for data without groups."""
    by_group: dict[str, list[Prediction]] = {}
    for item in predictions.items if predictions is not None else []:
        if item.group is not None:
            by_group.setdefault(item.group, []).append(item)
    if predictions is None or len(by_group) < 2:
        return None
    rows: list[dict[str, Any]] = []
    for name, items in by_group.items():
        confused = Counter((item.label, item.predicted) for item in items if not item.is_right)
        frequent = [
            f"{info.classes[label]} → {info.classes[predicted]} {count:,}"
            for (label, predicted), count in confused.most_common(_CONFUSED_IN_GROUP)
        ]
        share = sum(item.is_right for item in items) / len(items)
        rows.append({"name": name, "images": len(items), "right": share, "confused": ", ".join(frequent)})
    rows.sort(key=lambda row: (row["right"], -row["images"], row["name"]))
    shares = [float(row["right"]) for row in rows]
    shown = rows
    if len(rows) > _SHOWN_GROUPS:
        shown = [row for row in rows[:_SHOWN_GROUPS] if row["right"] < 1] or rows[:_SHOWN_GROUPS]
    return {
        "split": predictions.split_name,
        "count": len(rows),
        "mean": sum(shares) / len(shares),
        "rows": shown,
        "has_errors_elsewhere": len(rows) > len(shown) and rows[len(shown)]["right"] < 1,
    }


def baselines(info: RunInfo, metrics: Metrics | None, comparison: list[MethodResult] | None) -> list[tuple[str, float]]:
    """Return accuracy baselines by name: the most frequent class, and a linear probe if one was compared."""
    scores = None if metrics is None else metrics.measured[1]
    if not isinstance(scores, Scores) or not scores.images:
        return []
    most, share = _most_frequent(scores)
    marks = [(f"always {info.classes[most]!r}", share)]
    probe = next((row for row in comparison or [] if row.method == PROBE_METHOD), None)
    return marks if probe is None or math.isnan(probe.accuracy) else [*marks, ("linear probe", probe.accuracy)]


def _most_frequent(scores: Scores) -> tuple[int, float]:
    """Return the most frequent class and its share of the images."""
    sizes = [sum(row) for row in scores.confusion]
    most = max(range(len(sizes)), key=sizes.__getitem__)
    return most, sizes[most] / scores.images


def verdict_text(info: RunInfo, metrics: Metrics | None) -> str:
    """Return the result as a sentence, compared with the most frequent class; empty for segmentation."""
    if metrics is None:
        return ""
    split, scores = metrics.measured
    if isinstance(scores, LabelSetScores):
        return targets.label_set_verdict(scores, split)
    if isinstance(scores, RegressionScores):
        return targets.regression_verdict(scores, split)
    if not isinstance(scores, Scores) or not scores.images:
        return ""
    correct, total = sum(row[i] for i, row in enumerate(scores.confusion)), scores.images
    most, frequent = _most_frequent(scores)
    text = (
        f"{correct:,} of {total:,} {split} images are classified correctly. Always predicting {info.classes[most]!r}, "
        f"the most frequent class, gets {percent_text(frequent)}"
    )
    if correct / total - frequent > scores.margin:
        return f"{text}."
    recalls = [row[i] / sum(row) for i, row in enumerate(scores.confusion) if sum(row)]
    balanced, constant_share = sum(recalls) / len(recalls), 1 / len(recalls)
    if balanced - constant_share > scores.balanced_margin:
        return (
            f"{text}, but only {percent_text(constant_share)} balanced accuracy, which weights all classes equally; "
            f"this model reaches {percent_text(balanced)} ({margin_text(scores.balanced_margin)})."
        )
    return f"{text}. The model does not exceed it by more than the 95% margin: no evidence of learning yet."


def _confused_pairs(info: RunInfo, scores: Scores) -> list[dict[str, Any]]:
    """Return the most frequently confused class pairs with image counts."""
    pairs: list[dict[str, Any]] = [
        {"label": info.classes[i], "predicted": info.classes[j], "count": count, "images": sum(row)}
        for i, row in enumerate(scores.confusion)
        for j, count in enumerate(row)
        if i != j and count
    ]
    return sorted(pairs, key=lambda pair: -pair["count"])[:_CONFUSED]


def _class_rows(info: RunInfo, scores: Scores) -> list[dict[str, Any]]:
    """Return image count, recall and precision by class."""
    rows = []
    for i, name in enumerate(info.classes):
        images, predicted = sum(scores.confusion[i]), sum(row[i] for row in scores.confusion)
        hits = scores.confusion[i][i]
        recall, precision = (hits / n if n else math.nan for n in (images, predicted))
        rows.append({"name": name, "images": images, "recall": recall, "precision": precision})
    return rows


def update_section(
    adapter: AdapterFile | None, allocation: Allocation | None, budgets: Mapping[str, int] | None = None
) -> dict[str, Any] | None:
    """Return the update of the deepest query projection with a budget; None for adapters without updates."""
    if adapter is None:
        return None
    from snella_app.report.updates import adapter_updates, deepest_query, draw_updates

    infos = {} if allocation is None else {matrix.name: matrix for matrix in allocation.matrices}
    source = adapter_updates(adapter, infos)
    if source is None or not source[0]:
        return None
    changed = [name for name in source[0] if (budgets or {}).get(name, 1) > 0]
    name = deepest_query(changed or list(source[0]))
    figure = draw_updates({"": source[1](name)}, name)
    return {"name": name, "figure": inline_svg(figure, "update", f"Update of {name}: increased and decreased weights.")}


def allocation_section(
    info: RunInfo, metrics: Metrics | None, allocation: Allocation | None, budgets: dict[str, int]
) -> dict[str, Any] | None:
    """Return the sparsity map, budgets and importance over time, and the table of matrices."""
    if allocation is None or not allocation.matrices:
        return None
    epochs = epochs_of_allocation(allocation, metrics, info.is_finished)
    grid = arrange(allocation.matrices, budgets)
    step = adapter_step(allocation, metrics)
    evolution = []
    if allocation.history:
        evolution = [
            inline_svg(
                budget_curve(allocation, epochs),
                "budget-total",
                f"Total budget over time, from {allocation.total_weights:,} to {allocation.target_budget:,}.",
            ),
            *(
                inline_svg(
                    budget_shares(allocation, epochs, by),
                    f"budget-{by}",
                    f"Share of each {by} in the total budget over time.",
                )
                for by in ("kind", "depth")
            ),
            inline_svg(
                frozen_curve(allocation, epochs),
                "budget-frozen",
                f"Number of frozen and full matrices over time; the saved adapter freezes {grid.frozen_count}.",
            ),
        ]
    trend = block_trend(allocation.matrices, budgets)
    importance = None
    if has_importance(allocation):
        importance = inline_svg(
            importance_curves(allocation, epochs),
            "importance-curves",
            f"Importance of {len(allocation.matrices)} matrices over time (log scale), with means by type.",
        )
    return {
        "map": inline_svg(
            sparsity_map(allocation.matrices, budgets),
            "sparsity-map",
            f"Sparsity of each matrix by block and type; {grid.frozen_count} of {len(allocation.matrices)} are frozen. "
            "Values are in the table of matrices.",
        ),
        "trend": trend and inline_svg(trend, "block-trend", "Sparsity of each block with its linear trend."),
        "budget": sum(budgets.values()),
        "total": allocation.total_weights,
        "frozen": [matrix.name for matrix in allocation.matrices if budgets[matrix.name] == 0],
        "evolution": evolution,
        "importance": importance,
        "rows": [
            {
                "matrix": matrix,
                "budget": budgets[matrix.name],
                "sparsity": 1 - budgets[matrix.name] / max(matrix.size, 1),
                "importance": math.nan if step is None else step.importance.get(matrix.name, math.nan),
            }
            for matrix in allocation.matrices
        ],
    }


def _class_predictions(folder: Path, info: RunInfo) -> Predictions | None:
    """Return the stored predictions of a nominal or ordinal classifier; None if absent."""
    if info.task not in ("classification", "ordinal"):
        return None
    predictions = read_if_present(Predictions, folder)
    return None if predictions is None or not predictions.for_classes(len(info.classes)).items else predictions


def examples_section(
    info: RunInfo, predictions: Predictions | None, images: ImageSource | None
) -> dict[str, Any] | None:
    """Return sample images with calibrated predictions, like those of `snella predict`."""
    if predictions is None:
        return None
    if info.calibration is not None:
        predictions = predictions.with_temperature(info.calibration.temperature)
    wrong, right = choose_examples(predictions.items)
    n_wrong = sum(not item.is_right for item in predictions.items)

    def shown(items: list[Prediction]) -> list[dict[str, Any]]:
        return [
            {
                "image": load_example(item, images),
                "predicted": info.classes[item.predicted],
                "label": info.classes[item.label],
            }
            for item in items
        ]

    return {
        "split": predictions.split_name,
        "groups": [
            {
                "title": "Wrong predictions",
                "note": f"{len(wrong)} of {n_wrong}, most confident first",
                "items": shown(wrong),
            },
            {
                "title": "Correct predictions",
                "note": f"{len(right)} of {len(predictions.items) - n_wrong}, evenly spaced",
                "items": shown(right),
            },
        ],
    }


def heat_maps_section(folder: Path, info: RunInfo, predictions: Predictions | None) -> list[dict[str, Any]]:
    """Return the heat maps that `snella explain RUN` wrote to the run, wrong predictions first."""
    items = {item.index: item for item in (predictions.items if predictions is not None else [])}
    entries = []
    for path in (folder / "heat_maps").glob("*.png"):
        item = items.get(int(path.stem)) if path.stem.isdigit() else None
        if item is not None:
            with open_image(path) as image:
                by = image.info["by"]
                uri, width, height = picture_uri(image, _LONGEST)
            names = {"predicted": info.classes[item.predicted], "label": info.classes[item.label]}
            entries.append({"item": item, "uri": uri, "width": width, "height": height, "by": by, **names})
    return sorted(entries, key=lambda entry: (entry["item"].is_right, -entry["item"].probability))


def _count_fact(label: str, count: int) -> Fact:
    """Return a count in short form, with the exact value as a note if they differ."""
    exact, short = f"{count:,}", count_text(count)
    return Fact(label, short, exact if exact != short else "")


_CONFUSED, _CONFUSED_IN_GROUP = 5, 3
_SHOWN_GROUPS = 30
_MERGED = {"segmentation": ("the whole model in one file", "model.safetensors")}
_PREDICTED = {
    "multilabel": "prediction.labels, prediction.probabilities",
    "regression": "prediction.values",
    "segmentation": "prediction.labels, prediction.shares",
}


@dataclass(frozen=True)
class Use:
    """Code blocks to copy for one use of a run."""

    title: str
    blocks: tuple[str, ...]
    note: str = ""


def uses(folder: Path, task: str) -> list[Use]:
    """Return command lines and Python code that use a run.

    Args:
        folder: Run folder.
        task: Task of the run.
    """
    run = shlex.quote(str(folder))
    merged, out = _MERGED.get(task, ("a folder that timm loads without snella", "model"))
    masks = " --out masks" if task == "segmentation" else ""
    shown = _PREDICTED.get(task, "prediction.label, prediction.probability")
    python = (
        f"import snella\n\nmodel = snella.load({str(folder)!r})\n"
        f"prediction = model.predict('photo.jpg')\nprint({shown})"
    )
    serve = (f"snella serve {run}", "curl -F files=@photo.jpg http://127.0.0.1:8000/predict")
    export = f"snella export {run} --format onnx --out model.onnx"
    return [
        Use("Predict", (f"snella predict {run} photo.jpg another.png{masks}",), "images, folders or tables of paths"),
        Use("Python", (python,)),
        Use("Serve over HTTP", serve, "needs pip install 'snella[serve]'; send requests from a second terminal"),
        Use("Export to ONNX", (export,), "needs pip install 'snella[export]'; other formats: snella export --help"),
        Use("Merge", (f"snella merge {run} --out {out}",), f"writes {merged}"),
        Use("Evaluate and inspect", (f"snella evaluate {run}\nsnella inspect {run}",)),
    ]


def write_report(
    run: str | Path,
    images: ImageSource | None = None,
    *,
    metrics: Metrics | None = None,
    allocation: Allocation | None = None,
    state: Literal["finished", "stopped"] | None = None,
) -> Path:
    """Atomically write `RUN/report.html` from the files of the run.

    Sections without data are omitted, e.g. budgets for a method that has none.

    Args:
        run: Run folder.
        images: Images of the split in `predictions.json` by index: a mapping, or a function like the validation set's
            `image`.
        metrics: Current metrics of an unfinished run, which has no `metrics.json` yet.
        allocation: Current allocation of an unfinished run, which has no `allocation.json` yet.
        state: Overrides the status `running` in the record: `stopped` if the process is gone, `finished` if the final
            results are written. None uses the recorded status.

    Returns:
        Path of the report.

    Raises:
        FileNotFoundError: If the folder has no `run.json`, or a finished run has no `metrics.json`.
        ValueError: If a file of the run is damaged.
    """
    folder = Path(run)
    info = read(RunInfo, folder)
    if state == "finished":
        info = replace(info, status="finished")
    metrics = metrics or (read(Metrics, folder) if info.is_finished else read_if_present(Metrics, folder))
    allocation = allocation or read_if_present(Allocation, folder)
    adapter = read_adapter(folder)
    budgets = current_budgets(adapter, allocation)
    compared = read_if_present(MethodResults, folder)
    comparison = None if compared is None else compared.rows
    config = folder / "config.yaml"
    class_predictions = _class_predictions(folder, info)
    context: dict[str, Any] = {
        "run": info,
        "state": "stopped" if state == "stopped" and info.status == "running" else info.status,
        "written": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "folder": str(folder),
        "quoted": shlex.quote(str(folder)),
        "metrics": metrics,
        "warning": _warning(metrics),
        "verdict": verdict_text(info, metrics),
        "results": results_section(metrics, baselines(info, metrics, comparison)),
        "facts": method_facts(metrics, allocation, budgets),
        "curves": curves_section(metrics),
        "confusion": confusion_section(info, metrics),
        "groups": groups_section(info, class_predictions),
        "calibration": calibration_section(info, class_predictions),
        "ranking": ranking_section(info, class_predictions),
        "allocation": allocation_section(info, metrics, allocation, budgets),
        "update": update_section(adapter, allocation, budgets),
        "comparison": comparison_section(comparison),
        "examples": examples_section(info, class_predictions, images),
        "heat_maps": heat_maps_section(folder, info, class_predictions),
        "classes": classes_section(metrics),
        "masks": masks_section(folder, info, images),
        "labels": targets.labels_section(folder, info, metrics, images),
        "numbers": targets.numbers_section(folder, info, metrics, images),
        "uses": [] if adapter is None else uses(folder, info.task),
        "config": config.read_text(encoding="utf-8") if config.is_file() else "",
        "measured": "test" if metrics is None else metrics.measured[0],
    }
    return write_page(folder, "snella_app.report", context)


def write_page(folder: Path, package: str, context: Mapping[str, Any], name: str = "report.html") -> Path:
    """Render a package's template in the report style and write it atomically.

    Args:
        folder: Output folder.
        package: Package with the template `{name}.jinja`.
        context: Template variables. `style`, `script` (copy buttons) and `script_digest` (hash that the content
            security policy allows) are added.
        name: File name of the page.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        {"count": count_text, "percent": percent_text, "seconds": seconds_text, "bytes": bytes_text},
        plain=plain_text,
        decimal=decimal_text,
        measure=measure_text,
        breakable=breakable,
    )
    template = resources.files(package).joinpath(f"{name}.jinja").read_text(encoding="utf-8")
    style, script = (
        resources.files("snella_app.report").joinpath(file).read_text(encoding="utf-8")
        for file in ("report.css", "report.js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = environment.from_string(template).render(
        context, style=Markup(style), script=Markup(script), script_digest=digest
    )
    write_atomically(folder / name, page.encode("utf-8", "backslashreplace"))
    return folder / name


def breakable(text: str) -> Markup:
    """Insert line-break opportunities after `:`, `/`, `_` and `.`."""
    return Markup(re.sub(r"([:/_.])", r"\1<wbr>", str(escape(text))))


def _warning(metrics: Metrics | None) -> str:
    """Return a caveat about the results, or an empty string."""
    if metrics is None or metrics.selected_on != "test":
        return ""
    return (
        f"Protocol {metrics.protocol}: the best epoch was selected on the test images. The test results are "
        "optimistic and not comparable with runs that selected on validation."
    )
