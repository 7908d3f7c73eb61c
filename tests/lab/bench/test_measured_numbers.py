"""Measured times, bytes and errors in README.md and docs/ match the committed rows."""

from collections import defaultdict
from statistics import fmean

import numpy as np
import pytest

from snella_app.report.allocation import linear_trend
from snella_app.text import count_text, decimal_text
from snella_lab.bench.rows import is_step_time
from snella_lab.comparison.statistics import difference_of

from .pages import (
    CHECKS,
    COSTS,
    GENERATION,
    LIBRARY,
    PAPER,
    PLOTS,
    README,
    ROOT,
    SPEED,
    STEPS,
    USING,
    assert_states,
    rows,
    span,
    table,
)

SMALL, VIT_B, VIT_L = "vit_small_patch14_dinov2", "vit_base_patch16_224", "vit_large_patch16_224"
VIT_H, SWIN = "vit_huge_patch14_224", "swin_base_patch4_window7_224"
OPTIONS = ["snella", "snella-bf16-gradient", "snella-sample", "snella-compress", "snella-compress-sample"]


def vit_b_runs(batch):
    """Return the rows of ViT-B/16 by method for each run in the notes, i.e. without a later run of all its methods."""
    found = {}
    for row in filter(is_step_time, rows("results")):
        if (row["backbone"], row["batch"], row["sparsity"]) == (VIT_B, batch, 0.7):
            found.setdefault(row["date"], {})[row["method"]] = row
    runs = list(found.values())
    return [run for k, run in enumerate(runs) if not any(run.keys() <= later.keys() for later in runs[k + 1 :])]


def complete_run(batch):
    return max(vit_b_runs(batch), key=len)


def model_runs():
    """Return the newest rows of `model_rows.py` by method for each setting."""
    runs = {}
    for row in rows("model_rows"):
        if row["benchmark"] == "model_rows" and row["frozen"] == "float32":
            setting = (row["model"], row["batch"], row["r"], row.get("autocast", False), row.get("fused", False))
            runs.setdefault(setting, {})[row["method"]] = row
    return runs


def memory_ranges():
    """Format the ranges of the bytes relative to LoRA over all models, by default and with 8-bit activations."""
    runs = model_runs().values()
    return [span([run[name]["kept_over_lora"] for run in runs], 2) for name in ("snella", "snella-compress")]


def small_ratios():
    """Return the step time of SNELLA relative to LoRA at 42 px on the EPYC, and those on the Xeon."""
    xeon = [row["step_over_lora"] for row in rows("model_rows") if row.get("state") == "after"]
    return model_runs()[SMALL, 16, 8, False, False]["snella"]["step_over_lora"], xeon


def memory_text(run, method):
    return f"{run[method]['saved_mib'] / run['lora']['saved_mib']:.2f}"


def time_text(run, method):
    return f"{run[method]['step_over_lora']:.2f}"


def test_readme_matches_the_measured_rows():
    run = complete_run(16)
    default, rounded, compressed, full = (
        [memory_text(run, name), time_text(run, name)]
        for name in ("snella", "snella-bf16-gradient", "snella-compress", "full")
    )
    shown = [cells[-2:] for cells in table(README, "| method | use it for")]
    assert shown == [default, [default[0], ""], rounded, compressed, ["1", "1"], full, ["", ""]]
    epyc, xeon = small_ratios()
    sentence = "For a ViT-S at 42 px, a SNELLA step takes {} times as long as a LoRA step."
    assert_states(README, sentence, span([epyc, *xeon], 1))


def test_table_of_the_speed_page_matches_the_measured_rows():
    runs = [complete_run(batch) for batch in (4, 16)]
    lora, *others = table(SPEED, "| | step time, batch 4")
    saved = " and ".join(f"{run['lora']['saved_mib']:,.0f}" for run in runs)
    assert lora == [*(f"{run['lora']['step_s']:.2f} s" for run in runs), f"{saved} MiB"]
    methods = ["full", *OPTIONS[:3], "snella-sample-quarter", *OPTIONS[3:]]
    for cells, method in zip(others, methods, strict=True):
        (memory,) = {memory_text(run, method) for run in runs}
        assert cells == [*(time_text(run, method) for run in runs), memory], method


