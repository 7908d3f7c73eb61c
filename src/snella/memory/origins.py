"""How a tensor was computed, told by a mark that it carries, so that it can be computed again instead of being kept.

A linear layer needs its input `x` for ∂L/∂W. Where `x = f(z)` and autograd keeps `z` anyway, keeping `x` as well is
memory for nothing: the same operation on the same bits gives the same bits. `recompute` puts the marks.
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
    """How a tensor is computed again from what is kept in its place.

    Args:
        device_type: Of the tensor.
    """

    is_rounded = False
    """Whether what is kept was rounded to eight bits."""

    def __init__(self, device_type: str) -> None:
        self._autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        if torch.amp.is_autocast_available(device_type):
            is_enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
            self._autocast = partial(torch.autocast, device_type, dtype, enabled=is_enabled)
        self._users, self._task = 0, torch._C._current_graph_task_id()
        self._output: Tensor | None = None

    def is_current(self) -> bool:
        """Return whether the inputs of the recomputation are unchanged."""
        return True

    def add_user(self) -> bool:
        """Tell that one more backward pass will ask for the tensor; whether it is the first one.

        Activation checkpointing runs a part of a model again, whose backward pass is the one that was told of already.
        """
        if torch._C._current_graph_task_id() != self._task:
            return False
        self._users += 1
        return self._users == 1

    def compute(self, kept: Sequence[Tensor]) -> Tensor:
        """The tensor, without gradient; users after the first share what that one computed.

        Args:
            kept: What was kept in its place.

        Raises:
            RuntimeError: A module has changed since the forward pass.
        """
        output, self._output = self._output, None
        if output is None:
            output = self._run(kept)
        self._users -= 1
        if self._users > 0:
            self._output = output
        return output

    @abstractmethod
    def _run(self, kept: Sequence[Tensor]) -> Tensor:
        """Compute it."""

    def _call(self, function: Callable[..., Tensor], *args: Tensor, with_graph: bool = False) -> Tensor:
        """Call a function under the forward pass's autocast."""
        with torch.set_grad_enabled(with_graph), self._autocast():
            return function(*args)


