"""Consoles for terminals and files: only a terminal gets wrapped and padded lines; text is never markup."""

import contextlib
import os
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any, TypeVar, cast

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

_T = TypeVar("_T")
_UNLIMITED_WIDTH = 10_000
_BIDI_CONTROLS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


class _Unpadded:
    """A stream without trailing blanks."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write whole lines, as rich does."""
        return self.stream.write("\n".join(line.rstrip(" ") for line in text.split("\n")))

    def flush(self) -> None:
        """Flush the stream."""
        self.stream.flush()

    def isatty(self) -> bool:
        """False, for a file."""
        return False


class _PersistentStream:
    """A stream whose reader may go away; what is written afterwards is discarded."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        """All other attributes of the stream."""
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write, or discard once the output is closed."""
        with self._until_closed():
            return self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, or do nothing once the output is closed."""
        with self._until_closed():
            self.stream.flush()

    @contextlib.contextmanager
    def _until_closed(self) -> Iterator[None]:
        """Redirect the stream to the null device at its first error, and say so once."""
        try:
            yield
        except OSError as error:
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.stream.fileno())
                os.close(nowhere)
            with contextlib.suppress(OSError):
                print(f"snella: the output was closed ({error}); the run continues", file=sys.stderr)


class _PlainConsole(Console):
    """A console without markup; control characters are escaped."""

    def render_str(self, text: str, **options: Any) -> Text:
        """The text without markup, control characters escaped."""
        return super().render_str(printable(text), **{**options, "markup": False, "emoji": False, "highlight": False})

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Segments of a renderable, control characters escaped."""
        if isinstance(renderable, Text) and printable(renderable.plain) != renderable.plain:
            renderable = Text(printable(renderable.plain), renderable.style)
        return super().render(renderable, options)


def make_console(file: IO[str] | None = None, *, survives_closed_output: bool = False) -> Console:
    """A console on `file`, standard output if None; where that is no terminal, lines are neither wrapped nor padded.

    Args:
        file: Where to write.
        survives_closed_output: Whether work continues when the output is closed, as by `| head` or by closing the
            terminal.
    """
    stream = sys.stdout if file is None else file
    stream = cast(IO[str], _PersistentStream(stream)) if survives_closed_output else stream
    console = _PlainConsole(file=stream)
    if console.is_terminal:
        return console
    return _PlainConsole(file=cast(IO[str], _Unpadded(stream)), width=_UNLIMITED_WIDTH)


def printable(text: str) -> str:
    r"""The text with control characters, such as those of terminals' sequences, written as `\x1b`.

    Names of files may hold them, bytes that are not UTF-8 (as Python has them: lone surrogates), and characters that
    change the direction of text. Line breaks and tabs stay.
    """
    return "".join(sign if _is_harmless(sign) else repr(sign)[1:-1] for sign in text)


def _is_harmless(sign: str) -> bool:
    """Whether a character is printable and has no side effect on a terminal."""
    if sign in "\n\t":
        return True
    return unicodedata.category(sign) not in ("Cc", "Cs") and sign not in _BIDI_CONTROLS


def print_line(console: Console, text: str) -> None:
    """Print a line verbatim, neither wrapped nor colored."""
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


def make_table(
    columns: Iterable[str], rows: Iterable[Iterable[str]], *, title: str | None = None, left: int = 1
) -> Table:
    """A table whose first `left` columns are aligned to the left, and whose others, numbers, to the right."""
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number < left else "right")
    for row in rows:
        table.add_row(*row)
    return table


def print_heading(console: Console, text: str) -> None:
    """Print a heading: across a terminal, a plain line elsewhere."""
    if console.is_terminal:
        console.rule(Text(printable(text)))
    else:
        print_line(console, f"--- {text} ---")


def tracked(items: Iterable[_T], text: str, total: int, console: Console | None) -> Iterable[_T]:
    """The same items, with a bar of how many of `total` have gone by on a terminal; None for no console."""
    if console is None or not console.is_terminal:
        return items
    from rich.progress import track

    return track(items, text, total=total, console=console, transient=True)


def counted(number: int, noun: str) -> str:
    """A number and its noun, with an s where it is not one: `1 image`, `1,200 images`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
