"""Lab commands. Their signatures and docstrings define the command line."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from snella_app.cli.command import Device, command
from snella_lab.analysis.plot import PlotOptions
from snella_lab.comparison.options import CompareOptions
from snella_lab.recipes.dreambooth.config import DreamBoothConfig, EvaluateGenerationOptions, GenerateOptions
from snella_lab.recipes.instruct.config import EvaluateLanguageOptions, LanguageConfig

if TYPE_CHECKING:
    from rich.console import Console


@command("snella_lab.analysis.plot", is_research=True)
def plot(options: PlotOptions) -> None:
    """Plot results of runs as SVG and PNG, with data as CSV.

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
      snella plot images photos/my-dog images --out plots

    allocation plots the sparsity of each layer; evolution plots sparsity, importance and total budget during training.
    update plots the update of one matrix and its singular values; overlap compares the updates of several tasks.
    features plots a t-SNE of each model's features; radar plots the scores of methods by task group. memory plots
    memory use during training steps. samples, masks and images show data, predicted segmentation masks and generated
    images. gradcam shows class activation maps of the true class.
    """
    from snella_app.console import make_console, print_line
    from snella_lab.analysis.plot import make_plots, write_plots

    console = make_console()
    plots = make_plots(options)
    paths = write_plots(plots, options.out, overwrite=options.overwrite)
    for note in (note for plot in plots for note in plot.notes):
        print_line(console, note)
    _print_plots(console, paths)


@command("snella_lab.analysis.matrix_fit", is_research=True)
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
    """Fit random matrices with each kernel to compare expressivity and gradients.

      snella fit-matrix --out runs/kernels
      snella fit-matrix --out runs/kernels-paper --preset paper
      snella fit-matrix --out runs/mine --kernels linear,mix_k,mymodule:my_kernel

    Writes kernel curves, error versus matrix rank and gradient norm versus step as SVG, PNG and CSV. Run the same
    command again to resume an interrupted fit.

    Args:
        out: Output folder; created if missing.
        preset: quick takes minutes; paper trains 100,000 steps with Adam at 1e-4 and takes half an hour.
        kernels: Comma-separated kernels: built-in names, or module:name of a Kernel subclass or a function of A and B;
            defaults to all built-in kernels.
        size: Rows and columns of the matrices; default 48.
        ranks: Ranks of the matrices; default 4,8,16,32,48.
        matrices: Number of random matrices per rank; default 10.
        r: Rank of the learnable factors; default 8.
        steps: Number of Adam steps; defaults to the preset's value.
        lr: Learning rate; defaults to the preset's value.
        seed: Seed for the matrices and initial factors; default 0.
        overwrite: Overwrite existing figures and tables.
    """
    options = _given_options(locals(), "out", "preset", "overwrite")
    from snella_app.console import make_console, make_table
    from snella_lab.analysis.matrix_fit import PRESETS, fit_matrices
    from snella_lab.analysis.plot import write_plots

    kinds: dict[str, Any] = {"ranks": int, "kernels": str}
    options |= {name: tuple(_parse_list(name, options[name], kinds[name])) for name in kinds.keys() & options.keys()}
    config = replace(PRESETS[preset], **options)
    console = make_console()
    with console.status("") as status:
        plots = fit_matrices(config, out, lambda name, step: status.update(f"{name}: step {step} of {config.steps}"))
    paths = write_plots(plots, out, overwrite=overwrite)
    error_rows = plots[1].rows
    definiteness_rows = plots[0].tables["definiteness"]
    columns = ("kernel", *(f"rank {rank}" for rank in config.ranks), "smallest eigenvalue")
    cells = []
    for kernel, definiteness in zip(config.kernels, definiteness_rows, strict=True):
        values_by_rank = (f"{row['mse']:.4f}" for row in error_rows if row["kernel"] == kernel)
        cells.append((kernel, *values_by_rank, f"{definiteness['smallest']:.3g}"))
    title = f"mean squared error after {config.steps:,} steps, r={config.r}"
    console.print(make_table(columns, cells, title=title))
    _print_plots(console, paths)


def _given_options(values: dict[str, Any], *excluded: str) -> dict[str, Any]:
    """Return the values that are set, except those in `excluded`.

    `values` are the `locals()` of a command before its first assignment, i.e. its arguments.
    """
    return {name: value for name, value in values.items() if value is not None and name not in excluded}


def _print_plots(console: "Console", paths: Iterable[Path]) -> None:
    """Print the paths of the CSV tables and the light-mode SVG figures."""
    from snella_app.console import print_line

    for path in paths:
        if path.suffix in (".csv", ".svg") and not path.stem.endswith("-dark"):
            print_line(console, str(path))


@command("snella_lab.comparison.compare")
def compare(options: CompareOptions) -> None:
    r"""Compare methods tuned on the validation set and evaluated once on the test set.

      snella compare --methods linear,lora-8,snella-8 --data elpv,digits --backbone NAME --img-size 56 \
          --out runs/compare
      snella compare --experiment quick --out runs/quick --workers 2
      snella compare --out runs/compare
      snella compare --out runs/compare --draw-only
      snella compare --experiment bundled-suite --out runs/suite --emit slurm

    The third command resumes the first; several processes can run it at the same time. The folder receives
    comparison.html and results.jsonl, which has one row per run.
    """
    from snella_lab.comparison.compare import compare
    from snella_lab.comparison.experiment_files import experiment_from_options

    compare(experiment_from_options(options), options.out, options.execution)


@command("snella_lab.recipes.dreambooth.train", is_research=True)
def dreambooth(config: DreamBoothConfig) -> None:
    """Fine-tune Stable Diffusion 3 on a few images of a subject (DreamBooth).

      snella dreambooth --data folder:photos/my-dog --class-name dog --pipeline sd3-medium --out runs/my-dog
      snella dreambooth --data dreambooth:dreambooth/dataset --subject dog6 --pipeline sd3-medium --out runs/dog6
      snella dreambooth --out runs/dog6 --resume

    sd3-medium is a folder in diffusers format. The run folder receives the adapter, sample images and report.html.
    """
    from snella_lab.recipes.dreambooth.train import personalize

    personalize(config)


@command("snella_lab.recipes.dreambooth.generate", is_research=True)
def generate(options: GenerateOptions) -> None:
    """Generate images with the adapter of a snella dreambooth run.

      snella generate runs/my-dog --prompt "a photo of sks dog on the beach" --out images
      snella generate runs/my-dog --prompts prompts.txt --images-per-prompt 2 --out images

    An image depends only on its prompt and seed.
    """
    from snella_app.console import counted, make_console, print_line
    from snella_lab.recipes.dreambooth.generate import generate

    images = generate(options)
    print_line(make_console(), f"{counted(len(images), 'image')}: {options.out}")


@command("snella_lab.recipes.dreambooth.evaluate", is_research=True)
def evaluate_generation(options: EvaluateGenerationOptions) -> None:
    """Evaluate subject fidelity, text alignment and diversity on DreamBooth's prompts.

      snella evaluate-generation runs/dog6 --clip clip-vit-base-patch32 --dino dinov2-base
      snella evaluate-generation runs/table6 --clip clip-vit-base-patch32 --dino dinov2-base --out table6.json

    By default, four images are generated for each of 25 prompts. The second command evaluates every run in a folder.
    Run the same command again to resume an interrupted evaluation.
    """
    from snella_app.console import make_console, make_table
    from snella_app.files import write_json
    from snella_lab.recipes.dreambooth.evaluate import evaluate_generation

    if options.out is not None:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    result = evaluate_generation(options)
    names = list(result["mean"])
    columns = [name.replace("_", " ") for name in names]
    cells: list[tuple[str, ...]] = []
    for row in result["runs"]:
        scores = [f"{row[name]:.4f}" for name in names]
        cells.append((row["subject"], row["method"], *scores))
    title = "alignment: cosine similarity of CLIP embeddings; Vendi score: DINOv2 embeddings"
    table = make_table(("subject", "method", *columns), cells, title=title, left=2)
    if len(result["runs"]) > 1:
        table.add_section()
        table.add_row("mean", "", *(f"{result['mean'][name]:.4f}" for name in names))
        table.add_row("standard error", "", *(f"{result['standard_error'][name]:.4f}" for name in names))
    make_console().print(table)
    if options.out is not None:
        write_json(Path(options.out), result)


@command("snella_lab.bench.doctor")
def doctor(*, steps: bool = True, out: str | None = None) -> None:
    """Check the numerical correctness and speed of this machine's backends.

      snella doctor
      snella doctor --out doctor.json

    Prints devices and versions, compares each backend on each device with a float64 reference, and times merging and a
    ViT-B training step with LoRA, full fine-tuning and SNELLA.

    Args:
        steps: Time training steps and merging; --steps false only checks correctness.
        out: JSON file for the results, to attach to a bug report.
    """
    from snella_lab.bench.doctor import diagnose

    if diagnose(time_steps=steps, out=out).wrong:
        raise SystemExit(1)


@command("snella_lab.bench.bench", is_research=True)
def bench(
    *,
    backbones: str | None = None,
    batch: str | None = None,
    methods: str | None = None,
    r: str | None = None,
    sparsity: str | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    rounds: int = 5,
    memory: bool = False,
    grid: bool = False,
    out: str | None = None,
    figures: str | None = None,
) -> None:
    """Benchmark training steps of SNELLA, LoRA, full fine-tuning and other methods.

      snella bench
      snella bench --backbones vit_small_patch16_224,vit_base_patch16_224 --memory --out rows.jsonl --figures .
      snella bench --device cuda --dtype bf16 --batch 64 --methods lora,full,snella,paper

    Lists are comma-separated; all combinations are measured.

    Args:
        backbones: timm model names; weights are random; defaults to vit_base_patch16_224.
        batch: Batch sizes; defaults to 4,16.
        methods: frozen, lora, dora, shira, full, gps, klora, spt-lora, spt-adapter, snell, snella, paper or a variant
            such as snella-eager or lora-recompute; ratios are relative to lora; defaults to frozen,lora,full,snella.
        r: Ranks; defaults to 8.
        sparsity: Target sparsities; defaults to 0.7.
        dtype: Dtypes of weights and activations: fp32 or bf16; defaults to fp32.
        device: auto, or a torch device: cpu, cuda or cuda:1.
        rounds: Timed steps per method, reported as medians; 0 only counts saved activations and parameters.
        memory: Also measure peak memory.
        grid: Measure a grid of backbones, batch sizes, methods, ranks, sparsities and dtypes instead; takes hours.
        out: JSON Lines file to append to.
        figures: Folder for figures of all rows in --out.
    """
    options = _given_options(locals(), "grid")
    from snella_lab.bench import bench as library

    kinds = {"backbones": str, "batch": int, "methods": str, "r": int, "sparsity": float, "dtype": str}
    if grid:
        if given := sorted(kinds.keys() & options.keys()):
            raise ValueError(f"grid sets {', '.join(given)} itself; leave them out, or leave out grid")
        library.bench(replace(library.grid(device, out), rounds=rounds, memory=rounds > 0, figures=figures))
        return
    options |= {name: _parse_list(name, options[name], kinds[name]) for name in kinds.keys() & options.keys()}
    library.bench(library.BenchConfig(**options))


@command("snella_lab.recipes.instruct.train", is_research=True)
def language(config: LanguageConfig) -> None:
    """Fine-tune a causal language model on instructions.

      snella language --data commonsense_170k.json --model Llama-2-7b-hf --out runs/llama
      snella language --out runs/llama --resume

    commonsense_170k.json contains a list of objects with the fields instruction, input, output and answer.
    """
    from snella_lab.recipes.instruct.train import fine_tune

    fine_tune(config)


@command("snella_lab.recipes.instruct.evaluate", is_research=True)
def evaluate_language(options: EvaluateLanguageOptions) -> None:
    """Evaluate a fine-tuned language model on the commonsense benchmark.

      snella evaluate-language runs/llama --data dataset
      snella evaluate-language runs/llama --data dataset --limit 100

    dataset contains TASK/test.json. Run the same command again to resume an interrupted evaluation.
    """
    from snella_app.console import make_console, make_table
    from snella_lab.recipes.instruct.evaluate import evaluate_language

    result = evaluate_language(options)
    count_names = ("right", "questions", "unanswered")
    cells: list[tuple[str, ...]] = []
    for task, row in result["tasks"].items():
        row_counts = [str(row[name]) for name in count_names]
        cells.append((task, f"{row['accuracy']:.4f}", *row_counts))
    table = make_table(("task", "accuracy", *count_names), cells)
    table.add_section()
    table.add_row("mean of tasks", f"{result['mean']:.4f}", "", "", "")
    make_console().print(table)


@command("snella_lab.recipes.demo")
def demo(
    *,
    out: str = "runs/demo",
    overwrite: bool = False,
    epochs: int | None = None,
    seed: int = 0,
    device: Device = "auto",
) -> None:
    """Compare a linear probe, LoRA and SNELLA on handwritten digits.

      snella demo
      snella demo --out runs/demo

    Args:
        out: Run folder of SNELLA; the other methods use subfolders.
        overwrite: Replace earlier runs.
        epochs: Training epochs per method; defaults to the demo's settings.
        seed: Seed for data split, initialization and data order.
        device: auto, or a torch device such as cpu, cuda:1 or mps.
    """
    from snella_lab.recipes.demo import run_demo

    changes: dict[str, Any] = {"seed": seed} | ({} if epochs is None else {"epochs": epochs})
    run_demo(out, overwrite=overwrite, device=device, **changes)


def _parse_list(name: str, value: str, kind: Callable[[str], Any]) -> list[Any]:
    """Parse a comma-separated list, and raise a ValueError for an invalid item or an empty list."""
    items = [item.strip() for item in value.split(",") if item.strip()]
    if not items:
        raise ValueError(f"{name} must contain at least one item, got {value!r}")
    try:
        return [kind(item) for item in items]
    except ValueError:
        noun, example = ("integers", "4,16") if kind is int else ("numbers", "0.7,0.9")
        raise ValueError(f"{name} must be {noun} separated by commas, e.g. {example}; got {value!r}") from None
