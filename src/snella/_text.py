"""Formatting of names in error messages."""

import difflib
from collections.abc import Iterable


def listed(items: Iterable[str], most: int = 5, separator: str = ", ") -> str:
    """Join the first `most` items and append the number of omitted ones."""
    shown = list(items)
    rest = len(shown) - most
    return separator.join(shown[:most]) + (f" and {rest} more" if rest > 0 else "")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint with the closest known name, e.g. "did you mean 'r'?", or an empty string if none is close."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else ""
