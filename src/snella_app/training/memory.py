"""Memory of a training step, predicted from two small forward passes, and the peak of this process."""

import math
import resource
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.utils.checkpoint
from peft.tuners.tuners_utils import BaseTunerLayer
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from snella.layer import SnellaLayer
from snella_app.backbones import create_backbone
from snella_app.methods import build_method
from snella_app.methods.defaults import MEMORY_METHODS

Call = tuple[str, int]
"""A module's name, or `ATTENTION`, and which of its calls within the pass."""
ATTENTION = "scaled_dot_product_attention"


@dataclass(frozen=True)
class ModuleCall:
    """The state after one module has run.

    Args:
        kept: Bytes kept until then.
        passed: Bytes of its inputs and outputs together; as much is there again as gradients in the backward pass.
    """

    kept: int
    passed: int


@dataclass
class ForwardRecord:
    """One forward pass in training mode.

    Args:
        kept: Bytes that autograd keeps after it, parameters and buffers apart.
        keeps_images: Whether the images themselves are among them, as the first trained layer wants.
        calls: The modules of `working_modules`, and attention whose inputs are kept encoded, in the order in which they
            ran.
    """

    kept: int = 0
    keeps_images: bool = False
    calls: dict[Call, ModuleCall] = field(default_factory=dict)


