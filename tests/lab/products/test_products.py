import importlib.util
import re
from pathlib import Path
from statistics import fmean
from types import ModuleType

import matplotlib
import numpy as np
import pytest

from snella_app.text import decimal_text, points_text
from snella_lab.bench.rows import append_rows, read_rows
from snella_lab.comparison.statistics import Difference, difference_of, with_holm

_FOLDER = Path(__file__).parents[3] / "benchmarks" / "products"


def _notes() -> str:
    return (_FOLDER.parents[1] / "docs" / "notes" / "products.md").read_text()


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"products_{name}", _FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _row(product: str, folder: str, accuracy: float, seed: int = 0) -> dict:
    others = dict.fromkeys(("balanced_accuracy", "nll", "ece", "seconds", "peak_mib", "stored_bytes"), 1.0)
    setting = {"weights": "dinov2s", "pixels": 70, "threads": 2, "minutes": 1.0, "seed": seed}
    return {"product": product, "folder": folder, "accuracy": accuracy, **setting, **others}


_NAMES = {"snella": "`snella train`", "fastai-all": "fastai's `fine_tune`"}


def _current_rows(folders: tuple[str, ...], minutes: int) -> list[dict]:
    """Return the last rows of both products since the kernel head."""
    rows = [row for row in read_rows(_FOLDER / "rows.jsonl") if row["date"] >= "2026-11-30T04:00"]
    rows = [row for row in rows if row["product"] in _NAMES and row["folder"] in folders]
    rows = _module("table").last_runs([row for row in rows if row["minutes"] == minutes])
    by_run = {(row["product"], row["folder"]): row for row in rows}
    return [by_run[product, folder] for product in _NAMES for folder in folders]


def _difference(rows: list[dict]):
    table = _module("table")
    gap = table.differences(table.means(rows), "fastai-all")["snella"]
    interval = f"[{decimal_text(100 * gap.low, 1)}, {decimal_text(100 * gap.high, 1)}]"
    return gap, f"{points_text(gap.mean)} {interval}"


_ROWS = [
    _row("snella", "a", 0.7), _row("snella", "a", 0.9, seed=1), _row("snella", "b", 0.5), _row("snella", "c", 0.4),
    _row("other", "a", 0.7), _row("other", "b", 0.5), _row("other", "c", 0.1), _row("other", "d", 0.9),
]  # fmt: skip


def test_scores_match_values_computed_by_hand():
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]])
    scores = _module("metrics").score(probabilities, np.array([0, 1, 1]))
    assert scores["accuracy"] == pytest.approx(2 / 3)
    assert scores["balanced_accuracy"] == pytest.approx(0.75)  # recalls 1 and 1/2
    assert scores["nll"] == pytest.approx(-(np.log(0.9) + np.log(0.2) + np.log(0.7)) / 3)
    assert scores["ece"] == pytest.approx((0.1 + 0.8 + 0.3) / 3)  # one image per bin


def test_confident_error_contains_a_finite_likelihood():
    module = _module("metrics")
    assert module.score(np.array([[1.0, 0.0]]), np.array([1]))["nll"] == pytest.approx(-np.log(module.MIN_PROBABILITY))


@pytest.mark.parametrize(
    ("probabilities", "message"),
    [
        (np.array([[0.5, 0.4]]), "must sum to 1, got 0.9000"),
        (np.array([[np.nan, np.nan]]), "must sum to 1, got nan"),
        (np.ones((2, 1)), r"must be \[1, classes\], got \[2, 1\]"),
    ],
)
def test_invalid_probabilities_are_rejected(probabilities, message):
    with pytest.raises(ValueError, match=message):
        _module("metrics").score(probabilities, np.array([0]))


def test_means_are_over_seeds_on_shared_folders():
    assert _module("table").means(_ROWS)["snella"] == pytest.approx({"a": 0.8, "b": 0.5, "c": 0.4})


def test_only_the_last_run_with_the_same_settings_counts():
    older, newer = (row | {"date": date} for row, date in zip(_ROWS[:1] * 2, ("2026-11-30", "2026-12-01"), strict=True))
    other_seed = _ROWS[1] | {"date": "2026-11-29"}
    assert _module("table").last_runs([newer, other_seed, older]) == [other_seed, newer]


