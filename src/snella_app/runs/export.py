"""Export of a run's model to other formats, with verified outputs."""

import contextlib
import dataclasses
import importlib
import io
import json
import logging
import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from snella.compat.sparse_file import Entries, SparsePatch, ValueDtype, digest_of, load_sparse
from snella.layer import SnellaLayer
from snella_app.console import counted
from snella_app.data import ImageDataset, read_image
from snella_app.data.datasets import file_paths, read_at_side
from snella_app.files import annotate_write_errors, create_folder, sync_tree, write_text
from snella_app.report.card import model_card
from snella_app.runs.images import existing_splits, find_data, load_splits
from snella_app.runs.merge import merged_model, prediction_notes, run_metadata, write_timm_folder
from snella_app.runs.model import Ensemble, LoadedRun, load_run, make_backbone

OUTPUT_BOUND = 1e-4
"""Maximum error of exported outputs relative to the largest output; allows for rounding in float32."""
_NUM_IMAGES = 8
_DEFAULT_RANK = 32
_TWO_GIB = 2**31
_MAX_CHANGED = 0.9  # maximum fraction of changed weights in a sparse file


@dataclass(frozen=True)
class ExportOptions:
    """Options of export formats; None selects the default of the format.

    Args:
        opset: ONNX opset version.
        rank: Rank of the exported LoRA.
        values: Data type of the values in a sparse file.
        images: Images to compare outputs on; test or validation images of the run if empty.
        logits: Export the model's raw outputs instead of the outputs of `predict`.
        run_images: Images of the run to compare outputs on if `images` is empty; set by `export`.
    """

    opset: int | None = None
    rank: int | None = None
    values: ValueDtype | None = None
    images: Sequence[str | Path] = ()
    logits: bool = False
    run_images: ImageDataset | None = None


@dataclass
class ExportResult:
    """Result of an export.

    Args:
        path: File or folder.
        notes: Measurements, one per line.
        snippet: Python code that loads the export.
    """

    path: Path
    notes: list[str] = field(default_factory=list)
    snippet: str = ""