def test_text_of_the_speed_page_matches_the_measured_rows():
    small, large = ([run["snella"]["step_over_lora"] for run in vit_b_runs(batch)] for batch in (4, 16))
    saved = [memory_text(complete_run(16), name) for name in ("snella", "snella-compress")]
    assert_states(SPEED, "SNELLA stores {} times as many bytes for the backward pass as PEFT's LoRA", saved[0])
    assert_states(SPEED, "reduce SNELLA's stored bytes to {} times those of LoRA", saved[1])
    sentence = "{} times as long as a LoRA step at batch size 16, and {} times as long at batch size 4."
    assert_states(SPEED, sentence, span(large, 1), span(small, 1))
    runs = model_runs()
    seconds = {(r["method"], r["precision"]): r["step_s"] for r in rows("precision") if r["backbone"] == VIT_B}
    faster = seconds["snella", "bf16"] / seconds["snella", "fp32"]
    two_threads = seconds["snella", "bf16"] / seconds["lora", "bf16"]
    one_thread = runs[VIT_B, 16, 8, True, False]["snella"]["step_over_lora"]
    sentence = "takes {:.2f} times as long as in float32, and {} times as long as a LoRA step in bfloat16"
    assert_states(SPEED, sentence, faster, span([two_threads, one_thread], 1))
    sentence = "SNELLA stores {} times as many bytes for the backward pass as LoRA, or {} times as many with 8-bit"
    assert_states(SPEED, sentence, *memory_ranges())
    larger = [run["snella"]["step_over_lora"] for key, run in runs.items() if key[0] not in (SMALL, "llama")]
    sentence = "A SNELLA step takes {} times as long as a LoRA step for ViT-B/16 and larger models"
    assert_states(SPEED, sentence, span([*larger, *small, *large], 1))
    epyc, xeon = small_ratios()
    assert_states(SPEED, "this ratio is {:.1f} on an AMD EPYC and {} on an Intel Xeon under load", epyc, span(xeon, 1))
    predicted = table(COSTS, "| predicted ratio | H100 SXM | H200")
    by_batch = [span([float(cell.split()[0]) for cells in predicted[k::2] for cell in cells], 1) for k in (1, 0)]
    sentence = "predicted to take {} times as long as a LoRA step at batch size 128, and {} times"
    for page in (SPEED, COSTS):
        assert_states(page, sentence, *by_batch)


def test_text_of_the_notes_on_step_time_matches_the_measured_rows():
    def gaps(batch, method):
        return span([r[method]["step_s"] - r["lora"]["step_s"] for r in vit_b_runs(batch) if method in r], 1)

    sentence = "full fine-tuning takes {} s longer than LoRA, and SNELLA takes {} s longer."
    assert_states(STEPS, sentence, gaps(16, "full"), gaps(16, "snella"))
    sentence = "full fine-tuning takes {} s longer, and SNELLA takes {} s longer."
    assert_states(STEPS, sentence, gaps(4, "full"), gaps(4, "snella"))
    newest = {row["benchmark"]: row for row in rows("results")}
    competition, threshold = newest["competition"], newest["threshold_prediction"]
    share, importance = competition["competition_over_step"], competition["importance_s"] / competition["step_s"]
    sentence = "takes {:.1%} of a ViT-B/16 step at batch size 4. Without the selection, it takes {:.1%}."
    assert_states(STEPS, sentence, share, importance)
    assert_states(PAPER, "competition takes {:.1%} of a ViT-B/16 step at batch size 4", share)
    assert_states(STEPS, "by {:.0%} (row `thread_runtimes`)", newest["thread_runtimes"]["own_over_openmp"] - 1)
    sentence = "finds {:.0%} of the thresholds, saves {:.1%} of a ViT-B/16 step"
    assert_states(STEPS, sentence, threshold["found_where_expected"], threshold["off_over_on"] - 1)
    sentence = "SNELLA's memory ratio is {} for the models in the table, and {} with 8-bit activations."
    assert_states(STEPS, sentence, *memory_ranges())
    kept = memory_text(complete_run(4), "snella-keep-inputs")
    assert_states(STEPS, "With `recompute_inputs=False`, it is {} for ViT-B/16.", kept)
    assert_states(STEPS, "the ratio is {} (`suite_step` rows with", span(small_ratios()[1], 1))
    cached, default = (model_runs()[SMALL, 16, 8, False, False][name] for name in ("snella-keep-delta", "snella"))
    assert cached["step_over_lora"] > default["step_over_lora"]
    assert_states(STEPS, "not faster, stores {:.0f} MiB instead of {:.0f}", cached["kept_mib"], default["kept_mib"])


