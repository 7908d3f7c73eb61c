"""Recomputation of layer inputs that are outputs of normalizations and activations.

Forward hooks on supported modules mark each output with its origin, so that it can be recomputed. An adapted layer then
saves the module's input instead of its own. In supported blocks, a `TorchFunctionMode` tracks the operations between
the module and the layer: views and permutations (image windows), products (gated activations), and sums with a small
tensor (modulations).

With compression (`compress_activations`), the backward passes of the module and the layer use the module's input in
int8, and attention saves only its mask and, in int8, its queries, keys, and values. Outputs stay exact, but gradients
are computed at the rounded inputs.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from snella.memory.origins import Mark, Origin, module_tensors, multiply, save_rounded

_SOURCE_ATTRIBUTE = "_snella_source"
_MIN_SIZE_RATIO = 8  # minimum size of a sum relative to the summand that must be saved to recompute it
_c_autograd: Any = torch._C._autograd

# deterministic modules that save their input for the backward pass (unlike ReLU, which saves its output)
_TORCH_CLASSES = (
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
_TIMM_CLASSES = {
    *("GELU", "GELUTanh", "QuickGELU"),
    *("LayerNorm", "LayerNorm2d", "LayerNormFp32", "LayerNorm2dFp32", "GroupNorm", "GroupNorm1"),
    *("RmsNorm", "RmsNorm2d", "RmsNormFp32", "RmsNorm2dFp32", "SimpleNorm", "SimpleNorm2d"),
}
_TRANSFORMERS_CLASSES = {
    *("GELUActivation", "NewGELUActivation", "FastGELUActivation", "GELUTanh", "PytorchGELUTanh"),
    *("QuickGELUActivation", "SiLUActivation", "MishActivation"),
}
# normalizations over the last axis, whose inputs are encoded by row
_ROW_NORMS = ("LayerNorm", "LayerNormFp32", "RMSNorm", "RmsNorm", "RmsNormFp32", "SimpleNorm")
# blocks that partition, multiply, or shift an output before it reaches a layer
_TRACKED_TIMM = {
    "timm.layers.mlp.GluMlp",
    "timm.layers.mlp.SwiGLU",
    "timm.models.swin_transformer.SwinTransformerBlock",
    "timm.models.vision_transformer_sam.Block",
}
_TRACKED_TRANSFORMERS = ("MLP", "FFN", "SwinLayer", "SamVisionLayer", "VitDetLayer")
_TRACKED_DIFFUSERS = ("TransformerBlock", "GELU", "GEGLU", "SwiGLU", "AdaLayerNormZero", "AdaLayerNormZeroX")


def can_recompute(module: nn.Module) -> bool:
    """Return whether a module's output can be recomputed instead of saved.

    The following classes are supported, but not their subclasses: torch's GELU, SiLU, Mish, Hardswish, layer, RMS, and
    group normalization, and batch normalization in evaluation mode (checked at run time); timm's GELUs and layer, RMS,
    group, and simple normalizations; transformers' RMS normalizations and most of its GELU, SiLU, and Mish activations.
    """
    cls = type(module)
    name, package = cls.__qualname__, cls.__module__
    return (
        cls in _TORCH_CLASSES
        or (package.startswith("timm.layers.") and name in _TIMM_CLASSES)
        or (package == "transformers.activations" and name in _TRANSFORMERS_CLASSES)
        or (package.startswith("transformers.models.") and name.endswith("RMSNorm"))
    )


def can_track(module: nn.Module, *, compress: bool) -> bool:
    """Return whether to track the operations in a module's forward pass.

    Tracking saves memory in blocks of Swin, ViTDet, and SAM's encoder, timm's gated MLPs, transformers' MLPs, and
    diffusers' transformer blocks, modulations, and activations. With `compress`, it also saves memory in attention
    modules of timm and transformers.
    """
    cls = type(module)
    name, package = cls.__qualname__, cls.__module__
    if compress and name.endswith("Attention") and package.startswith(("timm.", "transformers.models.")):
        return True
    return (
        f"{package}.{name}" in _TRACKED_TIMM
        or (package.startswith("transformers.models.") and name.endswith(_TRACKED_TRANSFORMERS))
        or (package.startswith("diffusers.models.") and name.endswith(_TRACKED_DIFFUSERS))
    )


def mark_outputs(model: nn.Module, *, compress: Callable[[], bool] | None = None) -> int:
    """Install hooks that mark the outputs of supported normalizations and activations.

    The hooks of an earlier call are replaced. Marking adds one attribute to each output. Tracking adds one Python call
    for each call of a torch function in supported blocks.

    Args:
        model: The model.
        compress: Function that is called in each forward pass and returns whether these modules and attention save
            their inputs in int8 (see `snella.memory.origins.encode`). Modules with trainable parameters, pre-hooks of
            other code, or backward hooks, and all modules under `torch.compile`, save exact inputs. `None` disables
            compression.

    Returns:
        Number of modules whose outputs can be marked.
    """
    unmark_outputs(model)
    num_marked = 0
    for module in model.modules():
        if can_track(module, compress=compress is not None):
            module.register_forward_pre_hook(partial(_start_tracking, compress=compress))
            module.register_forward_hook(_stop_tracking, always_call=True)
        if can_recompute(module):
            num_marked += 1
            if compress is not None:
                module.register_forward_pre_hook(partial(_detach_input, compress=compress))
            module.register_forward_hook(_mark_output, prepend=True)  # before other hooks change the output
    return num_marked


def unmark_outputs(model: nn.Module) -> None:
    """Undo `mark_outputs`."""
    installed = (_mark_output, _detach_input, _start_tracking, _stop_tracking)
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if getattr(hook, "func", hook) in installed:
                    del hooks[key]
                    module._forward_hooks_always_called.pop(key, None)


# hooks of normalizations and activations ---------------------------------------------------------------------------


def _is_recorded() -> bool:
    """Return whether autograd records the forward pass and no compiler or tracer does."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling() and not torch.jit.is_tracing()


