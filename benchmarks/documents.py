"""Generated Markdown tables in documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path


def markdown_table(head: Sequence[str], lines: Iterable[Sequence[str]], left: int | None = None) -> str:
    """Format a Markdown table; columns after the first `left` are right-aligned, by default none."""
    num_left = len(head) if left is None else left
    rule = ["---"] * num_left + ["---:"] * (len(head) - num_left)
    first, *rest = (f"| {' | '.join(line)} |" for line in (head, *lines))
    return "\n".join([first, f"|{'|'.join(rule)}|", *rest])


def put_between(path: str | Path, begin: str, end: str, section: str) -> bool:
    """Replace the text between two markers of a Markdown file; return True if it changed.

    Raises:
        ValueError: If the file has no markers.
    """
    file = Path(path)
    text = file.read_text(encoding="utf-8")
    if begin not in text or end not in text:
        raise ValueError(f"{file} must contain the markers {begin!r} and {end!r}; add both lines")
    before, _, rest = text.partition(begin)
    after = rest.partition(end)[2]
    updated = f"{before}{begin}\n\n{section}\n\n{end}{after}"
    if updated != text:
        file.write_text(updated, encoding="utf-8")
    return updated != text
