"""Consoles that suit terminals and files: only a terminal gets wrapped and padded lines; a text is never markup."""

import contextlib
import os
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any, cast

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

_UNLIMITED = 10_000
_TURNS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


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


class _Enduring:
    """A stream whose reader may go away: what is written afterwards is lost, and nothing else is."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        """Whatever else the stream has."""
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write while someone reads."""
        with self._kept_alive():
            return self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Hand everything on, while someone reads."""
        with self._kept_alive():
            self.stream.flush()

    @contextlib.contextmanager
    def _kept_alive(self) -> Iterator[None]:
        """Let the stream lead nowhere once it has failed, and say so once."""
        try:
            yield
        except OSError as error:
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.stream.fileno())
                os.close(nowhere)
            with contextlib.suppress(OSError):
                print(f"snella: nobody reads the output any more ({error}); the work goes on", file=sys.stderr)


class _PlainConsole(Console):
    """A console to which a text is a text: brackets are no markup, and control characters are shown, not obeyed."""

    def render_str(self, text: str, **options: Any) -> Text:
        """The text as it reads."""
        return super().render_str(printable(text), **{**options, "markup": False, "emoji": False, "highlight": False})

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """What is written, texts as they read."""
        if isinstance(renderable, Text) and printable(renderable.plain) != renderable.plain:
            renderable = Text(printable(renderable.plain), renderable.style)
        return super().render(renderable, options)


def make_console(file: IO[str] | None = None, *, endures: bool = False) -> Console:
    """A console on `file`, standard output if None; where that is no terminal, lines are neither wrapped nor padded.

    Args:
        file: Where to write.
        endures: Whether work goes on when nobody reads any more, as after `| head` or in a terminal that was closed.
    """
    stream = sys.stdout if file is None else file
    stream = cast(IO[str], _Enduring(stream)) if endures else stream
    console = _PlainConsole(file=stream)
    if console.is_terminal:
        return console
    return _PlainConsole(file=cast(IO[str], _Unpadded(stream)), width=_UNLIMITED)


def printable(text: str) -> str:
    r"""The text with control characters, such as those of terminals' sequences, written as `\x1b`.

    Names of files may hold them, bytes that are not UTF-8 (as Python has them: lone surrogates), and signs that turn
    the direction of what follows. Line breaks and tabs stay.
    """
    return "".join(sign if _is_harmless(sign) else repr(sign)[1:-1] for sign in text)


def _is_harmless(sign: str) -> bool:
    """Whether a terminal shows a character and does nothing else."""
    if sign in "\n\t":
        return True
    return unicodedata.category(sign) not in ("Cc", "Cs") and sign not in _TURNS


def print_line(console: Console, text: str) -> None:
    """Print a text as it reads, neither wrapped nor colored, on whatever console."""
    console.print(Text(printable(text)), soft_wrap=True)


def print_rows(console: Console, rows: Sequence[tuple[str, str]]) -> None:
    """Print names and texts in two columns; a long text is wrapped within its column on a terminal only."""
    if not console.is_terminal:
        width = max(len(name) for name, _ in rows)
        for name, text in rows:
            print_line(console, f"{name:<{width}}  {text}")
        return
    table = Table.grid(padding=(0, 2))
    for name, text in rows:
        table.add_row(Text(printable(name)), Text(printable(text)))
    console.print(table, highlight=False)


def print_heading(console: Console, text: str) -> None:
    """Print a heading: across a terminal, a plain line elsewhere."""
    if console.is_terminal:
        console.rule(Text(printable(text)))
    else:
        print_line(console, f"--- {text} ---")


def counted(number: int, noun: str) -> str:
    """A number and its noun, with an s where it is not one: `1 image`, `1,200 images`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
