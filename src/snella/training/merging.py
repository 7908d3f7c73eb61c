"""Folding a run's update into the backbone: plain timm weights."""

import json
from pathlib import Path

from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from snella.training.atomic_files import write_bytes
from snella.training.loading import load_run


def merge(run: str | Path, out: str | Path, *, overwrite: bool = False) -> Path:
    """Write the fine-tuned model as a plain timm state dict.

    `timm.create_model(architecture, num_classes=…, img_size=…).load_state_dict(load_file(out), strict=True)` loads it;
    these values, the class names and the data configuration stand in the file's metadata. Outputs equal those of the
    adapted model (bit for bit with SNELLA, whose layers compute with the sum of both weights anyway).

    Args:
        run: Folder of the run.
        out: File to write, `.safetensors`.
        overwrite: Replace an existing file.

    Returns:
        The path of the file.

    Raises:
        FileExistsError: The file exists.
        ValueError: Another ending than `.safetensors`.
    """
    path = Path(out)
    if path.suffix != ".safetensors":
        raise ValueError(f"out must end with .safetensors, got {str(out)!r}")
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"out={path} exists; choose another name, or replace it with --overwrite (overwrite=True)"
        )
    loaded = load_run(run, device="cpu")
    model = merged_model(loaded.model)
    backbone = loaded.info["backbone"]
    metadata = {
        "format": "pt",
        "architecture": str(backbone["architecture"]),
        "backbone": str(backbone["name"]),
        "num_classes": str(backbone["num_classes"]),
        "img_size": json.dumps(_built_in_size(model)),
        "classes": json.dumps(loaded.classes),
        "data_config": json.dumps(loaded.info["data_config"]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, save({name: t.detach().contiguous() for name, t in model.state_dict().items()}, metadata))
    return path


def loading_lines(path: str | Path) -> str:
    """Three lines of Python that load a merged file with timm alone, as `model`.

    Args:
        path: File written by `merge`.
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    size = json.loads(metadata["img_size"])
    arguments = f"{metadata['architecture']!r}, num_classes={metadata['num_classes']}"
    arguments += "" if size is None else f", img_size={size}"
    return (
        "import timm; from safetensors.torch import load_file\n"
        f"model = timm.create_model({arguments}).eval()\n"
        f"model.load_state_dict(load_file({str(path)!r}))"
    )


def _built_in_size(model: nn.Module) -> int | None:
    """The image size that timm must be told to build such a model; None for models that take any."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return None if size is None else int(size[0])


def merged_model(model: nn.Module) -> nn.Module:
    """The backbone with the update folded in; `model` itself where the method has no adapter."""
    return model.merge_and_unload() if isinstance(model, PeftModel) else model
