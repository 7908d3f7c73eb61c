"""Merge the update of a run into its backbone, and write the result as plain timm weights.

The update is the change to the weights in training. A run can also have a final head, which reads the features of
several layers and is written to a separate file.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from snella.compat.sparse_file import tensors_bytes
from snella_app.backbones.checkpoint import WEIGHT_SUFFIXES
from snella_app.backbones.create import model_arguments
from snella_app.data.images import PILLOW_MODES
from snella_app.data.options import FULL_WHITE
from snella_app.files import check_new, create_folder, expand_user, write_bytes, write_json
from snella_app.methods import merge_trained
from snella_app.records.record import plain, record_from
from snella_app.records.run import BackboneInfo, RunInfo
from snella_app.runs.layer_probe import LAYER_PROBE, LayerProbe, MixedHead
from snella_app.runs.model import LoadedRun, configured_image_size, load_single_run, make_backbone

_SUFFIX = ".safetensors"
_OTHER_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".npz", ".onnx", ".h5", ".pkl", ".tar", ".gz", ".zip")
"""Suffixes that `out` must not have, because they suggest a file in another format."""
_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INHERITED_ENTRIES = ("first_conv", "classifier", "license", "pool_size")
"""Entries of a backbone's `pretrained_cfg` that also apply to the fine-tuned model."""
_USE = "use"
"""Entry of the metadata or of `config.json` that explains the outputs: the result of `Task.decoding_comment`."""


@dataclass(frozen=True)
class ExportResult:
    """Result of a merge or an export.

    Attributes:
        path: Written file or folder.
        description: Description of the content.
        notes: Notes for the user, e.g. on differences from `predict`.
        snippet: Python code that loads the file or folder.
    """

    path: Path
    description: str
    notes: list[str]
    snippet: str


def merge(run: str | Path, out: str | Path, *, overwrite: bool = False) -> ExportResult:
    """Merge the update of a run into the backbone, and write the model as plain weights.

    A folder is written in timm's format: `timm.create_model("local-dir:OUT", pretrained=True)` loads the model,
    `create_transform(**resolve_model_data_config(model))` preprocesses images as in evaluation, and
    `model.pretrained_cfg["label_names"]` contains the classes. Folders are supported for timm backbones and all
    tasks except segmentation. The weights include neither the thresholds of labels nor the mean and standard deviation
    of regression targets; the last comment of the loading snippet explains how to apply these to the outputs.

    If `out` is a `.safetensors` file, it contains the state dict. Its metadata contains the architecture, class names,
    and data configuration, which the loading snippet uses. For segmentation, the parameter names follow
    `snella_app.backbones.segmenter.create_segmenter`: `encoder.…` (names of the backbone, without a head) and
    `decoder.…`. `load_merged` loads the model.

    The outputs match the adapted model's. With SNELLA, they are bit-identical, because its layers compute with the
    sum of the pre-trained weight and the update. The calibration temperature is not merged but stored in the metadata
    or in `config.json`. A final head is written to `layer_probe.safetensors` in the folder, or
    `NAME.layer_probe.safetensors` next to the file.

    Args:
        run: Run folder.
        out: Output file (`.safetensors`) or folder.
        overwrite: Replace an existing file, or the output of an earlier call in the folder.

    Returns:
        Path of the file or the folder, differences from `predict`, and Python code that loads the output as `model`,
        with timm, or with snella for segmentation. Except for segmentation, the code also defines `classes`, and
        `transform`, which converts a PIL image to the model input.

    Raises:
        FileExistsError: If the output exists and `overwrite` is not set, a file would replace a folder or vice versa,
            or the folder has other files.
        FileNotFoundError: If `run` is not a run folder, or its adapter is missing.
        ValueError: If `out` has an unsupported suffix, or is a folder and timm cannot build the model (segmentation,
            backbones outside timm); or if the method cannot be merged, or `run` is a cross-validation run.
    """
    path = Path(out)
    _check_out(path, overwrite=overwrite)
    loaded = load_single_run(run, device="cpu")
    notes = prediction_notes(loaded.info)
    if (temperature := loaded.info.trained_head_temperature) != 1.0:
        notes.append(f"predict divides the outputs by the temperature {temperature:g}, which is stored with the model")
    if path.suffix != _SUFFIX:
        write_timm_folder(loaded, path)
        return ExportResult(path, "a model in timm's format", notes, _folder_snippet(loaded, path))
    model = merge_trained(loaded.model)
    metadata = run_metadata(loaded, model)
    with create_folder(path.parent):
        _write_weights(loaded, path, path, tensors_bytes(_weights(model), metadata))
    description = "plain timm weights"
    if loaded.task.target == "masks":
        description = "plain weights of the backbone (encoder.…) and the decoder (decoder.…)"
    return ExportResult(path, description, notes, _file_snippet(loaded, path, metadata))


