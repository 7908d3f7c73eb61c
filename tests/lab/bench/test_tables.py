"""Documents match the committed rows: generated tables, numbers in the text, and experiment files of the twins."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from peft import get_peft_model

from snella import SnellaConfig
from snella_app.data.datasets import ImageDataset
from snella_app.data.sources import ArrayImages
from snella_lab.bench.rows import read_rows
from snella_lab.comparison.experiment import Experiment
from snella_lab.comparison.experiment_files import read_experiment
from snella_lab.comparison.options import ExecutionConfig
from snella_lab.comparison.statistics import FinalRuns, with_holm

ROOT = Path(__file__).parents[3]
METRIC = "test_accuracy"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


@pytest.fixture(scope="module")
def suite():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        from suite_table import UNTUNED, defaults_rows, leads, read_suite
        from twin_tables import read_cells

        experiment, rows = read_suite()
        names, tasks = [m.name for m in experiment.methods], [d.name for d in experiment.data]
        fewer = [task for task in tasks if task != "mri-regions"]
        untuned = FinalRuns(defaults_rows(rows, read_cells(UNTUNED)))
        return {
            "all": {leader: leads(rows, leader, names, tasks) for leader in ("snella-matched-8", "snella-8")},
            "without": {leader: leads(rows, leader, names, fewer) for leader in ("snella-matched-8", "snella-8")},
            "defaults": with_holm(
                {name: untuned.difference(name, "lora-8", tasks, METRIC) for name in ("snella-8", "snella-matched-8")}
            ),
        }


def page(name):
    return " ".join((ROOT / name).read_text().replace("\N{MINUS SIGN}", "-").split())


def test_generated_tables_match_the_committed_rows(tmp_path):
    from selective_checkpointing import PAGE as MEMORY_PAGE
    from selective_checkpointing import update_page
    from step_tables import update_document
    from suite_table import PAGE, update_suite, update_twins

    rows = ROOT / "benchmarks" / "results.jsonl"
    steps = ROOT / "docs" / "notes" / "step-time.md"
    scripts = [(PAGE, update_suite), (PAGE, update_twins), (MEMORY_PAGE, update_page)]
    for path, update in (*scripts, (steps, lambda copy: update_document(copy, rows))):
        copy = shutil.copy(path, tmp_path)
        assert not update(Path(copy)), f"{path.name} differs from its rows; run: python benchmarks/readme.py"


@pytest.mark.parametrize(
    ("script", "name"),
    [
        ("interval_calibration", "notes/comparisons.md"),
        ("many_devices", "notes/checks.md"),
        ("budgets_by_task", "notes/paper.md"),
        ("kernel_gradients", "notes/paper.md"),
        ("step_breakdown", "notes/step-time.md"),
        ("exports", "notes/checks.md"),
        ("quantized_merge", "notes/checks.md"),
        ("generator_scaling", "notes/checks.md"),
    ],
)
def test_tables_that_scripts_print_match_the_committed_rows(script, name):
    module = pytest.importorskip(script)
    assert module.table(read_rows(module.ROWS)) in (ROOT / "docs" / name).read_text()


def test_fault_table_matches_its_last_row():
    counts = {name: Counter(c) for name, c in read_rows(ROOT / "benchmarks" / "faults.jsonl")[-1]["counts"].items()}
    for results in counts.values():
        results["trials"] = results.total()
    counts["finished"]["trials"] //= 5  # commands
    counts["torchruns"]["rejected with process id"] = counts["torchruns"]["one succeeded"]
    disk = "{0[one line]} one-line errors, {0[no effect]} stayed within the limit; {0[same bits]} bit-identical"
    overwritten = "{0[new run started]} new runs, {0[old run resumed]} old runs |"
    together = "{0[rejected with process id]} rejected, {0[sequential]} started after the first had ended"
    failures = ("traceback", "no path", "not resumed", "needs overwrite", "other results", "executed")
    assert not any(results[name] for results in counts.values() for name in failures)
    rows = [
        ("{0[trials]} | {0[same bits]} bit-identical", "killed"),
        ("{0[same bits]} | " + disk, "disk full"),
        ("{0[same bits]} | " + disk, "small disk"),
        ("{0[same bits]} | {0[one line]} one-line errors; {0[same bits]} bit-identical", "inodes"),
        ("{0[trials]} | {0[same bits]} bit-identical", "folds", "features"),
        ("{0[trials]} | " + overwritten, "overwritten"),
        ("{0[trials]} | {0[noticed]} commands rejected, {0[harmless]} unaffected", "finished"),
        ("{0[trials]} | {0[noticed]} rejected, {0[harmless]} bit-identical", "checkpoint"),
        ("{0[trials]} | {0[one line]} one-line errors, {0[accepted]} accepted", "fuzzed"),
        ("{0[trials]} | " + together, "together", "torchruns"),
        ("{0[trials]} | {0[complete after retry]} complete", "merged"),
        ("{0[trials]} | {0[one line with path]} one-line errors, all with a path", "limits"),
        ("{0[trials]} | {0[one line]} one-line errors, {0[harmless]} unaffected", "exchanged", "forged"),
        ("{0[trials]} | all rejected, bounded or shown as text", "objects", "bombs", "requests", "markup"),
    ]
    table = (ROOT / "docs" / "notes" / "checks.md").read_text().partition("| event | trials | outcome |")[2]
    lines = table.partition("\n\n")[0].splitlines()[2:]
    for line, (expected, *groups) in zip(lines, rows, strict=True):
        results = sum((counts[group] for group in groups), Counter())
        assert line.partition(" | ")[2].startswith(expected.format(results)), line


def test_dice_table_matches_its_rows():
    text = (ROOT / "docs" / "tasks.md").read_text()
    for row in read_rows(ROOT / "experiments" / "mri" / "results.jsonl"):
        method = row["command"].split("--method ")[1].split()[0]
        scores = [f"{value:.3f}" for value in (row["test"]["dice"], row["test"]["iou"], row["val"]["dice"])]
        assert f"| `{method}` | {' | '.join(scores)} | {row['trainable_parameters'] / 1e6:.2f} M |" in text


def test_memory_page_states_the_outcome_of_its_rows():
    from selective_checkpointing import ROWS, SETTINGS

    rows = {(row["title"], row["variant"]): row for row in read_rows(ROWS) if "kept_over_lora" in row}
    selective = [rows[title, "selective-linear"] for title in SETTINGS]
    assert all(row["gradients_same_bits"] for row in selective)
    assert all(
        row["kept_over_lora"] < rows[title, "snella"]["kept_over_lora"] + 0.03
        for title, row in zip(SETTINGS, selective, strict=True)
    )
    slower = [100 * (row["step_over_snella"] - 1) for row in selective]
    assert f"takes {min(slower):.0f} to {max(slower):.0f}% longer" in page("src/snella/memory/README.md")


def test_pages_match_the_suite(suite):
    guide, notes = page("docs/compare.md"), page("docs/notes/comparisons.md")
    matched, without = suite["all"]["snella-matched-8"], suite["without"]["snella-matched-8"]
    lead, fewer, default = matched["lora-8"], without["lora-8"], suite["defaults"]["snella-8"]
    assert f"by {100 * lead.mean:.1f} points (95% interval {100 * lead.low:.1f} to +{100 * lead.high:.1f})" in guide
    assert lead.above == 6 and lead.mean > 2 * fewer.mean * 5 / 6
    assert f"by {100 * fewer.mean:.1f} ({100 * fewer.low:.1f} to {100 * fewer.high:.1f})" in notes
    assert not any(result.direction for leader in suite["all"].values() for result in leader.values())
    assert f"SNELLA is {100 * default.mean:.1f} points above LoRA, but this difference is not significant" in notes
    assert default.direction == 0


def test_comparisons_page_lists_the_significant_differences(suite):
    compare = page("docs/notes/comparisons.md")
    smallest = min(result.adjusted_p for leader in suite["all"].values() for result in leader.values())
    assert f"the smallest p over all datasets is {smallest:.2f}." in compare
    significant = [(leader, name) for leader, row in suite["without"].items() for name, d in row.items() if d.direction]
    assert significant == [("snella-matched-8", "bias"), ("snella-8", "bias")]
    assert "the only significant leads are those of the two SNELLA variants over `bias` (BitFit)" in compare


def test_claims_match_the_suite_and_the_twins(suite):
    from twin_tables import COMMITTED, read_cells

    from snella_lab.comparison.report import paper_orderings

    paper, snella = page("docs/notes/paper.md"), suite["all"]["snella-8"]
    for name in ("lora-8", "ssf", "snell-8", "dora-8"):
        result = snella[name]
        assert f"+{100 * result.mean:.1f} over" in paper and f"({_interval(result)})" in paper, name
    complete = paper_orderings(read_experiment("twin-table9"), read_cells(COMMITTED))
    results = {result.claim: result.difference for result in complete}
    for higher, lower in (("within-layers", "klora-8"), ("snella-8", "within-layers")):
        result = results[f"{higher}-scaling-1 above {lower}-scaling-1"]
        assert f"{100 * result.mean:+.1f} ({_interval(result)})" in paper, higher
    kernels = read_experiment("twin-table7")
    assert all(result.difference.adjusted_p > 0.05 for result in paper_orderings(kernels, read_cells(COMMITTED)))
    dense = paper_orderings(read_experiment("twin-table8"), read_cells(COMMITTED))
    assert f"(p = {min(result.difference.adjusted_p for result in dense):.2f} after correction)" in page(
        "docs/notes/comparisons.md"
    )
    runs, tasks = FinalRuns(read_cells(COMMITTED)), [entry.name for entry in kernels.data]
    texts = []
    for pair in (("snella-linear", "klora-linear"), ("snella-p_linear", "klora-p_linear"), ("snella-8", "klora-8")):
        result = runs.difference(*(f"{name}-scaling-1" for name in pair), tasks, "test_accuracy")
        texts.append(f"{100 * result.mean:+.1f} ({_interval(result)})")
    for pair in (("snella-8", "snella-p_linear"), ("klora-8", "klora-p_linear")):
        result = runs.difference(*(f"{name}-scaling-1" for name in pair), tasks, "test_accuracy")
        texts.append(f"{100 * result.mean:.1f} ({_interval(result)})")
    sentence = "sparsity with linear {}, P-Linear {}, Mix-K {}; Mix-K minus P-Linear {} with sparsity, {} without |"
    assert sentence.format(*texts) in paper
    schedules = read_experiment("twin-table12")
    results = paper_orderings(schedules, read_cells(COMMITTED))
    assert all(result.difference.adjusted_p > 0.9 for result in results)
    texts = []
    for name in ("constant", "linear", "quadratic"):
        result = runs.difference("snella-8-scaling-1", f"{name}-scaling-1", tasks, "test_accuracy")
        texts.append(f"minus {name} {100 * result.mean:.1f} ({_interval(result)})")
    assert f"twin, scaling 1: cubic {', '.join(texts)} |" in paper
    texts = []
    for budget in ("0.99", "0.10", "0.90"):
        result = runs.difference("snella-8-scaling-1", f"budget-{budget}-scaling-1", tasks, "test_accuracy")
        texts.append(f"minus {budget} {100 * result.mean:.1f} ({_interval(result)})")
    assert f"twin, scaling 1: 0.30 {', '.join(texts)} |" in paper


def _interval(result):
    return f"{100 * result.low:.1f} to +{100 * result.high:.1f}"


def test_best_snella_ranks_first_on_twelve_of_the_nineteen_tasks():
    values = read_experiment("table1-vtab").published["values"]
    tasks = [entry.name for entry in read_experiment("table1-vtab").data]
    snella_best = [max(row[task] for name, row in values.items() if name.startswith("snella")) for task in tasks]
    best_other = [max(row[task] for name, row in values.items() if not name.startswith("snella")) for task in tasks]
    highest = sum(best_snella >= other for best_snella, other in zip(snella_best, best_other, strict=True))
    assert (len(tasks), highest) == (19, 12)
    assert "the best SNELLA ranks first or ties on 12" in page("docs/notes/paper.md")


def test_tuning_page_matches_the_rows_at_three_times_the_learning_rate():
    accuracies = {}
    for line in (ROOT / "benchmarks" / "learning_rates.jsonl").read_text().splitlines():
        row = json.loads(line)
        is_changed = any(row.get(name) for name in ("options", "factor_scale", "seed")) or "kept" not in row
        if row["blocks"] == 12 and not is_changed and row["settings"] in ({}, {"epochs": 3}):
            key = row["method"], row["steps"], row["task"], row["lr_factor"]
            accuracies[key] = row["kept"]["raw"]["accuracy"]

    def changes(method, steps):
        tasks = [task for name, count, task, factor in accuracies if (name, count, factor) == (method, steps, 3.0)]
        assert len(tasks) == 4
        pairs = ([accuracies[method, steps, task, factor] for factor in (1.0, 3.0)] for task in tasks)
        return sorted(100 * (after - before) for before, after in pairs)

    text = page("docs/training.md")
    assert f"`snella` lost up to {-changes('snella-8', 24)[0]:.0f} points in 24-step runs" in text
    assert f"`snella-matched` up to {-changes('snella-matched-8', 80)[0]:.0f} points in 80-step runs" in text


TWINS = (7, 8, 9, 10, 11, 12)


def test_twins_have_six_tasks_five_seeds_tuned_learning_rates_and_both_scalings():
    entries = set()
    for number in TWINS:
        experiment = read_experiment(f"twin-table{number}")
        assert (len(experiment.data), experiment.seeds) == (6, 5) and experiment.grid.lr_factors == (0.1, 0.3, 1.0, 3.0)
        assert experiment.settings.get("protocol", "standard") == "standard"
        names = [m.name for m in experiment.methods]
        plain = [name for name in names if not name.endswith("-scaling-1")]
        assert sorted(names) == sorted([*plain, *(f"{name}-scaling-1" for name in plain)])
        for method in experiment.methods:
            default = 1.0 if method.method.startswith("klora") else 10.0
            assert method.settings.get("scaling", default) == (1.0 if method.name.endswith("-scaling-1") else 10.0)
            assert "lr" not in method.settings
        entries |= {(m.name, str(m.options), str(m.settings)) for m in experiment.methods}
        claims = [(c["higher"], c["lower"]) for c in experiment.published["orderings"]]
        half = claims[: len(claims) // 2]
        assert claims[len(half) :] == [(f"{a}-scaling-1", f"{b}-scaling-1") for a, b in half]
    assert len(entries) == len({name for name, *_ in entries}) == 48, "methods in a shared folder need unique names"
    trainings = [48 * 6 * (5 + tuning_runs - 1) for tuning_runs in (4, 6)]
    assert f"{trainings[0]:,} to {trainings[1]:,} training runs" in page("docs/notes/comparisons.md")


def test_cached_frozen_blocks_give_the_same_outputs_and_gradients():
    from train_twins import FrozenBlocks

    torch.manual_seed(0)
    images = torch.randn(3, 3, 160, 160)
    config = SnellaConfig(r=4, target_sparsity=0.5, init_sparsity=0.5, exclude_modules=r"blocks\.[0-3]\..*")
    model = get_peft_model(timm.create_model("test_vit", num_classes=3), config)
    base, cache = model.get_base_model(), FrozenBlocks(4)
    for batch in (images[:2], images):  # the first two images are known in the second batch
        features = [base.forward_features(batch), cache.forward_features(base, batch)]
        torch.testing.assert_close(*features)
        factor = base.blocks[4].mlp.fc1.snella_A["default"]
        gradients = [torch.autograd.grad(tokens.square().sum(), factor) for tokens in features]
        torch.testing.assert_close(*gradients)
    with pytest.raises(ValueError, match="must not adapt the first 5 blocks"):
        FrozenBlocks(5).forward_features(base, images)


def test_resized_images_are_transformed_once_per_transform():
    from train_twins import ResizedImages

    pixels = np.full((3, 8, 8, 3), 10, dtype=np.uint8)
    pixels[2] = 90
    calls = []

    class Scale:
        def __init__(self, factor):
            self.factor = factor

        def __repr__(self):
            return f"Scale({self.factor})"

        def __call__(self, image):
            calls.append(image)
            return torch.tensor(image.getpixel((0, 0))[0] * self.factor)

    data = ImageDataset(ArrayImages(pixels), [0, 1, 2], [0, 0, 1], ["a", "copy", "b"])
    cache = ResizedImages()
    for factor in (1, 2):
        scaled = data.with_transform(Scale(factor))
        items = [cache.item(scaled, index) for index in (0, 1, 2, 0)]
        first, last = (10 * factor, 0), (90 * factor, 1)
        assert [(int(image), label) for image, label in items] == [first, first, last, first]
    assert len(calls) == 4, "two different images with two transforms"


def test_twin_tables_of_a_tiny_run_cover_all_tables(tmp_path):
    """Use one of the six files, a few images and random weights."""
    from twin_tables import read_cells, twin_tables

    from snella_lab.comparison.compare import compare

    with pytest.raises(FileNotFoundError, match=r"contains no results\.jsonl; run `snella compare --out .*` or `make"):
        read_cells(tmp_path / "results.jsonl")
    overrides = {"methods": ["klora-8", "within-layers-scaling-1", "klora-8-scaling-1"], "data": ["digits"], "seeds": 1}
    values = read_experiment("twin-table9", overrides).as_dict()
    values["data"] = [{"data": "digits", "group": "glyphs"}]
    values["grid"] = {"lr_factors": [1.0], "weight_decays": [], "max_extensions": 0}
    for method in values["methods"]:
        method["options"] = {k: v for k, v in method["options"].items() if k != "exclude_modules"}
    values["backbone"] = "test_vit"
    sizes = {"train_size": 20, "val_size": 20, "test_size": 20, "epochs": 1, "batch_size": 10, "img_size": 32}
    values["train"] = {**values["train"], **sizes, "pretrained": False, "device": "cpu"}
    compare(Experiment.from_dict(values), tmp_path / "twins", ExecutionConfig(workers=0))
    rows = read_cells(tmp_path / "twins" / "results.jsonl")
    assert {row.experiment_name for row in rows if row.status == "success"} == set(overrides["methods"])
    tables = twin_tables(rows)
    assert [f"**Table {name}**" in tables for name in ("VII", "VIII", "IX", "X", "XI", "XII")] == [True] * 6
    assert "| within-layers-scaling-1 above klora-8-scaling-1 | inconclusive |" in tables
    assert "| linear above constant | not run | – |" in tables
