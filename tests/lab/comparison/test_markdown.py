"""Markdown tables of a comparison."""

from snella_lab.comparison.report import markdown_tables
from snella_lab.comparison.summary import summarize


def cells_of(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table_has_a_line_per_method_and_its_provenance(tiny, make_row):
    command = "snella compare --experiment tiny --out runs/tiny"
    experiment = tiny(methods=["linear", "lora-2"], seeds=3, command=command)
    accuracies = {("linear", 0): 0.5, ("linear", 1): 0.7, ("lora-2", 0): 0.8, ("lora-2", 1): 0.9}
    rows = [make_row(experiment, "digits", *key, test_accuracy=value) for key, value in accuracies.items()]
    text = markdown_tables(summarize(experiment, [*rows, make_row(experiment, "digits", "linear", 0, purpose="trial")]))
    table = [cells_of(line) for line in text.splitlines() if line.startswith("|")]
    assert table[0][:3] == ["method", "digits", "difference from lora-2"]
    assert table[2][:2] == ["linear", "60.0 ± 14.1 (2 of 3 seeds)"] and table[2][2].startswith("−25.0 [")
    assert table[3][:3] == ["lora-2", "85.0 ± 7.1 (2 of 3 seeds)", "–"]
    assert len({len(line) for line in table[:4]}) == 1
    assert text.endswith(f"4 of 6 final runs. `{command}`, a processor, 2026-01-02.\n")


def test_failed_runs_and_the_official_protocol_are_stated(tiny, make_row):
    experiment = tiny(train={"protocol": "official"}, grid={"lr_factors": [1.0]})
    rows = [make_row(experiment, "digits", "linear", 0)]
    rows += [make_row(experiment, "digits", "lora-2", 0, status="failed", error="ValueError: too warm")]
    text = markdown_tables(summarize(experiment, rows))
    assert "Official protocol: " in text and "Failed: `digits/lora-2/seed-0`, ValueError: too warm" in text


def test_table_without_final_runs_is_a_sentence(tiny):
    assert markdown_tables(summarize(tiny(), [])) == "No final run is finished yet.\n"


def test_all_commits_are_listed(tiny, make_row):
    experiment = tiny(seeds=2)
    info = {"torch-version": "2.13.0"}
    rows = [
        make_row(experiment, "digits", "linear", seed, package_info={**info, "snella-commit-hash": 5 * commit})
        for seed, commit in enumerate(("0123abcd", "4567ef01"))
    ]
    assert markdown_tables(summarize(experiment, rows)).endswith("2026-01-02, snella 0123abcd, 4567ef01.\n")