def write_timm_folder(loaded: LoadedRun, path: Path, **entries: Any) -> dict[str, Any]:
    """Write the model of a run in timm's folder format.

    Args:
        loaded: The run; do not use its model afterwards.
        path: Output folder.
        entries: Additional entries of `config.json`.

    Returns:
        Content of `config.json`.

    Raises:
        ValueError: If timm cannot build the model. Then nothing is written.
    """
    model = merge_trained(loaded.model)
    config = {**_timm_config(loaded, model, str(path)), **entries}
    with create_folder(path):
        (path / _CONFIG).unlink(missing_ok=True)  # written last, since timm cannot load a folder without it
        _write_weights(loaded, path, path / _WEIGHTS, tensors_bytes(_weights(model), {"format": "pt"}))
        write_json(path / _CONFIG, config)
    return config


def _write_weights(loaded: LoadedRun, path: Path, file: Path, content: bytes) -> None:
    """Write merged weights to `file`, and the final head, if any, next to it; `path` is the output of `merge`."""
    head_file = _final_head_file(path)
    head_file.unlink(missing_ok=True)  # first, so that an interruption leaves no head of another model
    write_bytes(file, content)
    if loaded.probe is not None:
        loaded.probe.save(head_file)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict as contiguous tensors for safetensors."""
    return {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}


def _check_out(path: Path, *, overwrite: bool) -> None:
    """Raise an error for an unsupported suffix, and for an existing file or folder that must not be replaced."""
    is_file = path.suffix == _SUFFIX
    if path.exists() and path.is_dir() == is_file:
        old, new = ("folder", "file") if is_file else ("file", "folder")
        rule = "ends" if is_file else "does not end"
        raise FileExistsError(
            f"out={path} is a {old}, but merge writes a {new} if out {rule} with {_SUFFIX}; choose another name"
        )
    if not is_file and not path.is_dir() and path.suffix.lower() in (_SUFFIX, *_OTHER_SUFFIXES):
        raise ValueError(
            f"out must end with {_SUFFIX}, or be a folder for a model in timm's format, got {str(path)!r}; "
            f"use {str(path.with_suffix(_SUFFIX))!r} or {str(path.with_suffix(''))!r}"
        )
    if path.is_dir():
        check_folder_files(path, (_CONFIG, _WEIGHTS, LAYER_PROBE))
        is_empty = all(file.name.startswith(".") for file in path.iterdir())
        if is_empty:
            return
    check_new("out", path, overwrite=overwrite, is_folder=not is_file)
    if is_file:
        check_new("out", _final_head_file(path), overwrite=overwrite)


def check_folder_files(folder: Path, written: Collection[str]) -> None:
    """Check that an output folder contains only hidden files and the files named in `written`.

    Raises:
        FileExistsError: If there are other files.
    """
    visible = (file.name for file in folder.iterdir() if not file.name.startswith("."))
    unexpected = sorted(name for name in visible if name not in written)
    if unexpected:
        raise FileExistsError(f"out={folder} is a folder with other files, e.g. {unexpected[0]!r}; choose a new folder")


def run_metadata(loaded: LoadedRun, model: nn.Module) -> dict[str, str]:
    """Return the metadata of a weight file as strings, most of them JSON, because safetensors stores only strings."""
    backbone = loaded.info.backbone
    return {
        "format": "pt",
        "architecture": str(backbone.architecture),
        "backbone": str(backbone.name),
        "num_classes": str(backbone.num_classes),
        "img_size": json.dumps(configured_image_size(model)),
        "model_args": json.dumps(model_arguments(model)),
        "task": loaded.task.name,
        "task_state": json.dumps(loaded.task.state()),
        _USE: _decoding_comment(loaded),
        "classes": json.dumps(loaded.classes),
        "built_from": json.dumps(plain(backbone)),
        "data_config": json.dumps(loaded.info.data_config),
        "temperature": json.dumps(loaded.info.trained_head_temperature),
    }


def _timm_config(loaded: LoadedRun, model: nn.Module, out: str) -> dict[str, Any]:
    """Return the `config.json` of timm's format: architecture, arguments, preprocessing, and labels.

    Raises:
        ValueError: If timm cannot build the model.
    """
    architecture = loaded.info.backbone.architecture
    if loaded.task.target == "masks" or architecture is None:
        noun = f"a {loaded.task.name} model" if loaded.task.target == "masks" else "this model"
        raise ValueError(
            f"out must end with {_SUFFIX} for {noun}, which timm cannot build, got {out!r}; "
            f"use {out.rstrip('/') + _SUFFIX!r}"
        )
    size = configured_image_size(model)
    arguments = model_arguments(model)
    if size is not None:
        arguments = {**arguments, "img_size": size}
    timm_model: Any = model
    inherited = {name: value for name, value in dict(timm_model.pretrained_cfg).items() if name in _INHERITED_ENTRIES}
    num_outputs = loaded.info.backbone.num_classes
    return {
        "architecture": architecture,
        "num_classes": num_outputs,
        "num_features": timm_model.num_features,
        "label_names": loaded.classes,
        "temperature": loaded.info.trained_head_temperature,
        "task": loaded.task.name,
        "task_state": loaded.task.state(),
        _USE: _decoding_comment(loaded),
        **({"model_args": arguments} if arguments else {}),
        "pretrained_cfg": {
            **inherited,
            **loaded.info.data_config,
            "fixed_input_size": size is not None,
            "num_classes": num_outputs,
            "custom_load": False,
        },
    }


def _folder_snippet(loaded: LoadedRun, path: Path) -> str:
    """Return Python code that loads a folder in timm's format."""
    return (
        f"import timm{_torch_import(loaded)}\n"
        f"model = timm.create_model({f'local-dir:{path}'!r}, pretrained=True).eval()\n"
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n"
        f"classes = model.pretrained_cfg['label_names']\n{_use_lines(loaded, path)}"
    )


