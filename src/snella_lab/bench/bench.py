"""Benchmarks of step time, as medians over interleaved steps, and of memory.

A workload is a model with a rank, a sparsity, a dtype, and a device. A setting is a workload with a batch size. Each
row of results belongs to one method in one setting.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import random
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import timm
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from snella import BudgetAllocator, create_snella_optimizer
from snella.layer import SnellaLayer
from snella_app.console import make_console, make_table, print_line
from snella_app.device import choose_device, synchronized_time
from snella_app.text import first_line
from snella_app.training.memory import peak_rss_mib, record_forward, reset_peak_rss
from snella_lab.bench.baselines import BASELINES, REFERENCE, Workload, random_batch
from snella_lab.bench.reference import op_error
from snella_lab.bench.rows import append_rows, draw_figures
from snella_lab.provenance import conditions

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class BenchConfig:
    """Settings of `snella bench`, as described in the help of this command."""

    backbones: list[str] = field(default_factory=lambda: ["vit_base_patch16_224"])
    batch: list[int] = field(default_factory=lambda: [4, 16])
    methods: list[str] = field(default_factory=lambda: ["frozen", "lora", "full", "snella"])
    r: list[int] = field(default_factory=lambda: [8])
    sparsity: list[float] = field(default_factory=lambda: [0.7])
    dtype: list[Literal["fp32", "bf16"]] = field(default_factory=lambda: ["fp32"])
    device: str = "cpu"
    rounds: int = 5
    memory: bool = False
    out: str | None = None
    figures: str | None = None

    def __post_init__(self) -> None:
        """Validate all settings and report all errors together."""
        errors = [f"batch must be at least 1, got {size}" for size in self.batch if size < 1]
        errors += [f"r must be at least 1, got {r}" for r in self.r if r < 1]
        errors += [f"sparsity must be in [0, 1), got {s}" for s in self.sparsity if not 0 <= s < 1]
        errors += [
            f"methods must be among {', '.join(BASELINES)}, got {name!r}"
            for name in self.methods
            if name not in BASELINES
        ]
        errors += [
            f"dtype must be among {', '.join(_DTYPES)}, got {name!r}" for name in self.dtype if name not in _DTYPES
        ]
        errors += [f"backbones must be timm names, got {name!r}" for name in self.backbones if not timm.is_model(name)]
        if self.rounds < 0:
            errors.append(f"rounds must not be negative, got {self.rounds}")
        if self.rounds == 0 and self.memory:
            errors.append("memory requires timed steps, got rounds=0; set rounds to at least 1 or drop memory")
        if self.figures is not None and self.out is None:
            errors.append(f"figures requires out, got figures={self.figures!r} without out; set out")
        if errors:
            raise ValueError("; ".join(errors))

    def settings(self) -> list[tuple[Workload, int]]:
        """Return each workload with each batch size."""
        axes = (self.backbones, self.r, self.sparsity, self.dtype, self.batch)
        return [
            (Workload(backbone, r, sparsity, _DTYPES[dtype], self.device), batch)
            for backbone, r, sparsity, dtype, batch in itertools.product(*axes)
        ]


def grid(device: str = "cpu", out: str | None = None) -> BenchConfig:
    """Return the full grid: four ViTs, four batch sizes, two ranks, four sparsities, and two dtypes. It takes hours."""
    return BenchConfig(
        backbones=["vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224", "vit_huge_patch14_224"],
        batch=[1, 4, 16, 64],
        methods=[
            name
            for name in BASELINES
            if name in ("snella", "snella-keep-delta") or not (name.startswith("snella") or name.endswith("-recompute"))
        ],
        r=[8, 32],
        sparsity=[0.0, 0.7, 0.99, 0.9999],
        dtype=["fp32", "bf16"],
        device=device,
        memory=True,
        out=out,
    )


@dataclass(frozen=True)
class StepTime:
    """Durations in seconds of a training step, its forward pass, and its backward pass."""

    forward_s: float
    backward_s: float
    step_s: float


class Runner:
    """Model and optimizer of one method in `BASELINES`."""

    def __init__(self, name: str, workload: Workload) -> None:
        self.device = torch.device(workload.device)
        self.model = BASELINES[name](workload.base(), workload).train()
        self.optimizer = create_snella_optimizer(self.model, lr=1e-4)
        if any(isinstance(module, SnellaLayer) for module in self.model.modules()):
            BudgetAllocator(self.model, total_epochs=100, steps_per_epoch=100).attach(self.optimizer)

    def step(self, images: Tensor, labels: Tensor) -> StepTime:
        """Run one training step, and time the step and its two passes."""
        start = synchronized_time(self.device)
        loss = nn.functional.cross_entropy(self.model(images), labels)
        forward = synchronized_time(self.device)
        loss.backward()
        backward = synchronized_time(self.device)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return StepTime(forward - start, backward - forward, synchronized_time(self.device) - start)

    def has_finite_gradients(self, images: Tensor, labels: Tensor) -> bool:
        """Return True if gradients exist and are finite. Computing them also warms up the model."""
        nn.functional.cross_entropy(self.model(images), labels).backward()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        is_finite = bool(gradients) and all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
        self.optimizer.zero_grad()
        return is_finite


_STEPS = 2
"""Number of training steps over which the peak memory is measured."""


def peak_mib(name: str, workload: Workload, batch: int) -> dict[str, float]:
    """Measure the peak memory of two training steps, in MiB.

    On a GPU, `peak_gpu_mib` is the peak of the allocator. On a CPU, the steps run in a new process: `peak_rss_mib` is
    the peak resident set size of that process, including libraries and thread pools, and `peak_step_mib` is the growth
    of the peak during the steps. If the system can reset the peak, it is reset once the model and optimizer are built.
    """
    if torch.device(workload.device).type == "cuda":
        gc.collect()  # models of earlier measurements are in reference cycles
        torch.cuda.empty_cache()
        _run(name, workload, batch)
        return {"peak_gpu_mib": round(torch.cuda.max_memory_allocated(workload.device) / 2**20, 1)}
    return peak_of_child(_run, name, workload, batch)


def peak_of_child(function: Callable[..., float], name: str, *args: Any) -> dict[str, float]:
    """Measure the peak resident set size of a new process that calls `function(name, *args)`.

    `function` must be importable and return the memory at the start of the measurement, in MiB. It may call
    `reset_peak_rss` first. `name` identifies the measurement in errors.

    Returns:
        `peak_rss_mib`, the peak, and `peak_step_mib`, the peak minus the returned value. Both are in MiB.

    Raises:
        RuntimeError: If the process exits without a result.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_peak, args=(sender, torch.get_num_threads(), function, name, *args))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"memory measurement of {name!r} failed with exit code {process.exitcode}") from None
    finally:
        process.join()


