"""What one training step of SNELLA computes and keeps, counted from shapes: no weights, no arithmetic, no rows."""

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
from snella_app.training.memory import working_modules

_MOMENTS = 2  # of AdamW
_FLOAT32 = 4


@dataclass(frozen=True)
class CountedStep:
    """One training step, forward and backward, of one batch.

    Args:
        batch: Its samples.
        adapted: Weights in the adapted matrices, which are merged anew in every pass.
        forward_flop: Floating-point operations of the forward pass, a multiply-add being two.
        training_flop: Of forward and backward pass. Each adapted layer takes three products: its output, the gradient
            of its input and that of its weight. What is frozen takes two, or one where nothing before it is trained.
        peak_bytes: Most memory at one time: weights, gradients, AdamW's moments, the batch, what is kept for the
            backward pass, and the largest set of temporary tensors of one module. Libraries and allocator come on top.
    """

    batch: int
    adapted: int
    forward_flop: int
    training_flop: int
    peak_bytes: int


def count_step(build: Callable[[], nn.Module], inputs: Mapping[str, Any], checkpointed: str = "") -> CountedStep:
    """Count a step on torch's meta device.

    SNELLA computes the three products of a layer with a trained dense weight and keeps what that keeps, its input, but
    where the input is computed again; so the adapted layers run as such layers here.

    Args:
        build: Makes the model with its SNELLA adapters; called on the meta device, in float32.
        inputs: Arguments of the model, on the meta device, the first of them a batch; a tensor alone goes under the
            name `""`.
        checkpointed: The model's list of blocks whose activations are computed a second time instead of kept, e.g.
            `"layers"`. The second computation is not among the FLOP.
    """
    with torch.device("meta"):
        model = build().train()
    adapted = [module for module in model.modules() if isinstance(module, SnellaLayer)]
    trained = _bytes(p for p in model.parameters() if p.requires_grad)
    weights = _bytes([*model.parameters(), *model.buffers()])
    for layer in adapted:
        layer.enable_adapters(False)
        layer.get_base_layer().weight.requires_grad_(True)
    given = {_storage(tensor): tensor for tensor in _tensors(inputs)}
    record = _Kept({_storage(tensor) for tensor in (*model.parameters(), *model.buffers())} | given.keys())

    def run() -> Tensor:
        return _first_tensor(model(inputs[""]) if "" in inputs else model(**inputs))

    # one after the other: where the counter's hooks are, no input is computed again
    with _FusedAttention():
        with record.of(model, checkpointed):
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
        peak_bytes=weights + (1 + _MOMENTS) * trained + _bytes(given.values()) + record.peak,
    )


class _FusedAttention(TorchFunctionMode):
    """Attention as the CPU computes it where it can, without the matrix of all pairs; the meta device always has it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Put the fused operation in the place of the general one."""
        if func is nn.functional.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Attention; a mask that has a gradient, as SAM's relative positions have, needs the matrix."""
    if enable_gqa or dropout_p or (attn_mask is not None and attn_mask.requires_grad):
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    y: Tensor = fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return y


def _attention_flop(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Two products."""
    return sdpa_flop_count(query, key, value)


def _attention_backward_flop(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Five products: the weights are computed again."""
    return sdpa_backward_flop_count(gradient, query, key, value)


_ATTENTION_FLOP = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flop,
}


@dataclass
class _Kept:
    """Bytes that a forward pass keeps, told by the storages that autograd saves.

    `peak` is the most that is there at any module when the backward pass comes to it: what was kept until then, and the
    module's own temporary tensors. Of checkpointed blocks only one is kept at a time, and what enters each.
    """

    own: set[int]
    peak: int = 0
    _lasting: int = 0
    _in_block: int = 0
    _is_in_block: bool = False
    _seen: dict[int, Tensor] = field(default_factory=dict)

    @contextmanager
    def of(self, model: nn.Module, checkpointed: str) -> Iterator[None]:
        """Watch a model."""
        handles = [
            module.register_forward_hook(self._after_module, with_kwargs=True)
            for module in working_modules(model).values()
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
        """Count a tensor that autograd saves."""
        key = _storage(tensor)
        if key not in self.own and key not in self._seen:
            self._seen[key] = tensor
            size = tensor.untyped_storage().nbytes()
            if self._is_in_block:
                self._in_block += size
            else:
                self._lasting += size
            self.peak = max(self.peak, self._lasting + self._in_block)
        return tensor

    def _after_module(self, module: nn.Module, positional: Any, named: Any, output: Any) -> None:
        """Gradients as large as inputs and outputs, and for an adapted layer its effective weight and the gradient."""
        passed = {_storage(t): t for t in _tensors((positional, named, output))}
        own = _bytes(passed.values())
        if isinstance(module, SnellaLayer):
            own += 2 * _FLOAT32 * module.get_base_layer().weight.numel()
        self.peak = max(self.peak, self._lasting + self._in_block + own)

    def _before_adapted(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """An input that an adapted layer computes again is not kept."""
        if origin_of(inputs[0])[1] is not None:
            self.own.add(_storage(inputs[0]))

    def _before_block(self, block: nn.Module, positional: Any, named: Any) -> None:
        """What enters a block is kept whatever happens inside."""
        for tensor in _tensors((positional, named)):
            if tensor.requires_grad and _storage(tensor) not in self._seen:
                self._seen[_storage(tensor)] = tensor
                self._lasting += _bytes([tensor])
        self._is_in_block = True

    def _after_block(self, block: nn.Module, positional: Any, output: Any) -> None:
        """What it kept is gone until the backward pass comes back to it."""
        self._is_in_block, self._in_block = False, 0


def _storage(tensor: Tensor) -> int:
    """Identity of what holds a tensor's values; on the meta device addresses are all 0."""
    return int(tensor.untyped_storage()._cdata)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of their values."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _first_tensor(value: Any) -> Tensor:
    """The first tensor in what a model gives."""
    return next(_tensors(value))


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in what a module takes or gives."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)
