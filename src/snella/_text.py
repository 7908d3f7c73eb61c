"""Names in error messages."""

import difflib
from collections.abc import Iterable


def listed(items: Iterable[str], most: int = 5) -> str:
    """The first few of many items, and how many more there are."""
    shown = list(items)
    rest = len(shown) - most
    return ", ".join(shown[:most]) + (f" and {rest} more" if rest > 0 else "")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The known name that is most like `name`, as "did you mean 'r'?"; empty if none is alike."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else ""