def _is_reproducible(module: nn.Module) -> bool:
    """Return whether a module's output can be recomputed in its present state.

    Backward hooks, global hooks, pre-hooks other than `_detach_input`, forward hooks that run before `_mark_output`, a
    replaced `forward`, and batch statistics prevent this. Later forward hooks do not, because an output that they
    change loses its mark.
    """
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
        return False
    return (
        next(iter(module._forward_hooks.values())) is _mark_output
        and all(getattr(hook, "func", hook) is _detach_input for hook in module._forward_pre_hooks.values())
        and not module._backward_hooks  # they need the gradient of the module's input
        and not module._backward_pre_hooks
        and not torch_module._global_forward_hooks
        and not torch_module._global_forward_pre_hooks
        and not torch_module._global_backward_hooks
        and not torch_module._global_backward_pre_hooks
        and "forward" not in module.__dict__
    )


def _detach_input(module: nn.Module, args: tuple[Any, ...], *, compress: Callable[[], bool]) -> tuple[Tensor] | None:
    """Forward pre-hook that detaches an input that will be saved in int8, so that the module itself saves nothing.

    Returns `None`, which keeps the input, if the input will not be saved in int8.
    """
    if not _is_recorded() or len(args) != 1 or type(args[0]) is not Tensor:
        return None
    z = args[0]
    if not (z.requires_grad and z.is_floating_point() and not z.is_inference() and _is_reproducible(module)):
        return None
    if hasattr(type(z.grad_fn), "_saved_result"):
        return None  # the preceding operation, e.g. ReLU, saves this tensor anyway
    if getattr(module, "inplace", False) or any([tensor.requires_grad for tensor in module_tensors(module).values()]):
        return None
    if not compress():
        return None
    detached = z.detach()
    setattr(detached, _SOURCE_ATTRIBUTE, z)
    return (detached,)