def test_table_of_other_models_matches_the_measured_rows():
    settings = [
        (SMALL, 16, 8, False, False), (VIT_B, 4, 8, False, False), (VIT_B, 4, 32, False, False),
        (VIT_B, 16, 8, False, False), (VIT_B, 16, 8, True, False), (VIT_L, 4, 8, False, False),
        (VIT_H, 4, 8, False, False), (SWIN, 4, 8, False, False), (SWIN, 4, 8, False, True),
        ("convnext_base", 4, 8, False, False), ("llama", 1, 8, False, False),
    ]  # fmt: skip
    columns = ["full", *OPTIONS]
    for cells, setting in zip(table(STEPS, "| | lora | full | snella | bfloat16"), settings, strict=True):
        run = model_runs()[setting]
        expected = [f"{run['lora']['kept_mib']:,.0f} MiB", *(f"{run[name]['kept_over_lora']:.2f}" for name in columns)]
        if "step_s" in run["lora"]:
            times = [f"{run['lora']['step_s']:.3g} s", *(time_text(run, name) for name in columns)]
            expected = [", ".join(pair) for pair in zip(expected, times, strict=True)]
        assert cells == expected, setting


def test_errors_of_weight_gradients_match_the_measured_rows():
    newest = {(row["data"], row["img_size"]): row for row in rows("weight_gradients")}
    digits = {"sample:1/2": 2, "sample:1/4": 2, "sample:1/8": 2, "pairs": 2}
    digits |= {"bfloat16": 3, "eight bits": 3, "other images": 2}
    for cells, row in zip(table(STEPS, "| images, pixels | tokens"), newest.values(), strict=True):
        errors = [(row["error"][name], count) for name, count in digits.items()]
        shown = [f"{error['mean']:.{count}f} ({error['max']:.{count}f})" for error, count in errors]
        assert cells == [f"{row['tokens']:,}", *shown]
    means = {name: [100 * row["error"][name]["mean"] for row in newest.values()] for name in digits}
    sentence = "at most {:.1f}% for bfloat16 and 8-bit activations, and {}% if half of the tokens are sampled"
    assert_states(STEPS, sentence, max(means["bfloat16"] + means["eight bits"]), span(means["sample:1/2"]))
    worst = max(row["error"]["eight bits"]["max"] for row in newest.values())
    default, compressed = (memory_text(complete_run(16), name) for name in ("snella", "snella-compress"))
    assert_states(LIBRARY, "| default | {} times LoRA's |", default)
    sentence = "| {} times LoRA's | {}% on average, {:.0%} in the worst layer |"
    assert_states(LIBRARY, sentence, compressed, span(means["eight bits"], 1), worst)
    assert_states(LIBRARY, "| same as the default | {}% |", span(means["bfloat16"], 1))
    sampled = [newest[key]["error"]["sample:1/2"]["mean"] for key in (("stamps", 224), ("mri-regions", 42))]
    assert_states(LIBRARY, "| same as the default | {:.0%} at 224 px, {:.0%} at 42 px |", *sampled)


