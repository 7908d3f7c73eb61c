"""The tuner: puts `SnellaLayer`s into a model, in PEFT's way."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .config import SnellaConfig
from .layer import Conv2d, Linear, SnellaLayer
from .targets import all_linear_names, count_rows, default_targets, unmatched_message


class SnellaModel(BaseTuner):
    """A model whose weights carry sparse, high-rank updates (SNELLA, arXiv 2510.24037).

    Usually made by `peft.get_peft_model(model, SnellaConfig(…))`.

    Args:
        model: Model to adapt, any `nn.Module`.
        config: Settings of the first adapter.
        adapter_name: Its name.
        low_cpu_mem_usage: Create the factors on the meta device, to be filled by loading.

    Raises:
        ValueError: No module matches `target_modules`, or a fused layer cannot be cut as `qkv_groups` says.
        TypeError: A targeted module is neither linear nor a two-dimensional convolution.
        NotImplementedError: A targeted module reads its weight past the layer (`nn.MultiheadAttention`).
    """

    prefix = "snella_"
    tuner_layer_cls = SnellaLayer
    target_module_mapping: dict[str, list[str]] = {}

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        """Leave the targets open; `_prepare_model` sees the model and chooses."""
        return peft_config

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Resolve the targets, and refuse those that match nothing while the model is still untouched."""
        if not isinstance(peft_config, SnellaConfig):
            raise TypeError(f"SnellaModel needs a SnellaConfig, got {type(peft_config).__name__}")
        targets = peft_config.target_modules
        if targets is None:
            targets = default_targets(model)
        if isinstance(targets, str) and targets.lower() == "all-linear":
            targets = set(all_linear_names(model))
            if not targets:
                raise ValueError(f"target_modules='all-linear' found no linear layer in {type(model).__name__}")
        peft_config.target_modules = targets = targets if isinstance(targets, str) else set(targets)
        # only names that miss are refused here: what is excluded on purpose is PEFT's own business
        if not any(_matches(targets, name) for name, _ in model.named_modules()):
            raise ValueError(unmatched_message(targets, model))

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: SnellaConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        layer_cls = _layer_class(base, parent, current_key)
        weight = cast(Tensor, base.weight.T if isinstance(base, Conv1D) else base.weight)
        rows = count_rows(current_key, weight.shape[0], weight.shape[1:].numel(), parent, peft_config.qkv_groups)
        if isinstance(target, SnellaLayer):
            target.update_layer(adapter_name, peft_config, rows)
            return
        layer = layer_cls(target, adapter_name, peft_config, rows, module_name=current_key)
        if adapter_name not in self.active_adapters:
            # an additional adapter is not trained until it is made active
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Iterator[None]:
        """Refuse what would otherwise be ignored: one adapter for each sample of a batch."""
        if adapter_names is not None:
            raise NotImplementedError(
                f"adapter_names={list(adapter_names)!r}: a batch cannot mix SNELLA adapters, because the update is "
                "part of the weight; call set_adapter and pass the samples of one adapter at a time"
            )
        yield

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Translate the keys as PEFT does, and refuse an adapter whose tensors do not fit this model."""
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        expected = {
            f"{name}.{attribute}.{adapter_name}": getattr(module, attribute)[adapter_name]
            for name, module in model.named_modules()
            if isinstance(module, SnellaLayer)
            for attribute in (*SnellaLayer.adapter_layer_names, "snella_budget")
            if adapter_name in getattr(module, attribute)
        }
        faults = [f"{key} is missing" for key in expected if key not in remapped]
        faults += [
            f"{key} is {list(remapped[key].shape)} where the model needs {list(tensor.shape)}"
            for key, tensor in expected.items()
            if key in remapped and remapped[key].shape != tensor.shape
        ]
        faults += [f"{key} fits no layer" for key in remapped if ".snella_" in key and key not in expected]
        if faults:
            more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
            raise ValueError(
                f"the adapter does not fit {type(model).__name__}: {'; '.join(faults[:3])}{more}; "
                "load it into the architecture it was trained on"
            )
        return remapped


def _layer_class(base: nn.Module, parent: nn.Module, name: str) -> type[SnellaLayer]:
    """Return the layer that can adapt `base`, or raise."""
    if isinstance(base, nn.MultiheadAttention) or isinstance(parent, nn.MultiheadAttention):
        raise NotImplementedError(
            f"target_modules matches {name!r}, but nn.MultiheadAttention reads its weights past the layer, so that an "
            "update would never be used; exclude it and adapt the other layers"
        )
    if isinstance(base, (nn.Linear, Conv1D)):
        return Linear
    if isinstance(base, nn.Conv2d):
        return Conv2d
    raise TypeError(
        f"target_modules matches {name!r}, a {type(base).__name__}; "
        "SNELLA adapts torch.nn.Linear, torch.nn.Conv2d and transformers' Conv1D"
    )


def _matches(targets: set[str] | str, name: str) -> bool:
    """Whether the targets alone match a module, whatever is excluded besides."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return name in targets or any(name.endswith(f".{target}") for target in targets)