def _mark_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
    """Forward hook that marks an output that can be recomputed.

    Returns a new output if `_detach_input` has detached the input, and otherwise `None`, which keeps the output.
    """
    if not _is_recorded() or len(args) != 1 or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
        return None
    z = args[0]
    run = partial(_run_module, module, module.training)
    source: Tensor | None = getattr(z, _SOURCE_ATTRIBUTE, None)
    if source is not None:
        return save_rounded([source], output, run, module, by_row=type(module).__name__.endswith(_ROW_NORMS))
    if not _is_reproducible(module) or type(z) is not Tensor or not output.requires_grad or z.is_inference():
        return None
    # an output that shares the memory of `z`, e.g. of an in-place activation, may have overwritten it
    if z.untyped_storage()._cdata != output.untyped_storage()._cdata:
        Mark.put(output, (z,), Origin(run, z.device.type, module=module))
    return None


def _run_module(module: nn.Module, is_training: bool, z: Tensor) -> Tensor:
    """Run a module's `forward`, without hooks, in the mode of the original forward pass."""
    mode = module.training
    module.training = is_training
    try:
        output: Tensor = type(module).forward(module, z)
        return output
    finally:
        module.training = mode


# tracking inside blocks --------------------------------------------------------------------------------------------

_active = threading.local()  # `mode` is the thread's active `_TrackingMode`, if any


def _start_tracking(module: nn.Module, args: tuple[Any, ...], *, compress: Callable[[], bool] | None) -> None:
    """Forward pre-hook that starts tracking, unless an outer block is tracked."""
    if not _is_recorded() or _active_mode() is not None:
        return
    is_compressed = compress is not None and compress()
    if can_track(module, compress=is_compressed):
        _active.mode = _TrackingMode(module, is_compressed, sys._getframe(1), getattr(_active, "mode", None))
        _active.mode.__enter__()


def _stop_tracking(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook that stops tracking, even if the block raised an `Exception`."""
    if torch.compiler.is_compiling():
        return
    mode: _TrackingMode | None = getattr(_active, "mode", None)
    if mode is not None and mode.module is module:
        _active.mode = mode.outer
        if _get_current_function_mode() is mode:
            mode.__exit__(None, None, None)


def _active_mode() -> _TrackingMode | None:
    """Return the thread's active mode if its block is still running with the same saved-tensor hooks, or `None`.

    Forgets the mode of a block that has ended.
    """
    mode: _TrackingMode | None = getattr(_active, "mode", None)
    if mode is not None and not mode.is_running():
        mode = _active.mode = None
    return mode if mode is not None and mode.has_original_hooks() else None


class _TrackingMode(TorchFunctionMode):
    """Function mode that marks the results of supported functions on marked tensors.

    Args:
        module: The block in which the mode is active.
        compress: True if attention and functional activations save their inputs in int8.
        caller: Frame that runs the block.
        outer: The previously active mode, if any.
    """

    def __init__(self, module: nn.Module, compress: bool, caller: FrameType, outer: _TrackingMode | None) -> None:
        super().__init__()
        self.module = module
        self.compress = compress
        self.outer = outer
        self._caller = caller
        self._hooks = _saved_tensors_hooks()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function, and mark its output if a handler supports the call."""
        kwargs = kwargs or {}
        output = None
        handler = None if torch.compiler.is_compiling() else _HANDLERS.get(func)
        if handler is not None and args and torch.is_grad_enabled() and self is _active_mode():
            output = handler(func, args, kwargs, self.compress)
        return func(*args, **kwargs) if output is None else output

    def is_running(self) -> bool:
        """Return whether the block is still running.

        The mode can outlive the block, because a `KeyboardInterrupt` skips the hook that ends tracking.
        """
        try:
            self._caller.clear()  # raises an error for a running frame
        except RuntimeError:
            return True
        return False

    def has_original_hooks(self) -> bool:
        """Return whether the saved-tensor hooks are the same as at the start of the block.

        Activation checkpointing inside the block sets its own hooks and recomputes its region without this mode.
        """
        return _saved_tensors_hooks() == self._hooks


def _saved_tensors_hooks() -> Any:
    """Return the active saved-tensor hooks."""
    return _c_autograd._top_saved_tensors_default_hooks(False)


# handlers of functions: each returns `None` if it does not apply, and `_TrackingMode` then calls the original function


def _activate(
    function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], compress: bool
) -> Tensor | None:
    """Return the marked output of an activation."""
    z, *rest = args
    if type(z) is not Tensor or not z.requires_grad or z.is_inference() or True in (*rest, *kwargs.values()):
        return None  # of the options, only `inplace` can be True

    def run(z: Tensor) -> Tensor:
        return function(z, *rest, **kwargs)

    if compress:
        return save_rounded([z], run(z.detach()), run)
    return Mark.put(run(z), (z,), Origin(run, z.device.type))


