"""HTML report of a comparison: content and escaping."""

import re
from dataclasses import replace

import pytest

from snella_lab.comparison.experiment import Experiment
from snella_lab.comparison.report import markdown_tables, write_page
from snella_lab.comparison.summary import interval_text, outcome_text, recommendation_text, summarize


@pytest.fixture(scope="module")
def page(request, tmp_path_factory):
    experiment, rows = request.getfixturevalue("large_once")
    return write_page(tmp_path_factory.mktemp("page"), summarize(experiment, rows)).read_text()


def test_report_has_all_sections_and_figures_and_no_external_links(page):
    assert re.findall(r'<section id="(\w+)"', page) == ["accuracy", "differences", "costs", "rates", "failed", "how"]
    assert page.count('<svg class="figure"') == 2 * 2 + 3 + 7
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', page)
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_report_describes_the_statistics(page):
    tested = (
        "the highest mean of each column is bold. Column “minus lora-8”: differences from lora-8 in percentage "
        "points, with 95% Student&#39;s t intervals over tasks (seeds averaged per task); p after Holm&#39;s "
        "correction over 11 comparisons; above: number of tasks above lora-8, with p of the sign test. A "
        "difference is significant if p is at most 0.05 with at least 5 tasks (or seeds of a single task)."
    )
    for text in (tested, "360 tuning runs without test images", "minus lora-8"):
        assert text in page, text
    assert "natural (fashion, stamps)" in page and "snella compare --experiment large" in page


def test_outcome_is_summarized_in_the_report(large, page):
    outcome = re.search(r'id="outcome">(.*?)</p>', page)[1]
    assert outcome == outcome_text(summarize(*large))
    pattern = r"full has the highest test accuracy, \d+\.\d% in the mean over 6 tasks: \d+\.\d percentage points "
    assert re.match(pattern + r"above lora-8 \(95% interval \+\d+\.\d to \+\d+\.\d\)\. Among the others, ", outcome)
    assert "linear" in outcome.partition("are significantly below lora-8")[0].rpartition(" and ")[2]


def test_two_seeds_decide_no_difference(tiny, make_row):
    experiment = tiny(methods=["lora-2", "bias"], seeds=2)
    rows = [
        make_row(experiment, "digits", method, seed, test_accuracy=accuracy)
        for method, *values in (("lora-2", 0.8, 0.7), ("bias", 0.9, 0.68))
        for seed, accuracy in enumerate(values)
    ]
    assert outcome_text(summarize(experiment, rows)) == (
        "bias has the highest test accuracy, 79.0%: 4.0 percentage points above lora-2 (95% interval "
        "\u221272.2 to +80.2; not significant, 2 seeds, at least 5 required)."
    )
    text = outcome_text(summarize(experiment, rows[:2]))
    assert text == "lora-2 has the highest test accuracy, 75.0%."
    assert outcome_text(summarize(experiment, [])) == ""
    assert recommendation_text(summarize(experiment, rows[:2])).endswith(
        " Not ranked (missing results or other seeds): bias."
    )
    assert "Not ranked" not in recommendation_text(summarize(experiment, rows))


def test_correction_counts_only_methods_with_several_units(tiny, make_row):
    experiment = tiny(methods=["lora-2", "linear", "bias"], seeds=2)
    finished = [("lora-2", 0, 0.8), ("lora-2", 1, 0.8), ("linear", 0, 0.7), ("linear", 1, 0.6), ("bias", 0, 0.7)]
    rows = [make_row(experiment, "digits", name, seed, test_accuracy=value) for name, seed, value in finished]
    assert "p after Holm's correction over 1 comparison;" in interval_text(summarize(experiment, rows))


@pytest.mark.parametrize(("seeds", "word"), [(2, "significant, 2 seeds"), (5, "significantly below")])
def test_clear_difference_requires_five_seeds(tiny, make_row, seeds, word):
    experiment = tiny(methods=["lora-2", "bias", "linear"], seeds=seeds)
    rows = [
        make_row(experiment, "digits", method, seed, test_accuracy=mean + seed / 1000 * (1 + mean))
        for method, mean in (("lora-2", 0.8), ("bias", 0.85), ("linear", 0.4))
        for seed in range(seeds)
    ]
    summary = summarize(experiment, rows)
    text = outcome_text(summary)
    assert word in text and ("significantly" in text) == (seeds == 5)
    assert ("no difference is significant with fewer than 5" in markdown_tables(summary)) == (seeds == 2)


