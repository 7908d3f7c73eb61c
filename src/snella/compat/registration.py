"""Makes PEFT know the tuner: the only lines of the project that change anything of PEFT's.

PEFT's own `register_peft_method` refuses names outside of its enumeration, so the tables get the string `"SNELLA"`,
which they look up all the same. A test tells when PEFT gains a member of that name.

`get_base_model_state_dict` and its counterpart ask one function for the name that a parameter had before the model was
adapted. It knows the layers of PEFT and nothing of an attention that holds several of them, and offers no place to
say so; it is wrapped, and does what it did for everything else.

So is the method that tells accelerate where a file on disk has an adapter's tensors: it knows names that end in the
adapter and `weight`, and has no place for those that end in the adapter alone.
"""

from __future__ import annotations

import functools
from typing import Any

from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import save_and_load

from snella.compat.attention import find_wrapped_attention
from snella.config import PEFT_TYPE, SnellaConfig
from snella.model import SnellaModel

_KEY_FUNCTION = "_peft_key_to_original_key"
_OFFLOAD_METHOD = "_update_offload"


def register() -> None:
    """Enter the tuner into PEFT's tables; doing it twice changes nothing."""
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
    """PEFT's function from a key to the one before adapting, which also passes over the wrapper of an attention."""

    @functools.wraps(original_key)
    def with_attentions(model: Any, peft_key: str) -> str:
        found = find_wrapped_attention(model.base_model.model, peft_key)
        if found is None:
            return str(original_key(model, peft_key))
        wrapper, parameter = found
        return f"{original_key(model, wrapper)}.{parameter}"

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
