"""The HTML report of a run, a self-contained file."""

from __future__ import annotations

import math
import shlex
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.colors import to_hex

from snella._text import bytes_text, count_text, percent_text, plain_text, seconds_text
from snella.data.images import open_image
from snella.methods.defaults import PROBE_METHOD
from snella.records import (
    Allocation,
    LabelSetScores,
    MaskPredictions,
    MaskScores,
    MethodResult,
    MethodResults,
    Metrics,
    Prediction,
    Predictions,
    RegressionScores,
    RunInfo,
    Scores,
    read,
    read_if_present,
)
from snella.report import figures, targets
from snella.report.allocation import (
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
from snella.report.examples import ImageSource, choose_examples, load_example, load_picture, mask_colors, picture_uri
from snella.report.figures import calibration_section, ranking_section
from snella.report.inspect import AdapterFile, current_budgets, read_adapter
from snella.report.style import inline_svg, write_atomically

_LONGEST = 800


def classes_section(metrics: Metrics | None) -> dict[str, Any] | None:
    """Dice and IoU of each class, on the test split where there is one."""
    if metrics is None:
        return None
    split, scores = metrics.measured
    if not isinstance(scores, MaskScores):
        return None
    return {"split": split, "count": scores.images, "rows": scores.per_class}


def masks_section(folder: Path, info: RunInfo, images: ImageSource | None) -> dict[str, Any] | None:
    """Some images with true and predicted mask, the worst ones first."""
    if info.task != "segmentation":
        return None
    predictions = read_if_present(MaskPredictions, folder)
    shown = [] if predictions is None else [item for item in predictions.items if item.mask]
    if predictions is None or not shown:
        return None
    shown.sort(key=lambda item: (math.isnan(item.dice), item.dice))
    items = []
    for item in shown:
        uri, width, height, problem = load_picture(item.index, images, _LONGEST)
        picture = {"uri": uri, "width": width, "height": height, "problem": problem}
        items.append({"name": item.name, "dice": item.dice, "iou": item.iou, **picture})
    colors = mask_colors(len(info.classes)) / 255
    return {
        "split": predictions.split_name,
        "note": f"{len(items)} of {len(predictions.items)} images: the worst ones, then others evenly spread.",
        "legend": [
            {"name": name, "color": to_hex(color)} for name, color in zip(info.classes[1:], colors[1:], strict=True)
        ],
        "items": items,
    }


def results_section(
    metrics: Metrics | None, allocation: Allocation | None, budgets: dict[str, int]
) -> list[dict[str, str]]:
    """The numbers at the top: label, value, note."""
    if metrics is None:
        return []
    splits = (("test", metrics.test), ("validation", metrics.val))
    rows = [row for split, scores in splits if scores is not None for row in scores.rows(split)]
    if metrics.best_epoch is not None:
        rows.append(_kept_epoch(metrics))
    rows.append(_count_row("trainable parameters", metrics.trainable_parameters))
    if allocation is not None:
        kept, total = sum(budgets.values()), allocation.total_weights
        frozen = sum(budget == 0 for budget in budgets.values())
        note = (
            f"of {count_text(total)} ({percent_text(kept / max(total, 1))}), {len(budgets)} matrices, {frozen} frozen"
        )
        rows.append(("adapted weights kept", count_text(kept), note))
    elif metrics.adapted_weights:
        rows.append(_count_row("adapted weights", metrics.adapted_weights))
    rows.append(("adapter file", bytes_text(metrics.adapter_bytes), "to load on top of the backbone"))
    memory = "" if math.isnan(metrics.peak_rss_mib) else f"peak memory {bytes_text(metrics.peak_rss_mib * 2**20)}"
    rows.append(("training time", seconds_text(metrics.train_s), memory))
    return [{"label": label, "value": value, "note": note} for label, value, note in rows]


_SHORT_METRICS = {"map": "mAP", "mae": "MAE", "rmse": "RMSE", "r2": "R²"}


def _kept_epoch(metrics: Metrics) -> tuple[str, str, str]:
    """The epoch of the saved adapter, of how many, and its selection."""
    total = f"of {metrics.history[-1].epoch}" if metrics.history else ""
    average = "" if metrics.ema is None else f"; average of the weights, decay {metrics.ema:g}"
    if (averaged := metrics.averaged) is not None and averaged.is_saved:
        kind = "weights of {} (SWA)" if averaged.kind == "swa" else "a greedy soup of {}"
        offered = f"epochs {averaged.offered[0]} to {averaged.offered[-1]} {total}"
        return "averaged epochs", ", ".join(map(str, averaged.epochs)), kind.format(offered)
    if metrics.selected_on is None:
        return "epoch", str(metrics.best_epoch), f"{total}, the last, without selection{average}"
    split, _, metric = metrics.best_metric.partition("_")
    chosen_by = f"{'validation' if split == 'val' else split} {_SHORT_METRICS.get(metric, metric.replace('_', ' '))}"
    return "best epoch", str(metrics.best_epoch), (f"{total}, by {chosen_by}" if total else "") + average


def comparison_section(rows: list[MethodResult] | None) -> dict[str, Any] | None:
    """Accuracy and cost of several methods."""
    if not rows:
        return None
    accuracy = inline_svg(figures.comparison_bars(rows), "comparison-accuracy", "Accuracy of each method, as bars.")
    cost = inline_svg(figures.cost_bars(rows), "comparison-cost", "Training time of each method, as bars.")
    return {"rows": rows, "figures": [accuracy, cost]}


def curves_section(metrics: Metrics | None) -> list[Markup]:
    """Loss and accuracy over the epochs."""
    if metrics is None or not metrics.history:
        return []
    last = metrics.history[-1]
    return [
        inline_svg(
            figures.loss_curves(metrics),
            "curve-loss",
            f"Loss by epoch; in epoch {last.epoch}, the last: training {plain_text(last.train_loss)}, "
            f"{metrics.selection} {plain_text(last.val_loss)}.",
        ),
        *([] if metrics.selected_on is None else [_quality_curves(metrics)]),
    ]


_QUALITIES = {
    "dice": ("val_dice", "Dice"),
    "map": ("val_map", "mean average precision"),
    "kappa": ("val_kappa", "quadratic weighted kappa"),
    "error": ("val_mae", "mean absolute error"),
    "accuracy": ("val_accuracy", "accuracy"),
}
"""Names of `quality_curves`, an entry of an epoch's row that each needs, and what that is."""


def _quality_curves(metrics: Metrics) -> Markup:
    """What epochs are compared by, over the epochs: the first curves whose values the history has."""
    last = metrics.history[-1]
    measured = (
        name
        for name, (entry, _) in _QUALITIES.items()
        if any(not math.isnan(getattr(r, entry)) for r in metrics.history)
    )
    name = next(measured, "accuracy")
    entry, what = _QUALITIES[name]
    text = (percent_text if name in figures.SHARES else plain_text)(getattr(last, entry))
    return inline_svg(
        figures.quality_curves(metrics, name),
        f"curve-{name}",
        f"{metrics.selection.capitalize()} {what} by epoch; in the last, epoch {last.epoch}: {text}.",
    )


def confusion_section(info: RunInfo, metrics: Metrics | None) -> dict[str, Any] | None:
    """Confusion matrix and the numbers of each class, on the test split where there is one."""
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
            f"Confusion matrix of {len(info.classes)} classes on the {split} images; the table below has the numbers.",
        ),
        "rows": sorted(_class_rows(info, scores), key=lambda row: (math.isnan(row["recall"]), row["recall"])),
        "pairs": _confused_pairs(info, scores),
    }


