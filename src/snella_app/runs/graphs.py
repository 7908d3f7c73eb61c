"""Export models to ONNX, TorchScript, and `torch.export` graphs, compare outputs, and generate inference code."""

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from snella_app.console import counted
from snella_app.runs.model import LoadedRun

MAX_RELATIVE_ERROR = 1e-4
"""Maximum error of exported outputs relative to the largest output; allows for rounding in float32."""
_TWO_GIB = 2**31
_MIN_OPSET = 18
"""Smallest opset version that torch's exporter writes."""


@dataclass(frozen=True)
class ExportedGraph:
    """Graph of a model in the format of a runtime, with code that loads and runs it.

    Attributes:
        runtime: Name of the runtime.
        content: Serialized graph.
        run: Function from images to outputs.
        module: Python module that `load_code` and `run_code` need.
        load_code: Python code that loads the graph from `PATH`, and its class names into `classes`.
        run_code: Python expression that computes the outputs for the array `images`.
        note_prefix: Text before the note of `compare_outputs`.
    """

    runtime: str
    content: bytes
    run: Callable[[Tensor], Tensor]
    module: str
    load_code: str
    run_code: str
    note_prefix: str = ""


def export_onnx(
    model: nn.Module, example: Tensor, metadata: dict[str, str], output_name: str, opset: int | None
) -> ExportedGraph:
    """Export a model to ONNX, for any batch size.

    Args:
        model: Model in evaluation mode.
        example: Batch of two images, since exporters treat a batch size of 1 as constant.
        metadata: Entries of the file's metadata.
        output_name: Name of the output.
        opset: ONNX opset version; None for the exporter's default.

    Raises:
        ValueError: If the model is too large for an ONNX file or needs a different opset.
    """
    import onnxruntime

    if opset is not None and opset < _MIN_OPSET:
        raise ValueError(f"opset must be at least {_MIN_OPSET}, got {opset}; omit opset for the exporter's default")
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    if size >= _TWO_GIB:
        raise ValueError(
            f"an ONNX file can hold less than 2 GiB of weights, got {size / 2**30:.2f} GiB; use torch-export"
        )
    program: Any = torch.onnx.export(
        model,
        (example,),
        input_names=["images"],
        output_names=[output_name],
        opset_version=opset,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        verbose=False,
    )
    proto = program.model_proto
    exported_opset = max(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    if opset not in (None, exported_opset):
        raise ValueError(
            f"the exporter of torch {torch.__version__} does not support opset={opset} for this model and wrote opset "
            f"{exported_opset}; omit opset for the default"
        )
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=value)
    content = proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return ExportedGraph(
        runtime="ONNX Runtime",
        content=content,
        run=lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]),
        module="onnxruntime",
        load_code=(
            "session = onnxruntime.InferenceSession(PATH)\n"
            "classes = json.loads(session.get_modelmeta().custom_metadata_map['classes'])"
        ),
        run_code="session.run(None, {'images': images})[0]",
        note_prefix=f"opset {exported_opset}, any batch size; ",
    )


def export_torchscript(
    model: nn.Module, example: Tensor, metadata: dict[str, str], output_name: str, opset: int | None
) -> ExportedGraph:
    """Export a model to TorchScript.

    The arguments are as for `export_onnx`; `output_name` and `opset` are ignored.
    """
    file = io.BytesIO()
    with torch.no_grad():
        torch.jit.save(torch.jit.trace(model, example), file, _extra_files=metadata)
    file.seek(0)
    return _torch_graph("TorchScript", file, torch.jit.load(file), "torch.jit.load(PATH, _extra_files=files)")


def export_torch(
    model: nn.Module, example: Tensor, metadata: dict[str, str], output_name: str, opset: int | None
) -> ExportedGraph:
    """Export a model with `torch.export`, for any batch size.

    The arguments are as for `export_onnx`; `output_name` and `opset` are ignored.
    """
    file = io.BytesIO()
    program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, file, extra_files=metadata)
    file.seek(0)
    run = torch.export.load(file).module()
    return _torch_graph("torch.export", file, run, "torch.export.load(PATH, extra_files=files).module()")


