"""Formatting of numbers, units and lists, and suggestions of similar names.

NaN stands for a value that was not measured. Most functions format it as a dash.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_SPACE = "\N{NO-BREAK SPACE}"
_MINUS = "\N{MINUS SIGN}"


def count_text(count: int) -> str:
    """Format a count: 768, 12,345, 1.33 M, 84.9 M."""
    if count < 100_000:
        return f"{count:,}"
    if count >= 999_500_000:
        unit, size = "G", 10**9
    elif count >= 999_500:
        unit, size = "M", 10**6
    else:
        unit, size = "k", 10**3
    return f"{_three_digits(count / size)}{_SPACE}{unit}"


def percent_text(fraction: float, digits: int = 1) -> str:
    """Format a fraction as a percentage: 87.5%."""
    return "–" if math.isnan(fraction) else f"{decimal_text(100 * fraction, digits)}%"


def points_text(fraction: float, digits: int = 1) -> str:
    """Format a difference of fractions in percentage points, with its sign: +2.9, −1.0, 0.0."""
    return signed_text(100 * fraction, digits)


def signed_text(value: float, digits: int) -> str:
    """Format a difference with fixed decimals and its sign: +0.029, −0.010, 0.000."""
    text = decimal_text(value, digits)
    return f"+{text}" if text[0].isdigit() and float(text) else text


def margin_text(fraction: float) -> str:
    """Format the half-width of a 95% confidence interval: "95% margin: ±13.4 percentage points". Empty for NaN."""
    return "" if math.isnan(fraction) else f"95% margin: ±{decimal_text(100 * fraction, 1)} percentage points"


def decimal_text(value: float, digits: int) -> str:
    """Format a number with fixed decimals, a minus sign, and no negative zero: 0.747, −0.240, 0.0."""
    if math.isnan(value):
        return "–"
    text = f"{value:.{digits}f}"
    return text.replace("-", "" if float(text) == 0 else _MINUS)


def measure_text(value: float, *, signed: bool = False) -> str:
    """Format a number with four significant digits: 12.35, −0.05. If `signed`, add a plus sign: +12.35."""
    if math.isnan(value):
        return "–"
    sign = "+" if signed else ""
    # adding 0 removes the sign of a negative zero
    return f"{value + 0.0:{sign}.4g}".replace("-", _MINUS)


def seconds_text(seconds: float) -> str:
    """Format a duration: 8.2 s, 2 min 5 s, 3 h 20 min."""
    if math.isnan(seconds):
        return "–"
    if seconds < 59.95:
        return f"{seconds:.1f}{_SPACE}s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}{_SPACE}min {whole % 60}{_SPACE}s"
    return f"{whole // 3600}{_SPACE}h {whole % 3600 // 60}{_SPACE}min"


def bytes_text(size: float) -> str:
    """Format a size in bytes: 512 B, 3.1 MiB."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale - scale / 2048:  # from 1023.5 of the smaller unit, which would be rounded to 1024
            return f"{_three_digits(size / scale)}{_SPACE}{unit}"
    return f"{size:.0f}{_SPACE}B"


def plain_text(value: Any) -> str:
    """Format a value for a table of settings: short numbers, and lists and mappings on one line."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {plain_text(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(plain_text, value))
    return str(value)


def utf8_text(text: str) -> str:
    """Replace characters that UTF-8 cannot encode, e.g. from file names with invalid UTF-8, with `?`."""
    return text.encode(errors="replace").decode()


def listed(items: Iterable[str], most: int = 5, separator: str = ", ") -> str:
    """Join the first `most` items and count the rest: "a, b and 3 more"."""
    shown = list(items)
    rest = len(shown) - most
    return separator.join(shown[:most]) + (f" and {rest} more" if rest > 0 else "")


def first_line(error: BaseException) -> str:
    """Return the first line of an error message, or the name of the error's type if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def nearest(name: str, known: Iterable[str], *, most: int = 1, cutoff: float = 0.6, form: str = "; nearest: {}") -> str:
    """Suggest known names similar to `name`: "; nearest: a, b". The text is empty if none is similar."""
    near = difflib.get_close_matches(name, list(known), n=most, cutoff=cutoff)
    return form.format(", ".join(near)) if near else ""


def similar_paths(
    path: Path, *, most: int = 3, cutoff: float = 0.5, folders_only: bool = False, suffixes: tuple[str, ...] = ("",)
) -> str:
    """Suggest visible files and folders with names similar to that of a missing path: "; nearest: 'a.csv', 'b.csv'".

    Suggestions end with one of `suffixes`. The text is empty if there are none or the path exists. If the parent folder
    is missing, the text says so.
    """
    if os.path.exists(path):  # unlike Path.exists, False for a name that is too long
        return ""
    if not os.path.isdir(path.parent):
        return f"; there is no folder '{path.parent}'"
    names = sorted(
        child.name
        for child in path.parent.iterdir()
        if child.name.endswith(suffixes) and not child.name.startswith(".") and (child.is_dir() or not folders_only)
    )
    near = difflib.get_close_matches(path.name, names, n=most, cutoff=cutoff)
    return f"; nearest: {', '.join(map(repr, near))}" if near else ""


def split_text(split: str) -> str:
    """Return the display name of a split: training, validation, or test."""
    return {"train": "training", "val": "validation"}.get(split, split)


def _three_digits(value: float) -> str:
    """Format a number with three significant digits and no exponent."""
    if value >= 99.95:
        return f"{value:.0f}"
    if value >= 9.995:
        return f"{value:.1f}"
    return f"{value:.2f}"