def groups_section(info: RunInfo, predictions: Predictions | None) -> dict[str, Any] | None:
    """Confusion by group (patient, site, video), the least recognized first; None where the data has no groups."""
    by_group: dict[str, list[Prediction]] = {}
    for item in predictions.items if predictions is not None else []:
        if item.group is not None:
            by_group.setdefault(item.group, []).append(item)
    if predictions is None or len(by_group) < 2:
        return None
    rows: list[dict[str, Any]] = []
    for name, items in by_group.items():
        taken = Counter((item.label, item.predicted) for item in items if not item.is_right)
        most = [
            f"{info.classes[label]} → {info.classes[predicted]} {count:,}"
            for (label, predicted), count in taken.most_common(_CONFUSED_IN_GROUP)
        ]
        share = sum(item.is_right for item in items) / len(items)
        rows.append({"name": name, "images": len(items), "right": share, "confused": ", ".join(most)})
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


def verdict_text(info: RunInfo, metrics: Metrics | None, comparison: list[MethodResult] | None) -> str:
    """The result in a sentence, beside what would be reached without the run; empty for a segmentation.

    For classes the baselines are the class that is most frequent in the measured images, and a linear probe where one
    was compared.
    """
    if metrics is None:
        return ""
    split, scores = metrics.measured
    if isinstance(scores, LabelSetScores):
        return targets.label_set_verdict(scores, split)
    if isinstance(scores, RegressionScores):
        return targets.regression_verdict(scores, split)
    if not isinstance(scores, Scores) or not scores.confusion:
        return ""
    sizes = [sum(row) for row in scores.confusion]
    right, total = sum(row[i] for i, row in enumerate(scores.confusion)), sum(sizes)
    most = max(range(len(sizes)), key=sizes.__getitem__)
    frequent = sizes[most] / total
    text = f"{right:,} of {total:,} {split} images are recognized ({percent_text(right / total)}). "
    baseline = f"Always answering {info.classes[most]!r}, the most frequent class, gets {percent_text(frequent)}"
    probe = next((row for row in comparison or [] if row.method == PROBE_METHOD), None)
    if probe is not None:
        baseline += f", a linear probe {percent_text(probe.accuracy)}"
    spread = math.sqrt(max(right * (total - right), 0) / total**3)  # standard error of a share
    if right / total - frequent <= 2 * spread:
        balanced, balanced_spread = _balanced_accuracy(scores.confusion)
        one_answer = 1 / sum(size > 0 for size in sizes)
        if balanced - one_answer > 2 * balanced_spread:
            return (
                f"{text}{baseline}, and {percent_text(one_answer)} of the balanced accuracy, in which each class "
                f"counts the same; here that is {percent_text(balanced)}, ±{100 * 2 * balanced_spread:.1f} points (two "
                "standard errors)."
            )
        return f"{text}{baseline}: nothing is shown to have been learned."
    error = f"{100 * 2 * spread:.1f}"
    return f"{text}{baseline}. With that many images the result is certain to ±{error} points (two standard errors)."