def _torch_graph(runtime: str, file: io.BytesIO, run: Callable[[Tensor], Tensor], load_call: str) -> ExportedGraph:
    """Build an `ExportedGraph` for torch; `load_call` is the code that loads its file."""
    return ExportedGraph(
        runtime=runtime,
        content=file.getvalue(),
        run=run,
        module="torch",
        load_code=f"files = {{'classes': ''}}\nmodel = {load_call}\nclasses = json.loads(files['classes'])",
        run_code="model(torch.from_numpy(images)).detach().numpy()",
    )


def compare_outputs(graph: ExportedGraph, model: nn.Module, images: Tensor) -> str:
    """Compare the outputs of a graph and the model on the first image, the first two images, and all images.

    Returns:
        Note that states the largest difference.

    Raises:
        ValueError: If the outputs of the graph have a different shape, are not finite, or differ by more than
            `MAX_RELATIVE_ERROR` times the largest output.
    """
    worst = 0.0
    with torch.inference_mode():
        for count in sorted({1, min(2, len(images)), len(images)}):
            expected = model(images[:count]).float()
            outputs = graph.run(images[:count].clone()).float()
            subject = f"{graph.runtime}'s outputs on {counted(count, 'image')}"
            if outputs.shape != expected.shape:
                raise ValueError(f"{subject} have shape {list(outputs.shape)} instead of {list(expected.shape)}")
            if not outputs.isfinite().all():
                raise ValueError(f"{subject} are not finite")
            error = float((outputs - expected).abs().max() / expected.abs().max())
            if not error <= MAX_RELATIVE_ERROR:  # also true for NaN
                raise ValueError(
                    f"{subject} differ from the model's by {error:.1e} times the largest output "
                    f"(allowed: {MAX_RELATIVE_ERROR:g})"
                )
            worst = max(worst, error)
    return (
        f"{graph.note_prefix}{graph.runtime}'s outputs on {counted(len(images), 'image')} differ by at most "
        f"{worst:.1e} times the largest output (allowed: {MAX_RELATIVE_ERROR:g})"
    )


@contextlib.contextmanager
def quiet_exporters() -> Iterator[None]:
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


def preprocessing_code(loaded: LoadedRun) -> list[str] | None:
    """Return lines of Python code that preprocess an 8-bit or 16-bit image as `predict` does, with NumPy and Pillow.

    `predict` also reduces large images while decoding them, which changes pixels slightly. Returns None if the model's
    images are neither grayscale nor RGB, or if the white level is set (`DataConfig.white`).
    """
    config = loaded.info.data_config
    channels = int(config["input_size"][0])
    size = int(config["input_size"][-1])  # inputs are square, see `build_transform`
    mode = {1: "L", 3: "RGB"}.get(channels)
    if mode is None or loaded.info.data.white is not None:
        return None
    resized_side = math.floor(size / (config.get("crop_pct") or 1.0))
    resample = f"Image.Resampling.{config.get('interpolation', 'bicubic').upper()}"
    if config.get("crop_mode") == "squash":
        sides = f"({resized_side}, {resized_side})"
    else:
        sides = f"[int({resized_side} * side / min(image.size)) for side in image.size]"
    mean = [round(float(value), 6) for value in config["mean"]]
    std = [round(float(value), 6) for value in config["std"]]
    return [
        "def transform(image):",
        "    image = ImageOps.exif_transpose(image)",
        "    if image.mode.startswith('I'):",
        "        values = np.asarray(image)",
        "        has_8_bits = image.mode == 'I' and values.max() < 256",
        "        values = values if has_8_bits else values >> 8",
        "        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))",
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