@dataclass(frozen=True)
class ExportFormat:
    """Export format: an entry of `FORMATS`.

    Args:
        summary: Short description.
        suffix: Suffix of the file or folder name.
        write: `(loaded, path, options) -> notes`; writes the export to a temporary path.
        snippet: Python code that loads `{path}`, or a function that returns it.
        options: Supported fields of `ExportOptions`.
        packages: Required modules, each with the extra that installs it.
        is_folder: True if the export is a folder.
        temperature: Location of the temperature, if the outputs do not apply it.
        tasks: Supported tasks; None for all.
    """

    summary: str
    suffix: str
    write: Callable[[LoadedRun, Path, ExportOptions], list[str]]
    snippet: str | Callable[[LoadedRun, Path, ExportOptions], str]
    options: tuple[str, ...] = ()
    packages: tuple[tuple[str, str], ...] = ()
    is_folder: bool = False
    temperature: str = "'temperature' in its metadata"
    tasks: tuple[str, ...] | None = None


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

    ONNX, TorchScript and `torch.export` files return the outputs of `predict`: class probabilities with the temperature
    of the run, or regression values in their original units.

    The export is atomic: it is written to a temporary path and renamed after verification. For ONNX, TorchScript and
    `torch.export`, outputs on real images must be within `OUTPUT_BOUND` of torch's outputs with the same classes, for
    several batch sizes. Sparse files restore the fine-tuned weights bit for bit.

    Args:
        run: Run folder.
        format: Key of `FORMATS`.
        out: Output file or folder; if None, written next to the run and named after it.
        overwrite: Replace the output of an earlier export.
        opset: ONNX opset version (onnx).
        rank: Rank (lora).
        values: Data type of the values (sparse).
        images: Image files to compare outputs on (onnx, torchscript, torch-export, lora).
        logits: Omit softmax (or sigmoid, unit) and temperature (onnx, torchscript, torch-export).

    Returns:
        Path, measurements and loading snippet.

    Raises:
        FileExistsError: If `out` exists and may not be replaced.
        ImportError: If a required package is missing; names the extra.
        ValueError: If the format is unknown, an option does not apply to it, it does not support the task or method, or
            outputs differ.
    """
    export_format = _find(format)
    options = ExportOptions(opset, rank, values, images, logits)
    _check_options(format, export_format, options)
    path = Path(f"{str(run).rstrip('/')}{export_format.suffix}") if out is None else Path(out)
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"out={path} exists; choose another name, or replace it with --overwrite (overwrite=True)"
        )
    if path.exists() and path.is_dir() != export_format.is_folder:
        raise FileExistsError(
            f"out={path} is a {'folder' if path.is_dir() else 'file'}, which {format} cannot replace; choose another "
            "name"
        )
    for package, extra in export_format.packages:
        _require(package, format, extra)
    loaded = load_run(run, device="cpu")
    if isinstance(loaded.model, Ensemble):
        raise ValueError(f"run={run} is a cross-validation with several models; export one, e.g. {loaded.folder.path}")
    if export_format.tasks is not None and loaded.task.name not in export_format.tasks:
        supported = ", ".join(name for name, entry in FORMATS.items() if entry.tasks is None)
        raise ValueError(f"format={format} does not support the task {loaded.task.name}; use one of {supported}")
    if "images" in export_format.options and not images:
        options = dataclasses.replace(options, run_images=_run_images(loaded))
    temporary = path.with_name(f".{path.name}.tmp")
    with create_folder(path.parent), annotate_write_errors(path):
        try:
            _remove(temporary)
            notes = export_format.write(loaded, temporary, options) + _output_notes(loaded, export_format, options)
            if path.is_dir():
                _reject_other_files(path, temporary)
                _remove(path)
            if temporary.is_dir():
                sync_tree(temporary)
            temporary.replace(path)
        finally:
            _remove(temporary)
    snippet = export_format.snippet
    text = (
        snippet.format(path=str(path), backbone=loaded.info.backbone.name)
        if isinstance(snippet, str)
        else snippet(loaded, path, options)
    )
    return ExportResult(path, notes, text)


def _output_notes(loaded: LoadedRun, export_format: ExportFormat, options: ExportOptions) -> list[str]:
    """Describe the outputs, temperature and test-time augmentation."""
    info = loaded.info
    temperature = info.temperature if "logits" in export_format.options else info.trained_head_temperature
    averages_flips = loaded.info.tta == 2
    if "logits" in export_format.options and not options.logits:
        temperature_text = "" if temperature == 1.0 else f", from logits divided by the temperature {temperature:g}"
        views = ["outputs are averaged over an image and its flip, as in predict"] if averages_flips else []
        return [
            f"outputs are the {loaded.task.final_name} of predict{temperature_text}; use --logits for logits",
            *views,
        ]
    views = prediction_notes(loaded.info)
    if temperature == 1.0:
        return views
    text = "outputs are logits without temperature: softmax(outputs / {:g}) gives the probabilities of {}"
    note = text.format(temperature, "predict --tta 1" if averages_flips else "predict")
    return [f"{note}; the temperature is {export_format.temperature}", *views]


def _find(name: str) -> ExportFormat:
    """Return the entry of a format."""
    if name not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {name!r}")
    return FORMATS[name]


def _check_options(name: str, export_format: ExportFormat, options: ExportOptions) -> None:
    """Reject options of other formats and out-of-range numbers."""
    for option, value in vars(options).items():
        if value not in (None, (), False) and value != [] and option not in export_format.options:
            supporting = ", ".join(other for other, entry in FORMATS.items() if option in entry.options)
            raise ValueError(f"{option}={value} is an option of format {supporting}, not of {name}; leave it out")
    if options.rank is not None and options.rank < 1:
        raise ValueError(f"rank must be at least 1, got {options.rank}")


def _require(package: str, name: str, extra: str) -> Any:
    """Import a module that a format needs."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"format {name} needs {package}: pip install 'snella[{extra}]' ({error})") from None


