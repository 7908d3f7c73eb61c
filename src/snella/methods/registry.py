"""From a method's name to a model with the right parameters trainable."""

import dataclasses
import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

from snella.methods.head import find_head, is_inside
from snella.methods.normalisation import freeze_running_statistics
from snella.methods.targets import adaptable_layers
from snella.tuner.config import SnellaConfig


@dataclass(frozen=True)
class MethodSpec:
    """How a model was made trainable: enough to do it again."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    head: str = "head"

    @property
    def family(self) -> str:
        """Name without the rank: `snella` for `snella-8`."""
        return parse_method(self.name)[0]


@dataclass(frozen=True)
class _Method:
    """One row of the table of methods."""

    summary: str
    build: Callable[[nn.Module, str, dict[str, Any]], nn.Module]
    options: tuple[str, ...] = ()
    config: Callable[[str, dict[str, Any]], PeftConfig] | None = None


def build_method(name: str, model: nn.Module, *, head: str | None = None, **options: Any) -> nn.Module:
    """Make `model` trainable by one method.

    Args:
        name: `linear`, `bias`, `full`, `lora`, `snella` or `snell`; `lora-8` sets the rank, as `r=8` does.
        model: A classifier, changed in place; freshly created, without adapters.
        head: Module name of its head; timm models say it themselves.
        **options: What `method_options(name)` lists: SnellaConfig's fields for `snella`, some of LoraConfig's for
            `lora`.

    Returns:
        The model to train: `model` itself, or a `PeftModel` around it.

    Raises:
        ValueError: Unknown name or option, or the rank given twice with different values.
    """
    options = check_method(name, options)
    head_name = find_head(model, head)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    built = _METHODS[parse_method(name)[0]].build(model, head_name, options)
    built.snella_method = MethodSpec(name, options, head_name)  # type: ignore[assignment]
    return built


def check_method(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Check all that can be known without a model.

    Args:
        name: As for `build_method`.
        options: As for `build_method`.

    Returns:
        The options, with the rank of the name among them.

    Raises:
        ValueError: Unknown name or option, the rank given twice with different values, or a value that the method
            refuses.
    """
    family, rank = parse_method(name)
    method = _METHODS[family]
    unknown = [key for key in options if key not in method.options]
    if unknown:
        raise ValueError(_unknown_options(name, unknown, method.options))
    if rank is not None:
        if options.get("r", rank) != rank:
            raise ValueError(
                f"method {name!r} sets the rank to {rank}, but r={options['r']} was given too; leave one out"
            )
        options = {**options, "r": rank}
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


def method_names() -> list[str]:
    """Names that `build_method` knows, without ranks."""
    return list(_METHODS)


def method_options(name: str) -> tuple[str, ...]:
    """Names of the options that a method takes."""
    return _METHODS[parse_method(name)[0]].options


def parse_method(name: str) -> tuple[str, int | None]:
    """Split `snella-8` into `("snella", 8)`; the rank is None where the name has none.

    Raises:
        ValueError: No such method, or a rank where the method has none.
    """
    match = re.fullmatch(r"([a-z]+)(?:-(\d+))?", name)
    family, rank = (match[1], match[2]) if match else (name, None)
    if family not in _METHODS:
        near = difflib.get_close_matches(family, _METHODS, n=3, cutoff=0.5)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise ValueError(f"method must be one of {', '.join(_METHODS)} (-R for the rank), got {name!r}{hint}")
    if rank is None:
        return family, None
    if "r" not in _METHODS[family].options:
        raise ValueError(f"method {family!r} has no rank, got {name!r}; write {family!r}")
    if int(rank) < 1:
        raise ValueError(f"the rank in a method's name must be at least 1, got {name!r}")
    return family, int(rank)


def _unknown_options(name: str, unknown: list[str], known: tuple[str, ...]) -> str:
    """One message for all options that a method lacks."""
    parts = []
    for key in unknown:
        near = difflib.get_close_matches(key, known, n=2, cutoff=0.5)
        parts.append(f"{key!r}" + (f" (nearest: {', '.join(near)})" if near else ""))
    has = f"it takes {', '.join(known)}" if known else "it takes none"
    return f"method {name!r} has no option {', '.join(parts)}; {has}"


def _train_head_only(model: nn.Module, head: str, options: dict[str, Any]) -> nn.Module:
    """Linear probe: only the head learns."""
    freeze_running_statistics(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_inside(name, head))
    return model


def _train_biases(model: nn.Module, head: str, options: dict[str, Any]) -> nn.Module:
    """BitFit: every bias and the head."""
    freeze_running_statistics(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_inside(name, head) or name.rsplit(".", 1)[-1] == "bias")
    return model


def _train_everything(model: nn.Module, head: str, options: dict[str, Any]) -> nn.Module:
    """Full fine-tuning."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def _lora_config(head: str, options: dict[str, Any]) -> PeftConfig:
    """PEFT's LoRA, `lora_alpha = r` (scaling 1) unless told otherwise."""
    return LoraConfig(modules_to_save=[head], **{"r": 8, "lora_alpha": options.get("r", 8), **options})


def _snella_config(head: str, options: dict[str, Any]) -> PeftConfig:
    """SNELLA with the head trained in full."""
    return SnellaConfig(modules_to_save=[head], **options)


def _snell_config(head: str, options: dict[str, Any]) -> PeftConfig:
    """SNELL, the predecessor: the kernel p_linear, and the same sparsity in every matrix."""
    return _snella_config(head, {"kernel": "p_linear", "allocation": "uniform", **options})


def _add_lora(model: nn.Module, head: str, options: dict[str, Any]) -> nn.Module:
    """LoRA on the layers that SNELLA adapts."""
    return _inject(model, _lora_config(head, {"target_modules": adaptable_layers(model, head), **options}))


def _add_snella(model: nn.Module, head: str, options: dict[str, Any]) -> nn.Module:
    """SNELLA around the model."""
    return _inject(model, _snella_config(head, {"target_modules": adaptable_layers(model, head), **options}))


def _add_snell(model: nn.Module, head: str, options: dict[str, Any]) -> nn.Module:
    """SNELL around the model."""
    return _inject(model, _snell_config(head, {"target_modules": adaptable_layers(model, head), **options}))


def _inject(model: nn.Module, config: PeftConfig) -> PeftModel:
    """Put the adapter in, with frozen statistics below it."""
    freeze_running_statistics(model)
    return get_peft_model(model, config)


def _own_fields(config: type[PeftConfig]) -> tuple[str, ...]:
    """Fields of a configuration that PEFT's base class does not have."""
    base = {f.name for f in dataclasses.fields(PeftConfig)} | {"modules_to_save"}
    return tuple(f.name for f in dataclasses.fields(config) if f.name not in base and f.init)


_LORA_OPTIONS = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "use_rslora",
    "use_dora",
    "bias",
)
_SNELLA_OPTIONS = _own_fields(SnellaConfig)

_SNELL_OPTIONS = tuple(option for option in _SNELLA_OPTIONS if option not in ("kernel", "allocation"))

_METHODS: dict[str, _Method] = {
    "linear": _Method("only the head", _train_head_only),
    "bias": _Method("all biases and the head", _train_biases),
    "full": _Method("all weights", _train_everything),
    "lora": _Method("low-rank updates (PEFT)", _add_lora, _LORA_OPTIONS, _lora_config),
    "snella": _Method("sparse high-rank updates, budgets by competition", _add_snella, _SNELLA_OPTIONS, _snella_config),
    "snell": _Method("sparse updates, the same sparsity everywhere", _add_snell, _SNELL_OPTIONS, _snell_config),
}
