"""Loading a causal language model and its tokenizer."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from snella.backbones.hub import cache_only_if_unreachable


def load_model(name: str, dtype: torch.dtype) -> nn.Module:
    """Load a model onto the CPU.

    Args:
        name: Local folder in transformers' format, or a name on the hub.
        dtype: Of its weights.

    Raises:
        FileNotFoundError: The folder holds no causal language model.
        ConnectionError: No folder, and neither the hub nor its cache has it.
    """
    model: nn.Module = _load(AutoModelForCausalLM, name, dtype=dtype)
    return model


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer that belongs to a model; raises as `load_model`.

    One without a padding token pads with its unknown token, or else with its end token; neither is looked at.
    """
    tokenizer = _load(AutoTokenizer, name)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def _load(kind: Any, name: str, **options: Any) -> Any:
    """A model or a tokenizer, without the library's progress bars."""
    log = transformers.utils.logging
    was_shown = log.is_progress_bar_enabled()
    log.disable_progress_bar()
    try:
        folder = Path(name).expanduser()
        if folder.is_dir():
            try:
                return kind.from_pretrained(folder, local_files_only=True, **options)
            except (OSError, ValueError) as fault:
                raise FileNotFoundError(
                    f"model must be a folder with a causal language model and its tokenizer, got '{folder}': "
                    f"{str(fault).strip().splitlines()[0]}"
                ) from fault
        with cache_only_if_unreachable() as reason:
            try:
                return kind.from_pretrained(name, local_files_only=bool(reason), **options)
            except (OSError, ValueError) as fault:
                why = f"the hub could not be reached ({reason}), nor is it in its cache" if reason else str(fault)
                raise ConnectionError(
                    f"model {name!r} is no folder here, and {why}; pass a local folder in transformers' format"
                ) from fault
    finally:
        if was_shown:
            log.enable_progress_bar()
