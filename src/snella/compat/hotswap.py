"""Hot-swapping adapters in running models, including compiled models.

The budgets of an adapter limit the number of nonzero entries in each matrix of its updates.
"""

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
from snella.budgets import budget_error, seal_budgets
from snella.compat.tokens import TokenAdapter
from snella.config import SnellaConfig, read_config
from snella.layer import SnellaLayer
from snella.merge import MergeCache, refresh
from snella.targets import count_rows

_PREFIX = "base_model.model."
_COMPILED = "_orig_mod."
_MUST_MATCH = ("kernel", "num_pieces", "softmax_dim", "center_softmax", "sparsify_mode")
"""Settings that must be equal. The tensors' shapes show whether ranks and numbers of matrices are equal."""


@dataclass
class AdapterValues:
    """Saved adapter in memory for repeated swaps.

    The first swap fills `caches`, which make later swaps faster.

    Args:
        tensors: Tensors by their names in the adapter's file. They must not change after the first swap.
        config: Configuration of the adapter. If `None`, it is assumed to equal that of the adapter to replace.
    """

    tensors: dict[str, Tensor]
    config: SnellaConfig | None = None
    caches: dict[Any, MergeCache] = field(default_factory=dict, repr=False)
    """Thresholds and column statistics of merges, by layer, backend, device, and dtype; see `MergeCache`."""

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """Read an adapter from a folder.

        Args:
            folder: Folder written by `save_pretrained`, or the folder of a run.

        Raises:
            FileNotFoundError: If the folder contains no adapter.
            ValueError: If the adapter belongs to a different method or is corrupt.
        """
        run_adapter = Path(folder, "adapter")
        path = run_adapter if (run_adapter / CONFIG_NAME).is_file() else Path(folder)
        if not (path / CONFIG_NAME).is_file() or not (path / SAFETENSORS_WEIGHTS_NAME).is_file():
            raise FileNotFoundError(
                f"{folder} contains no adapter, which consists of {CONFIG_NAME} and {SAFETENSORS_WEIGHTS_NAME}"
            )
        config = read_config(path)
        if not isinstance(config, SnellaConfig):
            raise ValueError(
                f"{folder} contains no SNELLA adapter, but one with a {type(config).__name__}; use PEFT's "
                "hotswap_adapter for LoRA"
            )
        try:
            return cls(load_file(path / SAFETENSORS_WEIGHTS_NAME), config)
        except SafetensorError as error:
            raise ValueError(f"{path / SAFETENSORS_WEIGHTS_NAME} is damaged: {error}; save the adapter again") from None


@torch.no_grad()
def hotswap(
    model: nn.Module, adapter: str | Path | Mapping[str, Tensor] | AdapterValues, adapter_name: str = "default"
) -> AdapterValues:
    """Replace an adapter's values in a running model with those of another adapter for the same pre-trained weights.

        model.merge_adapter()                     # serve at the speed of the plain model
        compiled = torch.compile(model)
        hotswap(compiled, "runs/cells")           # reads a few megabytes, merges once, does not recompile

    Writes all values in place, including heads in `modules_to_save`, parameters in `parameters_to_save`, and budgets.
    Except for merged quantized weights, no parameter is replaced, so memory does not grow and compiled models do not
    recompile. For a merged adapter, the swap recomputes each weight from its pre-trained values, and `unmerge_adapter`
    still restores them bit for bit. If the new adapter's configuration is known, the swap also sets `scaling` and
    undoes `set_scale`, so the outputs are bit-identical to those of a model loaded with the new adapter. It also copies
    `target_sparsity` and `init_sparsity`, which `save_pretrained` stores. No forward pass may run during the swap.

    Args:
        model: A model with a SNELLA adapter, merged or not, compiled or not, or any module that contains such a model.
        adapter: Folder of an adapter or a run, the tensors of an adapter file, or `AdapterValues`.
        adapter_name: Name of the adapter to replace.

    Returns:
        The adapter in memory. Another swap with it reads no file and recomputes no threshold.

    Raises:
        FileNotFoundError: If the folder contains no adapter.
        ValueError: If the new adapter belongs to a different method, is corrupt, or has non-finite values or invalid
            budgets; if the model does not have the adapter to replace or contains several PEFT models; if the adapters
            differ in architecture, rank, kernel, kernel settings, sparsify mode, rows per matrix, or head; or if one
            of them trains biases or `trainable_token_indices`. The model then remains unchanged.
    """
    if isinstance(adapter, (str, Path)):
        adapter = AdapterValues.read(adapter)
    elif not isinstance(adapter, AdapterValues):
        adapter = AdapterValues(dict(adapter))
    current_tensors, layers, tokens = _find_adapter(model, adapter_name)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no SNELLA adapter {adapter_name!r}")
    new_tensors = {_strip_prefixes(name): tensor for name, tensor in adapter.tensors.items()}
    config = next(iter(layers.values())).snella_config[adapter_name]
    errors = _differences(config, adapter.config, current_tensors, new_tensors)
    if adapter.config is not None and adapter.config.qkv_groups != config.qkv_groups:
        errors += _row_differences(model, layers, adapter_name, adapter.config.qkv_groups)
    remedy = "load it as another adapter with load_adapter"
    # an adapter with caches has been checked in an earlier swap
    if not errors and not adapter.caches:
        errors = _invalid_values(layers, adapter_name, new_tensors)
        remedy = "save the adapter again or load an earlier checkpoint"
    if errors:
        raise ValueError(f"the adapter cannot be swapped in: {listed(errors, 3, '; ')}; {remedy}")
    for name, tensor in current_tensors.items():
        tensor.copy_(new_tensors[name])
    for layer in layers.values():
        seal_budgets(layer, adapter_name)
    if adapter.config is not None:
        for layer in layers.values():
            for name in ("scaling", "target_sparsity", "init_sparsity"):
                setattr(layer.snella_config[adapter_name], name, getattr(adapter.config, name))
            # `set_scale` may have changed the scaling, too
            if layer.scaling[adapter_name] != adapter.config.scaling:
                layer.set_scale(adapter_name, 1.0)
    for token in tokens:
        if adapter_name in token.merged_adapters:  # `weight` is then a copy of the adapter's value
            token.base_layer.weight.copy_(token.snella_token[adapter_name])
    for name, layer in layers.items():
        A = layer.snella_A[adapter_name]
        key = (name, layer.backend_name(adapter_name), str(A.device), A.dtype)
        refresh(layer, adapter_name, adapter.caches.setdefault(key, MergeCache()))
    return adapter


