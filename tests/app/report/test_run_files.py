import dataclasses
import math

import pytest
from PIL import Image

from snella_app.records.generators import MethodResults
from snella_app.records.predictions import Predictions
from snella_app.records.record import read, read_if_present
from snella_app.records.results import NumberScores, RegressionScores, Scores
from snella_app.records.run import Allocation, Metrics, RunInfo
from snella_app.report.allocation import adapter_step, group_matrices, schedule_epochs
from snella_app.report.inspect import current_budgets
from snella_app.report.report import heat_maps_section


def test_all_values_of_a_finished_run_are_read(run):
    run.finished().comparison()
    info, metrics, allocation = read(RunInfo, run.folder), read(Metrics, run.folder), read(Allocation, run.folder)
    assert (info.method, info.classes, info.is_finished) == ("snella", ["defective", "sound"], True)
    assert info.data.sizes == {"train": 600, "val": 300, "test": 400}
    assert (metrics.best_epoch, len(metrics.history), metrics.adapted_weights) == (9, 10, 21_233_664)
    assert metrics.history[0].budget == allocation.history[1].budget
    assert (len(allocation.matrices), allocation.total_weights) == (72, 21_233_664)
    assert allocation.matrices[0].shape == (384, 384)
    assert all(sum(entry.budgets.values()) == entry.budget for entry in allocation.history)
    assert len(read(Predictions, run.folder).for_classes(2).items) == 300
    assert [row.method for row in read(MethodResults, run.folder).rows] == ["linear", "lora-8", "snella-8"]


@pytest.mark.parametrize(
    ("correct", "count", "interval"),
    [(27, 52, (0.387, 0.649)), (52, 52, (0.931, 1.0)), (0, 10, (0.0, 0.278)), (394, 400, (0.968, 0.993))],
)
def test_the_accuracy_margin_covers_the_farther_end_of_the_wilson_interval(correct, count, interval):
    scores = Scores(correct / count, confusion=[[correct, count - correct], [0, 0]])
    assert scores.images == count
    assert scores.margin == pytest.approx(max(abs(end - scores.accuracy) for end in interval), abs=6e-4)


def test_both_accuracies_have_95_percent_margins_unless_there_are_no_images():
    scores = Scores(0.75, 0.75, confusion=[[30, 10], [10, 30]])
    (_, _, accuracy), (_, _, balanced) = scores.rows("test")
    assert accuracy.replace("\N{NO-BREAK SPACE}", " ") == "95% margin: ±10.5 percentage points, 80 images"
    assert balanced.replace("\N{NO-BREAK SPACE}", " ") == "95% margin: ±9.4 percentage points, mean over classes"
    assert [note for _, _, note in Scores(0.75, 0.75).rows("test")] == ["", "mean over classes"]


def test_errors_of_targets_with_different_units_are_not_averaged():
    several = [NumberScores("age", mae=4.0, rmse=5.0, r2=0.5), NumberScores("weight", mae=900.0, rmse=1000.0, r2=-0.98)]
    scores = RegressionScores(mae=452.0, rmse=502.5, r2=-0.24, images=60, per_target=several)
    rows = scores.rows("test")
    assert [(label, value) for label, value, _ in rows] == [
        ("test R²", "\N{MINUS SIGN}0.240"),
        ("test MAE of age", "4"),
        ("test MAE of weight", "900"),
    ]
    assert "452" not in scores.text() and "502" not in scores.text() and "age 4, weight 900" in scores.text()
    scores = RegressionScores(mae=4.0, rmse=5.0, r2=0.5, images=60, per_target=several[:1])
    assert [(label, value) for label, value, _ in scores.rows("test")] == [
        ("test MAE", "4"),
        ("test RMSE", "5"),
        ("test R²", "0.500"),
    ]


