"""Hyperparameter search: order of candidates, grid extensions and edges."""

from dataclasses import asdict

import pytest

from snella_app.methods import METHODS, build_method
from snella_app.methods.model_parts import is_inside
from snella_lab.comparison.cells import Cell, Plan, tuned_settings
from snella_lab.comparison.experiment import Grid
from snella_lab.comparison.search import Candidate, Choice, TuningResult, next_tuning_runs


def run(grid, accuracy, decay=0.0):
    """Search to the end; return the choice and all candidates in search order."""
    results, order = {}, []
    for _ in range(20):
        result = next_tuning_runs(grid, decay, results)
        if isinstance(result, Choice):
            return result, order
        for candidate in result:
            order.append(candidate)
            value = accuracy(candidate)
            loss = None if value is None else 1 - value
            results[candidate] = [TuningResult(value, loss)] * grid.seeds
    raise AssertionError("the search does not end")


def bump(best):
    """Return an accuracy function with its maximum at the learning-rate factor `best`."""
    return lambda candidate: 1 / (1 + abs(candidate.lr_factor / best - 1) + abs(best / candidate.lr_factor - 1))


def test_best_learning_rate_inside_the_grid_ends_the_search():
    choice, order = run(Grid((0.1, 1, 10), ()), bump(1.0))
    assert choice.candidate == Candidate(1.0) and not choice.lr_on_edge
    assert order == [Candidate(0.1), Candidate(1.0), Candidate(10)] == list(choice.tried)


@pytest.mark.parametrize(("best", "added"), [(30, [30.0, 100.0]), (0.01, [0.03, 0.01])])
def test_grid_keeps_its_pattern_while_the_best_value_lies_on_the_edge(best, added):
    choice, order = run(Grid((0.1, 0.3, 1, 3, 10), (), 2), bump(best))
    assert [c.lr_factor for c in order[5:]] == added
    assert choice.lr_on_edge == (best == 0.01)  # still on the edge after two extensions


def test_diverging_learning_rate_ends_the_extension():
    choice, order = run(Grid((0.3, 1, 3), (), 3), lambda c: None if c.lr_factor > 3 else c.lr_factor / 10)
    assert choice.candidate == Candidate(3.0) and not choice.lr_on_edge
    assert [c.lr_factor for c in order] == [0.3, 1, 3, 10]


def test_best_value_on_a_fixed_edge_is_recorded():
    choice, _ = run(Grid((0.3, 1, 3), (), 0), lambda c: c.lr_factor)
    assert choice.candidate == Candidate(3.0) and choice.lr_on_edge


def test_weight_decay_is_tuned_at_the_best_learning_rate_and_only_grows():
    def accuracy(c):
        return bump(1.0)(c) + (0.0 if c.weight_decay is None else 0.1 * min(c.weight_decay, 1.0))

    choice, order = run(Grid((0.3, 1, 3), (0.0, 0.1), 3), accuracy, decay=0.0)
    assert order[3:] == [Candidate(1.0, w) for w in (0.1, 1.0, 10.0)]
    assert choice.candidate == Candidate(1.0, 1.0) and not choice.weight_decay_on_edge
    choice, order = run(Grid((0.3, 1, 3), (0.0, 0.1), 3), lambda c: bump(1.0)(c) - (c.weight_decay or 0), decay=0.0)
    assert choice.candidate == Candidate(1.0) and not choice.weight_decay_on_edge and len(order) == 4


def test_default_weight_decay_is_part_of_the_grid():
    _, order = run(Grid((1, 3), (0.0, 0.1), 0), bump(1.0), decay=0.1)
    assert order[2:] == [Candidate(1.0, 0.0)]


def test_ties_in_accuracy_are_broken_by_the_loss():
    results = {Candidate(f): [TuningResult(0.5, loss)] for f, loss in ((0.3, 0.9), (1.0, 0.2), (3.0, 0.4))}
    assert next_tuning_runs(Grid((0.3, 1, 3), ()), 0.0, results).candidate == Candidate(1.0)


def test_equal_learning_rates_select_the_default():
    choice, order = run(Grid((0.1, 0.3, 1, 3, 10), (), 2), lambda candidate: 0.5)
    assert choice.candidate == Candidate(1.0) and len(order) == 5 and not choice.lr_on_edge


def test_candidates_are_ranked_by_their_mean_over_seeds_including_failures():
    grid = Grid((0.3, 1, 3), (), 0, seeds=2)
    low, high, failed = TuningResult(0.5, 0.5), TuningResult(0.9, 0.1), TuningResult(None, None)
    results = {Candidate(0.3): [low, low], Candidate(1.0): [low, high], Candidate(3.0): [high, failed]}
    assert next_tuning_runs(grid, 0.0, results).candidate == Candidate(1.0)
    assert next_tuning_runs(grid, 0.0, {**results, Candidate(1.0): [low]}) == [Candidate(1.0)]


