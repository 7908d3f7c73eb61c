"""Registration of the method with PEFT; the only module that modifies PEFT.

PEFT's `register_peft_method` rejects names outside its enum, so `register` adds the string `"SNELLA"` to the mapping
tables as a key. A test fails once PEFT adds an enum member of this name.

`register` also wraps two functions of PEFT that have no extension point. They treat all other parameters as before.

- `_peft_key_to_original_key` maps a parameter to its original name, for `get_base_model_state_dict` and
  `set_base_model_state_dict`. The wrapper supports attentions with several adapted projections.
- `PeftModel._update_offload` builds accelerate's offload index. The wrapper supports parameter names that end in the
  adapter's name.
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


def register() -> None:
    """Add the method to PEFT's tables and wrap PEFT's functions. Idempotent."""
    tables: tuple[tuple[dict[Any, Any], Any], ...] = (
        (PEFT_TYPE_TO_CONFIG_MAPPING, SnellaConfig),
        (PEFT_TYPE_TO_TUNER_MAPPING, SnellaModel),
        (PEFT_TYPE_TO_PREFIX_MAPPING, SnellaModel.prefix),
    )
    for table, value in tables:
        table[PEFT_TYPE] = value
    original_key = getattr(save_and_load, _KEY_FUNCTION, None)
    if original_key is not None and not hasattr(original_key, "__wrapped__"):
        setattr(save_and_load, _KEY_FUNCTION, _with_attentions(original_key))
    update_offload = getattr(PeftModel, _OFFLOAD_METHOD, None)
    if update_offload is not None and not hasattr(update_offload, "__wrapped__"):
        setattr(PeftModel, _OFFLOAD_METHOD, _with_parameters(update_offload))


def _with_attentions(original_key: Any) -> Any:
    """Wrap PEFT's mapping from keys to original names to support adapted attentions."""

    @functools.wraps(original_key)
    def with_attentions(model: Any, peft_key: str) -> str:
        wrapper, _, parameter = peft_key.rpartition(".base_layer.")
        with suppress(AttributeError):
            if isinstance(model.base_model.model.get_submodule(wrapper), AdaptedAttention):
                return f"{original_key(model, wrapper)}.{parameter}"
        return str(original_key(model, peft_key))

    return with_attentions


def _with_parameters(update_offload: Any) -> Any:
    """Wrap `PeftModel._update_offload` to use SNELLA's parameter names in accelerate's offload index."""

    @functools.wraps(update_offload)
    def with_parameters(self: PeftModel, offload_index: Any, adapters_weights: Any) -> Any:
        result = update_offload(self, offload_index, adapters_weights)
        for key in list(offload_index or ()):
            module, _, parameter = key.rpartition(".")
            module, _, adapter_name = module.rpartition(".")
            if parameter.startswith(SnellaModel.prefix) and adapter_name in self.peft_config:
                offload_index[f"{module}.{parameter}.{adapter_name}"] = offload_index.pop(key)
        return result

    return with_parameters


register()
