"""Origins: recomputation of tensors in the backward pass, and the int8 format of saved tensors.

A linear layer needs its input `x` for ∂L/∂W. If `x = f(z)` and autograd saves `z` anyway, the backward pass can
recompute `x` bit-identically from `z`. A `Mark` on `x` holds the tensors to save instead and the `Origin` that
recomputes `x` from them. The module `recompute` sets the marks.

With `compress_activations`, some of the saved tensors are encoded, i.e. stored as int8 codes with a scale per group of
entries. Decoding returns rounded values.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.functional import pad

GROUP = 64
"""Maximum number of entries that share a scale. An outlier degrades only the precision of the others in its group."""
ORIGIN_ATTRIBUTE = "_snella_origin"
"""Attribute of a tensor that contains its `Mark`."""
_LEVELS = 127  # largest int8 code


class Origin:
    """Recomputation of a tensor: `function(*saved)`, or `function(x, *saved)` with an `x` that `source` recomputes.

    Args:
        function: Computes the tensor.
        device_type: Device type of the tensor.
        module: Module whose parameters and buffers `function` reads. Recomputation raises an error if they change.
        source: Origin that recomputes the function's first argument, or `None` if this argument is saved.
        layouts: Layout of each saved argument, or `None` if it is saved exactly.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        device_type: str,
        *,
        module: nn.Module | None = None,
        source: Origin | None = None,
        layouts: Sequence[Layout | None] = (None,),
    ) -> None:
        self.function = function
        self.source = source
        self.layouts = layouts
        self.is_rounded: bool = bool(source and source.is_rounded) or any(layout is not None for layout in layouts)
        self._module = module
        self._state = self._module_state()
        self._autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        if torch.amp.is_autocast_available(device_type):
            is_enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
            self._autocast = partial(torch.autocast, device_type, dtype, enabled=is_enabled)
        self._users, self._graph_task_id = 0, torch._C._current_graph_task_id()
        self._output: Tensor | None = None  # result for the remaining users
        self._graph: Any = None  # decoded inputs and output edge of a recomputation, for `grad_inputs`

    def is_current(self) -> bool:
        """Return whether all modules, including the source's, are unchanged since the forward pass."""
        return self._module_state() == self._state and (self.source is None or self.source.is_current())

    def add_user(self) -> None:
        """Register another backward pass that will call `compute`.

        The first registration also registers a user of the source. A forward pass that activation checkpointing reruns
        does not count, because its backward pass is already registered.
        """
        if torch._C._current_graph_task_id() == self._graph_task_id:
            self._users += 1
            if self._users == 1 and self.source is not None:
                self.source.add_user()

    def compute(self, saved: Sequence[Tensor]) -> Tensor:
        """Return the recomputed tensor, detached. All users share one result.

        Args:
            saved: Tensors from the forward pass, as in `Mark.saved`: the source's, followed by the function's.

        Raises:
            RuntimeError: If a module has changed since the forward pass.
        """
        output = self._output
        self._output = None
        if output is None:
            output, self._graph = self._run(saved)
        self._users -= 1
        if self._users > 0:
            self._output = output
        return output

    def grad_inputs(self, saved: Sequence[Tensor], grad_output: Tensor) -> Iterator[Tensor]:
        """Return the gradients of the encoded arguments, evaluated at their decoded values.

        Uses the graph that `compute` has built, if there is one.
        """
        graph = self._graph
        self._graph = None
        inputs, edge = graph or self._run(saved)[1]
        return iter(torch.autograd.grad(edge, inputs, grad_output))

    def _run(self, saved: Sequence[Tensor]) -> tuple[Tensor, Any]:
        """Return the recomputed tensor and its graph, which is `None` unless there are encoded inputs and no source."""
        if self._module_state() != self._state:
            raise RuntimeError(
                f"{self._module} was changed between a forward pass and its backward pass, so its output "
                "cannot be recomputed; change it after backward()"
            )
        num_source_tensors = len(saved) - len(self.layouts)
        # compute the source before decoding the other arguments, to limit the peak memory
        args = [] if self.source is None else [self.source.compute(saved[:num_source_tensors])]
        pairs = zip(saved[num_source_tensors:], self.layouts, strict=True)
        args += [tensor if layout is None else decode(tensor, layout) for tensor, layout in pairs]
        inputs: list[Tensor] = []
        if self.source is None and self.is_rounded:
            inputs = [z.requires_grad_() for z, layout in zip(args, self.layouts, strict=True) if layout is not None]
        with torch.set_grad_enabled(bool(inputs)), self._autocast():
            output = self.function(*args)
        return output.detach(), (inputs, get_gradient_edge(output)) if inputs else None

    def _module_state(self) -> tuple[Any, ...]:
        """Return the identities and versions of the module's tensors."""
        tensors = () if self._module is None else module_tensors(self._module).values()
        return tuple([(id(tensor), tensor._version) for tensor in tensors])


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's own tensors by name, including attributes that replace parameters (`TokenAdapter`, FSDP1)."""
    parameters = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    values = {**module.__dict__, **parameters, **module._buffers}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class Mark:
    """Mark of a tensor: the tensors to save instead, and the origin that recomputes it from them.

    `versions` is the result of `_versions` when the tensor was marked, to detect later changes.
    """

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
        mark = getattr(x, ORIGIN_ATTRIBUTE, None)
        if not isinstance(mark, Mark) or not isinstance(x, Tensor) or _versions(x, mark.saved) != mark.versions:
            return None
        return mark

    def detached(self) -> tuple[Tensor, ...]:
        """Return the tensors to save, detached from the graph."""
        return tuple([tensor.detach() for tensor in self.saved])

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as an empty `OrderedDict`, which `torch.load` accepts, so that pickled tensors have no mark."""
        return OrderedDict, ()


def _versions(x: Tensor, saved: tuple[Tensor, ...]) -> tuple[int, ...]:
    """Return the address of `x` and all version counters. Writes through `x.data` remain undetected."""
    return (x.data_ptr(), x._version, *[tensor._version for tensor in saved])


def origin_of(x: Tensor) -> tuple[tuple[Tensor, ...], Origin | None]:
    """Return the tensors to save instead of a marked tensor, and its origin, or `((), None)` for an unmarked tensor.

    Untracked views of a marked tensor and marked tensors after an in-place write count as unmarked. So do all tensors
    if gradients are disabled, and the outputs of a module whose parameters have changed (e.g. because FSDP has freed
    them), since the backward pass cannot recompute these outputs.
    """
    mark = Mark.on(x) if torch.is_grad_enabled() else None
    return ((), None) if mark is None or not mark.origin.is_current() else (mark.detached(), mark.origin)


# operations that save encoded tensors or recompute them ------------------------------------------------------------


def reject_double_backward(hint: str) -> None:
    """Raise `RuntimeError` if the backward pass runs with `create_graph=True`. The message ends with `hint`.

    torch's `once_differentiable` raises an error only for gradients through the function and silently drops others.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"create_graph=True is not supported: this backward pass is not differentiable; {hint}")


