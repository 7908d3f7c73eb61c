import io

import pytest
from rich.console import Console
from rich.table import Table

from snella.runs.console import counted, make_console, print_heading, print_rows


def test_what_is_no_terminal_gets_whole_lines_without_padding():
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


def test_a_terminal_keeps_its_width(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    console = make_console(io.StringIO())
    assert console.is_terminal and console.width < 1000


@pytest.mark.parametrize("is_terminal", [True, False])
def test_rows_stand_in_two_columns_and_are_wrapped_on_a_terminal_only(is_terminal):
    console = Console(file=io.StringIO(), width=40, force_terminal=is_terminal, color_system=None)
    print_rows(console, [("data", "[bold] " + "word " * 15), ("memory", "1 MiB")])
    lines = console.file.getvalue().splitlines()
    assert (len(lines) > 2) == is_terminal
    assert lines[0].startswith("data    [bold] word") and lines[-1].startswith("memory  1 MiB")
    assert max(map(len, lines)) <= 40 or not is_terminal


def test_numbers_and_nouns_agree():
    assert (counted(1, "image"), counted(0, "step"), counted(1200, "image")) == ("1 image", "0 steps", "1,200 images")


def test_a_heading_in_a_file_is_one_short_line():
    file = io.StringIO()
    print_heading(make_console(file), "1/3  linear")
    assert file.getvalue() == "--- 1/3  linear ---\n"
