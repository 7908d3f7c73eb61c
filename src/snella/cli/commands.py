"""What each command calls and prints."""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Group
from rich.progress import track
from rich.table import Table
from rich.text import Text

from snella._files import write_json, write_text
from snella.cli.bench_commands import BENCH_COMMANDS
from snella.cli.generation_commands import GENERATION_COMMANDS
from snella.cli.language_commands import LANGUAGE_COMMANDS
from snella.cli.options import (
    CompareOptions,
    DataOptions,
    DemoOptions,
    EvaluateOptions,
    InspectOptions,
    MergeOptions,
    PredictOptions,
)
from snella.runs.config import TrainConfig
from snella.runs.console import counted, make_console, print_line
from snella.runs.folder import RunFolder

if TYPE_CHECKING:
    from snella.data.check import BenchmarkCheck
    from snella.tasks import ResultTable

_LIBRARIES = {
    "train": "snella.runs.train",
    "evaluate": "snella.runs.evaluate",
    "predict": "snella.runs.predict",
    "merge": "snella.runs.merge",
    "inspect": "snella.report.inspect",
    "data": "snella.data.check",
    "compare": "snella.comparison.compare",
    "bench": "snella.benchmark",
    "demo": "snella.recipes.demo",
}


def import_libraries(name: str) -> None:
    """Import what a command works with before it begins, while Ctrl-C still ends the program at once.

    Args:
        name: Of the command.
    """
    if name in _LIBRARIES:
        importlib.import_module(_LIBRARIES[name])


def _train(settings: dict[str, Any]) -> None:
    """`snella train`."""
    from snella.runs.train import train

    train(TrainConfig(**settings))


def _evaluate(settings: dict[str, Any]) -> None:
    """`snella evaluate`."""
    from snella.runs.build import task_of
    from snella.runs.evaluate import evaluate

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
    task = task_of(RunFolder(options.run).read_json("run.json"))
    console = make_console()
    for note in result["notes"]:
        print_line(console, f"note: {note}")
    print_line(console, f"{result['data']} ({result['split']}), {result['images']} images: {task.result_text(result)}")
    console.print(_table(task.result_table(result, result["classes"])))
    if options.out is not None:
        write_json(Path(options.out), result)


def _predict(settings: dict[str, Any]) -> None:
    """`snella predict`."""
    from snella.runs.predict import output_of_run, predict_each

    options = PredictOptions(**settings)
    output = output_of_run(options.run)
    output.check(options.out, options.top_k, overwrite=options.overwrite)
    skipped: list[str] = []
    predictions = predict_each(
        options.run,
        options.images,
        batch_size=options.batch_size,
        skip_broken=options.skip_broken,
        device=options.device,
        on_skipped=lambda path, reason: skipped.append(f"{str(path)!r} ({reason})"),
    )
    console = make_console()
    if options.out is not None:
        taken = _Counted(predictions)
        path = output.write(taken, options.out, options.top_k, overwrite=options.overwrite)
        print_line(console, f"{counted(taken.count, 'image')}: {path}")
    else:
        for prediction in predictions:
            shown = output.text(prediction, options.top_k)
            print_line(console, f"{prediction.path}: {shown}")
    if skipped:
        print_line(make_console(sys.stderr), f"left out {counted(len(skipped), 'image')}: {'; '.join(skipped)}")
    _record("predict", options.run, asdict(options))


def _merge(settings: dict[str, Any]) -> None:
    """`snella merge`."""
    from snella.runs.merge import loading_lines, merge, what_it_is

    options = MergeOptions(**settings)
    path = merge(options.run, options.out, overwrite=options.overwrite)
    _record("merge", options.run, asdict(options))
    console = make_console()
    size = sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path])) / 2**20
    print_line(console, f"{path}: {size:.1f} MiB, {what_it_is(path)}; to load it:")
    print_line(console, loading_lines(path))


def _inspect(settings: dict[str, Any]) -> None:
    """`snella inspect`."""
    from snella.cli.generation_commands import draw_generation_report
    from snella.report.inspect import inspect_run
    from snella.runs.evaluate import refresh_report

    options = InspectOptions(**settings)
    if options.run is None:
        make_console().print(_memory(options))
        return
    make_console().print(inspect_run(options.run))
    if options.report:
        task = RunFolder(options.run).read_json("run.json").get("task")
        draw = draw_generation_report if task == "generation" else refresh_report
        print_line(make_console(), f"report: {draw(options.run)}")