def save_rounded(
    inputs: Sequence[Tensor],
    output: Tensor,
    function: Callable[..., Tensor],
    module: nn.Module | None = None,
    *,
    by_row: bool = False,
) -> Tensor:
    """Save the inputs of a function in int8 for the backward pass, and return the marked output.

    Inputs that require no gradient are saved exactly.

    Args:
        inputs: Inputs of the function.
        output: Detached output of the function.
        function: Computes the output from the inputs.
        module: See `Origin`.
        by_row: See `encode`.
    """
    saved_inputs = [encode(z, by_row=by_row) if z.requires_grad else (z.detach(), None) for z in inputs]
    saved = tuple([tensor for tensor, _ in saved_inputs])
    layouts = [layout for _, layout in saved_inputs]
    origin = Origin(function, output.device.type, module=module, layouts=layouts)
    return Mark.put(cast(Tensor, _RoundedInputs.apply(origin, saved, [output], *inputs)), saved, origin)


class _RoundedInputs(torch.autograd.Function):
    """Function that returns a precomputed output, and whose backward pass recomputes it from decoded inputs."""

    @staticmethod
    def forward(ctx: Any, origin: Origin, saved: tuple[Tensor, ...], output: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*saved)
        ctx.origin = origin
        return output.pop()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        reject_double_backward("set compress_activations=False")
        grads = ctx.origin.grad_inputs(ctx.saved_tensors, grad_output)
        input_grads = [next(grads) if is_needed else None for is_needed in ctx.needs_input_grad[3:]]
        return None, None, None, *input_grads


