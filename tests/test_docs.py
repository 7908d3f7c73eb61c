"""The examples in the documentation."""

import re
from functools import partial
from pathlib import Path

import pytest

from snella.data import load
from snella.methods import registry
from snella.ops import kernels

DOCS = Path(__file__).parents[1] / "docs"


def python_blocks(page: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL))


def _restore(table: dict, before: dict) -> None:
    table.clear()
    table.update(before)


@pytest.mark.parametrize("page", ["data.md", "extending.md", "library.md", "methods.md"])
def test_every_python_block_of_a_page_runs_in_order(page, tmp_path, monkeypatch, request):
    for home, name in ((kernels, "KERNELS"), (registry, "METHODS"), (load, "_IN_FOLDERS")):
        before = dict(getattr(home, name))  # extending.md enters examples into these tables
        request.addfinalizer(partial(_restore, getattr(home, name), before))
    source = python_blocks(page)
    assert source, f"{page} has no python block"
    monkeypatch.chdir(tmp_path)
    exec(compile(source, page, "exec"), {"__name__": "__main__"})


def test_links_between_pages_lead_somewhere():
    pages = [*DOCS.rglob("*.md"), DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md"]
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"


def test_the_audit_of_the_paper_names_files_and_commands_that_are_there():
    from snella.cli.parser import COMMANDS

    page, root = (DOCS / "paper.md").read_text(), DOCS.parent
    named = set(re.findall(r"`((?:[\w-]+/)+[\w.-]+\.(?:py|yaml|svg))`", page)) | set(
        re.findall(r"`(table[\w-]+\.yaml)`", page)
    )
    places = (root, root / "src" / "snella", root / "experiments" / "paper")
    assert len(named) > 25
    assert not [name for name in sorted(named) if not any((place / name).exists() for place in places)]
    commands = set(re.findall(r"`snella ([a-z-]+)", page))
    assert len(commands) > 6 and commands <= set(COMMANDS)
