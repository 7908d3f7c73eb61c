"""Hot swapping of adapters in running models, including compiled models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from snella._utils import listed
from snella.budgets import budget_error
from snella.compat.tokens import TokenAdapter
from snella.config import SnellaConfig, read_config
from snella.layer import SnellaLayer
from snella.merge import MergeCache, refresh
from snella.targets import count_rows

_PREFIX = "base_model.model."
_COMPILED = "_orig_mod."
_MUST_MATCH = ("kernel", "num_pieces", "softmax_dim", "center_softmax", "sparsify_mode")
"""Fields that must match; the tensors' shapes cover ranks and numbers of matrices."""


@dataclass
class AdapterValues:
    """Saved adapter in memory for repeated swaps, which are faster after the first.

    Args:
        tensors: Tensors by their names in the adapter's file; must not change after the first swap.
        config: Configuration of the adapter; `None` assumes the model's.
    """

    tensors: dict[str, Tensor]
    config: SnellaConfig | None = None
    caches: dict[Any, MergeCache] = field(default_factory=dict, repr=False)
    """Thresholds and column statistics of merges, by layer, backend, device and dtype; see `MergeCache`."""

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """Read an adapter from a folder.

        Args:
            folder: Folder written by `save_pretrained`, or the folder of a run.

        Raises:
            FileNotFoundError: If the folder contains no adapter.
            ValueError: If the adapter belongs to another method or is corrupt.
        """
        inner = Path(folder, "adapter")
        path = inner if (inner / CONFIG_NAME).is_file() else Path(folder)
        if not (path / CONFIG_NAME).is_file() or not (path / SAFETENSORS_WEIGHTS_NAME).is_file():
            raise FileNotFoundError(
                f"{folder} must contain an adapter, i.e. {CONFIG_NAME} and {SAFETENSORS_WEIGHTS_NAME}"
            )
        config = read_config(path)
        if not isinstance(config, SnellaConfig):
            raise ValueError(
                f"{folder} must contain a SNELLA adapter, got {type(config).__name__}; use PEFT's hotswap_adapter for "
                "LoRA"
            )
        try:
            return cls(load_file(path / SAFETENSORS_WEIGHTS_NAME), config)
        except SafetensorError as error:
            raise ValueError(f"{path / SAFETENSORS_WEIGHTS_NAME} is damaged: {error}; save the adapter again") from None


@torch.no_grad()
def hotswap(
    model: nn.Module, adapter: str | Path | Mapping[str, Tensor] | AdapterValues, adapter_name: str = "default"
) -> AdapterValues:
    """Replace an adapter's values in a running model with another adapter for the same pre-trained weights.

        model.merge_adapter()                     # serve at the speed of the plain model
        compiled = torch.compile(model)
        hotswap(compiled, "runs/cells")           # reads a few megabytes, merges once, does not recompile

    Writes all values in place, including heads in `modules_to_save`, tokens and budgets. Except for merged quantized
    weights, no parameter is replaced, so memory does not grow and compiled models do not recompile. For a merged
    adapter, the swap recomputes each weight from its pre-trained values, and `unmerge_adapter` still restores them bit
    for bit. Outputs are bit-identical to the outputs of a model loaded with the new adapter. Given the new adapter's
    config, the swap also sets `scaling` and undoes `set_scale`. No forward pass may run during the swap.

    Args:
        model: A model with a SNELLA adapter, merged or not, compiled or not, or any model that contains one.
        adapter: Folder of an adapter or a run, the tensors of an adapter file, or `AdapterValues`.
        adapter_name: Name of the adapter to replace.

    Returns:
        The adapter in memory. Another swap with it reads no file and recomputes no threshold.

    Raises:
        FileNotFoundError: If the folder contains no adapter.
        ValueError: If the new adapter belongs to another method or is corrupt; the model does not have the adapter to
            replace or contains several PEFT models; the architecture, rank, kernel, sparsify mode, rows per matrix or
            head differs; an adapter trains biases or token rows; values are not finite; or budgets are invalid. The
            model then remains unchanged.
    """
    if isinstance(adapter, (str, Path)):
        adapter = AdapterValues.read(adapter)
    elif not isinstance(adapter, AdapterValues):
        adapter = AdapterValues(dict(adapter))
    current, layers, tokens = _adapter_parts(model, adapter_name)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no SNELLA adapter {adapter_name!r}")
    values = {_strip_prefixes(name): tensor for name, tensor in adapter.tensors.items()}
    config = next(iter(layers.values())).snella_config[adapter_name]
    errors = _differences(config, adapter.config, current, values)
    if adapter.config is not None and adapter.config.qkv_groups != config.qkv_groups:
        errors += _other_rows(model, layers, adapter_name, adapter.config.qkv_groups)
    remedy = "load it as another adapter with load_adapter"
    if not errors and not adapter.caches:
        errors = _invalid_values(layers, adapter_name, values)
        remedy = "save the adapter again or load an earlier checkpoint"
    if errors:
        raise ValueError(f"the adapter cannot be swapped in: {listed(errors, 3, '; ')}; {remedy}")
    for name, tensor in current.items():
        tensor.copy_(values[name])
    for layer in layers.values():
        layer.seal_budgets(adapter_name)
    if adapter.config is not None:
        for layer in layers.values():
            layer.snella_config[adapter_name].scaling = adapter.config.scaling
            if layer.scaling[adapter_name] != adapter.config.scaling:  # also after `set_scale`
                layer.set_scale(adapter_name, 1.0)
    for token in tokens:
        if adapter_name in token.merged_adapters:
            token.base_layer.weight.copy_(token.snella_token[adapter_name])
    for name, layer in layers.items():
        A = layer.snella_A[adapter_name]
        key = (name, layer.backend_name(adapter_name), str(A.device), A.dtype)
        refresh(layer, adapter_name, adapter.caches.setdefault(key, MergeCache()))
    return adapter


