"""Trainable bare parameters, such as `cls_token`, with one value per adapter.

A bare parameter belongs to a module outside adapters, its owner, which reads it directly. A `TokenAdapter` holds the
parameter's values, and the owner reads the active one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn, Self, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from snella._utils import did_you_mean, has_suffix
from snella.compat.hooks import NO_DATA_PARALLEL


class _BaseToken(nn.Module):
    """Base layer of a `TokenAdapter`; stores the pre-trained parameter as `weight`, as PEFT expects."""

    weight: nn.Parameter

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        # avoids `register_parameter`, which PEFT's `low_cpu_mem_usage` patches to move parameters to the meta device
        self._parameters["weight"] = weight


class _TokenValues(nn.ParameterDict):
    """Values by adapter. An assignment, e.g. by transformers' `load_adapter`, updates the owner's attribute."""

    def __init__(self, adapter: TokenAdapter) -> None:
        super().__init__()
        # a tuple, so that torch does not register the adapter as a submodule
        self._adapter = (adapter,)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # `_keys` also contains the names of the plain tensors that FSDP1 assigns during a pass
        if name in self.__dict__.get("_keys", ()):
            self._adapter[0]._link()


class TokenAdapter(nn.Module, BaseTunerLayer):
    """Layer for a bare parameter, with its pre-trained value and one trained value per adapter.

    The parameter moves into this module, and `owner.<name>` becomes a plain attribute with the active value. At most
    one active adapter may have a value for this parameter.

    Args:
        owner: Module that owns the parameter.
        name: Name of the parameter in `owner`.
    """

    adapter_layer_names = ("snella_token",)
    other_param_names = ()
    saved_names = adapter_layer_names

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__()
        self.parameter_name = name
        # a tuple, so that torch does not register the owner as a submodule
        self._owner = (owner,)
        self.base_layer = _BaseToken(cast(nn.Parameter, owner._parameters[name]))
        self.snella_token = _TokenValues(self)
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = []
        self._unmerged_weight: Tensor | None = None
        self.register_load_state_dict_post_hook(_relink)
        # the None entry preserves the order of the owner's parameters for `remove`
        owner._parameters[name] = None
        owner.add_module(self.attribute, self)
        self._link()

    def _replicate_for_data_parallel(self) -> NoReturn:
        """Reject `nn.DataParallel`: every replica would use the value on the first device."""
        raise NotImplementedError(NO_DATA_PARALLEL)

    @property
    def attribute(self) -> str:
        """Name of this module in `owner`."""
        return f"{self.parameter_name}_adapter"

    def update_layer(self, adapter_name: str, active_adapters: list[str], inference_mode: bool) -> None:
        """Add an adapter, initialized to the pre-trained value."""
        # while an adapter is merged, `weight` contains its value
        initial = self.base_layer.weight if self._unmerged_weight is None else self._unmerged_weight
        self.snella_token[adapter_name] = nn.Parameter(initial.detach().clone(), requires_grad=False)
        if adapter_name in active_adapters:
            self.set_adapter(active_adapters, inference_mode)
        else:
            self._active_adapter = active_adapters

    def check_active(self, adapter_names: str | list[str]) -> None:
        """Raise `ValueError` if more than one of `adapter_names` has a value for this parameter."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        names_with_value = [name for name in names if name in self.snella_token]
        if len(names_with_value) > 1:
            raise ValueError(
                f"parameters_to_save: {self.parameter_name!r} has a separate value in each of the adapters "
                f"{names_with_value}, but only one can be active; activate or merge one at a time"
            )

    def _link(self) -> None:
        """Set the owner's attribute to the active adapter's value, or to the base weight if there is none."""
        names = [] if self.disable_adapters or self.merged else self.active_adapters
        names_with_value = [name for name in names if name in self.snella_token]
        value = self.snella_token[names_with_value[0]] if names_with_value else self.base_layer.weight
        self._owner[0].__dict__[self.parameter_name] = value

    def remove(self) -> None:
        """Move the parameter back into its owner and remove this module."""
        owner = self._owner[0]
        owner.__dict__.pop(self.parameter_name, None)
        owner._parameters[self.parameter_name] = self.base_layer.weight
        owner._modules.pop(self.attribute, None)

    # active value --------------------------------------------------------------------------------------------------

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
        """Write an adapter's value into the parameter; `unmerge` restores the pre-trained value.

        Raises:
            ValueError: If more than one of the merged and requested adapters has a value, or `safe_merge` finds a
                non-finite value.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.snella_token]
        self.check_active([*self.merged_adapters, *names])
        if not names:
            return
        value = self.snella_token[names[0]].detach()
        if safe_merge and not torch.isfinite(value).all():
            # PEFT's wording
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
        """Apply `fn` to the values, e.g. to move them, and link the new active value."""
        super()._apply(fn, recurse)
        self._link()
        return self


def _relink(module: nn.Module, _: Any) -> None:
    """Update the owner's attribute after `load_state_dict`, which may replace the active value."""
    if isinstance(module, TokenAdapter):
        module._link()


