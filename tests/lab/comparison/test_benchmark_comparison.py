"""Comparisons on benchmark folders: protocols and the paper's numbers."""

import json

import pytest

from snella_lab.comparison.compare import compare
from snella_lab.comparison.options import ExecutionConfig
from tests.benchmark_folders import write_vtab


@pytest.fixture(scope="module")
def camelyon(tmp_path_factory):
    sizes = {"train800": 12, "val200": 6, "test": 8}
    return write_vtab(tmp_path_factory.mktemp("vtab-1k") / "patch_camelyon", 2, sizes, side=32)


@pytest.fixture
def rows(camelyon, tiny, tmp_path, console):
    """Return a function that runs a tiny comparison and returns its rows, its report and the console output."""

    def make(factors=(0.3, 1.0), **train):
        experiment = tiny(
            methods=["linear", "lora-2"],
            data=[{"name": "patch_camelyon", "data": f"vtab:{camelyon}", "group": "specialized", "batch_size": 6}],
            grid={"lr_factors": list(factors), "weight_decays": [], "max_extensions": 0},
            forgetting=[],
            published={"source": "Table XIII", "values": {"linear": {"patch_camelyon": 78.5}}},
            train={
                "strict_sizes": False, "epochs": 1, "augment": "none", "train_size": None, "val_size": None,
                "test_size": None, **train,
            },
        )  # fmt: skip
        page = compare(experiment, tmp_path / "out", ExecutionConfig(workers=0), console=console)
        lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines], page.read_text(), console.file.getvalue()

    return make


def with_purpose(rows, purpose):
    return [row for row in rows if row["purpose"] == purpose]


def test_final_runs_also_train_on_the_validation_images(rows):
    results, page, printed = rows(protocol="final")
    assert not [row for row in results if row["status"] != "success"]
    trials, finals = with_purpose(results, "trial"), with_purpose(results, "final")
    assert (len(trials), len(finals)) == (4, 2)
    assert {(row["protocol"], row["sizes"]["train"], row["sizes"]["val"]) for row in trials} == {("standard", 12, 6)}
    assert {(row["protocol"], row["sizes"]["train"], row["sizes"]["val"]) for row in finals} == {("final", 18, 0)}
    assert all(row["test_accuracy"] is None for row in trials) and all(
        row["test_accuracy"] is not None for row in finals
    )
    assert {row["selected_on"] for row in finals} == {None} and {row["selected_on"] for row in trials} == {"val"}
    assert "after the last epoch of training on training and validation images" in page
    assert "Comparison with the paper" in page and "78.5" in page
    assert "compared with the paper: Table XIII" in printed and "official protocol" not in printed


def test_rows_report_and_console_state_the_official_protocol(rows):
    results, page, printed = rows(factors=(1.0,), protocol="official", ema=0.999)
    assert [row["purpose"] for row in results] == ["final", "final"], "no images remain for tuning"
    assert all(row["status"] == "success" for row in results)
    assert {(row["protocol"], row["selected_on"], row["ema"]) for row in results} == {("official", "test", 0.999)}
    assert 'id="protocol">Official protocol: the epoch was selected on the test images' in page
    assert "official protocol: the epoch was selected on the test images" in printed
