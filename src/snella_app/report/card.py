"""Model card of a run: a `README.md` in the Hugging Face Hub format."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from snella_app.records.record import read, read_if_present
from snella_app.records.results import MaskScores
from snella_app.records.run import Metrics, RunInfo
from snella_app.text import count_text, plain_text, seconds_text, split_text

_MAX_CLASSES = 60  # maximum number of class names listed
_PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
_CLOSED_SET = " The model assigns one of the classes above to any image."
_TAGS = {"classification": "image-classification", "segmentation": "image-segmentation"}
"""Hub pipeline tags by task."""
_LICENSE = "# license: fill in, e.g. apache-2.0; the licenses of the backbone weights and the images limit the choice"


def model_card(
    run: str | Path,
    use: str,
    *,
    name: str | None = None,
    library: str = "timm",
    tags: Sequence[str] = (),
    has_final_head: bool = True,
) -> str:
    """Return the model card of a run.

    The metadata block contains the library, the base model, the task, tags, and results, as far as they are known. The
    license is unknown; a comment in the metadata and a section of the text ask the user to fill it in.

    Args:
        run: Run folder.
        use: Instructions for loading and using the model, in Markdown.
        name: Name of the model. If None, it is derived from the method and the data.
        library: Library that loads the model: timm, peft, transformers, or snella.
        tags: Tags in addition to the task and `snella`.
        has_final_head: False if `use` loads only the trained head. Results of a final head (fitted to the features of
            several layers) are then omitted from the metadata, and the text says which head they belong to.

    Returns:
        Markdown.

    Raises:
        FileNotFoundError: If the folder has no `run.json`.
        ValueError: If a file of the run is damaged.
    """
    from huggingface_hub import ModelCardData

    info = read(RunInfo, run)
    metrics = read_if_present(Metrics, run)
    results = _results_table(metrics)
    note = ""
    unused_head = None if metrics is None or has_final_head else metrics.final_head
    if metrics is not None and unused_head is not None and unused_head.is_saved:
        note = f"These are the results in snella, with the {unused_head.name}. The code above uses the trained head"
        # if the last epoch is saved instead of the best one, `val_trained` is still the score of the best one
        if unused_head.metric is not None and not metrics.replaces_best_epoch:
            metric = unused_head.metric.replace("_", " ")
            note += f", whose validation {metric} is {unused_head.val_trained:.4f}"
        note += "."
    title = name or f"{info.method} on {info.data.spec}"
    tag = _TAGS.get(info.task)
    data = ModelCardData(
        library_name=library,
        base_model=_base_model(info),
        pipeline_tag=tag,
        tags=list(dict.fromkeys(["snella", info.task, *tags])),
        model_name=title,
        eval_results=None if note else _results(info, metrics, tag),
    )
    if results and note:
        results += f"\n\n{note}"
    closed_set = _CLOSED_SET if info.task in ("classification", "ordinal") else ""
    sections = [
        f"---\n{data.to_yaml().strip()}\n{_LICENSE}\n---",
        f"# {_escape(title)}",
        _summary(info),
        f"## How to use\n\n{use.strip()}",
        results,
        _fact_list("Data", _data(info)),
        _fact_list("Training", _training(info, metrics)),
        "## Limitations\n\nThe results hold for images similar to the training images; evaluate the model before using "
        f"it on other images.{closed_set}",
        "## License\n\nFill in here and as `license:` in the metadata.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _base_model(info: RunInfo) -> str | None:
    """Return the Hub ID of the backbone's timm weights, e.g. `timm/resnet18.a1_in1k`, or None if it is unknown."""
    from timm.models import get_pretrained_cfg, is_model_pretrained

    backbone = info.backbone
    is_from_timm = backbone.pretrained and not backbone.weights and is_model_pretrained(backbone.name)
    config = get_pretrained_cfg(backbone.name) if is_from_timm and "." in backbone.name else None
    return None if config is None else config.hf_hub_id


def _results(info: RunInfo, metrics: Metrics | None, tag: str | None) -> list[Any] | None:
    """Return the evaluation results for the Hub, or None if there are no scores or no Hub tag for the task."""
    from huggingface_hub import EvalResult

    if metrics is None or tag is None:
        return None
    split, scores = metrics.measured
    if scores is None:
        return None
    shared: dict[str, Any] = {"task_type": tag, "dataset_type": "custom"}
    shared |= {"dataset_name": info.data.spec, "dataset_split": split}
    values = {key: value for key, value in scores.values().items() if isinstance(value, float) and math.isfinite(value)}
    return [EvalResult(metric_type=key, metric_value=round(value, 6), **shared) for key, value in values.items()]