def test_insignificant_lead_states_its_p_value(large, make_row):
    experiment, rows = large
    values = iter([0.1, 0.02, 0.01, 0.0, 0.03, 0.01])
    shift = {entry.name: next(values) for entry in experiment.data}
    smaller = Experiment.from_dict({**experiment.as_dict(), "methods": ["lora-8", "full"]})
    rows = [
        make_row(experiment, task, method, seed, test_accuracy=0.8 + (method == "full") * shift[task])
        for task in shift
        for method in ("lora-8", "full")
        for seed in range(3)
    ]
    text = outcome_text(summarize(smaller, rows))
    assert text.endswith(
        "82.8% in the mean over 6 tasks: 2.8 percentage points above lora-8 (95% interval \u22121.0 to +6.7; "
        "not significant, p 0.12 after Holm's correction)."
    )


def test_tied_methods_are_all_named(tiny, make_row):
    experiment = tiny(methods=["lora-2", "bias"], seeds=2)
    rows = [make_row(experiment, "digits", m, seed, test_accuracy=0.5) for m in ("lora-2", "bias") for seed in (0, 1)]
    assert outcome_text(summarize(experiment, rows)) == "lora-2, bias have the highest test accuracy, 50.0%."


def test_report_names_the_metric_and_the_tuned_settings(table_page):
    page, experiment, rows = table_page
    text = page.read_text()
    assert "<h1>comparison on csv:<wbr>people/<wbr>photographs_<wbr>and_<wbr>labels.<wbr>csv</h1>" in text
    assert "<h2>Mean average precision and cost</h2>" in text and "Accuracy" not in text
    assert "The learning rate was tuned on the validation set" in text
    tables = markdown_tables(summarize(experiment, rows))
    assert "forgetting" not in tables and "memory" in tables
    ticks = re.findall(r"<text[^>]*>([\d.]+)%</text>", text)
    assert ticks and not [tick for tick in ticks if tick.endswith("0") and "." in tick]


def test_best_value_of_each_column_is_marked(page):
    line = re.search(r'<th scope="row">full</th>.*', page)[0]
    assert line.count("n best") == 8


def test_only_ranked_methods_are_marked_as_best(tiny, make_row, tmp_path):
    experiment = tiny(methods=["linear", "lora-2", "bias"], seeds=2)
    scores = {("linear", 0): 0.5, ("linear", 1): 0.5, ("lora-2", 0): 0.6, ("lora-2", 1): 0.6, ("bias", 0): 0.9}
    rows = [make_row(experiment, "digits", *key, test_accuracy=score) for key, score in scores.items()]
    page = write_page(tmp_path, summarize(experiment, rows)).read_text()
    lines = {name: re.search(rf'<th scope="row">{name}</th>.*', page)[0] for name in ("linear", "lora-2", "bias")}
    assert [name for name, line in lines.items() if "n best" in line] == ["lora-2"]


def test_markup_in_names_is_escaped(large, tmp_path):
    experiment, rows = large
    markup = "<img src=x onerror=alert(1)>"
    values = experiment.as_dict()
    values["methods"][0]["name"] = values["data"][0]["name"] = markup
    values["about"] = markup
    values["methods"], values["data"] = values["methods"][:1], values["data"][:1]
    names = {"linear": markup, "fashion": markup}
    changed = [
        replace(
            row,
            experiment_name=names.get(row.experiment_name, row.experiment_name),
            task_name=names.get(row.task_name, row.task_name),
        )
        for row in rows
    ]
    text = write_page(tmp_path, summarize(Experiment.from_dict(values), changed)).read_text()
    assert "<img" not in text and "&lt;img" in text


def test_unfinished_comparison_has_a_report(large, tmp_path):
    experiment, rows = large
    assert "0 of 216 final runs finished" in write_page(tmp_path, summarize(experiment, [])).read_text()
    trials = [row for row in rows if row.purpose == "trial"][:3]
    assert 'id="rates"' in write_page(tmp_path, summarize(experiment, trials)).read_text()


def test_reused_tuning_run_counts_once_in_the_total_time(tiny, make_row, tmp_path):
    experiment = tiny()
    trial = make_row(experiment, "digits", "linear", 0, purpose="trial", total_time=100.0)
    final = make_row(experiment, "digits", "linear", 0, total_time=130.0, trained_as=trial.cell)
    text = write_page(tmp_path, summarize(experiment, [trial, final])).read_text()
    assert "Total run time: 2 min 10 s." in text.replace("\N{NO-BREAK SPACE}", " ").replace(
        "\N{NARROW NO-BREAK SPACE}", " "
    )


