"""Export the model of a run to other formats, and verify the exported outputs.

ONNX, TorchScript, and `torch.export` files contain a graph: the operations of the model with their weights. A sparse
file stores the update, i.e. the changes to the weights in training, without the unchanged weights. A LoRA approximates
the update.
"""

import dataclasses
import importlib
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import save_as_lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from snella.compat.sparse_file import Entries, SparsePatch, ValueDtype, digest_of, load_sparse
from snella.layer import SnellaLayer
from snella_app.console import counted
from snella_app.data.datasets import file_paths, read_at_side
from snella_app.data.images import read_image
from snella_app.files import annotate_write_errors, check_new, create_folder, sync_tree, write_json, write_text
from snella_app.methods import merge_trained
from snella_app.methods.model_parts import base_model
from snella_app.records.run import RunInfo
from snella_app.report.card import model_card
from snella_app.runs.folder import sibling_path
from snella_app.runs.graphs import (
    ExportedGraph,
    compare_outputs,
    export_onnx,
    export_torch,
    export_torchscript,
    preprocessing_code,
    quiet_exporters,
)
from snella_app.runs.images import load_run_splits
from snella_app.runs.layer_probe import LAYER_PROBE
from snella_app.runs.merge import ExportResult, check_folder_files, prediction_notes, run_metadata, write_timm_folder
from snella_app.runs.model import LoadedRun, load_single_run, make_backbone
from snella_app.tasks import TASKS
from snella_app.text import first_line

