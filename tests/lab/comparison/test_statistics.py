"""Statistics of a comparison match values computed by hand."""

import math

import numpy as np
import pytest

from snella_lab.comparison.experiment import Experiment
from snella_lab.comparison.figures import _short, forest, learning_rate_curves, lr_curve, pareto, pareto_front
from snella_lab.comparison.report import markdown_tables
from snella_lab.comparison.rows import CellResults, CellRow
from snella_lab.comparison.statistics import (
    Difference,
    FinalRuns,
    difference_of,
    final_rows,
    with_holm,
)
from snella_lab.comparison.summary import (
    cost_texts,
    difference_text,
    outcome_text,
    p_text,
    print_summary,
    recommendation_text,
    significance_texts,
    spread_text,
    summarize,
    table_cells,
)

VALUES = {
    ("a", "t1"): [0.5, 0.7],
    ("a", "t2"): [0.9, 0.9],
    ("a", "t3"): [0.2, 0.4],
    ("b", "t1"): [0.4, 0.7],
    ("b", "t2"): [0.8, 0.8],
    ("b", "t3"): [0.2, 0.3],
}


M = "test_accuracy"
SIMULATIONS = 2000


def row(method, task, seed, accuracy=None, **results):
    return CellRow(
        **{"cell": f"{task}/{method}/seed-{seed}", "purpose": "final", "status": "success", "created_at": "2026-01-01"},
        **{"experiment_name": method, "task_name": task, "seed": seed},
        results=CellResults(test={"accuracy": accuracy}, **results),
    )


@pytest.fixture
def rows():
    return [
        row(method, task, seed, value) for (method, task), values in VALUES.items() for seed, value in enumerate(values)
    ]


def test_mean_and_deviation_are_over_seeds(rows):
    result = FinalRuns(rows).spread("a", "t1", M)
    assert (result.mean, result.std, result.count) == pytest.approx((0.6, math.sqrt(0.02), 2))
    assert FinalRuns(rows).spread("c", "t1", M) is None
    assert math.isnan(FinalRuns(rows[:1]).spread("a", "t1", M).std)


def test_mean_over_tasks_differs_from_mean_over_groups(rows):
    tasks = FinalRuns(rows).mean("a", [["t1"], ["t2"], ["t3"]], M)
    groups = FinalRuns(rows).mean("a", [["t1", "t2"], ["t3"]], M)
    assert tasks.mean == pytest.approx((0.6 + 0.9 + 0.3) / 3)
    assert groups.mean == pytest.approx(((0.6 + 0.9) / 2 + 0.3) / 2)
    assert tasks.std == pytest.approx(math.sqrt(2) / 2 * (2.0 / 3 - 1.6 / 3))


def test_mean_requires_every_task(rows):
    assert FinalRuns(rows[:4]).mean("a", [["t1"], ["t2"], ["t3"]], M) is None
    fewer = [row for row in rows if row.task_name != "t3" or row.seed == 0]
    assert FinalRuns(fewer).mean("a", [["t1"], ["t3"]], M).count == 1


def test_differences_are_paired_by_task_and_seed(rows):
    result = FinalRuns(rows).difference("b", "a", ["t1", "t2", "t3"], M)
    assert (result.pairs, result.tasks) == (6, 3)
    assert result.mean == pytest.approx((-0.05 - 0.1 - 0.05) / 3)
    # t(0.975, 2) = 4.3027 standard errors of -0.05, -0.1, -0.05
    assert (result.low, result.high) == pytest.approx((-0.13838, 0.00504), abs=1e-5)
    unpaired = [row for row in rows if (row.experiment_name, row.seed) != ("a", 0)]
    single = FinalRuns(unpaired).difference("b", "a", ["t1"], M)
    assert (single.mean, single.pairs) == (0.0, 1) and math.isnan(single.low) and difference_text(single, 1) == "0.0"
    assert FinalRuns(rows).difference("c", "a", ["t1"], M) is None


