"""The examples in the documentation."""

import re
from functools import partial
from pathlib import Path

import pytest

from snella import kernels
from snella_app.methods import registry

DOCS = Path(__file__).parents[1] / "docs"


def python_blocks(page: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL))


def _restore(table: dict, before: dict) -> None:
    table.clear()
    table.update(before)


@pytest.mark.parametrize("page", ["data.md", "extending.md", "library-reference.md", "library.md", "methods.md"])
def test_every_python_block_of_a_page_runs_in_order(page, tmp_path, monkeypatch, request):
    for home, name in ((kernels, "KERNELS"), (registry, "METHODS")):
        before = dict(getattr(home, name))  # extending.md enters examples into these tables
        request.addfinalizer(partial(_restore, getattr(home, name), before))
    source = python_blocks(page)
    assert source, f"{page} has no python block"
    monkeypatch.chdir(tmp_path)
    exec(compile(source, page, "exec"), {"__name__": "__main__"})


ROOT = DOCS.parent
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md"), *(ROOT / "src").rglob("*.md")])


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and MkDocs make them."""
    text = re.sub(r"^(```|~~~).*?^\1", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?) *#*$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-")
        found |= {slug, re.sub(r"-+", "-", slug)}
    return found | set(re.findall(r'(?:id|name)="([^"]+)"', text))


def broken_links(page: Path) -> list[str]:
    """Links and pictures of a page whose file or heading is not there."""
    text = page.read_text()
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:href|src)="([^"]+)"', text)
    broken = []
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        is_there = file.exists() and (anchor in ("", "only-light", "only-dark") or anchor in anchors(file))
        broken += [] if is_there else [target]
    return broken


def test_every_link_and_anchor_of_the_documents_leads_somewhere():
    broken = {str(page.relative_to(ROOT)): found for page in PAGES if (found := broken_links(page))}
    assert len(PAGES) > 25 and not broken


def test_a_link_to_a_heading_or_a_file_that_is_not_there_is_found(tmp_path):
    (tmp_path / "other.md").write_text("# Speed & memory, of `a_b`\n\n## [Linked](x.md) title\n")
    good = "[a](other.md#speed-memory-of-a_b) [b](other.md#linked-title) [c](#here) [d](https://e.org/#x)\n\n# Here\n"
    page = tmp_path / "page.md"
    page.write_text(good + "[e](other.md#speed) [f](none.md) [g](#gone)")
    assert broken_links(page) == ["other.md#speed", "none.md", "#gone"]


def test_the_audit_of_the_paper_names_files_and_commands_that_are_there():
    from snella_app.cli.parser import COMMANDS

    page, root = (DOCS / "paper.md").read_text(), DOCS.parent
    named = set(re.findall(r"`((?:[\w-]+/)+[\w.-]+\.(?:py|yaml|svg))`", page)) | set(
        re.findall(r"`(table[\w-]+\.yaml)`", page)
    )
    places = (root, root / "src", root / "experiments" / "paper")
    assert len(named) > 25
    assert not [name for name in sorted(named) if not any((place / name).exists() for place in places)]
    commands = set(re.findall(r"`snella ([a-z-]+)", page))
    assert len(commands) > 6 and commands <= set(COMMANDS)
