"""`export`: a run's model in the formats of other programs, checked before it gets its name."""

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
from snella_app.data import ImageDataset, read_image
from snella_app.data.datasets import FileImages, read_at_side
from snella_app.files import made_folder, naming_file, sync_tree, write_text
from snella_app.report import model_card
from snella_app.runs.images import find_data, load_splits, parts_of
from snella_app.runs.merge import merged_model, run_metadata, views_notes, write_timm_folder
from snella_app.runs.model import Ensemble, LoadedRun, load_run, make_backbone

OUTPUT_BOUND = 1e-4
"""Largest difference of an exported model's outputs, as a part of the largest output: float32 in another order."""
_NUM_IMAGES = 8
_DEFAULT_RANK = 32
_TWO_GIB = 2**31
_MOST_CHANGED = 0.9  # of a sparse file's matrices


@dataclass(frozen=True)
class ExportOptions:
    """What single formats take; None leaves it to them.

    Args:
        opset: ONNX's opset.
        rank: Rank of the LoRA that the update is fitted by.
        values: Type of a sparse file's values.
        images: Images for the check of the outputs; the run's own test or validation images if empty.
        logits: Whether a graph ends in the model's own outputs; otherwise in what `predict` says.
        own: The run's own images, where none are given; set by `export`.
    """

    opset: int | None = None
    rank: int | None = None
    values: ValueDtype | None = None
    images: Sequence[str | Path] = ()
    logits: bool = False
    own: ImageDataset | None = None


@dataclass
class Exported:
    """What was written.

    Args:
        path: File or folder.
        notes: What was measured, a line each.
        snippet: Python code that loads it.
    """

    path: Path
    notes: list[str] = field(default_factory=list)
    snippet: str = ""