def test_interval_of_a_single_task_is_over_seeds():
    values = [0.01, 0.02, 0.03, 0.04]
    rows = [row("b", "t", i, v) for i, v in enumerate(values)]
    rows += [row("a", "t", i, 0.0) for i in range(4)]
    result = FinalRuns(rows).difference("b", "a", ["t"], M)
    half = 3.182446 * 0.0129099 / 2  # t(0.975, 3), deviation, root of the count
    assert (result.low, result.high) == pytest.approx((0.025 - half, 0.025 + half), abs=1e-6)
    assert result.p == pytest.approx(0.03047, abs=1e-5) and result.units == 4


def test_interval_over_tasks_uses_the_mean_over_seeds_of_each_task():
    pairs = [[-0.2, 0.0], [0.1, 0.1, 0.1], [0.12]]
    result, means = difference_of(pairs), difference_of([[-0.1], [0.1], [0.12]])
    assert (result.low, result.high, result.p) == (means.low, means.high, means.p)
    assert (result.pairs, result.units) == (6, 3) and result.low < -0.1 and result.high > 0.12


def test_equal_differences_have_an_interval_of_zero_width():
    with_effect, without = difference_of([[0.1] * 6]), difference_of([[0.0] * 6])
    assert (with_effect.low, with_effect.high, with_effect.p) == (with_effect.mean, with_effect.mean, 0.0)
    assert (without.low, without.high, without.p, without.sign_p) == (0.0, 0.0, 1.0, 1.0)
    few = difference_of([[0.0], [0.0]])
    assert few.mean == 0.0 and all(map(math.isnan, (few.low, few.high, few.p)))


def test_holm_correction_matches_values_computed_by_hand():
    ps = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.6, "e": math.nan}
    corrected = with_holm({key: Difference(0.1, 0.0, 0.2, 6, 6, p) for key, p in ps.items()} | {"f": None})
    assert [corrected[key].adjusted_p for key in "abcd"] == pytest.approx([0.04, 0.09, 0.09, 0.6])
    assert corrected["a"].comparisons == 4 and math.isnan(corrected["e"].adjusted_p) and corrected["f"] is None
    assert list(corrected) == [*"abcdef"] and [corrected[key].direction for key in "abe"] == [1, 0, 0]


@pytest.mark.parametrize(("units", "significant"), [(2, 0), (4, 0), (5, 1), (6, 1)])
def test_no_difference_is_significant_with_fewer_than_five_tasks_or_seeds(units, significant):
    values = [0.1 + 1e-4 * number for number in range(units)]
    for pairs in ([values], [[value] for value in values]):
        result = with_holm({0: difference_of(pairs)})[0]
        assert result.adjusted_p < 0.05 and result.direction == significant
        mirrored = with_holm({0: difference_of([[-value for value in unit] for unit in pairs])})[0]
        assert mirrored.direction == -significant


def test_sign_test_excludes_ties():
    result = with_holm({0: difference_of([[v] for v in (0.1, 0.2, 0.1, 0.3, 0.2, 0.0)])})[0]
    assert (result.above, result.below, result.sign_p) == (5, 0, pytest.approx(2 / 2**5))
    assert significance_texts(result) == ("0.017", "5 of 6 (0.062)") and significance_texts(None) == ("–", "–")
    assert [p_text(value) for value in (1.0, 0.0996, 0.051, 0.0009, math.nan)] == [
        "1.00",
        "0.10",
        "0.051",
        "< 0.001",
        "–",
    ]


@pytest.mark.parametrize("comparisons", [1, 12])
def test_false_positive_rate_is_five_percent_in_simulations(comparisons):
    """Run a short version of benchmarks/interval_calibration.py."""
    generator = np.random.default_rng(0)
    false_positives = 0
    for _ in range(SIMULATIONS):
        effects = generator.normal(0, 0.02, (comparisons, 6, 1))
        values = effects + generator.normal(0, 0.02, (comparisons, 6, 3))
        differences = with_holm({number: difference_of(pairs.tolist()) for number, pairs in enumerate(values)})
        false_positives += any(result.direction for result in differences.values())
    assert 0.04 <= false_positives / SIMULATIONS <= 0.06


