"""Files written by commit 99db782 (`tests/old_files/README.md`) are read with the same results."""

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from snella_app.files import sealed
from snella_app.records.predictions import Predictions
from snella_app.records.record import plain, read, record_from
from snella_app.records.run import Allocation, Metrics, RunInfo
from snella_app.report.inspect import current_budgets, inspect_run, read_adapter
from snella_app.runs import RunFolder
from snella_app.runs.evaluate import evaluate, rewrite_report
from snella_app.runs.predict import load
from snella_app.text import bytes_text
from snella_lab.comparison.compare import compare
from snella_lab.comparison.options import ExecutionConfig
from snella_lab.comparison.rows import CellRow
from snella_lab.comparison.store import read_lines

OLD = Path(__file__).parent / "old_files"


@pytest.fixture
def run(tmp_path):
    return Path(shutil.copytree(OLD / "run", tmp_path / "run"))


@pytest.fixture
def expected():
    return json.loads((OLD / "run_expected.json").read_text())


def test_old_run_reproduces_predictions_and_metrics(run, expected):
    for prediction in load(run).predict([OLD / "images"]):
        stored = expected["predict"][prediction.path.name]
        assert [name for name, _ in prediction.ranking] == list(stored)
        for name, probability in prediction.ranking:
            assert probability == pytest.approx(stored[name], rel=1e-4)
    result = evaluate(run)
    assert result.pop("loss") == pytest.approx(expected["evaluate"].pop("loss"), rel=1e-4)
    assert result == expected["evaluate"]


def test_old_run_reproduces_the_inspection(run, expected):
    stored = expected["inspect"]
    budgets, sizes, parameters = stored["budgets"], stored["sizes"], stored["parameters"]
    info, adapter, allocation = read(RunInfo, run), read_adapter(run), read(Allocation, run)
    for name in ("status", "error", "task", "method", "method_options", "classes", "command"):
        assert getattr(info, name) == stored[name], name
    assert plain(info.backbone) == stored["backbone"]
    assert {key: plain(info.data)[key] for key in stored["data"]} == stored["data"]
    assert dict(adapter.parts) == parameters["parts"]
    assert adapter.config == stored["settings"]
    matrices = {matrix["name"]: matrix for matrix in budgets["matrices"]}
    assert current_budgets(adapter, allocation) == {name: matrix["budget"] for name, matrix in matrices.items()}
    assert {matrix.name: matrix.nonzeros for matrix in allocation.matrices} == {
        name: matrix["nonzeros"] for name, matrix in matrices.items()
    }
    console = Console(file=io.StringIO(), width=200)
    console.print(inspect_run(run))
    text = " ".join(console.file.getvalue().split())
    for phrase in (
        "status finished method snella-2 options r: 2, target_sparsity: 0.7, scaling: 10",
        "backbone test_vit data digits, 10 classes, train: 40, val: 20, test: 20",
        f"validation {stored['scores']['validation']['text']}, 20 images test {stored['scores']['test']['text']}, 20",
        f"best epoch {stored['best_epoch']} of {stored['epochs']}, {stored['train_s']:.1f} s",
        f"trainable {parameters['trainable']:,} parameters",
        f"adapter {bytes_text(sizes['adapter_bytes'])}: snella_A 6,144",
        f"budget {budgets['kept']:,} of {budgets['total_weights']:,} adapted weights",
        f"target {budgets['target']:,} at the end of the schedule; {budgets['allocations']} allocations",
        f"sparse update {bytes_text(sizes['sparse_update_bytes'])} (value",
        f"dense adapted matrices {bytes_text(sizes['adapted_weights_bytes'])}",
        "No matrix is frozen.",
        f"Non-zero entries: {budgets['nonzeros']:,}, equal to the budget (from the adapter file) in every matrix.",
    ):
        assert phrase.replace("\N{NO-BREAK SPACE}", " ") in text, phrase
    grid = [line.split() for line in console.file.getvalue().splitlines() if line.strip()[:1].isdigit()]
    rows = zip(*(budgets["sparsity"][kind] for kind in budgets["kinds"]), strict=True)
    for (depth, *cells), expected_depth, sparsities in zip(grid, budgets["depths"], rows, strict=True):
        assert depth == str(expected_depth) and cells == [f"{min(100 * s, 99.9):.1f}" for s in sparsities]


def test_report_of_an_old_run_is_written(run):
    page = rewrite_report(run, Console(quiet=True)).read_text()
    assert "snella-2 on digits" in page and "sparsity-map" in page and "<img" in page


@pytest.mark.parametrize("kind", [RunInfo, Metrics, Allocation, Predictions])
def test_written_files_contain_the_keys_and_values_of_old_files(kind, run):
    """Old versions read these keys."""
    before = json.loads((run / kind.file).read_text())
    RunFolder(run).write(read(kind, run))
    after = json.loads((run / kind.file).read_text())
    assert read(kind, run) == read(kind, OLD / "run")
    assert contains(after, before)


def contains(new, old):
    """Return True if `new` contains all keys and values of `old`, recursively."""
    if isinstance(old, dict):
        return all(key in new and contains(new[key], value) for key, value in old.items())
    return len(new) == len(old) and all(map(contains, new, old)) if isinstance(old, list) else new == old


def numbers_of(page):
    """Return the snella-2 row of each Markdown table by column, without empty columns."""
    rows, headings = [], []
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| method"):
            headings = cells
        elif line.startswith("| snella-2"):
            rows.append({name: cell for name, cell in zip(headings, cells, strict=True) if cell != "–"})
    return rows


def test_old_comparison_reproduces_the_numbers(tmp_path):
    folder = Path(shutil.copytree(OLD / "comparison", tmp_path / "comparison"))
    (folder / "comparison.md").unlink()
    console = Console(file=io.StringIO(), width=200)
    page = compare(None, folder, ExecutionConfig(draw_only=True), console=console)
    assert page.is_file() and "note:" not in console.file.getvalue()
    rows, notes = read_lines(folder / "results.jsonl")
    assert len(rows) == 6 and not notes
    expected, actual = (numbers_of((place / "comparison.md").read_text()) for place in (OLD / "comparison", folder))
    for row in expected:
        row["difference from linear"] = row.pop("difference to linear")  # heading in old files
    assert expected[0]["digits"] == "53.3" and expected[0]["changed"] == "73,726"
    added = [
        {name: row.pop(name) for name in list(row) if name not in old}
        for row, old in zip(actual, expected, strict=True)
    ]
    assert actual == expected
    assert all(set(columns) <= {"p", "above"} for columns in added)


def test_comparison_rows_have_the_columns_and_values_of_old_files():
    for line in (OLD / "comparison" / "results.jsonl").read_text().splitlines():
        columns = json.loads(line)
        written = sealed(plain(record_from(CellRow, CellRow.decoded(columns))))
        assert written == columns and list(written) == list(columns)


def test_missing_measurement_is_null():
    assert plain(Metrics(trainable_parameters=1))["train_s"] is None