def working_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that compute something themselves, by name: adapted layers as a whole, and those without parts."""
    found: dict[str, nn.Module] = {}
    adapted: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in adapted[-1:]):
            continue
        is_adapted = isinstance(module, BaseTunerLayer)
        if is_adapted:
            adapted.append(name)
        if is_adapted or next(module.children(), None) is None:
            found[name] = module
    return found


def record_forward(model: nn.Module, images: Tensor) -> ForwardRecord:
    """Run the model once in training mode, and record what autograd saves.

    Sizes are recorded and tensors released, so that this takes the memory of a forward pass without gradients. What a
    part under activation checkpointing saves is there while its own backward pass runs; before and after, its inputs.

    Args:
        model: Left as it was: mode, buffers and the random state are restored.
        images: `[batch, channels, height, width]` on the model's device.
    """
    record = ForwardRecord()
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    # a storage's data goes with its last tensor; what is known of it stays, so that no other one takes its identity
    noted: dict[int, StorageWeakRef] = {}
    seen: Counter[str] = Counter()
    recomputed = 0  # bytes of the parts under checkpointing that ended, less those of all their inputs so far

    def compute_now(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        nonlocal recomputed
        for tensor in _tensors(args):
            storage = StorageWeakRef(tensor.untyped_storage())
            recomputed -= 0 if storage.cdata in noted else tensor.untyped_storage().nbytes()
        before = record.kept
        output = function(*args)
        recomputed += record.kept - before
        return output

    def pack(tensor: Tensor) -> None:
        parts = [tensor._indices(), tensor._values()] if tensor.layout == torch.sparse_coo else [tensor]
        for storage in (part.untyped_storage() for part in parts):
            known = StorageWeakRef(storage)
            if storage.data_ptr() not in own and known.cdata not in noted:
                noted[known.cdata] = known
                record.kept += storage.nbytes()
                record.keeps_images |= storage.data_ptr() == images.untyped_storage().data_ptr()

    def unpack(_: None) -> Tensor:
        raise RuntimeError("record_forward keeps nothing for a backward pass, got one; record the forward pass alone")

    def noting(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(_: nn.Module, inputs: Any, output: Any) -> None:
            passed = {t.data_ptr(): t.numel() * t.element_size() for t in (*_tensors(inputs), *_tensors(output))}
            record.calls[name, seen[name]] = ModuleCall(record.kept - recomputed, sum(passed.values()))
            seen[name] += 1

        return note

    def note_attention(inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # decoded, it is there again with its output, besides gradients
        passed = 2 * _bytes([*inputs, output])
        record.calls[ATTENTION, seen[ATTENTION]] = ModuleCall(record.kept - recomputed, passed)
        seen[ATTENTION] += 1

    handles = [module.register_forward_hook(noting(name)) for name, module in working_modules(model).items()]
    checkpoint = torch.utils.checkpoint.checkpoint
    try:
        torch.utils.checkpoint.checkpoint = compute_now
        watched = _WatchedAttention(note_attention)
        with restored_state(model, images), torch.autograd.graph.saved_tensors_hooks(pack, unpack), watched:
            model.train()
            model(images)
    finally:
        torch.utils.checkpoint.checkpoint = checkpoint
        for handle in handles:
            handle.remove()
    record.kept -= recomputed
    return record


class _WatchedAttention(TorchFunctionMode):
    """Tells of attention that is computed apart from the model's graph, and again in the backward pass."""

    def __init__(self, note: Callable[[tuple[Tensor, ...], Tensor], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function."""
        output = func(*args, **(kwargs or {}))
        if func is nn.functional.scaled_dot_product_attention and args and args[0].is_leaf and args[0].requires_grad:
            self.note(args[:3], output)
        return output


@contextmanager
def restored_state(model: nn.Module, images: Tensor) -> Iterator[None]:
    """Restore mode, buffers and random state of a model afterwards.

    Args:
        model: Run inside.
        images: What it is run on, for their device.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    was_training = model.training
    try:
        with torch.random.fork_rng([images.device] if images.is_cuda else []):
            yield
    finally:
        model.train(was_training)
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in what a module takes or gives."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)


_STATUS = Path("/proc/self/status")


def peak_rss_mib() -> float:
    """Peak resident memory of this process so far, in MiB.

    `VmHWM` where the system has it. `ru_maxrss` on Linux begins at the peak of the process that started this one.
    """
    if _STATUS.is_file():
        for line in _STATUS.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name == "VmHWM":
                return round(int(value.split()[0]) / 2**10, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / 2 ** (20 if sys.platform == "darwin" else 10), 1)


_FEW, _MORE = 2, 3
"""Images of the two passes. One alone is no sample: batch norm refuses it, and an axis of length 1 needs no copies."""
_ROWS_OF_TILE, _COLUMNS_OF_TILE = 32, 64  # of the Triton kernels: each tile has its own partial gradients
_EAGER_MATRICES = 14  # that torch operations need at once beside `ΔW` in the default kernel's backward pass; measured


@dataclass(frozen=True)
class StepMemory:
    """Peak memory of one training step with AdamW, in bytes, and what it is made of.

    `total` is the most that is there at one time, which is less than the sum of the parts: the gradients appear while
    saved tensors are released, and each temporary tensor has its own moment.

    Args:
        weights: Parameters and buffers.
        gradients: One value for each trained parameter, after the backward pass.
        optimizer_state: AdamW's two moments.
        kept: What the forward pass keeps for the backward pass.
        temporary: The largest set of temporary tensors of one module or of the optimizer: gradients of activations,
            an effective weight, `ΔW`, a weight's gradient that is not a parameter's.
        total: Peak.
    """

    weights: int
    gradients: int
    optimizer_state: int
    kept: int
    temporary: int
    total: int


def predict_step_memory(
    model: nn.Module, image_shape: tuple[int, int, int], batch_size: int, *, device_type: str | None = None
) -> StepMemory:
    """Predict the peak memory of one training step: forward, backward, AdamW.

        at module i of the backward pass:  kept_until(i) + gradients(i, i+1, …) + temporary(i)
        at the optimizer's step:           gradients + temporary(AdamW)
        total = weights + optimizer_state + images + max of these

    `kept_until` and the activations' part of `temporary` are linear in the batch; forward passes of 2 and 3 images give
    the line, and take the memory of passes without gradients. Libraries, the allocator's rounding and workspaces come
    on top; the latter count where convolutions are trained in full on the CPU.

    Args:
        model: From `build_method`, on any device.
        image_shape: `(channels, height, width)`.
        batch_size: Batch size.
        device_type: Where it will train, `"cpu"` or `"cuda"`, whose temporary tensors differ; the model's
            device if None.
    """
    few, more = _two_passes(model, image_shape)
    device_type = device_type or next(model.parameters()).device.type
    modules = working_modules(model)
    last_call = {name: (name, number) for name, number in few.calls}
    still_to_come: dict[Call, int] = {}
    gradients = 0
    for call in reversed(few.calls):
        is_first = call[0] in modules and call == last_call[call[0]]
        gradients += _trained_bytes(modules[call[0]]) if is_first else 0
        still_to_come[call] = gradients
    gradients = _trained_bytes(model)
    kept = _on_line(few.kept, more.kept, batch_size)
    of_step = _step_temporary(model, device_type)
    temporary, peak = of_step, max(kept, gradients + of_step)
    for call in few.calls.keys() & more.calls.keys():
        one, two = few.calls[call], more.calls[call]
        own = _on_line(one.passed, two.passed, batch_size) + _matrix_temporary(modules.get(call[0]), device_type)
        temporary = max(temporary, own)
        peak = max(peak, _on_line(one.kept, two.kept, batch_size) + still_to_come[call] + own)
    if not few.keeps_images:
        peak += batch_size * math.prod(image_shape) * next(model.parameters()).element_size()
    weights = _bytes([*model.parameters(), *model.buffers()])
    return StepMemory(weights, gradients, 2 * gradients, kept, temporary, weights + 2 * gradients + peak)


def _two_passes(model: nn.Module, image_shape: tuple[int, int, int]) -> tuple[ForwardRecord, ForwardRecord]:
    """What forward passes of few images and of one more keep."""
    first = next(model.parameters())
    with torch.random.fork_rng([first.device] if first.is_cuda else []):
        images = torch.randn(_MORE, *image_shape, device=first.device, dtype=first.dtype)
    return record_forward(model, images[:_FEW].clone()), record_forward(model, images)


def _on_line(few: int, more: int, batch_size: int) -> int:
    """The value at `batch_size` of the line through those of the two passes."""
    per_image = max(more - few, 0) // (_MORE - _FEW)
    return max(few - _FEW * per_image, 0) + batch_size * per_image


def _matrix_temporary(module: nn.Module | None, device_type: str) -> int:
    """Bytes of the weight-sized tensors that an adapted layer makes and lets go within one pass, the larger of both.

    The weight's gradient takes the place of the effective weight. Numba kernels write `ΔW` in the forward pass alone,
    to find its threshold; Triton kernels and torch operations merge it in both passes.
    """
    if not isinstance(module, SnellaLayer) or module.merged or module.disable_adapters:
        return 0
    entries, weight = module.out_features * module.in_features, cast(Tensor, module.get_base_layer().weight)
    largest = 0
    for name in module.active_adapters:
        if name not in module.snella_A:
            continue
        backend = module.backend_name(name)
        float32 = entries
        if backend == "triton" or (backend == "numba" and device_type == "cuda"):
            rank = module.snella_A[name].shape[-1]
            float32 += entries * rank // _ROWS_OF_TILE + entries * rank // _COLUMNS_OF_TILE
        elif backend != "numba":
            float32 += _EAGER_MATRICES * max(module.row_counts[name]) * module.in_features
        largest = max(largest, 4 * float32)
    return largest + entries * weight.element_size() if largest else 0


def _step_temporary(model: nn.Module, device_type: str) -> int:
    """Bytes that AdamW makes and lets go: a denominator for all parameters at once on a GPU, else one by one, twice."""
    sizes = [_bytes([p]) for p in model.parameters() if p.requires_grad]
    return sum(sizes) if device_type == "cuda" else 2 * max(sizes, default=0)


def _trained_bytes(module: nn.Module) -> int:
    """Bytes of the trainable parameters."""
    return _bytes([p for p in module.parameters() if p.requires_grad])


def _bytes(tensors: list[Tensor]) -> int:
    """Bytes of their values."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


_CLASSES = 100
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def methods_compared(r: int) -> list[str]:
    """The methods that `predict_for_methods` goes through, for ranks of `r`."""
    return [name.format(r=r) for name in MEMORY_METHODS]


def predict_for_methods(
    backbone: str,
    batch: int = 32,
    *,
    img_size: int | None = None,
    r: int = 8,
    dtype: str = "fp32",
    device_type: str = "cpu",
) -> Iterator[tuple[str, tuple[int, int, int], StepMemory]]:
    """Yield method, `(channels, height, width)` and memory, one method after the other; a model at a time is built.

    The models have random weights and a head of 100 classes, and are built on the CPU.

    Args:
        backbone: As for `create_backbone`.
        batch: Batch size.
        img_size: Input resolution in pixels; the backbone's own if None.
        r: Rank of SNELLA's and LoRA's factors.
        dtype: Of weights and activations; PEFT keeps the adapters themselves in float32.
        device_type: Where the training is to run.

    Raises:
        ValueError: A number below 1, an unknown `dtype` or backbone; all but the latter before a model is built.
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
    return _predict_each(backbone, batch, img_size, r, _DTYPES[dtype], device_type)


def _predict_each(
    backbone: str, batch: int, img_size: int | None, r: int, dtype: torch.dtype, device_type: str
) -> Iterator[tuple[str, tuple[int, int, int], StepMemory]]:
    """`predict_for_methods`, after its checks."""
    for method in methods_compared(r):
        model = create_backbone(backbone, num_classes=_CLASSES, pretrained=False, img_size=img_size).to(dtype)
        channels, height, width = resolve_model_data_config(model)["input_size"]
        model = build_method(method, model)
        shape = (channels, height, width)
        yield method, shape, predict_step_memory(model, shape, batch, device_type=device_type)