def multiply(first: Tensor, mark: Mark, second: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return the marked product `first ⊙ second`, where the first factor is marked.

    Saves `second` and the tensors from which `first` is recomputed. If any of these tensors is in int8, a second factor
    of the same shape that requires a gradient is also saved in int8.

    Args:
        first: The first factor.
        mark: Mark of the first factor.
        second: The second factor, of the same shape or broadcastable to it.
        product: Computes the product. The order of its factors determines the memory layout.
    """
    layout = None
    saved_second = second.detach()
    if mark.origin.is_rounded and second.requires_grad and second.shape == first.shape:
        saved_second, layout = encode(second)
    saved = (*mark.detached(), saved_second)
    origin = Origin(product, first.device.type, source=mark.origin, layouts=(layout,))
    if second.requires_grad:
        output = cast(Tensor, _Product.apply(first, second, origin, saved))
    else:
        output = product(first, second)
    return Mark.put(output, saved, origin)


class _Product(torch.autograd.Function):
    """Product of two factors, whose backward pass recomputes the first factor."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, origin: Origin, saved: tuple[Tensor, ...]) -> Tensor:
        ctx.source = origin.source
        (ctx.layout,) = origin.layouts
        ctx.second_shape = second.shape
        ctx.source.add_user()
        ctx.save_for_backward(*saved)
        return origin.function(first, second)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        reject_double_backward("set recompute_inputs=False")
        *first_saved, second = ctx.saved_tensors
        grad_second = (grad * ctx.source.compute(first_saved)).sum_to_size(ctx.second_shape)
        second = second if ctx.layout is None else decode(second, ctx.layout)
        return grad * second, grad_second, None, None


# int8 format -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Shape and memory layout of an encoded tensor.

    Args:
        shape: Shape with the axes in memory order.
        dtype: Dtype of the tensor.
        axes: Position of each axis in memory order.
        row: Number of entries per row. Groups do not cross rows.
        group: Number of entries per group, which share a scale.
    """

    shape: torch.Size
    dtype: torch.dtype
    axes: tuple[int, ...]
    row: int
    group: int


def encode(z: Tensor, *, by_row: bool = False) -> tuple[Tensor, Layout]:
    """Quantize a tensor to int8 in groups of entries that are adjacent in memory.

        q_i = round(z_i / s),   s = max |z| / 127 over the group of z_i;   |s·q_i − z_i| ≤ s/2 for s ≥ 2⁻¹²⁶

    Args:
        z: Floating-point tensor of any shape.
        by_row: If True, and the last axis is innermost in memory, split each row into groups of equal size, at most 64.
            Used for inputs of row-wise normalizations, where a shared scale could round a small row to zero.

    Returns:
        Float32 scales followed by codes, uint8 `[groups · (4 + group)]` (17/16 bytes per entry for groups of 64), and
        the layout for `decode`.
    """
    order = sorted(range(z.ndim), key=z.stride, reverse=True)
    z_in_memory_order = z.detach().permute(order)
    # by default, the whole tensor is one row
    row = max(z.numel(), 1)
    group = GROUP
    if by_row and order[-1:] == [z.ndim - 1] and z.shape[-1] > 0:
        row = z.shape[-1]
        groups_per_row = -(-row // GROUP)
        group = -(-row // groups_per_row)
    rows = z_in_memory_order.reshape(-1, row)
    padding = -row % group
    if padding and len(rows):
        rows = pad(rows, (0, padding))
    groups = rows.reshape(-1, group)
    encoded = torch.empty(groups.numel() + 4 * len(groups), dtype=torch.uint8, device=z.device)
    codes, scales = _parts(encoded, group)
    torch.div(groups.abs().amax(1, keepdim=True).float(), _LEVELS, out=scales)
    # the clamp avoids division by zero for groups of zeros
    codes.copy_((groups * scales.clamp(min=torch.finfo(torch.float32).tiny).reciprocal_()).round_())
    axes = tuple([order.index(axis) for axis in range(z.ndim)])
    return encoded, Layout(z_in_memory_order.shape, z.dtype, axes, row, group)


def decode(encoded: Tensor, layout: Layout) -> Tensor:
    """Decode the result of `encode` to the original shape and memory order, rounded to the original dtype."""
    codes, scales = _parts(encoded, layout.group)
    padding = -layout.row % layout.group
    rows = codes.float().mul_(scales).to(layout.dtype).view(-1, layout.row + padding)
    return rows[:, : layout.row].reshape(layout.shape).permute(layout.axes)


def _parts(encoded: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Return views of the codes `[groups, group]` and scales `[groups, 1]` of an encoded tensor."""
    # a group occupies 4 bytes for its float32 scale and one byte per code
    scales, codes = encoded.tensor_split([len(encoded) // (group + 4) * 4])
    return codes.view(torch.int8).view(-1, group), scales.view(torch.float32).view(-1, 1)


__all__ = [
    "GROUP",
    "ORIGIN_ATTRIBUTE",
    "Layout",
    "Mark",
    "Origin",
    "decode",
    "encode",
    "module_tensors",
    "multiply",
    "origin_of",
    "reject_double_backward",
    "save_rounded",
]
