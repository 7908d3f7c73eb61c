"""`Method`, an entry of the method registry, and `MethodSpec`, the record of a method applied to a model.

A method decides which parameters of a model are trained, and may add parameters (an adapter). The other parameters are
frozen.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from peft import PeftConfig
from torch import Tensor, nn
from torch.optim import Optimizer

Rule = Callable[[Any], str | None]
"""Function that returns None for a valid value, and the requirement otherwise, such as "an integer of at least 1"."""


def integer(minimum: int = 1) -> Rule:
    """Require an `int` of at least `minimum`."""

    def rule(value: Any) -> str | None:
        is_valid = isinstance(value, int) and not isinstance(value, bool) and value >= minimum
        return None if is_valid else f"an integer of at least {minimum}"

    return rule


def number(low: float = 0.0, high: float = float("inf")) -> Rule:
    """Require a finite number in `[low, high)`."""
    requirement = f"a number in [{low:g}, {high:g})"
    if high == float("inf"):
        requirement = f"a finite number of at least {low:g}"

    def rule(value: Any) -> str | None:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return None if is_number and low <= value < high else requirement

    return rule


def one_of(*choices: Any) -> Rule:
    """Require one of the choices."""
    requirement = "one of " + ", ".join(repr(choice) for choice in choices)

    def rule(value: Any) -> str | None:
        return None if value in choices else requirement

    return rule


def check_by(rules: Mapping[str, Rule]) -> Callable[[Mapping[str, Any]], list[str]]:
    """Build a `Method.check` from one rule per option.

    The check returns messages such as "r must be an integer of at least 1, got 0".
    """

    def check(options: Mapping[str, Any]) -> list[str]:
        errors: list[str] = []
        for name, rule in rules.items():
            requirement = rule(options[name]) if name in options else None
            if requirement is not None:
                errors.append(f"{name} must be {requirement}, got {options[name]!r}")
        return errors

    return check


Options = dict[str, Any]
"""Options of a method by name, including the option set by the number in the method's name."""

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Function that returns a new iterator over batches: images `[n, C, H, W]` and labels `[n, …]`."""


def _class_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross entropy, computed in float32."""
    return F.cross_entropy(outputs.float(), labels)


