"""From a method's name to a model with the right parameters trainable, and back to plain weights."""

import difflib
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from snella.methods.head import find_head
from snella.methods.method import Batches, Method, MethodSpec, Options
from snella.methods.registry import METHODS, parse_method


def build_method(
    name: str, model: nn.Module, *, head: str | None = None, batches: Batches | None = None, **options: Any
) -> nn.Module:
    """Make `model` trainable by one method.

    Args:
        name: One of `method_names()`; a number at its end sets the option that it is about: `lora-8` the rank,
            `vpt-deep-50` the prompts of a block.
        model: A classifier, changed in place; freshly created, without adapters.
        head: Module name of its head; timm models say it themselves.
        batches: For methods that look at training data to choose what to train: a callable that gives a fresh
            pass over pairs of images and labels each time. Others leave it alone.
        **options: What `method_options(name)` lists: SnellaConfig's fields for `snella`, some of LoraConfig's for
            `lora`.

    Returns:
        The model to train: `model` itself, or a `PeftModel` around it.

    Raises:
        ValueError: Unknown name or option, a value that the method refuses, the number given twice with different
            values, a method that cannot be applied to this model, or no data where the method needs some.
    """
    options = check_method(name, options)
    family = parse_method(name)[0]
    method = METHODS[family]
    if method.needs_batches and batches is None:
        raise ValueError(
            f"method {name!r} chooses what to train from training data, got batches=None; "
            "pass batches=..., a callable that returns pairs of images and labels"
        )
    head_name = _prepare(model, head)
    try:
        built = method.build(model, head_name, options, batches if method.needs_batches else None)
    except (ValueError, TypeError) as fault:
        if method.config is None:
            raise
        raise ValueError(f"method {name!r} cannot be applied to {type(model).__name__}: {fault}") from fault
    return _marked(built, MethodSpec(name, options, head_name, family))


def restore_method(
    name: str, model: nn.Module, tensors: Mapping[str, Tensor], *, head: str | None = None, **options: Any
) -> nn.Module:
    """The structure that `build_method` made once, without its training data; values are still to be loaded.

    Args:
        name: As for `build_method`.
        model: As for `build_method`.
        tensors: What was saved, by name.
        head: As for `build_method`.
        **options: As for `build_method`.

    Raises:
        ValueError: As for `build_method`.
    """
    options = check_method(name, options)
    family = parse_method(name)[0]
    method = METHODS[family]
    head_name = _prepare(model, head)
    if method.restore is not None:
        built = method.restore(model, head_name, options, tensors)
    else:
        built = method.build(model, head_name, options, None)
    return _marked(built, MethodSpec(name, options, head_name, family))


def check_method(name: str, options: Options) -> Options:
    """Check all that can be known without a model.

    Args:
        name: As for `build_method`.
        options: As for `build_method`.

    Returns:
        The options, with the number of the name among them.

    Raises:
        ValueError: Unknown name or option, the number given twice with different values, or a value that the method
            refuses.
    """
    family, number = parse_method(name)
    method = METHODS[family]
    unknown = [key for key in options if key not in method.options]
    if unknown:
        raise ValueError(_unknown_options(name, unknown, method.options))
    if number is not None:
        suffix = str(method.suffix)
        if options.get(suffix, number) != number:
            raise ValueError(
                f"method {name!r} sets {suffix} to {number}, but {suffix}={options[suffix]} was given too; "
                "leave one out"
            )
        options = {**options, suffix: number}
    faults = method.check(options) if method.check is not None else []
    if faults:
        raise ValueError(f"method {name!r}: {'; '.join(faults)}")
    if method.config is not None:
        method.config("head", {"target_modules": ["placeholder"], **options})
    return options


def spec_of(model: nn.Module) -> MethodSpec:
    """The method that `build_method` or `load_trained` applied to `model`.

    Raises:
        ValueError: The model came from elsewhere.
    """
    spec = getattr(model, "snella_method", None)
    if not isinstance(spec, MethodSpec):
        raise ValueError(f"{type(model).__name__} was not made by build_method; call build_method(name, model) first")
    return spec


def method_of(model: nn.Module) -> Method | None:
    """The row of the table that `model` was made by; None for a PEFT adapter of a method that is not in it."""
    return METHODS.get(spec_of(model).family)


def merge_trained(model: nn.Module) -> nn.Module:
    """The backbone with everything that was trained in its plain weights; outputs stay the same up to rounding.

    Args:
        model: From `build_method` or `load_trained`; used up.

    Raises:
        ValueError: The method's change is none of weights.
    """
    method, spec = method_of(model), spec_of(model)
    if method is None:
        return model.merge_and_unload()  # type: ignore[operator]
    if method.merge is None:
        raise ValueError(
            f"method {spec.name!r} cannot be folded into the weights of the backbone: it {method.unmerged_reason}; "
            "keep the adapter beside the backbone, load_trained puts it back"
        )
    return method.merge(model)


def _prepare(model: nn.Module, head: str | None) -> str:
    """Freeze all parameters; the name of the head."""
    head_name = find_head(model, head)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return head_name


def _marked(model: nn.Module, spec: MethodSpec) -> nn.Module:
    """The model, knowing its method."""
    model.snella_method = spec  # type: ignore[assignment]
    return model


def _unknown_options(name: str, unknown: list[str], known: tuple[str, ...]) -> str:
    """One message for all options that a method lacks."""
    parts = []
    for key in unknown:
        near = difflib.get_close_matches(key, known, n=2, cutoff=0.5)
        parts.append(f"{key!r}" + (f" (nearest: {', '.join(near)})" if near else ""))
    has = f"it takes {', '.join(known)}" if known else "it takes none"
    return f"method {name!r} has no option {', '.join(parts)}; {has}"