def test_fixed_learning_rate_is_not_described_as_tuned(tiny, make_row, tmp_path):
    experiment = tiny(train={"protocol": "official"}, grid={"lr_factors": [1.0]})
    text = write_page(tmp_path, summarize(experiment, [make_row(experiment, "digits", "linear", 0)])).read_text()
    assert "Learning rate and weight decay were fixed, not tuned. Each final run" in text


@pytest.mark.parametrize(
    ("factors", "decays", "sentence"),
    [
        ([0.3, 1.0], [], "The learning rate was tuned"),
        ([1.0], [0.1], "The weight decay was tuned"),
        ([0.3, 1.0], [0.1], "The learning rate and weight decay were tuned"),
    ],
)
def test_only_settings_with_several_values_are_described_as_tuned(factors, decays, sentence, tiny, make_row, tmp_path):
    experiment = tiny(grid={"lr_factors": factors, "weight_decays": decays})
    rows = [make_row(experiment, "digits", "linear", 0, purpose="trial")]
    assert f"{sentence} on the validation set" in write_page(tmp_path, summarize(experiment, rows)).read_text()


def test_report_states_how_memory_was_measured(tiny, make_row, tmp_path):
    experiment = tiny()
    for memory, phrase in ((None, "minus the libraries loaded before training"), (2**30, "Memory is peak GPU memory.")):
        row = make_row(experiment, "digits", "linear", 0, accelerator_memory_max=memory)
        assert phrase in write_page(tmp_path, summarize(experiment, [row])).read_text()


def test_difference_on_a_subset_of_tasks_states_their_number(large, tmp_path):
    experiment, rows = large
    rows = [row for row in rows if row.experiment_name != "full" or row.task_name in ("fashion", "elpv")]
    text = write_page(tmp_path, summarize(experiment, rows)).read_text()
    assert re.search(r'<th scope="row">full</th>.*\] \(2 of 6 tasks\)<span .*>p [\d.]+ · above 2 of 2 \(0.50\)', text)
    assert text.count("(2 of 6 tasks)") >= 3  # both tables and the figure


def test_headline_shows_the_recommended_and_the_most_accurate_method(tiny, make_row, tmp_path):
    experiment = tiny(methods=["lora-2", "bias"], seeds=2)

    def headline(accuracies):
        rows = [
            make_row(
                experiment, "digits", m, seed, test_accuracy=a, training_mib=mib, train_time=1.0,
                accelerator_memory_max=None,
            )
            for m, mib, values in zip(("lora-2", "bias"), (900.0, 500.0), accuracies, strict=True)
            for seed, a in enumerate(values)
        ]  # fmt: skip
        page = write_page(tmp_path, summarize(experiment, rows)).read_text().replace("\N{NO-BREAK SPACE}", " ")
        cards = page.partition('<div class="choices">')[2].partition("<nav")[0]
        return re.findall(r'"label">(.*?)</p><p class="score">(.*?)</p><p class="value">(.*?)</p>', cards)

    assert headline([(0.90, 0.86), (0.88, 0.85)]) == [
        ("Recommended", "86.5%", "bias"),
        ("Highest accuracy", "88.0%", "lora-2"),
    ]
    assert headline([(0.90, 0.86), (0.98, 0.95)]) == [("Recommended, highest accuracy", "96.5%", "bias")]


def test_kappa_is_a_decimal_and_accuracy_a_percentage(tiny, make_row, tmp_path):
    experiment = tiny(methods=["lora-2", "bias"], seeds=2, train={"task": "ordinal"}, forgetting=[])
    kappas = {"lora-2": (0.5, 0.54), "bias": (-0.01, 0.01)}
    rows = [
        make_row(experiment, "digits", method, seed, metric="kappa", test_kappa=kappa, test_accuracy=0.8 + kappa / 10)
        for method, values in kappas.items()
        for seed, kappa in enumerate(values)
    ]
    summary = summarize(experiment, rows)
    tables = markdown_tables(summary)
    lines = [line.split(" | ") for line in tables.splitlines() if line.startswith("| bias")]
    assert [line[1] for line in lines] == ["0.000 ± 0.014", "80.0 ± 0.1"]
    assert [line[2].partition(" ")[0] for line in lines] == ["−0.520", "−5.2"]
    assert (
        "Test quadratic weighted kappa/accuracy (accuracy in percent), mean ± standard deviation over seeds; " in tables
    )
    assert "differences from lora-2 (accuracy in percentage points), with 95%" in tables
    assert outcome_text(summary) == "lora-2 has the highest test quadratic weighted kappa, 0.520."
    assert "(0.020)" in recommendation_text(summary) and "%" not in recommendation_text(summary)
    page = write_page(tmp_path, summary).read_text()
    assert '<p class="score">0.520</p>' in page and "difference in test quadratic weighted kappa" in page
    assert "Mean ± standard deviation (accuracy in percent) over seeds" in page


