"""The examples in the documentation."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def python_blocks(page: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL))


@pytest.mark.parametrize("page", ["library.md", "methods.md"])
def test_every_python_block_of_a_page_runs_in_order(page, tmp_path, monkeypatch):
    source = python_blocks(page)
    assert source, f"{page} has no python block"
    monkeypatch.chdir(tmp_path)
    exec(compile(source, page, "exec"), {"__name__": "__main__"})


def test_links_between_pages_lead_somewhere():
    pages = [*DOCS.glob("*.md"), DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md"]
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"