def test_equal_accuracies_get_the_average_rank():
    table = _module("table")
    assert table.mean_ranks(table.means(_ROWS)) == pytest.approx(
        {"snella": (1 + 1.5 + 1) / 3, "other": (2 + 1.5 + 2) / 3}
    )


def test_difference_has_the_t_interval_over_folders():
    table = _module("table")
    differences = table.differences(table.means(_ROWS))
    gaps = np.array([-0.1, 0.0, -0.3])
    half = 4.302653 * gaps.std(ddof=1) / np.sqrt(3)
    assert list(differences) == ["other"]
    assert differences["other"].mean == pytest.approx(gaps.mean())
    assert (differences["other"].low, differences["other"].high) == pytest.approx(
        (gaps.mean() - half, gaps.mean() + half), rel=1e-5
    )


def test_differences_are_corrected_for_multiple_products():
    table = _module("table")
    third = [_row("third", folder, accuracy) for folder, accuracy in (("a", 0.6), ("b", 0.41), ("c", 0.35))]
    differences = table.differences(table.means([*_ROWS, *third]))
    assert [value.comparisons for value in differences.values()] == [2, 2]
    assert differences["third"].adjusted_p == pytest.approx(2 * differences["third"].p)


def test_table_is_sorted_by_mean_rank():
    lines = _module("table").markdown(_ROWS).splitlines()
    assert lines[2].startswith("| snella | 1.17 | 56.7 | – | – | – |")
    assert lines[3].startswith("| other | 1.83 | 43.3 | −13.3 [−51.3, +24.6] | 0.27 | 0 of 3 (0.50) |")


def test_missing_memory_is_a_dash():
    rows = [{key: value for key, value in row.items() if key != "peak_mib"} for row in _ROWS[:4]] + _ROWS[4:]
    lines = _module("table").markdown(rows).splitlines()
    assert lines[2].endswith("| 1 | – | 0.0 |") and lines[3].endswith("| 1 | 1 | 0.0 |")


def test_curves_average_the_folders_that_all_points_share(tmp_path):
    table = _module("table")
    later = [row | {"minutes": 3.0, "accuracy": row["accuracy"] + 0.1, "seconds": 90.0} for row in _ROWS[2:4]]
    points, folders = table.curves([*_ROWS, *later])
    assert folders == ["b", "c"]  # snella has no row of folder a at three minutes
    assert np.array(points["snella"]) == pytest.approx(np.array([(1 / 60, 45.0), (1.5, 55.0)]))
    assert np.array(points["other"]) == pytest.approx(np.array([(1 / 60, 30.0)]))
    table.draw([*_ROWS, *later], tmp_path / "curves.svg")
    assert (tmp_path / "curves.svg").stat().st_size


@pytest.mark.parametrize(("name", "other"), [("pixels", 98), ("threads", 4)])
def test_rows_of_different_settings_are_not_averaged(name, other, monkeypatch, tmp_path, capsys):
    table, file = _module("table"), tmp_path / "rows.jsonl"
    append_rows(file, [*_ROWS, *(row | {name: other, "accuracy": 0.2} for row in _ROWS)])
    monkeypatch.setattr("sys.argv", ["table.py", str(file)])
    with pytest.raises(SystemExit):
        table.main()
    before = _ROWS[0][name]
    message = f"rows must have the same {name}, got [{before}, {other}]; select one with --{name}"
    assert message in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["table.py", str(file), f"--{name}", str(before)])
    table.main()
    assert table.markdown(_ROWS) in capsys.readouterr().out


@pytest.mark.parametrize(("threads", "label"), [(1, "1 CPU thread"), (4, "4 CPU threads")])
def test_the_figure_states_the_number_of_threads_of_its_rows(threads, label, monkeypatch, tmp_path):
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    _module("table").draw([row | {"threads": threads} for row in _ROWS], tmp_path / "curves.svg")
    assert f">minutes used ({label})<" in (tmp_path / "curves.svg").read_text()


