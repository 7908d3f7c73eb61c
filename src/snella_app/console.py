"""Rich consoles that wrap and pad lines only on terminals and never parse text as markup."""

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
"""Width of files and pipes, where lines are not wrapped."""
_BIDI_CONTROLS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Characters that change the direction of the following text."""


class _Unpadded:
    """Stream wrapper that strips trailing spaces."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write text without trailing spaces. These are padding, because rich writes whole lines."""
        return self.stream.write("\n".join(line.rstrip(" ") for line in text.split("\n")))

    def flush(self) -> None:
        """Flush the stream."""
        self.stream.flush()

    def isatty(self) -> bool:
        """Return False, because the stream is a file or a pipe."""
        return False


class _PersistentStream:
    """Stream wrapper that discards all output after the first write error, e.g. because a pipe was closed."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        """Forward other attributes to the stream."""
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write the text, or discard it after an error."""
        with self._until_error():
            return self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream, which has no effect after an error."""
        with self._until_error():
            self.stream.flush()

    @contextlib.contextmanager
    def _until_error(self) -> Iterator[None]:
        """Catch the first write error, print a warning, and redirect the stream to the null device."""
        try:
            yield
        except OSError as error:
            with contextlib.suppress(OSError, ValueError):
                null_device = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null_device, self.stream.fileno())
                os.close(null_device)
            with contextlib.suppress(OSError):
                print(f"snella: cannot write the output ({error}); the run continues", file=sys.stderr)


class _PlainConsole(Console):
    """Console without markup that escapes control characters."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Render text without markup, with control characters escaped."""
        return super().render_str(printable(text), **{**options, "markup": False, "emoji": False, "highlight": False})

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render a renderable, with the control characters of a `Text` escaped."""
        if isinstance(renderable, Text) and printable(renderable.plain) != renderable.plain:
            renderable = Text(printable(renderable.plain), renderable.style)
        return super().render(renderable, options)


def make_console(file: IO[str] | None = None, *, survives_closed_output: bool = False) -> Console:
    """Create a console that wraps and pads lines only if `file` is a terminal.

    Args:
        file: Output stream; standard output if None.
        survives_closed_output: Continue without output if writing fails, e.g. because a terminal or pipe was closed.
    """
    stream = sys.stdout if file is None else file
    stream = cast(IO[str], _PersistentStream(stream)) if survives_closed_output else stream
    console = _PlainConsole(file=stream)
    if console.is_terminal:
        return console
    return _PlainConsole(file=cast(IO[str], _Unpadded(stream)), width=_UNLIMITED_WIDTH)


def printable(text: str) -> str:
    r"""Escape control characters, lone surrogates and bidirectional controls, e.g. ESC as `\x1b`.

    File names can contain any of these. Line breaks and tabs are unchanged.
    """
    escaped = {char for char in text if unicodedata.category(char) in ("Cc", "Cs") or char in _BIDI_CONTROLS}
    return text.translate({ord(char): repr(char)[1:-1] for char in escaped - {"\n", "\t"}})


def print_line(console: Console, text: str) -> None:
    """Print a line without wrapping, markup or color, and with control characters escaped."""
    console.print(Text(printable(text)), soft_wrap=True)


def print_rows(console: Console, rows: Sequence[tuple[str, str]]) -> None:
    """Print name-value pairs in two columns. On a terminal, long values wrap within their column."""
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
    """Create a table whose first `left` columns are left-aligned, and whose other columns are right-aligned."""
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < left else "right")
    for row in rows:
        table.add_row(*row)
    return table


def track_progress(items: Iterable[_T], text: str, total: int, console: Console | None) -> Iterable[_T]:
    """Wrap items in a progress bar if the console is a terminal; otherwise, return them unchanged."""
    if console is None or not console.is_terminal:
        return items
    from rich.progress import track

    return track(items, text, total=total, console=console, transient=True)


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Format a count with its noun: `1 image`, `1,200 images`. By default, `plural` is `noun` with an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