def _data(settings: dict[str, Any]) -> None:
    """`snella data check`."""
    from snella.data.check import check_benchmarks

    options = DataOptions(**settings)
    checks = check_benchmarks(options.folder, decode=options.decode)
    console = make_console()
    for check in checks:
        console.print(_benchmark(check))
    errors = [error for check in checks for error in check.errors]
    if errors:
        raise ValueError(f"{counted(len(errors), 'error')} in '{options.folder}': {'; '.join(errors)}")
    print_line(console, "complete, nothing is wrong")


def _compare(settings: dict[str, Any]) -> None:
    """`snella compare`."""
    from snella.comparison.compare import compare
    from snella.comparison.experiment_files import experiment_of

    options = CompareOptions(**settings)
    compare(
        experiment_of(asdict(options)),
        options.out,
        workers=options.workers,
        threads=options.threads,
        ray=options.ray,
        retry_failed=options.retry_failed,
        draw_only=options.draw_only,
    )


def _demo(settings: dict[str, Any]) -> None:
    """`snella demo`."""
    from snella.recipes.demo import run_demo

    options = DemoOptions(**settings)
    changes: dict[str, Any] = {"seed": options.seed} | ({} if options.epochs is None else {"epochs": options.epochs})
    run_demo(options.out, overwrite=options.overwrite, device=options.device, **changes)


def _record(name: str, run: str, options: dict[str, Any]) -> None:
    """Leave a command's settings in the run's folder, `commands/NAME.yaml`, where that can be written."""
    folder = Path(run) / "commands"
    with contextlib.suppress(OSError):  # the result does not depend on it: a run may lie on a read-only disk
        folder.mkdir(exist_ok=True)
        write_text(folder / f"{name}.yaml", yaml.safe_dump(options, sort_keys=False))


def _benchmark(check: "BenchmarkCheck") -> Table:
    """What is there of a benchmark: a row a data set, with the numbers of images of its parts."""
    parts = list(dict.fromkeys(name for found in check.found for name in found.parts))
    table = Table(title=f"{check.title} in {check.folder}", title_justify="left")
    for name in ("data set", *parts, "classes", ""):
        table.add_column(name, justify="left" if name in ("data set", "") else "right")
    for found in check.found:
        sizes = [f"{len(found.parts[name]):,}" if name in found.parts else "–" for name in parts]
        wrong = len(found.errors) + len(found.deviations)
        state = counted(wrong, "error") if wrong else "good" + "".join(f"; note: {note}" for note in found.notes)
        table.add_row(found.name, *sizes, str(len(found.classes)), state)
    for name in check.missing:
        table.add_row(name, *("–" for _ in parts), "–", "missing")
    return table


def _memory(options: InspectOptions) -> Group:
    """The memory of one training step: a row a method."""
    from snella.runs.build import choose_device
    from snella.runs.memory import methods_compared, predict_for_methods

    chosen: dict[str, Any] = {"batch": 32, "img_size": None, "r": 8, "dtype": "fp32"}
    chosen |= {name: value for name in chosen if (value := getattr(options, name)) is not None}
    device = options.device or choose_device("auto").type
    columns = ("weights", "gradients", "optimiser state", "kept for backward", "largest temporary", "total")
    table = Table(title_justify="left")
    table.add_column("MiB")
    for name in columns:
        table.add_column(name, justify="right")
    predictions = predict_for_methods(str(options.backbone), **chosen, device_type=device)
    count = len(methods_compared(chosen["r"]))
    for method, shape, memory in track(predictions, "predicting", total=count, console=make_console(), transient=True):
        images = f"{counted(chosen['batch'], 'image')} of {shape[1]}×{shape[2]} px"
        table.title = f"Training step of {options.backbone}: {images}, {chosen['dtype']}, AdamW, on {device}"
        table.add_row(method, *(f"{part / 2**20:,.1f}" for part in astuple(memory)))
    note = "total is the peak: kept tensors are let go while gradients appear, so it is less than the sum of the parts"
    return Group(table, Text(note))


def _table(result: "ResultTable") -> Table:
    """A task's results class by class."""
    table = Table(title=result.title, title_justify="left")
    for number, name in enumerate(result.columns):
        table.add_column(name, justify="right" if number else "left")
    for row in result.rows:
        table.add_row(*row)
    return table


class _Counted:
    """Items that are counted as they are taken."""

    def __init__(self, items: Iterable[Any]) -> None:
        self.items = items
        self.count = 0

    def __iter__(self) -> Iterator[Any]:
        for item in self.items:
            self.count += 1
            yield item


COMMANDS: dict[str, Callable[[dict[str, Any]], None]] = {
    "train": _train,
    "evaluate": _evaluate,
    "predict": _predict,
    "merge": _merge,
    "inspect": _inspect,
    "data": _data,
    "compare": _compare,
    **BENCH_COMMANDS,
    **GENERATION_COMMANDS,
    **LANGUAGE_COMMANDS,
    "demo": _demo,
}
