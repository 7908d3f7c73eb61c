"""Local weight files: read into one flat state dict, then fitted strictly into a model."""

import argparse
import logging
import pickle
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from snella.backbones.data_config import update_config
from snella.backbones.google_npz import read_google_npz
from snella.backbones.origins import GOOGLE, Origin, encoder_alone, origin_of
from snella.backbones.strict_fit import faults, listed

__all__ = ["WEIGHT_SUFFIXES", "Checkpoint", "load_weights", "read_checkpoint", "weight_suffix"]

_logger = logging.getLogger(__name__)
_TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".pth.tar")
WEIGHT_SUFFIXES = (*_TORCH_SUFFIXES, ".safetensors", ".npz")
_NESTED_UNDER = ("state_dict", "model", "model_state_dict")
_WRAPPERS = ("module.", "_orig_mod.", "model.")
_TABLE = "relative_position_bias_table"


@dataclass(frozen=True)
class Checkpoint:
    """Tensors of a weight file by name, the number of attention heads where the file tells it, and its publisher."""

    state: dict[str, Tensor]
    source: Path
    num_heads: int | None = None
    origin: Origin | None = None


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a weight file; no code inside it is run.

    Dictionaries nested under `state_dict`, `model` or `model_state_dict` are opened, and prefixes that wrappers put
    before every name (`module.`, `_orig_mod.`, `model.`) are removed. Google's `.npz` comes out in timm's names; of a
    checkpoint that holds a whole pre-training (MAE's decoder, MoCo v3's second encoder) the encoder alone.

    Args:
        path: File ending in one of `WEIGHT_SUFFIXES`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Another kind of file, a damaged one, or one without tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"weights '{path}': no such file")
    suffix = weight_suffix(path)
    if suffix == ".npz":
        state, heads = read_google_npz(path)
        return Checkpoint(state, path, heads, GOOGLE)
    if suffix == ".safetensors":
        content = _read_safetensors(path)
    elif suffix in _TORCH_SUFFIXES:
        content = _read_torch(path)
    else:
        raise ValueError(f"weights '{path}' must end in one of {', '.join(WEIGHT_SUFFIXES)}, got {path.suffix!r}")
    state, left_out = encoder_alone(_unwrap(_open_nested(content, path)))
    if left_out is not None:
        _logger.info("of '%s' the encoder alone is taken; left out: %s", path, left_out)
    origin = origin_of(state)
    heads_by_width = origin.num_heads if origin is not None else {}
    num_heads = heads_by_width.get(state["pos_embed"].shape[-1]) if heads_by_width else None
    return Checkpoint(state, path, num_heads, origin)


def weight_suffix(path: Path) -> str:
    """The ending of a file's name that tells its kind, of two parts for `.pth.tar`."""
    return next((suffix for suffix in WEIGHT_SUFFIXES if path.name.endswith(suffix)), path.suffix)


def load_weights(model: nn.Module, checkpoint: Checkpoint, *, name: str) -> None:
    """Copy a checkpoint into a timm model, every tensor of it but a head of another class count.

    timm's own filter of the model's family is applied: it knows foreign namings and resamples positions.

    Args:
        model: Model of timm, fresh from `create_model`; it is changed in place.
        checkpoint: What `read_checkpoint` returned.
        name: The backbone as the user typed it, for messages.

    Where the content tells who published the weights, the model's data config takes their mean and standard deviation.

    Raises:
        ValueError: Tensors are missing, unexpected or of another shape; each is named with its shapes.
    """
    reference = model.state_dict()
    _check_patch_and_heads(model, checkpoint, name, reference)
    _check_position_tables(checkpoint, name, reference)
    state = _filtered(model, checkpoint, name)
    heads = _head_names(model)
    state = _without_other_head(state, reference, heads, checkpoint.source)
    found = faults(
        state,
        reference,
        may_lack=tuple(f"{head}." for head in heads),
        may_lack_endings=("num_batches_tracked",),
    )
    if found:
        raise ValueError(f"weights '{checkpoint.source}' do not fit backbone {name!r}: {'; '.join(found)}")
    model.load_state_dict(state, strict=False)
    _take_normalisation(model, checkpoint)


def _take_normalisation(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Note the mean and standard deviation of the weights' publisher in the model's data config."""
    origin, cfg = checkpoint.origin, dict(getattr(model, "pretrained_cfg", None) or {})
    if origin is None or not cfg:
        return
    if (tuple(cfg["mean"]), tuple(cfg["std"])) != (origin.mean, origin.std):
        _logger.info(
            "'%s' holds weights of %s: images are normalised with mean %s and std %s",
            *(checkpoint.source, origin.label, origin.mean, origin.std),
        )
    update_config(model, mean=origin.mean, std=origin.std)


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
        seen = f"a dictionary with {listed(map(str, content))}" if isinstance(content, dict) else type(content).__name__
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


def _check_position_tables(checkpoint: Checkpoint, name: str, reference: dict[str, Tensor]) -> None:
    """Refuse Swin's position tables of another number of heads, or of blocks that the model lacks.

    timm's filter resizes tables to the model's window, and fails or resizes heads where these differ.
    """
    file, own = (
        # one row of each: the number of rows may differ, the number of heads may not
        {key: value[:1] for key, value in part.items() if key.endswith(_TABLE)}
        for part in (checkpoint.state, reference)
    )
    found = faults(file, own, may_lack=tuple(own)) if own else []
    if found:
        raise ValueError(f"weights '{checkpoint.source}' do not fit backbone {name!r}: {'; '.join(found)}")


def _filtered(model: nn.Module, checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    """The checkpoint through the filter that timm has for the model's family."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return dict(checkpoint.state)
    try:
        with warnings.catch_warnings():
            # timm's resampling of Swin's tables: about its speed, and about how it writes an index
            warnings.filterwarnings("ignore", message="torch.searchsorted|Using a non-tuple sequence")
            return convert(dict(checkpoint.state), model)
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError) as error:
        raise ValueError(
            f"weights '{checkpoint.source}' do not fit backbone {name!r}: timm cannot convert them ({error}); "
            f"the file holds {listed(f'{k} {list(v.shape)}' for k, v in checkpoint.state.items())}"
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