def _send_peak(sender: Any, threads: int, function: Callable[..., float], *args: Any) -> None:
    """Call the function, and send the peak memory of this process and its excess over the function's result."""
    torch.set_num_threads(threads)
    before = function(*args)
    peak = peak_rss_mib()
    sender.send({"peak_rss_mib": peak, "peak_step_mib": round(max(peak - before, 0.0), 1)})


def _run(name: str, workload: Workload, batch: int) -> float:
    """Run the steps, and return the peak memory before the first one, in MiB."""
    runner = Runner(name, workload)
    images, labels = random_batch(workload, batch)
    reset_peak_rss()  # selecting weights, e.g. by GPS, may need more memory than a step
    if images.is_cuda:
        torch.cuda.reset_peak_memory_stats(images.device)
    before = peak_rss_mib()
    for _ in range(_STEPS):
        runner.step(images, labels)
    return before


_WARM_UP = 2  # untimed steps
_TABLE_COLUMNS = ("method", "forward_s", "backward_s", "step_s", f"step_over_{REFERENCE}", "saved_mib", "trainable")


def bench(config: BenchConfig, console: Console | None = None) -> list[dict[str, Any]]:
    """Time training steps of all methods on the same images, return the rows, and append them to `config.out` if set.

    After two warm-up steps, every round takes one step of each method, in random order. A method is skipped if its
    gradients are not finite, if it uses a backend that is unavailable or gives wrong results, or if it does not fit
    into GPU memory. With `rounds=0`, only saved tensors and parameters are counted.

    Raises:
        ValueError: If the device is not available.
    """
    config = replace(config, device=str(choose_device(config.device)))
    console = console or make_console()
    rows = []
    for workload, batch in config.settings():
        new_rows = _time(config, workload, batch, console) if config.rounds else _count(config, workload, batch)
        if config.memory:
            for row in new_rows:
                row.update(peak_mib(str(row["method"]), workload, batch))
        gc.collect()  # frees models and optimizers in reference cycles
        console.print(_table(new_rows, workload, batch))
        if config.out is not None:
            append_rows(config.out, new_rows)
        rows.extend(new_rows)
    if config.figures is not None and config.out is not None:
        for path in draw_figures(config.out, config.figures):
            print_line(console, f"figure: {path}")
    return rows


def _time(config: BenchConfig, workload: Workload, batch: int, console: Console) -> list[dict[str, Any]]:
    """Time interleaved steps of all methods in one setting, and count their saved tensors and parameters.

    The steps are interleaved so that a change in the speed of the machine affects all methods alike.
    """
    images, labels = random_batch(workload, batch)
    runners: dict[str, Runner] = {}
    op_errors: dict[str, str | None] = {}
    for name in config.methods:
        impl = _implementation(name)
        error: str | None = None
        if impl is not None:
            if impl not in op_errors:
                op_errors[impl] = op_error(impl, workload.device, workload.sparsity)
            error = op_errors[impl]
        prepared = error or _prepare(name, workload, images, labels)
        if isinstance(prepared, Runner):
            runners[name] = prepared
        else:
            print_line(console, f"skipped {name}: {prepared}")
    times: dict[str, list[StepTime]] = {name: [] for name in runners}
    order = list(runners)
    shuffle = random.Random(0)
    for _ in track(range(config.rounds), f"{workload.backbone}, batch {batch}", console=console, transient=True):
        shuffle.shuffle(order)
        for name in order:
            times[name].append(runners[name].step(images, labels))
    common = {"benchmark": "step_time", **setting_fields(workload, batch), "rounds": config.rounds}
    common |= conditions(workload.device)
    rows = []
    for name, runner in runners.items():
        summary = _summary(times[name], times.get(REFERENCE))
        rows.append({**common, "method": name, **summary, **_tensor_counts(runner.model, images)})
    return rows


