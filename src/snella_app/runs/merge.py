"""`merge`: a run's update folded into the backbone, as plain timm weights."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from snella_app.files import made_folder, write_bytes, write_json
from snella_app.methods import merge_trained
from snella_app.records import BackboneInfo, RunInfo, plain, record_from
from snella_app.runs.layer_probe import LAYER_PROBE, layer_probe_snippet
from snella_app.runs.model import LoadedRun, built_in_size, load_run, make_backbone
from snella_app.tasks import task_class

_SUFFIX = ".safetensors"
_OTHER_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".npz", ".onnx", ".h5", ".pkl", ".tar", ".gz", ".zip")
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_KEPT_ENTRIES = ("first_conv", "classifier", "license", "pool_size")
"""Entries of a backbone's `pretrained_cfg` that hold for the fine-tuned model."""
_USE = "use"
"""Entry of a merged model that says how its output is read, `Task.merged_use`."""


def merge(run: str | Path, out: str | Path, *, overwrite: bool = False) -> Path:
    """Write the fine-tuned model in plain weights, the update folded into them.

    A folder, in timm's own format: `timm.create_model("local-dir:OUT", pretrained=True)` builds and fills the model,
    `create_transform(**resolve_model_data_config(model))` prepares images as training did, and
    `model.pretrained_cfg["label_names"]` has the classes. Any task but segmentation; the comment that `loading_snippet`
    ends with says how the output is read: thresholds, or mean and standard deviation of a regression, are not part of
    the weights.

    A file: the state dict alone, `.safetensors`. How the model is built, the class names and the data configuration
    are in its metadata, of which `loading_snippet` makes Python code. For a segmentation the names are those of
    `snella_app.backbones.create_segmenter`'s model, `encoder.…` (the backbone's own names, without a head) and
    `decoder.…`; `load_merged` builds and fills it.

    Outputs equal those of the adapted model (bit for bit with SNELLA, whose layers compute with the sum of both weights
    anyway). The temperature that `predict` divides logits by is not folded in; it is in the metadata and in
    `config.json`.

    Args:
        run: Folder of the run.
        out: File to write, `.safetensors`, or folder.
        overwrite: Replace an existing file, or what an earlier call wrote into the folder.

    Returns:
        The path of the file or the folder.

    Raises:
        FileExistsError: The file exists, or the folder holds something.
        ValueError: A file of another ending, or a folder for a segmentation.
    """
    path = Path(out)
    _check_out(path, str(out), overwrite=overwrite)
    loaded = load_run(run, device="cpu")
    if path.suffix == _SUFFIX:
        model = merged_model(loaded.model)
        with made_folder(path.parent):
            write_bytes(path, save(_weights(model), run_metadata(loaded, model)))
            _write_final_head(loaded, _final_head_file(path))
    else:
        write_timm_folder(loaded, path)
    return path


def write_timm_folder(loaded: LoadedRun, path: Path, **entries: Any) -> nn.Module:
    """Write a run's model in timm's own format into a folder.

    Args:
        loaded: The run; its model is used up.
        path: The folder.
        entries: More of its `config.json`.

    Returns:
        The merged model.

    Raises:
        ValueError: The model is no classifier that timm builds; nothing is written.
    """
    model = merged_model(loaded.model)
    config = {**_timm_config(loaded, model, str(path)), **entries}
    with made_folder(path):
        (path / _CONFIG).unlink(missing_ok=True)  # written last: a folder without it is not loaded
        _write_final_head(loaded, _final_head_file(path))
        write_bytes(path / _WEIGHTS, save(_weights(model), {"format": "pt"}))
        write_json(path / _CONFIG, config)
    return model


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as safetensors takes it."""
    return {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}


def _check_out(path: Path, typed: str, *, overwrite: bool) -> None:
    """Refuse other suffixes, and existing files that must not be replaced."""
    if not path.is_dir() and path.suffix.lower() in _OTHER_SUFFIXES:
        raise ValueError(
            f"out must end with {_SUFFIX}, or be a folder for a model in timm's format, got {typed!r}; "
            f"write {str(path.with_suffix(_SUFFIX))!r} or {str(path.with_suffix(''))!r}"
        )
    if path.is_dir() and path.suffix != _SUFFIX:
        others = sorted(child.name for child in path.iterdir() if child.name not in (_CONFIG, _WEIGHTS, LAYER_PROBE))
        if others:
            raise FileExistsError(f"out={path} is a folder with other files, e.g. {others[0]!r}; choose a new folder")
        if next(path.iterdir(), None) is None:
            return
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"out={path} exists; choose another name, or replace it with --overwrite (overwrite=True)"
        )


def run_metadata(loaded: LoadedRun, model: nn.Module) -> dict[str, str]:
    """What a file of the model's weights says of it: texts, most of them JSON."""
    backbone = loaded.info.backbone
    return {
        "format": "pt",
        "architecture": str(backbone.architecture),
        "backbone": str(backbone.name),
        "num_classes": str(backbone.num_classes),
        "img_size": json.dumps(built_in_size(model)),
        "model_args": json.dumps(_model_args(model)),
        "task": loaded.task.name,
        "task_state": json.dumps(loaded.task.state()),
        _USE: loaded.task.merged_use(),
        "classes": json.dumps(loaded.classes),
        "built_from": json.dumps(plain(backbone)),
        "data_config": json.dumps(loaded.info.data_config),
        "temperature": json.dumps(loaded.info.trained_head_temperature),
    }


