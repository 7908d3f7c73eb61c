"""`evaluate_generation`: subject fidelity, text alignment and diversity, as in Table VI of the paper."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, Dinov2Model

from snella_app.backbones.create import cache_only_if_unreachable
from snella_app.console import make_console
from snella_app.data.images import read_image
from snella_app.device import choose_device
from snella_lab.recipes.dreambooth.config import DreamBoothFolder
from snella_lab.recipes.dreambooth.data import PROMPT_FILE, PromptFile, fill, load_concept, read_prompt_file
from snella_lab.recipes.dreambooth.generate import GeneratedImage, generate_images, load_generator, sampling_of
from snella_lab.recipes.dreambooth.pipeline import suppress_progress_bars

_TINY = 1e-12


def vendi_score(embeddings: Tensor) -> float:
    """The Vendi score: the effective number of different images.

    V = exp(−Σ_i λ_i ln λ_i),   λ the eigenvalues of K / n,   K[i, j] = cos(e_i, e_j)

    1 where all embeddings point the same way, n where they are orthogonal.

    Args:
        embeddings: `[n, d]`, none of them 0.

    Raises:
        ValueError: No embeddings, or some that are 0 or not finite.

    Source: Friedman and Dieng, arXiv 2210.02410.
    """
    unit = _normalized(embeddings)
    kernel = unit @ unit.T / len(unit)  # [n, n], trace 1
    eigenvalues = torch.linalg.eigvalsh(kernel).clamp_min(0.0)
    return float(torch.exp(-torch.special.xlogy(eigenvalues, eigenvalues.clamp_min(_TINY)).sum()))


def mean_cosine(first: Tensor, second: Tensor) -> float:
    """Mean cosine similarity over all pairs of one embedding out of each set.

    Args:
        first: `[n, d]`.
        second: `[m, d]`.

    Raises:
        ValueError: No embeddings, or some that are 0 or not finite.
    """
    return float((_normalized(first) @ _normalized(second).T).mean())


def paired_cosine(first: Tensor, second: Tensor) -> float:
    """Mean cosine similarity of embeddings that belong together, row by row.

    Args:
        first: `[n, d]`.
        second: `[n, d]`.

    Raises:
        ValueError: Different numbers of embeddings, none, or some that are 0 or not finite.
    """
    if first.shape != second.shape:
        raise ValueError(f"both sets of embeddings must have one shape, got {list(first.shape)}, {list(second.shape)}")
    return float((_normalized(first) * _normalized(second)).sum(dim=1).mean())


def _normalized(embeddings: Tensor) -> Tensor:
    """The embeddings as unit vectors in float64."""
    if embeddings.ndim != 2 or embeddings.shape[0] == 0:
        raise ValueError(f"embeddings must be [n, d] with n of at least 1, got shape {list(embeddings.shape)}")
    values = embeddings.detach().double()
    norms = values.norm(dim=1, keepdim=True)
    bad = int((~torch.isfinite(norms) | (norms == 0)).sum())
    if bad:
        raise ValueError(f"embeddings must be finite and not 0, got {bad} of {len(values)} that are not")
    return values / norms


_BATCH = 16


class ClipEmbedder:
    """CLIP's image and text embeddings in their common space.

    Args:
        name: Local folder in transformers' format, or a name on the hub.
        device: Where to compute.

    Raises:
        FileNotFoundError: A folder that lacks model, image processor or tokenizer.
        ConnectionError: No folder, and neither the hub nor its cache has it.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.device = device
        self.model = _load("clip", name, CLIPModel).to(device).eval()
        self.processor = _load("clip", name, AutoImageProcessor)
        self.tokenizer = _load("clip", name, AutoTokenizer)

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """Embeddings of images, `[n, d]`."""

        def embed(batch: Sequence[Image.Image]) -> Tensor:
            pixels = self.processor(images=list(batch), return_tensors="pt")
            return self._features(self.model.get_image_features, dict(pixels))

        return _in_batches(images, embed)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of texts, `[n, d]`; a text is cut off where CLIP's length ends."""
        length = self.model.config.text_config.max_position_embeddings
        options = {"padding": True, "truncation": True, "max_length": length, "return_tensors": "pt"}

        def embed(batch: Sequence[str]) -> Tensor:
            return self._features(self.model.get_text_features, dict(self.tokenizer(list(batch), **options)))

        return _in_batches(texts, embed)

    def _features(self, function: Callable[..., Any], inputs: dict[str, Tensor]) -> Tensor:
        """Projected features of one tower."""
        found = function(**{name: value.to(self.device) for name, value in inputs.items()})
        return found if isinstance(found, Tensor) else found.pooler_output


class DinoEmbedder:
    """DINOv2's image embeddings: the class token after the last norm.

    Args:
        name: Local folder in transformers' format, or a name on the hub.
        device: Where to compute.

    Raises:
        FileNotFoundError: A folder that lacks model or image processor.
        ConnectionError: No folder, and neither the hub nor its cache has it.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.device = device
        self.model = _load("dino", name, Dinov2Model).to(device).eval()
        self.processor = _load("dino", name, AutoImageProcessor)

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """Embeddings of images, `[n, d]`."""

        def embed(batch: Sequence[Image.Image]) -> Tensor:
            pixels = self.processor(images=list(batch), return_tensors="pt")["pixel_values"]
            return self.model(pixel_values=pixels.to(self.device)).pooler_output

        return _in_batches(images, embed)


@torch.no_grad()
def _in_batches(items: Sequence[Any], embed: Callable[[Sequence[Any]], Tensor]) -> Tensor:
    """Embeddings of many items, a few at a time, on the CPU."""
    return torch.cat([embed(items[k : k + _BATCH]).float().cpu() for k in range(0, len(items), _BATCH)])


def _load(option: str, name: str, kind: Any) -> Any:
    """A model or a processor, from a folder or the hub."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        try:
            with suppress_progress_bars():
                return kind.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"{option} must be a folder in transformers' format, got '{folder}', which gives no {kind.__name__}: "
                f"{str(error).strip().splitlines()[0]}"
            ) from error
    with cache_only_if_unreachable() as reason, suppress_progress_bars():
        try:
            return kind.from_pretrained(name, local_files_only=bool(reason))
        except (OSError, ValueError) as error:
            raise ConnectionError(
                f"{option}={name!r} is no folder here, and "
                + (f"the hub could not be reached ({reason}), nor is it in its cache" if reason else "not on the hub")
                + "; pass a local folder in transformers' format"
            ) from error