def _remove(path: Path) -> None:
    """Delete a file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _reject_other_files(folder: Path, written: Path) -> None:
    """Reject a folder with files that an export did not write."""
    names = {file.name for file in written.iterdir()}
    unexpected = sorted(file.name for file in folder.iterdir() if file.name not in names)
    if unexpected:
        raise FileExistsError(f"out={folder} is a folder with other files, e.g. {unexpected[0]!r}; choose a new folder")


# verification -------------------------------------------------------------------------------------------------------


class _FinalOutputs(nn.Module):
    """Model that returns the outputs of `predict`."""

    def __init__(self, model: nn.Module, loaded: LoadedRun) -> None:
        super().__init__()
        self.model, self.task, self.temperature = model, loaded.task, loaded.info.temperature
        self.tta = loaded.info.tta

    def forward(self, images: Tensor) -> Tensor:
        """Return probabilities, or regression values in their original units."""
        return self.task.final_outputs(self.task.outputs(self.model, images, self.tta), self.temperature)


def _graph_model(loaded: LoadedRun, options: ExportOptions) -> tuple[nn.Module, nn.Module]:
    """Return the merged model and the module to export."""
    probe = loaded.probe
    merged = merged_model(loaded.model)
    merged = (merged if probe is None else probe.with_model(merged)).eval()
    return merged, merged if options.logits else _FinalOutputs(merged, loaded).eval()


def _sample_images(loaded: LoadedRun, options: ExportOptions) -> Tensor:
    """Load real images as a batch `[n, C, H, W]`: the given images, or images of the run."""
    if options.run_images is None:
        return torch.stack([loaded.transform(read_image(Path(image), loaded.reading)) for image in options.images])
    (part,) = read_at_side([options.run_images.with_transform(loaded.transform)], loaded.reading.side)
    return torch.stack([part[index][0] for index in range(min(_NUM_IMAGES, len(part)))])


def _run_images(loaded: LoadedRun) -> ImageDataset:
    """Return the run's test images, falling back to validation and then training images."""
    config = loaded.folder.read_config()
    try:
        spec = find_data(loaded.folder.path, str(config.data.spec), loaded.info.data.folder)
        parts = existing_splits(load_splits(dataclasses.replace(config.data, spec=spec), config.run.seed))
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"images must be given to compare outputs, since the run's images cannot be read: {error}"
        ) from None
    return parts.get("test") or parts.get("val") or parts["train"]


