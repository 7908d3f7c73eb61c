"""Prediction of the memory of a training step from two small forward passes, and peak memory of this process."""

import contextlib
import inspect
import math
import resource
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.utils.checkpoint
from peft.tuners.tuners_utils import BaseTunerLayer
from rich.console import Group
from rich.text import Text
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from snella.layer import SnellaLayer
from snella_app.backbones.create import build_sized, create_backbone
from snella_app.console import counted, make_console, make_table, track_progress
from snella_app.device import choose_device
from snella_app.methods import build_method
from snella_app.methods.defaults import MEMORY_METHODS
from snella_app.plugins import plugin

Call = tuple[str, int]
"""Module name, or `ATTENTION`, and call index within the forward pass."""
ATTENTION = "scaled_dot_product_attention"
_STATUS = Path("/proc/self/status")
_SMALL_BATCH = 2
"""Batch size of the first pass. A single image is not representative: batch norm rejects it for 1x1 feature maps, and
operations on axes of length 1 return views where larger batches need copies."""
_LARGE_BATCH = 3
"""Batch size of the second pass."""
_TILE_ROWS = 32
"""Height of the tiles for which the Triton kernels store partial gradients."""
_TILE_COLUMNS = 64
"""Width of these tiles."""
_EAGER_MATRICES = 14  # temporary matrices of the eager backward pass besides `ΔW`, measured with the default kernel
_CLASSES = 100
_CHECKPOINT_OPTIONS = {*inspect.signature(torch.utils.checkpoint.checkpoint).parameters, "preserve_rng_state"}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_DEVICE_TYPES = ("cpu", "cuda")


@dataclass(frozen=True)
class ModuleCall:
    """Memory after the call of one module.

    Args:
        saved_bytes: Bytes saved by autograd so far.
        io_bytes: Bytes of the module's inputs and outputs; their gradients need the same amount in the backward pass.
            For attention, twice that, because the backward pass also decodes them.
    """

    saved_bytes: int
    io_bytes: int


@dataclass
class ForwardRecord:
    """Record of one forward pass in training mode.

    Args:
        saved_bytes: Bytes saved by autograd, excluding parameters and buffers.
        saves_images: True if the saved tensors include the input images, which a trained first layer needs.
        calls: Calls of the modules in `working_modules`, and of attention with encoded inputs, in execution order.
    """

    saved_bytes: int = 0
    saves_images: bool = False
    calls: dict[Call, ModuleCall] = field(default_factory=dict)


