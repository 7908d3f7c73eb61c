"""Graphs of a model for ONNX Runtime, `torch.jit` and `torch.export`: export, comparison with torch, loading code."""

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

OUTPUT_BOUND = 1e-4
"""Maximum error of exported outputs relative to the largest output; allows for rounding in float32."""
_TWO_GIB = 2**31


@dataclass(frozen=True)
class Graph:
    """Exported graph.

    Args:
        runtime: Name of the runtime.
        content: Content of the file.
        run: Maps images to outputs.
        module: Module that the code imports.
        load_code: Python code that loads the file `PATH` and its `classes`.
        run_code: Python expression that computes the outputs for the array `images`.
        note_prefix: Prefix of the note on the outputs.
    """

    runtime: str
    content: bytes
    run: Callable[[Tensor], Tensor]
    module: str
    load_code: str
    run_code: str
    note_prefix: str = ""


def export_onnx(model: nn.Module, example: Tensor, metadata: dict[str, Any], output: str, opset: int | None) -> Graph:
    """Export a model to ONNX, for any batch size.

    Args:
        model: Model in evaluation mode.
        example: Two images.
        metadata: Entries of the file's metadata.
        output: Name of the output.
        opset: ONNX opset version; None selects the exporter's.

    Raises:
        ValueError: If the model is too large for ONNX or needs another opset.
    """
    import onnxruntime

    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if size >= _TWO_GIB:
        raise ValueError(f"onnx supports less than 2 GiB of weights, got {size / 2**30:.2f} GiB; use torch-export")
    program: Any = torch.onnx.export(
        model,
        (example,),
        input_names=["images"],
        output_names=[output],
        opset_version=opset,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        verbose=False,
    )
    proto = program.model_proto
    exported_opset = max(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    if opset not in (None, exported_opset):
        raise ValueError(f"opset must be {exported_opset} for this model, got {opset}")
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=value)
    content = proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return Graph(
        "ONNX Runtime",
        content,
        lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]),
        "onnxruntime",
        "session = onnxruntime.InferenceSession(PATH)\n"
        "classes = json.loads(session.get_modelmeta().custom_metadata_map['classes'])",
        "session.run(None, {'images': images})[0]",
        f"opset {exported_opset}, any batch size; ",
    )


def export_torchscript(model: nn.Module, example: Tensor, metadata: dict[str, Any], *_: Any) -> Graph:
    """Export a model to TorchScript; arguments as for `export_onnx`."""
    file = io.BytesIO()
    with torch.no_grad():
        torch.jit.save(torch.jit.trace(model, example), file, _extra_files=metadata)
    file.seek(0)
    return _torch_graph("TorchScript", file, torch.jit.load(file), "torch.jit.load(PATH, _extra_files=files)")


def export_torch(model: nn.Module, example: Tensor, metadata: dict[str, Any], *_: Any) -> Graph:
    """Export a model with `torch.export`; arguments as for `export_onnx`."""
    file = io.BytesIO()
    program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, file, extra_files=metadata)
    file.seek(0)
    run = torch.export.load(file).module()
    return _torch_graph("torch.export", file, run, "torch.export.load(PATH, extra_files=files).module()")


def _torch_graph(runtime: str, file: io.BytesIO, run: Callable[[Tensor], Tensor], load_call: str) -> Graph:
    """Build a `Graph`; `load_call` is the code that loads its file."""
    load_code = f"files = {{'classes': ''}}\nmodel = {load_call}\nclasses = json.loads(files['classes'])"
    run_code = "model(torch.from_numpy(images)).detach().numpy()"
    return Graph(runtime, file.getvalue(), run, "torch", load_code, run_code)


def compare_outputs(graph: Graph, model: nn.Module, images: Tensor) -> str:
    """Compare the outputs of a graph and the model on all images and on batches of one and two.

    Returns:
        Largest difference, as a note.

    Raises:
        ValueError: If outputs differ by more than `OUTPUT_BOUND` times the largest output.
    """
    worst = 0.0
    with torch.inference_mode():
        for count in sorted({1, min(2, len(images)), len(images)}):
            expected = model(images[:count]).float()
            got = graph.run(images[:count].clone()).float()
            is_comparable = got.shape == expected.shape and bool(got.isfinite().all())
            error = float((got - expected).abs().max() / expected.abs().max()) if is_comparable else math.inf
            if not error <= OUTPUT_BOUND:
                raise ValueError(
                    f"{graph.runtime} outputs must differ from torch outputs by at most {OUTPUT_BOUND:g} times the "
                    f"largest, got {error:.1e} on {counted(count, 'image')}; nothing was written"
                )
            worst = max(worst, error)
    return (
        f"{graph.note_prefix}{graph.runtime}'s outputs on {counted(len(images), 'image')} differ by at most "
        f"{worst:.1e} times the largest output (allowed: {OUTPUT_BOUND:g})"
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


def preparation_code(loaded: LoadedRun) -> list[str] | None:
    """Return Python code that preprocesses an 8-bit or 16-bit image like `predict`, with NumPy and Pillow.

    `predict` also reduces large images while decoding them, which changes pixels slightly. The result is None unless
    the images are grayscale or RGB and `white` is not set.
    """
    config = loaded.info.data_config
    channels = int(config["input_size"][0])
    size = int(config["input_size"][-1])
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
    mean = [round(float(value), 6) for value in config["mean"]]
    std = [round(float(value), 6) for value in config["std"]]
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