def test_mean_cost_weights_tasks_equally():
    costs = (("x", 0, 1), ("x", 1, 3), ("y", 0, 10), ("y", 1, None))
    runs = FinalRuns([row("a", task, seed, step_time=cost) for task, seed, cost in costs])
    assert runs.average("a", "step_time") == 6 and runs.average("a", "train_time") is None


def test_final_row_without_the_metric_is_rejected():
    message = r"the row of 't/a/seed-0' has no test_map; delete its folder and its line in results.jsonl"
    with pytest.raises(ValueError, match=message):
        FinalRuns([row("a", "t", 0, 0.5)]).spread("a", "t", "test_map")


def test_pareto_front_excludes_dominated_points():
    assert pareto_front([(3, 0.9), (1, 0.5), (2, 0.4), (2, 0.6), (4, 0.9)]) == [(1, 0.5), (2, 0.6), (3, 0.9)]


def test_summary_contains_counts_groups_and_differences(large):
    experiment, rows = large
    summary = summarize(experiment, rows)
    assert (summary.finals, summary.expected, len(summary.failed)) == (216, 216, 6)
    assert summary.has_groups and list(summary.groups) == ["natural", "specialized", "glyphs"]
    by_name = {line.name: line for line in summary.methods}
    assert by_name["lora-8"].to_reference["test_accuracy"] is None
    lead = by_name["snella-8"].to_reference["test_accuracy"]
    assert (lead.pairs, lead.tasks, lead.comparisons) == (18, 6, 11) and lead.direction == 1
    assert by_name["full"].over_tasks["test_accuracy"].mean > by_name["linear"].over_tasks["test_accuracy"].mean


def test_rows_of_other_methods_are_ignored(large, make_row):
    experiment, rows = large
    smaller = Experiment.from_dict({**experiment.as_dict(), "methods": ["linear", "lora-8"]})
    assert summarize(smaller, rows).finals == 36


def test_methods_are_ranked_only_on_the_same_seeds(tiny, make_row):
    experiment = tiny(methods=["linear", "lora-2", "bias"], seeds=3)
    scores = {"linear": [0.9, 0.6, 0.6], "lora-2": [0.9, 0.7, 0.6], "bias": [0.9]}
    rows = [
        make_row(experiment, "digits", method, seed, test_accuracy=score)
        for method, by_seed in scores.items()
        for seed, score in enumerate(by_seed)
    ]
    summary = summarize(experiment, rows)
    assert list(summary.means) == ["linear", "lora-2"]
    assert outcome_text(summary).startswith("lora-2 has the highest test accuracy, 73.3%")
    assert recommendation_text(summary).endswith("Not ranked (missing results or other seeds): bias.")
    assert table_cells(summary, "test_accuracy", with_costs=False)[3][1] == "90.0 (1 of 3 seeds)"
    assert list(summarize(experiment, [rows[0], rows[3], rows[6]]).means) == ["linear", "lora-2", "bias"]
    alone = summarize(experiment, rows[:4])
    assert alone.means == {} and outcome_text(alone) == recommendation_text(alone) == ""
    behind = [row for row in rows if row.experiment_name == "linear" or row.seed == 0]  # 3, 1, and 1 seeds
    assert list(summarize(experiment, behind).means) == ["lora-2", "bias"]


def test_failed_runs_are_printed_without_any_final_run(tiny, make_row, console):
    experiment = tiny(methods=["linear"], seeds=1)
    errors = {"lr-x1": "OSError: disk full", "lr-x9": "NonFiniteLossError: the loss is NaN"}
    rows = []
    for number, error in enumerate(errors.values()):
        row = make_row(experiment, "digits", "linear", number, purpose="trial", status="failed", error=error)
        rows.append(row)
    print_summary(console, summarize(experiment, rows))
    text = console.file.getvalue()
    assert "no final run is finished yet" in text and "OSError: disk full" in text
    assert "the loss diverged, so this candidate is excluded" in text and "NaN" not in text