def working_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return adapted layers and all other leaf modules by name."""
    modules: dict[str, nn.Module] = {}
    adapted: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in adapted[-1:]):
            continue
        is_adapted = isinstance(module, BaseTunerLayer)
        if is_adapted:
            adapted.append(name)
        if is_adapted or next(module.children(), None) is None:
            modules[name] = module
    return modules


def record_forward(model: nn.Module, images: Tensor) -> ForwardRecord:
    """Run one forward pass in training mode and record the memory that autograd saves.

    The function records sizes and releases the tensors, so it needs only the memory of a forward pass without
    gradients. Under activation checkpointing, a segment's saved tensors exist only during its backward pass; until
    then, only the segment's inputs are saved. The modes and buffers of the model and the random state are restored.
    """
    record = ForwardRecord()
    model_storages = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    # a weak reference keeps the storage's identity reserved after its data is freed, so no other storage reuses it
    storages: dict[int, StorageWeakRef] = {}
    call_counts: Counter[str] = Counter()
    recomputed = 0  # bytes saved inside finished checkpointed segments

    def compute_now(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        nonlocal recomputed
        for tensor in _tensors(args):
            pack(tensor)
        before = record.saved_bytes
        output = function(*args, **{key: value for key, value in options.items() if key not in _CHECKPOINT_OPTIONS})
        recomputed += record.saved_bytes - before
        return output

    def pack(tensor: Tensor) -> None:
        parts = [tensor._indices(), tensor._values()] if tensor.layout == torch.sparse_coo else [tensor]
        for storage in (part.untyped_storage() for part in parts):
            reference = StorageWeakRef(storage)
            if storage.data_ptr() not in model_storages and reference.cdata not in storages:
                storages[reference.cdata] = reference
                record.saved_bytes += storage.nbytes()
                record.saves_images |= storage.data_ptr() == images.untyped_storage().data_ptr()

    def unpack(_: None) -> Tensor:
        raise RuntimeError("the forward pass must not run a backward pass inside record_forward, got one")

    def note(name: str, io_bytes: int) -> None:
        record.calls[name, call_counts[name]] = ModuleCall(record.saved_bytes - recomputed, io_bytes)
        call_counts[name] += 1

    def note_module(name: str, _: nn.Module, inputs: Any, output: Any) -> None:
        tensors = {tensor.data_ptr(): tensor for tensor in (*_tensors(inputs), *_tensors(output))}
        note(name, _bytes(tensors.values()))

    def note_attention(inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # decoding recreates the inputs and the output in the backward pass, in addition to the gradients
        note(ATTENTION, 2 * _bytes([*inputs, output]))

    modules = working_modules(model)
    handles = [module.register_forward_hook(partial(note_module, name)) for name, module in modules.items()]
    checkpoint = torch.utils.checkpoint.checkpoint
    try:
        torch.utils.checkpoint.checkpoint = compute_now
        attention_recorder = _AttentionRecorder(note_attention)
        with preserve_state(model, images), torch.autograd.graph.saved_tensors_hooks(pack, unpack), attention_recorder:
            model.train()
            model(images)
    finally:
        torch.utils.checkpoint.checkpoint = checkpoint
        for handle in handles:
            handle.remove()
    record.saved_bytes -= recomputed
    return record


class _AttentionRecorder(TorchFunctionMode):
    """Mode that calls `note` for attention that is recomputed; its inputs are detached (`compress_activations`)."""

    def __init__(self, note: Callable[[tuple[Tensor, ...], Tensor], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function and note attention."""
        output = func(*args, **(kwargs or {}))
        if func is nn.functional.scaled_dot_product_attention and args and args[0].is_leaf and args[0].requires_grad:
            self.note(args[:3], output)
        return output


@contextmanager
def preserve_state(model: nn.Module, images: Tensor) -> Iterator[None]:
    """Restore the modes and buffers of a model on exit, and the random state of the CPU and the images' device."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.random.fork_rng([images.device] if images.is_cuda else []):
            yield
    finally:
        for module, is_training in modes.items():
            module.training = is_training
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])


def _tensors(value: Any) -> Iterator[Tensor]:
    """Iterate over the tensors in a nested input or output."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)


def peak_rss_mib() -> float:
    """Return the peak resident memory of this process in MiB.

    The value is `VmHWM` if available, because `ru_maxrss` on Linux starts at the peak of the parent process.
    """
    if _STATUS.is_file():
        for line in _STATUS.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name == "VmHWM":
                return round(int(value.split()[0]) / 2**10, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / 2 ** (20 if sys.platform == "darwin" else 10), 1)


