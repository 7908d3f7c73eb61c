"""Registry of methods: names, options, and model building."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from snella.matrices import AdaptedMatrix, adapted_matrices
from snella_app.methods.method import Batches, Method, MethodSpec, Options
from snella_app.methods.model_parts import AdapterFileError, find_head
from snella_app.methods.partial import BIAS, FULL, LINEAR, MLP, PARTIAL
from snella_app.methods.peft_methods import (
    ADALORA,
    CATALOG,
    DORA,
    KLORA,
    LORA,
    SNELL,
    SNELLA,
    SNELLA_MATCHED,
    merge_adapter,
)
from snella_app.plugins import plugins
from snella_app.text import nearest

METHODS: dict[str, Method] = {
    # weights of the model
    "linear": LINEAR,
    "bias": BIAS,
    "full": FULL,
    "partial": PARTIAL,
    "mlp": MLP,
    # low-rank and sparse updates
    "lora": LORA,
    "dora": DORA,
    "adalora": ADALORA,
    "snella": SNELLA,
    "snella-matched": SNELLA_MATCHED,
    "snell": SNELL,
    "klora": KLORA,
    # PEFT configurations
    **CATALOG,
}
"""Methods by name without the number; those of plugins come last."""
METHODS.update(plugins("methods", frozenset(METHODS)))


def find_method(name: str) -> Method:
    """Return the method for a name such as `snella-8` or `snella`, or raise the errors of `parse_method`."""
    return METHODS[parse_method(name)[0]]


def parse_method(name: str) -> tuple[str, int | None]:
    """Split `vpt-deep-50` into `("vpt-deep", 50)`. The number is None if the name has none.

    Raises:
        ValueError: If the method is unknown, or the number is 0 or not accepted.
    """
    match = None if name in METHODS else re.fullmatch(r"(.+)-(\d+)", name)
    family, digits = (match[1], match[2]) if match else (name, None)
    if family not in METHODS:
        hint = _suggest_spelling(name) or nearest(family, METHODS, most=3, cutoff=0.5)
        numbered = ", ".join(f"{key}-N" for key, method in METHODS.items() if method.suffix is not None)
        unnumbered = ", ".join(key for key, method in METHODS.items() if method.suffix is None)
        raise ValueError(f"method must be one of {unnumbered}, {numbered} (-N is optional), got {name!r}{hint}")
    if digits is None:
        return family, None
    suffix = METHODS[family].suffix
    if suffix is None:
        raise ValueError(f"method {family!r} takes no number, got {name!r}; use {family!r}")
    if int(digits) < 1:
        raise ValueError(f"the number in a method's name, {suffix}, must be at least 1, got {name!r}")
    return family, int(digits)


def _suggest_spelling(name: str) -> str:
    """Return "; did you mean 'lora-8'?" for a spelling such as `lora8` or `LoRA_8`, or an empty string."""
    normalized = name.lower().replace("_", "-")
    family = normalized.rstrip("0123456789")
    digits = normalized.removeprefix(family)
    family = family.rstrip("-")
    if family not in METHODS:
        return ""
    if digits and (METHODS[family].suffix is None or int(digits) < 1):
        return ""
    return f"; did you mean {family + (digits and '-' + digits)!r}?"


def build_method(
    name: str, model: nn.Module, *, head: str | None = None, batches: Batches | None = None, **options: Any
) -> nn.Module:
    """Prepare a model for training with a method.

    Args:
        name: Key of `METHODS`, optionally with a number: `lora-8` sets the rank, `vpt-deep-50` the number of prompts
            per block.
        model: Classifier without adapters, which is changed in place.
        head: Name of its head module, which is not needed for timm models.
        batches: Callable that returns a new iterator over batches of images and labels, for methods that select
            parameters from training data. Other methods ignore it.
        **options: Options listed in `Method.options`, such as the fields of SnellaConfig for `snella`, or some fields
            of LoraConfig for `lora`.

    Returns:
        The model to train: `model`, or a `PeftModel` around it.

    Raises:
        ValueError: If the name, an option, or a value is invalid; if the number contradicts an option; if the method
            does not support the model; or if required data is missing.
        TypeError: If the method requires `batches` and the argument is not callable.
    """
    options = check_method(name, options)
    method = find_method(name)
    if method.needs_batches and batches is None:
        raise ValueError(
            f"method {name!r} selects parameters from training data, got batches=None; "
            "pass batches=..., a callable that returns an iterator over batches of images and labels"
        )
    head = find_head(model, head)
    model.requires_grad_(False)
    return _build(name, model, head, options, batches if method.needs_batches else None)


def _build(name: str, model: nn.Module, head: str, options: Options, batches: Batches | None) -> nn.Module:
    """Apply a method with checked options to a frozen model.

    Errors of PEFT methods are re-raised as `ValueError` with the names of the method and the model.
    """
    method = find_method(name)
    try:
        built = method.build(model, head, options, batches)
    except (ValueError, TypeError, NotImplementedError) as error:
        if method.config is None:
            raise
        raise ValueError(f"method {name!r} cannot be applied to {type(model).__name__}: {error}") from error
    return with_spec(built, name, options, head)


def restore_method(
    name: str, model: nn.Module, tensors: Mapping[str, Tensor], *, head: str | None = None, **options: Any
) -> nn.Module:
    """Rebuild the structure of a model created by `build_method`, without training data and without loading values.

    Arguments and errors are as for `build_method`; `tensors` are the saved tensors by name.

    Raises:
        AdapterFileError: If the tensors do not fit the model.
    """
    options = check_method(name, options)
    method = find_method(name)
    head = find_head(model, head)
    model.requires_grad_(False)
    if method.restore is None:
        return _build(name, model, head, options, None)
    try:
        restored = method.restore(model, head, options, tensors)
    except (AttributeError, ValueError, TypeError, KeyError, IndexError) as error:
        raise AdapterFileError(
            f"the adapter does not fit {type(model).__name__}: {error}; load it into the architecture it was trained on"
        ) from error
    return with_spec(restored, name, options, head)


def check_method(name: str, options: Options) -> Options:
    """Check the arguments of `build_method` that do not depend on the model.

    Returns:
        The options, including the number in the name.

    Raises:
        ValueError: If the name, an option, or a value is invalid, or if the number contradicts an option.
    """
    family, number = parse_method(name)
    method = METHODS[family]
    unknown = [key for key in options if key not in method.options]
    if unknown:
        hints = [f"{key!r}{nearest(key, method.options, most=2, cutoff=0.5, form=' (nearest: {})')}" for key in unknown]
        known = ", ".join(method.options) or "no options"
        raise ValueError(f"method {name!r} has no option {', '.join(hints)}; it has {known}")
    if number is not None:
        suffix = str(method.suffix)
        if options.get(suffix, number) != number:
            raise ValueError(
                f"method {name!r} sets {suffix} to {number}, but got {suffix}={options[suffix]}; pass only one of them"
            )
        options = {**options, suffix: number}
    errors = method.check(options) if method.check is not None else []
    if errors:
        raise ValueError(f"method {name!r}: {'; '.join(errors)}")
    if method.config is not None:  # building the configuration checks the options; any target will do
        try:
            method.config("head", {"target_modules": ["placeholder"], **options})
        except TypeError as error:
            raise ValueError(f"method {name!r}: an option has the wrong type, got {options}: {error}") from error
    return options


def spec_of(model: nn.Module) -> MethodSpec:
    """Return the method that `build_method` or `load_trained` applied to a model.

    Raises:
        ValueError: If no method was applied.
    """
    spec = getattr(model, "snella_method", None)
    if not isinstance(spec, MethodSpec):
        raise ValueError(
            f"{type(model).__name__} was not created by build_method; call build_method(name, model) first"
        )
    return spec


def method_of(model: nn.Module) -> Method | None:
    """Return the registered method of a model, or None for PEFT adapters of unregistered methods."""
    return METHODS.get(spec_of(model).family)


def matrices_of(model: nn.Module) -> list[AdaptedMatrix]:
    """Return the adapted matrices of a model, or an empty list for methods without budgets."""
    method = method_of(model)
    return adapted_matrices(model) if method is not None and method.has_budgets else []


def trainable_parameters(model: nn.Module) -> int:
    """Count the trainable parameters, including the head."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def can_merge(name: str) -> bool:
    """Return whether `merge_trained` supports a method.

    The result is True for unknown names, which belong to PEFT adapters of unregistered methods.
    """
    try:
        return find_method(name).merge is not None
    except ValueError:
        return True


def merge_trained(model: nn.Module) -> nn.Module:
    """Merge the trained parameters into the backbone. The outputs change only by rounding.

    Args:
        model: Model from `build_method` or `load_trained`, which must not be used afterwards.

    Returns:
        The backbone with plain weights.

    Raises:
        ValueError: If no method was applied, or the method or an adapted layer does not support merging.
    """
    method = method_of(model)
    spec = spec_of(model)
    if method is None:
        return merge_adapter(model)
    if method.merge is None:
        raise ValueError(
            f"method {spec.name!r} cannot be merged into the weights of the backbone: it {method.unmerged_reason}; "
            "keep the adapter and load it with load_trained"
        )
    return method.merge(model)


def with_spec(model: nn.Module, name: str, options: Options, head: str) -> nn.Module:
    """Store the applied method in a model and return the model."""
    model.snella_method = MethodSpec(name, options, head, parse_method(name)[0])  # type: ignore[assignment]
    return model
