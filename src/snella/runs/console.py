"""Consoles that suit terminals and files: only a terminal gets wrapped and padded lines."""

import sys
from collections.abc import Sequence
from typing import IO, cast

from rich.console import Console
from rich.table import Table
from rich.text import Text

_UNLIMITED = 10_000


class _Unpadded:
    """A stream that leaves out the blanks at the ends of lines."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write whole lines, as rich does."""
        return self.stream.write("\n".join(line.rstrip(" ") for line in text.split("\n")))

    def flush(self) -> None:
        """Hand everything on."""
        self.stream.flush()

    def isatty(self) -> bool:
        """It is a file."""
        return False


def make_console(file: IO[str] | None = None) -> Console:
    """A console on `file`, standard output if None; where that is no terminal, lines are neither wrapped nor padded."""
    stream = sys.stdout if file is None else file
    console = Console(file=stream)
    if console.is_terminal:
        return console
    return Console(file=cast(IO[str], _Unpadded(stream)), width=_UNLIMITED)


def print_rows(console: Console, rows: Sequence[tuple[str, str]]) -> None:
    """Print names and texts in two columns; a long text is wrapped within its column on a terminal only."""
    if not console.is_terminal:
        width = max(len(name) for name, _ in rows)
        for name, text in rows:
            console.print(Text(f"{name:<{width}}  {text}"), soft_wrap=True)
        return
    table = Table.grid(padding=(0, 2))
    for name, text in rows:
        table.add_row(Text(name), Text(text))
    console.print(table, highlight=False)


def print_heading(console: Console, text: str) -> None:
    """Print a heading: across a terminal, a plain line elsewhere."""
    if console.is_terminal:
        console.rule(text)
    else:
        console.print(Text(f"--- {text} ---"), soft_wrap=True)


def counted(number: int, noun: str) -> str:
    """A number and its noun, with an s where it is not one: `1 image`, `1,200 images`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
