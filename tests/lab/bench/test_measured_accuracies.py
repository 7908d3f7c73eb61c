"""Accuracies in the notes and guides match the committed rows; `test_tables.py` compares the generated tables."""

import math
from statistics import fmean, stdev

import pytest
import torch
from peft import get_peft_model
from torch import nn

from snella import SnellaConfig
from snella.matrices import adapted_matrices
from snella_app.text import decimal_text, points_text, signed_text
from snella_lab.comparison.experiment_files import read_experiment
from snella_lab.comparison.statistics import FinalRuns, difference_of
from snella_lab.comparison.summary import difference_text
from snella_lab.recipes.demo import DEMO_METHODS

from .pages import CHECKS, COMPARISONS, INDEX, LIBRARY, PAPER, ROOT, STEPS, TRAINING, assert_states, rows, span, table

METRIC = "test_accuracy"
SUITE = ["mnist", "elpv", "fashion-mnist", "mri-regions", "stamps", "digits"]
PAIR = ["snella-8", "lora-8"]
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven"]


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def trained(method, factor=1.0, state="raw", val_size=400, options=None, **settings):
    """Return the accuracies in percent of the newest runs that adapt all blocks, by task and seed."""
    setting = {"method": method, "lr_factor": factor, "val_size": val_size, "options": options or {}, "blocks": 12}
    setting |= {"settings": settings}
    found = {}
    for row in rows("learning_rates"):
        if "kept" in row and not row.get("factor_scale") and setting.items() <= row.items():
            found[row["task"], row["seed"]] = 100 * row["kept"][state]["accuracy"]
    return found


def changes(after, before):
    """Return the changes on the tasks and seeds of both, in points."""
    return {key: after[key] - before[key] for key in sorted(after.keys() & before.keys())}


def change_text(after, before):
    """Format the mean change and its standard error: −0.2 ± 1.1."""
    values = list(changes(after, before).values())
    return f"{signed_text(fmean(values), 1)} ± {stdev(values) / math.sqrt(len(values)):.1f}"


def over_tasks(after, before):
    """Format the mean change over tasks with its interval; the seeds of a task are averaged."""
    gaps = changes(after, before)
    tasks = dict.fromkeys(task for task, _ in gaps)
    pairs = [[gap / 100 for (name, _), gap in gaps.items() if name == task] for task in tasks]
    return difference_text(difference_of(pairs), len(tasks))


def mean_of(runs, method, tasks):
    return 100 * runs.mean(method, [[task] for task in tasks], METRIC).mean


def test_accuracies_with_approximate_gradients_match_the_measured_rows():
    lines = [("0, 1", 400, {"weight_gradient": "sample:1/2"}), ("0 to 2", 600, {"weight_gradient": "bfloat16"})]
    lines.append(("0 to 2", 600, {"compress_activations": True}))
    means = []
    for cells, (seeds, val_size, options) in zip(table(STEPS, "| option | seeds"), lines, strict=True):
        pairs = []
        for state in ("raw", "last_raw", "ema", "last_ema"):
            same = {"state": state, "val_size": val_size}
            pairs.append((trained("snella-8", options=options, **same), trained("snella-8", **same)))
        assert cells == [seeds, *(change_text(*pair) for pair in pairs)]
        assert {seed for _, seed in changes(*pairs[0])} == set(range(int(seeds[-1]) + 1))
        means += [fmean(changes(*pair).values()) for pair in pairs]
    exception, *others = sorted(means)
    texts = f"{max(map(abs, others)):.1f}", f"{-exception:.1f}"
    assert_states(STEPS, "changes by at most {} points, with one exception. With `sample:1/2` and averaged", texts[0])
    assert_states(STEPS, "weights, it is {} points lower at the selected epoch", texts[1])
    assert_states(LIBRARY, "mean accuracy changes by at most {} points", texts[0])
    assert_states(LIBRARY, "with averaged weights (`--ema 0.97`) loses {} points", texts[1])