def _balanced_accuracy(confusion: Sequence[Sequence[int]]) -> tuple[float, float]:
    """The mean share of each class that is recognized, and its standard error, that of shares with two images more."""
    found = [(row[i], sum(row)) for i, row in enumerate(confusion) if sum(row)]
    smoothed = [((right + 1) / (size + 2), size + 2) for right, size in found]
    variance = sum(share * (1 - share) / size for share, size in smoothed) / len(found) ** 2
    return sum(right / size for right, size in found) / len(found), math.sqrt(variance)


def _confused_pairs(info: RunInfo, scores: Scores) -> list[dict[str, Any]]:
    """The classes that are most often taken for another, with how many of their images."""
    pairs: list[dict[str, Any]] = [
        {"label": info.classes[i], "predicted": info.classes[j], "count": count, "images": sum(row)}
        for i, row in enumerate(scores.confusion)
        for j, count in enumerate(row)
        if i != j and count
    ]
    return sorted(pairs, key=lambda pair: -pair["count"])[:_CONFUSED]


def _class_rows(info: RunInfo, scores: Scores) -> list[dict[str, Any]]:
    """Images, recall and precision of each class."""
    rows = []
    for i, name in enumerate(info.classes):
        images, taken = sum(scores.confusion[i]), sum(row[i] for row in scores.confusion)
        hits = scores.confusion[i][i]
        recall, precision = (hits / n if n else math.nan for n in (images, taken))
        rows.append({"name": name, "images": images, "recall": recall, "precision": precision})
    return rows


