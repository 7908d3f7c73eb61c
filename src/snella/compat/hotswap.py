"""`hotswap`: another task's adapter in a running model, also a compiled one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from snella._text import listed
from snella.backends.base import MergeCache
from snella.compat.tokens import TokenAdapter
from snella.config import SnellaConfig
from snella.layer import SnellaLayer

_PREFIX = "base_model.model."
_COMPILED = "_orig_mod."
_DECISIVE = ("kernel", "num_pieces", "softmax_dim", "center_softmax", "sparsify_mode", "fixed_support")
"""Settings that say what the factors mean; a rank or a cut into matrices shows in the tensors' shapes."""


@dataclass
class AdapterValues:
    """A saved adapter in memory, to be swapped in as often as one likes; later swaps are faster than the first.

    Args:
        tensors: By the names of the adapter's file; not to be changed once it was swapped in.
        config: Its settings; `None` where they are taken to be the model's.
    """

    tensors: dict[str, Tensor]
    config: SnellaConfig | None = None
    caches: dict[Any, MergeCache] = field(default_factory=dict, repr=False)
    """By layer, backend and device, thresholds and the like that the first swap has found: some kilobytes a matrix."""

    is_finite: bool = field(default=False, repr=False)
    """Whether all values are known to be finite."""

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """Read the adapter of a folder.

        Args:
            folder: As `save_pretrained` writes it, or the folder of a run, which holds one.

        Raises:
            FileNotFoundError: There is no adapter.
            ValueError: It is another method's, or damaged.
        """
        inner = Path(folder, "adapter")
        path = inner if (inner / CONFIG_NAME).is_file() else Path(folder)
        if not (path / CONFIG_NAME).is_file() or not (path / SAFETENSORS_WEIGHTS_NAME).is_file():
            raise FileNotFoundError(f"{folder} holds no adapter: {CONFIG_NAME} and {SAFETENSORS_WEIGHTS_NAME}")
        config = PeftConfig.from_pretrained(str(path))
        if not isinstance(config, SnellaConfig):
            raise ValueError(
                f"{folder} must hold an adapter of SNELLA, got {type(config).__name__}; hotswap_adapter does LoRA"
            )
        try:
            return cls(load_file(path / SAFETENSORS_WEIGHTS_NAME), config)
        except SafetensorError as error:
            raise ValueError(f"{path / SAFETENSORS_WEIGHTS_NAME} is damaged: {error}; save the adapter again") from None

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


@torch.no_grad()
def hotswap(
    model: nn.Module, adapter: str | Path | Mapping[str, Tensor] | AdapterValues, adapter_name: str = "default"
) -> AdapterValues:
    """Give an adapter of a running model the values of another one, which was trained on the same pre-trained weights.

        model.merge_adapter()                     # serve at the speed of the plain model
        compiled = torch.compile(model)
        hotswap(compiled, "runs/cells")           # a few megabytes read, one merge; the same graph

    Everything is written in place: no tensor is added or replaced, so that nothing is compiled again and memory stays
    as it is. Where the adapter is merged, each weight is written anew from its pre-trained values, which
    `unmerge_adapter` still restores bit for bit. Heads in `modules_to_save`, tokens and budgets are swapped too.
    Outputs are those of a model that was loaded with the new adapter, to the last bit. No forward pass may run
    meanwhile.

    Args:
        model: A model with a SNELLA adapter, merged or not, compiled or not, or any model that contains one.
        adapter: Folder of an adapter or a run, the tensors of such a file, or `AdapterValues`.
        adapter_name: The adapter whose values are replaced.

    Returns:
        The adapter in memory: swapping it in again reads nothing, and needs no selection.

    Raises:
        FileNotFoundError: No adapter is in the folder.
        ValueError: The model has no such adapter, or another architecture, rank, kernel or head, or the values are not
            finite; the model is as it was.
    """
    if isinstance(adapter, (str, Path)):
        adapter = AdapterValues.read(adapter)
    elif not isinstance(adapter, AdapterValues):
        adapter = AdapterValues(dict(adapter))
    own, layers, tokens = _parts_of(model, adapter_name)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no SNELLA adapter {adapter_name!r}")
    values = {_plain(name): tensor for name, tensor in adapter.tensors.items()}
    config = next(iter(layers.values())).snella_config[adapter_name]
    _check(config, adapter.config, own, values, is_finite=adapter.is_finite)
    adapter.is_finite = True
    for name, tensor in own.items():
        tensor.copy_(values[name])
    for layer in layers.values():
        layer.seal_budgets(adapter_name)
    if adapter.config is not None and adapter.config.scaling != config.scaling:
        for layer in layers.values():
            layer.snella_config[adapter_name].scaling = adapter.config.scaling
            layer.set_scale(adapter_name, 1.0)
    for token in tokens:
        if adapter_name in token.merged_adapters:
            token.base_layer.weight.copy_(token.snella_token[adapter_name])
    for name, layer in layers.items():
        A = layer.snella_A[adapter_name]
        key = (name, layer.backend_name(adapter_name), str(A.device), A.dtype)
        layer.refresh(adapter_name, adapter.caches.setdefault(key, MergeCache()))
    return adapter


def _plain(name: str) -> str:
    """A name without what PEFT and `torch.compile` put before it."""
    return name.replace(_COMPILED, "").removeprefix(_PREFIX)


def _parts_of(
    model: nn.Module, adapter_name: str
) -> tuple[dict[str, Tensor], dict[str, SnellaLayer], list[TokenAdapter]]:
    """The tensors of an adapter in the model and its layers, by their names in a file, and its tokens."""
    found: dict[str, Tensor] = {}
    layers: dict[str, SnellaLayer] = {}
    tokens: list[TokenAdapter] = []
    for name, module in model.named_modules():
        if isinstance(module, (SnellaLayer, TokenAdapter)):
            for attribute in module.saved_names:
                tensors: Any = getattr(module, attribute)
                if adapter_name in tensors:
                    found[f"{name}.{attribute}"] = tensors[adapter_name]
            if isinstance(module, TokenAdapter):
                tokens.append(module)
            elif adapter_name in module.snella_A:
                layers[_plain(name)] = module
        elif isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            inner = module.modules_to_save[adapter_name]
            found |= {f"{name}.{key}": tensor for key, tensor in inner.state_dict(keep_vars=True).items()}
    return {_plain(name): tensor.detach() for name, tensor in found.items()}, layers, tokens


def _check(
    config: SnellaConfig,
    other: SnellaConfig | None,
    own: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    *,
    is_finite: bool,
) -> None:
    """Refuse values that are not of an adapter like the model's."""
    errors = [
        f"{name} is {getattr(other, name)!r} where the model has {getattr(config, name)!r}"
        for name in _DECISIVE
        if other is not None and getattr(other, name) != getattr(config, name)
    ]
    errors += [f"{name} is missing" for name in own if name not in values]
    errors += [f"{name} fits nothing in the model" for name in values if name not in own]
    errors += [
        f"{name} is {list(values[name].shape)} where the model has {list(tensor.shape)}"
        for name, tensor in own.items()
        if name in values and values[name].shape != tensor.shape
    ]
    if not errors and not is_finite:
        errors = [f"{name} is not finite" for name, tensor in values.items() if not tensor.isfinite().all()]
    if errors:
        raise ValueError(
            f"the adapter cannot be swapped in: {listed(errors, 3, '; ')}; load it beside with load_adapter"
        )


__all__ = ["AdapterValues", "hotswap"]
