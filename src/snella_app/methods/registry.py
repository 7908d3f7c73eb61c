"""The table of methods: from a name to its row, its options and the number in the name."""

import re
from collections.abc import Mapping
from typing import Any

from peft import get_peft_model
from torch import Tensor, nn

from snella.targets import default_targets
from snella_app.methods.method import Batches, Method, MethodSpec, Options
from snella_app.methods.model_parts import find_head
from snella_app.methods.partial import BIAS, FULL, LINEAR, MLP, PARTIAL
from snella_app.methods.peft_methods import ADALORA, CATALOG, DORA, KLORA, LORA, SNELL, SNELLA, SNELLA_MATCHED
from snella_app.plugins import plugins
from snella_app.text import nearest

METHODS: dict[str, Method] = {
    # weights of the backbone itself
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
    # configurations of PEFT and nothing else
    **CATALOG,
}
"""By name without the number, those that other packages register after the application's own."""
METHODS.update({name: method for name, method in plugins("methods").items() if name not in METHODS})


def method_names() -> list[str]:
    """Names that `build_method` knows, without numbers."""
    return list(METHODS)


def find_method(name: str) -> Method:
    """The row of `snella-8` or `snella`.

    Raises:
        ValueError: As for `parse_method`.
    """
    return METHODS[parse_method(name)[0]]


def method_options(name: str) -> tuple[str, ...]:
    """Names of the options that a method takes."""
    return find_method(name).options


def parse_method(name: str) -> tuple[str, int | None]:
    """Split `vpt-deep-50` into `("vpt-deep", 50)`; the number is None where the name has none.

    Raises:
        ValueError: No such method (with the nearest names), or a number where the method takes none.
    """
    match = None if name in METHODS else re.fullmatch(r"(.+)-(\d+)", name)
    family, digits = (match[1], match[2]) if match else (name, None)
    if family not in METHODS:
        hint = _meant(name) or nearest(family, METHODS, most=3, cutoff=0.5)
        numbered = ", ".join(f"{key}-N" for key, method in METHODS.items() if method.suffix is not None)
        plain = ", ".join(key for key, method in METHODS.items() if method.suffix is None)
        raise ValueError(f"method must be one of {plain}, {numbered} (-N may be left out), got {name!r}{hint}")
    if digits is None:
        return family, None
    suffix = METHODS[family].suffix
    if suffix is None:
        raise ValueError(f"method {family!r} takes no number, got {name!r}; write {family!r}")
    if int(digits) < 1:
        raise ValueError(f"the number in a method's name, {suffix}, must be at least 1, got {name!r}")
    return family, int(digits)


def _meant(name: str) -> str:
    """A method written in another way, such as `lora8` or `LoRA_8`: `; did you mean 'lora-8'?`; empty for none."""
    plain = name.lower().replace("_", "-")
    family = plain.rstrip("0123456789")
    digits, family = plain.removeprefix(family), family.rstrip("-")
    if family not in METHODS or (digits and METHODS[family].suffix is None):
        return ""
    return f"; did you mean {family + (digits and '-' + digits)!r}?"


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
    except (ValueError, TypeError) as error:
        if method.config is None:
            raise
        raise ValueError(f"method {name!r} cannot be applied to {type(model).__name__}: {error}") from error
    built.snella_method = MethodSpec(name, options, head_name, family)  # type: ignore[assignment]
    return built


def restore_method(
    name: str, model: nn.Module, tensors: Mapping[str, Tensor], *, head: str | None = None, **options: Any
) -> nn.Module:
    """The structure that `build_method` made once, without its training data; values are still to be loaded.

    Arguments and errors are those of `build_method`, and `tensors` is what was saved, by name.
    """
    options = check_method(name, options)
    family = parse_method(name)[0]
    method = METHODS[family]
    head_name = _prepare(model, head)
    if method.restore is not None:
        built = method.restore(model, head_name, options, tensors)
    else:
        built = method.build(model, head_name, options, None)
    built.snella_method = MethodSpec(name, options, head_name, family)  # type: ignore[assignment]
    return built


def check_method(name: str, options: Options) -> Options:
    """Check all that can be known of the arguments of `build_method` without a model.

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
    errors = method.check(options) if method.check is not None else []
    if errors:
        raise ValueError(f"method {name!r}: {'; '.join(errors)}")
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


def _unknown_options(name: str, unknown: list[str], known: tuple[str, ...]) -> str:
    """One message for all options that a method lacks."""
    parts = [f"{key!r}{nearest(key, known, most=2, cutoff=0.5, form=' (nearest: {})')}" for key in unknown]
    has = f"it takes {', '.join(known)}" if known else "it takes none"
    return f"method {name!r} has no option {', '.join(parts)}; {has}"


def adapt_headless(method: str, model: nn.Module, options: dict[str, Any]) -> nn.Module:
    """Make a model without a head trainable by one method; `load_trained` puts back what was saved.

    Args:
        method: A method that is an adapter of PEFT (`snella`, `snell`, `lora`, `dora`; `lora-8` sets the rank), or
            `full`.
        model: Freshly loaded; changed in place, so that a pipeline that it is a part of uses the adapter.
        options: Options of the method; `target_modules` defaults to what the paper adapts in this kind of model: the
            projections of Stable Diffusion 3's joint attention, all linear layers of others.

    Returns:
        A `PeftModel` around the model, or with `full` the model itself.

    Raises:
        ValueError: Unknown method or option, a value that the method refuses, or a method that needs a head.
    """
    options = check_method(method, options)
    family = parse_method(method)[0]
    config_of = METHODS[family].config
    if config_of is None and family != "full":
        raise ValueError(f"method must be an adapter of PEFT or full for a model without a head, got {method!r}")
    for parameter in model.parameters():
        parameter.requires_grad_(config_of is None)
    built: nn.Module = model
    if config_of is not None:
        targets = options.get("target_modules") or default_targets(model)
        config = config_of("", {**options, "target_modules": targets})
        config.modules_to_save = None  # type: ignore[attr-defined]
        built = get_peft_model(model, config)
    # the empty name is the whole model: there is no head beside what the method trains
    built.snella_method = MethodSpec(name=method, options=options, head="", family=family)  # type: ignore[assignment]
    return built