def update_section(
    adapter: AdapterFile | None, allocation: Allocation | None, budgets: Mapping[str, int] | None = None
) -> dict[str, Any] | None:
    """The update of the deepest query projection, of those with a budget; None where the adapter holds no updates."""
    if adapter is None:
        return None
    from snella.report.updates import adapter_updates, deepest_query, draw_updates

    infos = {} if allocation is None else {matrix.name: matrix for matrix in allocation.matrices}
    source = adapter_updates(adapter, infos)
    if source is None or not source[0]:
        return None
    changed = [name for name in source[0] if (budgets or {}).get(name, 1) > 0]
    name = deepest_query(changed or list(source[0]))
    figure = draw_updates({"": source[1](name)}, name)
    return {"name": name, "figure": inline_svg(figure, "update", f"Update of {name}, increased and decreased weights.")}


def allocation_section(
    info: RunInfo, metrics: Metrics | None, allocation: Allocation | None, budgets: dict[str, int]
) -> dict[str, Any] | None:
    """Sparsity map, evolution of budgets and importance, table of matrices."""
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
                f"Number of frozen and full matrices over time; {grid.frozen_count} are frozen in the saved adapter.",
            ),
        ]
    trend = block_trend(allocation.matrices, budgets)
    importance = None
    if has_importance(allocation):
        importance = inline_svg(
            importance_curves(allocation, epochs),
            "importance-curves",
            f"Importance of {len(allocation.matrices)} matrices over time, logarithmic, with the mean of each kind.",
        )
    return {
        "map": inline_svg(
            sparsity_map(allocation.matrices, budgets),
            "sparsity-map",
            f"Sparsity of each matrix by block and kind; {grid.frozen_count} of {len(allocation.matrices)} are frozen. "
            "The table of matrices has the numbers.",
        ),
        "trend": trend and inline_svg(trend, "block-trend", "Sparsity of each block, and its linear trend."),
        "kept": sum(budgets.values()),
        "total": allocation.total_weights,
        "frozen": [matrix.name for matrix in allocation.matrices if budgets[matrix.name] == 0],
        "evolution": evolution,
        "importance": importance,
        "counted": any(matrix.nonzeros is not None for matrix in allocation.matrices),
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
    """The stored predictions of a classifier, of ordered classes too; None where there are none."""
    if info.task not in ("classification", "ordinal"):
        return None
    predictions = read_if_present(Predictions, folder)
    return None if predictions is None or not predictions.for_classes(len(info.classes)).items else predictions


def examples_section(
    info: RunInfo, predictions: Predictions | None, images: ImageSource | None
) -> dict[str, Any] | None:
    """Some images with their predictions, whose probabilities are those that predict gives."""
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
                "title": "Wrong",
                "note": f"{len(wrong)} of {n_wrong} wrong predictions, the most confident first",
                "items": shown(wrong),
            },
            {
                "title": "Right",
                "note": f"{len(right)} of {len(predictions.items) - n_wrong} right predictions, evenly spread",
                "items": shown(right),
            },
        ],
    }


def heat_maps_section(folder: Path, info: RunInfo, predictions: Predictions | None) -> list[dict[str, Any]]:
    """The heat maps that `snella explain RUN` left in the run, wrong predictions first."""
    items = {item.index: item for item in (predictions.items if predictions is not None else [])}
    found = []
    for path in (folder / "heat_maps").glob("*.png"):
        item = items.get(int(path.stem)) if path.stem.isdigit() else None
        if item is not None:
            with open_image(path) as image:
                by = image.info.get("by", "gradcam")
                uri, width, height = picture_uri(image, _LONGEST)
            names = {"predicted": info.classes[item.predicted], "label": info.classes[item.label]}
            found.append({"item": item, "uri": uri, "width": width, "height": height, "by": by, **names})
    return sorted(found, key=lambda entry: (entry["item"].is_right, -entry["item"].probability))


def _count_row(label: str, count: int) -> tuple[str, str, str]:
    """A count in short, and with all its digits where the short form lacks some."""
    exact, short = f"{count:,}", count_text(count)
    return label, short, exact if exact != short else ""


_CONFUSED, _CONFUSED_IN_GROUP = 5, 3
_SHOWN_GROUPS = 30
_USES = {
    "classification": ("Classify images", "photo.jpg another.png", "Write a plain timm model", "model"),
    "ordinal": ("Classify images", "photo.jpg another.png", "Write a plain timm model", "model"),
    "multilabel": ("Label images", "photo.jpg another.png", "Write a plain timm model", "model"),
    "regression": ("Predict the numbers of images", "photo.jpg another.png", "Write a plain timm model", "model"),
    "segmentation": (
        "Segment images: masks and overlays",
        "photo.jpg another.png --out masks",
        "Write the whole model with the update folded in",
        "model.safetensors",
    ),
}
"""How a run of each task is used: what `predict` does, its arguments, what `merge` gives, and its `--out`."""


