"""Experiment files of the paper's tables, compared with the benchmarks and the published numbers."""

import io
from dataclasses import replace

import pytest
import timm
import torch
from rich.console import Console

from snella_app.data.benchmarks import FGVC_DATASETS, VTAB_TASKS
from snella_app.methods import SelectionData, build_method
from snella_lab.comparison.cells import Cell
from snella_lab.comparison.experiment import Experiment, published_errors
from snella_lab.comparison.experiment_files import bundled_experiments, read_experiment
from snella_lab.comparison.report import (
    OrderingResult,
    PaperComparison,
    paper_comparison,
    paper_orderings,
    print_paper,
)
from snella_lab.comparison.rows import CellResults, CellRow
from snella_lab.comparison.search import Candidate, Choice, next_tuning_runs
from snella_lab.comparison.statistics import Difference
from snella_lab.comparison.summary import summarize

PAPER = (
    *("table1-vtab", "table1-fgvc", "table1-vtab-official", "table1-fgvc-official", "table2-mae", "table2-moco"),
    *("table3-swin", "table3-convnext", "table4-vit-l", "table4-vit-h", "table17"),
    *("table7", "table8", "table9", "table10", "table11", "table12", "table15", "table18-fgvc"),
)
TWINS = tuple(f"twin-table{number}" for number in (7, 8, 9, 10, 11, 12, 15, 17, "18-fgvc"))
SUBSET_TABLES = ("table11", "table12", "table15")
"""Tables that use a subset of VTAB-1k."""


@pytest.fixture(scope="module")
def experiments():
    return {name: read_experiment(name) for name in PAPER}


def test_every_table_has_a_file_with_purpose_cost_and_expected_results(experiments):
    files = {name for name, path in bundled_experiments().items() if path.parent.name == "paper"}
    assert files == set(PAPER)
    for name, experiment in experiments.items():
        assert experiment.command == f"snella compare --experiment {name} --out runs/{name}"
        assert min(len(experiment.about), len(experiment.cost), len(experiment.expected)) > 50
        assert experiment.settings["epochs"] == (2 if name == "table15" else 100)


def test_orderings_refer_to_methods_of_their_file(experiments):
    twins = {name: read_experiment(name) for name in TWINS}
    assert {name for name, path in bundled_experiments().items() if path.parent.name == "twins"} == set(TWINS)
    for name, experiment in (experiments | twins).items():
        labels = {method.name for method in experiment.methods}
        claims = experiment.published.get("orderings", [])
        assert {label for claim in claims for label in (claim["higher"], claim["lower"])} <= labels, name
        assert claims or "official" in name, name
    assert [len(twin.methods) for twin in twins.values()] == [12, 12, 6, 12, 12, 8, 7, 4, 3]


def test_tables_include_methods_with_the_papers_scaling(experiments):
    for name in ("table1-vtab", "table1-fgvc", "table2-mae", "table3-swin", "table4-vit-h", "table17"):
        experiment = experiments[name]
        scaled = [method for method in experiment.methods if method.name.endswith("-scaling-1")]
        assert (
            scaled and {method.settings["scaling"] for method in scaled} == {1.0} and "scaling 10" in experiment.about
        )
    for name in ("table10", "table11", "table12"):
        methods = {method.name: method for method in experiments[name].methods}
        scaled = {label: method for label, method in methods.items() if label.endswith("-scaling-1")}
        assert len(methods) == 2 * len(scaled)
        for label, method in scaled.items():
            base = methods[label.removesuffix("-scaling-1")]
            assert method.settings == {**base.settings, "scaling": 1.0} and method.options == base.options
        claims = [claim for claim in experiments[name].published["orderings"] if "-scaling-1" in claim["higher"]]
        assert 2 * len(claims) == len(experiments[name].published["orderings"])
    assert {"ssf", "mosa", "gps"} <= {method.name for method in experiments["table1-vtab"].methods}
    adapter = next(m for m in experiments["table1-vtab"].methods if m.name == "adapter-8")
    assert adapter.options == {"activation": "relu"}