def _file_snippet(loaded: LoadedRun, path: Path, metadata: Mapping[str, str]) -> str:
    """Return Python code that loads a weight file with its metadata."""
    if loaded.task.target == "masks":
        return f"from snella_app.runs import load_merged\nmodel = load_merged({str(path)!r})"
    size = json.loads(metadata["img_size"])
    arguments = json.loads(metadata["model_args"])
    if size is not None:
        arguments = {"img_size": size, **arguments}
    options = "".join(f", {name}={value!r}" for name, value in arguments.items())
    imports = "; from safetensors import safe_open; from safetensors.torch import load_file"
    return (
        f"import json, timm{_torch_import(loaded)}{imports}\n"
        f"model = timm.create_model({metadata['architecture']!r}, num_classes={metadata['num_classes']}{options})"
        ".eval()\n"
        f"model.load_state_dict(load_file({str(path)!r}))\n"
        f"metadata = safe_open({str(path)!r}, 'pt').metadata()\n"
        "transform = timm.data.create_transform(**json.loads(metadata['data_config']))\n"
        f"classes = json.loads(metadata['classes'])\n{_use_lines(loaded, path)}"
    )


def _torch_import(loaded: LoadedRun) -> str:
    """Return the import of torch if the comment that explains the outputs needs it."""
    return ", torch" if "torch." in _decoding_comment(loaded) else ""


def _decoding_comment(loaded: LoadedRun, model: str = "model") -> str:
    """Return the comment that explains the outputs of `model` for an image with the channels of the run."""
    mode = PILLOW_MODES.get(loaded.info.backbone.channels)
    image = f"image.convert({mode!r})" if mode else "image"
    return loaded.task.decoding_comment(f"{model}(transform({image})[None])")


def _final_head_file(path: Path) -> Path:
    """Return the path for the final head of a merged folder or file."""
    return path / LAYER_PROBE if path.suffix != _SUFFIX else path.with_name(f"{path.stem}.{LAYER_PROBE}")


def _use_lines(loaded: LoadedRun, path: Path) -> str:
    """Return the comments on 16-bit images and the outputs, after the code for the final head if there is one."""
    lines = _depth_comment(loaded)
    if loaded.probe is None:
        return lines + _decoding_comment(loaded)
    return f"{_final_head_code(loaded.probe, _final_head_file(path))}\n{lines}{_decoding_comment(loaded, 'logits_of')}"