def test_switching_times_match_the_measured_rows():
    methods = [f"peft {name} set_adapter + merge" for name in ("lora", "shira", "snella")]
    methods += [f"snella hotswap, {source}" for source in ("in memory", "from file")]
    methods += ["peft lora hotswap_adapter, from file, unmerged"]
    methods += [f"scatter, sparsity {sparsity}" for sparsity in (0.97, 0.99)]
    switches = {(row["backbone"], row["method"]): row for row in rows("hotswap")}
    columns = [[switches[name, method] for method in methods] for name in (VIT_B, "vit_small_patch16_224")]
    times = [[f"{row['cpu_median_ms']:.0f} ms" for row in column] for column in columns]
    weights = [count_text(column[0]["adapted_weights"]).replace("\N{NO-BREAK SPACE}", " ") for column in columns]
    head = "| | ViT-B/16, {} adapted weights | ViT-S/16, {} |".format(*weights)
    assert table(CHECKS, head) == [list(pair) for pair in zip(*times, strict=True)]
    counts = [column[0]["switches"] for column in columns]
    assert_states(CHECKS, "over {} (ViT-B) or {} (ViT-S, under load) interleaved switches", *counts)


def test_memory_claims_match_the_measured_rows():
    peaks = {(row["backbone"], row["family"], row["recomputes"]): row["peak_mib"] for row in rows("step_memory")}

    def ratios(*families, recomputes):
        """Return SNELLA's peak relative to other methods, with or without their own recomputation."""
        pairs = [((name, "snella", True), (name, f, recomputes)) for name in (VIT_B, VIT_L, VIT_H) for f in families]
        return [peaks[ours] / peaks[theirs] for ours, theirs in pairs if theirs in peaks]

    def percent(*families, recomputes):
        return [100 * abs(ratio - 1) for ratio in ratios(*families, recomputes=recomputes)]

    selected = ("gps", "spt-lora")
    below, above = (span(percent(*selected, recomputes=flag)) for flag in (False, True))
    assert_states(SPEED, "SNELLA's peak memory is {}% below that of GPS and SPT-LoRA", below)
    assert_states(SPEED, "SNELLA's peak is {}% above theirs", above)
    sparse = span(percent(*selected, "spt-adapter", recomputes=False))
    sentence = "{}% below if only SNELLA recomputes inputs; {}% above GPS and SPT-LoRA if all methods do"
    assert_states(PAPER, sentence, sparse, above)
    others = span(percent("lora", *selected, "spt-adapter", recomputes=False))
    sentence = "peak memory is {}% below that of LoRA and these three methods, and {} times that of full fine-tuning"
    assert_states(PAPER, sentence, others, span(ratios("full", recomputes=False), 2))
    same, adapter = (percent(*families, recomputes=True) for families in (("lora", *selected), ("spt-adapter",)))
    full = span(ratios("full", recomputes=True), 2)
    assert_states(PAPER, "{:.1f} to {:.0f}% above that of LoRA, GPS, and SPT-LoRA,", min(same), max(same))
    assert_states(PAPER, "{}% below that of SPT-Adapter, and {} times that of full", span(adapter), full)
    sentence = "{:.1f}, {:.1f} and {:.1f}% for ViT-B, -L and -H if both recompute inputs; otherwise {}% below LoRA"
    lora = span(percent("lora", recomputes=False))
    assert_states(PAPER, sentence, *percent("lora", recomputes=True), lora)
    assert_states(PAPER, "{:.0f} MiB vs. LoRA's {:.0f} MiB", *(peaks[VIT_B, name, True] for name in ("snella", "lora")))
    base = [peaks[VIT_B, name, False] for name in ("spt-adapter", "full")]
    large = [peaks[VIT_L, name, False] for name in ("spt-lora", "gps", "full")]
    sentence = "ViT-B: SPT-Adapter {:,.0f} MiB, `full` {:,.0f}; ViT-L: SPT-LoRA {:,.0f}, GPS {:,.0f}, `full` {:,.0f};"
    assert_states(PAPER, sentence, *base, *large)
    huge = [peaks[VIT_H, "snella", True], peaks[VIT_H, "full", False], ratios("full", recomputes=False)[-1]]
    assert_states(PAPER, "{:,.0f} of {:,.0f} MiB ({:.2f})", *huge)


