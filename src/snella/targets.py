"""Which modules of a model are adapted, and how fused ones are cut into matrices."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache, lru_cache
from itertools import product

import regex
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from snella.compat.attention import AdaptedAttention, is_adaptable
from snella.compat.quantization import find_quantization
from snella.layer import Conv2d, Linear, SnellaLayer

# of the model's own children
HEAD_NAMES = {"head", "heads", "head_dist", "classifier", "score", "fc", "lm_head", "qa_outputs", "proj_out"}
# of modules at any depth: the predictors of DeiT, detection and segmentation
PREDICTOR_NAMES = {
    *("cls_classifier", "distillation_classifier", "class_labels_classifier", "bbox_predictor", "class_predictor"),
    *("mask_predictor", "mask_embedder", "class_embed", "bbox_embed", "enc_score_head", "enc_bbox_head"),
    *("class_head", "box_head", "decode_head", "auxiliary_head"),
}
_PATCH_NAMES = {"patch_embed", "patch_embedding", "patch_embeddings", "downsample", "patch_merging", "x_embedder"}
_PATCH_CLASSES = ("PatchEmbed", "PatchMerging")  # parts of the names of classes
_MATCHING_S = 5.0  # for all names of a model together; a sound expression takes a few milliseconds
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
    names = []
    for name, module in _candidates(model):
        if is_adaptable(module):
            names += [name, f"{name}.out_proj"]
        elif isinstance(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module, (nn.Linear, Conv1D)):
            names.append(name)
    return names


def plain_convolution_names(model: nn.Module) -> list[str]:
    """Return the names of the two-dimensional convolutions that are adapted in a model without linear layers.

    Ungrouped ones with a `forward` that is torch's own; left out are the first convolution of the model (its stem), the
    head, patch embedding and downsampling between stages, and what lies inside of adapters.
    """
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    return [
        name
        for name, module in _candidates(model)
        for base in [module.get_base_layer() if isinstance(module, BaseTunerLayer) else module]
        if isinstance(base, nn.Conv2d) and base is not convolutions[0] and base.groups == 1 and not own_methods(base)
        if not (base.padding == "same" and any(k % 2 == 0 for k in base.kernel_size))
    ]


def _candidates(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules of a model outside of its head, of patch embedding and merging, and of adapters."""
    heads = head_modules(model)
    found: list[tuple[str, nn.Module]] = []
    inside: list[str] = []
    for name, module in model.named_modules():
        parts = name.split(".")
        if any(name.startswith(prefix) for prefix in inside) or module in heads or parts[0] in HEAD_NAMES:
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper, nn.MultiheadAttention, AdaptedAttention)):
            inside.append(name + ".")
        if name and any(part in type(module).__name__ for part in _PATCH_CLASSES):
            inside.append(name + ".")
            continue
        if name and not (PREDICTOR_NAMES | _PATCH_NAMES).intersection(parts):
            found.append((name, module))
    return found


def describe_coverage(model: nn.Module, names: Iterable[str]) -> str | None:
    """Say what the default targets leave out where that is more than they adapt; `None` elsewhere.

    Head, patch embedding and embeddings are not counted, as they are left out on purpose.

    Args:
        model: The model, without adapters.
        names: Names of the modules to adapt.
    """
    adapted = set(names)
    covered, left_out = 0, {}
    for name, module in _candidates(model):
        if name in adapted and isinstance(module, (nn.Linear, Conv1D, nn.Conv2d)):
            rows, columns = matrix_shape(module)
            covered += rows * columns
        elif name in adapted:  # an attention, which has all of its projections adapted
            covered += sum(weight.numel() for weight in module.parameters() if weight.ndim > 1)
        elif not isinstance(module, nn.Embedding):
            for key, weight in module.named_parameters(recurse=False):
                # a leading 1 is that of tokens and positions, which are added to a batch
                if weight.ndim > 1 and weight.shape[0] > 1:
                    left_out[f"{name}.{key}"] = (type(module).__name__, weight)
    missing = sum(weight.numel() for _, weight in left_out.values())
    if missing <= covered:
        return None
    kinds: dict[str, tuple[str, str, list[int]]] = {}
    for name, (owner, weight) in sorted(left_out.items(), key=lambda item: -item[1][1].numel()):
        kinds.setdefault(owner, (name, owner, list(weight.shape)))
    examples = ", ".join(f"{name!r} {shape} of {owner}" for name, owner, shape in list(kinds.values())[:3])
    return (
        f"the default target_modules adapt {covered / (covered + missing):.0%} of the weights of "
        f"{type(model).__name__}, embeddings and head aside; {len(left_out)} others are left as they are, e.g. "
        f"{examples}: convolutions can be named in target_modules, bare parameters such as experts and routers can be "
        "trained in full with parameters_to_save"
    )


@cache
def _compile(expression: str) -> regex.Pattern[str]:
    return regex.compile(expression)


@lru_cache(maxsize=1 << 16)
def matches_expression(expression: str, name: str) -> bool:
    """Whether a regular expression matches the whole of a name, found within a time limit.

    Args:
        expression: The expression, which may come with an adapter from anywhere.
        name: Name of a module.

    Raises:
        ValueError: It takes longer, as expressions that repeat a repetition can.
    """
    try:
        return _compile(expression).fullmatch(name, timeout=_MATCHING_S) is not None
    except TimeoutError:
        raise _slow(expression, name) from None