def _compare(images: Tensor, model: nn.Module, run_exported: Callable[[Tensor], Tensor], name: str) -> str:
    """Compare outputs on all images and on batches of one and two.

    Raises:
        ValueError: If outputs differ by more than `OUTPUT_BOUND`, or predicted classes differ.
    """
    worst = 0.0
    with torch.inference_mode():
        for count in sorted({1, min(2, len(images)), len(images)}):
            expected, got = model(images[:count]).float(), run_exported(images[:count].clone()).float()
            error = (
                float((got - expected).abs().max() / expected.abs().max()) if got.shape == expected.shape else torch.inf
            )
            worst = max(worst, error) if error == error else torch.inf
            if worst > OUTPUT_BOUND or not torch.equal(got.argmax(1), expected.argmax(1)):
                raise ValueError(
                    f"{name} outputs must equal torch outputs to within {OUTPUT_BOUND:g} of the largest output, with "
                    f"the same classes, got a difference of {worst:.1e} on {counted(count, 'image')}; "
                    "nothing was written"
                )
    return (
        f"outputs on {counted(len(images), 'image')} differ by {worst:.1e} of the largest (allowed: {OUTPUT_BOUND:g})"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporters' warnings and progress output."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def _dynamic_batch() -> Any:
    """Return shapes with a dynamic batch dimension."""
    return ({0: torch.export.Dim("batch")},)


# formats ------------------------------------------------------------------------------------------------------------


def _write_onnx(loaded: LoadedRun, path: Path, options: ExportOptions) -> list[str]:
    onnxruntime = _require("onnxruntime", "onnx", "export")
    images = _sample_images(loaded, options)
    merged, model = _graph_model(loaded, options)
    output = "logits" if options.logits else loaded.task.final_name
    if sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()) >= _TWO_GIB:
        raise ValueError("format onnx supports at most 2 GiB of weights; use torch-export or timm")
    example = images[:1].expand(2, -1, -1, -1).contiguous()
    with _quiet():
        try:
            program = torch.onnx.export(
                model,
                (example,),
                input_names=["images"],
                output_names=[output],
                opset_version=options.opset,
                dynamic_shapes=_dynamic_batch(),
                dynamo=True,
                verbose=False,
            )
        except Exception as error:
            opset_text = "" if options.opset is None else f" with opset={options.opset} (try without opset)"
            raise ValueError(f"torch cannot export this model to ONNX{opset_text}: {_first_line(error)}") from error
    if program is None:
        raise ValueError("torch cannot export this model to ONNX: its exporter returned nothing")
    proto = program.model_proto
    for key, value in run_metadata(loaded, merged).items():
        proto.metadata_props.add(key=key, value=value)
    content = proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(batch: Tensor) -> Tensor:
        (outputs,) = session.run(None, {"images": batch.numpy()})
        return torch.from_numpy(outputs)

    note = _compare(images, model, run, "ONNX Runtime")
    path.write_bytes(content)
    opset = max(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    if options.opset not in (None, opset):
        raise ValueError(f"torch exports this model with opset {opset}, not with opset={options.opset}; leave it out")
    return [f"opset {opset}, any batch size; ONNX Runtime's {note}"]


def _write_torchscript(loaded: LoadedRun, path: Path, options: ExportOptions) -> list[str]:
    images = _sample_images(loaded, options)
    merged, model = _graph_model(loaded, options)
    example = images[:1].expand(2, -1, -1, -1).contiguous()
    with _quiet(), torch.no_grad():
        traced = torch.jit.trace(model, example)
        torch.jit.save(traced, str(path), _extra_files=run_metadata(loaded, merged))
        reloaded = torch.jit.load(str(path))
        return [f"TorchScript's {_compare(images, model, reloaded, 'TorchScript')}"]


def _write_torch_export(loaded: LoadedRun, path: Path, options: ExportOptions) -> list[str]:
    images = _sample_images(loaded, options)
    merged, model = _graph_model(loaded, options)
    example = images[:1].expand(2, -1, -1, -1).contiguous()
    with _quiet():
        try:
            program = torch.export.export(model, (example,), dynamic_shapes=_dynamic_batch())
        except Exception as error:
            raise ValueError(f"torch.export cannot export this model: {_first_line(error)}") from error
        content = io.BytesIO()
        torch.export.save(program, content, extra_files=run_metadata(loaded, merged))
        path.write_bytes(content.getvalue())
        content.seek(0)
        return [f"torch.export's {_compare(images, model, torch.export.load(content).module(), 'torch.export')}"]


def _first_line(error: Exception) -> str:
    """Return the first line of an exporter's error; the rest is its log."""
    return str(error).strip().partition("\n")[0][:300]


def _write_timm(loaded: LoadedRun, path: Path, options: ExportOptions, **entries: Any) -> list[str]:
    if loaded.info.backbone.architecture is None:
        raise ValueError(
            f"timm cannot build {loaded.info.backbone.name}; use --format onnx, or snella merge to a .safetensors file"
        )
    write_timm_folder(loaded, path, **entries)
    return []


_USE_HF = """```python
from transformers import pipeline

classify = pipeline("image-classification", model="PATH_OR_NAME")
print(classify("image.jpg"))
```
"""
_USE_LORA = """```python
from peft import PeftModel

model = PeftModel.from_pretrained(backbone, "PATH_OR_NAME")  # the backbone above, with the same number of classes
```
"""


def _name(loaded: LoadedRun) -> str:
    """Return the name of the model for its card."""
    return loaded.folder.path.resolve().name


def _write_hf(loaded: LoadedRun, path: Path, options: ExportOptions) -> list[str]:
    # transformers reads timm folders; these entries set the model class explicitly
    entries = {"model_type": "timm_wrapper", "architectures": ["TimmWrapperForImageClassification"]}
    _write_timm(loaded, path, options, **entries)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    processor = {
        "image_processor_type": "TimmWrapperImageProcessor",
        "architecture": config["architecture"],
        "pretrained_cfg": config["pretrained_cfg"],
    }
    write_text(path / "preprocessor_config.json", json.dumps(processor, indent=1) + "\n")
    card = model_card(loaded.folder.path, _USE_HF, name=_name(loaded), library="transformers", tags=["timm"])
    write_text(path / "README.md", card)
    return []


def _write_lora(loaded: LoadedRun, path: Path, options: ExportOptions) -> list[str]:
    from peft.tuners.lora.conversion import convert_to_lora

    model, rank = loaded.model, options.rank or _DEFAULT_RANK
    layers = _tuner_layers(model)
    if not isinstance(model, PeftModel) or not layers:
        raise ValueError(f"format lora needs a PEFT adapter, got a run of method {loaded.info.method}")
    if str(getattr(model.peft_config["default"].peft_type, "value", "")) == "LORA":
        raise ValueError(f"the adapter of the run is already a LoRA; use {loaded.folder.adapter}")
    adapted = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    unsupported = sorted({type(layer).__name__ for layer in adapted if not layer.supports_lora_conversion("default")})
    if unsupported:
        raise ValueError(f"PEFT only converts linear layers to LoRA, got adapted layers {', '.join(unsupported)}")
    images = _sample_images(loaded, options)
    with torch.inference_mode():
        expected = model(images)
    deltas = {name: layer.get_delta_weight("default").clone() for name, layer in layers.items()}
    smallest = min(min(delta.shape) for delta in deltas.values())
    if rank > smallest:
        raise ValueError(f"rank must be at most {smallest}, the smallest matrix dimension, got {rank}")
    config, tensors = convert_to_lora(model, rank=rank)
    config.inference_mode = True
    path.mkdir()
    config.save_pretrained(str(path))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "adapter_model.safetensors")
    write_text(path / "README.md", model_card(loaded.folder.path, _USE_LORA, name=_name(loaded), library="peft"))
    lora_model = PeftModel.from_pretrained(make_backbone(loaded.info.backbone, loaded.task.name), str(path)).eval()
    lost = total = 0.0
    for name, layer in _tuner_layers(lora_model).items():
        lost += float((layer.get_delta_weight("default") - deltas[name]).double().square().sum())
        total += float(deltas[name].double().square().sum())
    with torch.inference_mode():
        got = lora_model(images)
    agreement = float((got.argmax(1) == expected.argmax(1)).double().mean())
    error = float((got - expected).abs().max() / expected.abs().max())
    return [
        f"rank {rank}: ‖ΔW − BA‖ / ‖ΔW‖ = {(lost / total) ** 0.5 if total else 0.0:.4f} (Frobenius, all layers); "
        f"outputs on {counted(len(images), 'image')} differ by {error:.1e} of the largest; "
        f"{agreement:.1%} have the same class"
    ]


