"""Tensor marks: recipes for recomputing a tensor in the backward pass instead of saving it.

A linear layer needs its input `x` for ∂L/∂W. If `x = f(z)` and autograd saves `z` anyway, the backward pass can
recompute `x` bit-identically from `z`, and saving `x` would waste memory. The module `recompute` sets the marks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge

from snella.memory.compression import Layout, decode, encode

ORIGIN_ATTRIBUTE = "_snella_origin"


class Origin(ABC):
    """Recipe for recomputing a tensor from saved tensors.

    Args:
        device_type: Device type of the tensor.
    """

    is_rounded = False
    """True if the saved tensors are rounded to int8."""

    def __init__(self, device_type: str) -> None:
        self._autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        if torch.amp.is_autocast_available(device_type):
            is_enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
            self._autocast = partial(torch.autocast, device_type, dtype, enabled=is_enabled)
        self._users, self._graph_task_id = 0, torch._C._current_graph_task_id()
        self._output: Tensor | None = None

    def is_current(self) -> bool:
        """Return whether the inputs of the recomputation are unchanged."""
        return True

    def add_user(self) -> bool:
        """Register another backward pass that uses the tensor; return whether it is the first.

        A forward pass that activation checkpointing reruns does not count, because its backward pass is already
        registered.
        """
        if torch._C._current_graph_task_id() != self._graph_task_id:
            return False
        self._users += 1
        return self._users == 1

    def compute(self, saved: Sequence[Tensor]) -> Tensor:
        """Return the recomputed, detached tensor; all users share one result.

        Args:
            saved: Tensors from the forward pass, as in `Mark.saved`.

        Raises:
            RuntimeError: If a module has changed since the forward pass.
        """
        output, self._output = self._output, None
        if output is None:
            output = self._run(saved)
        self._users -= 1
        if self._users > 0:
            self._output = output
        return output

    @abstractmethod
    def _run(self, saved: Sequence[Tensor]) -> Tensor:
        """Recompute the tensor."""

    def _call(self, function: Callable[..., Tensor], *args: Tensor, with_graph: bool = False) -> Tensor:
        """Call a function with the autocast settings of the forward pass."""
        with torch.set_grad_enabled(with_graph), self._autocast():
            return function(*args)


class Output(Origin):
    """Output of a module or function, recomputed from its inputs, which are saved exactly or in int8.

    Args:
        function: Computes the output.
        device_type: Device type of the inputs.
        module: Module that computed the output, or `None` for a function. Recomputation uses the module's mode at
            construction, and raises an error if its parameters have changed.
        layouts: Layout of each encoded input that requires a gradient; `None` for all other inputs.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        device_type: str,
        *,
        module: nn.Module | None = None,
        layouts: Sequence[Layout | None] = (None,),
    ) -> None:
        super().__init__(device_type)
        self._function, self._module = function, module
        self._names = () if module is None else tuple(module_tensors(module))
        self._state, self._is_training = self._current_state(), module is not None and module.training
        self._layouts = layouts
        self.is_rounded = any(layout is not None for layout in layouts)
        self._graph: tuple[list[Tensor], GradientEdge] | None = None

    def is_current(self) -> bool:
        """Return whether the module's parameters and buffers are unchanged since the forward pass."""
        return self._current_state() == self._state

    def _current_state(self) -> tuple[Any, ...]:
        """Return the identities and versions of the module's tensors."""
        tensors = [getattr(self._module, name, None) for name in self._names]
        return tuple([(id(tensor), tensor._version) for tensor in tensors if tensor is not None])

    def _run(self, saved: Sequence[Tensor]) -> Tensor:
        if not self.is_rounded:
            return self._run_function(saved)
        inputs, output = self._record(saved)
        self._graph = inputs, get_gradient_edge(output)
        return output.detach()

    def grad_inputs(self, saved: Sequence[Tensor], grad_output: Tensor) -> Iterator[Tensor]:
        """Return the gradients of the encoded inputs.

        Raises:
            RuntimeError: If the module has changed since the forward pass.
        """
        graph, self._graph = self._graph, None
        if graph is None:
            inputs, output = self._record(saved)
            graph = inputs, get_gradient_edge(output)
        return iter(torch.autograd.grad(graph[1], graph[0], grad_output))

    def _record(self, saved: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Recompute the output with a graph; return the inputs that require a gradient, and the output."""
        pairs = list(zip(saved, self._layouts, strict=True))
        inputs = [tensor if layout is None else decode(tensor, layout).requires_grad_() for tensor, layout in pairs]
        differentiable = [z for z, layout in zip(inputs, self._layouts, strict=True) if layout is not None]
        return differentiable, self._run_function(inputs, with_graph=True)

    def _run_function(self, inputs: Sequence[Tensor], with_graph: bool = False) -> Tensor:
        if not self.is_current():
            raise RuntimeError(
                f"{self._module} was changed between a forward pass and its backward pass, so its output "
                "cannot be recomputed; change it after backward(), or set recompute_inputs=False"
            )
        module = self._module
        if module is None or module.training == self._is_training:
            return self._call(self._function, *inputs, with_graph=with_graph)
        module.training = self._is_training
        try:
            return self._call(self._function, *inputs, with_graph=with_graph)
        finally:
            module.training = not self._is_training


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's direct tensors by name, including FSDP1's parameters, which are attributes during a pass."""
    values = {**module.__dict__, **module._parameters, **module._buffers}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


class Derived(Origin):
    """Result of a function of a marked tensor and optionally a second tensor, which is saved last.

    Args:
        function: Function of one or two tensors.
        device_type: Device type of the result.
        source: Origin of the first tensor.
        has_second: True if the function takes a second tensor.
        layout: Layout of an encoded second tensor.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        device_type: str,
        source: Origin,
        *,
        has_second: bool = False,
        layout: Layout | None = None,
    ) -> None:
        super().__init__(device_type)
        self._function, self._source, self._has_second, self._layout = function, source, has_second, layout
        self.is_rounded = source.is_rounded

    def is_current(self) -> bool:
        """Return whether the inputs of the source's recomputation are unchanged."""
        return self._source.is_current()

    def add_user(self) -> bool:
        """Register another backward pass that uses the tensor; the first also uses the source."""
        is_first = super().add_user()
        if is_first:
            self._source.add_user()
        return is_first

    def _run(self, saved: Sequence[Tensor]) -> Tensor:
        source_saved, second = (saved[:-1], saved[-1:]) if self._has_second else (saved, ())
        first = self._source.compute(source_saved)
        return self._call(self._function, first, *[_decode_if_encoded(tensor, self._layout) for tensor in second])


def _decode_if_encoded(tensor: Tensor, layout: Layout | None) -> Tensor:
    """Return a saved tensor, decoded if it has a layout."""
    return tensor if layout is None else decode(tensor, layout)


@dataclass(frozen=True)
class Mark:
    """Mark of a tensor: the tensors to save instead, and the recipe to recompute it from them."""

    saved: tuple[Tensor, ...]
    origin: Origin
    versions: tuple[int, ...]

    @staticmethod
    def put(x: Tensor, saved: tuple[Tensor, ...], origin: Origin) -> Tensor:
        """Mark a tensor and return it."""
        setattr(x, ORIGIN_ATTRIBUTE, Mark(saved, origin, _versions(x, saved)))
        return x

    @staticmethod
    def on(x: object) -> Mark | None:
        """Return the mark of a tensor, or `None` if it has none or the mark is outdated by an in-place write."""
        mark: Mark | None = getattr(x, ORIGIN_ATTRIBUTE, None)
        if mark is None or not isinstance(x, Tensor) or _versions(x, mark.saved) != mark.versions:
            return None
        return mark

    def detached(self) -> tuple[Tensor, ...]:
        """Return the tensors to save, detached from the graph."""
        return tuple([tensor.detach() for tensor in self.saved])

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as `None`, so that pickled tensors have no mark."""
        return _no_mark, ()


def _no_mark() -> None:
    """Return `None`, the value of an unpickled mark."""


def _versions(x: Tensor, saved: tuple[Tensor, ...]) -> tuple[int, ...]:
    """Return the address of `x` and all version counters; writes through `x.data` remain undetected."""
    return (x.data_ptr(), x._version, *[tensor._version for tensor in saved])


def origin_of(x: Tensor) -> tuple[tuple[Tensor, ...], Origin | None]:
    """Return the tensors to save instead of a marked tensor, and its origin; `()` and `None` for unmarked tensors.

    Views of a marked tensor, and marked tensors after an in-place write, count as unmarked. So do outputs of a module
    after FSDP frees its parameters, because the backward pass cannot recompute them.
    """
    mark = Mark.on(x) if torch.is_grad_enabled() else None
    return ((), None) if mark is None or not mark.origin.is_current() else (mark.detached(), mark.origin)


def once_differentiable_with_hint(hint: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a backward pass to raise an error with a hint on double differentiation.

    torch's `once_differentiable` raises an error only if a gradient passes through, and silently drops other gradients.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        backward = once_differentiable(backward)

        @wraps(backward)
        def checked(ctx: Any, *grads: Any) -> Any:
            if torch.is_grad_enabled():
                raise RuntimeError(
                    f"create_graph=True is not supported: this backward pass is not differentiable; {hint}"
                )
            return backward(ctx, *grads)

        return checked

    return decorate


def save_rounded(
    inputs: Sequence[Tensor],
    output: Tensor,
    function: Callable[..., Tensor],
    module: nn.Module | None = None,
    *,
    by_row: bool = False,
) -> Tensor:
    """Mark an output and save its inputs in int8 for the backward pass; inputs that require no gradient stay exact.

    Args:
        inputs: Inputs of the function.
        output: Detached output of the function.
        function: Recomputes the output.
        module: See `Output`.
        by_row: See `encode`.
    """
    pairs = [encode(z, by_row=by_row) if z.requires_grad else (z.detach(), None) for z in inputs]
    saved, layouts = tuple([pair[0] for pair in pairs]), [pair[1] for pair in pairs]
    origin = Output(function, output.device.type, module=module, layouts=layouts)
    return Mark.put(cast(Tensor, _RoundedInputs.apply(origin, saved, [output], *inputs)), saved, origin)


def multiply(first: Tensor, mark: Mark, second: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return the marked product `first ⊙ second` of a marked first factor.

    Saves `second` and the source tensors of `first`. If the source tensors are in int8, so is a second factor that
    requires a gradient.

    Args:
        first: The first factor.
        mark: Mark of the first factor.
        second: Second factor, of the same shape or broadcast to it.
        product: Computes the product; the order of the factors determines the memory layout.
    """
    saved, source = mark.detached(), mark.origin
    layout, saved_second = None, second.detach()
    if source.is_rounded and second.requires_grad and second.shape == first.shape:
        saved_second, layout = encode(second)
    origin = Derived(product, first.device.type, source, has_second=True, layout=layout)
    if second.requires_grad:
        output = cast(Tensor, _Product.apply(first, second, source, layout, (*saved, saved_second), product))
    else:
        output = product(first, second)
    return Mark.put(output, (*saved, saved_second), origin)


class _RoundedInputs(torch.autograd.Function):
    """Output whose backward pass reruns the module or function on decoded inputs."""

    @staticmethod
    def forward(ctx: Any, origin: Output, saved: tuple[Tensor, ...], output: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*saved)
        ctx.origin = origin
        return output.pop()

    @staticmethod
    @once_differentiable_with_hint("set compress_activations=False")
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.origin.grad_inputs(ctx.saved_tensors, grad_output)
        return None, None, None, *[next(grads) if is_needed else None for is_needed in ctx.needs_input_grad[3:]]


class _Product(torch.autograd.Function):
    """Product whose backward pass recomputes the first factor; saves its source tensors and the second factor."""

    @staticmethod
    def forward(
        ctx: Any,
        first: Tensor,
        second: Tensor,
        origin: Origin,
        layout: Layout | None,
        saved: tuple[Tensor, ...],
        product: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        origin.add_user()
        ctx.save_for_backward(*saved)
        ctx.origin, ctx.layout, ctx.second_shape = origin, layout, second.shape
        return product(first, second)

    @staticmethod
    @once_differentiable_with_hint("set recompute_inputs=False")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        *first_saved, second = ctx.saved_tensors
        grad_second = (grad * ctx.origin.compute(first_saved)).sum_to_size(ctx.second_shape)
        return grad * _decode_if_encoded(second, ctx.layout), grad_second, None, None, None, None


__all__ = [
    "ORIGIN_ATTRIBUTE",
    "Derived",
    "Mark",
    "Origin",
    "Output",
    "module_tensors",
    "multiply",
    "once_differentiable_with_hint",
    "origin_of",
    "save_rounded",
]