def test_claims_about_time_and_gradients_match_the_measured_rows():
    times = [time_text(complete_run(batch), "snella") for batch in (4, 16)]
    assert_states(PAPER, "{} times LoRA's step time at batch size 4, {} times at 16", *times)
    gradients = table(PAPER, "| kernel | gradient norm")
    _, _, sigmoid, rbf, _, mix_k = ([float(cell) for cell in cells] for cells in gradients)
    ratios = [round(mix / small, -1) for mix, small in zip(mix_k[:3], rbf[:3], strict=True)]
    assert_states(PAPER, "is {} times smaller than Mix-K's", span(ratios))
    sentence = "This constant is {:.0f} (RBF) or {:.0f} (sigmoid) times as large as the pre-trained weights"
    assert_states(PAPER, sentence, rbf[5], sigmoid[5])
    (distance,) = {f"{row['squared_distance'][0]:.3f}" for row in rows("kernel_gradients")}
    assert_states(PAPER, "mean squared distance of {}.", distance)


def test_fits_of_random_matrices_match_the_measured_rows():
    fits = {preset: {} for preset in ("quick", "paper")}
    for row in rows("fit_matrix"):
        fits["paper" if row["command"].endswith(" --preset paper") else "quick"][row["kernel"]] = row
    for cells, row in zip(table(PAPER, "| kernel | rank 4"), fits["paper"].values(), strict=True):
        smallest = row["smallest_eigenvalue"]
        digits = ".0e" if abs(smallest) < 1e-6 else ".2f" if abs(smallest) < 1 else ".1f"
        errors = [f"{error:.4f}" for error in row["mse_by_rank"].values()]
        assert cells == [*errors, f"{smallest:{digits}}".replace("-", "−", 1)], row["kernel"]
    errors = {preset: {name: fit["mse_by_rank"] for name, fit in kernels.items()} for preset, kernels in fits.items()}
    for kernels in errors.values():
        assert all(min(kernels, key=lambda name: kernels[name][rank]) == "mix_k" for rank in ("16", "32", "48"))
        for name in ("linear", "p_linear"):
            assert all(error > kernels[name][rank] for rank, error in kernels["rbf"].items())
    largest = max(errors["quick"]["mix_k"][rank] - error for rank, error in errors["paper"]["mix_k"].items())
    assert_states(PAPER, "The error of Mix-K is up to {:.3f} larger", largest)
    first, last = ([fits["paper"][name][f"{step}_gradient"] for name in ("rbf", "mix_k")] for step in ("first", "last"))
    assert_states(PAPER, "Its norm at the first step is {:.4f}, compared with {:.4f} for Mix-K", *first)
    assert_states(PAPER, "at the last step, the norms are {:.4f} and {:.4f}", *last)