@dataclass(frozen=True)
class ExportFormat:
    """One format: a row of `FORMATS`.

    Args:
        summary: What it is.
        suffix: Ending of the file; of a folder, what stands behind the run's name.
        write: `(loaded, path, options) -> notes`; writes under a temporary name.
        snippet: Python code that loads `{path}`, or what makes it.
        options: Names of `ExportOptions` that it takes.
        packages: Modules that it needs beyond those of the command line, each with the extra that brings it.
        is_folder: Whether it is a folder.
        temperature: Where the run's temperature is, if not in the outputs.
        tasks: Tasks that it can hold; None for all.
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
) -> Exported:
    """Write a run's best model in another format.

    ONNX, TorchScript and `torch.export` files end in what `predict` says: class probabilities with the run's
    temperature, or numbers in their unit.

    Everything is written under a temporary name and checked; what fails leaves nothing behind. ONNX, TorchScript and
    `torch.export` files compute the outputs of real images within `OUTPUT_BOUND` of torch's, with the same classes, for
    several batch sizes; sparse files give the fine-tuned weights bit for bit.

    Args:
        run: Folder of the run.
        format: One of `FORMATS`.
        out: File or folder to write; beside the run, under its name, if None.
        overwrite: Replace what an earlier export wrote.
        opset: For onnx.
        rank: For lora.
        values: For sparse.
        images: For onnx, torchscript, torch-export and lora: files whose outputs are compared.
        logits: For onnx, torchscript and torch-export: leave the softmax (sigmoid, unit) and the temperature out.

    Returns:
        Path, measurements and a snippet.

    Raises:
        FileExistsError: `out` exists.
        ImportError: A package of the format is missing; names the extra.
        ValueError: Unknown format, an option of another one, a task or a method that the format cannot hold, or outputs
            that differ.
    """
    chosen = _find(format)
    options = ExportOptions(opset, rank, values, images, logits)
    _check_options(format, chosen, options)
    path = Path(f"{str(run).rstrip('/')}{chosen.suffix}") if out is None else Path(out)
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"out={path} exists; choose another name, or replace it with --overwrite (overwrite=True)"
        )
    if path.exists() and path.is_dir() != chosen.is_folder:
        raise FileExistsError(
            f"out={path} is a {'folder' if path.is_dir() else 'file'}, which {format} does not replace"
        )
    for package, extra in chosen.packages:
        _require(package, format, extra)
    loaded = load_run(run, device="cpu")
    if isinstance(loaded.model, Ensemble):
        raise ValueError(f"run={run} is a cross-validation of several models; export one, e.g. {loaded.folder.path}")
    if chosen.tasks is not None and loaded.task.name not in chosen.tasks:
        fitting = ", ".join(name for name, one in FORMATS.items() if one.tasks is None)
        raise ValueError(f"format={format} holds no model of the task {loaded.task.name}; take one of {fitting}")
    if "images" in chosen.options and not images:
        options = dataclasses.replace(options, own=_own_part(loaded))
    temporary = path.with_name(f".{path.name}.tmp")
    with made_folder(path.parent), naming_file(path):
        try:
            _remove(temporary)
            notes = chosen.write(loaded, temporary, options) + _output_notes(loaded, chosen, options)
            if path.is_dir():
                _refuse_other_files(path, temporary)
                _remove(path)
            if temporary.is_dir():
                sync_tree(temporary)
            temporary.replace(path)
        finally:
            _remove(temporary)
    snippet = chosen.snippet
    text = (
        snippet.format(path=str(path), backbone=loaded.info.backbone.name)
        if isinstance(snippet, str)
        else snippet(loaded, path, options)
    )
    return Exported(path, notes, text)


def _output_notes(loaded: LoadedRun, chosen: ExportFormat, options: ExportOptions) -> list[str]:
    """What the outputs are, and where the run's temperature and the average over flips are."""
    info = loaded.info
    temperature = info.temperature if "logits" in chosen.options else info.trained_head_temperature
    averages_flips = loaded.info.tta == 2
    if "logits" in chosen.options and not options.logits:
        divided = "" if temperature == 1.0 else f", from logits over the run's temperature {temperature:g}"
        views = ["they are averaged over an image and its flip, as predict does"] if averages_flips else []
        return [f"outputs are the {loaded.task.final_name} of predict{divided}; --logits gives the model's own", *views]
    views = views_notes(loaded.info)
    if temperature == 1.0:
        return views
    text = "outputs are logits without the run's temperature: softmax(outputs / {:g}) has the probabilities of {}"
    said = text.format(temperature, "predict --tta 1" if averages_flips else "predict")
    return [f"{said}; it is {chosen.temperature}", *views]


def _find(name: str) -> ExportFormat:
    """The row of a format."""
    if name not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {name!r}")
    return FORMATS[name]


def _check_options(name: str, chosen: ExportFormat, options: ExportOptions) -> None:
    """Refuse options of other formats, and numbers out of range."""
    for option, value in vars(options).items():
        if value not in (None, (), False) and value != [] and option not in chosen.options:
            owners = ", ".join(other for other, one in FORMATS.items() if option in one.options)
            raise ValueError(f"{option}={value} is an option of format {owners}, not of {name}; leave it out")
    if options.rank is not None and options.rank < 1:
        raise ValueError(f"rank must be at least 1, got {options.rank}")


