"""FLOP and memory of one SNELLA training step, counted from shapes on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from snella.layer import SnellaLayer
from snella.memory.origins import origin_of
from snella_app.training.memory import measured_modules

_MOMENTS = 2  # AdamW
_FLOAT32 = 4


@dataclass(frozen=True)
class CountedStep:
    """Costs of one training step (forward and backward) on one batch.

    Args:
        batch: Batch size.
        adapted: Number of weights in the adapted matrices, which every pass merges.
        forward_flop: FLOP of the forward pass; a multiply-add counts as two.
        training_flop: FLOP of forward and backward pass. Each adapted layer needs three products: output, input
            gradient and weight gradient. A frozen layer needs two, or one if no earlier layer is trained.
        peak_bytes: Peak memory: weights, gradients, AdamW's moments, the batch, saved tensors, and the largest set of
            temporary tensors of one module. Excludes libraries and allocator overhead.
    """

    batch: int
    adapted: int
    forward_flop: int
    training_flop: int
    peak_bytes: int


def count_step(build: Callable[[], nn.Module], inputs: Mapping[str, Any], checkpointed: str = "") -> CountedStep:
    """Count a step on torch's meta device.

    An adapted layer is replaced with a layer with a trainable dense weight; both compute the same three products, and
    save the input unless it is recomputed.

    Args:
        build: Creates the model with SNELLA adapters; called on the meta device, in float32.
        inputs: Arguments of the model on the meta device, the first one a batch; a single positional tensor has the
            name `""`.
        checkpointed: Name of the module list whose blocks are checkpointed. FLOPs exclude the recomputation.
    """
    with torch.device("meta"):
        model = build().train()
    adapted = [module for module in model.modules() if isinstance(module, SnellaLayer)]
    trained = _bytes(p for p in model.parameters() if p.requires_grad)
    weights = _bytes([*model.parameters(), *model.buffers()])
    for layer in adapted:
        layer.enable_adapters(False)
        layer.get_base_layer().weight.requires_grad_(True)
    input_storages = {_storage(tensor): tensor for tensor in _tensors(inputs)}
    record = _SavedTensors(
        {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())} | input_storages.keys()
    )

    def run() -> Tensor:
        return _first_tensor(model(inputs[""]) if "" in inputs else model(**inputs))

    # two separate passes, because the counter's hooks disable the recomputation of inputs
    with _FusedAttention():
        with record.hooks(model, checkpointed):
            run()
        with FlopCounterMode(display=False, custom_mapping=_ATTENTION_FLOP) as counter:
            y = run()
            forward = counter.get_total_flops()
            y.sum().backward()
    return CountedStep(
        batch=len(next(iter(inputs.values()))),
        adapted=sum(layer.get_base_layer().weight.numel() for layer in adapted),
        forward_flop=forward,
        training_flop=counter.get_total_flops(),
        peak_bytes=weights + (1 + _MOMENTS) * trained + _bytes(input_storages.values()) + record.peak,
    )


class _FusedAttention(TorchFunctionMode):
    """Function mode that runs attention as the CPU's fused kernel; the meta device would build the attention matrix."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace attention with the fused operation."""
        if func is nn.functional.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Compute fused attention; regular attention for grouped queries, dropout or a mask with a gradient (as in SAM)."""
    if enable_gqa or dropout_p or (attn_mask is not None and attn_mask.requires_grad):
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    y: Tensor = fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return y


def _attention_flop(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Count the FLOP of two products."""
    return sdpa_flop_count(query, key, value)


def _attention_backward_flop(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Count the FLOP of five products; the attention weights are recomputed."""
    return sdpa_backward_flop_count(gradient, query, key, value)


_ATTENTION_FLOP = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flop,
}


@dataclass
class _SavedTensors:
    """Bytes saved by a forward pass, counted by storage.

    `peak` is the maximum over modules of the bytes saved up to the module plus its temporary tensors. Checkpointed
    blocks count their inputs, and the saved tensors of one block at a time.
    """

    excluded: set[int]
    peak: int = 0
    _persistent: int = 0
    _in_block: int = 0
    _is_in_block: bool = False
    _seen: dict[int, Tensor] = field(default_factory=dict)

    @contextmanager
    def hooks(self, model: nn.Module, checkpointed: str) -> Iterator[None]:
        """Register hooks on a model."""
        handles = [
            module.register_forward_hook(self._after_module, with_kwargs=True)
            for module in measured_modules(model).values()
        ]
        handles += [
            module.register_forward_pre_hook(self._before_adapted)
            for module in model.modules()
            if isinstance(module, SnellaLayer)
        ]
        for name, module in model.named_modules():
            if checkpointed and name.rpartition(".")[0].split(".")[-1] == checkpointed:
                handles += [
                    module.register_forward_pre_hook(self._before_block, with_kwargs=True),
                    module.register_forward_hook(self._after_block),
                ]
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _pack(self, tensor: Tensor) -> Tensor:
        """Count a tensor saved by autograd."""
        key = _storage(tensor)
        if key not in self.excluded and key not in self._seen:
            self._seen[key] = tensor
            size = tensor.untyped_storage().nbytes()
            if self._is_in_block:
                self._in_block += size
            else:
                self._persistent += size
            self.peak = max(self.peak, self._persistent + self._in_block)
        return tensor

    def _after_module(self, module: nn.Module, positional: Any, named: Any, output: Any) -> None:
        """Count temporaries: gradients of inputs and outputs; for an adapted layer, effective weight and gradient."""
        tensors = {_storage(t): t for t in _tensors((positional, named, output))}
        temporary = _bytes(tensors.values())
        if isinstance(module, SnellaLayer):
            temporary += 2 * _FLOAT32 * module.get_base_layer().weight.numel()
        self.peak = max(self.peak, self._persistent + self._in_block + temporary)

    def _before_adapted(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Exclude an input that the adapted layer recomputes."""
        if origin_of(inputs[0])[1] is not None:
            self.excluded.add(_storage(inputs[0]))

    def _before_block(self, block: nn.Module, positional: Any, named: Any) -> None:
        """Count the inputs of a checkpointed block."""
        for tensor in _tensors((positional, named)):
            if tensor.requires_grad and _storage(tensor) not in self._seen:
                self._seen[_storage(tensor)] = tensor
                self._persistent += _bytes([tensor])
        self._is_in_block = True

    def _after_block(self, block: nn.Module, positional: Any, output: Any) -> None:
        """Drop the saved tensors of a checkpointed block."""
        self._is_in_block, self._in_block = False, 0


def _storage(tensor: Tensor) -> int:
    """Return the identity of a tensor's storage; addresses are all 0 on the meta device."""
    return int(tensor.untyped_storage()._cdata)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Return the total bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _first_tensor(value: Any) -> Tensor:
    """Return the first tensor of a model output."""
    return next(_tensors(value))


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield all tensors in nested inputs or outputs."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)
