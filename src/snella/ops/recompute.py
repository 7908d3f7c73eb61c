"""Inputs that are not kept but computed again: the outputs of normalizations and activations.

A linear layer keeps its input `x` for ∂L/∂W. Where `x = f(z)` is the output of a normalization or an activation,
autograd keeps `z` for the backward pass of `f` anyway, and keeping `x` as well is memory for nothing: `f` is run again
on `z` in the backward pass. The same operation on the same bits gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

ORIGIN_ATTRIBUTE = "_snella_origin"

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
    """How an output was computed: by which module, in which state. Holds no tensor of the forward pass."""

    def __init__(self, module: nn.Module, device_type: str) -> None:
        self._module = module
        self._state = self._current_state()
        self._autocast = (
            device_type,
            torch.get_autocast_dtype(device_type),
            torch.is_autocast_enabled(device_type),
        )
        self._users = 0
        self._output: Tensor | None = None

    def _current_state(self) -> tuple[Any, ...]:
        """What the module computes with besides its input."""
        module = self._module
        tensors = (*module._parameters.values(), *module._buffers.values())
        return (module.training, *[(id(tensor), tensor._version) for tensor in tensors if tensor is not None])

    def add_user(self) -> None:
        """Tell that one more backward pass will ask for the output."""
        self._users += 1

    def compute(self, z: Tensor) -> Tensor:
        """The output for the input `z`, without gradient; users after the first share what that one computed.

        Raises:
            RuntimeError: The module has changed since the forward pass.
        """
        output, self._output = self._output, None
        if output is None:
            if self._current_state() != self._state:
                raise RuntimeError(
                    f"{self._module} was changed between a forward pass and its backward pass, so that its output "
                    "cannot be computed again; change it after backward(), or set recompute_inputs=False"
                )
            device_type, dtype, is_enabled = self._autocast
            with torch.no_grad(), torch.autocast(device_type, dtype, enabled=is_enabled):
                output = type(self._module).forward(self._module, z)
        self._users -= 1
        if self._users > 0:
            self._output = output
        return output


@dataclass
class _Mark:
    """What a marked output carries while it is alive."""

    z: Tensor
    origin: Origin
    versions: tuple[int, int]


def mark_outputs(model: nn.Module) -> int:
    """Let every known normalization and activation of a model mark its outputs, and return how many there are.

    Marking costs one attribute of a tensor. A module that is marked already is left as it is.
    """
    count = 0
    for module in model.modules():
        if can_recompute(module):
            count += 1
            if _mark_output not in module._forward_hooks.values():
                module.register_forward_hook(_mark_output, prepend=True)  # before anybody changes the output
    return count


def unmark_outputs(model: nn.Module) -> None:
    """Undo `mark_outputs`."""
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if hook is _mark_output:
                del module._forward_hooks[key]


def _mark_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook: remember what the output was computed from, where it can be computed again to the same bits."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not torch.is_grad_enabled():
        return
    if len(args) != 1 or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
        return
    z = args[0]
    is_plain = (
        next(iter(module._forward_hooks.values())) is _mark_output
        and not module._forward_pre_hooks
        and not torch_module._global_forward_hooks
        and not torch_module._global_forward_pre_hooks
        and "forward" not in module.__dict__
    )
    is_running_statistics = isinstance(module, nn.modules.batchnorm._BatchNorm) and (
        module.training or module.running_mean is None
    )
    if not is_plain or is_running_statistics or type(z) is not Tensor or not output.requires_grad:
        return
    if z.is_inference() or z.untyped_storage()._cdata == output.untyped_storage()._cdata:
        return
    setattr(output, ORIGIN_ATTRIBUTE, _Mark(z, Origin(module, z.device.type), (z._version, output._version)))


def origin_of(x: Tensor) -> tuple[Tensor, Origin] | tuple[None, None]:
    """The tensor that a marked, unchanged output was computed from, and how; twice `None` for any other tensor.

    A view of an output, or one that was written to since, is another tensor.
    """
    mark: _Mark | None = getattr(x, ORIGIN_ATTRIBUTE, None)
    if mark is None or (mark.z._version, x._version) != mark.versions or not torch.is_grad_enabled():
        return None, None
    return mark.z.detach(), mark.origin


__all__ = ["Origin", "can_recompute", "mark_outputs", "origin_of", "unmark_outputs"]