def _require(package: str, name: str, extra: str) -> Any:
    """A module that one format needs."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"format {name} needs {package}: pip install 'snella[{extra}]' ({error})") from None


def _remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _refuse_other_files(folder: Path, written: Path) -> None:
    """Never delete what no export wrote."""
    names = {file.name for file in written.iterdir()}
    others = sorted(file.name for file in folder.iterdir() if file.name not in names)
    if others:
        raise FileExistsError(f"out={folder} is a folder with other files, e.g. {others[0]!r}; choose a new folder")


# the check ----------------------------------------------------------------------------------------------------------


class _Final(nn.Module):
    """A model that ends in what `predict` says."""

    def __init__(self, model: nn.Module, loaded: LoadedRun) -> None:
        super().__init__()
        self.model, self.task, self.temperature = model, loaded.task, loaded.info.temperature
        self.tta = loaded.info.tta

    def forward(self, images: Tensor) -> Tensor:
        """Probabilities, or numbers in their unit."""
        return self.task.final_outputs(self.task.outputs(self.model, images, self.tta), self.temperature)


def _graph_model(loaded: LoadedRun, options: ExportOptions) -> tuple[nn.Module, nn.Module]:
    """The merged model, and what is exported of it."""
    probe = loaded.probe
    merged = merged_model(loaded.model)
    merged = (merged if probe is None else probe.on(merged)).eval()
    return merged, merged if options.logits else _Final(merged, loaded).eval()


def _sample_images(loaded: LoadedRun, options: ExportOptions) -> Tensor:
    """Real images as the model takes them, `[n, C, H, W]`: those given, or the run's own."""
    if options.own is None:
        return torch.stack([loaded.transform(read_image(Path(image), loaded.reading)) for image in options.images])
    (part,) = read_at_side([options.own.with_transform(loaded.transform)], loaded.reading.side)
    return torch.stack([part[index][0] for index in range(min(_NUM_IMAGES, len(part)))])


def _own_part(loaded: LoadedRun) -> ImageDataset:
    """The run's test images; validation or training images where there are none."""
    config = loaded.folder.read_config()
    try:
        config.data = find_data(loaded.folder.path, str(config.data), loaded.info.data.folder)
        parts = parts_of(load_splits(config))
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"images must be given to compare outputs on, as the run's own cannot be read: {error}"
        ) from None
    return parts.get("test") or parts.get("val") or parts["train"]


def _compare(images: Tensor, model: nn.Module, run_exported: Callable[[Tensor], Tensor], name: str) -> str:
    """Compare outputs on all images and on batches of one and two.

    Raises:
        ValueError: They differ by more than `OUTPUT_BOUND`, or a class is another one.
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
                    f"{name} computes other outputs than torch: on {count} images they differ by {worst:.1e} of the "
                    f"largest output, where {OUTPUT_BOUND:g} and the same classes are allowed; nothing was written"
                )
    return f"outputs on {len(images)} images differ by {worst:.1e} of the largest (allowed: {OUTPUT_BOUND:g})"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters say of themselves: deprecations, tracing, progress."""
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
    """The shapes of an export whose first axis is free."""
    return ({0: torch.export.Dim("batch")},)


# formats ------------------------------------------------------------------------------------------------------------


def _write_onnx(loaded: LoadedRun, path: Path, options: ExportOptions) -> list[str]:
    onnxruntime = _require("onnxruntime", "onnx", "export")
    images = _sample_images(loaded, options)
    merged, model = _graph_model(loaded, options)
    output = "logits" if options.logits else loaded.task.final_name
    if sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()) >= _TWO_GIB:
        raise ValueError("format onnx holds at most 2 GiB of weights in its one file; take torch-export or timm")
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
            asked = "" if options.opset is None else f" with opset={options.opset}; leave it out"
            raise ValueError(f"torch cannot export this model to ONNX{asked}: {_first_line(error)}") from error
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
        loaded_again = torch.jit.load(str(path))
        return [f"TorchScript's {_compare(images, model, loaded_again, 'TorchScript')}"]


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
    """An exporter's error, of which the rest is its log."""
    return str(error).strip().partition("\n")[0][:300]


def _write_timm(loaded: LoadedRun, path: Path, options: ExportOptions, **entries: Any) -> list[str]:
    if loaded.info.backbone.architecture is None:
        raise ValueError(f"timm builds no {loaded.info.backbone.name}; take --format onnx, or snella merge to a file")
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

