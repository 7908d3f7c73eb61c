"""What methods that PEFT implements have in common: putting the adapter in, and folding it out."""

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from snella.methods.method import Batches, Method, Options
from snella.methods.normalisation import freeze_running_statistics
from snella.methods.targets import adaptable_layers

Targets = Callable[[nn.Module, str], list[str] | str]
"""`(model, head) -> names`, or one regular expression for all: the modules to adapt where the user names none."""

_HARMLESS = (
    # the random projections come from a seed that is saved, so that they need not be
    "Specified to not save",
    "Specified to not load",
    # BOFT's compiled extension is an option of speed
    "Failed to load the CUDA extension",
    "Setting boft_n_butterfly_factor to 1",
    # of a LayerNorm, or a subclass of it, which is copied and trained all the same
    "Unsupported layer type .*LayerNorm",
)


def peft_method(
    summary: str,
    source: str,
    config: Callable[[str, Options], PeftConfig],
    options: tuple[str, ...],
    *,
    suffix: str | None = None,
    targets: Targets = adaptable_layers,
    penalty: Callable[[nn.Module], Tensor] | None = None,
) -> Method:
    """A row of the table for an adapter of PEFT.

    Args:
        summary: As for `Method`.
        source: As for `Method`.
        config: `(head, options) -> PeftConfig`; `target_modules` is among the options.
        options: Names of the options.
        suffix: As for `Method`.
        targets: Which modules are adapted where `target_modules` is not given.
        penalty: As for `Method`.
    """

    def build(model: nn.Module, head: str, options: Options, batches: Batches | None) -> nn.Module:
        given = options if "target_modules" in options else {"target_modules": targets(model, head), **options}
        return inject(model, config(head, given))

    return Method(summary, source, build, options, suffix=suffix, config=config, merge=merge_adapter, penalty=penalty)


def inject(model: nn.Module, config: PeftConfig) -> PeftModel:
    """Put an adapter into a model, with frozen statistics below it.

    Raises:
        ValueError: PEFT cannot adapt one of the targets; says which.
    """
    freeze_running_statistics(model)
    invariants = torch.sparse.check_sparse_tensor_invariants
    if str(getattr(config.peft_type, "value", config.peft_type)) == "SHIRA" and not invariants.is_enabled():
        invariants.disable()  # PEFT's indices are valid; undecided, torch warns at every sparse tensor
    with without_harmless_warnings():
        return get_peft_model(model, config)


@contextmanager
def without_harmless_warnings() -> Iterator[None]:
    """Keep PEFT from warning of what is meant to be."""
    with warnings.catch_warnings():
        for message in _HARMLESS:
            warnings.filterwarnings("ignore", message)
        yield


def merge_adapter(model: nn.Module) -> nn.Module:
    """The backbone with the adapter's update in its weights.

    Raises:
        TypeError: The model is no `PeftModel`.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"only a PeftModel has an adapter to merge, got {type(model).__name__}")
    inner: nn.Module = model.base_model.model  # type: ignore[assignment]
    for name, module in list(inner.named_modules()):
        # unwrapped first: PEFT's LN tuning leaves the head wrapped, and others want a head to be a single layer
        if isinstance(module, ModulesToSaveWrapper):
            inner.set_submodule(name, module.modules_to_save[module.active_adapters[0]])
    merged: nn.Module = model.merge_and_unload()
    return merged


def own_fields(config: type[PeftConfig]) -> tuple[str, ...]:
    """Fields of a configuration that PEFT's base class does not have; `modules_to_save` is the head, always."""
    base = {f.name for f in dataclasses.fields(PeftConfig)} | {"modules_to_save"}
    return tuple(f.name for f in dataclasses.fields(config) if f.name not in base and f.init)