def test_missing_runs_and_missing_folders_have_different_errors(run, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*demo/run.json: this is not a run folder; pass the"):
        read(RunInfo, run.folder)
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere/run.json: no such folder"):
        read(RunInfo, tmp_path / "nowhere")


def test_a_missing_file_is_reported_with_a_remedy(run):
    run.run_json()
    with pytest.raises(FileNotFoundError, match=r"no file .*metrics.json: not written yet.*--resume"):
        read(Metrics, run.folder)
    assert read_if_present(Metrics, run.folder) is None


def test_damaged_json_is_reported_with_line_and_column(run):
    run.finished()
    text = (run.folder / "allocation.json").read_text()
    run.write("allocation.json", text[: len(text) // 2])
    with pytest.raises(
        ValueError, match=r"allocation.json is damaged: .* line 1 column \d+ .*; resume an unfinished .*--resume"
    ):
        read(Allocation, run.folder)
    (run.folder / "run.json").write_bytes(b'{"status": "\xff"}')
    with pytest.raises(ValueError, match=r"run.json is damaged: .*position 12"):
        read(RunInfo, run.folder)


def test_an_unknown_format_number_is_rejected(run):
    run.run_json(format=7)
    with pytest.raises(ValueError, match=r"run.json has format 7, but this version of snella reads format 1"):
        read(RunInfo, run.folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"status": "done"}, r"'status' must be 'running', .*, got 'done'"),
        ({"method": 3}, r"'method' must be a valid string, got 3"),
        ({"backbone": {"weights": None}}, r"'backbone.name' is missing"),
        ({"data": {"seed": 0}}, r"'data.spec' is missing"),
        ({"backbone": ["vit"]}, r"'backbone' must be a dictionary .*, got \['vit'\]"),
    ],
)
def test_an_invalid_field_is_reported_with_its_value(run, change, message):
    run.run_json(**change)
    with pytest.raises(ValueError, match="run.json: " + message):
        read(RunInfo, run.folder)


def test_a_list_is_rejected(run):
    run.write("comparison.json", [1, 2])
    with pytest.raises(ValueError, match=r"comparison.json must contain an object, got \[1, 2\]; .*del"):
        read(MethodResults, run.folder)


def test_a_file_name_that_is_not_utf8_is_read(run):
    run.finished()
    run.change("predictions.json", items=[{"index": 0, "name": "caf\udce9", "label": 0, "probabilities": [1.0]}])
    assert read(Predictions, run.folder).items[0].name == "caf\udce9"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_s": True}, "'train_s' must be a valid number.*, got True"),
        ({"train_s": "0.5"}, "'train_s' must be a valid number.*, got '0.5'"),
        (
            {"val": {"accuracy": 0.5, "confusion": [[1, 2], [3]]}},
            r"val: confusion must be square, got 2 rows of lengths \[1, 2\]",
        ),
    ],
)
def test_an_invalid_metric_is_reported(run, change, message):
    run.finished().change("metrics.json", **change)
    with pytest.raises(ValueError, match=message):
        read(Metrics, run.folder)


def test_an_allocation_that_names_other_matrices_is_rejected(run):
    run.finished()
    values = run.read("allocation.json")
    values["history"][3]["budgets"]["blocks.12.mlp.fc1"] = values["history"][3]["budgets"].pop("blocks.0.mlp.fc1")
    run.write("allocation.json", values)
    with pytest.raises(
        ValueError, match=r"history\[3\] .*unknown \['blocks.12.mlp.fc1'\], no budget for \['blocks.0.mlp.fc1'\]"
    ):
        read(Allocation, run.folder)


def test_predictions_that_do_not_fit_the_classes_are_rejected(run):
    run.finished()
    with pytest.raises(
        ValueError, match=r"items\[0\] has 2 probabilities, label 0 and rank None, but run.json lists 5 classes"
    ):
        read(Predictions, run.folder).for_classes(5)


def test_values_that_were_not_measured_are_nan_or_none(run):
    run.finished()
    values = run.read("metrics.json")
    values["history"][0]["val_loss"] = None
    values["test"] = None
    run.write("metrics.json", values)
    metrics = read(Metrics, run.folder)
    assert math.isnan(metrics.history[0].val_loss)
    assert metrics.test is None


def test_the_adapter_has_the_allocation_of_its_epoch(run):
    run.finished(best=4)
    allocation, metrics = read(Allocation, run.folder), read(Metrics, run.folder)
    assert adapter_step(allocation, metrics).t == 4


