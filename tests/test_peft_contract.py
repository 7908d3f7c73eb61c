"""How `make peft-contract` counts; the run itself takes ten minutes."""

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


def as_known(failing=KNOWN_CASES):
    return [
        case
        for test, row in KNOWN_CASES
        for case in (
            (test, row, "LoraConfig", "passed"),
            (test, row, "SnellaConfig", "failure" if (test, row) in failing else "passed"),
        )
    ]


def test_the_contract_holds_if_exactly_the_known_tests_fail(tmp_path, capsys):
    write_report(tmp_path / "report.xml", as_known())
    assert _count(tmp_path / "report.xml", tmp_path) == 0
    assert f"SnellaConfig: {len(KNOWN_CASES)} failure" in capsys.readouterr().out


def test_the_contract_is_broken_by_another_failure(tmp_path, capsys):
    more = [("test_new", "MHA 1", "LoraConfig", "passed"), ("test_new", "MHA 1", "SnellaConfig", "error")]
    write_report(tmp_path / "report.xml", as_known() + more)
    assert _count(tmp_path / "report.xml", tmp_path) == 1
    assert "NOT KNOWN: test_new[MHA 1]: first line" in capsys.readouterr().out


def test_the_contract_is_broken_by_a_known_failure_that_passes(tmp_path, capsys):
    test, row = KNOWN_CASES[-1]
    write_report(tmp_path / "report.xml", as_known(KNOWN_CASES[:-1]))
    assert _count(tmp_path / "report.xml", tmp_path) == 1
    assert f"PASSES NOW: {test}[{row}]" in capsys.readouterr().out


def test_what_lora_fails_too_is_not_counted(tmp_path):
    both = [("test_both", "MHA 1", method, "failure") for method in ("LoraConfig", "SnellaConfig")]
    write_report(tmp_path / "report.xml", as_known() + both)
    assert _count(tmp_path / "report.xml", tmp_path) == 0


def test_a_report_without_lora_compares_nothing(tmp_path):
    write_report(tmp_path / "report.xml", [("test_new", "MHA 1", "SnellaConfig", "passed")])
    with pytest.raises(RuntimeError, match=r"no test of LoRA passed, so that nothing was compared; see output\.txt"):
        _count(tmp_path / "report.xml", Path("output.txt"))


def test_the_documents_show_the_known_failures():
    page = Path(__file__).parents[1] / "docs" / "library-reference.md"
    assert known_table() in page.read_text(encoding="utf-8")