def _summary(info: RunInfo) -> str:
    """Return a summary of the backbone, task, method, and classes."""
    weights = f", weights {_code(info.backbone.weights)}" if info.backbone.weights else ""
    text = f"{_code(info.backbone.name)}{weights}, fine-tuned for {info.task} with {_code(info.method)}, using snella."
    if not info.classes:
        return text
    names = json.dumps(info.classes[:_MAX_CLASSES], ensure_ascii=False)
    for character in "<>&`":  # as JSON escapes, so that they neither end the code span nor start HTML
        names = names.replace(character, f"\\u{ord(character):04x}")
    omitted = "" if len(info.classes) <= _MAX_CLASSES else f" and {len(info.classes) - _MAX_CLASSES} more"
    order = "classes, from lowest to highest" if info.task == "ordinal" else "outputs, in this order"
    return f"{text}\n\n{len(info.classes)} {order}: `{names}`{omitted}."


def _results_table(metrics: Metrics | None) -> str:
    """Return the results section with a Markdown table, or an empty string if there are no results."""
    if metrics is None:
        return ""
    splits = [("test", metrics.test), ("validation", metrics.val)]
    rows = [row for split, scores in splits if scores is not None for row in scores.rows(split)]
    if not rows:
        return ""
    lines = [f"| {_escape(label)} | {value} | {note} |" for label, value, note in rows]
    if metrics.selected_on is None:
        weights = "averaged weights" if metrics.averaged is not None and metrics.averaged.is_saved else "last epoch"
        selection = f"These are the results of the {weights}; no epoch was selected."
    else:
        saved = "The last epoch is saved with a final head" if metrics.replaces_best_epoch else "The saved weights were"
        selection = f"{saved} selected on the {split_text(metrics.selected_on)} images"
        if metrics.selected_on == "val" and metrics.test is not None:
            selection += "; the test images were evaluated once."
        else:
            selection += ", so these results are optimistic."
    size = " Measured at the input resolution." if isinstance(metrics.measured[1], MaskScores) else ""
    return "\n".join(["## Results", "", "| | | |", "|---|---|---|", *lines, "", selection + size])


def _data(info: RunInfo) -> list[tuple[str, str]]:
    """Return facts about the data: description, image counts, preprocessing, and notes."""
    sizes = ", ".join(f"{split_text(part)} {count_text(size)}" for part, size in info.data.sizes.items())
    preprocessing = {name: info.data_config[name] for name in _PREPROCESSING if name in info.data_config}
    return [
        ("Data", _escape(info.data.description or info.data.spec)),
        ("Images", sizes),
        ("Preprocessing", _escape(plain_text(preprocessing))),
        *(("Note", _escape(note)) for note in info.data.notes),
    ]


def _training(info: RunInfo, metrics: Metrics | None) -> list[tuple[str, str]]:
    """Return facts about the training: method, trainable parameters, epoch, time, final head, command, and versions."""
    options = _escape(plain_text(info.method_options))
    rows = [("Method", ", ".join(filter(None, (_code(info.method), options))))]
    if metrics is not None:
        time = "" if math.isnan(metrics.train_s) else seconds_text(metrics.train_s)
        rows += [("Trainable parameters", f"{metrics.trainable_parameters:,}"), ("Epoch", metrics.saved_epochs)]
        rows.append(("Time", time))
        if metrics.final_head is not None and metrics.final_head.is_saved:
            rows.append(("Final head in snella", metrics.final_head.name))
    versions = ", ".join(f"{package} {version}" for package, version in info.versions.items())
    return [*rows, ("Command", _code(info.command) if info.command else ""), ("Versions", _escape(versions))]


def _escape(text: str) -> str:
    """Escape untrusted text as one line of literal Markdown."""
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _code(text: str) -> str:
    """Return untrusted text as a code span, fenced by more backticks than the text has in a row."""
    longest_run = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * (longest_run + 1)
    space = " " if longest_run else ""
    return f"{fence}{space}{' '.join(text.split())}{space}{fence}"


def _fact_list(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """Return a section that lists the nonempty facts."""
    return f"## {title}\n\n" + "\n".join(f"- {name}: {text}" for name, text in rows if text)