def reset_peak_rss() -> None:
    """Reset `peak_rss_mib` to the current memory, if the system supports it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


@dataclass(frozen=True)
class StepMemory:
    """Peak memory of one training step with AdamW and its components, in bytes.

    `total` is not the sum of the components. They peak at different times: gradients are allocated while saved tensors
    are freed, and temporary tensors exist only briefly. Only `total` includes input images that are not saved.

    Args:
        weights: Parameters and buffers.
        gradients: Gradients of the trainable parameters.
        optimizer_state: AdamW's two moments.
        saved_bytes: Tensors saved for the backward pass.
        temporary: Largest set of temporary tensors of one module or the optimizer: activation gradients, effective
            weight, `ΔW`, and gradients of effective weights.
        total: Peak memory.
    """

    weights: int
    gradients: int
    optimizer_state: int
    saved_bytes: int
    temporary: int
    total: int


def predict_step_memory(
    model: nn.Module, image_shape: tuple[int, int, int], batch_size: int, *, device_type: str | None = None
) -> StepMemory:
    """Predict the peak memory of one training step: forward, backward and AdamW.

        at module i of the backward pass:  saved_until(i) + gradients(i, i+1, …) + temporary(i)
        at the optimizer step:             gradients + temporary(AdamW)
        total = weights + optimizer_state + images (unless saved) + maximum of these

    `saved_until(i)` is the number of bytes saved up to module i. It is linear in the batch size, as is the activation
    part of `temporary`; the lines are fitted to forward passes with 2 and 3 images, which need no more memory than
    passes without gradients. The prediction excludes libraries, allocator rounding, and workspaces, which are
    significant for fully trained convolutions on the CPU.

    Args:
        model: Model from `build_method`, on any device.
        image_shape: `(channels, height, width)`.
        batch_size: Batch size.
        device_type: Device type of the training, `"cpu"` or `"cuda"`, which determines temporary tensors; the model's
            if None.
    """
    first_parameter = next(model.parameters())
    device = first_parameter.device
    device_type = device_type or first_parameter.device.type
    with torch.random.fork_rng([device] if first_parameter.is_cuda else []):
        images = torch.randn(_LARGE_BATCH, *image_shape, device=device, dtype=first_parameter.dtype)
    few = record_forward(model, images[:_SMALL_BATCH].clone())
    more = record_forward(model, images)
    modules = working_modules(model)
    last_call = {name: (name, number) for name, number in few.calls}
    gradients_from: dict[Call, int] = {}
    gradients = 0
    for call in reversed(few.calls):
        is_first_in_backward = call[0] in modules and call == last_call[call[0]]
        gradients += _trained_bytes(modules[call[0]]) if is_first_in_backward else 0
        gradients_from[call] = gradients
    gradients = _trained_bytes(model)
    saved_bytes = _extrapolate(few.saved_bytes, more.saved_bytes, batch_size)
    # on a GPU, AdamW allocates a denominator for all parameters at once, else two tensors of the largest one's size
    largest = max((_bytes([p]) for p in model.parameters() if p.requires_grad), default=0)
    step_temporary = gradients if device_type == "cuda" else 2 * largest
    temporary = step_temporary
    peak = max(saved_bytes, gradients + step_temporary)
    for call in few.calls.keys() & more.calls.keys():
        first, second = few.calls[call], more.calls[call]
        size = _extrapolate(first.io_bytes, second.io_bytes, batch_size) + _matrix_temporary(
            modules.get(call[0]), device_type
        )
        temporary = max(temporary, size)
        peak = max(peak, _extrapolate(first.saved_bytes, second.saved_bytes, batch_size) + gradients_from[call] + size)
    if not few.saves_images:
        peak += batch_size * math.prod(image_shape) * first_parameter.element_size()
    weights = _bytes([*model.parameters(), *model.buffers()])
    return StepMemory(weights, gradients, 2 * gradients, saved_bytes, temporary, weights + 2 * gradients + peak)


def _extrapolate(few: int, more: int, batch_size: int) -> int:
    """Extrapolate linearly from the two passes to `batch_size`."""
    per_image = max(more - few, 0) // (_LARGE_BATCH - _SMALL_BATCH)
    return max(few - _SMALL_BATCH * per_image, 0) + batch_size * per_image


def _matrix_temporary(module: nn.Module | None, device_type: str) -> int:
    """Return the bytes of temporary weight-sized tensors of an adapted layer, the maximum over both passes."""
    # in the backward pass the weight gradient replaces the effective weight; Numba kernels materialize `ΔW` only in the
    # forward pass, to find its threshold; Triton kernels and torch operations merge it in both passes
    if not isinstance(module, SnellaLayer) or module.merged or module.disable_adapters:
        return 0
    entries = module.out_features * module.in_features
    weight = cast(Tensor, module.get_base_layer().weight)
    largest = 0
    for name in module.active_adapters:
        if name not in module.snella_A:
            continue
        backend = module.backend_name(name)
        float32 = entries
        if backend == "triton" or (backend == "numba" and device_type == "cuda"):
            rank = module.snella_A[name].shape[-1]
            float32 += entries * rank // _TILE_ROWS + entries * rank // _TILE_COLUMNS
        elif backend != "numba":
            float32 += _EAGER_MATRICES * max(module.row_counts[name]) * module.in_features
        largest = max(largest, 4 * float32)
    return largest + entries * weight.element_size() if largest else 0


def _trained_bytes(module: nn.Module) -> int:
    """Return the bytes of the trainable parameters."""
    return _bytes(p for p in module.parameters() if p.requires_grad)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Return the total bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def predict_for_methods(
    backbone: str,
    batch: int = 32,
    *,
    img_size: int | None = None,
    r: int = 8,
    dtype: str = "fp32",
    device_type: str = "cpu",
) -> Iterator[tuple[str, tuple[int, int, int], StepMemory]]:
    """Predict the memory of each method; yields method, `(channels, height, width)` and memory.

    Models are built one at a time on the CPU, with random weights and a head of 100 classes. `dtype` applies to weights
    and activations; PEFT keeps adapters in float32.

    Raises:
        ValueError: If a number is below 1, `dtype` or the backbone is unknown, the backbone does not support
            `img_size`, or a method does not support `r`. Numbers and `dtype` are checked before a model is built.

    Other errors as for `create_backbone`.
    """
    errors = [
        f"{name} must be at least 1, got {value}"
        for name, value in (("batch", batch), ("img_size", img_size), ("r", r))
        if value is not None and value < 1
    ]
    if dtype not in _DTYPES:
        errors.append(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    if errors:
        raise ValueError("; ".join(errors))
    for template in MEMORY_METHODS:
        method = template.format(r=r)
        build = partial(create_backbone, backbone, num_classes=_CLASSES, pretrained=False, img_size=img_size)
        model = build_sized(build, backbone, img_size)
        channels, height, width = resolve_model_data_config(model)["input_size"]
        shape = (channels, height, width)
        model = build_method(method, model.to(_DTYPES[dtype]))
        yield method, shape, predict_step_memory(model, shape, batch, device_type=device_type)


def memory_table(
    backbone: str,
    device: str | None = None,
    *,
    batch: int = 32,
    img_size: int | None = None,
    r: int = 8,
    dtype: str = "fp32",
) -> Group:
    """Return a table with the memory of one training step, one row per method.

    Args:
        backbone: As for `create_backbone`.
        device: `cpu`, `cuda` or a GPU of `snella_lab.bench.machines.GPUS`, which adds a column with step times for
            plain ViTs; this machine's device if None.
        batch: As for `predict_for_methods`.
        img_size: As for `predict_for_methods`.
        r: As for `predict_for_methods`.
        dtype: As for `predict_for_methods`.

    Raises:
        ValueError: As for `predict_for_methods`.
        KeyError: If `device` is not in `GPUS`.

    Other errors as for `create_backbone`.
    """
    device = device or choose_device("auto").type
    device_type = device if device in _DEVICE_TYPES else "cuda"
    options: dict[str, Any] = {"batch": batch, "img_size": img_size, "r": r, "dtype": dtype}
    name = device
    forecast = None
    estimate = None if device in _DEVICE_TYPES else plugin("estimates", "step-time")
    if estimate is not None:  # first, since it checks the name of the device
        name, forecast = estimate(device, backbone, **options)
    predictions = predict_for_methods(backbone, **options, device_type=device_type)
    rows = list(track_progress(predictions, "predicting", len(MEMORY_METHODS), make_console()))
    columns = ["MiB", "weights", "gradients", "optimizer state", "saved for backward", "largest temporary", "total"]
    notes = [
        "total is the peak, not the sum: the columns peak at different times, and only total includes unsaved images"
    ]
    if forecast is not None:
        columns.append("step, ms")
        notes += forecast.notes
    elif estimate is not None:
        notes.append(f"step times are predicted for plain ViTs only, got {backbone}")
    height, width = rows[0][1][1:]
    images = f"{counted(batch, 'image')} of {height}×{width} px"
    title = f"Training step of {backbone}: {images}, {dtype}, AdamW, on {name}"
    table = make_table(columns, (), title=title)
    for method, _, memory in rows:
        cells = [f"{part / 2**20:,.1f}" for part in astuple(memory)]
        if forecast is not None:
            low, expected, high = forecast.seconds(method.partition("-")[0])
            cells.append(f"{1e3 * expected:,.1f} ({1e3 * low:,.1f}–{1e3 * high:,.1f})")
        table.add_row(method, *cells)
    return Group(table, Text("\n".join(notes)))
