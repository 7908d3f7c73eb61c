"""Trains bare parameters of the base model, such as `cls_token`: one value an adapter, switched with the adapter."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any, Self

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn


class _BaseToken(nn.Module):
    """Holds the pre-trained parameter where PEFT looks for what an adapter wraps."""

    weight: nn.Parameter

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        # past `register_parameter`, which PEFT's `low_cpu_mem_usage` makes move everything to the meta device
        self._parameters["weight"] = weight


class TokenAdapter(nn.Module, BaseTunerLayer):
    """The values of one parameter of `owner`: the pre-trained one and one for each adapter.

    The parameter moves in here, and `owner.<name>` becomes a plain attribute that always is the value in use, so that
    every way of calling the model sees it. Like a module in `modules_to_save`, it can follow one active adapter only.

    Args:
        owner: Module that the parameter belongs to.
        name: Name of the parameter in `owner`.
    """

    adapter_layer_names = ("snella_token",)
    other_param_names = ()
    saved_names = adapter_layer_names

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__()
        weight = owner._parameters[name]
        if weight is None:
            raise ValueError(f"{type(owner).__name__}.{name} must be a parameter, got None")
        self.parameter_name = name
        # in a tuple, or torch would make the owner a child of its own child
        self._owner = (owner,)
        self.base_layer = _BaseToken(weight)
        self.snella_token = nn.ParameterDict({})
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = []
        self._unmerged_weight: Tensor | None = None
        self.register_load_state_dict_post_hook(_relink)
        # an empty place keeps the order of the owner's parameters for `remove`
        owner._parameters[name] = None
        owner.add_module(self.attribute, self)
        self._link()

    @property
    def attribute(self) -> str:
        """Name of this module in its owner."""
        return f"{self.parameter_name}_adapter"

    def update_layer(self, adapter_name: str, active_adapters: list[str], inference_mode: bool) -> None:
        """Give the parameter one more adapter, starting at the pre-trained value."""
        start = self._unmerged_weight if self._unmerged_weight is not None else self.base_layer.weight
        self.snella_token[adapter_name] = nn.Parameter(start.detach().clone(), requires_grad=False)
        if adapter_name in active_adapters:
            self.set_adapter(active_adapters, inference_mode)
        else:
            self._active_adapter = active_adapters

    def check_active(self, adapter_names: str | list[str]) -> None:
        """Raise `ValueError` if more than one of `adapter_names` trains this parameter."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        holders = [name for name in names if name in self.snella_token]
        if len(holders) > 1:
            raise ValueError(
                f"parameters_to_save: {self.parameter_name!r} has a value of its own in each of the adapters "
                f"{holders}, and only one can be in use; activate or merge one of them at a time"
            )

    def _link(self) -> None:
        """Let the owner's attribute be the value in use."""
        names = [] if self.disable_adapters or self.merged else self.active_adapters
        holders = [name for name in names if name in self.snella_token]
        value = self.snella_token[holders[0]] if holders else self.base_layer.weight
        self._owner[0].__dict__[self.parameter_name] = value

    def remove(self) -> None:
        """Give the parameter back to its owner and leave no trace."""
        owner = self._owner[0]
        owner.__dict__.pop(self.parameter_name, None)
        owner._parameters[self.parameter_name] = self.base_layer.weight
        owner._modules.pop(self.attribute, None)

    # what may change the value in use ------------------------------------------------------------------------------

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:  # noqa: D102
        self.check_active(adapter_names)
        if self.merged:
            self.unmerge()
        super().set_adapter(adapter_names, inference_mode)
        self._link()

    def enable_adapters(self, enabled: bool) -> None:  # noqa: D102
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)
        self._link()

    def delete_adapter(self, adapter_name: str) -> None:  # noqa: D102
        active = [name for name in self.active_adapters if name != adapter_name]
        if adapter_name in self.snella_token:
            del self.snella_token[adapter_name]
        self._active_adapter = active
        self._link()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write an adapter's value into the parameter; `unmerge` restores it.

        Raises:
            ValueError: More than one adapter has a value, or `safe_merge` found one that is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.snella_token]
        self.check_active([*self.merged_adapters, *names])
        if not names:
            return
        value = self.snella_token[names[0]].detach()
        if safe_merge and not torch.isfinite(value).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {names[0]} seems to be broken")
        self._unmerged_weight = self.base_layer.weight.detach().clone()
        self.base_layer.weight.data.copy_(value)
        self.merged_adapters.extend(names)
        self._link()

    def unmerge(self) -> None:
        """Restore the pre-trained value."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self._unmerged_weight is not None:
            self.base_layer.weight.data.copy_(self._unmerged_weight)
        self._unmerged_weight = None
        self.merged_adapters.clear()
        self._link()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._link()
        return self

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # also the dtype: half-precision tokens must not become float32, or everything after them would
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        self._link()


def _relink(module: nn.Module, _: Any) -> None:
    """After loading, which may have put another tensor into the place of a parameter."""
    if isinstance(module, TokenAdapter):
        module._link()


def token_adapters(model: nn.Module) -> list[TokenAdapter]:
    """All of a model, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, TokenAdapter)]


def find_tokens(model: nn.Module, names: Iterable[str], *, is_required: bool) -> list[str]:
    """Return the full names of the parameters called `names`, which may be suffixes.

    Raises:
        ValueError: `is_required`, and a name matches no parameter.
    """
    present = [f"{prefix}{name}" for prefix, _, name in _bare_parameters(model)]
    found: list[str] = []
    for wanted in names:
        matches = [name for name in present if name == wanted or name.endswith(f".{wanted}")]
        if is_required and not matches:
            endings = {name.rpartition(".")[2]: name for name in present}
            near = get_close_matches(wanted.rpartition(".")[2], endings, 2)
            hint = f"; did you mean {', '.join(repr(endings[name]) for name in near)}?" if near else ""
            raise ValueError(f"parameters_to_save={wanted!r} is no parameter of {type(model).__name__}{hint}")
        found.extend(name for name in matches if name not in found)
    return found


def attach_tokens(
    model: nn.Module, names: Iterable[str], adapter_name: str, active_adapters: list[str], inference_mode: bool
) -> None:
    """Give the parameters of these full names a value for `adapter_name`."""
    wanted = set(names)
    for prefix, owner, name in list(_bare_parameters(model)):
        if f"{prefix}{name}" in wanted:
            adapter = owner._modules.get(f"{name}_adapter")
            if not isinstance(adapter, TokenAdapter):
                adapter = TokenAdapter(owner, name)
            adapter.update_layer(adapter_name, active_adapters, inference_mode)


def _bare_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Every parameter that no adapter wraps, and those that a `TokenAdapter` holds: prefix, owner, name."""
    inside: list[str] = []
    for prefix, module in model.named_modules():
        if any(prefix.startswith(outer) for outer in inside):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inside.append(f"{prefix}.")
            if isinstance(module, TokenAdapter):
                owner = prefix.rpartition(".")[0]
                yield f"{owner}." if owner else "", module._owner[0], module.parameter_name
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{prefix}." if prefix else "", module, name