def _timm_config(loaded: LoadedRun, model: nn.Module, out: str) -> dict[str, Any]:
    """The `config.json` of timm's format: architecture, arguments, preprocessing and labels.

    Raises:
        ValueError: The model is none that timm builds.
    """
    architecture = loaded.info.backbone.architecture
    if loaded.task.head is not None or architecture is None:
        what = f"a {loaded.task.name}'s model" if loaded.task.head is not None else "this model"
        raise ValueError(
            f"out must end with {_SUFFIX} for {what}, which timm does not build, got {out!r}; "
            f"write {out.rstrip('/') + _SUFFIX!r}"
        )
    size = built_in_size(model)
    arguments = _model_args(model) | ({} if size is None else {"img_size": size})
    known: Any = model
    own = {name: value for name, value in dict(known.pretrained_cfg).items() if name in _KEPT_ENTRIES}
    outputs = loaded.info.backbone.num_classes
    return {
        "architecture": architecture,
        "num_classes": outputs,
        "num_features": known.num_features,
        "label_names": loaded.classes,
        "temperature": loaded.info.trained_head_temperature,
        "task": loaded.task.name,
        "task_state": loaded.task.state(),
        _USE: loaded.task.merged_use(),
        **({"model_args": arguments} if arguments else {}),
        "pretrained_cfg": {
            **own,
            **loaded.info.data_config,
            "fixed_input_size": size is not None,
            "num_classes": outputs,
            "custom_load": False,
        },
    }


def loading_snippet(path: str | Path) -> str:
    """A Python snippet that loads the output of `merge` as `model`: with timm alone; for segmentation, with snella.

    That of a classifier also makes `transform`, from a PIL image to the model's input, and `classes`, its labels.

    Args:
        path: File or folder written by `merge`.
    """
    if Path(path).is_dir():
        use = json.loads((Path(path) / _CONFIG).read_text(encoding="utf-8"))[_USE]
        libraries = "timm, torch" if "torch." in use else "timm"
        lines = (
            f"import {libraries}\nmodel = timm.create_model({f'local-dir:{path}'!r}, pretrained=True).eval()\n"
            "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n"
            "classes = model.pretrained_cfg['label_names']\n"
        )
        return lines + _use_lines(Path(path), use)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    if task_class(metadata["task"]).head is not None:
        return f"from snella_app.runs import load_merged\nmodel = load_merged({str(path)!r})"
    size = json.loads(metadata["img_size"])
    arguments = f"{metadata['architecture']!r}, num_classes={metadata['num_classes']}"
    arguments += "" if size is None else f", img_size={size}"
    more = json.loads(metadata["model_args"])
    arguments += "".join(f", {name}={value!r}" for name, value in more.items())
    use = metadata[_USE]
    libraries = "json, timm, torch" if "torch." in use else "json, timm"
    return (
        f"import {libraries}; from safetensors import safe_open; from safetensors.torch import load_file\n"
        f"model = timm.create_model({arguments}).eval()\n"
        f"model.load_state_dict(load_file({str(path)!r}))\n"
        f"metadata = safe_open({str(path)!r}, 'pt').metadata()\n"
        "transform = timm.data.create_transform(**json.loads(metadata['data_config']))\n"
        f"classes = json.loads(metadata['classes'])\n{_use_lines(Path(path), use)}"
    )


def _final_head_file(path: Path) -> Path:
    """Where the final head of a merged folder or file is written."""
    return path / LAYER_PROBE if path.suffix != _SUFFIX else path.with_name(f"{path.stem}.{LAYER_PROBE}")


def _write_final_head(loaded: LoadedRun, path: Path) -> None:
    """Write the final head beside a merged model, if the run has one; remove that of an earlier model."""
    path.unlink(missing_ok=True)
    if loaded.probe is not None:
        loaded.probe.save(path)


def _use_lines(path: Path, use: str) -> str:
    """The comment on how outputs are read, after the lines that compute those of the final head, if there is one."""
    head = _final_head_file(path)
    return f"{layer_probe_snippet(head)}\n{use.replace('model(', 'logits_of(')}" if head.is_file() else use


def views_notes(info: RunInfo) -> list[str]:
    """Lines that say why `predict` gives other numbers than the plain model; none where it gives the same.

    Args:
        info: The run's record.
    """
    notes = []
    if info.final_head == "layers":
        notes.append(
            "predict uses the final head on several layers; this model by itself has the trained head, whose "
            "validation results are in metrics.json (final_head); onnx, torchscript and torch-export have the final one"
        )
    if info.tta == 2:
        notes.append(
            "predict averages an image and its flip (--tta 1 does not); this model's outputs are of the image alone"
        )
    return notes


def describe_file(path: str | Path) -> str:
    """The content of a merged file or folder, in a few words."""
    if Path(path).is_dir():
        return "a model in timm's format"
    with safe_open(path, "pt") as file:
        task = file.metadata()["task"]
    if task_class(task).head is None:
        return "plain timm weights"
    return "plain weights of the backbone (encoder.…) and the decoder (decoder.…)"


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
    described = record_from(BackboneInfo, {**json.loads(metadata["built_from"]), "pretrained": False})
    model = make_backbone(described, metadata["task"])
    model.load_state_dict(load_file(path))
    return model.eval()


def _model_args(model: nn.Module) -> dict[str, Any]:
    """Arguments of `timm.create_model` that the architecture's name alone does not say."""
    return dict((getattr(model, "pretrained_cfg", None) or {}).get("model_args") or {})


def merged_model(model: nn.Module) -> nn.Module:
    """The backbone with what was trained in its plain weights.

    Raises:
        ValueError: The method cannot be folded.
    """
    return merge_trained(model)
