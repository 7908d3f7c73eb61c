"""Target modules, matrices of fused layers, and heads of a model.

A target is a module to adapt. A fused layer, such as `qkv`, stacks several matrices in one weight, and each matrix has
its own budget of nonzero update entries. A head is a classifier or other predictor, which is not adapted by default.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from difflib import get_close_matches
from itertools import product
from typing import cast

import regex
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from snella._utils import longest_suffix
from snella.compat.attention import AdaptedAttention, is_adaptable
from snella.compat.quantization import find_quantization
from snella.layer import Conv2d, Linear, SnellaLayer
from snella.ops import orient, same_padding_totals

# names of heads among a model's direct children
_HEAD_NAMES = {"head", "heads", "head_dist", "classifier", "score", "fc", "lm_head", "qa_outputs", "proj_out"}
# names of prediction heads in DeiT and in detection and segmentation models, at any depth
_PREDICTOR_NAMES = {
    *("cls_classifier", "distillation_classifier", "class_labels_classifier", "bbox_predictor", "class_predictor"),
    *("mask_predictor", "mask_embedder", "class_embed", "bbox_embed", "enc_score_head", "enc_bbox_head"),
    *("class_head", "box_head", "decode_head", "auxiliary_head"),
}
# names of patch embedding and merging modules, at any depth
_PATCH_NAMES = {"patch_embed", "patch_embedding", "patch_embeddings", "downsample", "patch_merging", "x_embedder"}
_PATCH_CLASSES = ("PatchEmbed", "PatchMerging", "NaFlexEmbeds")  # substrings of class names
_MATCH_TIMEOUT_S = 5.0  # for all module names of a model; a typical expression takes a few milliseconds
_FUSED_NAMES = {"qkv", "Wqkv", "to_qkv", "qkv_proj", "c_attn", "in_proj", "kv"}
_OUTPUT_EMBEDDINGS = {"lm_head", "proj_out"}  # pre-trained with the model

_ADAPTABLE = (nn.Linear, Conv1D, nn.Conv2d)
# linear layers whose custom forward() computes the same product
_EQUIVALENT_LINEAR = {"transformers.models.falcon.modeling_falcon.FalconLinear"}
# alternatives for unsupported modules
_ALTERNATIVES = {
    nn.Embedding: "train single rows with trainable_token_indices, or the whole embedding with modules_to_save",
    nn.Conv1d: "train it in full with modules_to_save",
    nn.Conv3d: "train it in full with modules_to_save",
}

# keyed by class name, to avoid importing the libraries
_DEFAULT_TARGETS: dict[str, str | list[str]] = {
    "SD3Transformer2DModel": ["to_q", "to_k", "to_v", "to_out.0"],
    "SamModel": r"vision_encoder\.layers\.\d+\.(attn\.(qkv|proj)|mlp\.lin\d)",
}


def default_targets(model: nn.Module) -> str | list[str]:
    """Return the paper's targets for this model class, or `"all-linear"`."""
    return _DEFAULT_TARGETS.get(type(model).__name__, "all-linear")


def all_linear_names(model: nn.Module) -> list[str]:
    """Return the names of all linear layers to adapt.

    Includes linear layers, transformers' `Conv1D`, and `nn.MultiheadAttention` modules with their output projections,
    whether or not they are already adapted. Excludes the head, patch embedding, patch merging, and modules inside
    adapters.
    """
    names = []
    for name, module in _candidates(model):
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if is_adaptable(module):
            names += [name, f"{name}.out_proj"]
        elif isinstance(base, (nn.Linear, Conv1D)):
            names.append(name)
    return names


def plain_convolution_names(model: nn.Module) -> list[str]:
    """Return the names of the 2D convolutions to adapt in a model without linear layers outside its head.

    Includes ungrouped convolutions with the `forward` of `nn.Conv2d`. Excludes the model's first convolution (the
    stem), the head, patch embedding, downsampling between stages, modules inside adapters, and convolutions whose
    `padding="same"` is asymmetric (an even kernel size with an odd dilation).
    """
    stem = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    names = []
    for name, module in _candidates(model):
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if not isinstance(base, nn.Conv2d) or base is stem or base.groups > 1 or _overridden_methods(base):
            continue
        totals = same_padding_totals(base.kernel_size, base.dilation)
        is_asymmetric = base.padding == "same" and any(total % 2 for total in totals)
        if not is_asymmetric:  # adapted convolutions do not support asymmetric padding
            names.append(name)
    return names