def check_expression(expression: str, names: Iterable[str]) -> None:
    """Raise `ValueError` where matching all names would take longer than some seconds."""
    end = time.monotonic() + _MATCHING_S
    for name in names:
        matches_expression(expression, name)
        if time.monotonic() > end:
            raise _slow(expression, name)


def _slow(expression: str, name: str) -> ValueError:
    return ValueError(
        f"the regular expression {expression!r} takes more than {_MATCHING_S:g} s to match names such as {name!r}; "
        "write it without repetitions of repetitions, or give a list of names"
    )


def head_modules(model: nn.Module) -> set[nn.Module]:
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
        wanted = qkv_groups if isinstance(qkv_groups, int) else _recognize(suffix, out_features, in_features, parent)
    counts = [out_features // wanted] * wanted if isinstance(wanted, int) else list(wanted)
    if sum(counts) != out_features or any(count < 1 for count in counts):
        raise ValueError(
            f"qkv_groups={qkv_groups!r} cuts {name!r} into rows {counts}, but it has {out_features} rows; "
            f"give a number that divides {out_features} or a list that sums to it"
        )
    return tuple(counts)


def _recognize(suffix: str, out_features: int, in_features: int, parent: nn.Module) -> int | list[int]:
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


# linear layers with a forward() of their own that is the same product
_PLAIN_LINEAR = {"transformers.models.falcon.modeling_falcon.FalconLinear"}
# what serves where a module of another kind is to be trained
_INSTEAD = {
    nn.Embedding: "train rows of an embedding with trainable_token_indices, or all of it with modules_to_save",
    nn.Conv1d: "train it in full with modules_to_save",
    nn.Conv3d: "train it in full with modules_to_save",
}


def choose_layer_class(base: nn.Module, name: str) -> type[SnellaLayer]:
    """Return the layer that can adapt a module.

    Args:
        base: The module, without adapters.
        name: Its full name, for errors.

    Raises:
        NotImplementedError: It has a `forward` of its own, or a weight quantized in a way that is not supported.
        RuntimeError: It is to be quantized by bitsandbytes and is not yet.
        TypeError: It is neither linear nor a two-dimensional convolution.
    """
    if isinstance(base, nn.MultiheadAttention):
        raise NotImplementedError(
            f"target_modules matches {name!r}, a {class_name(base)} with a forward() of its own, which may use the "
            "weights in another way; leave it out with exclude_modules"
        )
    if find_quantization(base, name) is not None:
        return Linear
    kind = _kind(base)
    own = own_methods(base)
    if own:
        raise NotImplementedError(
            f"target_modules matches {name!r}, a {class_name(base)} with a {own[0]}() of its own, which the update "
            "would bypass; leave it out with exclude_modules"
        )
    if kind is not None:
        return Conv2d if kind is nn.Conv2d else Linear
    hint = next((f"; {hint}" for other, hint in _INSTEAD.items() if isinstance(base, other)), "")
    raise TypeError(
        f"target_modules matches {name!r}, a {type(base).__name__}; "
        f"SNELLA adapts torch.nn.Linear, torch.nn.Conv2d and transformers' Conv1D{hint}"
    )


def matrix_shape(base: nn.Module) -> tuple[int, int]:
    """`(m, n)` of the weight of a module that can be adapted, seen as a matrix."""
    if isinstance(base, nn.Linear):
        return base.out_features, base.in_features  # a quantized weight may have any shape
    weight: Tensor = base.weight.T if isinstance(base, Conv1D) else base.weight  # type: ignore[assignment]
    return weight.shape[0], weight.shape[1:].numel()


def refuse_quantized_projection(weight: Tensor, name: str) -> None:
    """Raise `NotImplementedError` where a projection of a torch attention has a quantized weight."""
    if type(weight).__module__.startswith(("bitsandbytes.", "torchao.")) or not weight.is_floating_point():
        raise NotImplementedError(
            f"target_modules matches {name!r}, a projection of an nn.MultiheadAttention whose weight is a "
            f"{type(weight).__name__} of {weight.dtype}; only linear layers can be adapted where they are quantized; "
            "leave the attention unquantized"
        )


def class_name(module: nn.Module) -> str:
    """Full name of a module's class."""
    return f"{type(module).__module__}.{type(module).__name__}"


def own_methods(base: nn.Module) -> list[str]:
    """Names of the methods by which a class changes what torch's computes, e.g. timm's `Conv2dSame`."""
    kind = _kind(base)
    if kind is None or class_name(base) in _PLAIN_LINEAR:
        return []
    methods = ("forward", "_conv_forward")
    return [method for method in methods if getattr(type(base), method, None) is not getattr(kind, method, None)]


def _kind(base: nn.Module) -> type[nn.Module] | None:
    """The kind of layer that a module is, among those that can be adapted."""
    return next((kind for kind in (nn.Linear, Conv1D, nn.Conv2d) if isinstance(base, kind)), None)