def test_text_on_budgets_and_updates_by_task_matches_the_measured_rows():
    slopes, cosines, chance = defaultdict(list), defaultdict(list), []
    for row in rows("budgets_by_task"):
        if row["kind"] == "budget":
            slopes[row["task"]].append(100 * linear_trend(range(12), row["sparsity"])[0])
        elif row["kind"] == "overlap":
            cosines[row["differs"]].append(row["cosine"])
            chance += row["chance"]
    falling = sum(max(seeds) < 0 for seeds in slopes.values())
    assert_states(
        PAPER, "On {} of the {} tasks, the last blocks get larger shares with both seeds", falling, len(slopes)
    )
    assert min(slopes["drums"]) < 0 < max(slopes["drums"]) and min(slopes["elpv"]) > 0
    slope = difference_of(list(slopes.values()))
    mean, low, high = (decimal_text(value, 1) for value in (slope.mean, slope.low, slope.high))
    assert_states(PAPER, "sparsity changes by {} points per block (95% interval {} to {}).", mean, low, high)
    assert_states(PLOTS, "sparsity decreases by {} points per block on average", decimal_text(-slope.mean, 1))
    first, second = sorted(slopes["elpv"])
    assert_states(PAPER, "sparsity increases by {:.1f} and {:.1f} points per block", first, second)
    means = {differs: fmean(fmean(blocks) for blocks in pairs) for differs, pairs in cosines.items()}
    sentence = "Its mean is {:.2f}, compared with {:.2f} by chance and {:.2f} for two seeds of the same task."
    assert_states(PAPER, sentence, means["task"], fmean(chance), means["seed"])
    assert_states(PAPER, "for two tasks with different seeds, it is {:.2f}.", means["task and seed"])
    sentence = "The mean similarity of two tasks is {:.2f}, compared with {:.2f} for randomly permuted entries."
    assert_states(PLOTS, sentence, means["task"], fmean(chance))
    claim = "mean cosine {:.2f}, compared with {:.2f} by chance and {:.2f} for two seeds of a task"
    assert_states(PAPER, claim, means["task"], fmean(chance), means["seed"])
    jaccard = defaultdict(list)
    for row in rows("budgets_by_task"):
        if row["kind"] == "overlap":
            jaccard[row["differs"]].append(fmean(row["jaccard"]))
    densities = {}
    for row in rows("budgets_by_task"):
        if row["kind"] == "budget":
            densities[row["task"], row["seed"]] = 1 - np.array(row["sparsity"])
    by_chance = []
    for row in rows("budgets_by_task"):
        if row.get("differs") == "task":
            p, q = (densities[tuple(run)] for run in row["runs"])
            by_chance.append(float(np.mean(p * q / (p + q - p * q))))
    values = (fmean(jaccard["task"]), fmean(by_chance), fmean(jaccard["seed"]))
    sentence = "is {:.2f} for different tasks, compared with {:.2f} by chance and {:.2f} for two seeds"
    assert_states(PAPER, sentence, *values)
    assert_states(PAPER, "(Jaccard index {:.2f}, by chance {:.2f})", *values[:2])
    for differs in cosines:
        by_block = [fmean(values) for values in zip(*cosines[differs], strict=True)]
        assert sorted(range(12), key=by_block.__getitem__)[-2:] in ([10, 11], [11, 10])