def _candidates(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules outside the head, patch embedding, patch merging, `nn.MultiheadAttention`, and adapters.

    `nn.MultiheadAttention` modules and adapted layers are included themselves, without the modules inside them.
    """
    heads = _head_modules(model)
    candidates: list[tuple[str, nn.Module]] = []
    skipped_prefixes: list[str] = []
    for name, module in model.named_modules():
        parts = name.split(".")
        if any(name.startswith(prefix) for prefix in skipped_prefixes) or module in heads or parts[0] in _HEAD_NAMES:
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper, nn.MultiheadAttention, AdaptedAttention)):
            skipped_prefixes.append(name + ".")
        if name and any(part in type(module).__name__ for part in _PATCH_CLASSES):
            skipped_prefixes.append(name + ".")
            continue
        if name and not (_PREDICTOR_NAMES | _PATCH_NAMES).intersection(parts):
            candidates.append((name, module))
    return candidates


def describe_coverage(model: nn.Module, names: Iterable[str]) -> str | None:
    """Return a message about the weights that the targets exclude, or `None` if the targets cover at least half.

    The model must not have adapters yet. Its head, patch embedding, patch merging, and other embeddings do not count.
    """
    adapted = set(names)
    num_adapted = 0
    excluded = {}
    for name, module in _candidates(model):
        if name in adapted and isinstance(module, (nn.Linear, Conv1D, nn.Conv2d)):
            rows, columns = matrix_shape(module)
            num_adapted += rows * columns
        elif name in adapted:  # an attention module, all of whose projections are adapted
            num_adapted += sum(weight.numel() for weight in module.parameters() if weight.ndim > 1)
        elif not isinstance(module, nn.Embedding):
            for key, weight in module.named_parameters(recurse=False):
                # tokens and position embeddings have a leading axis of size 1
                if weight.ndim > 1 and weight.shape[0] > 1:
                    excluded[f"{name}.{key}"] = (type(module).__name__, weight)
    num_excluded = sum(weight.numel() for _, weight in excluded.values())
    if num_excluded <= num_adapted:
        return None
    # the largest excluded weight of each class
    example_by_class: dict[str, tuple[str, str, list[int]]] = {}
    for name, (owner_class, weight) in sorted(excluded.items(), key=lambda item: -item[1][1].numel()):
        example_by_class.setdefault(owner_class, (name, owner_class, list(weight.shape)))
    shown = list(example_by_class.values())[:3]
    examples = ", ".join(f"{name!r} {shape} of {owner_class}" for name, owner_class, shape in shown)
    return (
        f"the selected target_modules adapt {num_adapted / (num_adapted + num_excluded):.0%} of the weights of "
        f"{type(model).__name__}, not counting embeddings and head; {len(excluded)} other weight tensors remain "
        f"frozen, e.g. {examples}; add convolutions to target_modules, and train bare parameters such as experts and "
        "routers in full with parameters_to_save"
    )


def matches_expression(expression: str, name: str) -> bool:
    """Return whether a regular expression matches a full name, within a time limit.

    Args:
        expression: The expression, possibly from an untrusted adapter.
        name: Name of a module.

    Raises:
        ValueError: If matching exceeds the time limit, e.g. because of nested quantifiers.
    """
    try:
        return regex.fullmatch(expression, name, timeout=_MATCH_TIMEOUT_S) is not None
    except TimeoutError:
        raise _timeout_error(expression, name) from None


def check_expression(expression: str, names: Iterable[str]) -> None:
    """Raise `ValueError` if matching all names exceeds the time limit."""
    deadline = time.monotonic() + _MATCH_TIMEOUT_S
    for name in names:
        matches_expression(expression, name)
        if time.monotonic() > deadline:
            raise _timeout_error(expression, name)


def _timeout_error(expression: str, name: str) -> ValueError:
    """Return the error for an expression that exceeds the time limit."""
    return ValueError(
        f"the regular expression {expression!r} takes more than {_MATCH_TIMEOUT_S:g} s to match names such as "
        f"{name!r}; remove nested quantifiers, or pass a list of names"
    )


def block_number(name: str, layers_pattern: list[str] | str | None) -> int | None:
    """Return the index of the block that contains module `name`, or `None` outside blocks.

    Args:
        name: Full name of the module.
        layers_pattern: Names of the lists of blocks; defaults to the name part before the first index.
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
    """Return the row count of each matrix in the weight of module `name`.

    Args:
        name: Full name of the module.
        out_features: Rows of its weight.
        in_features: Columns of its weight.
        parent: Parent module; its `config`, if any, gives the numbers of attention and key-value heads.
        qkv_groups: See `SnellaConfig`.

    Raises:
        ValueError: If the number of groups does not divide `out_features`, or the row counts have a different sum.
    """
    suffix = name.rpartition(".")[2]
    groups: int | list[int] = 1
    if isinstance(qkv_groups, dict):
        key = longest_suffix(name, qkv_groups)
        groups = 1 if key is None else qkv_groups[key]
    elif suffix in _FUSED_NAMES:
        groups = qkv_groups if isinstance(qkv_groups, int) else _infer_groups(suffix, out_features, in_features, parent)
    counts = [out_features // groups] * groups if isinstance(groups, int) else list(groups)
    if sum(counts) != out_features:
        raise ValueError(
            f"qkv_groups={qkv_groups!r} splits {name!r} into rows {counts}, but it has {out_features} rows; "
            f"use a number that divides {out_features}, or map the name to a list of row counts with this sum"
        )
    return tuple(counts)


def _infer_groups(suffix: str, out_features: int, in_features: int, parent: nn.Module) -> int | list[int]:
    """Infer the layout of a fused layer: the number of equal parts, or row counts if k and v are smaller than q.

    Returns 1 if the layer does not look fused.
    """
    if suffix == "kv":
        return 2 if out_features % 2 == 0 else 1
    config = getattr(parent, "config", None)
    heads = getattr(config, "num_attention_heads", None)
    kv_heads = getattr(config, "num_key_value_heads", None)
    if heads and kv_heads and kv_heads != heads and out_features % (heads + 2 * kv_heads) == 0:
        width = out_features // (heads + 2 * kv_heads)
        return [heads * width, kv_heads * width, kv_heads * width]
    if out_features == 3 * in_features:
        return 3
    is_named_qkv = suffix in {"qkv", "Wqkv", "to_qkv"}
    return 3 if is_named_qkv and out_features % 3 == 0 else 1


def unmatched_message(targets: Iterable[str] | str, model: nn.Module) -> str:
    """Return the error message for `targets` that match no module, with example names and close matches."""
    is_expression = isinstance(targets, str)
    patterns = [targets] if isinstance(targets, str) else sorted(targets)
    names = all_linear_names(model)
    suffixes = {".".join(name.split(".")[-count:]) for name in names for count in (1, 2)}
    close_matches: list[str] = []
    for pattern in patterns:
        close_matches += get_close_matches(pattern.split(".")[-1], suffixes, 2)
    example_by_pattern: dict[str, str] = {}
    for name in names:
        name_pattern = ".".join(part for part in name.split(".") if not part.isdigit())
        example_by_pattern.setdefault(name_pattern, name)
    message = f"no module matches target_modules={targets if is_expression else patterns!r}"
    if example_by_pattern:
        message += f"; this model has e.g. {', '.join(map(repr, list(example_by_pattern.values())[:4]))}"
    if is_expression:
        message += "; a string is a regular expression for full names"
    suggestions = list(dict.fromkeys(close_matches))
    if suggestions:
        shown = str(suggestions) if is_expression else ", ".join(map(repr, suggestions))
        message += f"; did you mean {shown}?"
    return message


def choose_layer_class(base: nn.Module, name: str) -> type[SnellaLayer]:
    """Return the `SnellaLayer` subclass that adapts a module.

    Args:
        base: The module, without adapters.
        name: Full name of the module, for errors.

    Raises:
        NotImplementedError: If the module has a custom `forward` or an unsupported quantized weight.
        RuntimeError: If the module is a bitsandbytes layer that is not quantized yet.
        TypeError: If the module is neither linear nor a 2D convolution.
    """
    # attention modules with torch's own `forward` do not reach this function: their projections are adapted
    if isinstance(base, nn.MultiheadAttention):
        raise NotImplementedError(
            f"target_modules matches {name!r}, a {class_name(base)} with a custom forward(), which may use the "
            "weights differently; exclude it with exclude_modules"
        )
    if find_quantization(base, name) is not None:
        return Linear
    if overrides := _overridden_methods(base):
        raise NotImplementedError(
            f"target_modules matches {name!r}, a {class_name(base)} with a custom {overrides[0]}(), which the update "
            "would bypass; exclude it with exclude_modules"
        )
    if isinstance(base, _ADAPTABLE):
        return Conv2d if isinstance(base, nn.Conv2d) else Linear
    alternatives = (alternative for cls, alternative in _ALTERNATIVES.items() if isinstance(base, cls))
    alternative = next(alternatives, None)
    hint = "" if alternative is None else f"; {alternative}"
    raise TypeError(
        f"target_modules matches {name!r}, a {type(base).__name__}; "
        f"SNELLA adapts torch.nn.Linear, Conv2d and MultiheadAttention, and transformers' Conv1D{hint}"
    )


def matrix_shape(base: nn.Module) -> tuple[int, int]:
    """Return `(m, n)` of an adaptable module's weight as a matrix."""
    if isinstance(base, nn.Linear):
        return base.out_features, base.in_features  # a quantized weight may have any shape
    weight = orient(base, cast(Tensor, base.weight))
    return weight.shape[0], weight.shape[1:].numel()


def reject_quantized_projection(weight: Tensor, name: str) -> None:
    """Raise `NotImplementedError` if a projection of an `nn.MultiheadAttention` has a quantized weight."""
    if type(weight).__module__.startswith(("bitsandbytes.", "torchao.")) or not weight.is_floating_point():
        raise NotImplementedError(
            f"target_modules matches {name!r}, a projection of an nn.MultiheadAttention whose weight is a quantized "
            f"{type(weight).__name__} of {weight.dtype}; SNELLA supports quantized weights only in linear layers; "
            "keep the attention module unquantized"
        )


def class_name(module: nn.Module) -> str:
    """Return the qualified name of a module's class."""
    return f"{type(module).__module__}.{type(module).__name__}"


def _overridden_methods(base: nn.Module) -> list[str]:
    """Return the names of the forward methods that an adaptable module overrides, as timm's `Conv2dSame` does."""
    base_class = next((cls for cls in _ADAPTABLE if isinstance(base, cls)), None)
    if base_class is None or class_name(base) in _EQUIVALENT_LINEAR:
        return []
    methods = ("forward", "_conv_forward")
    return [method for method in methods if getattr(type(base), method, None) is not getattr(base_class, method, None)]


# heads ---------------------------------------------------------------------------------------------------------------


def _head_modules(model: nn.Module) -> set[nn.Module]:
    """Return the classifiers and output embeddings of the model and its submodels, with the modules inside them."""
    heads: set[nn.Module] = set()
    for module, method in product(model.modules(), ("get_classifier", "get_output_embeddings")):
        getter = getattr(module, method, None)
        if not callable(getter):
            continue
        try:
            head = getter()
        except (AttributeError, NotImplementedError):
            # timm and transformers define these methods in base classes, even for models without a head
            continue
        for part in head if isinstance(head, (list, tuple)) else [head]:
            if isinstance(part, nn.Module):
                heads.update(part.modules())
    return heads


def head_layers(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return a model's linear and convolutional head layers by name, except output embeddings and PEFT layers."""
    heads = _head_modules(model)
    layers = {}
    adapter_prefixes: list[str] = []
    for name, module in model.named_modules():
        parts = name.split(".")
        if any(name.startswith(prefix) for prefix in adapter_prefixes) or _OUTPUT_EMBEDDINGS.intersection(parts):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            adapter_prefixes.append(f"{name}.")
        elif type(module) in (nn.Linear, nn.Conv2d) and (
            module in heads or parts[0] in _HEAD_NAMES or _PREDICTOR_NAMES.intersection(parts)
        ):
            layers[name] = module
    return layers