def test_tasks_and_groups_match_the_benchmarks(experiments):
    vtab = [(task.name, f"vtab:data/vtab-1k/{task.name}", task.group) for task in VTAB_TASKS.values()]
    fgvc = [(name, f"fgvc:data/fgvc/{name}", "fgvc") for name in FGVC_DATASETS]
    for name, experiment in experiments.items():
        entries = [(entry.name, entry.data, entry.group) for entry in experiment.data]
        benchmark = fgvc if "fgvc" in name or name == "table17" else vtab
        assert set(entries) <= set(benchmark) and ("official" in name or name in SUBSET_TABLES or entries == benchmark)


def test_published_means_match_the_published_values(experiments):
    """Table XIII reports the mean of 19 tasks; the ablations report the mean of three group means."""
    experiment = experiments["table1-vtab"]
    tasks = [entry.name for entry in experiment.data]
    assert len(experiment.published["values"]) == 20
    for values in experiment.published["values"].values():
        groups = []
        for group in ("natural", "specialized", "structured"):
            group_values = [values[entry.name] for entry in experiment.data if entry.group == group]
            groups.append(sum(group_values) / len(group_values))
            assert values[group] == pytest.approx(groups[-1], abs=0.006)
        assert values["mean over groups"] == pytest.approx(sum(groups) / 3, abs=0.006)
        assert values["mean over tasks"] == pytest.approx(sum(values[task] for task in tasks) / 19, abs=0.06)


def test_final_runs_also_train_on_the_validation_images(experiments):
    experiment = experiments["table1-vtab"]
    trial, final = (
        Cell(experiment.data[0], experiment.methods[-1], 0, Candidate(), is_final).config(experiment, "-")
        for is_final in (False, True)
    )
    assert (trial.data.protocol, final.data.protocol) == ("standard", "final")


def test_final_runs_ignore_the_validation_size_of_a_task(tiny):
    experiment = tiny(train={"protocol": "final"}, data=[{"data": "digits", "val_size": 10}])
    cells = [Cell(experiment.data[0], experiment.methods[0], 0, Candidate(), final) for final in (False, True)]
    assert [cell.config(experiment, "-").data.val_size for cell in cells] == [10, None]


def test_published_numbers_of_other_tasks_are_removed(experiments):
    values = read_experiment("table1-vtab", {"data": ["cifar"]}).published["values"]
    assert values["full"] == {"cifar": experiments["table1-vtab"].published["values"]["full"]["cifar"]}
    assert read_experiment("table1-vtab", {"data": ["digits"]}).published == {}
    names = [entry.name for entry in experiments["table1-vtab"].data]
    assert read_experiment("table1-vtab", {"data": names}).published == experiments["table1-vtab"].published


def test_official_files_need_no_tuning_and_have_settings_per_task(experiments):
    experiment = experiments["table1-vtab-official"]
    configs = {
        data.name: Cell(data, experiment.methods[0], 0, Candidate(), True).config(experiment, "-").flat()
        for data in experiment.data
    }
    assert configs["cifar"]["protocol"] == "official" and configs["cifar"]["method_options"]["preset"] == "official"
    assert (configs["cifar"]["batch_size"], configs["cifar"]["weight_decay"], configs["cifar"]["target_sparsity"]) == (
        8,
        0.05,
        0.8,
    )
    assert (configs["dtd"]["weight_decay"], configs["dtd"]["target_sparsity"]) == (0.005, 0.93)
    assert configs["dtd"]["lr"] == configs["dtd"]["scalar_lr"] == configs["dtd"]["head_lr"] == 0.001
    assert next_tuning_runs(experiment.grid, 0.05, {}) == Choice(Candidate(1.0), (Candidate(1.0),), False, False)
    dogs = experiments["table1-fgvc-official"]
    config = Cell(dogs.data[-1], dogs.methods[0], 0, Candidate(), True).config(dogs, "-")
    assert (config.optim.lr, config.optim.ema, config.data.augment) == (0.0001, 0.9999, "imagenet")


def changed(experiment, **changes):
    return Experiment.from_dict({**experiment.as_dict(), **changes})


def test_tuning_under_the_official_protocol_is_rejected(experiments):
    message = (
        r"one number .* with protocol 'official', which has no validation set for tuning, got \[0\.3, 1\.0\] and \[\]"
    )
    with pytest.raises(ValueError, match=message):
        changed(experiments["table1-vtab-official"], grid={"lr_factors": [0.3, 1.0], "weight_decays": []})


