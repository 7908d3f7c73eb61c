"""Examples and links in the documentation."""

import importlib
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
def test_python_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch, request):
    for home, name in ((kernels, "KERNELS"), (registry, "METHODS")):
        before = dict(getattr(home, name))  # extending.md registers examples in these tables
        request.addfinalizer(partial(_restore, getattr(home, name), before))
    source = python_blocks(page)
    assert source, f"{page} has no python block"
    monkeypatch.chdir(tmp_path)
    exec(compile(source, page, "exec"), {"__name__": "__main__"})


ROOT = DOCS.parent
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md"), *(ROOT / "src").rglob("*.md")])


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings in GitHub's and MkDocs' style."""
    text = re.sub(r"^(```|~~~).*?^\1", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    slugs: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?) *#*$", text, re.MULTILINE):
        text_only = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", text_only).strip().replace(" ", "-")
        slugs |= {slug, re.sub(r"-+", "-", slug)}
    return slugs | set(re.findall(r'(?:id|name)="([^"]+)"', text))


def broken_links(page: Path) -> list[str]:
    """Return links and images of a page without an existing file or heading."""
    text = page.read_text()
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:href|src)="([^"]+)"', text)
    broken = []
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        exists = file.exists() and (anchor in ("", "only-light", "only-dark") or anchor in anchors(file))
        broken += [] if exists else [target]
    return broken


def test_links_and_anchors_resolve():
    broken = {str(page.relative_to(ROOT)): links for page in PAGES if (links := broken_links(page))}
    assert len(PAGES) > 25 and not broken


def test_broken_links_are_detected(tmp_path):
    (tmp_path / "other.md").write_text("# Speed & memory, of `a_b`\n\n## [Linked](x.md) title\n")
    valid = "[a](other.md#speed-memory-of-a_b) [b](other.md#linked-title) [c](#here) [d](https://e.org/#x)\n\n# Here\n"
    page = tmp_path / "page.md"
    page.write_text(valid + "[e](other.md#speed) [f](none.md) [g](#gone)")
    assert broken_links(page) == ["other.md#speed", "none.md", "#gone"]


def test_paper_page_names_existing_files_and_commands():
    from snella_app.cli.parser import COMMANDS

    page, root = (DOCS / "paper.md").read_text(), DOCS.parent
    named = set(re.findall(r"`((?:[\w-]+/)+[\w.-]+\.(?:py|yaml|svg))`", page)) | set(
        re.findall(r"`(table[\w-]+\.yaml)`", page)
    )
    roots = (root, root / "src", root / "experiments" / "paper")
    assert len(named) > 25
    assert not [name for name in sorted(named) if not any((root_folder / name).exists() for root_folder in roots)]
    commands = set(re.findall(r"`snella ([a-z-]+)", page))
    assert len(commands) > 6 and commands <= set(COMMANDS)


def test_names_in_the_reference_exist():
    names = [name for page in PAGES for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), flags=re.M)]
    assert len(names) > 30
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name
