"""Print predictions, or write them to tables, masks, and feature files.

With `watch`, new images in the given folders are predicted as they arrive, until the user interrupts the command. If
the output is a table, a row per image is appended to it.
"""

import contextlib
import csv
import io
import json
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from snella_app.console import counted, make_console, print_line, track_progress
from snella_app.data.load import split_spec
from snella_app.files import annotate_write_errors, check_new, create_folder, expand_user, write_bytes
from snella_app.runs.image_inputs import check_columns, expand, new_files
from snella_app.runs.model import unfinished_note
from snella_app.runs.predict import Predictor, check_order, load, run_task_class, table_columns
from snella_app.tasks.predictions import add_mask_name, check_mask_names, table_bytes
from snella_app.text import listed, utf8_text

_FEATURE_SUFFIXES = (".npz", ".npy", ".parquet")


def predict_to_files(
    run: str,
    images: Sequence[str],
    *,
    out: str | None = None,
    overwrite: bool = False,
    top_k: int | None = None,
    features: str | None = None,
    watch: bool = False,
    tta: int | None = None,
    unsure: str | None = None,
    batch_size: int = 32,
    columns: str | None = None,
    skip_corrupt: bool = False,
    device: str = "auto",
) -> None:
    """Run prediction on images, and print or write the results; the arguments are those of `snella predict`.

    With `watch`, images that cannot be read are always skipped, and images listed in `out` are not processed again
    unless `overwrite` is set.

    Raises:
        FileExistsError: If an output exists and may not be replaced.
        FileNotFoundError: If the run or an image does not exist. The message suggests similar names.
        ValueError: If settings are invalid, an image cannot be read, or an image is passed before the run.
        ImportError: If predictions or features are written as Parquet without pyarrow.
    """
    console = make_console()
    error_console = make_console(sys.stderr)
    outputs = _Outputs(run_task_class(run), out, features, top_k, overwrite, watch)
    threshold = parse_unsure(unsure)
    folders = [path for path in map(expand_user, images) if path.is_dir()]
    outputs.check(images, folders)
    check_order(Path(run), images)
    check_columns(columns, images)
    listed_images = [image for image in images if not watch or expand_user(image) not in folders]
    files: list[Path] = []
    if listed_images or not watch:
        files = expand(listed_images, columns, table_columns(run), keep_missing=skip_corrupt)
    outputs.check_files(files, images, folders)
    model = load(run, device, batch_size=batch_size)
    resolved = model.resolve_threshold(tta, threshold)  # also checks both arguments before files are changed
    if (status_note := unfinished_note(model.loaded)) is not None:
        print_line(error_console, f"note: {status_note}")
    predicting = _Predicting(model, outputs, tta, threshold, skip_corrupt, error_console)
    if watch:
        signals: list[int] = []
        with _collect_signals(signals):
            done = outputs.start_appending()
            outputs.write(_watch_predictions(predicting.predict, files, folders, done, signals), console)
    else:
        progress_console = None if out is None else error_console  # printed predictions show the progress themselves
        predictions = predicting.predict(files)
        outputs.write(track_progress(predictions, "predicting", len(files), progress_console), console)
    if out is not None:
        print_line(console, f"{counted(len(predicting.names), 'image')}: {out}")
    if features is not None:
        write_features(features, predicting.names, predicting.vectors, overwrite=overwrite)
        print_line(console, f"features of {counted(len(predicting.names), 'image')}: {features}")
    if threshold == "auto" and resolved is None:
        print_line(
            console,
            "no prediction is marked as unsure: no threshold halves the validation error rate, or there are no "
            "validation errors",
        )
    if predicting.skipped and not watch:
        skipped = predicting.skipped
        print_line(error_console, f"skipped {counted(len(skipped), 'image')}: {listed(skipped)}")


