"""Measuring personalised generators as Table VI of the paper does."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from snella.data.dreambooth import PROMPT_FILE, load_concept
from snella.data.images import read_image
from snella.data.prompt_file import PromptFile, fill, read_prompt_file
from snella.generation.config import DreamBoothConfig
from snella.generation.embedding import ClipEmbedder, DinoEmbedder
from snella.generation.folder import DreamBoothFolder
from snella.generation.generating import load_generator
from snella.generation.picture_folder import Picture, draw_into
from snella.generation.scores import mean_cosine, paired_cosine, vendi_score
from snella.training.assembly import choose_device
from snella.training.console import make_console

METRICS = ("concept_alignment", "text_alignment", "text_alignment_without_token", "vendi", "vendi_by_prompt")
"""Numbers of one subject; see `score_pictures`."""
RESULT_FILE = "generation.json"


def evaluate_generation(
    runs: str | Path,
    *,
    clip: str,
    dino: str,
    prompts: str | Path | None = None,
    live: bool | None = None,
    pictures: int = 4,
    steps: int | None = None,
    batch_size: int = 1,
    pipeline: str | None = None,
    device: str = "auto",
    overwrite: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Draw the pictures of the protocol, as far as they are not there, and measure them.

    Each run receives `evaluation/` with the pictures and `generation.json` with its numbers.

    Args:
        runs: Folder of one run, or a folder of several.
        clip: CLIP model: local folder in transformers' format or hub name.
        dino: DINOv2 model, likewise.
        prompts: File of prompts; `prompts_and_classes.txt` in the run's `dreambooth:` folder if None.
        live: Whether to use the prompts for animals; if None cats and dogs get them.
        pictures: Pictures of each prompt, with seeds 0, 1, …
        steps: Steps of the sampler, the run's `sample_steps` if None.
        batch_size: Pictures at a time.
        pipeline: Where the pipeline lies now, if not where training found it.
        device: auto, cpu or cuda.
        overwrite: Draw anew where pictures of other settings are.
        console: For progress bars and notes; standard output if None.

    Returns:
        `{"runs": [the numbers of each], "mean": {…}, "standard_error": {…}}`; the errors are those over subjects, None
        for a single one.

    Raises:
        FileNotFoundError: No run, no prompts, or a folder that lacks a model.
        ValueError: A file of prompts without places for the subject, or numbers out of range.
    """
    if pictures < 1:
        raise ValueError(f"pictures must be at least 1, got {pictures}")
    console = console or make_console()
    folders = find_runs(runs)
    target = choose_device(device)
    lists = {folder: _prompt_file(folder, prompts) for folder in folders}
    embedders = ClipEmbedder(clip, target), DinoEmbedder(dino, target)
    rows = []
    for folder in folders:
        loaded = load_generator(folder, pipeline=pipeline, device=device)
        config = loaded.config
        templates = lists[folder].templates(config.class_name, live)
        words = config.class_name or ""
        drawn = draw_into(
            folder / "evaluation",
            loaded.pipeline,
            [fill(template, config.token, words) for template in templates],
            range(pictures),
            loaded.drawing(steps, batch_size=batch_size),
            loaded.device,
            console,
            source=loaded.source,
            overwrite=overwrite,
        )
        concept = load_concept(str(config.data), config.subject, skip_broken=config.skip_broken)
        plain = [fill(template, "", words) for template in templates for _ in range(pictures)]
        scores = score_pictures(drawn, list(concept.images()), plain, *embedders)
        drawing = asdict(loaded.drawing(steps))
        row = {"subject": concept.name, "method": config.method, "pictures": len(drawn), **scores}
        loaded.run.write_json(RESULT_FILE, {"format": 1, **row, "clip": clip, "dino": dino, "drawing": drawing})
        rows.append({"run": str(folder), **row})
    return {"runs": rows, **_summary(rows)}


def score_pictures(
    pictures: Sequence[Picture],
    concept: Sequence[Any],
    plain_prompts: Sequence[str],
    clip: ClipEmbedder,
    dino: DinoEmbedder,
) -> dict[str, float]:
    """The numbers of one subject.

    Args:
        pictures: Generated ones.
        concept: The subject's images, RGB.
        plain_prompts: Prompt of each picture without the subject's word, which CLIP does not know.
        clip: Embeds images and texts.
        dino: Embeds images.

    Returns:
        `concept_alignment`: mean cosine of CLIP's embeddings over all pairs of a picture and an image of the subject.
        `text_alignment`: mean cosine of CLIP's embeddings of each picture and its prompt, and
        `text_alignment_without_token` of its prompt without the subject's word. `vendi`: Vendi score of DINOv2's
        embeddings of all pictures. `vendi_by_prompt`: mean of the scores of each prompt's pictures.
    """
    images = [read_image(picture.path) for picture in pictures]
    seen = clip.images(images)
    looks = dino.images(images)
    rows_of: dict[str, list[int]] = {}
    for row, picture in enumerate(pictures):
        rows_of.setdefault(picture.prompt, []).append(row)
    return {
        "concept_alignment": mean_cosine(seen, clip.images(concept)),
        "text_alignment": paired_cosine(seen, clip.texts([picture.prompt for picture in pictures])),
        "text_alignment_without_token": paired_cosine(seen, clip.texts(plain_prompts)),
        "vendi": vendi_score(looks),
        "vendi_by_prompt": statistics.fmean(vendi_score(looks[torch.tensor(rows)]) for rows in rows_of.values()),
    }


def find_runs(folder: str | Path) -> list[Path]:
    """The run that a folder is, or the runs in it, by name.

    Raises:
        FileNotFoundError: Neither.
    """
    root = Path(folder)
    if (root / "run.json").is_file():
        return [root]
    found = sorted(path.parent for path in root.glob("*/run.json")) if root.is_dir() else []
    if not found:
        raise FileNotFoundError(f"run must be the folder of a run of snella dreambooth or of several, got {root}")
    return found


def _prompt_file(run: Path, prompts: str | Path | None) -> PromptFile:
    """The prompts that the user names, or those that lie with the data."""
    if prompts is not None:
        return read_prompt_file(prompts)
    config = _config_of(run)
    family, _, path = str(config.data).partition(":")
    file = Path(path).expanduser() / PROMPT_FILE
    if family != "dreambooth" or not file.is_file():
        raise FileNotFoundError(
            f"prompts must name a file of prompts, got none, and {config.data} has no {PROMPT_FILE}; one prompt a line "
            "with {0} for the subject's word and {1} for its class"
        )
    return read_prompt_file(file)


def _config_of(run: Path) -> DreamBoothConfig:
    """Settings of a run."""
    return DreamBoothFolder(run).read_config()


def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard error over subjects."""
    mean = {name: statistics.fmean(row[name] for row in rows) for name in METRICS}
    error = {
        name: statistics.stdev(row[name] for row in rows) / len(rows) ** 0.5 if len(rows) > 1 else None
        for name in METRICS
    }
    return {"mean": mean, "standard_error": error}