def test_single_task_has_its_score_before_the_difference(tiny, make_row, tmp_path):
    experiment = tiny(methods=["lora-2", "bias"])
    rows = [make_row(experiment, "digits", method, 0) for method in ("lora-2", "bias")]
    page = write_page(tmp_path, summarize(experiment, rows)).read_text()
    head = page.partition('<table class="scores"><thead>')[2].partition("</thead>")[0]
    assert re.findall(">([^<>]+)</th>", head)[:3] == ["method", "digits", "minus lora-2"]


def test_recommendation_is_the_cheapest_method_within_one_standard_error(tiny, make_row):
    experiment = tiny(methods=["linear", "lora-2", "bias"], seeds=2)
    values = {"linear": (0.5, 0.5), "lora-2": (0.90, 0.86), "bias": (0.88, 0.85)}
    costs = {"linear": (100.0, 1.0), "lora-2": (900.0, 9.0), "bias": (500.0, 12.0)}

    def rows(costs):
        return [
            make_row(
                experiment, "digits", m, seed, test_accuracy=a, training_mib=costs[m][0], train_time=costs[m][1],
                accelerator_memory_max=None,
            )
            for m, accuracies in values.items()
            for seed, a in enumerate(accuracies)
        ]  # fmt: skip

    text = recommendation_text(summarize(experiment, rows(costs)))
    assert text == (
        "Recommended: bias. 2 methods are within one standard error (2.0 percentage points) of the best accuracy, "
        "88.0% for lora-2; bias needs the least memory (memory 500\N{NO-BREAK SPACE}MiB, time 12.0\N{NO-BREAK SPACE}s)."
    )
    similar = costs | {"lora-2": (510.0, 9.0)}
    assert "lora-2 needs the least memory (within 5%) and the least time" in recommendation_text(
        summarize(experiment, rows(similar))
    )
    one_seed = [row for row in rows(costs) if row.seed == 0]
    assert recommendation_text(summarize(experiment, one_seed)).startswith(
        "Recommended: lora-2. No other method has the same accuracy; with only one seed, the standard error is unknown."
    )
    tied = [make_row(experiment, "digits", m, 0, test_accuracy=0.5, test_balanced_accuracy=0.5) for m in values]
    unknown = "3 methods are within one standard error (only one seed; standard error unknown) of the best accuracy"
    assert unknown in recommendation_text(summarize(experiment, tied))
    assert recommendation_text(summarize(experiment, [])) == ""


def test_a_difference_on_some_tasks_is_no_overall_outcome(large, make_row):
    experiment, _ = large
    smaller = Experiment.from_dict({**experiment.as_dict(), "methods": ["lora-8", "full", "bias"], "seeds": 5})
    tasks = [entry.name for entry in experiment.data]
    accuracies = {"lora-8": 0.8, "full": 0.9, "bias": 0.85}
    rows = [
        make_row(experiment, task, method, seed, test_accuracy=accuracy + seed / 1000)
        for method, accuracy in accuracies.items()
        for task in (tasks[:1] if method == "bias" else tasks)
        for seed in range(5)
    ]
    summary = summarize(smaller, rows)
    differences = {method.name: method.to_reference[summary.column] for method in summary.methods}
    assert differences["bias"].direction == 1 and "bias" not in outcome_text(summary)
    assert recommendation_text(summary).endswith(" Not ranked (missing results or other seeds): bias.")
    partial = [row for row in rows if row.experiment_name == "full" or row.task_name in tasks[:2]]
    assert "10.0 percentage points above lora-8 (2 of 6 tasks)" in outcome_text(summarize(smaller, partial))


def test_tied_leaders_are_not_among_the_others(tiny, make_row):
    experiment = tiny(methods=["lora-2", "bias", "linear"], seeds=6)
    rows = [
        make_row(experiment, "digits", method, seed, test_accuracy=accuracy)
        for method, accuracy in (("lora-2", 0.7), ("bias", 0.9), ("linear", 0.9))
        for seed in range(6)
    ]
    text = outcome_text(summarize(experiment, rows))
    assert text.startswith("bias, linear have the highest test accuracy, 90.0%") and "Among the others" not in text
