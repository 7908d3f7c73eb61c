"""Inputs that are not kept but computed again: the outputs of normalizations and activations.

A linear layer keeps its input `x` for ∂L/∂W. Where `x = f(z)` is the output of a normalization or an activation,
autograd keeps `z` for the backward pass of `f` anyway, and keeping `x` as well is memory for nothing: `f` is run again
on `z` in the backward pass. The same operation on the same bits gives the same bits.

Where asked for, `z` itself is kept in eight bits, for `f`'s own backward pass too: the forward pass stays exact, and
gradients become those at a `z` that is rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.modules import module as torch_module

from snella.ops.compression import Layout, decode, encode

ORIGIN_ATTRIBUTE = "_snella_origin"
_SOURCE_ATTRIBUTE = "_snella_source"

# each is deterministic and keeps its input for its own backward pass (ReLU and the like keep their output instead)
_TORCH = (
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Hardswish,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
)
_TIMM = {
    *("GELU", "GELUTanh", "QuickGELU"),
    *("LayerNorm", "LayerNorm2d", "LayerNormFp32", "LayerNorm2dFp32", "GroupNorm", "GroupNorm1"),
    *("RmsNorm", "RmsNorm2d", "RmsNormFp32", "RmsNorm2dFp32", "SimpleNorm", "SimpleNorm2d"),
}
_TRANSFORMERS = {
    *("GELUActivation", "NewGELUActivation", "FastGELUActivation", "GELUTanh", "PytorchGELUTanh"),
    *("QuickGELUActivation", "SiLUActivation", "MishActivation"),
}


def can_recompute(module: nn.Module) -> bool:
    """Whether the output of a module may be computed again instead of kept: a known class, by its exact type.

    GELU in all its forms, SiLU, Mish, Hardswish, layer, group and RMS normalization, batch normalization in evaluation;
    torch's, timm's and transformers' own classes.
    """
    kind = type(module)
    name, package = kind.__qualname__, kind.__module__
    return (
        kind in _TORCH
        or (package.startswith("timm.layers.") and name in _TIMM)
        or (package == "transformers.activations" and name in _TRANSFORMERS)
        or (package.startswith("transformers.models.") and name.endswith("RMSNorm"))
    )


class Origin:
    """How an output was computed: by which module, in which state. Holds no tensor of the forward pass.

    Args:
        module: The module.
        device_type: Of its input.
        layout: Of an input that is kept encoded, else `None`.
    """

    def __init__(self, module: nn.Module, device_type: str, layout: Layout | None = None) -> None:
        self._module = module
        self._state = self._current_state()
        self._autocast = (
            device_type,
            torch.get_autocast_dtype(device_type),
            torch.is_autocast_enabled(device_type),
        )
        self._layout = layout
        self._users = 0
        self._output: Tensor | None = None
        self._graph: tuple[Tensor, GradientEdge] | None = None

    def _current_state(self) -> tuple[Any, ...]:
        """What the module computes with besides its input."""
        module = self._module
        tensors = (*module._parameters.values(), *module._buffers.values())
        return (module.training, *[(id(tensor), tensor._version) for tensor in tensors if tensor is not None])

    def add_user(self) -> None:
        """Tell that one more backward pass will ask for the output."""
        self._users += 1

    def compute(self, kept: Tensor) -> Tensor:
        """The output, without gradient; users after the first share what that one computed.

        Args:
            kept: The input, encoded where there is a layout.

        Raises:
            RuntimeError: The module has changed since the forward pass.
        """
        output, self._output = self._output, None
        if output is None:
            z, output = self._run(kept)
            if self._layout is not None:
                self._graph = z, get_gradient_edge(output)
                output = output.detach()
        self._users -= 1
        if self._users > 0:
            self._output = output
        return output

    def grad_input(self, kept: Tensor, grad_output: Tensor) -> Tensor:
        """The gradient of an input that is kept encoded.

        Raises:
            RuntimeError: The module has changed since the forward pass.
        """
        graph, self._graph = self._graph, None
        if graph is None:
            z, output = self._run(kept)
            graph = z, get_gradient_edge(output)
        (grad,) = torch.autograd.grad(graph[1], graph[0], grad_output)
        return grad

    def _run(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """The module's input and output; with a layout, those of a graph."""
        if self._current_state() != self._state:
            raise RuntimeError(
                f"{self._module} was changed between a forward pass and its backward pass, so that its output "
                "cannot be computed again; change it after backward(), or set recompute_inputs=False"
            )
        device_type, dtype, is_enabled = self._autocast
        z = kept if self._layout is None else decode(kept, self._layout).requires_grad_()
        with (
            torch.set_grad_enabled(self._layout is not None),
            torch.autocast(device_type, dtype, enabled=is_enabled),
        ):
            return z, type(self._module).forward(self._module, z)


