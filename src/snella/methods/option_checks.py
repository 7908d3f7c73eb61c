"""Rules for the values of options, checked before any model is there."""

from collections.abc import Callable, Mapping
from typing import Any

Rule = Callable[[Any], str | None]
"""Says what a value must be, or None where it is so."""


def whole_number(least: int = 1) -> Rule:
    """An `int` of at least `least`."""

    def rule(value: Any) -> str | None:
        is_one = isinstance(value, int) and not isinstance(value, bool) and value >= least
        return None if is_one else f"a whole number of at least {least}"

    return rule


def number(low: float = 0.0, high: float = float("inf"), *, with_high: bool = False) -> Rule:
    """A finite number in `[low, high)`, or in `[low, high]` with `with_high`."""
    if high == float("inf"):
        wanted = f"a finite number of at least {low:g}"
    else:
        wanted = f"a number in [{low:g}, {high:g}{']' if with_high else ')'}"

    def rule(value: Any) -> str | None:
        is_one = isinstance(value, int | float) and not isinstance(value, bool)
        return None if is_one and (low <= value < high or (with_high and value == high)) else wanted

    return rule


def one_of(*choices: Any) -> Rule:
    """One of the choices."""
    return lambda value: None if value in choices else "one of " + ", ".join(repr(choice) for choice in choices)


def check_by(rules: Mapping[str, Rule]) -> Callable[[Mapping[str, Any]], list[str]]:
    """A `Method.check` that applies one rule to each option that is given.

    Args:
        rules: By the name of the option.

    Returns:
        A function from options to faults: "r must be a whole number of at least 1, got 0".
    """

    def check(options: Mapping[str, Any]) -> list[str]:
        wanted = {name: rule(options[name]) for name, rule in rules.items() if name in options}
        return [f"{name} must be {what}, got {options[name]!r}" for name, what in wanted.items() if what is not None]

    return check