_NUM_IMAGES = 8  # maximum number of the run's images on which outputs are compared
_MAX_CHANGED = 0.9  # maximum fraction of changed weights in a sparse file
_STORE_ALL = "use snella merge to a .safetensors file, which stores all weights"
_IN_METADATA = "stored as 'temperature' in the metadata"
_IN_CONFIG = "stored as 'temperature' in config.json, but no library applies it automatically"


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export.

    Attributes:
        out: Output file or folder, for the loading snippet.
        opset: ONNX opset version, or None for the exporter's default.
        rank: Rank of the LoRA.
        values: Data type of the values in a sparse file.
        logits: Export the model's raw outputs instead of the outputs of `predict`.
        images: Preprocessed images to compare outputs on, `[n, C, H, W]`; empty for formats without a comparison.
        example: File of the first image, for the loading snippet. None if `images` is empty, or the first image is not
            a file.
    """

    out: Path
    opset: int | None
    rank: int
    values: ValueDtype
    logits: bool
    images: Tensor
    example: Path | None


@dataclass(frozen=True)
class ExportFormat:
    """Export format: an entry of `FORMATS`.

    Attributes:
        suffix: Suffix of the file or folder name.
        write: `(loaded, path, options) -> (notes, snippet)`; writes the export to a temporary path.
        options: Names of the format-specific arguments of `export` that the format supports.
        packages: Required packages of the extra `export`.
        is_folder: True if the export is a folder.
        unsupported: Names of the tasks that the format does not support.
    """

    suffix: str
    write: Callable[[LoadedRun, Path, ExportOptions], tuple[list[str], str]]
    options: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    is_folder: bool = False
    unsupported: Collection[str] = ()


def export(
    run: str | Path,
    format: str,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    opset: int | None = None,
    rank: int | None = None,
    values: ValueDtype | None = None,
    images: Sequence[str | Path] = (),
    logits: bool = False,
) -> ExportResult:
    """Export the best model of a run to another format.

    Unless `logits` is set, the graphs in ONNX, TorchScript, and `torch.export` files return the outputs of `predict`,
    e.g. class probabilities calibrated with the run's temperature, or regression values in their original units.

    The export is written to a temporary path and renamed after verification, which is atomic for files. For ONNX,
    TorchScript, and `torch.export`, the outputs for real images are compared with the model's at up to three batch
    sizes, and may differ by at most 1e-4 times the largest output. Sparse files with fp32 values restore the fine-tuned
    weights bit for bit.

    Args:
        run: Run folder.
        format: Key of `FORMATS`.
        out: Output file or folder. None selects a path next to the run, with the name of the run.
        overwrite: Replace the output of an earlier export.
        opset: ONNX opset version (onnx).
        rank: Rank (lora); 32 if None.
        values: Data type of the values (sparse); fp32 if None.
        images: Image files to compare outputs on (onnx, torchscript, torch-export, lora); up to 8 images of the run if
            empty.
        logits: Export raw outputs, without softmax, sigmoid, target units, temperature, or averaging over flips (onnx,
            torchscript, torch-export).

    Returns:
        Path of the export, name of the format, notes (e.g. the measured differences), and the loading snippet.

    Raises:
        FileExistsError: If `out` exists and may not be replaced.
        FileNotFoundError: If `run` is not a run folder, or its adapter is missing.
        ImportError: If a required package is missing. The message names the extra to install.
        ValueError: If the format is unknown, or does not support an option, the task, or the method; if outputs differ,
            an image cannot be read, or `out` has no name; or if the run is damaged or a cross-validation run.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    export_format = FORMATS[format]
    _check_options(format, {"opset": opset, "rank": rank, "values": values, "images": images, "logits": logits})
    path = sibling_path(run, export_format.suffix) if out is None else Path(out)
    if path.name in ("", ".."):
        default = sibling_path(run, export_format.suffix).name
        raise ValueError(f"out must end with a name, got {str(path)!r}; use e.g. {default!r}")
    check_new("out", path, overwrite=overwrite, is_folder=export_format.is_folder)
    for package in export_format.packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ImportError(f"format {format} needs {package}: pip install 'snella[export]' ({error})") from None
    loaded = load_single_run(run, device="cpu")
    task = loaded.task.name
    if task in export_format.unsupported:
        supported = ", ".join(name for name, entry in FORMATS.items() if task not in entry.unsupported)
        raise ValueError(f"format={format} does not support the task {task}; use one of {supported}")
    batch = torch.empty(0)
    example: Path | None = None
    if "images" in export_format.options:
        batch, example = _load_images(loaded, images)
    options = ExportOptions(path, opset, rank or 32, values or "fp32", logits, batch, example)
    temporary = path.with_name(f".{path.name}.tmp")
    with create_folder(path.parent), annotate_write_errors(path):
        try:
            _remove(temporary)
            notes, snippet = export_format.write(loaded, temporary, options)
            sync_tree(temporary)
            if path.is_dir():
                # an earlier export may also contain the file of a final head
                check_folder_files(path, [*(file.name for file in temporary.iterdir()), LAYER_PROBE])
                _remove(path)
            temporary.replace(path)
        finally:
            _remove(temporary)
    return ExportResult(path, format, notes, snippet)


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError for options of other formats, and for an invalid rank."""
    for option, value in options.items():
        is_given = value is not None and value is not False and value not in ((), [])
        if is_given and option not in FORMATS[name].options:
            supporting = ", ".join(other for other, entry in FORMATS.items() if option in entry.options)
            raise ValueError(f"{option}={value} is an option of format {supporting}, not of {name}; leave it out")
    if options["rank"] is not None and options["rank"] < 1:
        raise ValueError(f"rank must be at least 1, got {options['rank']}")


def _load_images(loaded: LoadedRun, images: Sequence[str | Path]) -> tuple[Tensor, Path | None]:
    """Preprocess the given images, or up to 8 test, validation, or training images of the run if `images` is empty.

    Returns:
        Batch of images, and the file of the first image, or None if that image is not a file.
    """
    if images:
        paths = [Path(image) for image in images]
        return torch.stack([loaded.transform(read_image(path, loaded.reading)) for path in paths]), paths[0]
    try:
        parts = load_run_splits(loaded.folder, loaded.info.data).parts
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"images must be given to compare outputs, since the run's images cannot be read: {error}"
        ) from None
    dataset = parts.get("test") or parts.get("val") or parts["train"]
    (resized,) = read_at_side([dataset.with_transform(loaded.transform)], loaded.reading.side)
    batch = torch.stack([resized[index][0] for index in range(min(_NUM_IMAGES, len(resized)))])
    return batch, file_paths(dataset).get(0)


def _remove(path: Path) -> None:
    """Delete a file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _logits_notes(info: RunInfo, location: str) -> list[str]:
    """Return notes for exported logits, e.g. on how to compute the probabilities of `predict` from them."""
    notes = prediction_notes(info)
    temperature = info.trained_head_temperature
    if temperature == 1.0:
        return notes
    command = "predict --tta 1" if info.tta == 2 else "predict"  # the export does not use the flip
    formula = f"softmax(outputs / {temperature:g}) gives the probabilities of {command}"
    return [f"outputs are uncalibrated logits: {formula}; the temperature is {location}", *notes]


