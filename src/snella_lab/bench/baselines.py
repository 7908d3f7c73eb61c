"""Baselines of the benchmark: functions from a timm model to a trainable one."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

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
from snella.memory.origins import Mark, Output
from snella.memory.recompute import can_recompute, mark_outputs
from snella.sparsify import quantile_threshold, sparsify
from snella_app.methods.registry import build_method

REFERENCE = "lora"
"""The baseline that ratios are of."""

_MOST_OF_QUANTILE = 2**24  # entries that torch.quantile takes


class TwoBranches(nn.Module):
    """Base layer and update as two products, the update merged by autograd under activation checkpointing.

        y = x W0ᵀ + bias + scaling·x Sᵀ,   S = sparsify(ΔW, quantile(|ΔW|, sparsity))

    The memory rule is kept by `torch.utils.checkpoint`: `ΔW` and all that leads to it are computed once in the forward
    and once more in the backward pass, each time with a sort of all magnitudes.

    Args:
        layer: An adapted linear layer; its parameters are used as they are.
    """

    def __init__(self, layer: SnellaLayer) -> None:
        super().__init__()
        self.layer = layer
        layer.is_applied = True  # here, without a call of its own

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply both branches, `x` `[…, n]`."""
        return self.layer.base_layer(x, *args, **kwargs) + checkpoint(self._branch, x, use_reentrant=False)

    def _branch(self, x: Tensor) -> Tensor:
        """The update's product."""
        spec, factors, budgets, _ = self.layer.get_update("default")
        groups = []
        for matrix, budget in zip(spec.matrices(factors), budgets, strict=True):
            delta = spec.merge_matrix(matrix)
            sparsity, magnitudes = 1 - budget / delta.numel(), delta.detach().abs().flatten()
            is_small = delta.numel() <= _MOST_OF_QUANTILE
            # torch's own, as the authors take it: ours is quicker
            threshold = torch.quantile(magnitudes, sparsity) if is_small else quantile_threshold(delta, sparsity)
            groups.append(sparsify(delta, threshold, spec.mode))
        return spec.scaling * F.linear(x, torch.cat(groups).to(x.dtype))


def _use_unfused_reference(model: nn.Module) -> nn.Module:
    """Replace every adapted linear layer of `model` by its two branches, in place.

    Raises:
        TypeError: An adapted layer is not linear.
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, SnellaLayer):
            continue
        if not isinstance(module.get_base_layer(), nn.Linear):
            raise TypeError(f"the paper's computation is for linear layers, got {type(module).__name__} at {name!r}")
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, TwoBranches(module))
    return model


@dataclass(frozen=True)
class _Recomputable:
    """A module's output that can be computed again: its storage, its mark, and its strides."""

    storage: StorageWeakRef  # while it lives, no other storage has its address
    output: weakref.ref[Tensor]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _Recomputed:
    """Stands for a saved tensor: how to compute it, from what, and the view of it that was saved."""

    mark: Mark
    stride: tuple[int, ...]
    view: tuple[Any, ...]