@dataclass(frozen=True)
class _Outputs:
    """Outputs of `predict_to_files`; the other attributes are its arguments.

    Attributes:
        task: Task of the run.
    """

    task: Any
    out: str | None
    features: str | None
    top_k: int | None
    overwrite: bool
    watch: bool

    @property
    def writes_masks(self) -> bool:
        """Whether `out` is a folder for masks."""
        return self.out is not None and self.task.target == "masks"

    @property
    def appends_rows(self) -> bool:
        """Whether a row is appended to the table `out` for each image."""
        # the suffix selects the format of a table; masks and folders have no such format
        is_table = self.out is not None and not self.writes_masks and not Path(self.out).is_dir()
        return self.watch and is_table and Path(str(self.out)).suffix.lower() in (".csv", ".jsonl")

    def check(self, images: Sequence[str], folders: Sequence[Path]) -> None:
        """Check the outputs before the images are listed; raise the errors of `predict_to_files`."""
        if self.features is not None:
            if self.watch:
                raise ValueError("features must be left out with watch, which never ends")
            _check_features(self.features, overwrite=self.overwrite)
        if self.watch and self.out is not None and not self.writes_masks and not self.appends_rows:
            raise ValueError(f"out must end with .csv or .jsonl with watch, which appends rows, got {self.out!r}")
        if self.watch and not folders:
            raise ValueError(f"watch needs a folder among the images, got {', '.join(images)}")
        self.task.check_output(self.out, self.top_k, overwrite=self.overwrite or self.appends_rows)

    def check_files(self, files: Sequence[Path], images: Sequence[str], folders: Sequence[Path]) -> None:
        """Raise ValueError if an output would replace or join the images."""
        if self.writes_masks:
            out = Path(str(self.out))
            check_mask_names(files, out)
            if self.watch and any(out.resolve().is_relative_to(folder.resolve()) for folder in folders):
                raise ValueError(
                    f"out must be outside the watched folders, since its masks are images, got {self.out!r}"
                )
        inputs = {Path(split_spec(image)[1] or image).resolve() for image in images}
        for name, output in (("out", None if self.writes_masks else self.out), ("features", self.features)):
            if output is not None and Path(output).resolve() in inputs:
                raise ValueError(f"{name} must not be one of the images, folders or tables, got {output!r}")

    def start_appending(self) -> set[Path]:
        """Return the images that need no prediction because `out` lists them; remove `out` to overwrite it."""
        if not self.appends_rows:
            return set()
        table = Path(str(self.out))
        if self.overwrite:
            table.unlink(missing_ok=True)
        return {path.resolve() for path in _images_in_rows(table)} if table.is_file() else set()

    def write(self, predictions: Iterable[Any], console: Console) -> None:
        """Print the predictions, or write them to `out`."""
        if self.out is None:
            for prediction in predictions:
                print_line(console, f"{prediction.path}: {prediction.text(self.top_k)}")
        elif self.appends_rows:
            _append_rows(predictions, Path(self.out), self.top_k, console)
        else:
            self.task.write_predictions(predictions, self.out, self.top_k, overwrite=self.overwrite)


class _Predicting:
    """Predictions of image files, and the names, features, and errors of these files.

    Attributes:
        names: Files with a prediction.
        vectors: Their features, if features are an output.
        skipped: Skipped files with reasons.
    """

    def __init__(
        self, model: Predictor, outputs: _Outputs, tta: int | None, unsure: Any, skip_corrupt: bool, console: Console
    ) -> None:
        self._model = model
        self._outputs = outputs
        self._options = {"tta": tta, "unsure": unsure, "skip_corrupt": skip_corrupt or outputs.watch}
        self._console = console
        self._mask_names: dict[str, Path] = {}
        self.names: list[Path] = []
        self.vectors: list[np.ndarray] = []
        self.skipped: list[str] = []

    def predict(self, paths: Iterable[Path]) -> Iterator[Any]:
        """Yield the predictions of image files."""
        on_features = None if self._outputs.features is None else self.vectors.append
        options = {**self._options, "on_skipped": self._skip, "on_features": on_features}
        for prediction in self._model.iter_predictions(paths, **options):
            if self._outputs.watch and self._outputs.writes_masks:  # `check_files` did not see this file's name
                try:
                    add_mask_name(self._mask_names, prediction.path)
                except ValueError as error:
                    self._skip(prediction.path, str(error))
                    continue
            self.names.append(prediction.path)
            yield prediction

    def _skip(self, path: Path, reason: str) -> None:
        """Record a skipped image for the summary, or print it at once with `watch`, which has no summary."""
        self.skipped.append(f"{str(path)!r} ({reason})")
        if self._outputs.watch:
            print_line(self._console, f"skipped {self.skipped[-1]}")


def write_features(
    out: str | Path, names: Sequence[str | Path], features: Sequence[np.ndarray], *, overwrite: bool = False
) -> Path:
    """Write features with the names of their images.

    Args:
        out: `.npz` with arrays `images` and `features`, `.npy` with only `features`, or `.parquet` with both as
            columns.
        names: Image names.
        features: Feature vectors, `[width]` each, float32.
        overwrite: Replace an existing file.

    Returns:
        Path of the file.

    Raises:
        FileExistsError: If the file exists and `overwrite` is not set.
        ValueError: If the suffix is not supported, or the vectors differ in width.
        ImportError: If the file is Parquet and pyarrow is not installed.
    """
    _check_features(str(out), overwrite=overwrite)
    path = Path(out)
    image_names = [str(name) for name in names]
    content = io.BytesIO()
    table = np.stack(features) if features else np.zeros((0, 0), np.float32)
    if path.suffix == ".npz":
        np.savez(content, images=np.array(image_names, dtype=str), features=table)
    elif path.suffix == ".npy":
        np.save(content, table)
    else:
        import pyarrow
        from pyarrow import parquet

        columns = {"images": [utf8_text(text) for text in image_names], "features": list(table)}
        parquet.write_table(pyarrow.table(columns), content)
    with create_folder(path.parent):
        write_bytes(path, content.getvalue())
    return path


