"""Benchmark baselines: functions that adapt a timm model with one method.

An adapter adds a trainable update to the weights of a layer. SNELLA's update `S` keeps only the largest entries of a
dense matrix `ΔW`, and the sparsity is the fraction of entries that are set to zero.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from peft import LoraConfig, ShiraConfig, get_peft_model
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.checkpoint import checkpoint

from snella.config import SnellaConfig
from snella.layer import SnellaLayer
from snella.memory.origins import Mark, Origin
from snella.memory.recompute import can_recompute, mark_outputs
from snella.sparsify import quantile_threshold, sparsify
from snella_app.methods.registry import build_method

REFERENCE = "lora"
"""Baseline whose step time is the denominator of the reported ratios."""

_QUANTILE_LIMIT = 2**24  # maximum number of entries that torch.quantile accepts


class UnfusedLayer(nn.Module):
    """Unfused reference: separate products for the base layer and a checkpointed update.

        y = x W0ᵀ + bias + scaling·x Sᵀ,   S = sparsify(ΔW, quantile(|ΔW|, sparsity))

    `torch.utils.checkpoint` recomputes `ΔW` and all intermediate results of the update in the backward pass, so the
    threshold is computed twice.

    Args:
        layer: An adapted linear layer, whose parameters are shared.
    """

    def __init__(self, layer: SnellaLayer) -> None:
        super().__init__()
        self.layer = layer
        layer.is_applied = True  # only parts of the layer are called, which does not mark the layer as applied

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Add the outputs of both branches for `x` `[…, n]`."""
        return self.layer.base_layer(x, *args, **kwargs) + checkpoint(self._branch, x, use_reentrant=False)

    def _branch(self, x: Tensor) -> Tensor:
        """Multiply the input by the update."""
        spec, factors, budgets, _ = self.layer.get_update("default")
        sparse_matrices = []
        for matrix, budget in zip(spec.matrices(factors), budgets, strict=True):
            delta = spec.merge_matrix(matrix)
            sparsity = 1 - budget / delta.numel()
            magnitudes = delta.detach().abs().flatten()
            is_small = delta.numel() <= _QUANTILE_LIMIT
            # torch.quantile where possible, as in the authors' code, although quantile_threshold is faster
            threshold = torch.quantile(magnitudes, sparsity) if is_small else quantile_threshold(delta, sparsity)
            sparse_matrices.append(sparsify(delta, threshold, spec.mode))
        return spec.scaling * F.linear(x, torch.cat(sparse_matrices).to(x.dtype))


