"""What each command calls and prints."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from snella.analysis import inspect_run
from snella.cli.options import DemoOptions, EvaluateOptions, InspectOptions, MergeOptions, PredictOptions
from snella.training import TrainConfig, evaluate, merge, predict, run_demo, train
from snella.training.atomic_files import write_json, write_text
from snella.training.console import counted, make_console
from snella.training.merging import loading_lines
from snella.training.predicting import check_output, write_predictions
from snella.training.reporting import refresh_report

_SHOWN_CLASSES = 3


def _train(settings: dict[str, Any]) -> None:
    """`snella train`."""
    train(TrainConfig(**settings))


def _evaluate(settings: dict[str, Any]) -> None:
    """`snella evaluate`."""
    options = EvaluateOptions(**settings)
    result = evaluate(
        options.run,
        options.data,
        split=options.split,
        batch_size=options.batch_size,
        skip_broken=options.skip_broken,
        device=options.device,
    )
    _record("evaluate", options.run, asdict(options))
    console = make_console()
    for note in result["notes"]:
        console.print(f"note: {note}", highlight=False)
    console.print(
        f"{result['data']} ({result['split']}), {result['images']} images: accuracy {result['accuracy']:.4f}, "
        f"balanced accuracy {result['balanced_accuracy']:.4f}, loss {result['loss']:.4f}",
        highlight=False,
    )
    console.print(_confusion(result))
    if options.out is not None:
        write_json(Path(options.out), result)


def _predict(settings: dict[str, Any]) -> None:
    """`snella predict`."""
    options = PredictOptions(**settings)
    check_output(options.out, options.top_k, overwrite=options.overwrite)
    predictions = predict(
        options.run,
        options.images,
        batch_size=options.batch_size,
        skip_broken=options.skip_broken,
        device=options.device,
    )
    _record("predict", options.run, asdict(options))
    console = make_console()
    if options.out is not None:
        path = write_predictions(predictions, options.out, options.top_k, overwrite=options.overwrite)
        console.print(f"{counted(len(predictions), 'image')}: {path}", highlight=False)
        return
    for prediction in predictions:
        shown = ", ".join(f"{name} {p:.3f}" for name, p in prediction.ranking[: options.top_k or _SHOWN_CLASSES])
        console.print(f"{prediction.path}: {shown}", highlight=False, soft_wrap=True)


def _merge(settings: dict[str, Any]) -> None:
    """`snella merge`."""
    options = MergeOptions(**settings)
    path = merge(options.run, options.out, overwrite=options.overwrite)
    _record("merge", options.run, asdict(options))
    console = make_console()
    console.print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB of plain timm weights; to load them:", soft_wrap=True)
    console.print(loading_lines(path), highlight=False, markup=False, soft_wrap=True)


def _inspect(settings: dict[str, Any]) -> None:
    """`snella inspect`."""
    options = InspectOptions(**settings)
    make_console().print(inspect_run(options.run))
    if options.report:
        make_console().print(f"report: {refresh_report(options.run)}", highlight=False)


def _demo(settings: dict[str, Any]) -> None:
    """`snella demo`."""
    options = DemoOptions(**settings)
    changes: dict[str, Any] = {"seed": options.seed} | ({} if options.epochs is None else {"epochs": options.epochs})
    run_demo(options.out, overwrite=options.overwrite, device=options.device, **changes)


def _record(name: str, run: str, options: dict[str, Any]) -> None:
    """Leave a command's settings in the run's folder, `commands/NAME.yaml`."""
    folder = Path(run) / "commands"
    folder.mkdir(exist_ok=True)
    write_text(folder / f"{name}.yaml", yaml.safe_dump(options, sort_keys=False))


def _confusion(result: dict[str, Any]) -> Table:
    """The confusion matrix: rows are true classes."""
    table = Table(title="true class (rows) and predicted class (columns)", title_justify="left")
    table.add_column("")
    for name in result["classes"]:
        table.add_column(name, justify="right")
    for name, row in zip(result["classes"], result["confusion"], strict=True):
        table.add_row(name, *map(str, row))
    return table


COMMANDS: dict[str, Callable[[dict[str, Any]], None]] = {
    "train": _train,
    "evaluate": _evaluate,
    "predict": _predict,
    "merge": _merge,
    "inspect": _inspect,
    "demo": _demo,
}
