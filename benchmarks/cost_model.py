"""Fit the cost model to committed measurements, test it on held-out ones, and predict steps on GPUs.

python benchmarks/cost_model.py        rewrites tables and figures of docs/notes/cost-model.md; runs no training step
python benchmarks/cost_model.py --gpu  only prints the measured and predicted steps on GPUs
python benchmarks/cost_model.py --rows only prints the measured and predicted steps on CPUs

`snella_lab.bench.cost_model` counts the operations of a step, and `snella_lab.bench.machines` converts them to
seconds. The rates of each CPU minimize the squared relative errors of its float32 measurements. A measurement is held
out together with all measurements of its configuration: model, batch size, rank and sparsity. CPUs compute bfloat16
products at twice the float32 rate, because an instruction multiplies twice as many values; measurements under bfloat16
autocast are not fitted.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from documents import markdown_table, put_between
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from scipy.optimize import nnls

from snella_app.report.style import COLORS, FIGURE_SIZE, INK, add_legend, new_figure
from snella_lab.bench.cost_model import (
    METHODS,
    TRITON,
    Precision,
    StepCount,
    Strategy,
    Transformer,
    count_step,
)
from snella_lab.bench.machines import GPUS, GpuForecast, Rates, gpu_rates, tokens_until
from snella_lab.bench.rows import read_rows
from snella_lab.style import save_figure

FOLDER = Path(__file__).parent
PAGE = FOLDER.parent / "docs" / "notes" / "cost-model.md"
FIGURES = FOLDER.parent / "docs" / "images" / "scale"
ROWS = ("results.jsonl", "model_rows.jsonl")
EPYC_1, EPYC_2 = "cpu, 1 threads, AMD EPYC", "cpu, 2 threads, AMD EPYC"
INTEL_1 = "cpu, 1 threads, Intel(R) Xeon(R) Processor"


def _vit(width: int, depth: int, heads: int, hidden: int, patch: int) -> Transformer:
    """Return the shape of a ViT at 224×224 pixels."""
    return Transformer(width, depth, (224 // patch) ** 2 + 1, heads, hidden, 3 * patch**2, 3 * 224**2)


MODELS: dict[str, Transformer] = {
    "ViT-S/16": _vit(384, 12, 6, 1536, 16),
    "ViT-B/16": _vit(768, 12, 12, 3072, 16),
    "ViT-L/16": _vit(1024, 24, 16, 4096, 16),
    "ViT-H/14": _vit(1280, 32, 16, 5120, 14),
    "ViT-g/14": _vit(1408, 40, 16, 6144, 14),
    "ViT-22B/14": _vit(6144, 48, 48, 24576, 14),
    "LLaMA-7B": Transformer(4096, 32, 2048, 32, 11008, outputs=32000, is_llama=True),
    "LLaMA-70B": Transformer(8192, 80, 2048, 64, 28672, outputs=32000, kv_width=1024, is_llama=True),
}
"""Shapes from the models' papers. LLaMA's samples have 2,048 tokens."""

SHAPES: dict[str, Transformer] = {
    "vit_small_patch16_224": MODELS["ViT-S/16"],
    "vit_base_patch16_224": MODELS["ViT-B/16"],
    "vit_large_patch16_224": MODELS["ViT-L/16"],
    "vit_huge_patch14_224": MODELS["ViT-H/14"],
    "vit_small_patch14_dinov2": Transformer(384, 12, 10, 6, 1536, 588, 3 * 42**2, has_layer_scale=True),
    "llama": replace(MODELS["LLaMA-7B"], tokens=512, outputs=1000),
}
"""Shapes of the measured models; Swin and ConvNeXt are not plain transformers."""
_MIN_ROUNDS = 2
_TIME_GOAL, _BYTES_GOAL = 0.15, 0.03
_HALF_SPEEDUP = 2  # of bfloat16 products on a CPU
_MIB, _GIB = 2**20, 2**30


@dataclass(frozen=True)
class Case:
    """A row and its counts: `step` for the measured blocks, `full` for the full model."""

    machine: str
    model: str
    method: str
    batch: int
    r: int
    sparsity: float
    precision: Precision
    step: StepCount
    full: StepCount
    row: dict[str, Any]

    @property
    def configuration(self) -> tuple[Any, ...]:
        """Settings that all methods of a comparison share."""
        return self.model, self.batch, self.r, self.sparsity, self.precision

    @property
    def seconds(self) -> float:
        """Measured seconds."""
        return float(self.row["step_s"])


def read_case(row: dict[str, Any]) -> Case | None:
    """Count the step of a CPU row in float32 without autocast; return None for other rows."""
    case = count_row(row)
    return case if case is not None and case.precision == "float32" else None


def count_row(row: dict[str, Any]) -> Case | None:
    """Count the step of a CPU row, with or without autocast.

    Return None for other devices, models or methods, and for bfloat16 activations without autocast.
    """
    model, method = row.get("backbone", row.get("model")), row.get("method")
    if model not in SHAPES or method not in METHODS or not row["device"].startswith("cpu"):
        return None
    if row.get("dtype", "float32") != "float32":
        return None
    precision: Precision = "float32"
    if row.get("autocast"):
        precision = "bfloat16" if row["frozen"] == "bfloat16" else "autocast"
    elif row.get("frozen", "float32") != "float32":
        return None
    batch, r, sparsity, shape = row["batch"], row["r"], row["sparsity"], SHAPES[model]
    measured, full = (
        count_step(replace(shape, depth=depth), method, batch, r=r, sparsity=sparsity, precision=precision)
        for depth in (row.get("depth") or shape.depth, shape.depth)
    )
    return Case(row["device"], model, method, batch, r, sparsity, precision, measured, full, row)


def timed_cases(folder: Path = FOLDER, *, is_autocast: bool = False) -> list[Case]:
    """Return the newest timed row of each setting in float32, or under autocast; rounds rank rows of the same day."""
    newest: dict[tuple[Any, ...], Case] = {}

    def rank(case: Case) -> tuple[Any, ...]:
        return case.row["date"][:10], case.row["rounds"], case.row["date"]

    for row in (row for name in ROWS for row in read_rows(folder / name)):
        is_timed = row["benchmark"] in ("step_time", "model_rows") and row["rounds"] >= _MIN_ROUNDS
        case = count_row(row) if is_timed else None
        if case is not None and (case.precision != "float32") == is_autocast:
            key = (case.machine, case.configuration, case.method)
            newest[key] = max(newest.get(key, case), case, key=rank)
    return list(newest.values())


def counted_cases(folder: Path = FOLDER) -> list[tuple[float, float]]:
    """Return predicted and recorded MiB saved for the backward pass, one pair per setting."""
    newest: dict[tuple[Any, ...], tuple[float, float]] = {}
    for row in (row for name in ROWS for row in read_rows(folder / name)):
        case = count_row(row) if row["benchmark"] in ("step_time", "kept_bytes", "model_rows") else None
        if case is not None:
            recorded = float(row["saved_mib"] if "saved_mib" in row else row["kept_mib"])
            newest[case.configuration, case.method] = case.full.saved / _MIB, recorded
    return list(newest.values())


def peak_cases(folder: Path = FOLDER) -> list[tuple[float, float]]:
    """Return predicted and recorded peak MiB of `step_memory.jsonl`."""
    cases = [count_row(row) for row in read_rows(folder / "step_memory.jsonl")]
    return [(case.full.peak / _MIB, case.row["peak_mib"]) for case in cases if case is not None]


def fit_rates(cases: list[Case]) -> Rates:
    """Fit product, vector and memory rates of a machine by nonnegative least squares on relative errors."""
    costs = fit_costs([_features(case.step) for case in cases], [case.seconds for case in cases])
    product, vector, memory = (math.inf if cost == 0 else 1 / cost for cost in costs)
    return Rates(product, _HALF_SPEEDUP * product, vector, memory)


def fit_costs(features: list[list[float]], seconds: list[float]) -> list[float]:
    """Fit nonnegative seconds per unit of each feature to `seconds`, by least squares on relative errors."""
    table, measured = np.array(features), np.array(seconds)
    scale = table.max(axis=0)
    scale[scale == 0] = 1
    return (nnls(table / scale / measured[:, None], np.ones(len(seconds)))[0] / scale).tolist()


def _features(step: StepCount) -> list[float]:
    """Return the counts by rate: products, vector operations, bytes."""
    products = step.products + step.half_products / _HALF_SPEEDUP
    return [products, step.vector + step.merge_vector, step.moved + step.merge_moved]


def cases_of(machine: str, cases: list[Case]) -> list[Case]:
    """Return the cases of a machine, given by its device string."""
    return [case for case in cases if case.machine == machine]


@dataclass(frozen=True)
class HeldOut:
    """Prediction for a case, with rates fitted without its configuration."""

    case: Case
    seconds: float

    @property
    def error(self) -> float:
        """Relative error."""
        return self.seconds / self.case.seconds - 1


def leave_one_out(cases: list[Case]) -> list[HeldOut]:
    """Predict each configuration with rates fitted to the other configurations on the same machine."""
    held_out = []
    for machine, configuration in dict.fromkeys((case.machine, case.configuration) for case in cases):
        of_machine = cases_of(machine, cases)
        rates = fit_rates([case for case in of_machine if case.configuration != configuration])
        excluded = [case for case in of_machine if case.configuration == configuration]
        held_out += [HeldOut(case, rates.seconds(case.step)) for case in excluded]
    return held_out


def ratio_errors(held_out: list[HeldOut]) -> list[float]:
    """Return the relative errors of predicted ratios to LoRA."""
    groups: dict[tuple[Any, ...], dict[str, HeldOut]] = {}
    for prediction in held_out:
        case = prediction.case
        groups.setdefault((case.machine, case.configuration), {})[case.method] = prediction
    return [
        (1 + prediction.error) / (1 + methods["lora"].error) - 1
        for methods in groups.values()
        if "lora" in methods
        for method, prediction in methods.items()
        if method != "lora"
    ]


def autocast_cases(cases: list[Case], folder: Path = FOLDER) -> list[HeldOut]:
    """Predict the measurements under bfloat16 autocast with the rates of the same machine in float32."""
    rates = fit_rates(cases_of(EPYC_1, cases))
    rates = replace(rates, product=rates.half_product)
    timed = cases_of(EPYC_1, timed_cases(folder, is_autocast=True))
    return [HeldOut(case, rates.seconds(case.step)) for case in timed]


_ERROR_HEAD = ("measurements", "median error", "largest error", "within 15%", "median error of the ratio to LoRA")


def error_table(held_out: list[HeldOut]) -> str:
    """Format held-out errors of step times, one line per machine."""
    machines: dict[str, list[HeldOut]] = {}
    for prediction in held_out:
        machines.setdefault(prediction.case.machine, []).append(prediction)
    lines = [[machine_name(machine), *_error_cells(predictions)] for machine, predictions in machines.items()]
    return markdown_table(["machine", *_ERROR_HEAD], lines)


def _error_cells(held_out: list[HeldOut]) -> list[str]:
    """Format number of measurements, median and largest error, number within the goal, and error of ratios."""
    worst = max(held_out, key=lambda prediction: abs(prediction.error))
    within = sum(abs(prediction.error) <= _TIME_GOAL for prediction in held_out)
    median = f"{_median(prediction.error for prediction in held_out):.0%}"
    largest, ratios = f"{worst.error:+.0%} ({worst.case.method})", f"{_median(ratio_errors(held_out)):.0%}"
    return [str(len(held_out)), median, largest, str(within), ratios]


def method_error_table(held_out: list[HeldOut]) -> str:
    """Format held-out errors of step times, one line per method, with the setting of the largest error."""
    lines = []
    for method in METHODS:
        predictions = [prediction for prediction in held_out if prediction.case.method == method]
        if predictions:
            worst = max(predictions, key=lambda prediction: abs(prediction.error))
            median = f"{_median(prediction.error for prediction in predictions):.1%}"
            lines.append([method, str(len(predictions)), median, f"{worst.error:+.1%}", *_setting_cells(worst.case)])
    return markdown_table(["method", "measurements", "median error", "largest error", *_SETTING_HEAD], lines)


def rows_table(held_out: list[HeldOut]) -> str:
    """Format all measured and predicted step times."""
    lines = []
    for prediction in held_out:
        case, seconds = prediction.case, (prediction.case.seconds, prediction.seconds)
        cells = [f"{value:.3f}" for value in seconds]
        lines.append([case.method, *_setting_cells(case), case.precision, *cells, f"{prediction.error:+.1%}"])
    return markdown_table(["method", *_SETTING_HEAD, "precision", "measured, s", "predicted, s", "error"], lines)


_SETTING_HEAD = ("machine", "model", "batch", "r", "sparsity")


def _setting_cells(case: Case) -> list[str]:
    """Format machine, model, batch size, rank and sparsity."""
    return [machine_name(case.machine), case.model, str(case.batch), str(case.r), str(case.sparsity)]


def transfer_table(cases: list[Case], folder: Path = FOLDER) -> str:
    """Format the errors under autocast and on machines without fitted rates."""
    groups = (
        (f"{machine_name(EPYC_1)}, bfloat16 autocast", "ViT-B/16", autocast_cases(cases, folder)),
        (f"another {machine_name(EPYC_2)}", "ViT-B/16", other_epyc_cases(cases, folder)),
        (machine_name(INTEL_1), "ViT-S/14 and ViT-B/16", intel_cases(cases, folder)),
    )
    lines = [[name, models, *_error_cells(predictions)] for name, models, predictions in groups]
    return markdown_table(["machine", "models", *_ERROR_HEAD], lines)


def other_epyc_cases(cases: list[Case], folder: Path = FOLDER) -> list[HeldOut]:
    """Predict `sampled_gradients.jsonl`, measured on another EPYC with the same device string."""
    rates = fit_rates(cases_of(EPYC_2, cases))
    others = [read_case(row) for row in read_rows(folder / "sampled_gradients.jsonl") if row["device"] == EPYC_2]
    return [HeldOut(case, rates.seconds(case.step)) for case in others if case is not None]


def intel_cases(cases: list[Case], folder: Path = FOLDER) -> list[HeldOut]:
    """Predict the measurements on the Intel Xeon with the single-thread rates of the EPYC."""
    rates = fit_rates(cases_of(EPYC_1, cases))
    suite = _newest_row(folder / "model_rows.jsonl", "suite_step", INTEL_1)
    rows = [suite | {"method": name, "step_s": suite[f"{name}_s"]} for name in ("lora", "snella")]
    rows.append(_newest_row(folder / "results.jsonl", "competition", INTEL_1) | {"method": "snella"})
    return [HeldOut(case, rates.seconds(case.step)) for case in map(read_case, rows) if case is not None]


def _newest_row(path: Path, benchmark: str, device: str) -> dict[str, Any]:
    """Return the newest row of a benchmark on one device; the last row wins ties."""
    rows = [row for row in read_rows(path) if (row["benchmark"], row["device"]) == (benchmark, device)]
    return sorted(rows, key=lambda row: row["date"])[-1]


def rates_table(cases: list[Case]) -> str:
    """Format the fitted rates."""
    lines = []
    for machine in dict.fromkeys(case.machine for case in cases):
        rates = fit_rates(cases_of(machine, cases))
        lines.append(
            [machine_name(machine), *(f"{rate / 1e9:.3g}" for rate in (rates.product, rates.vector, rates.memory))]
        )
    return markdown_table(["machine", "products, GFLOP/s", "vector operations, G/s", "memory, GB/s"], lines)


def bytes_table(folder: Path = FOLDER) -> str:
    """Format the errors of saved and peak bytes."""
    lines = []
    for name, pairs in (("saved for backward", counted_cases(folder)), ("peak of a step", peak_cases(folder))):
        errors = [predicted / recorded - 1 for predicted, recorded in pairs]
        worst = max(errors, key=abs)
        within = sum(abs(error) <= _BYTES_GOAL for error in errors)
        median = f"{_median(errors):.1%}"
        lines.append([name, str(len(errors)), median, f"{worst:+.1%}", str(within)])
    return markdown_table(["bytes", "configurations", "median error", "largest error", "within 3%"], lines)


def datasheet_table() -> str:
    """Format the datasheet values."""
    lines = []
    for gpu in GPUS.values():
        rates = [f"{gpu.product / 1e12:,g}", f"{gpu.vector / 1e12:.1f}", f"{gpu.memory / 1e12:g}"]
        lines.append([gpu.name, *rates, f"{gpu.link / 1e9:.0f}", gpu.source])
    head = ["GPU", "matrix products, TFLOP/s", "float32, TFLOP/s", "memory, TB/s", "link, GB/s", "source"]
    return markdown_table(head, lines)


_GPU_MODELS = ("ViT-S/16", "ViT-B/16", "ViT-L/16", "ViT-H/14")


def count_on_gpu(model: str, method: str, batch: int) -> StepCount:
    """Count a step with Triton kernels in bfloat16."""
    return count_step(MODELS[model], method, batch, precision="bfloat16", kernels=TRITON)


def ratio_table() -> str:
    """Format predicted ratios to LoRA, with ranges, at two batch sizes."""
    lines = [
        [f"{model}, batch {batch}", *(_range(_ratio_range(gpu, model, batch)) for gpu in GPUS)]
        for model, batch in itertools.product(_GPU_MODELS, (16, 128))
    ]
    return markdown_table(["predicted ratio", *(gpu.name for gpu in GPUS.values())], lines)


def _range(ratio: tuple[float, float, float]) -> str:
    """Format an expected ratio and its range."""
    low, expected, high = ratio
    return f"{expected:.2f} ({low:.2f}–{high:.2f})"


def _ratio_range(
    gpu: str, model: str, batch: int, method: str = "snella", dtype: str = "bf16"
) -> tuple[float, float, float]:
    """Return the lowest, expected and highest ratio to LoRA."""
    return GpuForecast(gpu, MODELS[model], batch, dtype=dtype).ratio(method)


_GPU_METHODS: dict[str, tuple[str, str]] = {
    "full": ("full", "bf16"),
    "DoRA": ("dora", "bf16"),
    "SNELLA": ("snella", "bf16"),
    'SNELLA, `"sample:1/2"`': ("snella-sample", "bf16"),
    'SNELLA, `"sample:1/4"`': ("snella-sample-quarter", "bf16"),
    "SNELLA, 8-bit activations": ("snella-compress", "bf16"),
    'SNELLA, 8-bit activations, `"sample:1/2"`': ("snella-compress-sample", "bf16"),
    "SNELLA, float32": ("snella", "fp32"),
    'SNELLA, float32, `weight_gradient="bfloat16"`': ("snella-bf16-gradient", "fp32"),
}


def methods_table() -> str:
    """Format predicted ratios of all methods to LoRA, with ranges, for one model at two batch sizes."""
    gpus, model = ("h100", "rtx4090", "l4"), "ViT-B/16"
    lines = []
    for label, (method, dtype) in _GPU_METHODS.items():
        ratios = [[_ratio_range(gpu, model, batch, method, dtype) for gpu in gpus] for batch in (16, 128)]
        lines.append([label, *(_range(ratio) for pair in zip(*ratios, strict=True) for ratio in pair)])
    heads = (f"{GPUS[gpu].name}, batch {batch}" for gpu in gpus for batch in (16, 128))
    return markdown_table(["predicted ratio", *heads], lines)


def crossing_table(cases: list[Case]) -> str:
    """Format the tokens per step from which the merge is small, and from which SNELLA is as fast as LoRA."""
    epyc = fit_rates(cases_of(EPYC_2, cases))
    on_cpu = _crossings(epyc, "ViT-B/16", lambda model, method, batch: count_step(MODELS[model], method, batch))
    lines = [[f"{machine_name(EPYC_2)}, ViT-B/16, float32", *on_cpu]]
    lines += [
        [f"{gpu.name}, {model}", *_crossings(gpu_rates(name), model, count_on_gpu)]
        for name, gpu in GPUS.items()
        for model in ("ViT-S/16", "ViT-B/16", "ViT-H/14")
    ]
    merge = [f"merge below {percent}% of the step time" for percent in (50, 10)]
    head = ["predicted tokens per step", *merge, "as fast as LoRA", '`"sample:1/4"` as fast as LoRA']
    return markdown_table(head, lines)


def _crossings(rates: Rates, model: str, count: Callable[[str, str, int], StepCount]) -> list[str]:
    """Format the four token counts for a machine and a model, with two significant digits."""

    def is_merge_below(share: float) -> Callable[[int], bool]:
        return lambda batch: rates.merge_share(count(model, "snella", batch)) < share

    def is_fast(method: str) -> Callable[[int], bool]:
        return lambda batch: rates.seconds(count(model, method, batch)) <= rates.seconds(count(model, "lora", batch))

    conditions = (is_merge_below(0.5), is_merge_below(0.1), is_fast("snella"), is_fast("snella-sample-quarter"))
    cells = []
    for condition in conditions:
        tokens = tokens_until(MODELS[model], condition)
        rounded = "never" if tokens is None else f"{int(float(f'{tokens:.2g}')):,}"
        cells.append("always" if tokens == MODELS[model].tokens else rounded)
    return cells


_LARGE = ("ViT-L/16", "ViT-H/14", "ViT-g/14", "ViT-22B/14", "LLaMA-70B")
_DEVICES = 8
_LARGE_STEPS = {
    **{f"full{text}": ("full", blocks) for text, blocks in (("", False), (", checkpointed blocks", True))},
    **{f"LoRA{text}": ("lora", blocks) for text, blocks in (("", False), (", checkpointed blocks", True))},
    "SNELLA, inputs saved": ("snella-keep-inputs", False),
    "SNELLA": ("snella", False),
    "SNELLA, 8-bit activations": ("snella-compress", False),
    "SNELLA, checkpointed blocks": ("snella", True),
}


def _count_large(name: str, method: str, is_checkpointed: bool = False) -> StepCount:
    """Count the step of one device: 32 images, or one sequence."""
    precision: Precision = "autocast" if method == "full" else "bfloat16"
    batch = 1 if MODELS[name].is_llama else 32
    options: dict[str, Any] = {"precision": precision, "kernels": TRITON, "is_checkpointed": is_checkpointed}
    return count_step(MODELS[name], method, batch, **options)


def sharded_peak(step: StepCount, devices: int) -> float:
    """Return the peak bytes per device under FSDP2, with a share of the base weights and two gathered blocks.

    Adapters, their gradients, and their moments stay replicated. Full fine-tuning shards gradients and moments too.
    """
    trained = 4 * step.trainable / (devices if step.is_full else 1)  # in float32, like the adapters
    state = step.base_weights / devices + 4 * step.adapters + 2 * step.block_weights + 2 * trained
    return state + max(step.saved + step.temporary, trained)


def memory_table() -> str:
    """Format GiB per device on eight devices."""
    lines = []
    for label, (method, is_checkpointed) in _LARGE_STEPS.items():
        steps = [_count_large(name, method, is_checkpointed) for name in _LARGE]
        lines.append([f"{label}, DDP", *(_gib(step.peak) for step in steps)])
        lines.append([f"{label}, FSDP2", *(_gib(sharded_peak(step, _DEVICES)) for step in steps)])
    return markdown_table(["predicted GiB per device", *_LARGE], lines)


_PARALLEL: dict[str, tuple[str, Strategy]] = {
    f"{label}, {'DDP' if strategy == 'ddp' else 'FSDP2'}": (method, strategy)
    for strategy in get_args(Strategy)
    for label, method in (("full", "full"), ("LoRA", "lora"), ("SNELLA", "snella"))
}


def communication_table() -> str:
    """Format the GiB sent per device and step."""
    lines = [
        [label, *(_gib(_count_large(name, method).communicated(_DEVICES, strategy)) for name in _LARGE)]
        for label, (method, strategy) in _PARALLEL.items()
    ]
    return markdown_table(["predicted GiB sent per step", *_LARGE], lines)


def parallel_table() -> str:
    """Format seconds per step on eight devices; bold if communication takes longer than computation."""
    lines = []
    for gpu, (label, (method, strategy)) in itertools.product(("h100", "rtx4090"), _PARALLEL.items()):
        rates, cells = gpu_rates(gpu), []
        for name in _LARGE:
            step = _count_large(name, method)
            seconds = _seconds(rates.seconds(step, _DEVICES, strategy))
            is_slow = rates.link_seconds(step, _DEVICES, strategy) > rates.seconds(step)
            cells.append(f"**{seconds}**" if is_slow else seconds)
        lines.append([f"{GPUS[gpu].name}, {label}", *cells])
    return markdown_table(["predicted seconds per step", *_LARGE], lines)


def _seconds(value: float) -> str:
    """Format seconds with two significant digits."""
    return f"{value:.0f}" if value >= 10 else f"{value:#.2g}"


def _gib(value: float) -> str:
    """Format GiB."""
    amount = value / _GIB
    return f"{amount:,.0f}" if amount >= 100 else f"{amount:.1f}" if amount >= 1 else f"{amount:.2f}"


def _median(errors: Iterable[float]) -> float:
    """Return the median magnitude."""
    return statistics.median(abs(error) for error in errors)


def machine_name(device: str) -> str:
    """Format the device string of a CPU: processor, then threads."""
    _, threads, processor = device.split(", ", 2)
    processor = processor.replace("(R)", "").removesuffix(" Processor")
    return f"{processor}, {'1 thread' if threads == '1 threads' else threads}"


GPU_NAMES = {
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "NVIDIA L4": "l4",
    "Tesla T4": "t4",
    "AMD Instinct MI300X": "mi300x",
}
"""Keys of `GPUS` by the device name in rows, `torch.cuda.get_device_name()`."""
_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
_AUTOCAST_NOTE = "bfloat16: measured with weights and inputs in bfloat16, predicted under autocast"


def measured_gpu_table(folder: Path = FOLDER) -> str:
    """Format the newest step times on GPUs of `GPUS`, measured and predicted; empty without rows of such a GPU.

    Lines below the table name the differences between measurement and prediction, and the rows without a prediction.
    """
    newest: dict[tuple[Any, ...], dict[str, Any]] = {}
    notes: dict[str, None] = {}
    for row in read_rows(folder / "results.jsonl"):
        if row["benchmark"] != "step_time" or row["device"] not in GPU_NAMES:
            continue
        if row["backbone"] in SHAPES and row["method"] in METHODS and row["dtype"] in _DTYPES:
            setting = tuple(row[key] for key in ("device", "backbone", "batch", "r", "sparsity", "dtype"))
            newest[*setting, row["method"]] = row
            if row["dtype"] == "bfloat16":
                notes[_AUTOCAST_NOTE] = None
        else:
            notes[f"not predicted: {row['method']} on {row['backbone']} in {row['dtype']}"] = None
    lines = []
    for (*setting, method), row in newest.items():
        device, model, batch, r, _, dtype = setting
        forecast = GpuForecast(GPU_NAMES[device], SHAPES[model], batch, r, _DTYPES[dtype])
        low, expected, high = (1000 * seconds for seconds in forecast.seconds(method))
        measured = 1000 * row["step_s"]
        cells = [f"{measured:.1f}", f"{expected:.1f} ({low:.1f}–{high:.1f})", f"{expected / measured - 1:+.0%}"]
        lora = newest.get((*setting, "lora"))
        ratios = ["–", "–"]
        if lora is not None:
            ratios = [f"{row['step_s'] / lora['step_s']:.2f}", f"{forecast.ratio(method)[1]:.2f}"]
        lines.append([GPUS[GPU_NAMES[device]].name, model, str(batch), dtype, method, *cells, *ratios])
    head = ["GPU", "model", "batch", "dtype", "method", "measured, ms", "predicted, ms", "error"]
    table = [markdown_table([*head, "relative to LoRA", "predicted"], lines)] if lines else []
    return "\n\n".join([*table, *notes])


def sections(folder: Path = FOLDER) -> dict[str, str]:
    """Return the tables of the page by name."""
    cases = timed_cases(folder)
    held_out = leave_one_out(cases)
    return {
        "rates": rates_table(cases),
        "time errors": error_table(held_out),
        "method errors": method_error_table(held_out),
        "transferred rates": transfer_table(cases, folder),
        "bytes errors": bytes_table(folder),
        "datasheets": datasheet_table(),
        "ratios": ratio_table(),
        "methods": methods_table(),
        "crossings": crossing_table(cases),
        "memory": memory_table(),
        "communication": communication_table(),
        "parallel": parallel_table(),
    }


def update_page(page: Path = PAGE, folder: Path = FOLDER) -> bool:
    """Write the tables into the page; return True if it changed."""
    changed = [
        put_between(page, f"<!-- cost model: {name} begin -->", f"<!-- {name} end -->", text)
        for name, text in sections(folder).items()
    ]
    return any(changed)


def errors_figure(held_out: list[HeldOut]) -> Figure:
    """Plot predicted versus measured seconds of held-out measurements, one marker per method family."""
    figure, axes = new_figure(*FIGURE_SIZE, "Held-out steps on CPUs")
    measured = [prediction.case.seconds for prediction in held_out]
    limits = [min(measured) * 0.7, max(measured) * 1.4]
    low, high = ([factor * x for x in limits] for factor in (1 - _TIME_GOAL, 1 + _TIME_GOAL))
    axes.fill_between(limits, low, high, color=COLORS[0], alpha=0.12, linewidth=0)
    axes.plot(limits, limits, color=INK, linewidth=1)
    for index, family in enumerate(("lora", "dora", "full", "snella", "frozen")):
        points = [(p.case.seconds, p.seconds) for p in held_out if METHODS[p.case.method].family == family]
        label = "snella and options" if family == "snella" else family
        style = {"markersize": 5, "color": COLORS[index], "alpha": 0.8, "label": label}
        axes.plot(*zip(*points, strict=True), "os^Dv"[index], **style)
    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks([0.2, 0.5, 1, 2, 5, 10, 20], ["0.2", "0.5", "1", "2", "5", "10", "20"])
        axis.set_minor_locator(NullLocator())
    axes.set(xlim=limits, ylim=limits, xlabel="measured seconds per step", ylabel="predicted seconds per step")
    add_legend(figure, *axes.get_legend_handles_labels(), columns=3)
    return figure


def ratios_figure() -> Figure:
    """Plot the predicted step time of SNELLA relative to LoRA versus the tokens per step."""
    figure, axes = new_figure(*FIGURE_SIZE, "SNELLA relative to LoRA, predicted, not measured")
    batches = [2**power for power in range(11)]
    for index, (gpu, model) in enumerate(itertools.product(("h100", "rtx4090"), ("ViT-B/16", "ViT-H/14"))):
        low, expected, high = zip(*(_ratio_range(gpu, model, batch) for batch in batches), strict=True)
        tokens, label = [batch * MODELS[model].tokens for batch in batches], f"{GPUS[gpu].name}, {model}"
        if index == 0:
            fill = {"color": COLORS[index], "alpha": 0.15, "linewidth": 0, "label": f"range of assumptions, {label}"}
            axes.fill_between(tokens, low, high, **fill)
        axes.plot(tokens, expected, marker="os^Dv"[index], markersize=4, color=COLORS[index], label=label)
    axes.axhline(1, color=INK, linewidth=1, linestyle="--")
    axes.set(xscale="log", ylim=(0, 5), xlabel="tokens per step", ylabel="step time, LoRA = 1")
    add_legend(figure, *axes.get_legend_handles_labels(), columns=2)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="only print measured and predicted steps on GPUs")
    parser.add_argument("--rows", action="store_true", help="only print measured and predicted steps on CPUs")
    args = parser.parse_args()
    if args.rows:
        cases = timed_cases()
        print(rows_table([*leave_one_out(cases), *autocast_cases(cases)]))
        return
    print(measured_gpu_table() or f"results.jsonl has no step times of {', '.join(gpu.name for gpu in GPUS.values())}")
    if args.gpu:
        return
    FIGURES.mkdir(parents=True, exist_ok=True)
    save_figure(errors_figure(leave_one_out(timed_cases())), FIGURES / "held-out.svg")
    save_figure(ratios_figure(), FIGURES / "ratio-gpu.svg")
    print(f"{PAGE.name} {'changed' if update_page() else 'is up to date'}")


if __name__ == "__main__":
    main()
