"""Numbers that a paper has printed, as an experiment file holds them."""

from collections.abc import Iterable, Mapping
from typing import Any

OVER_TASKS, OVER_GROUPS = "mean over tasks", "mean over groups"


def published_faults(published: Mapping[str, Any], tasks: Iterable[str], groups: Iterable[str]) -> list[str]:
    """What is wrong with an experiment's `published`.

    Args:
        published: `source`, a text, and `values`: from a method's label to numbers in percent, by task, group or mean.
        tasks: Labels of the experiment's data.
        groups: Their groups.
    """
    if not published:
        return []
    unknown = [key for key in published if key not in ("source", "values")]
    values = published.get("values")
    if unknown or not published.get("source") or not isinstance(values, Mapping):
        return [f"published must hold 'source' and 'values', got {', '.join(map(str, published))}"]
    columns = {*tasks, *groups, OVER_TASKS, OVER_GROUPS}
    faults = []
    for method, numbers in values.items():
        if not isinstance(numbers, Mapping):
            faults.append(f"published.values {method!r} must hold numbers by task, got {numbers!r}")
            continue
        faults += [
            f"published.values {method!r} must be numbers in percent by task, group or mean, got {column}: {value!r}"
            for column, value in numbers.items()
            if column not in columns or isinstance(value, bool) or not isinstance(value, int | float)
        ]
    return faults
