"""Helpers for error messages, module names, the cache folder, and the version of the NVIDIA driver."""

import difflib
import os
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path


def listed(items: Iterable[str], limit: int = 5, separator: str = ", ") -> str:
    """Join the first `limit` items and append the number of omitted items, if any, e.g. "a, b and 3 more"."""
    names = list(items)
    num_omitted = len(names) - limit
    return separator.join(names[:limit]) + (f" and {num_omitted} more" if num_omitted > 0 else "")


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Return a hint with the closest candidate, e.g. "did you mean 'r'?", or an empty string if none is close."""
    matches = difflib.get_close_matches(name, list(candidates), n=1)
    return f"did you mean {matches[0]!r}?" if matches else ""


def has_suffix(name: str, suffix: str) -> bool:
    """Return whether a module name equals `suffix` or ends with it after a dot."""
    return name == suffix or name.endswith(f".{suffix}")


def longest_suffix(name: str, suffixes: Iterable[str]) -> str | None:
    """Return the longest of the suffixes that a module name has, or `None` if it has none."""
    return max((suffix for suffix in suffixes if has_suffix(name, suffix)), key=len, default=None)


def cache_folder() -> Path:
    """Return the cache folder: `$SNELLA_CACHE`, else `$XDG_CACHE_HOME/snella`, else `~/.cache/snella`."""
    if override := os.environ.get("SNELLA_CACHE"):
        return Path(override).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "snella"


@cache
def nvidia_driver() -> str:
    """Return the version line of the NVIDIA driver, or an empty string if no driver is loaded."""
    with suppress(OSError):
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").partition("\n")[0].strip()
    return ""