class _FinalOutputs(nn.Module):
    """Model that returns the outputs of `predict`."""

    def __init__(self, model: nn.Module, loaded: LoadedRun) -> None:
        super().__init__()
        self.model = model
        self.task = loaded.task
        self.temperature = loaded.info.temperature
        self.tta = loaded.info.tta

    def forward(self, images: Tensor) -> Tensor:
        """Return probabilities, or regression values in their original units."""
        return self.task.final_outputs(self.task.outputs(self.model, images, self.tta), self.temperature)


def _write_graph(
    export_graph: Callable[..., ExportedGraph], loaded: LoadedRun, path: Path, options: ExportOptions
) -> tuple[list[str], str]:
    """Export the merged model with the final head as a graph, and compare the graph's outputs with the model's."""
    backbone = merge_trained(loaded.model)
    merged = (backbone if loaded.probe is None else loaded.probe.with_model(backbone)).eval()
    model = merged if options.logits else _FinalOutputs(merged, loaded).eval()
    output_name = "logits" if options.logits else loaded.task.final_name
    # the graph contains the final head, so the run's temperature applies to its outputs as with a trained head
    info = dataclasses.replace(loaded.info, final_head="trained")
    metadata = run_metadata(dataclasses.replace(loaded, info=info), backbone)
    if not options.logits:
        # the graph divides by the temperature itself
        metadata |= {"temperature": "1.0", "use": f"# outputs are the {output_name} of snella predict"}
    # two images, because torch.export treats a batch size of 1 as a constant
    example = options.images[:1].expand(2, -1, -1, -1).contiguous()
    with quiet_exporters():
        try:
            graph = export_graph(model, example, metadata, output_name, options.opset)
        except Exception as error:  # only the first line; the rest is the exporter's log
            reason = first_line(error)[:300]
            hint = "; leave out opset" if options.opset else ""
            raise ValueError(f"torch cannot export this model: {reason}{hint}") from error
        note = compare_outputs(graph, model, options.images)
    path.write_bytes(graph.content)
    if options.logits:
        notes = _logits_notes(info, _IN_METADATA)
    else:
        divided = f", from logits divided by the temperature {info.temperature:g}" if info.temperature != 1.0 else ""
        notes = [f"outputs are the {output_name} of predict{divided}; use --logits for logits"]
        if info.tta == 2:
            notes.append("outputs are averaged over an image and its flip, as in predict")
    return [note, *notes], _graph_snippet(loaded, options, graph, output_name)


