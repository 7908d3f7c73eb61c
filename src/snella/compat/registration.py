"""Registration of the method with PEFT; the only module that modifies PEFT.

PEFT's `register_peft_method` rejects names that are not in PEFT's enum, so `register` adds the string `"SNELLA"` to the
mapping tables as a key. A test fails once PEFT adds an enum member with this name.

`register` also wraps two PEFT functions that have no extension point. Parameters outside SNELLA are handled as before.

- `_peft_key_to_original_key` maps a parameter to its original name, for `get_base_model_state_dict` and
  `set_base_model_state_dict`. The wrapper removes the infix `base_layer` of an `AdaptedAttention` (an attention module
  with adapted projections), which PEFT does not recognize as a tuner layer.
- `PeftModel._update_offload` updates accelerate's offload index. The wrapper then renames SNELLA's keys in the index to
  the parameter names, which end with the adapter name.
"""

from __future__ import annotations

import functools
from contextlib import suppress
from typing import Any

from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import save_and_load

from snella.compat.attention import AdaptedAttention
from snella.config import PEFT_TYPE, SnellaConfig
from snella.model import SnellaModel

_KEY_FUNCTION = "_peft_key_to_original_key"
_OFFLOAD_METHOD = "_update_offload"
_MARK = "_is_snella_wrapper"  # attribute of the wrappers, so that they are not wrapped again


def register() -> None:
    """Add the method to PEFT's tables and wrap PEFT's functions. Further calls change nothing."""
    tables: tuple[tuple[dict[Any, Any], Any], ...] = (
        (PEFT_TYPE_TO_CONFIG_MAPPING, SnellaConfig),
        (PEFT_TYPE_TO_TUNER_MAPPING, SnellaModel),
        (PEFT_TYPE_TO_PREFIX_MAPPING, SnellaModel.prefix),
    )
    for table, value in tables:
        table[PEFT_TYPE] = value
    for owner, name, wrap in (
        (save_and_load, _KEY_FUNCTION, _strip_attention_infix),
        (PeftModel, _OFFLOAD_METHOD, _rename_offloaded_parameters),
    ):
        function = getattr(owner, name, None)
        if function is not None and not hasattr(function, _MARK):
            wrapper = wrap(function)
            setattr(wrapper, _MARK, True)
            setattr(owner, name, wrapper)


def _strip_attention_infix(original_key: Any) -> Any:
    """Wrap PEFT's mapping from keys to original names to support adapted attention modules."""

    @functools.wraps(original_key)
    def strip_attention_infix(model: Any, peft_key: str) -> str:
        wrapper, _, parameter = peft_key.rpartition(".base_layer.")
        with suppress(AttributeError):  # raised by `get_submodule` if there is no such module
            if isinstance(model.base_model.model.get_submodule(wrapper), AdaptedAttention):
                return f"{original_key(model, wrapper)}.{parameter}"
        return str(original_key(model, peft_key))

    return strip_attention_infix


def _rename_offloaded_parameters(update_offload: Any) -> Any:
    """Wrap `PeftModel._update_offload` to use SNELLA's parameter names in accelerate's offload index."""

    @functools.wraps(update_offload)
    def rename_offloaded_parameters(self: PeftModel, offload_index: Any, adapters_weights: Any) -> Any:
        result = update_offload(self, offload_index, adapters_weights)
        for key in list(offload_index or ()):
            prefix, _, parameter = key.rpartition(".")
            module, _, adapter_name = prefix.rpartition(".")
            if parameter.startswith(SnellaModel.prefix) and adapter_name in self.peft_config:
                offload_index[f"{module}.{parameter}.{adapter_name}"] = offload_index.pop(key)
        return result

    return rename_offloaded_parameters


register()