def test_sensitivity_to_the_learning_rate_matches_the_suite():
    from suite_table import UNTUNED, defaults_rows, read_suite
    from twin_tables import read_cells

    _, suite = read_suite()
    tuned, default = FinalRuns(suite), FinalRuns(defaults_rows(suite, read_cells(UNTUNED)))
    losses, methods = {}, ["snella-8", "snella-matched-8", "lora-8", "dora-8", "full"]
    for cells, method in zip(table(COMPARISONS, "| | validation at"), methods, strict=True):
        trials = [row for row in suite if (row.purpose, row.experiment_name) == ("trial", method)]
        trials = [row for row in trials if row.tried_weight_decay is None]
        scores = [[100 * row.column("val_accuracy") for row in trials if row.lr_factor == k] for k in (0.3, 1.0, 3.0)]
        assert [len(same) for same in scores] == [6, 6, 6]
        low, middle, high = map(fmean, scores)
        losses[method] = middle - high
        worst = f"{max(low, middle, high) - min(low, middle, high):.1f}"
        at_default = f"{mean_of(default, method, SUITE):.1f}" if default.rows(method, "mnist") else ""
        validation = f"{low:.1f} · {middle:.1f} · {high:.1f}"
        assert cells == [validation, worst, f"{mean_of(tuned, method, SUITE):.1f}", at_default]
    others = WORDS[math.ceil(max(losses["snella-matched-8"], losses["lora-8"]))]
    sentence = "SNELLA loses {:.1f} points of validation accuracy, while `snella-matched` and LoRA lose at most {}."
    assert_states(COMPARISONS, sentence, losses["snella-8"], others)
    assert_states(TRAINING, "validation accuracy of `snella` by {:.1f} points on average", losses["snella-8"])
    gap = mean_of(default, "lora-8", SUITE) - mean_of(tuned, "lora-8", SUITE)
    assert_states(COMPARISONS, "Tuning lowers LoRA's test accuracy by {:.1f} points", gap)


def test_table_of_learning_rates_matches_the_measured_rows():
    found, tasks = {}, ("mri-regions", "stamps")
    for row in rows("learning_rates"):
        if (row["blocks"], row["settings"]) == (2, {}):
            found[row["task"], row["method"], row["lr_factor"]] = row
    lines = [(task, name) for task in tasks for name in ("snella-matched-8", *PAIR)]
    for cells, line in zip(table(COMPARISONS, "| learning rate ×"), lines, strict=True):
        assert cells == [_accuracy_and_size(found.get((*line, factor))) for factor in (1.0, 3.0, 10.0)]
    snella, matched = (
        [found[task, name, 10.0]["update_rms"] / found[task, name, 1.0]["update_rms"] for task in tasks]
        for name in ("snella-8", "snella-matched-8")
    )
    sentence = "this size is {} times as large; with matched steps, it is {} times as large"
    assert_states(COMPARISONS, sentence, span(snella), span(matched, 1))
    defaults = [found[task, "snella-8", 1.0] for task in tasks]
    errors = [100 * math.sqrt(r["val_accuracy"] * (1 - r["val_accuracy"]) / r["val_images"]) for r in defaults]
    assert_states(COMPARISONS, "about {:.0f} points for the MRI regions and {:.1f} for the stamps", *errors)


def _accuracy_and_size(row):
    """Format the accuracy and, for SNELLA, the relative size of the update: 55.2 · 2.8."""
    if row is None:
        return "–"
    accuracy, size = f"{100 * row['val_accuracy']:.1f}", row["update_rms"]
    return accuracy if size is None else f"{accuracy} · {size:.{2 if size < 1 else 1}f}"