def _use_unfused_reference(model: nn.Module) -> nn.Module:
    """Replace every adapted linear layer of `model` with an `UnfusedLayer`, in place.

    Raises:
        TypeError: If an adapted layer is not linear.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, SnellaLayer):
            if not isinstance(module.get_base_layer(), nn.Linear):
                raise TypeError(f"adapted layers must be linear, got {type(module).__name__} at {name!r}")
            model.set_submodule(name, UnfusedLayer(module))
    return model


@dataclass(frozen=True)
class _Recomputable:
    """A module output that can be recomputed: its storage, a weak reference to the output, and its strides."""

    storage: StorageWeakRef  # keeps the address from being reused
    output: weakref.ref[Tensor]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _Recomputed:
    """Placeholder for a saved tensor: a recomputable module output, and the location of the tensor in this output.

    Attributes:
        mark: Mark with which the output is recomputed.
        stride: Strides of the output.
        view: Size, strides, and offset of the saved tensor, which may be a view of the output.
    """

    mark: Mark
    stride: tuple[int, ...]
    view: tuple[Any, ...]


class RecomputedInputs:
    """SNELLA's recomputation of inputs, for models adapted with any method.

    Autograd saves the output of a normalization or activation as the input of the next trained layer. This class saves
    only the input of that normalization or activation, which autograd saves anyway, and recomputes the output.
    Gradients are bit-identical.

    Args:
        model: Model that is modified in place. Its `forward` runs under hooks for saved tensors.
    """

    def __init__(self, model: nn.Module) -> None:
        self._outputs: dict[int, _Recomputable] = {}
        self._forward = model.forward
        mark_outputs(model)
        for module in model.modules():
            # `mark_outputs` does not support parametrized modules, e.g. the normalizations that SPT changes
            if is_parametrized(module) and isinstance(module, nn.LayerNorm):
                module.register_forward_hook(_mark_parametrized)
            if can_recompute(module) or is_parametrized(module):
                module.register_forward_hook(self._record_output)
        model.forward = self.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, and save placeholders instead of marked outputs for the backward pass.

        A marked output is one that can be recomputed. Other tensors are passed to the saved-tensor hooks that are
        active outside the model, if any.
        """
        outer_hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        pack_outer, unpack_outer = outer_hooks or (lambda tensor: tensor, lambda packed: packed)

        def pack(tensor: Tensor) -> Any:
            return self._placeholder(tensor) or pack_outer(tensor)

        def unpack(packed: Any) -> Tensor:
            if not isinstance(packed, _Recomputed):
                return unpack_outer(packed)
            output = packed.mark.origin.compute(packed.mark.detached())
            if output.stride() != packed.stride:
                raise RuntimeError(
                    f"a recomputed output must have strides {packed.stride}, got {output.stride()}; "
                    "please report this bug"
                )
            return output.as_strided(*packed.view)

        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                return self._forward(*args, **kwargs)
        finally:
            self._outputs.clear()

    def _record_output(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        """Record the storage of a marked output (forward hook)."""
        if Mark.on(output) is not None:
            storage = StorageWeakRef(output.untyped_storage())
            self._outputs[storage.cdata] = _Recomputable(storage, weakref.ref(output), output.stride())

    def _placeholder(self, tensor: Tensor) -> _Recomputed | None:
        """Return a placeholder for a marked output or a view of one.

        Returns None for all other tensors, and for tensors that were modified in place.
        """
        if tensor.layout != torch.strided:
            return None
        marked = self._outputs.get(tensor.untyped_storage()._cdata)
        mark = None if marked is None else Mark.on(marked.output())
        if marked is None or mark is None or tensor._version:
            return None
        mark.origin.add_user()
        return _Recomputed(mark, marked.stride, (tensor.size(), tensor.stride(), tensor.storage_offset()))


def _mark_parametrized(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
    """Mark the output of a normalization with parametrized weights (forward hook)."""
    (z,) = args
    if output.requires_grad and torch.is_grad_enabled():
        Mark.put(output, (z,), Origin(partial(type(module).forward, module), z.device.type, module=module))


NUM_CLASSES = 100
_TARGETS = r".*\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))"


@dataclass(frozen=True)
class Workload:
    """Model and settings of a measurement.

    `r` is the rank, and `sparsity` is the fraction of adapted weights that SNELLA leaves unchanged.
    """

    backbone: str
    r: int = 8
    sparsity: float = 0.7
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def base(self) -> nn.Module:
        """Build the model without adapters, with random weights from a fixed seed."""
        torch.manual_seed(0)
        model = timm.create_model(self.backbone, num_classes=NUM_CLASSES)
        return model.to(self.device, self.dtype)


def random_batch(workload: Workload, batch: int) -> tuple[Tensor, Tensor]:
    """Return random images at the backbone's input size, and random labels."""
    configuration = timm.get_pretrained_cfg(workload.backbone)
    size = configuration.input_size[-1] if configuration is not None else 224
    images = torch.randn(batch, 3, size, size, device=workload.device, dtype=workload.dtype)
    return images, torch.randint(0, NUM_CLASSES, (batch,), device=workload.device)


Builder = Callable[[nn.Module, Workload], nn.Module]


def _frozen(model: nn.Module, workload: Workload) -> nn.Module:
    """Train only the head and any class token, to measure the forward and backward passes without adapters.

    The class token is an input of the first block, so the backward pass runs through all blocks.
    """
    model.requires_grad_(False)
    token = [model.cls_token] if isinstance(getattr(model, "cls_token", None), nn.Parameter) else []
    for parameter in (*token, *cast(Any, model).get_classifier().parameters()):
        parameter.requires_grad_(True)
    return model


def _full(model: nn.Module, workload: Workload) -> nn.Module:
    """Train all weights."""
    return model


def _lora(model: nn.Module, workload: Workload, **options: Any) -> nn.Module:
    """Add PEFT's LoRA to the layers that SNELLA adapts, without dropout."""
    config = LoraConfig(
        r=workload.r, lora_alpha=workload.r, target_modules=_TARGETS, modules_to_save=["head"], **options
    )
    return get_peft_model(model, config)


def _shira(model: nn.Module, workload: Workload) -> nn.Module:
    """Add PEFT's SHiRA to the layers that SNELLA adapts, with `r (m + n)` trainable weights per `m × n` layer."""
    return get_peft_model(model, ShiraConfig(r=workload.r, target_modules=_TARGETS, modules_to_save=["head"]))


def _method(name: str, *sparsity_options: str, has_rank: bool = True) -> Builder:
    """Return a builder for a method of `snella train`, with `sparsity_options` set to the workload's sparsity.

    Methods that need data before training receive one batch of two random images.
    """

    def build(model: nn.Module, workload: Workload) -> nn.Module:
        options: dict[str, Any] = {"r": workload.r} if has_rank else {}
        options |= dict.fromkeys(sparsity_options, workload.sparsity)
        return build_method(name, model, batches=lambda: [random_batch(workload, 2)], **options)

    return build


def _snella(**options: Any) -> Builder:
    """Return a builder for SNELLA at constant sparsity."""

    def build(model: nn.Module, workload: Workload) -> nn.Module:
        sparsity = {"target_sparsity": workload.sparsity, "init_sparsity": workload.sparsity}
        config = SnellaConfig(
            r=workload.r, target_modules=_TARGETS, modules_to_save=["head"], **(sparsity | {"impl": "auto"} | options)
        )
        return get_peft_model(model, config)

    return build


def _then(change: Callable[[nn.Module], object], build: Builder) -> Builder:
    """Return a builder that also changes the built model in place."""

    def build_and_change(model: nn.Module, workload: Workload) -> nn.Module:
        model = build(model, workload)
        change(model)
        return model

    return build_and_change


_compiled = partial(_then, nn.Module.compile)
_recomputing = partial(_then, RecomputedInputs)

BASELINES: dict[str, Builder] = {
    "frozen": _frozen,
    "lora": _lora,
    "dora": partial(_lora, use_dora=True),
    "shira": _shira,
    "full": _full,
    "lora-recompute": _recomputing(_lora),
    "full-recompute": _recomputing(_full),
    "gps": _method("gps", has_rank=False),
    "gps-recompute": _recomputing(_method("gps", has_rank=False)),
    "klora": _method("klora"),
    "spt-lora": _method("spt-lora"),
    "spt-lora-recompute": _recomputing(_method("spt-lora")),
    "spt-adapter": _method("spt-adapter"),
    "spt-adapter-recompute": _recomputing(_method("spt-adapter")),
    "snell": _method("snell", "target_sparsity", "init_sparsity"),
    "snella": _snella(),
    "snella-keep-delta": _snella(cache_delta=True),
    "snella-keep-inputs": _snella(recompute_inputs=False),
    "snella-bf16-gradient": _snella(weight_gradient="bfloat16"),
    "snella-sample": _snella(weight_gradient="sample:1/2"),
    "snella-sample-quarter": _snella(weight_gradient="sample:1/4"),
    "snella-compress": _snella(compress_activations=True),
    "snella-compress-sample": _snella(compress_activations=True, weight_gradient="sample:1/2"),
    "snella-eager": _snella(impl="eager"),
    "snella-triton": _snella(impl="triton"),
    "snella-compiled": _compiled(_snella()),
    "snella-reference": _snella(impl="reference"),
    "snella-reference-compiled": _compiled(_snella(impl="reference")),
    "paper": _then(_use_unfused_reference, _snella(impl="reference")),
}
"""Builders by method name. `snella` uses the default settings at constant sparsity, and names with the prefix `snella-`
are its variants. The suffix `-recompute` adds SNELLA's recomputation of inputs to another method, and
`snella-keep-inputs` disables it. `paper` is the unfused reference."""
