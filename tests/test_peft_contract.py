"""Result counting of `make peft-contract`; the run itself takes ten minutes."""

from pathlib import Path
from xml.sax.saxutils import quoteattr

import pytest

from .peft_contract import KNOWN, _count, known_table

KNOWN_CASES = [(test, row) for test, (_, rows) in KNOWN.items() for row in rows]


def write_report(path, cases):
    lines = []
    for test, row, method, outcome in cases:
        name = quoteattr(f"{test}[{row} {method}-MLP-{method}-config_kwargs0]")
        body = "" if outcome == "passed" else f'<{outcome} message="first line&#10;second"/>'
        lines.append(f"<testcase name={name}>{body}</testcase>")
    path.write_text(f"<testsuites><testsuite>{''.join(lines)}</testsuite></testsuites>")


def known_outcomes(failing=KNOWN_CASES):
    return [
        case
        for test, row in KNOWN_CASES
        for case in (
            (test, row, "LoraConfig", "passed"),
            (test, row, "SnellaConfig", "failure" if (test, row) in failing else "passed"),
        )
    ]


def test_contract_passes_if_exactly_the_known_tests_fail(tmp_path, capsys):
    write_report(tmp_path / "report.xml", known_outcomes())
    assert _count(tmp_path / "report.xml", tmp_path) == 0
    assert f"SnellaConfig: {len(KNOWN_CASES)} failure" in capsys.readouterr().out


def test_contract_fails_for_an_unknown_failure(tmp_path, capsys):
    new_failure = [("test_new", "MHA 1", "LoraConfig", "passed"), ("test_new", "MHA 1", "SnellaConfig", "error")]
    write_report(tmp_path / "report.xml", known_outcomes() + new_failure)
    assert _count(tmp_path / "report.xml", tmp_path) == 1
    assert "NOT KNOWN: test_new[MHA 1]: first line" in capsys.readouterr().out


def test_contract_fails_if_a_known_failure_passes(tmp_path, capsys):
    test, row = KNOWN_CASES[-1]
    write_report(tmp_path / "report.xml", known_outcomes(KNOWN_CASES[:-1]))
    assert _count(tmp_path / "report.xml", tmp_path) == 1
    assert f"PASSES NOW: {test}[{row}]" in capsys.readouterr().out


def test_failures_shared_with_lora_are_ignored(tmp_path):
    both = [("test_both", "MHA 1", method, "failure") for method in ("LoraConfig", "SnellaConfig")]
    write_report(tmp_path / "report.xml", known_outcomes() + both)
    assert _count(tmp_path / "report.xml", tmp_path) == 0


def test_report_without_lora_raises(tmp_path):
    write_report(tmp_path / "report.xml", [("test_new", "MHA 1", "SnellaConfig", "passed")])
    with pytest.raises(RuntimeError, match=r"no LoRA test passed, nothing was compared; see output\.txt"):
        _count(tmp_path / "report.xml", Path("output.txt"))


def test_documents_list_the_known_failures():
    page = Path(__file__).parents[1] / "docs" / "notes" / "checks.md"
    assert known_table() in page.read_text(encoding="utf-8")