def test_evidence_of_decisions_matches_the_measured_rows():
    averaging = [change_text(trained(name, state="ema"), trained(name)) for name in PAIR]
    sentence = "averaging changes SNELLA by {} points ({} runs) and LoRA by {} |"
    assert_states(COMPARISONS, sentence, averaging[0], len(trained("snella-8")), averaging[1])
    longer = [change_text(trained(name, epochs=20), trained(name)) for name in PAIR]
    assert_states(COMPARISONS, "20 epochs change SNELLA by {} points, LoRA by {} |", *longer)
    gains = []
    for state in ("raw", "ema"):
        denser = trained("snella-matched-8", state=state, options={"min_layer_share": 0.3}, target_sparsity=0.3)
        gains.append(signed_text(fmean(changes(denser, trained("snella-matched-8", state=state)).values()), 1))
    sentence = "changes `snella-matched` by {} points (mean of four datasets), and by {} with averaged weights"
    assert_states(COMPARISONS, sentence, *gains)
    accuracies = {"random": {}, "probe": {}}
    for row in rows("learning_rates"):
        if row["blocks"] == 2 and row["lr_factor"] == 1 and "head_lr" not in row["settings"]:
            key = row["method"], row["task"], row["steps"]
            accuracies[row["settings"].get("head_start", "random")][key] = 100 * row["val_accuracy"]
    from_probe = changes(accuracies["probe"], accuracies["random"])
    short = [gain for (*_, steps), gain in from_probe.items() if steps == 50]
    long = [gain for (*_, steps), gain in from_probe.items() if steps > 50]
    assert_states(COMPARISONS, "adds {} points in runs of 50 steps, nothing on average in runs of 136", span(short))
    assert abs(fmean(long)) < 0.5


def test_tables_of_defaults_on_small_datasets_match_the_measured_rows():
    columns = []
    for name, state in (("snella-8", "raw"), ("snella-8", "ema"), ("snella-matched-8", "raw")):
        own, lora, probe = trained(name, state=state), trained("lora-8", state=state), trained("lora-8", state="start")
        best = {key: max(lora[key], probe[key]) for key in lora}
        columns.append([over_tasks(own, lora), over_tasks(own, best)])
    assert table(COMPARISONS, "| mean over datasets") == [list(line) for line in zip(*columns, strict=True)]
    matched = trained("snella-matched-8")
    seven, four = (WORDS[len(trained("snella-8", factor))] for factor in (2.0, 3.0))
    twice = [change_text(trained("snella-8", 2.0, s), trained("snella-8", state=s)) for s in ("raw", "ema")]
    three = [change_text(trained(name, 3.0), trained(name)) for name in ("snella-8", "snella-matched-8", "lora-8")]
    centered = changes(trained("snella-matched-8", options={"center_softmax": True}), matched)
    dense = trained("snella-matched-8", options={"sparsify_mode": "none"}, target_sparsity=0.0, scaling=1.0)
    fashion, stamps = (signed_text(gap, 1) for gap in centered.values())
    clipart, regions, dense_stamps = (signed_text(gap, 0) for gap in changes(dense, matched).values())
    assert table(COMPARISONS, "| change | result |") == [
        ["SNELLA {}, with averaged weights {} ({} runs)".format(*twice, seven)],
        ["SNELLA {}, `snella-matched` {}, LoRA {} ({} runs each)".format(*three, four)],
        [f"stamps {stamps}, Fashion-MNIST {fashion}"],
        [f"stamps {dense_stamps}, MRI regions {regions}, `clipart` {clipart}"],
    ]


def test_text_on_small_datasets_matches_the_measured_rows():
    from suite_table import UNTUNED
    from twin_tables import read_cells

    snella, matched, lora = (
        [f"{fmean(trained(name, factor, epochs=3).values()):.1f}" for factor in (1.0, 3.0)]
        for name in ("snella-8", "snella-matched-8", "lora-8")
    )
    assert_states(COMPARISONS, "lowers SNELLA's mean accuracy from {} to {} and raises", *snella)
    assert_states(COMPARISONS, "raises that of `snella-matched` from {} to {}.", *matched)
    assert_states(COMPARISONS, "LoRA's mean accuracy is nearly unchanged ({} to {}).", *lora)
    runs, tasks = FinalRuns(read_cells(UNTUNED.with_name("efficientnet.jsonl"))), ("clipart", "emoji", "textures")
    names = ("linear", "lora-8", "snella-matched-8", "snella-8")
    means = [f"{mean_of(runs, name, [f'folder:{task}' for task in tasks]):.1f}" for name in names]
    assert means[1] == means[2]
    sentence = "the highest mean accuracy, {}. LoRA and `snella-matched` reach {}, and SNELLA reaches {}"
    assert_states(COMPARISONS, sentence, means[0], *means[2:])


