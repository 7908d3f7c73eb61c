"""Folding a run's update into the backbone: plain timm weights."""

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import nn

from snella.methods import merge_trained
from snella.training.assembly import make_backbone
from snella.training.atomic_files import write_bytes
from snella.training.loading import load_run

_CLASSIFICATION = "classification"


def merge(run: str | Path, out: str | Path, *, overwrite: bool = False) -> Path:
    """Write the fine-tuned model as a plain state dict, the update folded into its weights.

    Classification: `timm.create_model(architecture, num_classes=…, img_size=…).load_state_dict(load_file(out))` loads
    it; these values, the class names and the data configuration stand in the file's metadata. Outputs equal those
    of the adapted model (bit for bit with SNELLA, whose layers compute with the sum of both weights anyway).

    Segmentation: the names of `snella.backbones.create_segmenter`'s model, `encoder.…` (the backbone's own names,
    without a head) and `decoder.…`; `load_merged` builds and fills it.

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
        "model_args": json.dumps((getattr(model, "pretrained_cfg", None) or {}).get("model_args") or {}),
        "task": loaded.task.name,
        "classes": json.dumps(loaded.classes),
        "built_from": json.dumps(backbone),
        "data_config": json.dumps(loaded.info["data_config"]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, save({name: t.detach().contiguous() for name, t in model.state_dict().items()}, metadata))
    return path


def loading_lines(path: str | Path) -> str:
    """Lines of Python that load a merged file as `model`: with timm alone, or, for a segmentation, with snella.

    Args:
        path: File written by `merge`.
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    if metadata.get("task", _CLASSIFICATION) != _CLASSIFICATION:
        return f"from snella.training import load_merged\nmodel = load_merged({str(path)!r})"
    size = json.loads(metadata["img_size"])
    arguments = f"{metadata['architecture']!r}, num_classes={metadata['num_classes']}"
    arguments += "" if size is None else f", img_size={size}"
    more = json.loads(metadata.get("model_args", "{}"))
    arguments += "".join(f", {name}={value!r}" for name, value in more.items())
    return (
        "import timm; from safetensors.torch import load_file\n"
        f"model = timm.create_model({arguments}).eval()\n"
        f"model.load_state_dict(load_file({str(path)!r}))"
    )


def what_it_is(path: str | Path) -> str:
    """What a merged file holds, in a few words."""
    with safe_open(path, "pt") as file:
        task = file.metadata().get("task", _CLASSIFICATION)
    return {
        _CLASSIFICATION: "plain timm weights",
        "segmentation": "plain weights of the backbone (encoder.…) and the decoder (decoder.…)",
    }[task]


def load_merged(path: str | Path) -> nn.Module:
    """Build the model of a merged file, of any task, without adapters.

    Args:
        path: File written by `merge`.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: The file was not written by `merge`.
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    if "built_from" not in metadata:
        raise ValueError(f"path must be a file that snella merge wrote, got {str(path)!r}, which does not say of what")
    described = {**json.loads(metadata["built_from"]), "pretrained": False}
    model = make_backbone(described, metadata["task"])
    model.load_state_dict(load_file(path))
    return model.eval()


def _built_in_size(model: nn.Module) -> int | None:
    """The image size that timm must be told to build such a model; None for models that take any."""
    inner = getattr(model, "encoder", model)
    size = getattr(getattr(inner, "patch_embed", None), "img_size", None)
    return None if size is None else int(size[0])


def merged_model(model: nn.Module) -> nn.Module:
    """The backbone with what was trained in its plain weights.

    Raises:
        ValueError: The method cannot be folded.
    """
    return merge_trained(model)
