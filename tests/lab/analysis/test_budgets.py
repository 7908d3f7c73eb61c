"""Sparsity, importance and budget by layer match values computed by hand."""

import numpy as np
import pytest

from snella_app.records.record import read, write
from snella_app.records.run import Allocation, AllocationStep, BackboneInfo, DataInfo, MatrixInfo, RunInfo
from snella_app.report.allocation import linear_trend
from snella_lab.analysis.budgets import allocation, evolution


def write_run(folder, budgets, importance):
    """Write a running run: two blocks with matrices of 10 and 30 weights, and one matrix of 20 outside the blocks."""
    folder.mkdir(parents=True)
    names = ["blocks.0.q", "blocks.0.fc", "blocks.1.q", "blocks.1.fc", "neck"]
    depths, sizes = [0, 0, 1, 1, None], [10, 30, 10, 30, 20]
    columns = zip(names, depths, sizes, budgets, strict=True)
    matrices = [MatrixInfo(name, name, depth, (1, size), size, budget, budget) for name, depth, size, budget in columns]
    history = [AllocationStep(0, 0, 2, 100, dict(zip(names, sizes, strict=True)), {})]
    history += [
        AllocationStep(
            8, 2, 2, sum(budgets), dict(zip(names, budgets, strict=True)), dict(zip(names, importance, strict=True))
        )
    ]
    write(Allocation(100, sum(budgets), matrices, history), folder)
    info = RunInfo(
        method="snella-2",
        backbone=BackboneInfo("test_vit"),
        classes=["a", "b"],
        data=DataInfo("digits"),
        status="running",
    )
    write(info, folder)
    return folder


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "mine", [5, 15, 0, 10, 10], [4.0, 2.0, 0.0, 1.0, 8.0])


def test_block_sparsity_counts_all_weights_of_the_block(run):
    (plot,) = allocation([run])
    layers = [(row["layer"], row["weights"], row["budget"], row["sparsity"]) for row in plot.rows]
    assert layers == [("0", 40, 20, 0.5), ("1", 40, 10, 0.75), ("–", 20, 10, 0.5)]
    # least squares through (0, .5), (1, .75), (2, .5): slope 0, mean 7/12
    (trend,) = plot.tables["trend"]
    assert trend["slope"] == pytest.approx(0, abs=1e-12) and trend["intercept"] == pytest.approx(7 / 12)
    assert [row["trend"] for row in plot.rows] == pytest.approx([7 / 12] * 3)


def test_layers_can_be_single_matrices(run):
    (plot,) = allocation([run], by="matrix")
    assert [row["sparsity"] for row in plot.rows] == pytest.approx([0.5, 0.5, 1.0, 2 / 3, 0.5])


def test_linear_trend_is_the_least_squares_fit():
    assert linear_trend([0, 1, 2], [1.0, 3.0, 5.0]) == pytest.approx((2.0, 1.0))
    assert linear_trend([0, 1, 2, 3], [0.0, 1.0, 0.0, 3.0]) == pytest.approx((0.8, -0.2))
    assert linear_trend([2, 6], [1.0, 3.0]) == pytest.approx((0.5, 0.0))
    assert linear_trend([4], [0.25]) == (0.0, 0.25)


def test_layer_importance_is_the_mean_over_its_matrices(run):
    layers, budget = evolution([run])
    last = [row for row in layers.rows if row["step"] == 8]
    assert [(row["layer"], row["importance"], row["sparsity"]) for row in last] == [
        ("0", 3.0, 0.5),
        ("1", 0.5, 0.75),
        ("–", 8.0, 0.5),
    ]
    first = [row for row in layers.rows if row["step"] == 0]
    assert [row["sparsity"] for row in first] == [0.0] * 3 and all(np.isnan(row["importance"]) for row in first)
    assert {row["metric"] for row in layers.rows} == {"Sensitivity"}
    assert [(row["step"], row["budget"], row["scheduled"], row["share"]) for row in budget.rows] == [
        (0, 100, 100, 1.0),
        (8, 40, 40, 0.4),
    ]


def test_plots_of_a_real_run_are_drawn(old_run, run):
    history = read(Allocation, old_run).history
    layers, budget = evolution([old_run, run])
    assert [row["budget"] for row in budget.rows if row["run"] == "snella"] == [step.budget for step in history]
    assert [row["scheduled"] for row in budget.rows] == [row["budget"] for row in budget.rows]
    for plot in (*allocation([old_run, run]), layers, budget):
        plot.draw().draw_without_rendering()


def test_steps_of_several_runs_are_labeled_by_order(run, tmp_path):
    other = write_run(tmp_path / "other", [5, 15, 0, 10, 10], [4.0, 2.0, 0.0, 1.0, 8.0])
    for runs, labels in (([run], ["start", "step 8"]), ([run, other], ["first", "last"])):
        assert [text.get_text() for text in evolution(runs)[0].draw().legends[0].get_texts()] == labels


def test_run_without_budgets_is_rejected(save_run):
    run = save_run("lora")
    with pytest.raises(ValueError, match=r"\(method 'lora-2'\) has no weight budgets in allocation\.json"):
        allocation([run])
