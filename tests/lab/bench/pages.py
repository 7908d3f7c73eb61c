"""Committed rows, and tables and sentences of the documents that show them."""

from functools import cache
from pathlib import Path

from snella_lab.bench.rows import read_rows

ROOT = Path(__file__).parents[3]
README, INDEX, SPEED = "README.md", "docs/index.md", "docs/speed.md"
LIBRARY, TRAINING = "docs/library.md", "docs/training.md"
STEPS, COSTS, CHECKS = "docs/notes/step-time.md", "docs/notes/cost-model.md", "docs/notes/checks.md"
USING, GENERATION = "docs/using-a-run.md", "docs/generation.md"
COMPARISONS, PAPER, PLOTS = "docs/notes/comparisons.md", "docs/notes/paper.md", "docs/plots.md"


@cache
def rows(name):
    return read_rows(ROOT / "benchmarks" / f"{name}.jsonl")


def table(page, head):
    """Return the cells of the table whose first line starts with `head`, without the first column."""
    _, found, rest = (ROOT / page).read_text().partition(f"\n{head}")
    assert found, head
    return [[cell.strip() for cell in line.split("|")[2:-1]] for line in rest.partition("\n\n")[0].splitlines()[2:]]


def assert_states(page, sentence, *values):
    """Check that the page contains the sentence with the values in place of the braces."""
    expected = sentence.format(*values)
    is_stated = f" {expected}" in " ".join((ROOT / page).read_text().split())
    assert is_stated, f"{page} must contain: {expected}"


def span(values, digits=0):
    """Format the smallest and the largest value: 1.2 to 1.6."""
    low, high = (f"{end(values):.{digits}f}" for end in (min, max))
    return low if low == high else f"{low} to {high}"