@pytest.mark.parametrize("best", [4, 7])  # 7 / 10 of 90 steps are less than 63 in floating point
def test_a_constant_total_keeps_the_allocation_of_the_epoch(best, run):
    run.finished(best=best)
    values = run.read("allocation.json")
    for entry in values["history"]:
        entry.update(budget=1000, step=9 * entry["t"])
    run.write("allocation.json", values)
    metrics = run.read("metrics.json")
    for row in metrics["history"]:
        row["budget"] = 1000
    run.write("metrics.json", metrics)
    assert adapter_step(read(Allocation, run.folder), read(Metrics, run.folder)).t == best


def test_allocation_before_the_end_of_the_first_epoch(run):
    run.finished(best=4)
    metrics = read(Metrics, run.folder)
    start = dataclasses.replace(metrics.history[0], epoch=0)
    metrics = dataclasses.replace(metrics, best_epoch=0, history=[start])
    assert adapter_step(read(Allocation, run.folder), metrics) is not None


def test_the_allocation_defaults_to_the_last_one(run):
    run.allocation()
    allocation = read(Allocation, run.folder)
    assert adapter_step(allocation, None).t == 10
    run.change("allocation.json", history=[])
    allocation = read(Allocation, run.folder)
    assert adapter_step(allocation, None) is None


def test_without_an_adapter_the_budgets_come_from_allocation_json(run):
    run.finished()
    values = run.read("allocation.json")
    values["matrices"][5]["budget"] = 17
    run.write("allocation.json", values)
    allocation = read(Allocation, run.folder)
    assert current_budgets(None, allocation)[allocation.matrices[5].name] == 17


def test_allocation_times_map_to_epochs(run):
    run.finished()
    allocation, metrics = read(Allocation, run.folder), read(Metrics, run.folder)
    assert schedule_epochs(allocation, metrics, is_finished=True) == 10
    run.allocation(epochs=10, realloc=4)
    allocation = read(Allocation, run.folder)
    assert schedule_epochs(allocation, metrics, is_finished=True) == 10
    assert schedule_epochs(allocation, metrics, is_finished=False) is None
    assert schedule_epochs(allocation, None, is_finished=True) is None
    history = [dataclasses.replace(entry, total=28) for entry in allocation.history]  # 70% of 40 steps
    assert schedule_epochs(dataclasses.replace(allocation, history=history), metrics, is_finished=True) == 7


def test_matrices_of_the_same_kind_and_depth_share_a_cell(run):
    run.finished()
    allocation = read(Allocation, run.folder)
    matrices = [m for m in allocation.matrices if m.kind in ("attn.q", "attn.k") and m.depth == 0]
    same = [type(m)(m.name, "attn.q", 0, m.shape, m.size, m.budget, m.nonzeros) for m in matrices]
    grid = group_matrices(same, {same[0].name: same[0].size, same[1].name: 0})
    cell = grid.cells["attn.q", 0]
    assert (cell.count, cell.density, cell.frozen, cell.is_frozen) == (2, 0.5, 1, False)


def test_matrices_outside_the_blocks_come_last(run):
    run.finished()
    matrices = read(Allocation, run.folder).matrices[:2]
    outside = type(matrices[0])("fc_norm", "fc_norm", None, (4, 4), 16, 16, 16)
    assert group_matrices([outside, *matrices], {m.name: 1 for m in [outside, *matrices]}).depths == [0, None]


def test_heat_maps_without_a_method_are_those_of_the_default(run):
    index = run.finished().read("predictions.json")["items"][0]["index"]
    (run.folder / "heat_maps").mkdir()
    Image.new("RGB", (8, 8)).save(run.folder / "heat_maps" / f"{index}.png")
    (entry,) = heat_maps_section(run.folder, read(RunInfo, run.folder), read(Predictions, run.folder))
    assert entry["by"] == "gradcam"
    (run.folder / "heat_maps" / f"{index}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=rf"heat_maps/{index}\.png is damaged: .*; delete it, or run `snella explain`"):
        heat_maps_section(run.folder, read(RunInfo, run.folder), read(Predictions, run.folder))