def test_text_on_the_suite_matches_the_measured_rows():
    from suite_table import read_suite

    runs = FinalRuns(read_suite()[1])
    methods = ("snella-8", "lora-8", "vpt-deep", "full")
    snella, lora, prompts, full = (runs.average(name, "training_mib") for name in methods)
    assert_states(COMPARISONS, "of the {:.0f} MiB by which SNELLA's memory exceeds LoRA's", snella - lora)
    assert_states(PAPER, "suite: VPT-deep {:.0f}, `full` {:.0f};", prompts, full)
    stamps = runs.difference("dora-8", "snella-8", ["stamps"], METRIC)
    assert_states(PAPER, "on stamps, DoRA is {:.1f} higher", 100 * stamps.mean)
    matched, snella = [], []
    for name, sparsities in (("snella-matched-8", matched), ("snella-8", snella)):
        for row in (row for task in SUITE for row in runs.rows(name, task)):
            sparsities.append(100 * (1 - row.column("kept_weights") / row.column("adapted_weights")))
    assert_states(COMPARISONS, "All {} `snella-matched` adapters have {}% sparsity.", len(matched), span(matched))
    denser = WORDS[sum(sparsity <= 69 for sparsity in snella)].capitalize()
    sentence = "{} of the {} `snella-8` adapters are at least one point less sparse (as low as {:.0f}%)"
    assert_states(COMPARISONS, sentence, denser, len(snella), min(snella))


def test_text_on_the_twin_of_table_vii_matches_the_measured_rows():
    from twin_tables import COMMITTED, read_cells

    runs = FinalRuns(read_cells(COMMITTED))
    gains = {}
    expected = " ".join(read_experiment("twin-table7").expected.split())
    for scaling in ("", "-scaling-1"):
        for kernel in ("linear", "p_linear", "8"):
            gain = runs.difference(f"snella-{kernel}{scaling}", f"klora-{kernel}{scaling}", SUITE, METRIC)
            gains[kernel, scaling] = gain
            assert f" {100 * gain.mean:.1f} points [{100 * gain.low:.1f}, {100 * gain.high:.1f}]" in expected
    ten, one = gains["linear", ""], gains["linear", "-scaling-1"]
    sentence = "With the linear kernel, the intervals exclude that sparsity costs more than {:.1f} points"
    assert_states(COMPARISONS, sentence, -100 * min(ten.low, one.low))
    ends = [decimal_text(100 * value, 1) for value in (ten.low, ten.high, one.mean, one.low, one.high)]
    sentence = "(sparse minus dense: +{:.1f} points with a scaling of 10, 95% interval {} to {}; {} with 1, {} to {})."
    assert_states(COMPARISONS, sentence, 100 * ten.mean, *ends)
    paper = read_experiment("table7").published["values"]
    (cost,) = (paper["linear"][mean] - paper["linear-sparse"][mean] for mean in paper["linear"])
    assert_states(COMPARISONS, "In the paper, it costs {:.1f} points.", cost)
    sentence = (
        "a scaling of 10, the sparse updates are on average {:.1f} and {:.1f} points above the dense ones, and above"
    )
    assert_states(COMPARISONS, sentence, *(100 * gains[kernel, ""].mean for kernel in ("p_linear", "8")))
    for kernel in ("p_linear", "8"):
        assert all(runs.difference(f"snella-{kernel}", f"klora-{kernel}", [t], METRIC).mean > 0 for t in SUITE)
        assert runs.difference(f"klora-{kernel}", "klora-linear", SUITE, METRIC).high < 0
    sentence = "With a scaling of 1, the differences are {:.1f} and {:.1f} points."
    assert_states(COMPARISONS, sentence, *(100 * gains[kernel, "-scaling-1"].mean for kernel in ("p_linear", "8")))
    ends = []
    for scaling in ("", "-scaling-1"):
        names = [f"snella-{kernel}{scaling}" for kernel in ("linear", "p_linear", "8")]
        means = [100 * runs.mean(name, [[task] for task in SUITE], METRIC).mean for name in names]
        ends += [min(means), max(means)]
    sentence = "kernels range from {:.1f} to {:.1f}% with a scaling of 10 and from {:.1f} to {:.1f}% with 1."
    assert_states(COMPARISONS, sentence, *ends)
    ten, one = (runs.difference(f"snella-8{s}", f"klora-linear{s}", SUITE, METRIC) for s in ("", "-scaling-1"))
    values = [decimal_text(100 * value, 1) for value in (ten.mean, ten.low, ten.high, -one.mean, -one.high, -one.low)]
    sentence = (
        "Compared with the dense linear kernel, Mix-K with sparsity is {} points better with a scaling of 10 ({} to "
        "{}) and {} points worse with 1 ({} to {}, not corrected"
    )
    assert_states(COMPARISONS, sentence, *values)
    others = ("snella-linear", "snella-p_linear", "snella-8", "klora-p_linear", "klora-8")
    gains_over_linear = [
        runs.difference(f"{name}{scaling}", f"klora-linear{scaling}", SUITE, METRIC)
        for name in others
        for scaling in ("", "-scaling-1")
    ]
    assert not any(gain.low > 0 for gain in gains_over_linear)
    sentence = (
        "no sparse or nonlinear variant is measurably better than the dense linear kernel; the intervals exclude a "
        "gain of more than {:.1f} points."
    )
    assert_states(COMPARISONS, sentence, 100 * max(gain.high for gain in gains_over_linear))