def write_report(
    run: str | Path,
    images: ImageSource | None = None,
    *,
    metrics: Metrics | None = None,
    allocation: Allocation | None = None,
    has_stopped: bool = False,
) -> Path:
    """Write `RUN/report.html` from the files of the run atomically.

    Sections without material (budgets of a method that has none, results of a run that has only begun) are left out.

    Args:
        run: Folder of the run.
        images: Pictures of the split in `predictions.json`, by index: a mapping, or a function such as the
            validation set's `image`.
        metrics: Of a run that is going on, which has no `metrics.json` yet: its results so far.
        allocation: The same of `allocation.json`.
        has_stopped: Whether a run whose record says that it is running has no process any more.

    Returns:
        Path of the page.

    Raises:
        FileNotFoundError: The folder holds no `run.json`, or the run is finished and has no `metrics.json`.
        ValueError: A file of the run is damaged.
    """
    folder = Path(run)
    info = read(RunInfo, folder)
    metrics = metrics or (read(Metrics, folder) if info.is_finished else read_if_present(Metrics, folder))
    allocation = allocation or read_if_present(Allocation, folder)
    adapter = read_adapter(folder)
    budgets = current_budgets(adapter, allocation, metrics)
    compared = read_if_present(MethodResults, folder)
    comparison = None if compared is None else compared.rows
    config = folder / "config.yaml"
    class_predictions = _class_predictions(folder, info)
    context: dict[str, Any] = {
        "run": info,
        "state": "stopped" if has_stopped and info.status == "running" else info.status,
        "written": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "folder": str(folder),
        "quoted": shlex.quote(str(folder)),
        "metrics": metrics,
        "warning": _warning(metrics),
        "verdict": verdict_text(info, metrics, comparison),
        "results": results_section(metrics, allocation, budgets),
        "curves": curves_section(metrics),
        "confusion": confusion_section(info, metrics),
        "groups": groups_section(info, class_predictions),
        "calibration": calibration_section(info, class_predictions),
        "ranking": ranking_section(info, class_predictions),
        "allocation": allocation_section(info, metrics, allocation, budgets),
        "update": update_section(adapter, allocation, budgets),
        "has_adapter": adapter is not None,
        "comparison": comparison_section(comparison),
        "examples": examples_section(info, class_predictions, images),
        "heat_maps": heat_maps_section(folder, info, class_predictions),
        "classes": classes_section(metrics),
        "masks": masks_section(folder, info, images),
        "labels": targets.labels_section(folder, info, metrics, images),
        "numbers": targets.numbers_section(folder, info, metrics, images),
        "use": _USES.get(info.task, _USES["classification"]),
        "config": config.read_text(encoding="utf-8") if config.is_file() else "",
        "test_name": "test" if metrics is None or metrics.test else "validation",
    }
    return write_page(folder, "snella.report", context)


def write_page(folder: Path, package: str, context: Mapping[str, Any]) -> Path:
    """Write `report.html` in a folder atomically: a package's template of that name, in the style of all reports."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        count=count_text, percent=percent_text, seconds=seconds_text, bytes=bytes_text, plain=plain_text
    )
    template = resources.files(package).joinpath("report.html.jinja").read_text(encoding="utf-8")
    style = resources.files("snella.report").joinpath("report.css").read_text(encoding="utf-8")
    page = environment.from_string(template).render(context, style=Markup(style))
    write_atomically(folder / "report.html", page.encode("utf-8", "backslashreplace"))
    return folder / "report.html"


def _warning(metrics: Metrics | None) -> str:
    """Caveat about the results; empty for none."""
    if metrics is None or metrics.selected_on != "test":
        return ""
    return (
        f"Protocol {metrics.protocol}: the best epoch was selected on the test images: the test results are "
        "optimistic, and not comparable with those of runs that selected on validation."
    )