def _graph_snippet(loaded: LoadedRun, options: ExportOptions, graph: ExportedGraph, output_name: str) -> str:
    """Return Python code that loads a graph and runs it on the example image, or on zeros."""
    preprocessing = None if options.example is None else preprocessing_code(loaded)
    lines = ["import json", f"import numpy as np, {graph.module}"]
    if preprocessing is None:
        shape = (1, *loaded.info.data_config["input_size"])
        images = f"np.zeros({shape}, np.float32)  # use images preprocessed as in 'data_config' in the file"
    else:
        lines += ["from PIL import Image, ImageOps", *preprocessing]
        images = f"transform(Image.open({str(options.example)!r}))[None]"
    if loaded.task.target == "masks":
        result = f"{output_name}[0].argmax(0)"
    else:
        result = f"{output_name}[0]" if options.logits else f"dict(zip(classes, {output_name}[0].tolist()))"
    lines += [
        graph.load_code.replace("PATH", repr(str(options.out))),
        f"images = {images}",
        f"{output_name} = {graph.run_code}",
    ]
    return "\n".join([*lines, f"print({result})"])


def _write_timm(loaded: LoadedRun, path: Path, options: ExportOptions) -> tuple[list[str], str]:
    """Write a folder in timm's format."""
    _write_timm_folder(loaded, path)
    snippet = f"import timm\nmodel = timm.create_model('local-dir:' + {str(options.out)!r}, pretrained=True).eval()"
    return _logits_notes(loaded.info, _IN_CONFIG), snippet


def _decoding_lines(loaded: LoadedRun) -> str:
    """Return comment lines on decoding the outputs, or an empty string for classification, which notes describe."""
    if loaded.task.name == "classification":
        return ""
    return f"\n# decode the outputs of a batch with one image:\n{loaded.task.decoding_comment('outputs')}"


def _write_timm_folder(loaded: LoadedRun, path: Path, **entries: Any) -> dict[str, Any]:
    """Write a folder in timm's format and return its `config.json`; raise ValueError for backbones outside timm."""
    if loaded.info.backbone.architecture is None:
        raise ValueError(
            f"timm cannot build {loaded.info.backbone.name}; use --format onnx, or snella merge to a .safetensors file"
        )
    return write_timm_folder(loaded, path, **entries)


def _write_hf(loaded: LoadedRun, path: Path, options: ExportOptions) -> tuple[list[str], str]:
    """Write a folder for transformers and the Hugging Face Hub: timm's format with a preprocessor and a model card."""
    # transformers reads timm folders; these entries set the model class explicitly
    entries = {"model_type": "timm_wrapper", "architectures": ["TimmWrapperForImageClassification"]}
    config = _write_timm_folder(loaded, path, **entries)
    processor = {name: config[name] for name in ("architecture", "pretrained_cfg")}
    write_json(path / "preprocessor_config.json", {"image_processor_type": "TimmWrapperImageProcessor", **processor})
    code = "from transformers import pipeline\nclassify = pipeline('image-classification', model={!r})"
    use = f"```python\n{code.format('PATH_OR_NAME')}\nprint(classify('image.jpg'))\n```"
    _write_card(loaded, path, use, "transformers", ["timm"])
    return _logits_notes(loaded.info, _IN_CONFIG), code.format(str(options.out))