class Output(Origin):
    """The output of a module or a function from inputs that are kept, as they are or in eight bits.

    Args:
        function: Gives the output.
        device_type: Of the inputs.
        module: Whose output it is, in the mode and with the parameters that it has now; `None` for a function.
        layouts: Of each input that asks for a gradient and is kept encoded, else `None`.
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
        self._names = () if module is None else tuple(own_tensors(module))
        self._state, self._is_training = self._current_state(), module is not None and module.training
        self._layouts = layouts
        self.is_rounded = any(layout is not None for layout in layouts)
        self._graph: tuple[list[Tensor], GradientEdge] | None = None

    def is_current(self) -> bool:
        """Whether the module's parameters and buffers are those of the forward pass, with the same values."""
        return self._current_state() == self._state

    def _current_state(self) -> tuple[Any, ...]:
        """Identity and version of the tensors that the module computes with besides its input."""
        tensors = [getattr(self._module, name, None) for name in self._names]
        return tuple([(id(tensor), tensor._version) for tensor in tensors if tensor is not None])

    def _run(self, kept: Sequence[Tensor]) -> Tensor:
        if not self.is_rounded:
            return self._run_function(kept)
        inputs, output = self._record(kept)
        self._graph = inputs, get_gradient_edge(output)
        return output.detach()

    def grad_inputs(self, kept: Sequence[Tensor], grad_output: Tensor) -> Iterator[Tensor]:
        """The gradients of inputs that were kept encoded, of those that ask for one.

        Raises:
            RuntimeError: The module has changed since the forward pass.
        """
        graph, self._graph = self._graph, None
        if graph is None:
            inputs, output = self._record(kept)
            graph = inputs, get_gradient_edge(output)
        return iter(torch.autograd.grad(graph[1], graph[0], grad_output))

    def _record(self, kept: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """The inputs that ask for a gradient, and the output, of a graph."""
        pairs = list(zip(kept, self._layouts, strict=True))
        inputs = [one if layout is None else decode(one, layout).requires_grad_() for one, layout in pairs]
        learning = [z for z, layout in zip(inputs, self._layouts, strict=True) if layout is not None]
        return learning, self._run_function(inputs, with_graph=True)

    def _run_function(self, inputs: Sequence[Tensor], with_graph: bool = False) -> Tensor:
        if not self.is_current():
            raise RuntimeError(
                f"{self._module} was changed between a forward pass and its backward pass, so that its output "
                "cannot be computed again; change it after backward(), or set recompute_inputs=False"
            )
        module = self._module
        if module is None or module.training == self._is_training:
            return self._call(self._function, *inputs, with_graph=with_graph)
        module.training = self._is_training
        try:
            return self._call(self._function, *inputs, with_graph=with_graph)
        finally:
            module.training = not self._is_training


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module itself by name; FSDP1 makes its parameters plain attributes for a pass."""
    values = {**module.__dict__, **module._parameters, **module._buffers}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


class Derived(Origin):
    """What a function made of a marked tensor, and perhaps of a second one, which is kept behind what the first needs.

    Args:
        function: Of one or two tensors.
        device_type: Of the result.
        source: How the first is computed.
        has_second: Whether there is a second one.
        layout: Of a second one that is kept encoded.
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
        """Whether the first can be computed."""
        return self._source.is_current()

    def add_user(self) -> bool:
        """Tell that one more backward pass will ask for the tensor; the first of them uses the source."""
        is_first = super().add_user()
        if is_first:
            self._source.add_user()
        return is_first

    def _run(self, kept: Sequence[Tensor]) -> Tensor:
        of_first, second = (kept[:-1], kept[-1:]) if self._has_second else (kept, ())
        first = self._source.compute(of_first)
        return self._call(self._function, first, *[_decoded(one, self._layout) for one in second])


def _decoded(tensor: Tensor, layout: Layout | None) -> Tensor:
    """A tensor that was kept as it is or, with a layout, encoded."""
    return tensor if layout is None else decode(tensor, layout)


@dataclass(frozen=True)
class Mark:
    """What a tensor carries while it is alive: what may be kept in its place, and how it is computed from that."""

    kept: tuple[Tensor, ...]
    origin: Origin
    versions: tuple[int, ...]

    @staticmethod
    def put(x: Tensor, kept: tuple[Tensor, ...], origin: Origin) -> Tensor:
        """Mark a tensor, and return it."""
        setattr(x, ORIGIN_ATTRIBUTE, Mark(kept, origin, _versions(x, kept)))
        return x

    @staticmethod
    def on(x: object) -> Mark | None:
        """The mark of a tensor; `None` where there is none, or something was written to since."""
        mark: Mark | None = getattr(x, ORIGIN_ATTRIBUTE, None)
        if mark is None or not isinstance(x, Tensor) or _versions(x, mark.kept) != mark.versions:
            return None
        return mark

    def detached(self) -> tuple[Tensor, ...]:
        """What is kept, apart from the graph."""
        return tuple([tensor.detach() for tensor in self.kept])

    def __reduce__(self) -> tuple[Any, ...]:
        """Nothing of it is stored with a tensor."""
        return _no_mark, ()


def _no_mark() -> None:
    """What a stored mark is loaded as."""


def _versions(x: Tensor, kept: tuple[Tensor, ...]) -> tuple[int, ...]:
    """How often each was written to, and where the first lies; a write through `x.data` leaves no trace."""
    return (x.data_ptr(), x._version, *[tensor._version for tensor in kept])


def origin_of(x: Tensor) -> tuple[tuple[Tensor, ...], Origin | None]:
    """What may be kept in the place of a marked tensor, and how it is computed from that; `()` and `None` for others.

    A view of a marked tensor that nobody marked, or one that was written to since, is another tensor. The parameters of
    a module that FSDP has freed by now cannot be relied on in the backward pass.
    """
    mark = Mark.on(x) if torch.is_grad_enabled() else None
    return ((), None) if mark is None or not mark.origin.is_current() else (mark.detached(), mark.origin)


def once(hint: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A backward pass that is not differentiable itself, and says so, and what to set, where that is asked for.

    torch's `once_differentiable` says it only where a gradient passes through, and is silent where it is lost.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        backward = once_differentiable(backward)

        @wraps(backward)
        def checked(ctx: Any, *grads: Any) -> Any:
            if torch.is_grad_enabled():
                raise RuntimeError(f"create_graph=True: a backward pass here is not differentiable itself; {hint}")
            return backward(ctx, *grads)

        return checked

    return decorate


def keep_rounded(
    inputs: Sequence[Tensor],
    output: Tensor,
    function: Callable[..., Tensor],
    module: nn.Module | None = None,
    *,
    by_row: bool = False,
) -> Tensor:
    """A marked output whose backward pass keeps its inputs in eight bits; those without a gradient as they are.

    Args:
        inputs: What it was computed from.
        output: Without gradient.
        function: Computes it again.
        module: As `Output` takes it.
        by_row: As `encode` takes it.
    """
    pairs = [encode(z, by_row=by_row) if z.requires_grad else (z.detach(), None) for z in inputs]
    kept, layouts = tuple([pair[0] for pair in pairs]), [pair[1] for pair in pairs]
    origin = Output(function, output.device.type, module=module, layouts=layouts)
    return Mark.put(cast(Tensor, _RoundedInputs.apply(origin, kept, [output], *inputs)), kept, origin)


def multiply(first: Tensor, mark: Mark, second: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`first ⊙ second`, marked, of a marked first factor: kept are what that is computed from, and the second.

    A second factor whose gradient is asked for is kept in eight bits where the first is computed from such.

    Args:
        first: The first factor.
        mark: Its mark.
        second: Of the same shape, or broadcast to it.
        product: Computes it; the order of its factors decides how a product lies in memory.
    """
    kept, source = mark.detached(), mark.origin
    layout, other = None, second.detach()
    if source.is_rounded and second.requires_grad and second.shape == first.shape:
        other, layout = encode(second)
    origin = Derived(product, first.device.type, source, has_second=True, layout=layout)
    if second.requires_grad:
        output = cast(Tensor, _Product.apply(first, second, source, layout, (*kept, other), product))
    else:
        output = product(first, second)
    return Mark.put(output, (*kept, other), origin)


class _RoundedInputs(torch.autograd.Function):
    """An output, whose backward pass runs the module or function again on inputs that were kept encoded."""

    @staticmethod
    def forward(ctx: Any, origin: Output, kept: tuple[Tensor, ...], output: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*kept)
        ctx.origin = origin
        return output.pop()

    @staticmethod
    @once("compress_activations=False keeps activations as they are")
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.origin.grad_inputs(ctx.saved_tensors, grad_output)
        return None, None, None, *[next(grads) if is_needed else None for is_needed in ctx.needs_input_grad[3:]]


class _Product(torch.autograd.Function):
    """A product whose first factor is computed again by `origin`; `kept` is what it needs, and the second factor."""

    @staticmethod
    def forward(
        ctx: Any,
        first: Tensor,
        second: Tensor,
        origin: Origin,
        layout: Layout | None,
        kept: tuple[Tensor, ...],
        product: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        origin.add_user()
        ctx.save_for_backward(*kept)
        ctx.origin, ctx.layout, ctx.second_shape = origin, layout, second.shape
        return product(first, second)

    @staticmethod
    @once("recompute_inputs=False leaves products to autograd")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        *of_first, second = ctx.saved_tensors
        grad_second = (grad * ctx.origin.compute(of_first)).sum_to_size(ctx.second_shape)
        return grad * _decoded(second, ctx.layout), grad_second, None, None, None, None


__all__ = [
    "ORIGIN_ATTRIBUTE",
    "Derived",
    "Mark",
    "Origin",
    "Output",
    "keep_rounded",
    "multiply",
    "once",
    "origin_of",
    "own_tensors",
]
