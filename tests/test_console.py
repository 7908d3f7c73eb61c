import io
import subprocess
import sys

import pytest
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from snella_app.console import counted, make_console, print_line, print_rows, printable
from snella_app.data.sources import broken_images, show_reading


def test_files_get_unwrapped_lines_without_padding():
    file = io.StringIO()
    console = make_console(file)
    table = Table(show_header=False, box=None)
    table.add_row("a", "word " * 60)
    table.add_row("long name", "short")
    console.print(table)
    lines = file.getvalue().splitlines()
    assert len(lines) == 2 and all(line == line.rstrip(" ") for line in lines)
    assert lines[0].count("word") == 60 and lines[1].endswith("short")
    assert not console.is_terminal and console.file.encoding


def test_standard_output_is_the_default(capsys):
    make_console().print("x " * 100, soft_wrap=True)
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize(("is_terminal", "is_enabled"), [(True, True), (True, False), (False, True)])
def test_reading_progress_is_shown_on_a_terminal_if_enabled(is_terminal, is_enabled, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    console = Console(file=io.StringIO(), width=80, force_terminal=is_terminal, color_system=None)
    with show_reading(console if is_enabled else None):
        assert broken_images([tmp_path / "a.png"]) == {}
    shown = console.file.getvalue()
    assert ("reading images" in shown) == (is_terminal and is_enabled)
    assert broken_images([tmp_path / "a.png"]) == {} and console.file.getvalue() == shown


def test_terminal_width_is_preserved(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    console = make_console(io.StringIO())
    assert console.is_terminal and console.width < 1000


@pytest.mark.parametrize("is_terminal", [True, False])
def test_rows_have_two_columns_and_wrap_only_on_a_terminal(is_terminal):
    console = Console(file=io.StringIO(), width=40, force_terminal=is_terminal, color_system=None)
    print_rows(console, [("data", "[bold] " + "word " * 15), ("memory", "1 MiB")])
    lines = console.file.getvalue().splitlines()
    assert (len(lines) > 2) == is_terminal
    assert lines[0].startswith("data    [bold] word") and lines[-1].startswith("memory  1 MiB")
    assert max(map(len, lines)) <= 40 or not is_terminal


def test_numbers_and_nouns_agree():
    assert (counted(1, "image"), counted(0, "step"), counted(1200, "image")) == ("1 image", "0 steps", "1,200 images")


NAMES = {
    "cat[final].png": "cat[final].png",
    "exp[/b] :smile:": "exp[/b] :smile:",
    "a\x1b]0;title\x07\x1b[2Jb": r"a\x1b]0;title\x07\x1b[2Jb",
    "caf\udce9": r"caf\udce9",
    "photo\u202egnp.exe": r"photo\u202egnp.exe",
    "a\u200e\u200f\u061c": r"a\u200e\u200f\u061c",
    "naïve 猫 👩‍🚀.png": "naïve 猫 👩‍🚀.png",
}


@pytest.mark.parametrize("is_project_console", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_names_are_printed_literally(name, is_project_console):
    file = io.StringIO()
    print_line(make_console(file) if is_project_console else Console(file=file, width=200), f"adapter {name}")
    assert file.getvalue() == f"adapter {NAMES[name]}\n"
    print_rows(Console(file=file, width=200, force_terminal=True, color_system=None), [("data", name)])
    assert NAMES[name] in file.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_tables_print_names_literally(name):
    table = Table(title=f"in {name}")
    table.add_column(name)
    table.add_row(name)
    table.add_row(Text(name))
    file = io.StringIO()
    make_console(file).print(table)
    assert file.getvalue().count(NAMES[name]) >= 3 and "\x1b" not in file.getvalue()


def test_line_breaks_and_tabs_are_preserved():
    assert printable("a\tb\nc\r") == "a\tb\nc\\r"


def test_work_continues_when_the_output_is_closed():
    code = (
        "import sys; from snella_app.console import *; console = make_console(survives_closed_output=True)\n"
        "for number in range(2000): print_line(console, f'line {number} ' + 'x' * 100)\n"
        "print('done', file=sys.stderr)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("line 0")
    process.stdout.close()
    stderr = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 0
    assert stderr == "snella: cannot write the output ([Errno 32] Broken pipe); the run continues\ndone\n"
