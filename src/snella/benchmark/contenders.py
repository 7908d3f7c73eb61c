"""Who takes part: one function a contender, from a timm model to a model that can be trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from peft import LoraConfig, ShiraConfig, get_peft_model
from torch import nn

from snella.benchmark.paper import put_two_branches
from snella.tuner.config import SnellaConfig

NUM_CLASSES = 100
_TARGETS = r".*\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))"


@dataclass(frozen=True)
class Setting:
    """What a contender is built for.

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


Builder = Callable[[nn.Module, Setting], nn.Module]


def _frozen(model: nn.Module, setting: Setting) -> nn.Module:
    """Head and class token alone: forward and the whole way back, without any method's own work."""
    model.requires_grad_(False)
    token = [model.cls_token] if isinstance(getattr(model, "cls_token", None), nn.Parameter) else []
    for parameter in (*token, *model.get_submodule("head").parameters()):
        parameter.requires_grad_(True)
    return model


def _full(model: nn.Module, setting: Setting) -> nn.Module:
    """All weights."""
    return model


def _lora(model: nn.Module, setting: Setting) -> nn.Module:
    """PEFT's LoRA, no dropout."""
    return _with_lora(model, setting)


def _dora(model: nn.Module, setting: Setting) -> nn.Module:
    """PEFT's DoRA."""
    return _with_lora(model, setting, use_dora=True)


def _with_lora(model: nn.Module, setting: Setting, **options: Any) -> nn.Module:
    """PEFT's LoRA on the same layers."""
    config = LoraConfig(r=setting.r, lora_alpha=setting.r, target_modules=_TARGETS, modules_to_save=["head"], **options)
    return get_peft_model(model, config)


def _shira(model: nn.Module, setting: Setting) -> nn.Module:
    """PEFT's SHiRA, `r (m + n)` weights a matrix."""
    return get_peft_model(model, ShiraConfig(r=setting.r, target_modules=_TARGETS, modules_to_save=["head"]))


def _snella(**options: Any) -> Builder:
    """SNELLA, at the budget that the sparsity means from the first step on."""

    def build(model: nn.Module, setting: Setting) -> nn.Module:
        sparsity = {"target_sparsity": setting.sparsity, "init_sparsity": setting.sparsity}
        config = SnellaConfig(
            r=setting.r, target_modules=_TARGETS, modules_to_save=["head"], **(sparsity | {"impl": "auto"} | options)
        )
        return get_peft_model(model, config)

    return build


def _paper(model: nn.Module, setting: Setting) -> nn.Module:
    """The paper's computation: two products, a quantile, activation checkpointing."""
    return put_two_branches(_snella(impl="reference")(model, setting))


def _compiled(build: Builder) -> Builder:
    """The same model through `torch.compile`."""

    def build_compiled(model: nn.Module, setting: Setting) -> nn.Module:
        model = build(model, setting)
        model.compile()
        return model

    return build_compiled


CONTENDERS: dict[str, Builder] = {
    "frozen": _frozen,
    "lora": _lora,
    "dora": _dora,
    "shira": _shira,
    "full": _full,
    "snella": _snella(),
    "snella-keep-delta": _snella(keep_delta=True),
    "snella-eager": _snella(impl="eager"),
    "snella-triton": _snella(impl="triton"),
    "snella-compiled": _compiled(_snella()),
    "snella-reference": _snella(impl="reference"),
    "snella-reference-compiled": _compiled(_snella(impl="reference")),
    "paper": _paper,
}
"""By name. `snella` is what users get, the others with that prefix are variants of it."""
