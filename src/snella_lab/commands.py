"""Commands of analyses, comparisons and recipes: functions whose signature and docstring are their command line."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from snella_app.cli.command import Device, command, listed
from snella_lab.recipes.dreambooth.config import DreamBoothConfig
from snella_lab.recipes.instruct.config import LanguageConfig

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@command("snella_lab.analysis", is_research=True)
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
        device: auto, or a device of torch such as cpu, cuda:1 or mps (features, masks, gradcam).
        overwrite: Replace files of the same names.
    """
    import inspect

    from snella_app.console import make_console, print_line
    from snella_lab.analysis import plot_function, write_plots

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
    """Fit random matrices by the kernels: how expressive each is, and whether its gradient vanishes.

      snella fit-matrix --out runs/kernels
      snella fit-matrix --out runs/kernels-paper --preset paper
      snella fit-matrix --out runs/mine --kernels linear,mix_k,mymodule:my_kernel

    Curves of the kernels, error against the rank of the matrix, gradient over the steps, as SVG, PNG and CSV. An
    interrupted call is resumed by the same line.

    Args:
        out: Folder for the files; created.
        preset: quick takes minutes; paper has Adam at 1e-4 and 100,000 steps, and takes half an hour.
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

    from snella_app.console import make_console, make_table
    from snella_lab.analysis.matrix_fit import PRESETS, fit_matrices
    from snella_lab.analysis.plot import write_plots

    values: dict[str, Any] = dict(size=size, matrices=matrices, r=r, steps=steps, lr=lr, seed=seed)
    values["ranks"] = None if ranks is None else tuple(listed("ranks", ranks, int))
    values["kernels"] = None if kernels is None else tuple(listed("kernels", kernels, str))
    config = replace(PRESETS[preset], **{name: value for name, value in values.items() if value is not None})
    console = make_console()
    with console.status("") as status:
        plots = fit_matrices(config, out, lambda name, step: status.update(f"{name}: step {step} of {config.steps}"))
    paths = write_plots(plots, out, overwrite=overwrite)
    errors, shapes = plots[1].rows, plots[0].tables["definiteness"]
    columns = ("kernel", *(f"rank {rank}" for rank in config.ranks), "smallest eigenvalue")
    cells = []
    for kernel, shape in zip(config.kernels, shapes, strict=True):
        found = (f"{row['mse']:.4f}" for row in errors if row["kernel"] == kernel)
        cells.append((kernel, *found, f"{shape['smallest']:.3g}"))
    title = f"mean squared error after {config.steps:,} steps, r={config.r}"
    console.print(make_table(columns, cells, title=title))
    _print_plots(console, paths)


def _print_plots(console: "Console", paths: Iterable[Path]) -> None:
    """Print the files of plots, each once: the tables, and the vector graphics for light pages."""
    from snella_app.console import print_line

    for path in paths:
        if path.suffix in (".csv", ".svg") and not path.stem.endswith("-dark"):
            print_line(console, str(path))


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
        head_init: Initialization of every method's classifier head: random values, or probe, the linear probe; auto is
            probe for less than 100 steps.
        ema: Decay of an exponential moving average of the trained parameters, which is evaluated and kept, e.g. 0.9998.
        task: classification, multilabel (methods are compared by mean average precision), ordinal (by quadratic
            weighted kappa) or regression (by R²).
        monitor: Metric on validation that epochs are selected by, as for snella train; balanced_accuracy, and macro_f1
            of several labels, is also what methods are compared by.
        columns: Columns of tables, e.g. path=file,label=species, as for snella train.
        channels: Channels of an image.
        skip_corrupt: Skip images that cannot be read.
        weights: Weight file for a backbone that is given by its architecture's name.
        pretrained: Load pre-trained weights; false starts from random ones, for tests.
        device: auto, or a device of torch such as cpu, cuda:1 or mps.
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
    head_init: Literal["auto", "random", "probe"] | None = None
    ema: float | None = None
    task: Literal["classification", "multilabel", "ordinal", "regression"] | None = None
    monitor: str | None = None
    columns: str | None = None
    channels: int | None = None
    skip_corrupt: bool | None = None
    weights: str | None = None
    pretrained: bool | None = None
    device: Device | None = None
    precision: Literal["fp32", "bf16"] | None = None
    workers: int = 1
    threads: int | None = None
    ray: bool = False
    retry_failed: bool = False
    draw_only: bool = False


@command("snella_lab.comparison.compare")
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
    from snella_lab.comparison.compare import compare
    from snella_lab.comparison.experiment_files import experiment_from_args

    compare(
        experiment_from_args(asdict(options)),
        options.out,
        workers=options.workers,
        threads=options.threads,
        ray=options.ray,
        retry_failed=options.retry_failed,
        draw_only=options.draw_only,
    )


@command("snella_lab.recipes.dreambooth", is_research=True)
def dreambooth(config: DreamBoothConfig) -> None:
    """Teach Stable Diffusion 3 one subject from a few images of it.

      snella dreambooth --data folder:photos/my-dog --class-name dog --pipeline sd3-medium --out runs/my-dog
      snella dreambooth --data dreambooth:dreambooth/dataset --subject dog6 --pipeline sd3-medium --out runs/dog6
      snella dreambooth --out runs/dog6 --resume

    sd3-medium is a folder in diffusers' format. The run's folder receives the adapter, sample images and report.html.
    """
    from snella_lab.recipes.dreambooth import personalize

    personalize(config)


@command("snella_lab.recipes.dreambooth.generate", is_research=True)
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
        device: auto, or a device of torch such as cpu, cuda:1 or mps.
    """
    from snella_app.console import counted, make_console, print_line
    from snella_lab.recipes.dreambooth.generate import generate, select_prompts

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