def _attend(
    function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], compress: bool
) -> Tensor | None:
    """Return the marked output of attention, whose queries, keys, and values are saved in int8."""
    if not compress or len(args) < 3 or not _c_autograd._saved_tensors_hooks_is_enabled():
        return None
    query, key, value, *rest = args
    options = dict(zip(("attn_mask", "dropout_p", "is_causal"), rest, strict=False)) | kwargs
    mask = options.pop("attn_mask", None)
    inputs = [query, key, value, *([] if mask is None else [mask])]
    if options.get("dropout_p") or any(type(z) is not Tensor or z.is_inference() for z in inputs):
        return None
    if not query.requires_grad or (mask is not None and mask.requires_grad):
        return None

    def run(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        return function(query, key, value, mask, **options)

    # save nothing, but leave autograd enabled, because without a graph, torch may choose a different attention kernel
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda saved: saved):
        output = run(*[z.detach().requires_grad_(z.requires_grad) for z in inputs])
    return save_rounded(inputs, output.detach(), run)


def _move(
    function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], compress: bool
) -> Tensor | None:
    """Return a marked view or permutation of a marked tensor."""
    x, *rest = args
    mark = Mark.on(x)
    return None if mark is None else _derive(x, mark, lambda x: function(x, *rest, **kwargs))


def _derive(x: Tensor, mark: Mark, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the marked result of a function of a marked tensor."""
    output = function(x)
    if output is x:
        return x
    return Mark.put(output, mark.saved, Origin(function, x.device.type, source=mark.origin, layouts=()))


def _combine(
    function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], compress: bool
) -> Tensor | None:
    """Return the marked product or sum of a marked tensor and a number or a second tensor.

    Autograd saves the other factor of a product anyway. It saves nothing for a sum, so marking a sum saves memory only
    if the other summand is small.
    """
    if len(args) != 2 or kwargs:
        return None
    is_swapped = Mark.on(args[0]) is None
    x, other = args[::-1] if is_swapped else args
    mark = Mark.on(x)
    if mark is None:
        return None

    def run(x: Tensor, other: Any) -> Tensor:
        return function(other, x) if is_swapped else function(x, other)

    if isinstance(other, int | float):
        return _derive(x, mark, partial(run, other=other))
    if type(other) is not Tensor or (other.dtype, other.device) != (x.dtype, x.device) or other.is_inference():
        return None
    axes = zip(reversed(other.shape), reversed(x.shape), strict=False)
    if other.ndim > x.ndim or any(size not in (1, target_size) for size, target_size in axes):
        return None
    if function in _PRODUCTS:
        return multiply(x, mark, other, run)
    if _MIN_SIZE_RATIO * other.numel() > x.numel():
        return None
    # a copy, because the summand may be modified in place later
    saved = (*mark.saved, other.detach().clone())
    return Mark.put(run(x, other), saved, Origin(run, x.device.type, source=mark.origin))


_PRODUCTS = {torch.mul, Tensor.mul, Tensor.__rmul__}
_HANDLERS: dict[Any, Callable[[Any, tuple[Any, ...], dict[str, Any], bool], Tensor | None]] = {
    F.scaled_dot_product_attention: _attend,
    **dict.fromkeys((F.gelu, F.silu), _activate),
    **dict.fromkeys((torch.roll, torch.reshape, torch.permute, torch.transpose, torch.flatten, F.pad), _move),
    **dict.fromkeys((Tensor.roll, Tensor.view, Tensor.reshape, Tensor.permute, Tensor.transpose), _move),
    **dict.fromkeys((Tensor.contiguous, Tensor.flatten, Tensor.unflatten), _move),
    **dict.fromkeys((*_PRODUCTS, torch.add, Tensor.add, Tensor.__radd__), _combine),
}

__all__ = ["can_recompute", "can_track", "mark_outputs", "unmark_outputs"]