def test_dense_updates_of_nonlinear_kernels_start_larger():
    sizes = {}
    for kernel in ("linear", "p_linear", "mix_k"):
        torch.manual_seed(0)
        config = SnellaConfig(kernel=kernel, sparsify_mode="none", target_sparsity=0.0, target_modules=["0"])
        (matrix,) = adapted_matrices(get_peft_model(nn.Sequential(nn.Linear(384, 384)), config))
        sizes[kernel] = float(matrix.layer.sparse_updates("default")[0].square().mean().sqrt())
    ratios = [round(sizes[kernel] / sizes["linear"]) for kernel in ("p_linear", "mix_k")]
    sentence = "in a 384×384 matrix, their root mean square is {} and {} times that of the linear kernel."
    assert_states(COMPARISONS, sentence, *ratios)


def test_text_on_the_twin_of_table_viii_matches_the_measured_rows():
    from twin_tables import COMMITTED, read_cells

    runs = FinalRuns(read_cells(COMMITTED))

    def difference(higher, lower, scaling):
        return runs.difference(f"klora-{higher}{scaling}", f"klora-{lower}{scaling}", SUITE, METRIC)

    claims = [
        *(("linear", "sigmoid"), ("linear", "rbf"), ("normalized_rbf", "rbf")),
        *(("8", "normalized_rbf"), ("8", "p_linear")),
    ]
    expected = " ".join(read_experiment("twin-table8").expected.split())
    texts = []
    for claim in claims:
        result = difference(*claim, "-scaling-1")
        interval = f" {100 * result.mean:.1f} points [{100 * result.low:.1f}, {100 * result.high:.1f}] above"
        if result.mean < 0:
            interval = f" {-100 * result.mean:.1f} points [{-100 * result.high:.1f}, {-100 * result.low:.1f}] below"
        assert interval in expected
        mean, low, high = (signed_text(100 * value, 1) for value in (result.mean, result.low, result.high))
        texts.append(f"{mean} ({low} to {high})")
    sentence = (
        "linear minus sigmoid {}, minus RBF {}, normalized RBF minus RBF {}, Mix-K minus normalized RBF {}, "
        "minus P-Linear {} |"
    )
    assert_states(PAPER, sentence, *texts)
    poor = [f"klora-{kernel}{scaling}" for kernel in ("sigmoid", "rbf") for scaling in ("", "-scaling-1")]
    highest = max(runs.mean(name, [[task] for task in SUITE], METRIC).mean for name in poor)
    gaps = [difference("linear", kernel, scaling) for kernel in ("sigmoid", "rbf") for scaling in ("", "-scaling-1")]
    for name in poor:
        linear = "klora-linear-scaling-1" if name.endswith("-scaling-1") else "klora-linear"
        assert all(runs.difference(linear, name, [task], METRIC).mean > 0 for task in SUITE)
    means = [100 * gap.mean for gap in gaps]
    sentence = "are at most {:.1f}%, which is {:.1f} to {:.1f} points below the linear kernel's, and"
    assert_states(COMPARISONS, sentence, 100 * highest, min(means), max(means))
    ten, one = (difference("normalized_rbf", "rbf", scaling) for scaling in ("", "-scaling-1"))
    values = [decimal_text(100 * value, 1) for value in (ten.mean, ten.low, ten.high, one.mean, one.low, one.high)]
    sentence = "adds {} points with a scaling of 10 (95% interval {} to {}) and {} points with 1 ({} to {});"
    assert_states(COMPARISONS, sentence, *values)
    published = read_experiment("table8").published["values"]
    paper = {name: value for name, means in published.items() for value in means.values()}
    assert_states(COMPARISONS, "in the paper, it adds {:.1f} points.", paper["normalized_rbf"] - paper["rbf"])
    second = max(value for name, value in paper.items() if name != "mix_k")
    assert_states(COMPARISONS, "Mix-K is the best kernel in the paper, by {:.1f} points.", paper["mix_k"] - second)
    sentence = (
        "it is {} points below P-Linear with a scaling of 10 ({} to {}) and {} points below it with 1 ({} to {});"
    )
    below = [difference("8", "p_linear", scaling) for scaling in ("", "-scaling-1")]
    values = [-value for result in below for value in (result.mean, result.high, result.low)]
    assert_states(COMPARISONS, sentence, *(decimal_text(100 * value, 1) for value in values))
    ten, one = (difference("8", "normalized_rbf", scaling) for scaling in ("", "-scaling-1"))
    values = [-ten.mean, -ten.high, -ten.low, one.mean, one.low, one.high]
    sentence = "it is {} points worse with 10 ({} to {}) and {} points better with 1 ({} to {})."
    assert_states(COMPARISONS, sentence, *(decimal_text(100 * value, 1) for value in values))