@command("snella_lab.recipes.dreambooth", is_research=True)
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
        device: auto, or a device of torch such as cpu, cuda:1 or mps.
    """
    from snella_app.console import make_console
    from snella_app.files import write_json
    from snella_lab.recipes.dreambooth import evaluate_generation

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


@command("snella_lab.bench.doctor")
def doctor(*, steps: bool = True, out: str | None = None) -> None:
    """Check that this machine computes correctly, and how fast.

      snella doctor
      snella doctor --out doctor.json

    Prints the devices and versions, compares each backend on each device with a float64 reference, and times a training
    step of a ViT-B with LoRA, full fine-tuning and SNELLA.

    Args:
        steps: Time training steps; --steps false only checks the results.
        out: JSON file for the results, to send with a report of an error.
    """
    from snella_lab.bench.doctor import diagnose

    if diagnose(time_steps=steps, out=out).wrong:
        raise SystemExit(1)


@command("snella_lab.bench", is_research=True)
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
        methods: frozen, lora, dora, shira, full, klora, spt-lora, spt-adapter, snell, snella, paper and variants of
            snella; ratios are relative to lora.
        r: Ranks.
        sparsity: Fractions of the adapted weights that SNELLA leaves as they are.
        dtype: fp32, bf16, of weights and activations alike.
        device: cpu, cuda or cuda:1.
        rounds: Steps of each method, of which medians are reported; 0 counts what is kept and takes none.
        memory: Also measure the peak memory of each method.
        grid: Every backbone, batch, rank, sparsity and dtype instead; takes hours.
        out: JSON lines file to append to.
        figures: Folder for the figures of all rows in --out.
    """
    from snella_lab.bench import BenchConfig
    from snella_lab.bench import bench as run_bench
    from snella_lab.bench import grid as run_grid

    if grid:
        run_bench(run_grid(device, out))
        return
    run_bench(
        BenchConfig(
            backbones=listed("backbones", backbones, str),
            batch=listed("batch", batch, int),
            methods=listed("methods", methods, str),
            r=listed("r", r, int),
            sparsity=listed("sparsity", sparsity, float),
            dtype=listed("dtype", dtype, str),
            device=device,
            rounds=rounds,
            memory=memory,
            out=out,
            figures=figures,
        )
    )


@command("snella_lab.recipes.instruct", is_research=True)
def language(config: LanguageConfig) -> None:
    """Fine-tune a causal language model on instructions.

      snella language --data commonsense_170k.json --model Llama-2-7b-hf --out runs/llama
      snella language --out runs/llama --resume

    commonsense_170k.json holds a list of objects with instruction, input, output and answer.
    """
    from snella_lab.recipes.instruct import fine_tune

    fine_tune(config)


@command("snella_lab.recipes.instruct", is_research=True)
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
        device: auto, or a device of torch such as cpu, cuda:1 or mps.
    """
    from snella_app.console import make_console, make_table
    from snella_lab.recipes.instruct import evaluate_language

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
    counts = ("right", "questions", "unanswered")
    rows = result["tasks"].items()
    cells = ((task, f"{row['accuracy']:.4f}", *(str(row[name]) for name in counts)) for task, row in rows)
    table = make_table(("task", "accuracy", *counts), cells)
    table.add_section()
    table.add_row("mean of tasks", f"{result['mean']:.4f}", "", "", "")
    make_console().print(table)


@command("snella_lab.recipes.demo")
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
        device: auto, or a device of torch such as cpu, cuda:1 or mps.
    """
    from snella_lab.recipes.demo import run_demo

    changes: dict[str, Any] = {"seed": seed} | ({} if epochs is None else {"epochs": epochs})
    run_demo(out, overwrite=overwrite, device=device, **changes)


def _generation_table(result: dict[str, Any]) -> "Table":
    """One row a subject, then mean and standard error over subjects."""
    from snella_app.console import make_table

    names = list(result["mean"])
    cells = ((row["subject"], row["method"], *(f"{row[name]:.4f}" for name in names)) for row in result["runs"])
    title = "alignments are cosines of CLIP embeddings, Vendi scores are of DINOv2's"
    table = make_table(("subject", "method", *(name.replace("_", " ") for name in names)), cells, title=title, left=2)
    if len(result["runs"]) > 1:
        table.add_section()
        table.add_row("mean", "", *(f"{result['mean'][name]:.4f}" for name in names))
        table.add_row("standard error", "", *(f"{result['standard_error'][name]:.4f}" for name in names))
    return table
