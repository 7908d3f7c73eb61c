"""Predict the memory of a training step from two small forward passes, and measure the peak memory of this process.

The factors of a SNELLA layer are merged into a matrix `ΔW`, whose largest entries are the layer's update. The effective
weight of the layer is the sum of its pre-trained weight and its update.
"""

import inspect
import math
import resource
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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

CallKey = tuple[str, int]
"""Module name or `ATTENTION`, and the index of the call among the calls with this name in a forward pass."""
ATTENTION = "scaled_dot_product_attention"
_STATUS = Path("/proc/self/status")
_SMALL_BATCH = 2
"""Batch size of the first pass. A single image is not representative: batch norm rejects it for 1×1 feature maps, and
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
"""Keyword arguments that `checkpoint` consumes instead of passing them on to the function."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_DEVICE_TYPES = ("cpu", "cuda")


@dataclass(frozen=True)
class ModuleCall:
    """Memory at the end of one call of a module or of attention.

    Attributes:
        saved_bytes: Bytes that autograd has saved for the backward pass so far.
        io_bytes: Bytes of the inputs and outputs. Their gradients need the same amount in the backward pass. Attention
            with compressed inputs counts twice, because the backward pass also restores its inputs and output.
    """

    saved_bytes: int
    io_bytes: int


@dataclass
class ForwardRecord:
    """Record of one forward pass in training mode.

    Attributes:
        saved_bytes: Bytes of the tensors that autograd saves for the backward pass, excluding parameters and buffers.
        saves_images: True if these tensors include the input images, as they do if the first layer is trained.
        calls: Calls of the modules in `measured_modules`, and of attention with compressed inputs
            (`compress_activations`), in execution order.
    """

    saved_bytes: int = 0
    saves_images: bool = False
    calls: dict[CallKey, ModuleCall] = field(default_factory=dict)


