"""Evaluation of generated images: subject fidelity, text alignment, and diversity (Table VI of arXiv 2510.24037)."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, Dinov2Model

from snella_app.console import make_console
from snella_app.data.images import read_image
from snella_app.device import choose_device
from snella_app.files import expand_user
from snella_app.records.record import read
from snella_app.records.run import RunInfo
from snella_lab.recipes.dreambooth.config import DreamBoothFolder, EvaluateGenerationOptions
from snella_lab.recipes.dreambooth.data import PROMPT_FILE, PromptFile, fill, load_concept, read_prompt_file
from snella_lab.recipes.dreambooth.generate import GeneratedImage, load_generator, open_run
from snella_lab.recipes.dreambooth.train import check_images
from snella_lab.recipes.pretrained import load_pretrained

METRICS = ("concept_alignment", "text_alignment", "text_alignment_without_token", "vendi", "vendi_by_prompt")
"""Metrics of a subject, explained in `score_images`."""
RESULT_FILE = "generation.json"
_BATCH_SIZE = 16


def vendi_score(embeddings: Tensor) -> float:
    """Compute the Vendi score, the effective number of distinct images.

    V = exp(−Σ_i λ_i ln λ_i),   λ the eigenvalues of K / n,   K[i, j] = cos(e_i, e_j)

    The score is 1 for parallel embeddings and n for orthogonal ones.

    Args:
        embeddings: `[n, d]` with nonzero rows.

    Source: Friedman and Dieng, arXiv 2210.02410.
    """
    unit = F.normalize(embeddings.double(), dim=1)
    kernel = unit @ unit.T / len(unit)  # [n, n], trace 1
    eigenvalues = torch.linalg.eigvalsh(kernel).clamp_min(0.0)  # rounding errors can make them negative
    return float(torch.special.entr(eigenvalues).sum().exp())


class _Embedder:
    """Pre-trained model that embeds images.

    Args:
        kind: Class of the model.
        name: Local folder in transformers format, or hub name.
        option: Name of the option, for error messages.
        device: Device of the model.

    Raises:
        FileNotFoundError: If the folder has no model or image processor.
        ConnectionError: If `name` is not a local folder and cannot be loaded from the hub or its cache.
    """

    def __init__(self, kind: Any, name: str, option: str, device: torch.device) -> None:
        self.device = device
        self.model = load_pretrained(kind, name, option).to(device).eval()
        self.processor = load_pretrained(AutoImageProcessor, name, option)
        self.embed: Callable[..., Any] = self.model

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """Return the embeddings of images, `[n, d]`."""
        inputs = (self.processor(images=batch, return_tensors="pt").to(self.device) for batch in _batches(images))
        return torch.cat([_features(self.embed(**pixels)) for pixels in inputs])


class ClipEmbedder(_Embedder):
    """CLIP embeddings of images and texts in their joint space."""

    def __init__(self, name: str, device: torch.device) -> None:
        super().__init__(CLIPModel, name, "clip", device)
        self.embed = self.model.get_image_features
        self.tokenizer = load_pretrained(AutoTokenizer, name, "clip")

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Return the embeddings of texts, `[n, d]`. Long texts are truncated to CLIP's context length."""
        length = self.model.config.text_config.max_position_embeddings
        options = {"padding": True, "truncation": True, "max_length": length, "return_tensors": "pt"}
        inputs = (self.tokenizer(batch, **options).to(self.device) for batch in _batches(texts))
        return torch.cat([_features(self.model.get_text_features(**tokens)) for tokens in inputs])


class DinoEmbedder(_Embedder):
    """DINOv2 embeddings of images: the class token after the last norm."""

    def __init__(self, name: str, device: torch.device) -> None:
        super().__init__(Dinov2Model, name, "dino", device)


def _batches(items: Sequence[Any]) -> Iterator[list[Any]]:
    """Iterate over items in batches."""
    return (list(items[start : start + _BATCH_SIZE]) for start in range(0, len(items), _BATCH_SIZE))


def _features(output: Any) -> Tensor:
    """Return the pooled features of a model's output in float64 on the CPU."""
    features = output if isinstance(output, Tensor) else output.pooler_output  # transformers 5.0 can return a tensor
    return features.cpu().double()