def test_the_table_of_methods_separates_image_sizes(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(_FOLDER)
    methods, file = _module("methods"), tmp_path / "methods.jsonl"
    run = {"method": "linear", "folder": "a", "epochs": 8, "seed": 0, "options": ""}
    append_rows(file, [{**run, "pixels": pixels, "accuracy": pixels / 1000} for pixels in (70, 98)])
    monkeypatch.setattr("sys.argv", ["methods.py", "--table", "--out", str(file)])
    methods.main()
    first, second = capsys.readouterr().out.split("8 epochs, 98 px")
    assert "8 epochs, 70 px" in first and "| linear | 7.0 |" in first and "| linear | 9.8 |" in second


def test_curves_without_a_shared_folder_are_an_error(tmp_path):
    with pytest.raises(SystemExit, match="no folder has rows for all products and budgets"):
        _module("table").draw([_row("snella", "a", 0.7), _row("other", "b", 0.7)], tmp_path / "curves.svg")


@pytest.mark.parametrize(("name", "reason"), [("fastia", "must be among fastai"), ("tabpfn", "downloads its weights")])
def test_unknown_product_is_rejected_before_creating_environments(name, reason, monkeypatch, tmp_path, capsys):
    module, created = _module("environments"), []
    monkeypatch.setattr(module, "make", lambda _, name: created.append(name))
    monkeypatch.setattr("sys.argv", ["environments.py", "--cache", str(tmp_path), "fastai", name])
    with pytest.raises(SystemExit):
        module.main()
    error = capsys.readouterr().err
    assert not created and repr(name) in error and reason in error


_HELD_OUT, _FRESH = ("furniture", "nebulae", "letters", "silhouettes"), ("drums", "worlds", "icons", "cards")
_UNSEEN, _DEVELOPMENT = (*_HELD_OUT, *_FRESH), ("stamps", "units", "textures", "emoji")


@pytest.mark.parametrize(
    ("order", "minutes"), [(_UNSEEN, 1), (_UNSEEN, 3), (_UNSEEN, 10), (_DEVELOPMENT, 3), (_DEVELOPMENT, 10)]
)
def test_tables_of_equal_time_in_the_notes_match_the_measurements(order, minutes):
    notes, same = _notes(), _current_rows(order, minutes)
    gap, text = _difference(same)
    for product, name in _NAMES.items():
        rows = [row for row in same if row["product"] == product]
        cells = [f"{100 * row['accuracy']:.1f} ({row['details']['epochs']})" for row in rows]
        last = f"{text}, p = {_p_text(gap.p)} |" if product == "snella" else "|"
        assert f"| {name} | {minutes} | {' | '.join(cells)} | {last}\n" in notes
        seconds = [row["seconds"] for row in rows]
        assert f"{min(seconds):.0f} to {max(seconds):.0f}" in " ".join(notes.split())


def _p_text(p: float) -> str:
    return f"{p:.2f}" if p >= 0.0095 else f"{p:.3f}"


@pytest.mark.parametrize(
    ("folders", "minutes", "name"),
    [
        (_UNSEEN, 1, "eight outside development"), (_UNSEEN, 3, "eight outside development"),
        (_UNSEEN, 10, "eight outside development"), (_FRESH, 10, "the last four of these"),
        ((*_UNSEEN, *_DEVELOPMENT), 3, "all twelve"), ((*_UNSEEN, *_DEVELOPMENT), 10, "all twelve"),
    ],
)  # fmt: skip
def test_summary_of_equal_time_in_the_notes_matches_the_measurements(folders, minutes, name):
    rows = _current_rows(folders, minutes)
    gap, text = _difference(rows)
    ours, theirs = rows[: len(folders)], rows[len(folders) :]
    better = sum(a["accuracy"] > b["accuracy"] for a, b in zip(ours, theirs, strict=True))
    cells = [
        f"{fmean(row[key] for row in ours):.2f} ({fmean(row[key] for row in theirs):.2f})" for key in ("nll", "ece")
    ]
    count = f"{better} of {len(folders)}"
    assert f"| {name} | {minutes} | {text}, p = {_p_text(gap.p)} | {count} | {' | '.join(cells)} |\n" in _notes()


def test_table_of_other_tools_in_ten_minutes_matches_the_measurements():
    rows = [row for row in read_rows(_FOLDER / "rows.jsonl") if row["date"] >= "2026-11-30T04:00"]
    rows = _module("table").last_runs([row for row in rows if row["minutes"] == 10 and row["pixels"] == 70])
    by_run = {(row["product"], row["folder"]): row for row in rows}
    table = _notes().partition("| test accuracy (seconds) |")[2].partition("\n\n")[0]
    folders = re.findall(r"\w+", table.splitlines()[0])
    names = {"transformers": "transformers", "timm": "timm", "autogluon": "AutoGluon", "lightly": "lightly-train"}
    for product, name in {**_NAMES, **names}.items():
        found = [by_run.get((product, folder)) for folder in folders]
        cells = ["–" if row is None else f"{100 * row['accuracy']:.1f} ({row['seconds']:.0f})" for row in found]
        assert f"| {name} | {' | '.join(cells)} |" in table


@pytest.mark.parametrize("minutes", [1, 3, 10])
def test_leads_in_the_readme_match_the_measurements(minutes):
    readme = " ".join((_FOLDER.parents[1] / "README.md").read_text().split())
    gap, _ = _difference(_current_rows(_UNSEEN, minutes))
    words = {1: "in one minute", 3: "in three", 10: "in ten"}
    mean, low, high = (decimal_text(100 * value, 1) for value in (gap.mean, gap.low, gap.high))
    assert f"{mean} points {words[minutes]} ({low} to {high})" in readme


def test_goals_in_the_notes_match_the_measurements():
    means, firsts = [], []
    for minutes in (1, 3, 10):
        rows = _current_rows(_UNSEEN, minutes)
        means.append(f"+{decimal_text(100 * _difference(rows)[0].mean, 1)}")
        pairs = [(rows[k], rows[len(_UNSEEN) + k]) for k in range(len(_UNSEEN))]
        firsts.append(sum(ours["accuracy"] > theirs["accuracy"] for ours, theirs in pairs))
        deficits = {ours["folder"]: theirs["accuracy"] - ours["accuracy"] for ours, theirs in pairs}
    worst = max(deficits, key=deficits.__getitem__)
    assert f"reached: {', '.join(means[:2])}, and {means[2]} points above fastai" in _notes()
    assert f"reached: first on {', '.join(map(str, firsts[:2]))}, and {firsts[2]} of the [eight folders" in _notes()
    assert f"reached: one test image ({100 * deficits[worst]:.1f} points) below fastai on `{worst}`" in _notes()
    assert round(deficits[worst] * 676) == 1  # `letters` has 676 test images


def test_head_tables_in_the_notes_match_the_measurements():
    folders, notes = _module("folders"), _notes()
    rows = read_rows(_FOLDER.parent / "final_head.jsonl")
    frozen = {row["folder"]: list(row["accuracy"].values()) for row in rows if len(row["accuracy"]) == 7}
    means = [
        [fmean(frozen[folder][part] for folder in group) for group in (folders.DEVELOPMENT, folders.HELD_OUT)]
        for part in range(7)
    ]
    table = notes.partition("| head | development | held-out |")[2].partition("\n\n")[0]
    shown = [line.split(" | ")[1:] for line in table.splitlines()[2:]]
    assert shown == [[f"{100 * development:.1f}", f"{100 * held_out:.1f} |"] for development, held_out in means]
    gaps = [accuracies[6] - accuracies[5] for accuracies in frozen.values()]
    assert f"{_gap_text(gaps)} (Student's t over twelve folders, p = 0.003) and at least" in " ".join(notes.split())
    assert min(gaps) >= 0
    trained = {row["folder"]: list(row["accuracy"].values()) for row in rows if row.get("method") == "snella"}
    order = ("emoji", "furniture", "nebulae", "stamps", "textures", "units")
    for part, name in enumerate(("linear head", "kernel head", "mixture")):
        values = [trained[folder][part] for folder in order]
        cells = [f"{100 * value:.1f}" for value in (*values, fmean(values))]
        assert f"| {name} on four layers | {' | '.join(cells)} |" in notes
    gaps = [trained[folder][2] - trained[folder][1] for folder in order]
    assert f"{_gap_text(gaps)}:" in " ".join(notes.split())


def _gap_text(gaps: list[float]) -> str:
    """Return the text of a mean difference from the kernel head with its interval, in points."""
    gap = difference_of([[value] for value in gaps])
    low, high = (decimal_text(100 * end, 1) for end in (gap.low, gap.high))
    return f"{100 * gap.mean:.1f} points better than the kernel head alone [{low}, {high}]"


def test_step_times_in_the_notes_match_the_measurements():
    notes = _notes()
    rows = {(r["backbone"], r["precision"], r["method"]): r for r in read_rows(_FOLDER.parent / "precision.jsonl")}
    for backbone, digits in (("vit_small_patch14_dinov2", 2), ("vit_base_patch16_224", 1)):
        cells = [
            ", ".join(f"{rows[backbone, precision, name]['step_s']:.{digits}f}" for name in ("lora", "full", "snella"))
            for precision in ("fp32", "bf16")
        ]
        assert f"px | {' | '.join(cells)} |" in notes


def test_table_of_other_methods_in_the_notes_matches_the_measurements():
    notes, others = _notes(), ("snella-matched", "dora-8", "adapter-8", "ssf")
    accuracies: dict[str, dict[str, float]] = {}
    for row in read_rows(_FOLDER / "methods.jsonl"):
        if row["seed"] == 0:
            accuracies.setdefault(row["method"], {})[row["folder"]] = row["accuracy"]
        assert row["method"] not in others or row["precision"] == "bf16"
    folders, methods = sorted(accuracies["snella"]), ("snella", *others)
    lines = [[folder, *(accuracies[method][folder] for method in methods)] for folder in folders]
    lines.append(["mean", *(fmean(accuracies[method].values()) for method in methods)])
    for name, *values in lines:
        assert f"| {name} | {' | '.join(decimal_text(100 * value, 1) for value in values)} |\n" in notes
    gaps = {
        method: difference_of([[accuracies[method][folder] - accuracies["snella"][folder]] for folder in folders])
        for method in others
    }
    assert f"| minus `snella` | – | {' | '.join(map(_interval, gaps.values()))} |\n" in notes
    assert not any(gap.direction for gap in with_holm(gaps).values())
    matched, snella = (decimal_text(100 * lines[-1][k], 1) for k in (2, 1))
    readme = " ".join((_FOLDER.parents[1] / "README.md").read_text().split())
    assert f"| {matched}* | 0.63 |" in readme and f"only seed 0, with which `snella` reaches {snella})" in readme


def test_text_on_training_on_validation_images_matches_the_measurements():
    text = " ".join(_notes().split())
    folders = ("emoji", "furniture", "nebulae", "stamps", "textures")
    runs = {
        (row["options"], row["folder"]): row
        for row in read_rows(_FOLDER / "methods_kernel_head.jsonl")
        if (row["epochs"], row["method"]) == (10, "snella")
    }
    pairs = [(runs["--protocol final", folder], runs["", folder]) for folder in folders]
    changes = [points_text(final["accuracy"] - standard["accuracy"]) for final, standard in pairs]
    assert f"and `{folders[-1]}` by {', '.join(changes[:-1])}, and {changes[-1]} points (seed 0" in text
    final, standard = (f"{fmean(row['nll'] for row in rows):.2f}" for rows in zip(*pairs, strict=True))
    assert f"the negative log-likelihood from {standard} to {final}," in text


def test_table_of_ten_epochs_in_the_notes_matches_the_measurements():
    notes, readme = _notes(), (_FOLDER.parents[1] / "README.md").read_text()
    accuracies: dict[str, dict[str, dict[int, float]]] = {}
    for row in read_rows(_FOLDER / "methods.jsonl"):
        accuracies.setdefault(row["method"], {}).setdefault(row["folder"], {})[row["seed"]] = row["accuracy"]
    fastai = read_rows(_FOLDER / "fixed_epochs.jsonl")
    accuracies["fastai"] = {row["folder"]: {0: row["accuracy"]} for row in fastai}
    methods = ("snella", "lora-8", "full", "linear", "fastai")
    folders = sorted(accuracies["snella"])
    means = {method: [fmean(accuracies[method][folder].values()) for folder in folders] for method in methods}
    for k, folder in enumerate(folders):
        seeds = [sorted(accuracies[method][folder]) for method in methods[:-1]]
        assert all(found in ([0, 1], [0, 1, 2]) and found == seeds[0] for found in seeds)
        cells = [decimal_text(100 * means[method][k], 1) for method in methods]
        assert f"| {folder} | {len(seeds[0])} | {' | '.join(cells)} |\n" in notes
    shown = [decimal_text(100 * fmean(means[method]), 1) for method in methods]
    assert f"| mean | | {' | '.join(shown)} |\n" in notes
    for method, mean in zip(methods[:-1], shown, strict=False):
        assert re.search(rf"^\| `{method}`.*\| {mean} \|", readme, re.MULTILINE)
    gaps = {}
    for method in methods[1:]:
        values = [(accuracies[method][folder], accuracies["snella"][folder]) for folder in folders]
        gaps[method] = difference_of([[theirs[seed] - ours[seed] for seed in theirs] for theirs, ours in values])
    assert f"| minus `snella` | | – | {' | '.join(map(_interval, gaps.values()))} |\n" in notes
    for method in ("linear", "fastai"):
        gap = gaps[method]
        mean, low, high = (f"{100 * -value:.1f}" for value in (gap.mean, gap.high, gap.low))
        assert f"{mean} points [{low}, {high}]" in " ".join(notes.split())
        assert f"{mean} points" in readme and f"{low} to {high})" in " ".join(readme.split())
    corrected = with_holm({method: gaps[method] for method in methods[1:-1]})
    assert [corrected[method].direction for method in methods[1:-1]] == [0, 0, -1]
    assert gaps["fastai"].p < 1e-4 and "p < 0.0001; seed 0" in notes
    lead = difference_of([[accuracies["linear"][folder][0] - accuracies["fastai"][folder][0]] for folder in folders])
    values = [decimal_text(100 * value, 1) for value in (lead.mean, lead.low, lead.high)]
    assert "{} points [{}, {}] better than fastai (seed 0)".format(*values) in " ".join(notes.split())
    added = sorted(
        ((ours - probe, folder) for ours, probe, folder in zip(means["snella"], means["linear"], folders, strict=True)),
        reverse=True,
    )
    large = ", ".join(f"{decimal_text(100 * value, 1)} on `{folder}`" for value, folder in added[:7])
    low, high = (decimal_text(100 * added[k][0], 1) for k in (-1, 7))
    sentence = f": {large}, and between {low} and {high} on the others (computed from unrounded accuracies)."
    assert sentence in " ".join(notes.split())


def _interval(gap: Difference) -> str:
    return f"{points_text(gap.mean)} [{points_text(gap.low)}, {points_text(gap.high)}]"


def _one_minute_rows(pixels: int = 70) -> dict[tuple[str, str], dict]:
    """Return the first rows of each product and folder with one minute, i.e. with the oldest recipe."""
    rows = [row for row in read_rows(_FOLDER / "rows.jsonl") if row["date"] < "2026-11-29" and row["minutes"] == 1]
    rows = [row for row in rows if row["pixels"] == pixels and row["seed"] == 0]
    return {(row["product"], row["folder"]): row for row in rows}


def test_tables_of_one_minute_in_the_notes_match_the_measurements():
    notes, rows = _notes(), _one_minute_rows()
    held_out = _module("folders").HELD_OUT
    table = notes.partition("| folder | train · val |")[2].partition("\n\n")[0]
    folders = re.findall(r"^\| \*?([a-z-]+)\*? \| [\d,]+ · ", table, re.MULTILINE)
    assert {folder for product, folder in rows if product == "snella"} == set(folders)
    for folder in folders:
        name = f"*{folder}*" if folder in held_out else folder
        found = [rows.get((product, folder)) for product in ("snella", "sklearn", "fastai")]
        cells = ["–" if row is None else decimal_text(100 * row["accuracy"], 1) for row in found]
        images = rows["snella", folder]["images"]
        assert f"| {name} | {images['train']:,} · {images['val']:,} | {' | '.join(cells)} |\n" in f"|{table}\n"
    others = {
        "sklearn": "logistic regression (scikit-learn)", "fastai": "fastai's `fine_tune`", "timm": "timm's",
        "transformers": "transformers' `run", "autogluon": "AutoGluon", "lightly": "lightly-train's",
    }  # fmt: skip
    for product, name in others.items():
        line = next(line for line in notes.splitlines() if line.startswith(f"| {name}") and "folders" in line)
        cells = []
        for group in (folders, held_out):
            shared = [folder for folder in group if (product, folder) in rows]
            gaps = [[rows[product, folder]["accuracy"] - rows["snella", folder]["accuracy"]] for folder in shared]
            cells.append(f"{_interval(difference_of(gaps))}, {len(shared)} folders" if len(gaps) > 1 else "–")
            assert all(gap < 0 for (gap,) in gaps)
        assert line.endswith(f" | {' | '.join(cells)} |")
    products = ("snella", "sklearn", "fastai")
    errors = [f"{fmean(row['ece'] for (found, _), row in rows.items() if found == name):.2f}" for name in products]
    assert f"| calibration error, mean over each tool's folders | {' | '.join(errors)} |" in notes
    seconds = {name: [row["seconds"] for (found, _), row in rows.items() if found == name] for name in products}
    spans = [f"{min(values):.0f} to {max(values):.0f}" for values in seconds.values()]
    spans[0] += f", mean {fmean(seconds['snella']):.0f}"
    assert f"| seconds on the Xeon (budget 60 s) | {' | '.join(spans)} |" in notes


def test_table_of_another_backbone_in_the_notes_matches_the_measurements():
    notes = _notes()
    rows = [row for row in read_rows(_FOLDER / "rows.jsonl") if (row["pixels"], row["minutes"]) == (112, 1)]
    by_run = {(row["product"], row["folder"]): row for row in _module("table").last_runs(rows)}
    folders = ("emoji", "furniture", "nebulae", "stamps", "textures", "units")
    names = {"snella": "`snella train` (epochs)", "fastai-all": "fastai, training and validation images (epochs)"}
    for product, name in names.items():
        found = [by_run.get((product, folder)) for folder in folders]
        cells = ["–" if row is None else f"{100 * row['accuracy']:.1f} ({row['details']['epochs']})" for row in found]
        assert f"| {name} | {' | '.join(cells)} |" in notes
    shared = [folder for folder in folders if ("fastai-all", folder) in by_run]
    gap = difference_of(
        [[by_run["snella", folder]["accuracy"] - by_run["fastai-all", folder]["accuracy"]] for folder in shared]
    )
    mean, low, high = (decimal_text(100 * value, 1) for value in (gap.mean, gap.low, gap.high))
    assert f"`snella train` is {mean} points [{low}, {high}] above fastai in one minute" in " ".join(notes.split())


def test_text_on_image_sizes_and_precision_in_the_notes_matches_the_measurements():
    notes = _notes()
    own = {row["folder"]: row for row in read_rows(_FOLDER / "rows.jsonl") if row["product"] == "snella-own-size"}
    text = " ".join(notes.split())
    for folder, sentence in {
        "stamps": "on `stamps`, it fits the head at {size} px and reaches {accuracy:.1f}% in {seconds:.0f} s.",
        "units": "On `units`, it selects {size} px and reaches {accuracy:.1f}% in {seconds:.0f} s.",
    }.items():
        size, accuracy = own[folder]["details"]["img_size"], 100 * own[folder]["accuracy"]
        assert sentence.format(size=size, accuracy=accuracy, seconds=own[folder]["seconds"]) in text
    heads = [row for row in read_rows(_FOLDER.parent / "final_head.jsonl") if "method" not in row]
    last = {(row["folder"], row["pixels"]): row for row in heads if row["precision"] == "fp32"}
    for folder in ("stamps", "emoji"):
        found = [last.get((folder, pixels)) for pixels in (70, 126, 182)]
        cells = ["–" if row is None else f"{100 * row['accuracy']['and three more layers']:.1f}" for row in found]
        assert f"| {folder} | {' | '.join(cells)} |\n" in notes
    linear = [row for row in heads if len(row["accuracy"]) == 5]
    by_size = {(row["folder"], row["pixels"]): row for row in linear if row["precision"] == "fp32"}
    reduced = {row["folder"]: row for row in linear if row["precision"] == "bf16"}
    pairs = [
        [row["accuracy"]["and three more layers"] for row in (reduced[folder], by_size[folder, 70])]
        for folder in reduced
    ]
    gap = difference_of([[low - high] for low, high in pairs])
    means = [100 * fmean(values) for values in zip(*pairs, strict=True)]
    expected = (
        f"Linear heads on six folders reach {means[0]:.1f} with bfloat16 features and {means[1]:.1f} with float32"
    )
    assert expected in text and f"features ({_interval(gap)}, earlier rows of" in text
