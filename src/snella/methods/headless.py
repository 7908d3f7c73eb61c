"""Methods on models without a classifier head: generators of images and of text."""

from typing import Any

from peft import get_peft_model
from torch import nn

from snella.methods.building import check_method
from snella.methods.method import MethodSpec
from snella.methods.registry import METHODS, parse_method
from snella.tuner.targets import default_targets


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