METRICS = ("concept_alignment", "text_alignment", "text_alignment_without_token", "vendi", "vendi_by_prompt")
"""Numbers of one subject; see `score_images`."""
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
    """Generate the missing images of the protocol, and evaluate them.

    Each run receives `evaluation/` with the images and `generation.json` with its scores.

    Args:
        runs: Folder of one run, or a folder of several.
        clip: CLIP model: local folder in transformers' format or hub name.
        dino: DINOv2 model, likewise.
        prompts: File of prompts; `prompts_and_classes.txt` in the run's `dreambooth:` folder if None.
        live: Whether to use the prompts for animals; if None cats and dogs get them.
        pictures: Images of each prompt, with seeds 0, 1, …
        steps: Sampling steps, the run's `sample_steps` if None.
        batch_size: Images at a time.
        pipeline: New place of the pipeline, if it was moved.
        device: auto, or a device of torch such as cpu, cuda:1 or mps.
        overwrite: Generate again where images of other settings are.
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
    rows: list[dict[str, Any]] = []
    for folder in folders:
        loaded = load_generator(folder, pipeline=pipeline, device=device)
        config = loaded.config
        templates = lists[folder].templates(config.class_name, live)
        words = config.class_name or ""
        drawn = generate_images(
            folder / "evaluation",
            loaded.pipeline,
            [fill(template, config.token, words) for template in templates],
            range(pictures),
            sampling_of(config, steps, batch_size=batch_size),
            loaded.device,
            console,
            source=loaded.source,
            overwrite=overwrite,
        )
        concept = load_concept(str(config.data), config.subject, skip_corrupt=config.skip_corrupt)
        plain = [fill(template, "", words) for template in templates for _ in range(pictures)]
        scores = score_images(drawn, list(concept.images()), plain, *embedders)
        drawing = asdict(sampling_of(config, steps))
        row = {"subject": concept.name, "method": config.method, "pictures": len(drawn), **scores}
        loaded.run.write_json(RESULT_FILE, {"format": 1, **row, "clip": clip, "dino": dino, "drawing": drawing})
        rows.append({"run": str(folder), **row})
    of_all = {name: [row[name] for row in rows] for name in METRICS}
    errors = {
        name: statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
        for name, values in of_all.items()
    }
    return {
        "runs": rows,
        "mean": {name: statistics.fmean(values) for name, values in of_all.items()},
        "standard_error": errors,
    }


def score_images(
    pictures: Sequence[GeneratedImage],
    concept: Sequence[Any],
    plain_prompts: Sequence[str],
    clip: ClipEmbedder,
    dino: DinoEmbedder,
) -> dict[str, float]:
    """The numbers of one subject.

    Args:
        pictures: Generated ones.
        concept: The subject's images, RGB.
        plain_prompts: Prompt of each image without the subject's token, which CLIP does not know.
        clip: Embeds images and texts.
        dino: Embeds images.

    Returns:
        `concept_alignment`: mean cosine of CLIP's embeddings over all pairs of a generated image and an image of
        the subject.
        `text_alignment`: mean cosine of CLIP's embeddings of each image and its prompt, and
        `text_alignment_without_token` of its prompt without the subject's token. `vendi`: Vendi score of DINOv2's
        embeddings of all images. `vendi_by_prompt`: mean of the scores of each prompt's images.
    """
    images = [read_image(picture.path) for picture in pictures]
    clip_embeddings = clip.images(images)
    dino_embeddings = dino.images(images)
    rows_by_prompt: dict[str, list[int]] = {}
    for row, picture in enumerate(pictures):
        rows_by_prompt.setdefault(picture.prompt, []).append(row)
    return {
        "concept_alignment": mean_cosine(clip_embeddings, clip.images(concept)),
        "text_alignment": paired_cosine(clip_embeddings, clip.texts([picture.prompt for picture in pictures])),
        "text_alignment_without_token": paired_cosine(clip_embeddings, clip.texts(plain_prompts)),
        "vendi": vendi_score(dino_embeddings),
        "vendi_by_prompt": statistics.fmean(
            vendi_score(dino_embeddings[torch.tensor(rows)]) for rows in rows_by_prompt.values()
        ),
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
    """The given prompts, or those of the data."""
    if prompts is not None:
        return read_prompt_file(prompts)
    config = DreamBoothFolder(run).read_config()
    family, _, path = str(config.data).partition(":")
    file = Path(path).expanduser() / PROMPT_FILE
    if family != "dreambooth" or not file.is_file():
        raise FileNotFoundError(
            f"prompts must be a file of prompts, got none, and {config.data} has no {PROMPT_FILE}; one prompt a line "
            "with {0} for the subject's token and {1} for its class"
        )
    return read_prompt_file(file)
