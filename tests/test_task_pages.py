"""The pages of the paper's tasks: what they tell to type is what the program takes."""

import re
import shlex
from pathlib import Path

import pytest

from snella_app.cli.parser import parse
from snella_lab.comparison.experiment_files import bundled_experiments

ROOT = Path(__file__).parents[1]
PLACEHOLDER = re.compile(r"…|\b(RUN|NAME|IMAGES|FOLDER|DIR|FILE)\b")
PAGES = ("benchmarks", "segmentation", "generation", "language")
GUIDES = ("targets", "data", "training", "using-a-run", "walkthroughs", "compare", "export")


def commands(text):
    """Those to type as they stand: no placeholder in them, continued lines joined, a loop's variable filled in."""
    joined = text.replace("\\\n", " ")
    lines = re.findall(r"^ *(?:for .*; do )?snella (.*)$", joined, re.MULTILINE)
    inline = re.findall(r"`snella ([^`\n]+)`", joined)
    whole = [line for line in (*lines, *(line for line in inline if " " in line)) if not PLACEHOLDER.search(line)]
    return [shlex.split(line.replace("$method", "lora-8").replace("$subject", "dog6")) for line in whole]


def of_page(page):
    lines = [shlex.join(words) for words in commands((ROOT / "docs" / f"{page}.md").read_text())]
    return [(page, line) for line in dict.fromkeys(lines)]


@pytest.mark.parametrize(("page", "line"), [pair for page in (*PAGES, *GUIDES) for pair in of_page(page)])
def test_every_command_of_a_page_is_one_that_the_program_takes(page, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(line)
    name, _, settings = parse(words)
    assert name == words[0]
    assert settings.get("experiment") in {None, *bundled_experiments()}


@pytest.mark.parametrize("path", ["polyp/table5", "dreambooth/table6", "language/table18"])
def test_every_command_of_an_experiment_file_is_one_that_the_program_takes(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "experiments" / f"{path}.yaml").read_text()
    found = re.findall(r"^#.*?\bsnella (\w[\w-]* .*)$", text, re.MULTILINE)
    assert found
    for line in found:
        words = shlex.split(line.replace("$subject", "dog6"))
        assert parse(words)[0] == words[0]


@pytest.mark.parametrize("page", PAGES)
def test_every_page_has_commands_and_says_what_they_cost_and_what_the_paper_reports(page):
    text = (ROOT / "docs" / f"{page}.md").read_text()
    assert of_page(page)
    assert re.search(r"^##+ Cost$", text, re.MULTILINE)
    assert "paper" in text.split("<!-- cost ends -->")[1]