def _prepare(name: str, workload: Workload, images: Tensor, labels: Tensor) -> Runner | str:
    """Build a method and take its warm-up steps. If it cannot be timed, return the reason."""
    runner: Runner | None = None
    try:
        runner = Runner(name, workload)
        if not runner.has_finite_gradients(images, labels):
            return "its gradients are not finite"
        for _ in range(_WARM_UP):
            runner.step(images, labels)
        return runner
    except torch.OutOfMemoryError as error:
        reason = first_line(error)
    runner = None  # frees its memory for the other methods
    gc.collect()  # models and optimizers are in reference cycles
    if torch.device(workload.device).type == "cuda":
        torch.cuda.empty_cache()
    return reason


def _implementation(name: str) -> str | None:
    """Return the backend of SNELLA's op that a method uses, or None for the reference and methods without the op."""
    if not name.startswith(("snell", "klora")) or "reference" in name:
        return None
    for impl in ("eager", "triton"):
        if name.endswith(impl):
            return impl
    return "auto"


def _count(config: BenchConfig, workload: Workload, batch: int) -> list[dict[str, Any]]:
    """Count the saved tensors and parameters of each method in one setting, using one forward pass per method."""
    images, _ = random_batch(workload, batch)
    common = {"benchmark": "kept_bytes", **setting_fields(workload, batch), **conditions(workload.device)}
    rows = []
    for name in config.methods:
        # the model is not bound to a name, so that it is freed before the next one is built
        rows.append({**common, "method": name, **_tensor_counts(BASELINES[name](workload.base(), workload), images)})
        gc.collect()
    return rows


def setting_fields(workload: Workload, batch: int) -> dict[str, Any]:
    """Return the row fields of a setting, except for the device."""
    fields = {key: value for key, value in asdict(workload).items() if key not in ("dtype", "device")}
    return {**fields, "dtype": str(workload.dtype).removeprefix("torch."), "batch": batch}


def _tensor_counts(model: nn.Module, images: Tensor) -> dict[str, Any]:
    """Measure the tensors that autograd saves in a forward pass, and count the parameters."""
    saved_bytes = record_forward(model.train(), images).saved_bytes
    parameters = list(model.parameters())
    return {
        "saved_mib": round(saved_bytes / 2**20, 1),
        "weights": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
    }


def _summary(steps: list[StepTime], reference_steps: list[StepTime] | None) -> dict[str, Any]:
    """Return the median times and, if the reference was timed, the ratio to the reference (see `ratio_fields`)."""
    summary: dict[str, Any] = {}
    for key in ("forward_s", "backward_s", "step_s"):
        median_s = statistics.median(getattr(step, key) for step in steps)
        summary[key] = round(median_s, 4)
    if reference_steps:
        times = [step.step_s for step in steps]
        reference_times = [step.step_s for step in reference_steps]
        summary |= ratio_fields(REFERENCE, times, reference_times)
    return summary


def ratio_fields(reference: str, times: list[float], reference_times: list[float]) -> dict[str, Any]:
    """Return row fields with the median and the quartiles of the ratios to a reference, one ratio per round."""
    ratios = [time_s / reference_s for time_s, reference_s in zip(times, reference_times, strict=True)]
    return {
        f"step_over_{reference}": round(statistics.median(ratios), 3),
        f"step_over_{reference}_quartiles": np.quantile(ratios, [0.25, 0.75]).round(3).tolist(),
    }


def _table(rows: list[dict[str, Any]], workload: Workload, batch: int) -> Table:
    """Return the console table of one setting."""
    peak_column = next((key for key in ("peak_gpu_mib", "peak_rss_mib") if rows and key in rows[0]), None)
    shown = list(_TABLE_COLUMNS)
    if peak_column is not None:
        shown.append(peak_column)
    dtype = str(workload.dtype).removeprefix("torch.")
    title = f"{workload.backbone}, batch {batch}, r {workload.r}, sparsity {workload.sparsity}, {dtype}"
    columns = [name.replace("_", " ") for name in shown]
    cells = ([_cell_text(row.get(name, "")) for name in shown] for row in rows)
    return make_table(columns, cells, title=title)


def _cell_text(value: Any) -> str:
    """Format a table cell, with thousands separators in integers."""
    return f"{value:,}" if isinstance(value, int) else str(value)
