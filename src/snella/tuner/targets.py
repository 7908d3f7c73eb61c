"""Which modules of a model are adapted, and how fused ones are cut into matrices."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from itertools import product

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from snella.tuner.attention import AdaptedAttention, is_adaptable

_HEAD_NAMES = {"head", "heads", "head_dist", "classifier", "score", "fc", "lm_head", "qa_outputs"}
_PATCH_NAMES = {"patch_embed", "patch_embedding", "patch_embeddings", "downsample", "patch_merging"}
_FUSED_NAMES = {"qkv", "Wqkv", "to_qkv", "qkv_proj", "c_attn", "in_proj", "kv"}

# by class name, so that neither library has to be imported
_DEFAULT_TARGETS: dict[str, str | list[str]] = {
    "SD3Transformer2DModel": ["to_q", "to_k", "to_v", "to_out.0"],
    "SamModel": r"vision_encoder\.layers\.\d+\.(attn\.(qkv|proj)|mlp\.lin\d)",
}


def default_targets(model: nn.Module) -> str | list[str]:
    """Return the modules that the paper adapts in this kind of model, `"all-linear"` where it has no special rule."""
    return _DEFAULT_TARGETS.get(type(model).__name__, "all-linear")


def all_linear_names(model: nn.Module) -> list[str]:
    """Return the names of all linear layers of any model that the method adapts.

    Linear layers, transformers' `Conv1D`, and `nn.MultiheadAttention` with its output projection, also those that carry
    adapters already; left out are the head, patch embedding and patch merging, and what lies inside of adapters.
    """
    heads = _head_modules(model)
    names = []
    inside: list[str] = []
    for name, module in model.named_modules():
        parts = name.split(".")
        if any(name.startswith(prefix) for prefix in inside) or module in heads or parts[0] in _HEAD_NAMES:
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper, nn.MultiheadAttention, AdaptedAttention)):
            inside.append(name + ".")
        if is_adaptable(module) and name and not _PATCH_NAMES.intersection(parts):
            names += [name, f"{name}.out_proj"]
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if isinstance(base, (nn.Linear, Conv1D)) and name and not _PATCH_NAMES.intersection(parts):
            names.append(name)
    return names


def _head_modules(model: nn.Module) -> set[nn.Module]:
    """The modules that the model, or a model within it, calls its classifier or its output embedding."""
    heads: set[nn.Module] = set()
    for module, method in product(model.modules(), ("get_classifier", "get_output_embeddings")):
        getter = getattr(module, method, None)
        if not callable(getter):
            continue
        try:
            found = getter()
        except (AttributeError, NotImplementedError):
            # timm and transformers define these methods in base classes, whether or not the model has such a part
            continue
        heads.update(m for m in (found if isinstance(found, Iterable) else [found]) if isinstance(m, nn.Module))
    return heads


def block_number(name: str, layers_pattern: list[str] | str | None) -> int | None:
    """Return the number of the block that module `name` lies in, `None` outside of blocks.

    Args:
        name: Full name of the module.
        layers_pattern: Names of the lists of blocks, default whatever comes before the first number.
    """
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern or [r"[^.]+"]
    for pattern in patterns:
        match = re.match(rf"(?:.*?\.)??(?:{pattern})\.(\d+)\.", name)
        if match:
            return int(match.group(1))
    return None


def count_rows(
    name: str,
    out_features: int,
    in_features: int,
    parent: nn.Module,
    qkv_groups: int | str | dict[str, int | list[int]],
) -> tuple[int, ...]:
    """Return the row counts of the matrices that the weight of module `name` consists of.

    Args:
        name: Full name of the module.
        out_features: Rows of its weight.
        in_features: Columns of its weight.
        parent: The module that holds it; its configuration tells how many key-value heads there are.
        qkv_groups: See `SnellaConfig`.

    Raises:
        ValueError: A number of groups that does not divide the rows, or row counts that do not sum to them.
    """
    suffix = name.rpartition(".")[2]
    wanted: int | list[int] = 1
    if isinstance(qkv_groups, dict):
        keys = [key for key in qkv_groups if name == key or name.endswith(f".{key}")]
        wanted = qkv_groups[max(keys, key=len)] if keys else 1
    elif suffix in _FUSED_NAMES:
        wanted = qkv_groups if isinstance(qkv_groups, int) else _recognise(suffix, out_features, in_features, parent)
    counts = [out_features // wanted] * wanted if isinstance(wanted, int) else list(wanted)
    if sum(counts) != out_features or any(count < 1 for count in counts):
        raise ValueError(
            f"qkv_groups={qkv_groups!r} cuts {name!r} into rows {counts}, but it has {out_features} rows; "
            f"give a number that divides {out_features} or a list that sums to it"
        )
    return tuple(counts)


def _recognise(suffix: str, out_features: int, in_features: int, parent: nn.Module) -> int | list[int]:
    """Tell how a layer with a fused one's name is laid out: equal parts, or fewer rows for keys and values."""
    if suffix == "kv":
        return 2 if out_features % 2 == 0 else 1
    config = getattr(parent, "config", None)
    heads, kv_heads = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    if heads and kv_heads and kv_heads != heads and out_features % (heads + 2 * kv_heads) == 0:
        width = out_features // (heads + 2 * kv_heads)
        return [heads * width, kv_heads * width, kv_heads * width]
    if out_features == 3 * in_features:
        return 3
    return 3 if suffix in {"qkv", "Wqkv", "to_qkv"} and out_features % 3 == 0 else 1


def unmatched_message(targets: Iterable[str] | str, model: nn.Module) -> str:
    """Say that `targets` match nothing, what is near, and what the model has."""
    wanted = [targets] if isinstance(targets, str) else sorted(targets)
    names = all_linear_names(model)
    endings = {".".join(name.split(".")[-k:]) for name in names for k in (1, 2)}
    near = [match for target in wanted for match in get_close_matches(target.split(".")[-1], endings, 2)]
    kinds: dict[str, str] = {}
    for name in names:
        kinds.setdefault(".".join(part for part in name.split(".") if not part.isdigit()), name)
    message = f"no module matches target_modules={wanted if not isinstance(targets, str) else targets!r}"
    if kinds:
        message += f"; this model has e.g. {', '.join(map(repr, list(kinds.values())[:4]))}"
    return message + (f"; did you mean {', '.join(map(repr, dict.fromkeys(near)))}?" if near else "")