def test_text_on_importance_metrics_by_task_matches_the_measured_rows(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import budgets_by_task as module

    measured = list(rows("budgets_by_task"))
    spread, frozen, correlation = zip(
        *(module.evolution_values(measured, name) for name in module.METRICS), strict=True
    )

    def difference(values, first, second):
        names = list(module.METRICS)
        pairs = zip(values[names.index(first)], values[names.index(second)], strict=True)
        return difference_of([[a - b] for a, b in pairs])

    spreads = [fmean(values) for values in spread]
    result = difference(spread, "magnitude", "sensitivity")
    ends = [decimal_text(value, 1) for value in (result.mean, result.low, result.high)]
    sentence = "is {:.1f} points, compared with {:.1f} for sensitivity (difference {}, 95% interval {} to {})."
    assert_states(PAPER, sentence, spreads[1], spreads[0], *ends)
    assert spreads[1] < spreads[2] < spreads[0]
    result = difference(correlation, "delta_magnitude", "sensitivity")
    ends = [decimal_text(value, 2) for value in (result.mean, result.low, result.high)]
    ranks = [fmean(values) for values in correlation]
    sentence = "last allocation: {:.2f}) than with W-Magnitude ({:.2f}; difference {}, 95% interval {} to {})"
    assert_states(PAPER, sentence, ranks[0], ranks[2], *ends)
    assert ranks[0] > max(ranks[1:])
    sentence = "is {:.1f} points, compared with {:.1f} for sensitivity and {:.1f} for W-Magnitude."
    assert_states(PLOTS, sentence, spreads[1], spreads[0], spreads[2])
    sentence = "last allocation is {:.2f}, compared with {:.2f} for magnitude and {:.2f} for W-Magnitude."
    assert_states(PLOTS, sentence, *ranks)
    shares = [fmean(values) for values in frozen]
    assert_states(PAPER, "sensitivity freezes {:.1f}% of the matrices, W-Magnitude only {:.1f}%.", shares[0], shares[2])


def test_text_on_the_scaling_of_generator_updates_matches_the_measured_rows(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = pytest.importorskip("generator_scaling")
    runs = defaultdict(list)
    for row in rows("generator_scaling"):
        runs[row["scaling"]].append(row)
    ratios = {
        scaling: [module.mean_ratio(measured, step) / module.mean_ratio(runs[None], step) for step in module.STEPS]
        for scaling, measured in runs.items()
    }
    sentence = "At the default value, 3, the update is {} times as large as LoRA's at the measured steps."
    assert_states(GENERATION, sentence, span(ratios[3.0], 1))
    assert_states(GENERATION, "At 1, as in the paper, it is {} times as large", span(ratios[1.0], 1))


def test_text_on_sizes_of_sparse_files_matches_the_measured_rows():
    sizes = {row["sparsity"]: row for row in rows("exports") if row["kind"] == "sparse"}
    adapter = sizes[0.7]["adapter_bytes"]
    assert_states(CHECKS, "it is smaller than the adapter ({:.2f} MiB) at a sparsity of 0.99", adapter / 2**20)
    assert sizes[0.99]["fp32_bytes"] < adapter < sizes[0.97]["fp32_bytes"]
    assert round(sizes[0.7]["fp32_bytes"] / adapter) == 10  # "ten times as large at the default"
    assert_states(USING, "at a sparsity of 0.99, larger at 0.97, and ten times as large at the default, 0.7.")


def test_text_on_features_and_ranks_by_task_matches_the_measured_rows(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import budgets_by_task as module

    measured = list(rows("budgets_by_task"))
    before, lora, snella = (fmean(map(fmean, values)) for values in module.nmi_by_task(measured).values())
    gap = module.nmi_difference(measured, "snella-8", "lora-8")
    difference = [decimal_text(value, 3) for value in (gap.mean, gap.low, gap.high)]
    difference[2] = f"+{difference[2]}"
    assert gap.low < 0 < gap.high  # "not more clearly than LoRA", and no significant difference
    sentence = (
        "is {:.2f} with SNELLA, {:.2f} with LoRA (difference {}, 95% interval {} to {}), and {:.2f} before training."
    )
    assert_states(PAPER, sentence, snella, lora, *difference, before)
    claim = "SNELLA {:.2f}, LoRA {:.2f} (difference {}, {} to {}), before training {:.2f} |"
    assert_states(PAPER, claim, snella, lora, *difference, before)
    sentence = "{:.2f} for the pre-trained backbone, {:.2f} for LoRA, and {:.2f} for SNELLA."
    assert_states(PLOTS, sentence, before, lora, snella)
    ranks = [module.mean_rank(measured, name, "snella-8") for name in ("rank", "effective_rank")]
    assert_states(PAPER, "(384×384) have rank {:.0f} on average and effective rank {:.0f}.", *ranks)
    assert_states(PAPER, "rank {:.0f} of 384, effective rank {:.0f} |", *ranks)
    ranks += [module.mean_rank(measured, name, "lora-8") for name in ("rank", "effective_rank")]
    sentence = "updates have rank {:.0f} and effective rank {:.0f}; LoRA's have rank {:.0f} and effective rank {:.0f}."
    assert_states(PLOTS, sentence, *ranks)


def test_text_on_the_breakdown_of_a_small_step_matches_the_measured_rows(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import step_breakdown as module

    measured = rows("step_breakdown")
    ratios = span([row["ratio"] for row in measured], 2)
    assert_states(STEPS, "The step takes {} times as long as a LoRA step (medians of two runs).", ratios)
    assert len(measured) == 2 and {row["rounds"] for row in measured} == {15}
    times = measured[-1]["snella"]
    share = 100 * sum(times[name] for name in list(module.PARTS)[:4]) / times["step"]
    assert_states(STEPS, "the first four rows, take {:.0f}% of it.", share)