@pytest.mark.parametrize(
    ("published", "message"),
    [
        ({"values": {}}, r"published must contain 'source', .* and no other keys, got \{'values': \{\}\}"),
        ({"source": "T", "value": {}}, r"published must contain 'source', .* got \{'source': 'T', 'value': \{\}\}"),
        ({"source": "T", "values": {"lora-8": 3}}, "published.values 'lora-8' must map tasks to numbers, got 3"),
        ({"source": "T", "values": {"lora-8": {"cifr": 3}}}, "or 'mean over groups' to percentages, got cifr: 3"),
        ({"source": "T", "values": {"lora-8": {"cifar": "x"}}}, "must map tasks, .* got cifar: 'x'"),
        ({"source": "T", "orderings": [{"higher": "a"}]}, r"must contain 'higher' and 'lower'.* got \{'higher': 'a'\}"),
        (
            {"source": "T", "orderings": [{"higher": "a", "lower": "b", "task": "cifr"}]},
            "'task' in published.orderings must be one of cifar, .* got 'cifr'",
        ),
        (
            {"source": "T", "orderings": [{"higher": "a", "lower": "b", "metric": ["step_time"]}]},
            r"'metric' in published.orderings must be a result column, got \['step_time'\]",
        ),
        (
            {"source": "T", "orderings": [{"higher": "a", "lower": "b", "metric": "steptime"}]},
            "'metric' in published.orderings must be a result column, got 'steptime'; nearest: step_time",
        ),
    ],
)
def test_invalid_published_numbers_are_rejected(published, message, experiments):
    with pytest.raises(ValueError, match=message):
        changed(experiments["table1-vtab"], published=published)
    assert published_errors({}, [], []) == []


def row(method, task, accuracy, seed=0, step_time=None):
    results = CellResults(test={"accuracy": accuracy, "balanced_accuracy": accuracy}, step_time=step_time)
    return CellRow(
        **{"cell": f"{task}/{method}/seed-{seed}", "purpose": "final", "status": "success", "created_at": "2026-01-01"},
        **{"experiment_name": method, "task_name": task, "seed": seed, "results": results},
    )


def test_published_and_measured_numbers_are_paired(experiments):
    values = {"lora-8": {"kitti": 78.5, "structured": 60.0, "mean over tasks": 72.3, "dmlab": 49.8}}
    experiment = changed(experiments["table1-vtab"], published={"source": "Table XIII", "values": values})
    rows = [row("lora-8", "kitti", 0.80), row("lora-8", "cifar", 0.60)]
    unfinished = {result.column: result.measured for result in paper_comparison(summarize(experiment, rows))}
    assert unfinished == {"kitti": 80.0, "structured": None, "mean over tasks": None, "dmlab": None}
    del values["lora-8"]["dmlab"]
    finished = tuple(entry for entry in experiment.data if entry.name in ("kitti", "cifar"))
    experiment = replace(experiment, data=finished, published={"source": "Table XIII", "values": values})
    summary = summarize(experiment, rows)
    pairs = paper_comparison(summary)
    assert [(r.column, r.reported, r.measured and round(r.measured, 3)) for r in pairs] == [
        ("kitti", 78.5, 80.0),
        ("structured", 60.0, 80.0),
        ("mean over tasks", 72.3, 70.0),
    ]
    output = io.StringIO()
    print_paper(Console(file=output, width=120), summary)
    assert "compared with the paper: Table XIII" in output.getvalue() and "+1.5" in output.getvalue()
    assert PaperComparison("lora-8", "dmlab", 49.8, None).texts == ("lora-8", "dmlab", "49.8", "–", "–")


def test_published_numbers_of_a_task_without_accuracy_are_of_its_main_metric(tiny):
    claims = [{"higher": "lora-2", "lower": "linear"}]
    published = {"source": "T", "values": {"lora-2": {"digits": 70.0}}, "orderings": claims}
    experiment = tiny(train={"task": "regression"}, published=published)
    rows = [
        replace(row(method, "digits", None), results=CellResults(test={"r2": r2}))
        for method, r2 in (("lora-2", 0.8), ("linear", 0.6))
    ]
    assert paper_comparison(summarize(experiment, rows))[0].measured == pytest.approx(80)
    (result,) = paper_orderings(experiment, rows)
    assert result.claim == "lora-2 above linear" and result.difference.mean == pytest.approx(0.2)