def _strip_prefixes(name: str) -> str:
    """Remove the prefixes that PEFT and `torch.compile` add to a parameter or module name."""
    name = name.replace(_COMPILED, "")
    # also remove everything before PEFT's prefix, because the PEFT model may be inside another model
    return name.partition(_PREFIX)[2] or name


def _find_adapter(
    model: nn.Module, adapter_name: str
) -> tuple[dict[str, Tensor], dict[str, SnellaLayer], list[TokenAdapter]]:
    """Return an adapter's tensors and layers by their names in a file, and all `TokenAdapter`s of the model.

    Raises:
        ValueError: If the model contains several PEFT models.
    """
    saved_tensors: dict[str, Tensor] = {}
    layers: dict[str, SnellaLayer] = {}
    tokens: list[TokenAdapter] = []
    for name, module in model.named_modules():
        if isinstance(module, (SnellaLayer, TokenAdapter)):
            for attribute in module.saved_names:
                tensors: Any = getattr(module, attribute)
                if adapter_name in tensors:
                    saved_tensors[f"{name}.{attribute}"] = tensors[adapter_name]
            if isinstance(module, TokenAdapter):
                tokens.append(module)
            elif adapter_name in module.snella_A:
                layers[_strip_prefixes(name)] = module
        elif isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            state = module.modules_to_save[adapter_name].state_dict(keep_vars=True)
            saved_tensors |= {f"{name}.{key}": tensor for key, tensor in state.items()}
    stripped = {_strip_prefixes(name): tensor.detach() for name, tensor in saved_tensors.items()}
    if len(stripped) < len(saved_tensors):
        raise ValueError(f"{type(model).__name__} contains several PEFT models; pass the one to change")
    return stripped, layers, tokens


def _differences(
    config: SnellaConfig,
    new_config: SnellaConfig | None,
    current_tensors: Mapping[str, Tensor],
    new_tensors: Mapping[str, Tensor],
) -> list[str]:
    """Return a message for each difference in settings, names, and shapes between the current and the new adapter."""
    errors = [
        f"{name} is {getattr(new_config, name)!r}, but the model has {getattr(config, name)!r}"
        for name in _MUST_MATCH
        if new_config is not None and getattr(new_config, name) != getattr(config, name)
    ]
    for name in ("bias", "trainable_token_indices"):
        values = [getattr(settings, name) for settings in (config, new_config) if settings is not None]
        training_values = [value for value in values if value not in ("none", None)]
        if training_values:
            errors.append(f"{name}={training_values[0]!r} trains parameters outside the adapter's layers")
    errors += [f"{name} is missing" for name in current_tensors if name not in new_tensors]
    errors += [f"{name} does not exist in the model" for name in new_tensors if name not in current_tensors]
    errors += [
        f"{name} has shape {list(new_tensors[name].shape)}, but the model has {list(tensor.shape)}"
        for name, tensor in current_tensors.items()
        if name in new_tensors and new_tensors[name].shape != tensor.shape
    ]
    return errors


def _row_differences(
    model: nn.Module,
    layers: Mapping[str, SnellaLayer],
    adapter_name: str,
    qkv_groups: int | str | dict[str, int | list[int]],
) -> list[str]:
    """Return a message for each layer whose rows per matrix would differ with the new adapter's `qkv_groups`."""
    errors: list[str] = []
    parents = {child: parent for parent in model.modules() for child in parent.children()}
    for name, layer in layers.items():
        rows = layer.row_counts[adapter_name]
        new_rows = count_rows(layer.module_name, layer.out_features, layer.in_features, parents[layer], qkv_groups)
        if new_rows != rows:
            errors.append(f"{name} has matrices of {list(new_rows)} rows, but the model has {list(rows)}")
    return errors


def _invalid_values(layers: Mapping[str, SnellaLayer], adapter_name: str, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return a message for each tensor that is not finite and each layer with invalid budgets."""
    errors = [f"{name} is not finite" for name, tensor in tensors.items() if not tensor.isfinite().all()]
    for name, layer in layers.items():
        budgets = tensors[f"{name}.snella_budget"].tolist()
        if (error := budget_error(layer, adapter_name, budgets)) is not None:
            errors.append(f"budgets of {name!r} {error}")
    return errors


__all__ = ["AdapterValues", "hotswap"]