@dataclass
class _Mark:
    """What a marked output carries while it is alive: the input, or what it was encoded as."""

    z: Tensor
    origin: Origin
    versions: tuple[int, int]


class _EncodedInput(torch.autograd.Function):
    """A module's output, whose backward pass runs the module again on an input that was kept encoded."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, encoded: Tensor, origin: Origin, output: list[Tensor]) -> Tensor:
        ctx.save_for_backward(encoded)
        ctx.origin = origin
        return output.pop()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        (encoded,) = ctx.saved_tensors
        return ctx.origin.grad_input(encoded, grad_output), None, None, None


def mark_outputs(model: nn.Module, *, compress: bool = False) -> int:
    """Let every known normalization and activation of a model mark its outputs, and return how many there are.

    Marking costs one attribute of a tensor. A module that is marked already is left as it is.

    Args:
        model: The model.
        compress: Let them keep their inputs in eight bits too, see `snella.ops.compression`; those with trained
            parameters, and all under `torch.compile`, keep them as they are.
    """
    count = 0
    for module in model.modules():
        if can_recompute(module):
            count += 1
            if compress and _detach_input not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(_detach_input)
            if _mark_output not in module._forward_hooks.values():
                module.register_forward_hook(_mark_output, prepend=True)  # before anybody changes the output
    return count


def unmark_outputs(model: nn.Module) -> None:
    """Undo `mark_outputs`."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if hook in (_mark_output, _detach_input):
                    del hooks[key]


def _is_marked(module: nn.Module) -> bool:
    """Whether a marking module runs as it will be run again: untouched by other hooks, to an output of its own."""
    pre_hooks = list(module._forward_pre_hooks.values())
    is_plain = (
        next(iter(module._forward_hooks.values())) is _mark_output
        and pre_hooks in ([], [_detach_input])
        and not torch_module._global_forward_hooks
        and not torch_module._global_forward_pre_hooks
        and "forward" not in module.__dict__
    )
    is_running_statistics = isinstance(module, nn.modules.batchnorm._BatchNorm) and (
        module.training or module.running_mean is None
    )
    return is_plain and not is_running_statistics


def _is_recorded() -> bool:
    """Whether autograd, and nobody else, records what runs."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling() and not torch.jit.is_tracing()


def _detach_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Forward pre-hook: where the input is to be kept encoded, let the module itself keep nothing."""
    if not _is_recorded() or len(args) != 1 or type(args[0]) is not Tensor:
        return None
    z = args[0]
    if not (z.requires_grad and z.is_floating_point() and not z.is_inference() and _is_marked(module)):
        return None
    if getattr(module, "inplace", False) or any(parameter.requires_grad for parameter in module.parameters()):
        return None
    detached = z.detach()
    setattr(detached, _SOURCE_ATTRIBUTE, z)
    return (detached,)


def _mark_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
    """Forward hook: remember what the output was computed from, where it can be computed again to the same bits."""
    if not _is_recorded() or len(args) != 1 or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
        return None
    source: Tensor | None = getattr(args[0], _SOURCE_ATTRIBUTE, None)
    if source is not None:
        encoded, layout = encode(source)
        origin = Origin(module, source.device.type, layout)
        marked = cast(Tensor, _EncodedInput.apply(source, encoded, origin, [output]))
        setattr(marked, ORIGIN_ATTRIBUTE, _Mark(encoded, origin, (encoded._version, marked._version)))
        return marked
    z = args[0]
    if not _is_marked(module) or type(z) is not Tensor or not output.requires_grad:
        return None
    if z.is_inference() or z.untyped_storage()._cdata == output.untyped_storage()._cdata:
        return None
    setattr(output, ORIGIN_ATTRIBUTE, _Mark(z, Origin(module, z.device.type), (z._version, output._version)))
    return None


def origin_of(x: Tensor) -> tuple[Tensor, Origin] | tuple[None, None]:
    """The tensor that a marked, unchanged output was computed from, and how; twice `None` for any other tensor.

    A view of an output, or one that was written to since, is another tensor.
    """
    mark: _Mark | None = getattr(x, ORIGIN_ATTRIBUTE, None)
    if mark is None or (mark.z._version, x._version) != mark.versions or not torch.is_grad_enabled():
        return None, None
    return mark.z.detach(), mark.origin


__all__ = ["Origin", "can_recompute", "mark_outputs", "origin_of", "unmark_outputs"]
