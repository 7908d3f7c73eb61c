"""What one forward pass keeps for the backward pass, and at which of the model's modules it had how much."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

Call = tuple[str, int]
"""A module's name, and which of its calls within the pass."""


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
        calls: The modules of `working_modules` in the order in which they ran.
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
    """Run the model once in training mode, and note what is kept.

    It is noted and not kept, so that this takes the memory of a forward pass without gradients.

    Args:
        model: Left as it was: mode, buffers and the random state are restored.
        images: `[batch, channels, height, width]` on the model's device.
    """
    record = ForwardRecord()
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    # a storage's data goes with its last tensor; what is known of it stays, so that no other one takes its identity
    noted: dict[int, StorageWeakRef] = {}
    seen: Counter[str] = Counter()

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
            record.calls[name, seen[name]] = ModuleCall(record.kept, sum(passed.values()))
            seen[name] += 1

        return note

    handles = [module.register_forward_hook(noting(name)) for name, module in working_modules(model).items()]
    try:
        with _unchanged(model, images), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            model.train()
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return record


@contextmanager
def _unchanged(model: nn.Module, images: Tensor) -> Iterator[None]:
    """Restore mode, buffers and random state afterwards."""
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