def _write_sparse(loaded: LoadedRun, path: Path, options: ExportOptions) -> list[str]:
    values = options.values or "fp32"
    base = make_backbone(loaded.info.backbone, loaded.task.name)
    patch = sparse_patch(loaded.model, base)
    model = merged_model(loaded.model)
    fine_tuned = model.state_dict()
    patch.apply(base)
    applied = base.state_dict(keep_vars=True)
    if fine_tuned.keys() != applied.keys():
        raise ValueError(f"method {loaded.info.method} changes the architecture, which sparse files do not support")
    others = {name: tensor for name, tensor in fine_tuned.items() if not torch.equal(applied[name], tensor)}
    patch.remove()
    inexact = [name for name in others if name in patch.entries]
    if inexact:
        raise ValueError(
            f"the update of {inexact[0]!r} is not an addition to single weights; use --format timm, which stores all "
            "weights"
        )
    patch.replaced = {name: tensor.detach().clone() for name, tensor in others.items()}
    patch.metadata = run_metadata(loaded, model)
    content = patch.to_bytes(values)
    size = sum(tensor.numel() * tensor.element_size() for tensor in fine_tuned.values())
    changed = sum(len(entries.indices) for entries in patch.entries.values())
    replaced = sum(tensor.numel() for tensor in others.values())
    weights = sum(torch.Size(shape).numel() for shape in patch.shapes.values())
    if len(content) >= size or changed > _MAX_CHANGED * weights:
        raise ValueError(
            f"method {loaded.info.method} changes {changed + replaced:,} of {weights + replaced:,} weights, too many "
            "for a sparse file; use --format timm, which stores all weights"
        )
    path.write_bytes(content)
    stored = load_sparse(base, path)
    errors = [
        float((tensor - fine_tuned[name]).float().abs().max())
        for name, tensor in base.state_dict().items()
        if name in stored.shapes and tensor.numel()
    ]
    note = f"{changed:,} changed weights, {replaced:,} replaced values; {len(content) / size:.3f} of the full size"
    exact = "bit for bit" if not any(errors) else f"to within {max(errors):.1e}"
    return [f"{note}; restores the fine-tuned weights {exact}"]