def test_tasks_with_different_images_are_marked(tiny, make_row, console):
    experiment = tiny(data=["digits", "elpv"], seeds=2)
    rows = [
        make_row(experiment, task, method, seed, split=f"{task}-{seed}-{method if task == 'elpv' else ''}")
        for task in ("digits", "elpv")
        for method in ("linear", "lora-2")
        for seed in (0, 1)
    ]
    summary = summarize(experiment, rows)
    assert summary.mixed_tasks == ["elpv"]
    print_summary(console, summary)
    assert "warning: the runs on 'elpv' used different images" in console.file.getvalue()
    assert "**Warning:** the runs on 'elpv' used different images" in markdown_tables(summary)


def test_curves_contain_tuning_runs_at_the_default_weight_decay(large, make_row):
    experiment, rows = large
    more = make_row(experiment, "elpv", "linear", 0, purpose="trial", factor=1.0, decay=0.1, val_accuracy=0.0)
    trials = summarize(experiment, [*rows, more]).trials
    curve = lr_curve(trials["linear", "elpv"])
    assert [factor for factor, _ in curve] == [0.1, 0.3, 1.0, 3.0, 10.0] and curve[2][1] > 0.5
    assert lr_curve(trials["lora-8", "elpv"])[-1] == (10.0, None)


def test_figures_show_every_method(large):
    experiment, rows = large
    summary = summarize(experiment, rows)
    names = [method.name for method in summary.methods]
    for figure in (
        pareto(summary, "training_mib", "MiB", "memory", False),
        learning_rate_curves(summary, summary.tasks, "mean"),
    ):
        assert [text.get_text() for text in figure.legends[0].get_texts()] == names
    overall, by_task = forest(summary, False), forest(summary, True)
    assert len(overall.axes[0].get_yticks()) == 11 and len(by_task.axes[0].get_yticks()) == 77


def test_missing_measurements_are_not_drawn(large):
    experiment, rows = large
    summary = summarize(experiment, rows)
    assert pareto(summary, "accelerator_memory_max", "B", "memory", False) is None
    assert learning_rate_curves(summarize(experiment, final_rows(rows)), summary.tasks, "mean") is None
    assert forest(summarize(experiment, []), False) is None


def test_numbers_are_formatted_for_the_table(large):
    experiment, rows = large
    texts = cost_texts(summarize(experiment, rows).methods[0].costs)
    assert texts["trainable"] == "4,000" and texts["step"] == "40.0 ms" and texts["changed"] == "0"
    assert difference_text(Difference(-0.0123, -0.02, 0.0001, 9, 3), 3) == "−1.2 [−2.0, 0.0]"
    assert difference_text(Difference(-0.0123, -0.02, 0.0001, 9, 3), 4) == "−1.2 [−2.0, 0.0] (3 of 4 tasks)"
    assert difference_text(None, 3) == spread_text(None) == "–"
    assert [_short(value) for value in (768, 999.7, 1.334e6, 999_700)] == ["768", "1 k", "1.33 M", "1 M"]


def test_filled_marker_is_the_selected_learning_rate_on_ties(tiny, make_row):
    experiment = tiny(methods=["linear"])
    trials = [make_row(experiment, "digits", "linear", 0, purpose="trial", factor=f) for f in (0.3, 1.0, 3.0)]
    final = make_row(experiment, "digits", "linear", 0, factor=1.0)
    for rows, filled in (([*trials, final], 1.0), (trials, 0.3)):
        figure = learning_rate_curves(summarize(experiment, rows), ["digits"], "digits")
        assert list(figure.axes[0].lines[1].get_xdata()) == [filled]