def test_choice_is_empty_if_all_tuning_runs_failed():
    choice, order = run(Grid((0.3, 1), (0.0, 0.1), 2), lambda c: None)
    assert choice.candidate is None and len(order) == 2


def test_choice_records_every_tuning_run():
    grid = Grid((0.3, 1), (), 0)
    results = {Candidate(0.3): [TuningResult(0.5, 0.7)], Candidate(1.0): [TuningResult(None, None)]}
    recorded = next_tuning_runs(grid, 0.0, results).record(
        results, lambda c: {"lr": c.lr_factor / 1000, "head_lr": 0.1, "weight_decay": 0.0}
    )
    assert recorded.lr_factor == 0.3 and recorded.lr_on_edge
    shared = {"head_lr": 0.1, "weight_decay": 0.0}
    assert [asdict(trial) for trial in recorded.trials] == [
        {"lr_factor": 0.3, "lr": 0.0003, **shared, "val_accuracy": 0.5, "val_loss": 0.7, "failed": 0},
        {"lr_factor": 1.0, "lr": 0.001, **shared, "val_accuracy": None, "val_loss": None, "failed": 1},
    ]


def test_factor_scales_the_head_only_if_nothing_else_is_trained(tiny):
    experiment = tiny(methods=["linear", "mlp-3", "lora-2", {"name": "custom", "method": "lora-2", "lr": 0.5}])
    configs = {method.name: experiment.config(method, experiment.data[0]) for method in experiment.methods}
    rates = {name: tuned_settings(config, Candidate(3.0, 0.2)) for name, config in configs.items()}
    assert rates["linear"]["head_lr"] == 0.009 and rates["lora-2"] == {"lr": 3e-3, "head_lr": 1e-3, "weight_decay": 0.2}
    assert rates["custom"]["lr"] == 1.5
    assert rates["mlp-3"]["head_lr"] > tuned_settings(configs["mlp-3"], Candidate())["lr"]


@pytest.mark.parametrize("name", ["linear", "mlp-3"])
def test_head_only_methods_train_only_the_head(name):
    import timm

    model = build_method(name, timm.create_model("test_vit", num_classes=3))
    assert [key for key, method in METHODS.items() if method.is_head_only] == ["linear", "mlp"]
    assert all(is_inside(n, "head") for n, p in model.named_parameters() if p.requires_grad)


def test_all_seeds_of_a_task_share_the_test_images(tiny):
    from snella_app.runs.images import load_splits

    experiment = tiny()
    cells = [Cell(experiment.data[0], experiment.methods[0], seed, Candidate(), True) for seed in (0, 1)]
    first, second = (load_splits(c.data, c.run.seed) for c in (cell.config(experiment, "-") for cell in cells))
    assert first.test.names == second.test.names and first.train.names != second.train.names
    assert not set(first.test.names) & {*second.train.names, *second.val.names}


def test_evaluated_learning_rate_is_fixed_for_all_seeds(tiny, make_row):
    experiment = tiny(methods=["linear"], seeds=3)
    accuracies = {0.3: 0.7, 1.0: 0.9}
    rows = [
        make_row(experiment, "digits", "linear", 0, purpose="trial", factor=factor, val_accuracy=accuracy)
        for factor, accuracy in accuracies.items()
    ]
    chosen = Plan(experiment, {row.cell: row for row in rows}).ready()
    assert {(cell.seed, cell.candidate.lr_factor) for cell in chosen} == {(0, 1.0), (1, 1.0), (2, 1.0)}
    # the first seed was evaluated before the failed tuning run at 1.0 was repeated
    rows.append(make_row(experiment, "digits", "linear", 0, factor=0.3))
    plan = Plan(experiment, {row.cell: row for row in rows})
    assert [(cell.seed, cell.candidate.lr_factor) for cell in plan.ready()] == [(1, 0.3), (2, 0.3)]
    assert [cell.search for cell in plan.ready()] == [rows[-1].search] * 2
    without_trials = Plan(experiment, {rows[-1].cell: rows[-1]})
    assert [cell.is_final for cell in without_trials.ready()] == [True, True]


def test_grid_of_two_points_grows_by_its_ratio():
    _, order = run(Grid((1, 4), (), 1), lambda c: c.lr_factor)
    assert [c.lr_factor for c in order] == [1, 4, 16]


@pytest.mark.parametrize(("sign", "extension"), [(1, 1.02 * 1.01 / 1.0), (-1, 0.99)])
def test_a_fine_grid_is_extended_beyond_its_edge(sign, extension):
    grid = Grid(lr_factors=(1.0, 1.01, 1.02), weight_decays=(), max_extensions=1)
    results = {Candidate(factor): [TuningResult(sign * factor, 1.0)] for factor in grid.lr_factors}
    assert next_tuning_runs(grid, 0.0, results) == [Candidate(extension)]