def _tuner_layers(model: nn.Module) -> dict[str, Any]:
    """Return the adapted PEFT layers by their names in the backbone."""
    inner: nn.Module = model.base_model.model if isinstance(model, PeftModel) else model  # type: ignore[assignment]
    return {
        name: module
        for name, module in inner.named_modules()
        if isinstance(module, BaseTunerLayer) and hasattr(module, "get_delta_weight")
    }


def sparse_patch(model: nn.Module, base: nn.Module) -> SparsePatch:
    """Return the sparse additions of a method to the weights of its backbone.

    Args:
        model: Model from `load_trained`, not merged.
        base: Backbone before training.

    Returns:
        Patch without replaced tensors.
    """
    entries_by_name: dict[str, Entries] = {}
    for name, layer in _tuner_layers(model).items():
        exact = {"dtype": torch.float32} if isinstance(layer, SnellaLayer) else {}
        delta = layer.get_delta_weight("default", **exact).detach()
        delta = (delta.to_dense() if delta.is_sparse else delta).contiguous().reshape(-1)
        indices = delta.nonzero().flatten()
        weight = layer.weight_name(name) if isinstance(layer, SnellaLayer) else f"{name}.weight"
        entries_by_name[weight] = Entries(indices, delta[indices].clone())
    for name, module in model.named_modules():
        if (entries := getattr(module, "sparse_entries", None)) is not None:  # see docs/extending.md
            entries_by_name[f"{name}.weight"] = Entries(*entries())
    tensors = base.state_dict(keep_vars=True)
    changed = {name: entries for name, entries in entries_by_name.items() if len(entries.indices)}
    shapes = {name: list(tensors[name].shape) for name in changed}
    return SparsePatch(changed, {}, shapes, {name: digest_of(tensors[name]) for name in changed})


_RUN_TORCH = "model(torch.from_numpy(images)).detach().numpy()"
_GRAPHS = {
    "onnx": (
        "onnxruntime",
        "session = onnxruntime.InferenceSession({path!r})\n"
        "classes = json.loads(session.get_modelmeta().custom_metadata_map['classes'])",
        "session.run(None, {'images': images})[0]",
    ),
    "torchscript": (
        "torch",
        "files = {{'classes': ''}}\nmodel = torch.jit.load({path!r}, _extra_files=files)\n"
        "classes = json.loads(files['classes'])",
        _RUN_TORCH,
    ),
    "torch-export": (
        "torch",
        "files = {{'classes': ''}}\nmodel = torch.export.load({path!r}, extra_files=files).module()\n"
        "classes = json.loads(files['classes'])",
        _RUN_TORCH,
    ),
}
"""Loading snippet of each graph format: imported module, code to load the file, code to run `images`."""


def _graph_snippet(format: str) -> Callable[[LoadedRun, Path, ExportOptions], str]:
    """Build the loading snippet of a graph format."""

    def write(loaded: LoadedRun, path: Path, options: ExportOptions) -> str:
        module, load, run = _GRAPHS[format]
        image = _example_image(options)
        preparation = None if image is None else _preparation(loaded)
        lines = ["import json", f"import numpy as np, {module}"]
        if preparation is None:
            shape = (1, *loaded.info.data_config["input_size"])
            images = f"np.zeros({shape}, np.float32)  # use images preprocessed by 'data_config' in the file"
        else:
            lines += ["from PIL import Image, ImageOps", *preparation]
            images = f"transform(Image.open({image!r}))[None]"
        name = "logits" if options.logits else loaded.task.final_name
        is_mask = loaded.task.head is not None
        result = (
            f"{name}[0].argmax(0)"
            if is_mask
            else f"{name}[0]"
            if options.logits
            else f"dict(zip(classes, {name}[0].tolist()))"
        )
        return "\n".join(
            [*lines, load.format(path=str(path)), f"images = {images}", f"{name} = {run}", f"print({result})"]
        )

    return write