def token_adapters(model: nn.Module) -> list[TokenAdapter]:
    """Return all `TokenAdapter`s of a model in module order."""
    return [module for module in model.modules() if isinstance(module, TokenAdapter)]


def find_tokens(model: nn.Module, names: Iterable[str], *, is_required: bool) -> list[str]:
    """Return the full names of the bare parameters that match `names`, which may be suffixes.

    Raises:
        ValueError: If two matches are the same parameter under different names, or, with `is_required`, if a name
            matches no parameter.
    """
    parameters = {f"{prefix}{name}": owner._parameters.get(name) for prefix, owner, name in _bare_parameters(model)}
    full_names: list[str] = []
    for suffix in names:
        matches = [name for name in parameters if has_suffix(name, suffix)]
        if is_required and not matches:
            leaf = suffix.rpartition(".")[2]
            hint = did_you_mean(leaf, sorted({name.rpartition(".")[2] for name in parameters} - {leaf}))
            message = f"parameters_to_save={suffix!r} matches no parameter of {type(model).__name__} outside adapters"
            raise ValueError(f"{message}; {hint}" if hint else message)
        full_names.extend(name for name in matches if name not in full_names)
    first_names: dict[int, str] = {}
    for name in full_names:
        parameter = parameters[name]  # None for a parameter that another adapter trains already
        if parameter is None:
            continue
        first_name = first_names.setdefault(id(parameter), name)
        if first_name != name:
            raise ValueError(
                f"parameters_to_save matches a shared parameter twice, as {first_name!r} and {name!r}; give each "
                "module its own parameter"
            )
    return full_names


def attach_tokens(
    model: nn.Module, names: Iterable[str], adapter_name: str, active_adapters: list[str], inference_mode: bool
) -> None:
    """Add an adapter to the bare parameters with these full names."""
    full_names = set(names)
    # a list, because new adapters change the modules
    for prefix, owner, name in list(_bare_parameters(model)):
        if f"{prefix}{name}" in full_names:
            adapter = owner._modules.get(f"{name}_adapter")
            if not isinstance(adapter, TokenAdapter):
                adapter = TokenAdapter(owner, name)
            adapter.update_layer(adapter_name, active_adapters, inference_mode)


def _bare_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield the owner's prefix, the owner, and the name of every parameter outside adapters or in a `TokenAdapter`."""
    adapter_prefixes: list[str] = []
    for module_name, module in model.named_modules():
        if any(module_name.startswith(adapter_prefix) for adapter_prefix in adapter_prefixes):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            adapter_prefixes.append(f"{module_name}.")
            if isinstance(module, TokenAdapter):
                owner_name = module_name.rpartition(".")[0]
                prefix = f"{owner_name}." if owner_name else ""
                yield prefix, module._owner[0], module.parameter_name
            continue
        prefix = f"{module_name}." if module_name else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield prefix, module, name
