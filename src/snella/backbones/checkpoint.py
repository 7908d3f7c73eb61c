"""Local weight files: read into one flat state dict, then fitted strictly into a model."""

import argparse
import logging
import pickle
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from snella.backbones.google_npz import read_google_npz

__all__ = ["WEIGHT_SUFFIXES", "Checkpoint", "load_weights", "read_checkpoint"]

_logger = logging.getLogger(__name__)
_TORCH_SUFFIXES = (".pth", ".pt", ".bin")
WEIGHT_SUFFIXES = (*_TORCH_SUFFIXES, ".safetensors", ".npz")
_NESTED_UNDER = ("state_dict", "model", "model_state_dict")
_WRAPPERS = ("module.", "_orig_mod.", "model.")
_SHOWN = 5


@dataclass(frozen=True)
class Checkpoint:
    """Tensors of a weight file by name, and the number of attention heads where the file tells it."""

    state: dict[str, Tensor]
    source: Path
    num_heads: int | None = None


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a weight file; no code inside it is run.

    Dictionaries nested under `state_dict`, `model` or `model_state_dict` are opened, and prefixes that wrappers put
    before every name (`module.`, `_orig_mod.`, `model.`) are removed. Google's `.npz` comes out in timm's names.

    Args:
        path: File ending in one of `WEIGHT_SUFFIXES`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Another kind of file, a damaged one, or one without tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"weights '{path}': no such file")
    if path.suffix == ".npz":
        state, num_heads = read_google_npz(path)
        return Checkpoint(state, path, num_heads)
    if path.suffix == ".safetensors":
        content = _read_safetensors(path)
    elif path.suffix in _TORCH_SUFFIXES:
        content = _read_torch(path)
    else:
        raise ValueError(f"weights '{path}' must end in one of {', '.join(WEIGHT_SUFFIXES)}, got {path.suffix!r}")
    return Checkpoint(_unwrap(_open_nested(content, path)), path)


def load_weights(model: nn.Module, checkpoint: Checkpoint, *, name: str) -> None:
    """Copy a checkpoint into a timm model, every tensor of it but a head of another class count.

    timm's own filter of the model's family is applied: it knows foreign namings and resamples positions.

    Args:
        model: Model of timm, fresh from `create_model`; it is changed in place.
        checkpoint: What `read_checkpoint` returned.
        name: The backbone as the user typed it, for messages.

    Raises:
        ValueError: Tensors are missing, unexpected or of another shape; each is named with its shapes.
    """
    reference = model.state_dict()
    _check_patch_and_heads(model, checkpoint, name, reference)
    state = _filtered(model, checkpoint, name)
    heads = _head_names(model)
    state = _without_other_head(state, reference, heads, checkpoint.source)
    faults = _faults(state, reference, heads)
    if faults:
        raise ValueError(f"weights '{checkpoint.source}' do not fit backbone {name!r}: {'; '.join(faults)}")
    model.load_state_dict(state, strict=False)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file, naming it where it is damaged."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"weights '{path}' are not a readable safetensors file: {error}") from error


def _read_torch(path: Path) -> Any:
    """Unpickle tensors only; `argparse.Namespace` is let through, as training scripts store their options so."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"weights '{path}' cannot be read as tensors (files with code inside are refused): {first}"
        ) from error


def _open_nested(content: Any, path: Path) -> dict[str, Tensor]:
    """The dictionary of tensors inside what the file holds."""
    while isinstance(content, dict):
        key = next((key for key in _NESTED_UNDER if isinstance(content.get(key), dict)), None)
        if key is None:
            break
        content = content[key]
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)} if _is_dict(content) else {}
    if not tensors:
        seen = (
            f"a dictionary with {_listed(map(str, content))}" if isinstance(content, dict) else type(content).__name__
        )
        raise ValueError(f"weights '{path}' must hold a dictionary of tensors, found {seen}")
    return tensors


def _is_dict(content: Any) -> bool:
    return isinstance(content, dict) and all(isinstance(key, str) for key in content)


def _unwrap(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes that DDP, `torch.compile` and Lightning put before every name."""
    while True:
        prefix = next((prefix for prefix in _WRAPPERS if all(key.startswith(prefix) for key in state)), None)
        if prefix is None:
            return state
        state = {key.removeprefix(prefix): value for key, value in state.items()}


def _check_patch_and_heads(model: nn.Module, checkpoint: Checkpoint, name: str, reference: dict[str, Tensor]) -> None:
    """Refuse what timm's filter would silently resample, and what shapes alone do not tell."""
    key = "patch_embed.proj.weight"
    if key in checkpoint.state and key in reference:
        found, wanted = checkpoint.state[key].shape, reference[key].shape
        if len(found) == len(wanted) == 4 and found != wanted:
            raise ValueError(
                f"weights '{checkpoint.source}' do not fit backbone {name!r}: 1 of another shape "
                f"({key}: file {list(found)}, model {list(wanted)})"
            )
    blocks = getattr(model, "blocks", None)
    num_heads = getattr(getattr(blocks[0], "attn", None), "num_heads", None) if blocks is not None else None
    if checkpoint.num_heads is not None and num_heads is not None and checkpoint.num_heads != num_heads:
        raise ValueError(
            f"weights '{checkpoint.source}' have {checkpoint.num_heads} attention heads, "
            f"backbone {name!r} has {num_heads}"
        )


def _filtered(model: nn.Module, checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    """The checkpoint through the filter that timm has for the model's family."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return dict(checkpoint.state)
    try:
        return convert(dict(checkpoint.state), model)
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError) as error:
        raise ValueError(
            f"weights '{checkpoint.source}' do not fit backbone {name!r}: timm cannot convert them ({error}); "
            f"the file holds {_listed(f'{k} {list(v.shape)}' for k, v in checkpoint.state.items())}"
        ) from error


def _head_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the classifier layers, e.g. `head`, or two for a distilled model."""
    heads = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    return (heads,) if isinstance(heads, str) else tuple(heads)


def _without_other_head(
    state: dict[str, Tensor], reference: dict[str, Tensor], heads: tuple[str, ...], source: Path
) -> dict[str, Tensor]:
    """Leave out a head whose class count differs from the model's, or that the model lacks."""
    for head in heads:
        weight, wanted = state.get(f"{head}.weight"), reference.get(f"{head}.weight")
        if weight is not None and (wanted is None or weight.shape[0] != wanted.shape[0]):
            _logger.info("head of %d classes in '%s' left out; the new one starts at random", weight.shape[0], source)
            state = {key: value for key, value in state.items() if not key.startswith(f"{head}.")}
    return state


def _faults(state: dict[str, Tensor], reference: dict[str, Tensor], heads: tuple[str, ...]) -> list[str]:
    """What keeps `state` from fitting `reference`, in words; empty where it fits."""
    may_lack = tuple(f"{head}." for head in heads)
    missing = [
        f"{key} {list(value.shape)}"
        for key, value in reference.items()
        if key not in state and not key.startswith(may_lack) and not key.endswith("num_batches_tracked")
    ]
    unexpected = [f"{key} {list(value.shape)}" for key, value in state.items() if key not in reference]
    reshaped = [
        f"{key}: file {list(value.shape)}, model {list(reference[key].shape)}"
        for key, value in state.items()
        if key in reference and value.shape != reference[key].shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
    return [f"{len(found)} {kind} ({_listed(found)})" for kind, found in kinds if found]


def _listed(items: Iterable[str]) -> str:
    """The first few items, and how many more there are."""
    shown = list(items)
    rest = len(shown) - _SHOWN
    return ", ".join(shown[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