def test_text_on_the_twin_of_table_ix_matches_the_measured_rows():
    from twin_tables import COMMITTED, read_cells

    runs = FinalRuns(read_cells(COMMITTED))
    names = ("within-layers-scaling-1", "klora-8-scaling-1")
    (lowest, task), *_, (highest, other) = sorted((runs.difference(*names, [t], METRIC).mean, t) for t in SUITE)
    mean = 100 * runs.difference(*names, SUITE, METRIC).mean
    assert_states(COMPARISONS, "competition within layers is {:.1f} points above KLoRA", mean)
    sentence = "ranges from {} points on `{}` to {:.1f} points on `{}`."
    assert_states(COMPARISONS, sentence, points_text(lowest), task, 100 * highest, other)
    mnist, digits = ([*runs.scores(names[1], t, METRIC).values()] for t in ("mnist", "digits"))
    failed = [WORDS[sum(score < 0.3 for score in scores)] for scores in (mnist, digits)]
    sentence = "below 30% on `mnist` with {} of the {} seeds, and on `digits` with {}."
    assert_states(COMPARISONS, sentence, failed[0], WORDS[len(mnist)], failed[1])
    low = WORDS[sum(runs.spread("klora-8", task, METRIC).mean < 0.35 for task in SUITE)]
    assert_states(COMPARISONS, "With a scaling of 10, it is below 35% on {} datasets", low)
    assert_states(PAPER, "with a scaling of 10, KLoRA is below 35% on {} of six datasets", low)
    gains = [runs.difference(f"snella-8{s}", f"within-layers{s}", SUITE, METRIC) for s in ("", "-scaling-1")]
    sentence = "the intervals exclude an improvement of more than {:.1f} points"
    assert_states(COMPARISONS, sentence, 100 * max(gain.high for gain in gains))


