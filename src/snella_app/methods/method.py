"""`Method`: the row type of the table of methods, and the method of a model."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from peft import PeftConfig
from torch import Tensor, nn
from torch.optim import Optimizer

Rule = Callable[[Any], str | None]
"""Says what a value must be, or None where it is so."""


def whole_number(least: int = 1) -> Rule:
    """An `int` of at least `least`."""

    def rule(value: Any) -> str | None:
        is_one = isinstance(value, int) and not isinstance(value, bool) and value >= least
        return None if is_one else f"an integer of at least {least}"

    return rule


def number(low: float = 0.0, high: float = float("inf")) -> Rule:
    """A finite number in `[low, high)`."""
    wanted = f"a finite number of at least {low:g}" if high == float("inf") else f"a number in [{low:g}, {high:g})"

    def rule(value: Any) -> str | None:
        is_one = isinstance(value, int | float) and not isinstance(value, bool)
        return None if is_one and low <= value < high else wanted

    return rule


def one_of(*choices: Any) -> Rule:
    """One of the choices."""
    return lambda value: None if value in choices else "one of " + ", ".join(repr(choice) for choice in choices)


def check_by(rules: Mapping[str, Rule]) -> Callable[[Mapping[str, Any]], list[str]]:
    """A `Method.check` that applies one rule to each option that is given.

    Args:
        rules: By the name of the option.

    Returns:
        A function from options to errors: "r must be an integer of at least 1, got 0".
    """

    def check(options: Mapping[str, Any]) -> list[str]:
        wanted = {name: rule(options[name]) for name, rule in rules.items() if name in options}
        return [f"{name} must be {what}, got {options[name]!r}" for name, what in wanted.items() if what is not None]

    return check


Options = dict[str, Any]
"""Options of a method by name, as the user gave them, the number of the method's name among them."""

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Gives a fresh pass over training data each time it is called: pairs of images `[n, C, H, W]` and labels `[n]`."""


def _class_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy, in float32 at least."""
    return F.cross_entropy(outputs.float(), labels)


def _say_nothing(text: str) -> None:
    """Nobody listens."""


@dataclass(frozen=True)
class SelectionData:
    """Training batches, as `build_method(..., batches=...)` takes them, with the rest that some methods need.

    Args:
        train: Gives a fresh pass over training data each time it is called.
        validation: The same over validation data; `noah` ranks candidates on it.
        loss: `(outputs, labels) -> 0-dim loss` of the task.
        report: Is told in a few words how far a long choice has come.
        has_class_scores: Whether outputs are a score a class, and labels class numbers; otherwise candidates are
            ranked by the loss alone.
    """

    train: Batches
    validation: Batches | None = None
    loss: Callable[[Tensor, Tensor], Tensor] = _class_loss
    report: Callable[[str], None] = _say_nothing
    has_class_scores: bool = True

    def __call__(self) -> Iterable[tuple[Tensor, Tensor]]:
        """A fresh pass over training data."""
        return self.train()


@dataclass(frozen=True)
class Method:
    """One way of fine-tuning: one row of the table in `snella_app.methods.registry`.

    Args:
        summary: What is trained, in a few words; the head always is.
        source: Where the method is published.
        build: `(model, head, options, batches) -> model`. Gets a model whose parameters are all frozen, the name of its
            head, checked options, and the training data where `needs_batches` (None otherwise). Returns the model to
            train: the same one changed in place, or a `PeftModel` around it.
        options: Names of the options that it takes.
        suffix: The option that a number at the end of the name sets: `"r"` makes `adapter-8` mean `r=8`. None: no
            number is taken.
        check: `options -> errors`, everything that can be said against the values without a model.
        config: `(head, options) -> PeftConfig`, for a method that is an adapter of PEFT; what it raises counts as a
            error of the options. Called with `target_modules` among the options.
        needs_batches: What is trained depends on training data, so that `build_method` needs `batches`.
        needs_validation: Candidates are compared on validation images, which `batches` must have too.
        restore: `(model, head, options, tensors) -> model`, the structure of a saved adapter from its tensors alone;
            needed where `needs_batches`. None: `build` does it.
        merge: `model -> backbone`, folds what was trained into plain weights of the backbone. None: it cannot be.
        penalty: `model -> 0-dim tensor`, added to the loss of each training step. None: nothing is.
        unmerged_reason: Why `merge` is None, to end a sentence with: "adds prompt tokens, which are no weights".
        defaults: Settings of `snella train` where the user gives none: `lr` for what is added or changed, `scalar_lr`
            for kernels' scalars, `head_lr`, `weight_decay` for matrices, and options of the method. They are values
            for AdamW with warm-up and cosine decay.
        recipes: The same of other kinds of run, by `RunSettings.purpose`; the method is refused where it has none.
        optimizer: `(model, class, *, lr, head_lr, weight_decay, scalar_lr) -> optimizer`, for parameters that need
            groups of their own; `scalar_lr` only if it is set. None: `lr`, the head at `head_lr`, no decay of vectors.
        unsharded_reason: Why processes cannot share out the frozen weights among themselves, to end a sentence with.
            Empty: they can.
        schedule: `(model, total_steps) -> schedule`, what follows the steps: its `attach(optimizer)` is called when
            training starts, and lets its state travel with the optimizer's. None: nothing does.
        has_budgets: Its matrices have budgets, which a `BudgetAllocator` shares out.
        is_head_only: Nothing but the head is trained.
        peft_type: Its name in PEFT's method comparison; None for the family in capitals.
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
    defaults: Mapping[str, Any] = field(default_factory=lambda: {"lr": 1e-3, "head_lr": 1e-3, "weight_decay": 0.0})
    recipes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    optimizer: Callable[..., Optimizer] | None = None
    unsharded_reason: str = ""
    schedule: Callable[[nn.Module, int], Any] | None = None
    has_budgets: bool = False
    is_head_only: bool = False
    peft_type: str | None = None

    def defaults_of(self, purpose: str) -> Mapping[str, Any] | None:
        """`defaults`, or those of a recipe; None where the method is not for it.

        Args:
            purpose: As `RunSettings.purpose`; empty for `snella train`.
        """
        return self.recipes.get(purpose) if purpose else self.defaults


@dataclass(frozen=True)
class MethodSpec:
    """How a model was made trainable: enough to do it again.

    Args:
        name: As given to `build_method`, e.g. `snella-8`.
        options: As given to the method's `build`.
        head: Module name of the classifier head.
        family: The row of the table: `snella` for `snella-8`. Empty for an adapter of a method that is not in it.
    """

    name: str
    options: Options = field(default_factory=dict)
    head: str = "head"
    family: str = ""


def unchanged(model: nn.Module) -> nn.Module:
    """Merge for methods that train the backbone's own weights: there is nothing to fold."""
    return model