def _example_image(options: ExportOptions) -> str | None:
    """Return the first compared image file, for the snippet; None if the images are not files."""
    part = options.run_images
    if part is None:
        return str(options.images[0])
    path = file_paths(part).get(0)
    return None if path is None else str(path)


def _preparation(loaded: LoadedRun) -> list[str] | None:
    """Return Python code that preprocesses an 8-bit or 16-bit image like `predict`, with NumPy and Pillow.

    The result is None unless the images are grayscale or RGB and `white` is not set.
    """
    config = loaded.info.data_config
    channels, size = int(config["input_size"][0]), int(config["input_size"][-1])
    mode = {1: "L", 3: "RGB"}.get(channels)
    if mode is None or loaded.info.data.white is not None:
        return None
    scaled = math.floor(size / (config.get("crop_pct") or 1.0))
    resample = f"Image.Resampling.{config.get('interpolation', 'bicubic').upper()}"
    sides = (
        f"({scaled}, {scaled})"
        if config.get("crop_mode") == "squash"
        else f"[int({scaled} * side / min(image.size)) for side in image.size]"
    )
    mean, std = ([round(float(value), 6) for value in config[name]] for name in ("mean", "std"))
    return [
        "def transform(image):",
        "    image = ImageOps.exif_transpose(image)",
        "    if image.mode.startswith('I;16'):",
        "        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))",
        "    if image.mode.endswith('A') or 'transparency' in image.info:",
        "        white = Image.new('RGBA', image.size, 'white')",
        "        image = Image.alpha_composite(white, image.convert('RGBA'))",
        f"    image = image.convert({mode!r})",
        f"    image = image.resize({sides}, {resample})",
        f"    left, top = (round((side - {size}) / 2) for side in image.size)",
        f"    image = image.crop((left, top, left + {size}, top + {size}))",
        f"    pixels = np.asarray(image, np.float32).reshape({size}, {size}, {channels}) / 255",
        f"    return ((pixels - np.float32({mean})) / np.float32({std})).transpose(2, 0, 1)",
    ]


FORMATS: dict[str, ExportFormat] = {
    "sparse": ExportFormat(
        "positions and values of the changed weights",
        ".sparse.safetensors",
        _write_sparse,
        "from snella import load_sparse\npatch = load_sparse(backbone, {path!r})  # {backbone}; undo: patch.remove()",
        options=("values",),
    ),
    "onnx": ExportFormat(
        "merged model for ONNX Runtime and others",
        ".onnx",
        _write_onnx,
        _graph_snippet("onnx"),
        options=("opset", "images", "logits"),
        packages=(("onnx", "export"), ("onnxscript", "export"), ("onnxruntime", "export")),
    ),
    "torchscript": ExportFormat(
        "merged model for torch.jit",
        ".torchscript.pt",
        _write_torchscript,
        _graph_snippet("torchscript"),
        options=("images", "logits"),
    ),
    "torch-export": ExportFormat(
        "merged model as a torch.export graph",
        ".pt2",
        _write_torch_export,
        _graph_snippet("torch-export"),
        options=("images", "logits"),
    ),
    "lora": ExportFormat(
        "closest LoRA of a given rank, for programs that only support LoRA",
        "-lora",
        _write_lora,
        "from peft import PeftModel\nmodel = PeftModel.from_pretrained(backbone, {path!r})  # {backbone}",
        options=("rank", "images"),
        is_folder=True,
        temperature="not in the folder",
    ),
    "timm": ExportFormat(
        "merged model as a timm folder",
        "-timm",
        _write_timm,
        "import timm\nmodel = timm.create_model('local-dir:' + {path!r}, pretrained=True).eval()",
        is_folder=True,
        temperature="'temperature' in its config.json, which no library applies automatically",
        tasks=("classification",),
    ),
    "hf": ExportFormat(
        "merged model as a transformers folder, with a model card",
        "-hf",
        _write_hf,
        "from transformers import pipeline\nclassify = pipeline('image-classification', model={path!r})",
        is_folder=True,
        temperature="'temperature' in its config.json, which no library applies automatically",
        tasks=("classification",),
    ),
}
"""Export formats by the value of `--format`."""
