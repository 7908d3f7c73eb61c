"""The measurement: contenders interleaved in one process, medians and ratios."""

from __future__ import annotations

import gc
import random
import statistics
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from snella.benchmark.config import PEER, BenchConfig
from snella.benchmark.contenders import Setting
from snella.benchmark.figures import draw_figures
from snella.benchmark.op_check import op_fault
from snella.benchmark.peak import peak_mib
from snella.benchmark.rows import append_rows, conditions
from snella.benchmark.step import Runner, StepTime, random_batch
from snella.training.console import make_console
from snella.training.memory import saved_bytes

_WARM_UP = 2  # steps before the clock: from the third on SNELLA knows how its thresholds move
_IMPLEMENTATIONS = {
    "snella": "auto",
    "snella-keep-delta": "auto",
    "snella-compiled": "auto",
    "snella-eager": "eager",
    "snella-triton": "triton",
}
_SHOWN = ("contender", "forward_s", "backward_s", "step_s", f"step_over_{PEER}", "saved_mib", "trainable")


def bench(config: BenchConfig, console: Console | None = None) -> list[dict[str, Any]]:
    """Time training steps of all contenders on the same images.

    In each round every contender takes one step, in an order that changes from round to round, after two steps that
    are not timed. A contender whose op differs from the reference, or whose gradients are not finite, gets no row.

    Args:
        config: What to measure.
        console: Where to write; standard output if None.

    Returns:
        The rows, also appended to `config.out`.
    """
    console = console or make_console()
    rows = []
    for setting, batch in config.settings():
        found = _measure(config, setting, batch, console)
        gc.collect()  # models and optimisers hold each other, and the next setting needs their memory
        console.print(_table(found, setting, batch))
        if config.out is not None:
            append_rows(config.out, found)
        rows.extend(found)
    if config.figures is not None and config.out is not None:
        for path in draw_figures(config.out, config.figures):
            console.print(f"picture {path}", highlight=False, soft_wrap=True)
    return rows


def _measure(config: BenchConfig, setting: Setting, batch: int, console: Console) -> list[dict[str, Any]]:
    """Rows of one setting."""
    images, labels = random_batch(setting, batch)
    runners: dict[str, Runner] = {}
    for name in config.methods:
        fault = op_fault(_IMPLEMENTATIONS[name], setting.device, setting.sparsity) if name in _IMPLEMENTATIONS else None
        if fault is None:
            runner = Runner(name, setting)
            fault = None if runner.has_finite_gradients(images, labels) else "its gradients are not finite"
        if fault is None:
            runners[name] = runner
        else:
            console.print(f"{name} is not timed: {fault}", highlight=False, soft_wrap=True)
    for runner in runners.values():
        for _ in range(_WARM_UP):
            runner.step(images, labels)
    times: dict[str, list[StepTime]] = {name: [] for name in runners}
    order, shuffle = list(runners), random.Random(0)
    for _ in track(range(config.rounds), f"{setting.backbone}, batch {batch}", console=console, transient=True):
        shuffle.shuffle(order)
        for name in order:
            times[name].append(runners[name].step(images, labels))
    common = {
        "benchmark": "step_time",
        **{key: value for key, value in asdict(setting).items() if key not in ("dtype", "device")},
        "dtype": str(setting.dtype).removeprefix("torch."),
        "batch": batch,
        "rounds": config.rounds,
        **conditions(setting.device),
    }
    rows = []
    for name, runner in runners.items():
        row = {**common, "contender": name, **_summary(times[name], times.get(PEER))}
        row["saved_mib"] = round(saved_bytes(runner.model, images) / 2**20, 1)
        row["weights"] = sum(p.numel() for p in runner.model.parameters())
        row["trainable"] = runner.trainable
        rows.append(row)
    del runners
    if config.memory:
        for row in rows:
            row.update(peak_mib(str(row["contender"]), setting, batch))
    return rows


def _summary(steps: list[StepTime], peer: list[StepTime] | None) -> dict[str, Any]:
    """Medians, and the ratio to the peer round by round."""
    found: dict[str, Any] = {
        key: round(statistics.median(getattr(step, key) for step in steps), 4)
        for key in ("forward_s", "backward_s", "step_s")
    }
    if peer:
        ratios = [mine.step_s / theirs.step_s for mine, theirs in zip(steps, peer, strict=True)]
        found[f"step_over_{PEER}"] = round(statistics.median(ratios), 3)
        found[f"step_over_{PEER}_quartiles"] = [round(q, 3) for q in quartiles(ratios)]
    return found


def quartiles(values: list[float]) -> tuple[float, float]:
    """First and third quartile."""
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def _table(rows: list[dict[str, Any]], setting: Setting, batch: int) -> Table:
    """The rows for people."""
    peak = next((key for key in ("peak_gpu_mib", "peak_rss_mib") if rows and key in rows[0]), None)
    shown = [*_SHOWN, *([peak] if peak else [])]
    dtype = str(setting.dtype).removeprefix("torch.")
    title = f"{setting.backbone}, batch {batch}, r {setting.r}, sparsity {setting.sparsity}, {dtype}"
    table = Table(title=title, title_justify="left")
    for name in shown:
        table.add_column(name.replace("_", " "), justify="left" if name == "contender" else "right")
    for row in rows:
        values = [row.get(name, "") for name in shown]
        table.add_row(*(f"{value:,}" if isinstance(value, int) else str(value) for value in values))
    return table
