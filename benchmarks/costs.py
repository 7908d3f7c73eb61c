"""Cost estimates for the paper's tables from results.jsonl, as text for docs/notes/paper.md and experiments/."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from counted_step import CountedStep
from documents import markdown_table, put_between
from estimates import (
    BACKBONE,
    RowSpeed,
    Workload,
    device_text,
    final_run,
    flop_text,
    has_gpu_rows,
    memory_text,
    notes_text,
    one_method,
    row_speed,
    seconds,
    time_text,
    training,
)
from paper_models import METHOD, SAM_NAMES, classifier, llama_7b, sam, sd3_medium

from snella_app.data.benchmarks import FGVC_DATASETS
from snella_app.files import write_text
from snella_lab.bench.rows import read_rows
from snella_lab.comparison.experiment_files import read_experiment
from snella_lab.recipes.dreambooth.config import DreamBoothConfig
from snella_lab.recipes.instruct.config import LanguageConfig

ROOT = Path(__file__).parents[1]
PAGE = Path("docs") / "notes" / "paper.md"
BEGIN, END = "<!-- cost estimated by benchmarks/readme.py begins -->", "<!-- cost ends -->"
_MARK = "Estimated by benchmarks/readme.py:"
_BACKBONES = {
    "table1-vtab": ("ViT-B/16", "vit_base_patch16_224"),
    "table2-mae": ("ViT-B/16", "vit_base_patch16_224"),
    "table2-moco": ("ViT-B/16", "vit_base_patch16_224"),
    "table3-swin": ("Swin-B", "swin_base_patch4_window7_224"),
    "table3-convnext": ("ConvNeXt-B", "convnext_base"),
    "table4-vit-l": ("ViT-L/16", "vit_large_patch16_224"),
    "table4-vit-h": ("ViT-H/14", "vit_huge_patch14_224"),
    "table1-vtab-official": ("ViT-B/16", "vit_base_patch16_224"),
    "table1-fgvc": ("ViT-B/16", "vit_base_patch16_224"),
    "table1-fgvc-official": ("ViT-B/16", "vit_base_patch16_224"),
}
_BATCH = 32  # as in the experiment files
_POLYP_TRAIN, _POLYP_VAL, _POLYP_TEST, _POLYP_EPOCHS = 704, 176, 120, 20
_SUBJECTS, _IMAGES = 30, 3000  # 30 subjects, 25 prompts, four images per prompt
_INSTRUCTIONS = 170_000


@dataclass(frozen=True)
class Costs:
    """Cost text for the page, and by path below `experiments/`."""

    page: str
    experiments: dict[str, str]


def estimate(rows: list[dict[str, Any]]) -> Costs:
    """Estimate all costs; see `row_speed` for errors."""
    speed = row_speed(rows, classifier(BACKBONE, 1))
    notes = notes_text(speed, has_gpu_rows(rows))
    tables, experiments = [], {}
    for estimator in (_vtab, _fgvc, _polyps, _dreambooth, _language):
        table, experiment_texts = estimator(speed)
        tables.append(table)
        for path, text in experiment_texts.items():
            experiments[path] = (
                f"{_MARK} {METHOD} in float32 on {device_text(speed.device)} takes {text}; see {PAGE.as_posix()}."
            )
    return Costs("\n\n".join([*tables, notes]), experiments)


def update_costs(rows_file: Path, root: Path = ROOT) -> list[Path]:
    """Write the estimates into the page and the experiment files, and return the changed files."""
    costs = estimate(read_rows(rows_file))
    changed = [root / PAGE] if put_between(root / PAGE, BEGIN, END, costs.page) else []
    for name, text in costs.experiments.items():
        path = root / "experiments" / name
        content = path.read_text(encoding="utf-8")
        updated = with_cost(content, text, path)
        if updated != content:
            write_text(path, updated)
            changed.append(path)
    return changed


def with_cost(content: str, text: str, path: Path) -> str:
    """Replace the estimate in an experiment file, from its marker to the next field."""
    pattern = rf"^(?P<indent>(?:#| ) +){re.escape(_MARK)}.*\n(?:(?P=indent)(?! ).*\n)*"
    match = re.search(pattern, content, re.MULTILINE)
    if match is None:
        raise ValueError(f"{path} must contain a line that starts with {_MARK!r}; add one to its cost")
    lines = textwrap.wrap(text, 116, initial_indent=match["indent"], subsequent_indent=match["indent"])
    return content[: match.start()] + "\n".join(lines) + "\n" + content[match.end() :]


def _vtab(speed: RowSpeed) -> tuple[str, dict[str, str]]:
    """Estimate Tables I to IV."""
    lines, experiments = [], {}
    for name, (label, backbone) in _BACKBONES.items():
        if "vtab" not in name and "table1" in name:
            continue
        experiment, counted = read_experiment(name), classifier(backbone, _BATCH)
        run = seconds(speed, counted, final_run(experiment)) / len(experiment.data)
        time = _method_time(speed, counted, name)
        lines.append([f"`{name}`", label, time_text(run), time, flop_text(counted), memory_text(counted)])
        experiments[f"paper/{name}.yaml"] = _experiment_text(name, time, counted)
    head = ["experiment", "backbone", "one final run, one dataset", "SNELLA-8, all runs"]
    return markdown_table([*head, "FLOP per image", f"memory, batch size {_BATCH}"], lines), experiments


def _fgvc(speed: RowSpeed) -> tuple[str, dict[str, str]]:
    """Estimate FGVC in Table I."""
    names = ("table1-fgvc", "table1-fgvc-official")
    counted = classifier(_BACKBONES[names[0]][1], _BATCH)
    epochs = int(read_experiment(names[0]).settings["epochs"])
    lines = []
    for name, data in FGVC_DATASETS.items():
        train, val, test = data.sizes
        run = seconds(speed, counted, training(train + val, epochs, _BATCH, test))
        lines.append([f"one final run on `{name}`", time_text(run)])
    times = {name: _method_time(speed, counted, name) for name in names}
    lines += [[f"SNELLA-8, all runs of `{name}`", time] for name, time in times.items()]
    lines.append([f"memory at batch size {_BATCH}", memory_text(counted)])
    experiments = {f"paper/{name}.yaml": _experiment_text(name, time, counted) for name, time in times.items()}
    return markdown_table([f"ViT-B/16, {flop_text(counted)} per image", ""], lines), experiments


def _polyps(speed: RowSpeed) -> tuple[str, dict[str, str]]:
    """Estimate Table V."""
    evaluated = _POLYP_EPOCHS * _POLYP_VAL + _POLYP_TEST
    work, lines = training(_POLYP_TRAIN, _POLYP_EPOCHS, 1, evaluated), []
    for name in SAM_NAMES:
        counted = sam(name, 1)
        lines.append([name, time_text(seconds(speed, counted, work)), flop_text(counted), memory_text(counted)])
    first = lines[0]
    experiment = {"polyp/table5.yaml": f"{first[1]}, and {first[3]} of memory"}
    columns = ["1024×1024", "time of a Table V run", "FLOP per image", "memory, batch size 1"]
    return markdown_table(columns, lines), experiment


def _dreambooth(speed: RowSpeed) -> tuple[str, dict[str, str]]:
    """Estimate Table VI."""
    config = DreamBoothConfig.from_flat(data="-", pipeline="-", out="-")
    counted = sd3_medium(config.resolution, config.max_sequence_length, config.optim.batch_size)
    passes = config.steps * config.optim.accumulation
    run = Workload(passes, passes * config.optim.batch_size)
    generation = Workload(0, 0, 2 * config.sample_steps)  # classifier-free guidance: two passes per step
    training_s = seconds(speed, counted, run, is_checkpointed=True)
    generation_s = _IMAGES * seconds(speed, counted, generation)
    lines = [
        [f"training one subject, {config.steps} steps", time_text(training_s)],
        ["generating one image", time_text(generation_s / _IMAGES)],
        [f"Table VI: {_SUBJECTS} subjects, {_IMAGES:,} images", time_text(_SUBJECTS * training_s + generation_s)],
        ["training memory, transformer only", memory_text(counted)],
    ]
    text = f"{time_text(training_s)} per subject and {time_text(generation_s)} for all images, "
    text += f"and {memory_text(counted)} of memory for the transformer"
    return markdown_table([f"512×512, {flop_text(counted)} per image", ""], lines), {"dreambooth/table6.yaml": text}


def _language(speed: RowSpeed) -> tuple[str, dict[str, str]]:
    """Estimate Table XVIII."""
    config = LanguageConfig.from_flat(data="-", model="-", out="-")
    counted = llama_7b(config.max_length, config.optim.batch_size)
    work = training(_INSTRUCTIONS, config.epochs, config.optim.batch_size)
    time = time_text(seconds(speed, counted, work, is_checkpointed=True))
    lines = [
        [f"{config.epochs} epochs of {_INSTRUCTIONS:,} examples", time],
        [f"memory at batch size {config.optim.batch_size}", memory_text(counted)],
    ]
    head = [f"LLaMA-2-7B, {config.max_length} tokens, {flop_text(counted)} per example", ""]
    return markdown_table(head, lines), {"language/table18.yaml": f"{time}, and {memory_text(counted)} of memory"}


def _method_time(speed: RowSpeed, counted: CountedStep, name: str) -> str:
    """Format one method's time range in an experiment, from the fewest to the most tuning runs."""
    fewest, most = (time_text(seconds(speed, counted, work)) for work in one_method(read_experiment(name)))
    if fewest == most:
        return fewest
    (low, unit), (high, other) = fewest.split(), most.split()
    return f"{low} to {high} {unit}" if unit == other else f"{fewest} to {most}"


def _experiment_text(name: str, time: str, counted: CountedStep) -> str:
    """Return the text for an experiment file."""
    official = " (longer at rank 32)" if name.endswith("-official") else ""
    return f"{time}{official}, and {memory_text(counted)} of memory at batch size {counted.batch}"