def test_text_on_the_twin_of_table_x_matches_the_measured_rows():
    from twin_tables import COMMITTED, read_cells

    runs = FinalRuns(read_cells(COMMITTED))
    scalings, intervals = ("", "-scaling-1"), ("epoch", "step")
    ends, largest = [], []
    for metric in ("magnitude", "w-magnitude"):
        results = [
            runs.difference(f"sensitivity-{interval}{scaling}", f"{metric}-{interval}{scaling}", SUITE, METRIC)
            for interval in intervals
            for scaling in scalings
        ]
        means = [100 * result.mean for result in results]
        ends += [-min(means), max(means)]
        largest.append(100 * max(result.high for result in results))
    sentence = (
        "it is between {:.1f} points worse and {:.1f} points better than magnitude, and between {:.1f} points worse "
        "and {:.1f} points better than W-Magnitude; the intervals exclude an advantage of more than {:.1f} and {:.1f}"
    )
    assert_states(COMPARISONS, sentence, *ends, *largest)
    pairs = [
        (f"{metric}-epoch{scaling}", f"{metric}-step{scaling}")
        for metric in ("sensitivity", "magnitude", "w-magnitude")
        for scaling in scalings
    ]
    means = [-100 * runs.difference(*pair, SUITE, METRIC).mean for pair in pairs]
    assert_states(COMPARISONS, "and scaling, by {:.1f} to {:.1f} points.", min(means), max(means))
    by_task = [[fmean(runs.difference(*pair, [task], METRIC).mean for pair in pairs)] for task in SUITE]
    assert max(by_task) < [0]
    total = difference_of(by_task)
    mean, low, high = (decimal_text(100 * value, 1) for value in (total.mean, total.low, total.high))
    assert_states(
        COMPARISONS, "is {} points, and it is negative on each dataset (95% interval {} to {};", mean, low, high
    )
    expected = " ".join(read_experiment("twin-table10").expected.split())
    texts = []
    for lower, higher, end in (
        ("sensitivity-epoch", "magnitude-epoch", "below magnitude"),
        ("sensitivity-epoch", "w-magnitude-epoch", "below W-Magnitude"),
        ("sensitivity-epoch", "sensitivity-step", "below allocation per step"),
    ):
        result = runs.difference(f"{lower}-scaling-1", f"{higher}-scaling-1", SUITE, METRIC)
        interval = f"[{-100 * result.high:.1f}, {-100 * result.low:.1f}]"
        assert f"{-100 * result.mean:.1f} points {interval} {end}" in expected
        mean, low, high = (signed_text(100 * value, 1) for value in (result.mean, result.low, result.high))
        texts.append(f"{mean} ({low} to {high})")
    sentence = "sensitivity minus magnitude {}, minus W-Magnitude {}; with sensitivity, per epoch minus per step {} |"
    assert_states(PAPER, sentence, *texts)


def test_text_on_the_twin_of_table_xii_matches_the_measured_rows():
    from twin_tables import COMMITTED, read_cells

    runs = FinalRuns(read_cells(COMMITTED))
    ten, one = (runs.difference(f"snella-8{s}", f"constant{s}", SUITE, METRIC) for s in ("", "-scaling-1"))
    assert_states(COMPARISONS, "{:.1f} points above the constant one with a scaling of 10", 100 * ten.mean)
    assert_states(COMPARISONS, "and {:.1f} points below it with a scaling of 1;", -100 * one.mean)
    assert_states(COMPARISONS, "exclude an advantage of more than {:.1f} points", 100 * max(ten.high, one.high))
    expected = " ".join(read_experiment("twin-table12").expected.split())
    for result, scaling in ((ten, 10), (one, 1)):
        interval = f"{100 * result.mean:.1f} points [{100 * result.low:.1f}, {100 * result.high:.1f}]"
        assert f"{interval} with a scaling of {scaling}" in expected
    cubic, constant = (read_experiment("table12").published["values"][name] for name in ("cubic", "constant"))
    (advantage,) = (cubic[mean] - constant[mean] for mean in cubic)
    assert_states(COMPARISONS, "In the paper, the advantage is {:.1f} points", advantage)


