"""Sources and documents use standard terms."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WORDS = {
    r"(?<!make )(?<!benchmarks/)faults?": "error",
    r"gone on with|goes on": "resumed, continues",
    r"ways? out": "remedy",
    r"no trace of us|nothing of ours": "plain timm weights",
    r"contenders?": "method, baseline",
    r"learnt": "trained",
    r"in earnest": "in practice",
    r"hopeless": "blocked",
    r"by halves": "all-or-nothing",
    r"its kin": "variants",
    r"head start": "linear-probe initialization",
    r"whole or not at all|complete or invisible": "atomically",
    r"for people\.|in words\.": "human-readable",
    r"is told\.|are told\.": "configuration",
    r"jumps about|is no number": "diverges, is NaN",
    r"forgives?|forgiving": "is less sensitive",
    r"verdicts": "per-sample outputs",
    r"peaky": "concentrated",
    r"as sure as right|share that is right|is certain to": "perfectly calibrated, fraction correct, 95% margin",
    r"package-borne": "bundled",
    r"\w*(optimis(?!t)|initialis|normalis|summaris|recognis|personalis|quantis|regularis)\w*": "American spelling",
    r"\w*(colou?ur|neighbour|behaviour|favour)\w*|catalogue|labelled|judgement|centred": "American spelling",
}
ALLOWED = {"docs/notes": "laboratory notes"}
"""Excluded folders and files with the reason."""
FILES = [
    path
    for pattern in ("src/**/*.py", "src/**/*.jinja", "src/**/*.md", "docs/**/*.md", "README.md")
    for path in sorted(ROOT.glob(pattern))
    if not any(path.relative_to(ROOT).as_posix().startswith(allowed) for allowed in ALLOWED)
]


@pytest.mark.parametrize("word", WORDS)
def test_sources_and_documents_avoid_listed_words(word):
    pattern = re.compile(rf"(?<![A-Za-z])(?:{word})(?![A-Za-z])", re.IGNORECASE)
    matches = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:90]}"
        for path in FILES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if pattern.search(line)
    ]
    assert not matches, f"use {WORDS[word]!r} instead:\n" + "\n".join(matches)


def test_checked_files_include_sources_and_readme():
    assert len(FILES) > 100 and any(path.name == "README.md" for path in FILES)