def _write_lora(loaded: LoadedRun, path: Path, options: ExportOptions) -> tuple[list[str], str]:
    """Write the closest LoRA of the given rank, and measure its differences from the run's update and outputs."""
    model: Any = loaded.model
    if isinstance(model, PeftModel) and model.peft_config["default"].peft_type == "LORA":
        raise ValueError(f"the adapter of the run is already a LoRA; use {loaded.folder.adapter}")
    with torch.no_grad():
        expected = model(options.images)
    try:
        save_as_lora(path, model, options.rank)
    except (TypeError, ValueError) as error:  # e.g. layers that are not linear
        raise ValueError(
            f"PEFT cannot convert the {loaded.info.method} model to a LoRA with rank={options.rank}: {error}"
        ) from error
    code = "from peft import PeftModel\nmodel = PeftModel.from_pretrained(backbone, {!r})  # {}"
    backbone = loaded.info.backbone
    card_code = code.format("PATH_OR_NAME", "the backbone above, with the same number of classes")
    _write_card(loaded, path, f"```python\n{card_code}\n```", "peft", [])
    lora_model = PeftModel.from_pretrained(make_backbone(backbone, loaded.task.name), str(path)).eval()
    layers = _tuner_layers(model)
    squared_error = 0.0
    squared_norm = 0.0
    with torch.no_grad():
        lora_outputs = lora_model(options.images)
        for name, layer in _tuner_layers(lora_model).items():
            delta = layers[name].get_delta_weight("default")
            squared_error += float((layer.get_delta_weight("default") - delta).double().square().sum())
            squared_norm += float(delta.double().square().sum())
    weight_error = (squared_error / squared_norm) ** 0.5 if squared_norm else 0.0
    output_error = float((lora_outputs - expected).abs().max() / expected.abs().max())
    note = (
        f"rank {options.rank}: ‖ΔW − BA‖ / ‖ΔW‖ = {weight_error:.4f} (Frobenius, all layers); outputs on "
        f"{counted(len(lora_outputs), 'image')} differ by at most {output_error:.1e} times the largest output"
    )
    if loaded.task.name == "classification":
        agreement = float((lora_outputs.argmax(1) == expected.argmax(1)).double().mean())
        note += f"; {agreement:.1%} of predictions agree"
    notes = _logits_notes(loaded.info, "not stored in the folder")
    return [note, *notes], code.format(str(options.out), backbone.name) + _decoding_lines(loaded)


def _write_card(loaded: LoadedRun, path: Path, use: str, library: str, tags: Sequence[str]) -> None:
    """Write the model card of an exported folder, whose model has the trained head."""
    run = loaded.folder.path
    card = model_card(run, use, name=run.resolve().name, library=library, tags=tags, has_final_head=False)
    write_text(path / "README.md", card)


def _write_sparse(loaded: LoadedRun, path: Path, options: ExportOptions) -> tuple[list[str], str]:
    """Write a file of the changed weights, and check how exactly it restores the fine-tuned weights."""
    base = make_backbone(loaded.info.backbone, loaded.task.name)
    patch = sparse_patch(loaded.model, base)
    model = merge_trained(loaded.model)
    fine_tuned = model.state_dict()
    patch.apply(base)
    applied = base.state_dict(keep_vars=True)
    if fine_tuned.keys() != applied.keys():
        raise ValueError(f"method {loaded.info.method} changes the architecture, which sparse files do not support")
    replaced = {name: tensor for name, tensor in fine_tuned.items() if not torch.equal(applied[name], tensor)}
    patch.remove()  # only after the comparison, because `applied` shares memory with `base`
    inexact = [name for name in replaced if name in patch.entries]
    if inexact:
        raise ValueError(f"the update of {inexact[0]!r} is not an addition to individual weights; {_STORE_ALL}")
    patch.replaced = {name: tensor.detach().clone() for name, tensor in replaced.items()}
    patch.metadata = run_metadata(loaded, model)
    content = patch.to_bytes(options.values)
    full_size = sum(tensor.nbytes for tensor in fine_tuned.values())
    num_changed = sum(len(entries.indices) for entries in patch.entries.values())
    num_replaced = sum(tensor.numel() for tensor in replaced.values())
    num_weights = sum(torch.Size(shape).numel() for shape in patch.shapes.values())
    if len(content) >= full_size or num_changed > _MAX_CHANGED * num_weights:
        raise ValueError(
            f"method {loaded.info.method} changes {num_changed + num_replaced:,} of {num_weights + num_replaced:,} "
            f"weights, too many for a sparse file; {_STORE_ALL}"
        )
    path.write_bytes(content)
    stored = load_sparse(base, path)
    errors = [
        float((tensor - fine_tuned[name]).float().abs().max())
        for name, tensor in base.state_dict().items()
        if name in stored.shapes and tensor.numel()
    ]
    exact = "bit for bit" if not any(errors) else f"to within {max(errors):.1e}"
    note = (
        f"{num_changed:,} changed weights, {num_replaced:,} replaced values; {len(content) / full_size:.3f} of the "
        f"full size; restores the fine-tuned weights {exact}"
    )
    snippet = (
        f"from snella import load_sparse\npatch = load_sparse(backbone, {str(options.out)!r})"
        f"  # {loaded.info.backbone.name}; undo: patch.remove()"
    )
    return [note, *_logits_notes(loaded.info, _IN_METADATA)], snippet + _decoding_lines(loaded)


