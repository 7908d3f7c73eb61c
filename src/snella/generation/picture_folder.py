"""A folder of generated pictures: what was drawn from which prompt and seed, and what is still to be drawn."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import device as torch_device

from snella.data.images import IMAGE_SUFFIXES
from snella.generation.drawing import Drawing, draw_images
from snella.training.atomic_files import write_bytes, write_json

MANIFEST = "images.json"


@dataclass(frozen=True)
class Picture:
    """One generated picture."""

    path: Path
    prompt: str
    seed: int


def draw_into(
    folder: Path,
    pipeline: StableDiffusion3Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    drawing: Drawing,
    device: torch_device,
    console: Console,
    *,
    source: str,
    overwrite: bool = False,
    show_bar: bool = True,
) -> list[Picture]:
    """Draw every prompt with every seed; pictures that are there from an interrupted call are kept.

    Args:
        folder: Where they go, as `PROMPT-SEED.png`, with `images.json`; created.
        pipeline: With the adapter in its transformer.
        prompts: What to draw.
        seeds: One picture of each prompt for each of them.
        drawing: How.
        device: Where.
        console: For the progress bar; it appears only if this is a terminal.
        source: What draws: pipeline and digest of the adapter. Pictures of another source are not kept.
        overwrite: Draw everything anew in a folder that holds other pictures.
        show_bar: Whether a bar is wanted.

    Raises:
        FileExistsError: The folder holds pictures of other prompts, seeds, settings or another adapter.
        ValueError: The pipeline cannot draw at this resolution.
    """
    width = max(2, len(str(len(prompts) - 1)))
    pictures = [
        Picture(folder / f"{number:0{width}}-{seed}.png", prompt, seed)
        for number, prompt in enumerate(prompts)
        for seed in seeds
    ]
    content = {
        "format": 1,
        "source": source,
        "drawing": {name: value for name, value in asdict(drawing).items() if name != "batch_size"},
        "images": [{"file": each.path.name, "prompt": each.prompt, "seed": each.seed} for each in pictures],
    }
    check_picture_folder(folder, content, overwrite=overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    if _read_manifest(folder) != content:
        for path in _pictures_in(folder):
            path.unlink()
        write_json(folder / MANIFEST, content)
    missing = [each for each in pictures if not each.path.is_file()]
    columns = (TextColumn("drawing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not (show_bar and console.is_terminal)) as bar:
        task = bar.add_task("drawing", total=len(pictures), completed=len(pictures) - len(missing))

        def receive(number: int, picture: Image.Image) -> None:
            _write(missing[number], picture)
            bar.advance(task)

        if missing:
            draw_images(pipeline, [(each.prompt, each.seed) for each in missing], drawing, device, receive)
    return pictures


def check_picture_folder(folder: Path, content: dict[str, Any], *, overwrite: bool) -> None:
    """Refuse a folder that holds something else.

    Args:
        folder: Need not exist.
        content: What is to be drawn, as `images.json` will say it.
        overwrite: Whether other pictures of ours may go.

    Raises:
        FileExistsError: It does.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"out={folder} must be a folder, got a file; choose another name")
    manifest = _read_manifest(folder)
    if manifest == content:
        return
    if manifest is None and any(folder.iterdir()):
        raise FileExistsError(f"out={folder} holds files that are not ours; choose an empty or a new folder")
    if manifest is not None and not overwrite:
        changed = [name for name in ("source", "drawing", "images") if manifest.get(name) != content[name]]
        names = {"source": "another adapter", "drawing": "other settings", "images": "other prompts or seeds"}
        raise FileExistsError(
            f"out={folder} holds pictures of {' and '.join(names[name] for name in changed)}; choose another folder, "
            "or draw anew with --overwrite"
        )


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """What `images.json` says; None where there is none or it is damaged."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _pictures_in(folder: Path) -> list[Path]:
    """Pictures that an earlier call left."""
    return [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]


def _write(picture: Picture, image: Image.Image) -> None:
    """Write a PNG file, whole or not at all, that says how it was made."""
    info = PngInfo()
    info.add_itxt("prompt", picture.prompt)
    info.add_itxt("seed", str(picture.seed))
    content = io.BytesIO()
    image.save(content, format="PNG", pnginfo=info)
    write_bytes(picture.path, content.getvalue())