model = PeftModel.from_pretrained(backbone, "PATH_OR_NAME")  # the backbone above, with a head of as many classes
```
"""


def _name(loaded: LoadedRun) -> str:
    """What a card calls the model."""
    return loaded.folder.path.resolve().name


def _write_hf(loaded: LoadedRun, path: Path, options: ExportOptions) -> list[str]:
    # transformers reads timm's own folder; told its class, it need not guess
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
        raise ValueError(f"format lora needs an adapter of PEFT, got a run of method {loaded.info.method}")
    if str(getattr(model.peft_config["default"].peft_type, "value", "")) == "LORA":
        raise ValueError(f"the run's adapter is a LoRA already: {loaded.folder.adapter}")
    adapted = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    refused = sorted({type(layer).__name__ for layer in adapted if not layer.supports_lora_conversion("default")})
    if refused:
        raise ValueError(f"PEFT converts linear layers only, and this model adapts others: {', '.join(refused)}")
    images = _sample_images(loaded, options)
    with torch.inference_mode():
        expected = model(images)
    deltas = {name: layer.get_delta_weight("default").clone() for name, layer in layers.items()}
    smallest = min(min(delta.shape) for delta in deltas.values())
    if rank > smallest:
        raise ValueError(f"rank must be at most {smallest}, the smaller side of the smallest matrix, got {rank}")
    config, tensors = convert_to_lora(model, rank=rank)
    config.inference_mode = True
    path.mkdir()
    config.save_pretrained(str(path))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "adapter_model.safetensors")
    write_text(path / "README.md", model_card(loaded.folder.path, _USE_LORA, name=_name(loaded), library="peft"))
    fitted = PeftModel.from_pretrained(make_backbone(loaded.info.backbone, loaded.task.name), str(path)).eval()
    lost = total = 0.0
    for name, layer in _tuner_layers(fitted).items():
        lost += float((layer.get_delta_weight("default") - deltas[name]).double().square().sum())
        total += float(deltas[name].double().square().sum())
    with torch.inference_mode():
        got = fitted(images)
    same = float((got.argmax(1) == expected.argmax(1)).double().mean())
    error = float((got - expected).abs().max() / expected.abs().max())
    return [
        f"rank {rank}: ‖ΔW − BA‖ / ‖ΔW‖ = {(lost / total) ** 0.5 if total else 0.0:.4f} (Frobenius, all layers); "
        f"outputs on {len(images)} images differ by {error:.1e} of the largest, {same:.1%} of them with the same class"
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
        raise ValueError(f"method {loaded.info.method} changes the architecture, which a sparse file cannot hold")
    others = {name: tensor for name, tensor in fine_tuned.items() if not torch.equal(applied[name], tensor)}
    patch.remove()
    inexact = [name for name in others if name in patch.entries]
    if inexact:
        raise ValueError(
            f"the update of {inexact[0]!r} is more than an addition to single weights; take --format timm, which holds "
            "all weights"
        )
    patch.replaced = {name: tensor.detach().clone() for name, tensor in others.items()}
    patch.metadata = run_metadata(loaded, model)
    content = patch.to_bytes(values)
    size = sum(tensor.numel() * tensor.element_size() for tensor in fine_tuned.values())
    changed, whole = sum(len(one.indices) for one in patch.entries.values()), sum(t.numel() for t in others.values())
    weights = sum(torch.Size(shape).numel() for shape in patch.shapes.values())
    if len(content) >= size or changed > _MOST_CHANGED * weights:
        raise ValueError(
            f"method {loaded.info.method} changes {changed + whole:,} of {weights + whole:,} weights, too many for "
            "positions and values; take --format timm, which holds all of them"
        )
    path.write_bytes(content)
    stored = load_sparse(base, path)
    errors = [
        float((tensor - fine_tuned[name]).float().abs().max())
        for name, tensor in base.state_dict().items()
        if name in stored.shapes and tensor.numel()
    ]
    note = f"{changed:,} changed weights, {whole:,} replaced numbers; {len(content) / size:.3f} of all weights' bytes"
    exact = "bit for bit" if not any(errors) else f"to within {max(errors):.1e} of each weight"
    return [f"{note}; gives the fine-tuned weights {exact}"]


def _tuner_layers(model: nn.Module) -> dict[str, Any]:
    """The adapted layers of PEFT, by the names that they have in the backbone."""
    inner: nn.Module = model.base_model.model if isinstance(model, PeftModel) else model  # type: ignore[assignment]
    return {
        name: module
        for name, module in inner.named_modules()
        if isinstance(module, BaseTunerLayer) and hasattr(module, "get_delta_weight")
    }


def sparse_patch(model: nn.Module, base: nn.Module) -> SparsePatch:
    """The additions that a method makes to single weights of its backbone.

    Args:
        model: From `load_trained`, not merged.
        base: The backbone as it was before training.

    Returns:
        A patch without what is replaced as a whole.
    """
    found: dict[str, Entries] = {}
    for name, layer in _tuner_layers(model).items():
        exact = {"dtype": torch.float32} if isinstance(layer, SnellaLayer) else {}
        delta = layer.get_delta_weight("default", **exact).detach()
        delta = (delta.to_dense() if delta.is_sparse else delta).contiguous().reshape(-1)
        indices = delta.nonzero().flatten()
        weight = layer.weight_name(name) if isinstance(layer, SnellaLayer) else f"{name}.weight"
        found[weight] = Entries(indices, delta[indices].clone())
    for name, module in model.named_modules():
        if (entries := getattr(module, "sparse_entries", None)) is not None:  # a method that trains single weights
            found[f"{name}.weight"] = Entries(*entries())
    tensors = base.state_dict(keep_vars=True)
    found = {name: one for name, one in found.items() if len(one.indices)}
    shapes = {name: list(tensors[name].shape) for name in found}
    return SparsePatch(found, {}, shapes, {name: digest_of(tensors[name]) for name in found})


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
"""By format: what its snippet imports, how it loads the file, and how it runs `images`."""


def _graph_snippet(format: str) -> Callable[[LoadedRun, Path, ExportOptions], str]:
    """Build the loading snippet of a graph format."""

    def write(loaded: LoadedRun, path: Path, options: ExportOptions) -> str:
        module, load, run = _GRAPHS[format]
        image = _example_image(options)
        preparation = None if image is None else _preparation(loaded)
        lines = ["import json", f"import numpy as np, {module}"]
        if preparation is None:
            shape = (1, *loaded.info.data_config["input_size"])
            images = f"np.zeros({shape}, np.float32)  # in place of images prepared as 'data_config' in the file says"
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
    """A file for the snippet: the first one of those that outputs are compared on; None where the run has no files."""
    part = options.own
    if part is None:
        return str(options.images[0])
    return str(part.source.paths[part.rows[0]]) if isinstance(part.source, FileImages) else None


def _preparation(loaded: LoadedRun) -> list[str] | None:
    """Lines of Python that prepare an 8-bit or 16-bit image as `predict` does, with NumPy and Pillow.

    None for other channels than gray and RGB, and for runs with a value of 16-bit images that becomes white.
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
        "from snella import load_sparse\npatch = load_sparse(backbone, {path!r})  # {backbone}, patch.remove()",
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
        "merged model as a graph of torch.export",
        ".pt2",
        _write_torch_export,
        _graph_snippet("torch-export"),
        options=("images", "logits"),
    ),
    "lora": ExportFormat(
        "nearest LoRA of a rank, for programs that read no other adapter",
        "-lora",
        _write_lora,
        "from peft import PeftModel\nmodel = PeftModel.from_pretrained(backbone, {path!r})  # {backbone}",
        options=("rank", "images"),
        is_folder=True,
        temperature="not in the folder",
    ),
    "timm": ExportFormat(
        "merged model in timm's own folder",
        "-timm",
        _write_timm,
        "import timm\nmodel = timm.create_model('local-dir:' + {path!r}, pretrained=True).eval()",
        is_folder=True,
        temperature="'temperature' in its config.json, which no library applies by itself",
        tasks=("classification",),
    ),
    "hf": ExportFormat(
        "merged model in a folder of transformers, with a model card",
        "-hf",
        _write_hf,
        "from transformers import pipeline\nclassify = pipeline('image-classification', model={path!r})",
        is_folder=True,
        temperature="'temperature' in its config.json, which no library applies by itself",
        tasks=("classification",),
    ),
}
"""By the name of `--format`."""
