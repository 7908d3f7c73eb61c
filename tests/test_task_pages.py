"""Commands in the task pages and guides are valid."""

import re
import shlex
from pathlib import Path

import pytest

from snella_app.cli.parser import parse
from snella_lab.comparison.experiment_files import bundled_experiments

ROOT = Path(__file__).parents[1]
PLACEHOLDER = re.compile(r"…|\b(RUN|NAME|IMAGES|FOLDER|DIR|FILE)\b")
PAGES = ("benchmarks", "tasks", "generation", "language")
GUIDES = ("index", "data", "training", "using-a-run", "compare")


def commands(text):
    """Return complete commands: without placeholders, with joined lines and substituted loop variables."""
    joined = text.replace("\\\n", " ")
    lines = re.findall(r"^ *(?:for .*; do )?snella (.*)$", joined, re.MULTILINE)
    inline = re.findall(r"`snella ([^`\n]+)`", joined)
    complete = [line for line in (*lines, *(line for line in inline if " " in line)) if not PLACEHOLDER.search(line)]
    return [shlex.split(line.replace("$method", "lora-8").replace("$subject", "dog6")) for line in complete]


def page_commands(page):
    lines = [shlex.join(args) for args in commands((ROOT / "docs" / f"{page}.md").read_text())]
    return [(page, line) for line in dict.fromkeys(lines)]


@pytest.mark.parametrize(("page", "line"), [pair for page in (*PAGES, *GUIDES) for pair in page_commands(page)])
def test_commands_of_a_page_are_valid(page, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    args = shlex.split(line)
    name, settings = parse(args)
    assert name == args[0]
    experiment = settings.get("experiment")
    is_in_page = f"Save the file as `{experiment}`" in (ROOT / "docs" / f"{page}.md").read_text()
    assert is_in_page or experiment in {None, *bundled_experiments()}


@pytest.mark.parametrize("path", ["polyp/table5", "dreambooth/table6", "language/table18"])
def test_commands_of_an_experiment_file_are_valid(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "experiments" / f"{path}.yaml").read_text()
    lines = re.findall(r"^#.*?\bsnella (\w[\w-]* .*)$", text, re.MULTILINE)
    assert lines
    for line in lines:
        args = shlex.split(line.replace("$subject", "dog6"))
        assert parse(args)[0] == args[0]


@pytest.mark.parametrize("page", PAGES)
def test_pages_have_commands_and_estimates_of_their_cost(page):
    text = (ROOT / "docs" / f"{page}.md").read_text()
    assert page_commands(page)
    assert "(notes/paper.md#cost-of-the-papers-tables)" in text


def test_notes_estimate_the_cost_of_each_task():
    text = (ROOT / "docs/notes/paper.md").read_text()
    section = text.split("## Cost of the paper's tables\n")[1]
    section = section.split("\n## ")[0]
    for row in ("table1-vtab", "table1-fgvc", "SAM ViT-B", "training one subject", "170,000 examples"):
        assert re.search(rf"^\| [^|]*{re.escape(row)}", section, re.MULTILINE), row
