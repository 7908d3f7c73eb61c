"""Self-contained HTML report of a run.

The `*_section` functions return the template variables of one section. The template omits a section whose variables are
None or empty. The budget of a matrix is the number of weights that its update may change; a matrix with budget 0 is
frozen.
"""

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

from snella_app.data.images import DECODING_ERRORS, open_image
from snella_app.files import write_bytes
from snella_app.methods.defaults import PROBE_METHOD
from snella_app.records.generators import MethodResult, MethodResults
from snella_app.records.predictions import Predictions, StoredPrediction
from snella_app.records.record import read, read_if_present
from snella_app.records.results import LabelSetScores, OrdinalScores, RegressionScores, Scores
from snella_app.records.run import Allocation, Metrics, RunInfo
from snella_app.report import figures, targets
from snella_app.report.allocation import (
    adapter_step,
    block_trend,
    budget_curve,
    budget_shares,
    frozen_curve,
    group_matrices,
    has_importance,
    importance_curves,
    schedule_epochs,
    sparsity_map,
)
from snella_app.report.examples import EmbeddedImage, ImageLoader, choose_examples, embed_image, image_data_uri
from snella_app.report.inspect import AdapterFile, current_budgets, read_adapter
from snella_app.report.style import inline_svg
from snella_app.report.updates import adapter_updates, deepest_query, draw_updates
from snella_app.text import (
    bytes_text,
    count_text,
    decimal_text,
    first_line,
    margin_text,
    measure_text,
    percent_text,
    plain_text,
    seconds_text,
)

_MAX_SIDE = 800  # maximum width and height of an embedded heat map, in pixels
_CONFUSED_IN_GROUP = 3  # maximum number of confused class pairs listed for a group
_SHOWN_GROUPS = 30  # maximum number of groups listed
_PREDICTION_FIELDS = {
    "multilabel": "prediction.labels, prediction.probabilities",
    "regression": "prediction.values",
    "segmentation": "prediction.labels, prediction.shares",
}
"""Attributes of a prediction that the Python example prints, by task; other tasks predict one class."""
_SHORT_METRICS = {"map": "mAP", "mae": "MAE", "rmse": "RMSE", "r2": "R²"}
_RESULTS = ("warning", "verdict", "results", "facts", "curves", "confusion", "classes", "labels", "numbers")
"""Variables of the sections that show metrics. These sections are omitted before the first epoch."""
_OPTIMISTIC = (
    "Protocol {}: the best epoch was selected on the test images. The test results are optimistic and not comparable "
    "with runs that select on the validation images."
)
_ONLY_VALIDATION = (
    "The model was selected on the validation images, so these results are optimistic. Add test images for an unbiased "
    "result."
)
Fact = tuple[str, str, str]
"""Label, value, and note of a number in the report."""