def test_orderings_are_tested_by_corrected_tests_of_paired_differences(experiments):
    claims = [
        {"higher": "cubic", "lower": "linear"},
        {"higher": "constant", "lower": "linear"},
        {"higher": "quadratic", "lower": "linear"},
        {"higher": "cubic", "lower": "linear", "metric": "step_time"},
        {"higher": "cubic", "lower": "elsewhere"},
    ]
    data = experiments["table9"].as_dict()["data"][5:10]
    claims[3]["task"] = data[0]["name"]
    published = {"source": "Table XII", "orderings": claims}
    experiment = changed(experiments["table12"], data=data, published=published)
    tasks = [entry.name for entry in experiment.data]
    leads = {"linear": 0.0, "cubic": 0.02, "constant": -0.02, "quadratic": 0.0}
    rows = [
        row(method, task, 0.5 + lead * (1 + index / 10) + seed / 100, seed, step_time=1 + lead * (1 + seed / 10))
        for method, lead in leads.items()
        for index, task in enumerate(tasks)
        for seed in range(3)
    ]
    orderings = paper_orderings(experiment, rows)
    assert [result.verdict for result in orderings] == ["holds", "contradicted", "inconclusive", "inconclusive"]
    larger = changed(experiments["table12"], data=experiments["table9"].as_dict()["data"][4:10], published=published)
    unfinished = paper_orderings(larger, rows)
    assert unfinished[0].verdict == "inconclusive" and "(5 of 6 tasks)" in unfinished[0].texts[2]
    assert orderings[0].difference.mean == pytest.approx(0.024) and orderings[0].difference.pairs == 15
    assert orderings[0].difference.comparisons == 4
    assert orderings[0].texts == (
        "cubic above linear",
        "holds",
        "+2.4 [+2.0, +2.8], 15 pairs",
        "< 0.001",
        "5 of 5 (0.062)",
    )
    assert orderings[3].claim == f"cubic above linear on {tasks[0]} in step time" and orderings[3].difference.units == 3
    assert orderings[3].difference.mean == pytest.approx(0.022)
    assert [result.verdict for result in paper_orderings(experiment, [])] == ["not run"] * 4
    output = io.StringIO()
    print_paper(Console(file=output, width=120), summarize(experiment, rows))
    assert "orderings in the paper: Table XII" in output.getvalue() and "contradicted" in output.getvalue()


def test_ordering_of_a_cost_states_its_number_of_tasks():
    result = OrderingResult("a above b", "inconclusive", Difference(0.02, 0.01, 0.03, 9, 3), False, 4)
    assert result.texts[2] == "+0.02 [+0.01, +0.03] (3 of 4 tasks), 9 pairs"


def test_without_published_numbers_nothing_is_printed(experiments):
    experiment = changed(experiments["table4-vit-l"], published={})
    output = io.StringIO()
    print_paper(Console(file=output), summarize(experiment, []))
    assert output.getvalue() == ""


SMALL = {
    "vit": ("test_vit", {"img_size": 32}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "window_size": 2, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2)},
    ),
    "convnext": ("test_convnext", {}),
}


QUICK = {"noah": {"supernet_epochs": 1, "population": 2, "generations": 1}}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SMALL)
def test_every_method_of_a_table_can_be_applied_to_its_type_of_backbone(kind, experiments):
    """Use small models of the same architecture."""
    architecture, options = SMALL[kind]
    entries = {
        entry.method: entry.options
        for experiment in experiments.values()
        for entry in experiment.methods
        if kind in experiment.backbone
    }
    batches = [(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))]
    data = SelectionData(lambda: batches, lambda: batches)
    for name, chosen in entries.items():
        torch.manual_seed(0)
        model = timm.create_model(architecture, num_classes=3, **options)
        built = build_method(name, model, batches=data, **{**chosen, **QUICK.get(name, {})})
        assert any(parameter.requires_grad for parameter in built.parameters()), name