def test_text_on_the_twin_of_table_xi_matches_the_measured_rows():
    from twin_tables import COMMITTED, read_cells

    runs = FinalRuns(read_cells(COMMITTED))
    budgets = ("0.10", "0.50", "0.70", "0.90", "0.99")
    differences = {}
    ends = []
    for scaling in ("", "-scaling-1"):
        names = [f"snella-8{scaling}", *(f"budget-{budget}{scaling}" for budget in budgets)]
        means = [100 * runs.mean(name, [[task] for task in SUITE], METRIC).mean for name in names]
        ends += [min(means), max(means)]
        for budget, name in zip(budgets, names[1:], strict=True):
            differences[budget, scaling] = runs.difference(names[0], name, SUITE, METRIC)
    sentence = "range from {:.1f} to {:.1f}%, and with 1, from {:.1f} to {:.1f}%."
    assert_states(COMPARISONS, sentence, *ends)
    largest = max(difference.high for difference in differences.values())
    assert not any(difference.low > 0 or difference.high < 0 for difference in differences.values())
    assert_states(COMPARISONS, "that 0.30 is more than {:.1f} points better than", 100 * largest)
    paper = read_experiment("table11").published["values"]
    (advantage,) = (paper["budget-0.30"][mean] - paper["budget-0.99"][mean] for mean in paper["budget-0.30"])
    assert_states(COMPARISONS, "In the paper, it is {:.1f} points better than 0.99.", advantage)
    ten, one = (runs.difference(f"budget-0.99{s}", f"klora-8{s}", SUITE, METRIC) for s in ("", "-scaling-1"))
    sentence = (
        "SNELLA is {:.1f} points above KLoRA with a scaling of 10, and {:.1f} points above it with a scaling of 1"
    )
    assert_states(COMPARISONS, sentence, 100 * ten.mean, 100 * one.mean)
    ends = [decimal_text(100 * end, 1) for end in (ten.low, ten.high, one.low, one.high)]
    assert_states(COMPARISONS, "(95% intervals {} to {} and {} to {}).", *ends)
    expected = " ".join(read_experiment("twin-table11").expected.split())
    for scaling, number in (("", 10), ("-scaling-1", 1)):
        result = differences["0.99", scaling]
        interval = f"{100 * result.mean:.1f} points [{100 * result.low:.1f}, {100 * result.high:.1f}]"
        assert f"{interval} with a scaling of {number}" in expected


def test_results_of_the_demonstration_match_its_rows():
    runs = {(row["method"], row["seed"]): row for row in rows("demo")}
    seeds = sorted({seed for _, seed in runs})
    accuracies = {method: [100 * runs[method, seed]["accuracy"] for seed in seeds] for method in DEMO_METHODS}
    assert {row["precision"] for row in runs.values()} == {"fp32"}
    expected = [[f"{accuracy:.1f}" for accuracy in line] for line in zip(*accuracies.values(), strict=True)]
    means = [f"{fmean(accuracies[method]):.1f}" for method in DEMO_METHODS]
    assert table(CHECKS, "| seed | linear probe") == [*expected, means]
    costs = [runs[method, seeds[0]] for method in DEMO_METHODS]
    assert table(CHECKS, "| method | memory of a training step") == [
        [
            "–" if row["step_memory"] is None else f"{row['step_memory'] / 2**20:.0f} MiB",
            f"{row['train_s']:.0f} s",
            f"{row['trainable_parameters']:,}",
            f"{row['adapter_bytes'] / 2**20:.2f} MiB",
        ]
        for row in costs
    ]
    minutes, seconds = divmod(round(costs[0]["demo_s"]), 60)
    assert_states(CHECKS, "the demonstration took {} min {} s", minutes, seconds)
    probe, lora, snella = means
    assert_states(INDEX, "LoRA reaches {}%, SNELLA {}%, and the linear probe {}%", lora, snella, probe)
    gaps = [here - there for here, there in zip(accuracies["snella-8"], accuracies["lora-8"], strict=True)]
    ends = [signed_text(end(gaps), 1) for end in (min, max)]
    for page in (INDEX, CHECKS):
        assert_states(page, "SNELLA minus LoRA is between {} and {} points", *ends)
    memory = [f"{row['step_memory'] / 2**20:.0f}" for row in costs[1:]]
    assert_states(INDEX, "an estimated {} MiB instead of {}.", memory[1], memory[0])