def _strip_prefixes(name: str) -> str:
    """Remove the prefixes that PEFT and `torch.compile` add to a parameter or module name."""
    name = name.replace(_COMPILED, "")
    return name.partition(_PREFIX)[2] or name  # the model may be inside another one


def _adapter_parts(
    model: nn.Module, adapter_name: str
) -> tuple[dict[str, Tensor], dict[str, SnellaLayer], list[TokenAdapter]]:
    """Return an adapter's tensors and layers, keyed by their names in a file, and its tokens."""
    parts: dict[str, Tensor] = {}
    layers: dict[str, SnellaLayer] = {}
    tokens: list[TokenAdapter] = []
    for name, module in model.named_modules():
        if isinstance(module, (SnellaLayer, TokenAdapter)):
            for attribute in module.saved_names:
                tensors: Any = getattr(module, attribute)
                if adapter_name in tensors:
                    parts[f"{name}.{attribute}"] = tensors[adapter_name]
            if isinstance(module, TokenAdapter):
                tokens.append(module)
            elif adapter_name in module.snella_A:
                layers[_strip_prefixes(name)] = module
        elif isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            inner = module.modules_to_save[adapter_name]
            parts |= {f"{name}.{key}": tensor for key, tensor in inner.state_dict(keep_vars=True).items()}
    stripped = {_strip_prefixes(name): tensor.detach() for name, tensor in parts.items()}
    if len(stripped) < len(parts):
        raise ValueError(f"{type(model).__name__} contains several PEFT models; pass the one to change")
    return stripped, layers, tokens


def _differences(
    config: SnellaConfig, other: SnellaConfig | None, current: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> list[str]:
    """Return the differences in settings, names and shapes between an adapter and the adapter of the model."""
    errors = [
        f"{name} is {getattr(other, name)!r}, the model has {getattr(config, name)!r}"
        for name in _MUST_MATCH
        if other is not None and getattr(other, name) != getattr(config, name)
    ]
    for name in ("bias", "trainable_token_indices"):  # outside the adapter's layers
        values_of_both = [getattr(settings, name) for settings in (config, other) if settings is not None]
        if trained := [value for value in values_of_both if value not in ("none", None)]:
            errors.append(f"{name}={trained[0]!r} trains parameters outside the adapter's layers")
    errors += [f"{name} is missing" for name in current if name not in values]
    errors += [f"{name} does not exist in the model" for name in values if name not in current]
    errors += [
        f"{name} has shape {list(values[name].shape)}, the model has {list(tensor.shape)}"
        for name, tensor in current.items()
        if name in values and values[name].shape != tensor.shape
    ]
    return errors


def _other_rows(
    model: nn.Module,
    layers: Mapping[str, SnellaLayer],
    adapter_name: str,
    qkv_groups: int | str | dict[str, int | list[int]],
) -> list[str]:
    """Return the layers whose rows per matrix differ under another `qkv_groups`."""
    errors: list[str] = []
    parents = {child: parent for parent in model.modules() for child in parent.children()}
    for name, layer in layers.items():
        rows = layer.row_counts[adapter_name]
        other_rows = count_rows(layer.module_name, layer.out_features, layer.in_features, parents[layer], qkv_groups)
        if other_rows != rows:
            errors.append(f"{name} has matrices of {list(other_rows)} rows, the model has {list(rows)}")
    return errors


def _invalid_values(layers: Mapping[str, SnellaLayer], adapter_name: str, values: Mapping[str, Tensor]) -> list[str]:
    """Return the tensors that are not finite, and the layers with invalid budgets."""
    errors = [f"{name} is not finite" for name, tensor in values.items() if not tensor.isfinite().all()]
    for name, layer in layers.items():
        if (error := budget_error(layer, adapter_name, values[f"{name}.snella_budget"].tolist())) is not None:
            errors.append(f"budgets of {name!r} {error}")
    return errors


__all__ = ["AdapterValues", "hotswap"]