def _check_features(features: str, *, overwrite: bool) -> None:
    """Check that a feature file can be written; raise the errors of `write_features` otherwise."""
    path = Path(features)
    if path.suffix not in _FEATURE_SUFFIXES:
        raise ValueError(f"features must end with {', '.join(_FEATURE_SUFFIXES)}, got {features!r}")
    if path.suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise ImportError(f"{features} needs pyarrow: pip install pyarrow, or use .npz") from error
    check_new("features", features, overwrite=overwrite)


def parse_unsure(unsure: str | None) -> Any:
    """Parse `--unsure`; raise ValueError unless it is `auto`, a number, or None."""
    if unsure in (None, "auto"):
        return unsure
    try:
        return float(str(unsure))
    except ValueError:
        raise ValueError(f"unsure must be auto or a probability in (0, 1], got {unsure!r}") from None


def _watch_predictions(
    predict_paths: Callable[[Iterable[Path]], Iterator[Any]],
    files: Sequence[Path],
    folders: Sequence[Path],
    done: set[Path],
    signals: Sequence[int],
) -> Iterator[Any]:
    """Yield predictions for files, then for new images in folders, until `signals` is no longer empty.

    Images in `done` are not predicted again. Images that cannot be read are tried again if they change.
    """
    paths = [path for path in files if path.resolve() not in done]
    polls = new_files(folders, done)
    while not signals:
        for prediction in predict_paths(takewhile(lambda _: not signals, paths)):
            done.add(prediction.path.resolve())
            yield prediction
            if signals:
                return
        paths = next(polls)


@contextlib.contextmanager
def _collect_signals(signals: list[int]) -> Iterator[None]:
    """Append received signals (SIGINT, SIGTERM) to `signals` while the block runs.

    The block must check `signals` and end soon after the first signal, which raises no exception, because an exception
    could be lost in a finalizer or leave a file incomplete. A second signal ends the block immediately.
    """

    def collect(number: int, _: Any) -> None:
        signals.append(number)
        if len(signals) > 1:
            raise KeyboardInterrupt

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # ignored signals stay ignored; a handler of None was set by C code and could not be restored
    previous = {number: handler for number, handler in previous.items() if handler not in (signal.SIG_IGN, None)}
    for number in previous:
        signal.signal(number, collect)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _images_in_rows(path: Path) -> list[Path]:
    """Return the images listed in a CSV or JSON Lines file of predictions; raise ValueError for other content."""
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        is_csv = path.suffix.lower() == ".csv"
        try:
            if is_csv:
                rows: Iterable[Any] = csv.DictReader(file)
            else:
                rows = [json.loads(line) for line in file if line.strip()]
            return [Path(row["image"]) for row in rows if row.get("image")]
        except (ValueError, AttributeError, TypeError, csv.Error) as error:
            raise ValueError(f"out={path} has rows that are not predictions: {error}; choose another file") from error


def _append_rows(predictions: Iterable[Any], out: Path, top_k: int | None, console: Console) -> None:
    """Append predictions one by one to a CSV or JSON Lines file, and print them.

    Raises:
        ValueError: If an existing CSV file has different columns.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    is_csv = out.suffix.lower() == ".csv"
    for prediction in predictions:
        content = table_bytes([prediction], out.suffix.lower(), top_k)
        header, row = content.split(b"\n", 1) if is_csv else (b"", content)
        with annotate_write_errors(out), out.open("ab+") as file:
            file.seek(max(file.seek(0, io.SEEK_END) - 1, 0))
            lacks_newline = file.read() not in (b"", b"\n")  # after the last row, e.g. because of an editor
            file.seek(0)
            stored_header = file.readline().rstrip(b"\r\n") if is_csv else header
            if stored_header not in (b"", header):
                raise ValueError(
                    f"out must have the columns {header.decode()}, got {stored_header.decode(errors='replace')} in "
                    f"{out}; choose another file"
                )
            file.write(b"\n" * lacks_newline + (row if stored_header else content))
        print_line(console, f"{prediction.path}: {prediction.text(top_k)}")