def _depth_comment(loaded: LoadedRun) -> str:
    """Return the comment on 16-bit images, or an empty string if the run's images are not read with Pillow."""
    if loaded.info.backbone.channels not in PILLOW_MODES:
        return ""
    white = loaded.info.data.white or FULL_WHITE
    return f"# convert() clips 16-bit gray values at 255; multiply them by 255 / {white} first\n"


def _final_head_code(probe: LayerProbe, path: Path) -> str:
    """Return Python code that computes the outputs of the final head in `path` from the merged `model`."""
    arguments = f"indices={probe.layers}, norm=True, output_fmt='NCHW'"
    pooled = "    pooled += [grid.mean((2, 3)) for grid in maps]\n"
    if probe.has_tokens:  # `layer_features` omits the token of the last layer
        arguments += ", return_prefix_tokens=True"
        pooled = (
            "    for grid, tokens in maps[:-1]:\n        pooled += [grid.mean((2, 3)), tokens[:, 0]]\n"
            "    pooled += [maps[-1][0].mean((2, 3))]\n"
        )
    mixture = ""
    outputs = "features @ head['weight'].T + head['intercept']"
    if isinstance(probe.head, MixedHead):
        outputs = "((1 - share).log() + first.log_softmax(-1)).logaddexp(share.log() + second.log_softmax(-1))"
        mixture = (
            "    x = ((features - head['mean']) / head['std']).clamp(-10, 10)\n"
            "    distances = torch.cdist(x, head['centers'].float())\n"
            "    kernel = (-distances.square() / (2 * features.shape[1])).exp().cpu().double()\n"
            "    first = (kernel @ head['weight'].double().T).float() + head['intercept']\n"
            "    second = features @ head['linear.weight'].T + head['linear.intercept']\n"
            "    share = head['share']\n"
        )
    return (
        f"import torch; from safetensors.torch import load_file\nhead = load_file({str(path)!r})\n"
        "def logits_of(images):  # logits of the final head on several layers, as in snella predict\n"
        f"    final, maps = model.forward_intermediates(images, {arguments})\n"
        "    pooled = [model.forward_head(final, pre_logits=True).flatten(1)]\n"
        f"{pooled}    features = torch.cat(pooled, 1)\n"
        f"{mixture}    return {outputs}"
    )


def prediction_notes(info: RunInfo) -> list[str]:
    """Return notes on differences between `predict` and the merged model, except the trained head's temperature."""
    notes = []
    if info.final_head == "layers":
        notes.append(
            "predict uses the final head on several layers; this model has the trained head; onnx, torchscript and "
            "torch-export contain the final head"
        )
        if info.temperature != 1.0:
            notes.append(f"predict divides the outputs of the final head by the temperature {info.temperature:g}")
    if info.tta == 2:
        notes.append(
            "predict averages the outputs for an image and its flip, unless --tta 1 is set; this model uses only the "
            "image"
        )
    return notes


def load_merged(path: str | Path) -> nn.Module:
    """Load the model of a merged file, for any task, without adapters.

    Args:
        path: File written by `merge`.

    Returns:
        The model in evaluation mode.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file was not written by `merge`, or is a folder.
    """
    if Path(path).is_dir():
        raise ValueError(
            f"path must be a file written by snella merge, got the folder {str(path)!r}; timm loads folders: "
            f"timm.create_model({f'local-dir:{path}'!r}, pretrained=True)"
        )
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"path must be a file written by snella merge, got {str(path)!r}: {error}") from error
    if "built_from" not in metadata or metadata.get("format") != "pt":  # a sparse file has a different format
        raise ValueError(f"path must be a file written by snella merge, got {str(path)!r} with different metadata")
    # the file contains all weights, so the files with pre-trained weights may have changed
    unchecked = {"pretrained": False, "digests": None}
    backbone = record_from(BackboneInfo, {**json.loads(metadata["built_from"]), **unchecked})
    if metadata.get("architecture", "None") != "None":
        # for a timm model, they may also be missing
        if backbone.weights is not None and not expand_user(backbone.weights).is_file():
            backbone = replace(backbone, weights=None)
        is_path = Path(backbone.name).suffix in WEIGHT_SUFFIXES or Path(backbone.name).is_absolute()
        if is_path and not expand_user(backbone.name).exists():
            size = json.loads(metadata["img_size"])
            backbone = replace(backbone, name=metadata["architecture"], img_size=backbone.img_size or size)
    model = make_backbone(backbone, metadata["task"])
    model.load_state_dict(load_file(path))
    return model.eval()