def evaluate_generation(options: EvaluateGenerationOptions, console: Console | None = None) -> dict[str, Any]:
    """Generate the missing images of the DreamBooth protocol, and evaluate all images.

    Images are written to `evaluation/` and scores to `generation.json` in each run folder.

    Args:
        options: Options of `snella evaluate-generation`.
        console: Console for the progress bars, or None for stdout.

    Returns:
        `{"runs": [metrics of each run], "mean": {…}, "standard_error": {…}}`. Means and standard errors are over runs.
        The standard error of a single run is None.

    Raises:
        FileNotFoundError: If a run, adapter, prompt file, or model does not exist.
        FileExistsError: If `evaluation/` contains files but no valid `images.json`, or if, without `overwrite`, it
            contains images generated with different prompts, settings, or weights.
        ConnectionError: If a model is not a local folder and cannot be loaded from the hub or its cache.
        ValueError: If a prompt file is invalid, the subject's images have changed since training, or a run belongs to
            another command.
    """
    console = console or make_console()
    device = choose_device(options.device)
    prompt_files = {folder: _prompt_file(folder, options.prompts) for folder in find_runs(options.run)}
    clip = ClipEmbedder(options.clip, device)
    dino = DinoEmbedder(options.dino, device)
    rows: list[dict[str, Any]] = []
    for folder, prompt_file in prompt_files.items():
        generator, config = load_generator(folder, options, console)
        concept = load_concept(str(config.data), config.subject, skip_corrupt=config.skip_corrupt)
        check_images(DreamBoothFolder(folder), read(RunInfo, folder).data, concept)
        templates = prompt_file.templates(config.class_name, options.live)
        class_name = config.class_name or ""
        prompts = [fill(template, config.token, class_name) for template in templates]
        plain_prompts: list[str] = []
        for template in templates:
            plain_prompts += [fill(template, "", class_name)] * options.images_per_prompt
        images = generator.generate(
            folder / "evaluation", prompts, range(options.images_per_prompt), overwrite=options.overwrite
        )
        scores = score_images(images, list(concept.images()), plain_prompts, clip, dino)
        row = {"subject": concept.name, "method": config.method.name, "images": len(images), **scores}
        models = {"clip": options.clip, "dino": options.dino}
        DreamBoothFolder(folder).write_json(
            RESULT_FILE, {"format": 1, **row, **models, "drawing": asdict(generator.sampling)}
        )
        rows.append({"run": str(folder), **row})
    values = {name: [row[name] for row in rows] for name in METRICS}
    return {
        "runs": rows,
        "mean": {name: statistics.fmean(scores) for name, scores in values.items()},
        "standard_error": {name: _standard_error(scores) for name, scores in values.items()},
    }


def _standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean, or None for a single value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def score_images(
    images: Sequence[GeneratedImage],
    concept: Sequence[Any],
    plain_prompts: Sequence[str],
    clip: ClipEmbedder,
    dino: DinoEmbedder,
) -> dict[str, float]:
    """Compute the metrics of a subject.

    Args:
        images: Generated images.
        concept: Real images of the subject, RGB.
        plain_prompts: Prompt of each image without the subject's token, which is meaningless to CLIP.
        clip: CLIP embedder.
        dino: DINOv2 embedder.

    Returns:
        `concept_alignment`: mean cosine similarity between CLIP embeddings of all generated and all real images.
        `text_alignment`: mean cosine similarity between CLIP embeddings of each image and its prompt.
        `text_alignment_without_token`: the same, but with the prompts in `plain_prompts`.
        `vendi`: Vendi score of all images, from DINOv2 embeddings.
        `vendi_by_prompt`: Vendi score of each prompt's images, averaged over the prompts.
    """
    pixels = [read_image(image.path) for image in images]
    clip_embeddings = clip.images(pixels)
    dino_embeddings = dino.images(pixels)
    rows_by_prompt: dict[str, list[int]] = {}
    for row, image in enumerate(images):
        rows_by_prompt.setdefault(image.prompt, []).append(row)
    prompts = [image.prompt for image in images]
    scores = {
        "concept_alignment": float(F.cosine_similarity(clip_embeddings[:, None], clip.images(concept), dim=-1).mean()),
        "text_alignment": float(F.cosine_similarity(clip_embeddings, clip.texts(prompts)).mean()),
        "text_alignment_without_token": float(F.cosine_similarity(clip_embeddings, clip.texts(plain_prompts)).mean()),
        "vendi": vendi_score(dino_embeddings),
    }
    prompt_scores = [vendi_score(dino_embeddings[torch.tensor(rows)]) for rows in rows_by_prompt.values()]
    scores["vendi_by_prompt"] = statistics.fmean(prompt_scores)
    return scores


def find_runs(folder: str | Path) -> list[Path]:
    """Return the folder if it is a run folder, else the run folders in it, sorted by name.

    Raises:
        FileNotFoundError: If there is no run folder.
    """
    root = Path(folder)
    if (root / "run.json").is_file():
        return [root]
    runs = sorted(path.parent for path in root.glob("*/run.json")) if root.is_dir() else []
    if not runs:
        raise FileNotFoundError(
            f"run must be a run folder created by `snella dreambooth`, or a folder of such runs, got {root}"
        )
    return runs


def _prompt_file(run: Path, prompts: str | Path | None) -> PromptFile:
    """Read the prompt file, by default from the run's data folder."""
    folder = open_run(run)  # raises for runs of other commands
    if prompts is not None:
        return read_prompt_file(prompts)
    config = folder.read_config()
    family, _, path = str(config.data).partition(":")
    file = expand_user(path) / PROMPT_FILE
    if family != "dreambooth" or not file.is_file():
        raise FileNotFoundError(
            f"prompts must name a prompt file, because {config.data} has no {PROMPT_FILE}; write one prompt per line, "
            "with {0} for the subject's token and {1} for its class"
        )
    return read_prompt_file(file)