@dataclass(frozen=True)
class SelectionData:
    """Data passed to `build_method` as `batches`, for methods that select weights or compare candidate models.

    Args:
        train: Returns a new iterator over training batches on each call.
        validation: Returns a new iterator over validation batches on each call, for methods that compare candidates.
        loss: Loss of the task, `(outputs, labels) -> 0-dim tensor`.
        report: Callback for progress messages of a long selection.
        has_class_scores: True if outputs are class scores and labels are class indices. Otherwise, candidates are
            ranked only by the loss.
    """

    train: Batches
    validation: Batches | None = None
    loss: Callable[[Tensor, Tensor], Tensor] = _class_loss
    report: Callable[[str], None] = lambda text: None
    has_class_scores: bool = True

    def __call__(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Return a new iterator over training batches."""
        return self.train()


_TRAIN_DEFAULTS = {"lr": 1e-3, "head_lr": 1e-3, "weight_decay": 0.0}
"""Defaults of `snella train` for settings missing from `Method.defaults`."""


@dataclass(frozen=True)
class Method:
    """Fine-tuning method: an entry of `METHODS` in `snella_app.methods.registry`.

    Args:
        summary: Short description of the trained parameters. Every method also trains the head.
        source: Publication of the method.
        build: `(model, head, options, batches) -> model`. Receives a model with frozen parameters, the name of its
            head, checked options, and training batches if `needs_batches` (None otherwise). Returns the model to train:
            the same model, changed in place, or a `PeftModel` around it.
        options: Names of the options.
        suffix: Option set by a number at the end of the name: with `"r"`, `adapter-8` means `r=8`. None if the
            name takes no number.
        check: `options -> error messages`. Checks the values of options without a model.
        config: `(head, options) -> PeftConfig`, for PEFT adapters. `options` includes `target_modules`. A `TypeError`
            is reported as an option of the wrong type.
        needs_batches: True if the method selects parameters from training data. Then `build_method` requires `batches`.
        needs_validation: True if candidates are compared on validation images, which `batches` must provide.
        restore: `(model, head, options, tensors) -> model`, rebuilds a saved adapter from its tensors. If None,
            `build` is used, which requires that `needs_batches` is False.
        merge: `model -> backbone`, merges the trained parameters into the backbone. None if they cannot be merged.
        penalty: `model -> 0-dim tensor`, added to the loss of each training step. None adds nothing.
        unmerged_reason: Reason why `merge` is None, a verb phrase: "adds prompt tokens, which are not weights".
        defaults: Default settings of `snella train` for AdamW with warm-up and cosine decay: `lr` for added or changed
            parameters (1e-3 if missing), `scalar_lr` for scalar kernel parameters, `head_lr` (1e-3), `weight_decay` for
            matrices (0), and the options `r`, `target_sparsity`, and `scaling`.
        recipes: Default settings of other run types, such as `language`, by `RunSettings.purpose`. A run type without
            an entry rejects the method.
        optimizer: `(model, class, *, lr, head_lr, weight_decay, scalar_lr) -> optimizer`, for methods with special
            parameter groups. The function receives `scalar_lr` only if it has a value. If None, the optimizer
            uses `lr`, `head_lr` for the head, and no weight decay for vectors.
        unsharded_reason: Reason why the frozen weights cannot be sharded, a verb phrase. Empty if they can.
        schedule: `(model, total_steps) -> schedule`. Training calls `schedule.attach(optimizer)` at the start; the
            optimizer state includes the schedule state. None if the method has no schedule.
        has_budgets: True if a `BudgetAllocator` assigns budgets (numbers of nonzero entries) to the adapted matrices.
        is_head_only: True if only the head is trained.
        peft_type: Name in PEFT's method comparison; None stands for the name without the number, in uppercase.
    """

    summary: str
    source: str
    build: Callable[[nn.Module, str, Options, Batches | None], nn.Module]
    options: tuple[str, ...] = ()
    suffix: str | None = None
    check: Callable[[Options], list[str]] | None = None
    config: Callable[[str, Options], PeftConfig] | None = None
    needs_batches: bool = False
    needs_validation: bool = False
    restore: Callable[[nn.Module, str, Options, Mapping[str, Tensor]], nn.Module] | None = None
    merge: Callable[[nn.Module], nn.Module] | None = None
    penalty: Callable[[nn.Module], Tensor] | None = None
    unmerged_reason: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    recipes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    optimizer: Callable[..., Optimizer] | None = None
    unsharded_reason: str = ""
    schedule: Callable[[nn.Module, int], Any] | None = None
    has_budgets: bool = False
    is_head_only: bool = False
    peft_type: str | None = None

    def defaults_of(self, purpose: str) -> Mapping[str, Any] | None:
        """Return the defaults of `snella train` or of a recipe, or None if the method has no such recipe.

        Args:
            purpose: `RunSettings.purpose`, which is empty for `snella train`.
        """
        return self.recipes.get(purpose) if purpose else {**_TRAIN_DEFAULTS, **self.defaults}


@dataclass(frozen=True)
class MethodSpec:
    """Record of a method applied to a model, sufficient to apply the method again.

    Args:
        name: Name passed to `build_method`, e.g. `snella-8`.
        options: Options passed to `Method.build`.
        head: Name of the head module.
        family: Key in `METHODS`, e.g. `snella` for `snella-8`. Empty for adapters of unregistered methods.
    """

    name: str
    options: Options = field(default_factory=dict)
    head: str = "head"
    family: str = ""


def unchanged(model: nn.Module) -> nn.Module:
    """Return the model unchanged. This is the `merge` of methods that train the backbone's weights directly."""
    return model