def measured_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return, by name, the adapted layers (without the modules inside them) and all other leaf modules."""
    modules: dict[str, nn.Module] = {}
    last_adapted: str | None = None
    for name, module in model.named_modules():
        if last_adapted is not None and name.startswith(f"{last_adapted}."):
            continue
        is_adapted = isinstance(module, BaseTunerLayer)
        if is_adapted:
            last_adapted = name
        if is_adapted or next(module.children(), None) is None:
            modules[name] = module
    return modules


def record_forward(model: nn.Module, images: Tensor) -> ForwardRecord:
    """Run one forward pass in training mode and record the size of the tensors that autograd saves.

    The function records sizes and releases the tensors, so it needs only the memory of a forward pass without
    gradients. Under activation checkpointing, the tensors saved in a checkpointed segment exist only during the
    backward pass of the segment; until then, only its inputs are saved. The training modes and buffers of the model,
    and the random state, are restored.

    During the call, `torch.utils.checkpoint.checkpoint` is replaced globally. Models that imported it by name bypass
    the replacement, and their segments count as if they were not checkpointed.
    """
    record = ForwardRecord()
    model_storages = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    # a weak reference keeps the identity of a storage reserved after its data is freed, so no other storage reuses it
    storages: dict[int, StorageWeakRef] = {}
    call_counts: Counter[str] = Counter()
    recomputed = 0  # bytes saved inside finished checkpointed segments

    def run_without_checkpoint(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Run a checkpointed segment at once, and count its inputs as saved and its other tensors as recomputed."""
        nonlocal recomputed
        for tensor in _tensors(args):
            pack(tensor)
        before = record.saved_bytes
        output = function(*args, **{key: value for key, value in options.items() if key not in _CHECKPOINT_OPTIONS})
        recomputed += record.saved_bytes - before
        return output

    def pack(tensor: Tensor) -> None:
        """Count the storages of a saved tensor that are neither the model's nor already counted."""
        parts = [tensor._indices(), tensor._values()] if tensor.layout == torch.sparse_coo else [tensor]
        for storage in (part.untyped_storage() for part in parts):
            reference = StorageWeakRef(storage)
            if storage.data_ptr() not in model_storages and reference.cdata not in storages:
                storages[reference.cdata] = reference
                record.saved_bytes += storage.nbytes()
                record.saves_images |= storage.data_ptr() == images.untyped_storage().data_ptr()

    def unpack(_: None) -> Tensor:
        raise RuntimeError("record_forward does not support a backward pass inside the forward pass")

    def record_call(name: str, io_bytes: int) -> None:
        """Record the memory at the end of a call."""
        record.calls[name, call_counts[name]] = ModuleCall(record.saved_bytes - recomputed, io_bytes)
        call_counts[name] += 1

    def record_module(name: str, _: nn.Module, inputs: Any, output: Any) -> None:
        # in-place modules return their input, which counts once
        tensors = {tensor.data_ptr(): tensor for tensor in (*_tensors(inputs), *_tensors(output))}
        record_call(name, sum(tensor.nbytes for tensor in tensors.values()))

    def record_attention(inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # the backward pass restores the compressed inputs and the output, in addition to their gradients
        record_call(ATTENTION, 2 * sum(tensor.nbytes for tensor in (*inputs, output)))

    modules = measured_modules(model)
    handles = [module.register_forward_hook(partial(record_module, name)) for name, module in modules.items()]
    checkpoint = torch.utils.checkpoint.checkpoint
    try:
        torch.utils.checkpoint.checkpoint = run_without_checkpoint
        attention_recorder = _AttentionRecorder(record_attention)
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
    """Mode that calls `record` for each attention call that `compress_activations` recomputes in the backward pass.

    The inputs of these calls are detached and require gradients, unlike those of other attention calls.
    """

    def __init__(self, record: Callable[[tuple[Tensor, ...], Tensor], None]) -> None:
        super().__init__()
        self.record = record

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, and record it if it is such an attention call."""
        output = func(*args, **(kwargs or {}))
        if func is nn.functional.scaled_dot_product_attention and args and args[0].is_leaf and args[0].requires_grad:
            self.record(args[:3], output)
        return output


@contextmanager
def preserve_state(model: nn.Module, images: Tensor) -> Iterator[None]:
    """Restore a model's training modes and buffers, and the random state of the CPU and any GPU used, on exit."""
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
    """Reset the peak that `peak_rss_mib` reports to the current memory, if the system supports it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # 5 resets VmHWM, see proc(5)


@dataclass(frozen=True)
class StepMemory:
    """Peak memory of one training step with AdamW, and the components of this peak, in bytes.

    `total` is not the sum of the components, which peak at different times: gradients are allocated while saved tensors
    are freed, and temporary tensors exist only briefly. Only `total` includes input images that autograd does not save.

    Attributes:
        weights: Parameters and buffers.
        gradients: Gradients of the trainable parameters.
        optimizer_state: AdamW's two moments.
        saved_bytes: Tensors saved for the backward pass.
        temporary: Largest total of temporary tensors in a module or in the optimizer step. In a module, these are
            gradients of activations, the effective weight or its gradient, and `ΔW`.
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
    """Predict the peak memory of one training step: forward, backward, and AdamW.

        at the end of the forward pass:    saved_bytes
        at module i of the backward pass:  saved_until(i) + gradients(i, i+1, …) + temporary(i)
        at the optimizer step:             gradients + temporary(AdamW)
        total = weights + optimizer_state + images (unless saved) + maximum of the above

    `saved_until(i)` is the number of bytes saved up to module i. It is linear in the batch size, as are the gradients
    of activations, so both are extrapolated from forward passes with 2 and 3 images. These passes need no more memory
    than passes without gradients.

    The prediction excludes the memory of libraries, rounding by the allocator, and workspaces of convolutions. The
    workspaces matter if all weights of a convolutional network are trained on the CPU.

    Args:
        model: Model from `build_method`, on any device.
        image_shape: `(channels, height, width)`.
        batch_size: Batch size.
        device_type: `"cpu"` or `"cuda"`, the type of device to predict for. Defaults to that of `model`.
    """
    first_parameter = next(model.parameters())
    device = first_parameter.device
    device_type = device_type or first_parameter.device.type
    with torch.random.fork_rng([device] if first_parameter.is_cuda else []):
        images = torch.randn(_LARGE_BATCH, *image_shape, device=device, dtype=first_parameter.dtype)
    small = record_forward(model, images[:_SMALL_BATCH].clone())
    large = record_forward(model, images)
    modules = measured_modules(model)
    # the backward pass reaches the last call of a module first, and allocates the gradients of its parameters there
    last_call = {name: (name, number) for name, number in small.calls}
    gradients_from: dict[CallKey, int] = {}
    allocated = 0
    for call in reversed(small.calls):
        module = modules.get(call[0])
        if module is not None and call == last_call[call[0]]:
            allocated += _trained_bytes(module)
        gradients_from[call] = allocated
    gradients = _trained_bytes(model)
    saved_bytes = _extrapolate(small.saved_bytes, large.saved_bytes, batch_size)
    # AdamW allocates denominators for all parameters at once on a GPU, and two tensors for one parameter at a time on
    # the CPU
    largest_parameter = max((p.nbytes for p in model.parameters() if p.requires_grad), default=0)
    optimizer_temporary = gradients if device_type == "cuda" else 2 * largest_parameter
    temporary = optimizer_temporary
    peak = max(saved_bytes, gradients + optimizer_temporary)
    # a call may occur in only one of the passes, for example if the model drops blocks at random
    for call in small.calls.keys() & large.calls.keys():
        small_call = small.calls[call]
        large_call = large.calls[call]
        saved_until = _extrapolate(small_call.saved_bytes, large_call.saved_bytes, batch_size)
        activation_gradients = _extrapolate(small_call.io_bytes, large_call.io_bytes, batch_size)
        module_temporary = activation_gradients + _matrix_temporary(modules.get(call[0]), device_type)
        temporary = max(temporary, module_temporary)
        peak = max(peak, saved_until + gradients_from[call] + module_temporary)
    if not small.saves_images:
        peak += batch_size * math.prod(image_shape) * first_parameter.element_size()
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    optimizer_state = 2 * gradients
    total = weights + optimizer_state + peak
    return StepMemory(weights, gradients, optimizer_state, saved_bytes, temporary, total)


def _extrapolate(small: int, large: int, batch_size: int) -> int:
    """Extrapolate linearly from the two passes to `batch_size`."""
    per_image = max(large - small, 0) // (_LARGE_BATCH - _SMALL_BATCH)
    return max(small - _SMALL_BATCH * per_image, 0) + batch_size * per_image


def _matrix_temporary(module: nn.Module | None, device_type: str) -> int:
    """Return the bytes of an adapted layer's temporary tensors whose size depends on its weight, not on the batch.

    The forward pass holds the effective weight. In the backward pass, the gradient of the weight takes its place. Numba
    kernels materialize `ΔW` only in the forward pass, to find its threshold. Triton kernels and torch operations
    materialize it in both passes.
    """
    if not isinstance(module, SnellaLayer) or module.merged or module.disable_adapters:
        return 0
    entries = module.out_features * module.in_features
    weight = cast(Tensor, module.get_base_layer().weight)
    largest = 0
    for name in module.active_adapters:
        if name not in module.snella_A:
            continue
        backend = module.backend_name(name)
        num_float32 = entries
        if backend == "triton" or (backend == "numba" and device_type == "cuda"):
            rank = module.snella_A[name].shape[-1]
            num_float32 += entries * rank // _TILE_ROWS + entries * rank // _TILE_COLUMNS
        elif backend != "numba":
            num_float32 += _EAGER_MATRICES * max(module.row_counts[name]) * module.in_features
        largest = max(largest, 4 * num_float32)
    return largest + entries * weight.element_size() if largest else 0


def _trained_bytes(module: nn.Module) -> int:
    """Return the size of the trainable parameters in bytes."""
    return sum(p.nbytes for p in module.parameters() if p.requires_grad)


def memory_table(
    backbone: str,
    device: str | None = None,
    *,
    batch: int = 32,
    img_size: int | None = None,
    r: int = 8,
    dtype: str = "fp32",
) -> Group:
    """Return a table with the predicted memory of one training step, one row per method in `MEMORY_METHODS`.

    Models are built one at a time on the CPU, with random weights and a head of 100 classes.

    Args:
        backbone: As for `create_backbone`.
        device: `"cpu"`, `"cuda"`, or the name of a GPU in `snella_lab.bench.machines.GPUS`. Such a name adds a
            column with step times for plain ViTs. Defaults to the device of this machine.
        batch: Batch size.
        img_size: Image size in pixels. Defaults to the default size of the backbone.
        r: Rank of the adapters.
        dtype: `"fp32"` or `"bf16"`, for weights and activations. PEFT keeps adapters in float32.

    Raises:
        ValueError: If a number is below 1, the backbone is unknown or does not support `img_size`, or a method does
            not support `r`.
        KeyError: If `device` is none of these names.
        Exception: Errors from `create_backbone`.
    """
    errors = [
        f"{name} must be at least 1, got {value}"
        for name, value in (("batch", batch), ("img_size", img_size), ("r", r))
        if value is not None and value < 1
    ]
    if errors:
        raise ValueError("; ".join(errors))
    device = device or choose_device("auto").type
    device_type = device if device in _DEVICE_TYPES else "cuda"
    name = device
    forecast = None
    estimate = None if device in _DEVICE_TYPES else plugin("estimates", "step-time")
    if estimate is not None:  # first, since it checks the name of the device
        name, forecast = estimate(device, backbone, batch=batch, img_size=img_size, r=r, dtype=dtype)
    build = partial(create_backbone, backbone, num_classes=_CLASSES, pretrained=False, img_size=img_size)
    rows: list[tuple[str, StepMemory]] = []
    for template in track_progress(MEMORY_METHODS, "predicting", len(MEMORY_METHODS), make_console()):
        method = template.format(r=r)
        model = build_sized(build, backbone, img_size)
        channels, height, width = resolve_model_data_config(model)["input_size"]
        model = build_method(method, model.to(_DTYPES[dtype]))
        rows.append((method, predict_step_memory(model, (channels, height, width), batch, device_type=device_type)))
    columns = ["MiB", "weights", "gradients", "optimizer state", "saved for backward", "largest temporary", "total"]
    notes = [
        "total is the peak, not the sum: the columns peak at different times, and only total includes input images "
        "that are not saved for the backward pass"
    ]
    if forecast is not None:
        columns.append("step, ms")
        notes += forecast.notes
    elif estimate is not None:
        notes.append(f"step times are available only for plain ViTs, not for {backbone}")
    images = f"{counted(batch, 'image')} of {height}×{width} px"
    title = f"Training step of {backbone}: {images}, {dtype}, AdamW, on {name}"
    table = make_table(columns, (), title=title)
    for method, memory in rows:
        cells = [f"{part / 2**20:,.1f}" for part in astuple(memory)]
        if forecast is not None:
            kind = method.partition("-")[0]  # "lora" in "lora-8"
            low, expected, high = forecast.seconds(kind)
            cells.append(f"{1e3 * expected:,.1f} ({1e3 * low:,.1f}–{1e3 * high:,.1f})")
        table.add_row(method, *cells)
    return Group(table, Text("\n".join(notes)))