def _tuner_layers(model: nn.Module) -> dict[str, Any]:
    """Return the adapted PEFT layers by their names in the backbone."""
    return {
        name: module
        for name, module in base_model(model).named_modules()
        if isinstance(module, BaseTunerLayer) and hasattr(module, "get_delta_weight")
    }


def sparse_patch(model: nn.Module, base: nn.Module) -> SparsePatch:
    """Return a patch with the sparse changes that a method has made to the weights of its backbone.

    Args:
        model: Model from `load_trained`, not merged.
        base: Backbone before training.

    Returns:
        Patch without replaced tensors.

    Raises:
        ValueError: If the method changes weights other than by addition, e.g. by rotation.
    """
    tensors = base.state_dict(keep_vars=True)
    entries_by_name: dict[str, Entries] = {}
    for name, layer in _tuner_layers(model).items():
        # rounding to the dtype of the factors would change the restored weights
        dtype = {"dtype": torch.float32} if isinstance(layer, SnellaLayer) else {}
        weight_name = layer.weight_name(name) if isinstance(layer, SnellaLayer) else f"{name}.weight"
        delta = layer.get_delta_weight("default", **dtype)
        if not isinstance(delta, Tensor) or delta.numel() != tensors[weight_name].numel():  # e.g. a rotation
            raise ValueError(f"the update of {weight_name!r} is not an addition to individual weights; {_STORE_ALL}")
        delta = (delta.to_dense() if delta.is_sparse else delta).detach().contiguous().reshape(-1)
        indices = delta.nonzero().flatten()
        entries_by_name[weight_name] = Entries(indices, delta[indices].clone())
    for name, module in model.named_modules():
        if (entries := getattr(module, "sparse_entries", None)) is not None:  # see docs/extending.md
            entries_by_name[f"{name}.weight"] = Entries(*entries())
    changed = {name: entries for name, entries in entries_by_name.items() if len(entries.indices)}
    shapes = {name: list(tensors[name].shape) for name in changed}
    return SparsePatch(changed, {}, shapes, {name: digest_of(tensors[name]) for name in changed})


_GRAPH_OPTIONS = ("images", "logits")
_OTHER_TASKS = TASKS.keys() - {"classification"}
FORMATS: dict[str, ExportFormat] = {
    "sparse": ExportFormat(".sparse.safetensors", _write_sparse, options=("values",)),
    "onnx": ExportFormat(
        ".onnx",
        partial(_write_graph, export_onnx),
        options=("opset", *_GRAPH_OPTIONS),
        packages=("onnx", "onnxscript", "onnxruntime"),
    ),
    "torchscript": ExportFormat(".torchscript.pt", partial(_write_graph, export_torchscript), options=_GRAPH_OPTIONS),
    "torch-export": ExportFormat(".pt2", partial(_write_graph, export_torch), options=_GRAPH_OPTIONS),
    "lora": ExportFormat("-lora", _write_lora, ("rank", "images"), is_folder=True, unsupported=("segmentation",)),
    "timm": ExportFormat("-timm", _write_timm, is_folder=True, unsupported=_OTHER_TASKS),
    "hf": ExportFormat("-hf", _write_hf, is_folder=True, unsupported=_OTHER_TASKS),
}
"""Export formats, by value of `--format`."""