def results_section(metrics: Metrics, marks: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """Return the main score, the scale that it is drawn on, the other scores, and facts about the adapter.

    The main score is from the test split, or from the validation split if there is no test split.

    Args:
        metrics: Metrics of the run.
        marks: Baselines to mark on the scale, as `(name, accuracy)`.
    """
    splits = (("test", metrics.test), ("validation", metrics.val))
    facts = [row for split, scores in splits if scores is not None for row in scores.rows(split)]
    scale: dict[str, Any] | None = None
    scores = metrics.measured[1]
    if isinstance(scores, Scores) and not isinstance(scores, OrdinalScores) and scores.images:
        low = max(scores.accuracy - scores.margin, 0.0)
        high = min(scores.accuracy + scores.margin, 1.0)
        scale = {"value": scores.accuracy, "low": low, "high": high, "marks": marks}
    adapter: list[str] = []
    if metrics.best_epoch is not None:
        adapter.append(_saved_epoch(metrics))
    if not math.isnan(metrics.train_s):
        adapter.append(f"trained in {seconds_text(metrics.train_s)}")
    if metrics.adapter_bytes:
        adapter.append(f"adapter file {bytes_text(metrics.adapter_bytes)}")
    return {
        "hero": facts[0] if facts else None,
        "scale": scale,
        "others": facts[1:],
        "adapter": " · ".join(adapter),
    }


def method_facts(
    info: RunInfo, metrics: Metrics, allocation: Allocation | None, budgets: Mapping[str, int]
) -> list[Fact]:
    """Return the trainable parameters, the budget, the final head, and the memory, as far as they are known."""
    facts = [_count_fact("trainable parameters", metrics.trainable_parameters)]
    if allocation is not None:
        total_budget = sum(budgets.values())
        total = allocation.total_weights
        frozen = sum(budget == 0 for budget in budgets.values())
        share = percent_text(total_budget / max(total, 1))
        note = f"of {count_text(total)} adapted weights ({share}), {len(budgets)} matrices, {frozen} frozen"
        facts.append(("budget", count_text(total_budget), note))
    elif metrics.adapted_weights:
        facts.append(_count_fact("adapted weights", metrics.adapted_weights))
    if (head := metrics.final_head) is not None:
        value = f"{len(head.layers)} layers" if head.is_saved else "trained"
        note = f"{head.name}: {head.comparison}" if head.comparison else head.name
        facts.append(("final head", value, note))
    if info.step_memory is not None:
        facts.append(("memory of a training step", bytes_text(info.step_memory), "estimate, per process"))
    if not math.isnan(metrics.peak_rss_mib):
        facts.append(("peak memory", bytes_text(metrics.peak_rss_mib * 2**20), "of the training process"))
    return facts


def _selection_warning(metrics: Metrics) -> str:
    """Return a warning if the main scores come from the images used for epoch selection, or an empty string."""
    if metrics.selected_on == "test":
        return _OPTIMISTIC.format(metrics.protocol)
    is_only_split = metrics.selected_on == "val" and metrics.test is None and metrics.val is not None
    return _ONLY_VALIDATION if is_only_split else ""


def _saved_epoch(metrics: Metrics) -> str:
    """Describe which epoch, or average of epochs, the saved adapter comes from and how it was selected."""
    total = f" of {metrics.history[-1].epoch}" if metrics.history else ""
    if (averaged := metrics.averaged) is not None and averaged.is_saved:
        epochs = ", ".join(map(str, averaged.epochs))
        kind = "SWA over" if averaged.kind == "swa" else "greedy soup of"
        return f"averaged epochs {epochs} ({kind} epochs {averaged.offered[0]} to {averaged.offered[-1]}{total})"
    average = "" if metrics.ema is None else f"; average of the weights, decay {metrics.ema:g}"
    if metrics.selected_on is None:
        return f"epoch {metrics.best_epoch}{total}, last epoch, no selection{average}"
    if metrics.replaces_best_epoch:
        return f"epoch {metrics.best_epoch}{total}, the last, with the final head fitted to its features{average}"
    metric = metrics.best_metric.partition("_")[2]
    metric = _SHORT_METRICS.get(metric, metric.replace("_", " "))
    return f"best epoch {metrics.best_epoch}{total}, by {metrics.selection} {metric}{average}"


def groups_section(info: RunInfo, predictions: Predictions) -> dict[str, Any] | None:
    """Return the accuracy of each group of images (such as a patient, site, or video), lowest first.

    Returns None for fewer than two groups. If there are more than 30 groups, only the 30 with the lowest accuracy are
    listed. Groups without wrong predictions are then omitted as well, unless no group has wrong predictions.
    """
    by_group: dict[str, list[StoredPrediction]] = {}
    for item in predictions.items:
        if item.group is not None:
            by_group.setdefault(item.group, []).append(item)
    if len(by_group) < 2:
        return None
    rows: list[dict[str, Any]] = []
    for name, items in by_group.items():
        confused = Counter((item.label, item.predicted) for item in items if not item.is_correct)
        frequent = [
            f"{info.classes[label]} → {info.classes[predicted]} {count:,}"
            for (label, predicted), count in confused.most_common(_CONFUSED_IN_GROUP)
        ]
        share = sum(item.is_correct for item in items) / len(items)
        rows.append({"name": name, "images": len(items), "right": share, "confused": ", ".join(frequent)})
    rows.sort(key=lambda row: (row["right"], -row["images"], row["name"]))
    shares = [float(row["right"]) for row in rows]
    shown = rows
    if len(rows) > _SHOWN_GROUPS:
        lowest = rows[:_SHOWN_GROUPS]
        shown = [row for row in lowest if row["right"] < 1] or lowest
    return {
        "split": predictions.split_name,
        "count": len(rows),
        "mean": sum(shares) / len(shares),
        "rows": shown,
        "has_errors_elsewhere": len(rows) > len(shown) and rows[len(shown)]["right"] < 1,
    }


def baselines(info: RunInfo, metrics: Metrics, comparison: Sequence[MethodResult]) -> list[tuple[str, float]]:
    """Return accuracy baselines, `(name, accuracy)`: the most frequent class, and the linear probe if it was compared.

    The list is empty for tasks without an accuracy.
    """
    scores = metrics.measured[1]
    if not isinstance(scores, Scores) or not scores.images:
        return []
    majority, share = _most_frequent(scores)
    marks = [(f"always {info.classes[majority]!r}", share)]
    probe = next((row for row in comparison if row.method == PROBE_METHOD), None)
    if probe is not None and not math.isnan(probe.accuracy):
        marks.append(("linear probe", probe.accuracy))
    return marks


def _most_frequent(scores: Scores) -> tuple[int, float]:
    """Return the most frequent class and its share of the images."""
    sizes = [sum(row) for row in scores.confusion]
    majority = max(range(len(sizes)), key=sizes.__getitem__)
    return majority, sizes[majority] / scores.images


def verdict_text(info: RunInfo, metrics: Metrics) -> str:
    """Describe the result relative to a baseline. The text is empty for segmentation or if there are no scores."""
    split, scores = metrics.measured
    if isinstance(scores, LabelSetScores):
        return targets.label_set_verdict(scores, split)
    if isinstance(scores, RegressionScores):
        return targets.regression_verdict(scores, split)
    if not isinstance(scores, Scores) or not scores.images:
        return ""
    correct = sum(row[i] for i, row in enumerate(scores.confusion))
    total = scores.images
    majority, baseline = _most_frequent(scores)
    text = (
        f"{correct:,} of {total:,} {split} images are classified correctly. Always predicting "
        f"{info.classes[majority]!r}, the most frequent class, scores {percent_text(baseline)}"
    )
    if correct / total - baseline > scores.margin:
        return f"{text}."
    recalls = [row[i] / sum(row) for i, row in enumerate(scores.confusion) if sum(row)]
    balanced = sum(recalls) / len(recalls)
    chance = 1 / len(recalls)  # balanced accuracy of always predicting the same class
    if balanced - chance > scores.balanced_margin:
        return (
            f"{text}, but its balanced accuracy, which weights all classes equally, is {percent_text(chance)}; "
            f"this model's is {percent_text(balanced)} ({margin_text(scores.balanced_margin)})."
        )
    return f"{text}. The model does not exceed this by more than the 95% margin; there is no evidence of learning."


def update_section(
    adapter: AdapterFile | None, allocation: Allocation | None, budgets: Mapping[str, int] | None = None
) -> dict[str, Any] | None:
    """Return the update of the deepest query projection, or of the last matrix if there is no query projection.

    Frozen matrices are considered only if all matrices are frozen. Returns None if `adapter_updates` finds no update.
    """
    infos = {} if allocation is None else {matrix.name: matrix for matrix in allocation.matrices}
    source = None if adapter is None else adapter_updates(adapter, infos)
    if source is None:
        return None
    shapes, compute_update = source
    if not shapes:
        return None
    # a matrix without a known budget counts as not frozen
    changed = [name for name in shapes if (budgets or {}).get(name, 1) > 0]
    name = deepest_query(changed or list(shapes))
    figure = draw_updates({"": compute_update(name)}, name)
    return {"name": name, "figure": inline_svg(figure, "update", f"Update of {name}: increased and decreased weights.")}


def allocation_section(
    info: RunInfo, metrics: Metrics | None, allocation: Allocation | None, budgets: dict[str, int]
) -> dict[str, Any] | None:
    """Return the sparsity map, the budgets and the importance over time, and the table of matrices.

    Returns None for methods without budgets.
    """
    if allocation is None or not allocation.matrices:
        return None
    epochs = schedule_epochs(allocation, metrics, info.is_finished)
    grid = group_matrices(allocation.matrices, budgets)
    step = adapter_step(allocation, metrics)
    evolution = []
    if allocation.history:
        total = f"from {allocation.history[0].budget:,} to {allocation.history[-1].budget:,}"
        frozen = f"the saved adapter freezes {grid.frozen_count}"
        type_shares = budget_shares(allocation, epochs)
        block_shares = budget_shares(allocation, epochs, by_block=True)
        evolution = [
            inline_svg(budget_curve(allocation, epochs), "budget-total", f"Total budget over time, {total}."),
            inline_svg(type_shares, "budget-kind", "Share of the total budget by matrix type over time."),
            inline_svg(block_shares, "budget-depth", "Share of the total budget by block over time."),
            inline_svg(
                frozen_curve(allocation, epochs),
                "budget-frozen",
                f"Number of matrices with zero budget (frozen) and with full budget over time; {frozen}.",
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
    matrix_map = inline_svg(
        sparsity_map(allocation.matrices, budgets),
        "sparsity-map",
        f"Sparsity of each matrix by block and type; {grid.frozen_count} of {len(allocation.matrices)} are frozen. "
        "Values are in the table of matrices.",
    )
    trend_svg = None
    if trend is not None:
        trend_svg = inline_svg(trend, "block-trend", "Sparsity of each block with its linear trend.")
    importance_by_name = {} if step is None else step.importance
    rows: list[dict[str, Any]] = []
    for matrix in allocation.matrices:
        budget = budgets[matrix.name]
        rows.append(
            {
                "matrix": matrix,
                "budget": budget,
                "sparsity": 1 - budget / max(matrix.size, 1),
                "importance": importance_by_name.get(matrix.name, math.nan),
            }
        )
    return {
        "map": matrix_map,
        "trend": trend_svg,
        "budget": sum(budgets.values()),
        "total": allocation.total_weights,
        "frozen": [matrix.name for matrix in allocation.matrices if budgets[matrix.name] == 0],
        "evolution": evolution,
        "importance": importance,
        "rows": rows,
    }


def _class_predictions(folder: Path, info: RunInfo) -> Predictions:
    """Return the stored class predictions of a run, or empty predictions if it has none."""
    is_classifier = info.task in ("classification", "ordinal")
    predictions = read_if_present(Predictions, folder) if is_classifier else None
    return Predictions(items=[]) if predictions is None else predictions.for_classes(len(info.classes))


def examples_section(info: RunInfo, predictions: Predictions, images: ImageLoader | None) -> dict[str, Any] | None:
    """Return sample images with calibrated predictions, as in `snella predict`, or None if there are no predictions."""
    if not predictions.items:
        return None
    if info.calibration is not None:
        predictions = predictions.with_temperature(info.calibration.temperature)
    wrong, correct = choose_examples(predictions.items)
    n_correct = sum(item.is_correct for item in predictions.items)
    n_wrong = len(predictions.items) - n_correct

    def example(item: StoredPrediction) -> dict[str, Any]:
        return {
            "name": item.name,
            "picture": embed_image(item.index, images),
            "is_correct": item.is_correct,
            "predicted": info.classes[item.predicted],
            "probability": item.probability,
            "label": info.classes[item.label],
            "label_probability": item.probabilities[item.label],
        }

    groups = (
        ("Wrong predictions", f"{len(wrong)} of {n_wrong}, most confident first", wrong),
        ("Correct predictions", f"{len(correct)} of {n_correct}, evenly spaced", correct),
    )
    return {
        "split": predictions.split_name,
        "groups": [{"title": title, "note": note, "items": list(map(example, items))} for title, note, items in groups],
    }


def heat_maps_section(folder: Path, info: RunInfo, predictions: Predictions) -> list[dict[str, Any]]:
    """Return the heat maps that `snella explain RUN` wrote to the run, wrong predictions first.

    Raises:
        ValueError: If a heat map cannot be read.
    """
    entries = []
    for item in sorted(predictions.items, key=lambda item: (item.is_correct, -item.probability)):
        path = folder / "heat_maps" / f"{item.index}.png"
        if path.is_file():
            try:
                with open_image(path) as image:
                    picture = EmbeddedImage(*image_data_uri(image, _MAX_SIDE))
                    by = image.info.get("by", "gradcam")
                    is_blank = "blank" in image.info
            except DECODING_ERRORS as error:
                reason = first_line(error)
                raise ValueError(f"{path} is damaged: {reason}; delete it, or run `snella explain` again") from error
            names = {"predicted": info.classes[item.predicted], "label": info.classes[item.label]}
            entries.append({"item": item, "picture": picture, "by": by, "is_blank": is_blank, **names})
    return entries


def _count_fact(label: str, count: int) -> Fact:
    """Return an abbreviated count as a fact. If the count is rounded, the note contains the exact value."""
    exact = f"{count:,}"
    short = count_text(count)
    return label, short, exact if exact != short else ""


@dataclass(frozen=True)
class Use:
    """Copyable code blocks for one use of a run."""

    title: str
    blocks: tuple[str, ...]
    note: str = ""


def uses(folder: Path, task: str, method: str) -> list[Use]:
    """Return command lines and Python code for using a run.

    Args:
        folder: Run folder.
        task: Task of the run.
        method: Method of the run. If it cannot be merged, `snella merge` is omitted.
    """
    from snella_app.methods.registry import can_merge  # lazy: imports the methods of other packages

    run = shlex.quote(str(folder))
    mask_option = ""
    merge_output = "a folder that timm loads without snella"
    merge_path = "model"
    if task == "segmentation":
        mask_option = " --out masks"
        merge_output = "the whole model in one file"
        merge_path = "model.safetensors"
    fields = _PREDICTION_FIELDS.get(task, "prediction.label, prediction.probability")
    python = (
        f"import snella\n\nmodel = snella.load({str(folder)!r})\n"
        f"prediction = model.predict('photo.jpg')\nprint({fields})"
    )
    serve = (f"snella serve {run}", "curl -F files=@photo.jpg http://127.0.0.1:8000/predict")
    export = f"snella export {run} --format onnx --out model.onnx"
    predict = f"snella predict {run} photo.jpg another.png{mask_option}"
    entries = [
        Use("Predict", (predict,), "images, folders or tables of paths"),
        Use("Python", (python,)),
        Use("Serve over HTTP", serve, "requires pip install 'snella[serve]'; send requests from a second terminal"),
        Use("Export to ONNX", (export,), "requires pip install 'snella[export]'; other formats: snella export --help"),
    ]
    if can_merge(method):
        entries.append(Use("Merge", (f"snella merge {run} --out {merge_path}",), f"writes {merge_output}"))
    entries.append(Use("Evaluate and inspect", (f"snella evaluate {run}\nsnella inspect {run}",)))
    return entries


def write_report(
    run: str | Path,
    images: ImageLoader | None = None,
    *,
    metrics: Metrics | None = None,
    allocation: Allocation | None = None,
    state: Literal["finished", "stopped"] | None = None,
) -> Path:
    """Atomically write `RUN/report.html` from the files of the run.

    Sections without data are omitted, such as the budgets of a method that has none.

    Args:
        run: Run folder.
        images: Function that returns an image of the split in `predictions.json` by index, e.g. the method `image` of
            its dataset. None if the images are not available.
        metrics: Current metrics of an unfinished run, which has no `metrics.json` yet.
        allocation: Current allocation of an unfinished run, which has no `allocation.json` yet.
        state: Overrides the recorded status `running`: `stopped` if the process was killed, `finished` once the final
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
    if metrics is None:
        metrics = read(Metrics, folder) if info.is_finished else read_if_present(Metrics, folder)
    if allocation is None:
        allocation = read_if_present(Allocation, folder)
    adapter = read_adapter(folder)
    budgets = current_budgets(adapter, allocation)
    compared = read_if_present(MethodResults, folder)
    comparison = [] if compared is None else compared.rows
    config_file = folder / "config.yaml"
    class_predictions = _class_predictions(folder, info)
    results: dict[str, Any] = dict.fromkeys(_RESULTS)
    if metrics is not None:
        results |= {
            "warning": _selection_warning(metrics),
            "verdict": verdict_text(info, metrics),
            "results": results_section(metrics, baselines(info, metrics, comparison)),
            "facts": method_facts(info, metrics, allocation, budgets),
            "curves": figures.curves_section(metrics),
            "confusion": figures.confusion_section(info, metrics),
            "classes": targets.classes_section(metrics),
            "labels": targets.labels_section(folder, info, metrics, images),
            "numbers": targets.numbers_section(folder, info, metrics, images),
        }
    is_stopped = state == "stopped" and info.status == "running"
    context = {
        **results,
        "run": info,
        "state": "stopped" if is_stopped else info.status,
        "written": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "folder": str(folder),
        "quoted": shlex.quote(str(folder)),
        "metrics": metrics,
        "measured": "test" if metrics is None else metrics.measured[0],
        "groups": groups_section(info, class_predictions),
        "calibration": figures.calibration_section(info, class_predictions),
        "ranking": figures.ranking_section(info, class_predictions),
        "allocation": allocation_section(info, metrics, allocation, budgets),
        "update": update_section(adapter, allocation, budgets),
        "comparison": figures.comparison_section(comparison),
        "examples": examples_section(info, class_predictions, images),
        "heat_maps": heat_maps_section(folder, info, class_predictions),
        "masks": targets.masks_section(folder, info, images),
        "uses": [] if adapter is None else uses(folder, info.task, info.method),
        "config": config_file.read_text(encoding="utf-8") if config_file.is_file() else "",
    }
    return write_page(folder, "snella_app.report", context)


def write_page(folder: Path, package: str, context: Mapping[str, Any], name: str = "report.html") -> Path:
    """Render a package's template in the report style, and write the page atomically.

    Args:
        folder: Output folder.
        package: Package with the template `{name}.jinja`.
        context: Template variables. `style`, `script` (copy buttons), and `script_digest` (hash that the content
            security policy allows) are added.
        name: File name of the page.

    Returns:
        Path of the page.
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
    files = resources.files("snella_app.report")
    style = files.joinpath("report.css").read_text(encoding="utf-8")
    script = files.joinpath("report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = environment.from_string(template).render(
        context, style=Markup(style), script=Markup(script), script_digest=digest
    )
    # file names that are not valid UTF-8 contain surrogates, which cannot be encoded
    write_bytes(folder / name, page.encode("utf-8", "backslashreplace"))
    return folder / name


def breakable(text: str) -> Markup:
    """Insert line-break opportunities after `:`, `/`, `_`, and `.`."""
    return Markup(re.sub(r"([:/_.])", r"\1<wbr>", str(escape(text))))