class RecomputedInputs:
    """SNELLA's recomputation of inputs for a model of any method, so that methods are compared with and without it.

    Autograd saves the output of a normalization or an activation as the input of the trained layer behind it. With
    this, it saves what the output is computed from in its place, which the module itself keeps anyway. Gradients have
    the same bits.

    Args:
        model: Changed in place: its `forward` runs under hooks for saved tensors.
    """

    def __init__(self, model: nn.Module) -> None:
        self._outputs: dict[int, _Recomputable] = {}
        self._forward = model.forward
        mark_outputs(model)
        for module in model.modules():
            if is_parametrized(module) and isinstance(module, nn.LayerNorm):  # SPT's, which mark_outputs does not know
                module.register_forward_hook(_mark_parametrized)
            if can_recompute(module) or is_parametrized(module):
                module.register_forward_hook(self._note)
        model.forward = self.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
        pack_outer, unpack_outer = outer or (_same, _same)

        def pack(tensor: Tensor) -> Any:
            return self._find(tensor) or pack_outer(tensor)

        def unpack(packed: Any) -> Tensor:
            if not isinstance(packed, _Recomputed):
                return unpack_outer(packed)
            output = packed.mark.origin.compute(packed.mark.detached())
            if output.stride() != packed.stride:
                raise RuntimeError(f"an output must be laid out as before, got strides {output.stride()}")
            return output.as_strided(*packed.view)

        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                return self._forward(*args, **kwargs)
        finally:
            self._outputs.clear()

    def _note(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        """Forward hook: remember a marked output by its storage."""
        if Mark.on(output) is not None:
            storage = StorageWeakRef(output.untyped_storage())
            self._outputs[storage.cdata] = _Recomputable(storage, weakref.ref(output), output.stride())

    def _find(self, tensor: Tensor) -> _Recomputed | None:
        """What is saved in the place of a tensor, if it is a marked output or a view of one."""
        if tensor.layout != torch.strided:
            return None
        known = self._outputs.get(tensor.untyped_storage()._cdata)
        mark = None if known is None else Mark.on(known.output())
        if known is None or mark is None or tensor._version:
            return None
        mark.origin.add_user()
        return _Recomputed(mark, known.stride, (tensor.size(), tensor.stride(), tensor.storage_offset()))


def _mark_parametrized(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
    """Forward hook: mark the output of a normalization that has parametrized weights."""
    (z,) = args
    if output.requires_grad and torch.is_grad_enabled():
        Mark.put(output, (z,), Output(partial(type(module).forward, module), z.device.type, module=module))


def _same(value: Any) -> Any:
    """Keep a tensor as it is."""
    return value


NUM_CLASSES = 100
_TARGETS = r".*\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))"


@dataclass(frozen=True)
class Workload:
    """The workload of a measurement.

    Args:
        backbone: A timm name.
        r: Rank.
        sparsity: Fraction of the adapted weights that SNELLA leaves as they are.
        dtype: Of weights and activations.
        device: Where it runs.
    """

    backbone: str
    r: int = 8
    sparsity: float = 0.7
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def base(self) -> nn.Module:
        """The model without adapters, the same random weights each time."""
        torch.manual_seed(0)
        model = timm.create_model(self.backbone, num_classes=NUM_CLASSES)
        return model.to(self.device, self.dtype)


def random_batch(workload: Workload, batch: int) -> tuple[Tensor, Tensor]:
    """Images as the backbone takes them, and labels."""
    configuration = timm.get_pretrained_cfg(workload.backbone)
    side = configuration.input_size[-1] if configuration is not None else 224
    images = torch.randn(batch, 3, side, side, device=workload.device, dtype=workload.dtype)
    return images, torch.randint(0, NUM_CLASSES, (batch,), device=workload.device)


Builder = Callable[[nn.Module, Workload], nn.Module]


def _frozen(model: nn.Module, workload: Workload) -> nn.Module:
    """Head and class token alone: forward and the whole way back, without any method's own work."""
    model.requires_grad_(False)
    token = [model.cls_token] if isinstance(getattr(model, "cls_token", None), nn.Parameter) else []
    for parameter in (*token, *model.get_submodule("head").parameters()):
        parameter.requires_grad_(True)
    return model


def _full(model: nn.Module, workload: Workload) -> nn.Module:
    """All weights."""
    return model


def _lora(model: nn.Module, workload: Workload, **options: Any) -> nn.Module:
    """PEFT's LoRA on the same layers, no dropout."""
    config = LoraConfig(
        r=workload.r, lora_alpha=workload.r, target_modules=_TARGETS, modules_to_save=["head"], **options
    )
    return get_peft_model(model, config)


def _shira(model: nn.Module, workload: Workload) -> nn.Module:
    """PEFT's SHiRA, `r (m + n)` weights a matrix."""
    return get_peft_model(model, ShiraConfig(r=workload.r, target_modules=_TARGETS, modules_to_save=["head"]))


def _method(name: str, *sparse: str, has_rank: bool = True) -> Builder:
    """A method of `snella train`, at its defaults but for the rank; `sparse` are its options set to the sparsity.

    What looks at data before training sees one batch of two random images.
    """

    def build(model: nn.Module, workload: Workload) -> nn.Module:
        options: dict[str, Any] = {"r": workload.r} if has_rank else {}
        options |= dict.fromkeys(sparse, workload.sparsity)
        return build_method(name, model, batches=lambda: [random_batch(workload, 2)], **options)

    return build


def _snella(**options: Any) -> Builder:
    """SNELLA, at the budget that the sparsity means from the first step on."""

    def build(model: nn.Module, workload: Workload) -> nn.Module:
        sparsity = {"target_sparsity": workload.sparsity, "init_sparsity": workload.sparsity}
        config = SnellaConfig(
            r=workload.r, target_modules=_TARGETS, modules_to_save=["head"], **(sparsity | {"impl": "auto"} | options)
        )
        return get_peft_model(model, config)

    return build


def _paper(model: nn.Module, workload: Workload) -> nn.Module:
    """The paper's computation: two products, a quantile, activation checkpointing."""
    return _use_unfused_reference(_snella(impl="reference")(model, workload))


def _compiled(build: Builder) -> Builder:
    """The same model through `torch.compile`."""

    def build_compiled(model: nn.Module, workload: Workload) -> nn.Module:
        model = build(model, workload)
        model.compile()
        return model

    return build_compiled


def _recomputing(build: Builder) -> Builder:
    """The same method with `RecomputedInputs`."""

    def build_recomputing(model: nn.Module, workload: Workload) -> nn.Module:
        model = build(model, workload)
        RecomputedInputs(model)
        return model

    return build_recomputing


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
    "paper": _paper,
}
"""By name. `snella` is what users get, the others with that prefix are variants of it; `-recompute` is a method with
SNELLA's recomputation of inputs, which `snella-keep-inputs` is without."""
