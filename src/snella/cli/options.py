"""What each command but `train` is told."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class EvaluateOptions:
    """Settings of `snella evaluate`.

    Args:
        run: Folder of the run.
        data: Other images than the run's own, e.g. folder:more-photos; their classes must be among the run's.
        split: Part of the data: train, val, test or all. auto is the run's test images, or all images of other data.
        batch_size: Images at a time.
        skip_broken: Go on without images that cannot be read.
        out: Also write the results to this JSON file.
        device: auto, cpu or cuda.
    """

    run: str
    data: str | None = None
    split: Literal["auto", "train", "val", "test", "all"] = "auto"
    batch_size: int = 32
    skip_broken: bool = False
    out: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass
class PredictOptions:
    """Settings of `snella predict`.

    Args:
        run: Folder of the run.
        images: Image files, or folders of them.
        out: Write a CSV file instead of a table.
        overwrite: Replace an existing file.
        top_k: So many classes for each image, the likeliest first; if not given, all in the CSV file and three in the
            table.
        batch_size: Images at a time.
        skip_broken: Leave out images that cannot be read.
        device: auto, cpu or cuda.
    """

    run: str
    images: list[str] = field(default_factory=list)
    out: str | None = None
    overwrite: bool = False
    top_k: int | None = None
    batch_size: int = 32
    skip_broken: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass
class MergeOptions:
    """Settings of `snella merge`.

    Args:
        run: Folder of the run.
        out: Folder for a model in timm's format, with preprocessing and class names; or a file ending with
            .safetensors, for the weights alone.
        overwrite: Replace what is there.
    """

    run: str
    out: str
    overwrite: bool = False


@dataclass
class InspectOptions:
    """Settings of `snella inspect`.

    Args:
        run: Folder of the run.
        report: Also write the report page anew.
        backbone: Instead of a run, a model whose training step's memory is predicted; a name as for snella train.
        batch: With --backbone, images per step (32 if not given).
        img_size: With --backbone, side of the input image in pixels; the model's own if not given.
        r: With --backbone, rank of SNELLA and LoRA (8).
        dtype: With --backbone, of weights and activations, fp32 or bf16 (fp32).
        device: With --backbone, where training is to run, cpu or cuda; it need not be in this machine.

    Raises:
        ValueError: Neither or both of `run` and `backbone`, or an option of the other one.
    """

    run: str | None = None
    report: bool = False
    backbone: str | None = None
    batch: int | None = None
    img_size: int | None = None
    r: int | None = None
    dtype: Literal["fp32", "bf16"] | None = None
    device: Literal["cpu", "cuda"] | None = None

    def __post_init__(self) -> None:
        """Report everything that does not go together at once."""
        faults = []
        if (self.run is None) == (self.backbone is None):
            got = "neither" if self.run is None else f"RUN {self.run} and --backbone {self.backbone}"
            faults.append(f"inspect takes either RUN, the folder of a run, or --backbone NAME, got {got}")
        if self.backbone is not None and self.report:
            faults.append("--report draws the page of a run; leave it out with --backbone")
        of_backbone = {name: getattr(self, name) for name in ("batch", "img_size", "r", "dtype", "device")}
        given = [f"--{name.replace('_', '-')} {value}" for name, value in of_backbone.items() if value is not None]
        if self.backbone is None and given:
            faults.append(f"{', '.join(given)} can only be given with --backbone NAME")
        if faults:
            raise ValueError("; ".join(faults))


@dataclass
class DataOptions:
    """Settings of `snella data`.

    Args:
        action: check.
        folder: Folder of VTAB-1k or FGVC, of one data set of theirs, or one with vtab-1k and fgvc inside.
        decode: Also decode every image, which takes minutes, to find broken ones.
    """

    action: Literal["check"]
    folder: str
    decode: bool = False


@dataclass
class CompareOptions:
    """Settings of `snella compare`.

    Args:
        out: Folder of the comparison; an existing one is gone on with.
        experiment: YAML file, or the name of an experiment that ships with snella; the options below go before it.
        methods: Contenders, e.g. linear,lora-8,snella-8.
        data: Tasks, e.g. elpv,digits,folder:photos.
        backbone: Pre-trained model, as for snella train.
        seeds: Final runs of each method on each task (3 if neither this nor the experiment says).
        tune_seeds: Seeds of each trial of the rates (1).
        lr_factors: Grid of learning rates, times each method's default, e.g. 0.1,0.3,1,3,10.
        weight_decays: Grid of weight decays, tried at the best learning rate, e.g. 0,0.1; none for the defaults alone.
        extensions: While the best value lies on the edge, the grid grows, at most so often (2).
        reference: Method that others are compared to in pairs; the first LoRA if not given.
        forgetting: Data whose linear probe shows what the features forget, e.g. stamps,digits; none for nothing.
        epochs: Passes over the training images, the same for all methods.
        batch_size: Images per step.
        img_size: Side of the input image in pixels.
        train_size: Training images of each task.
        val_size: Validation images of each task.
        test_size: Test images of each task, at most.
        augment: Random changes to training images: none, flip, or crop.
        head_start: What every method's classifier head starts from: random values, or probe, the linear probe; auto is
            probe for up to 5,000 training images.
        ema: Measure and keep an exponential moving average of what each method trains, with this decay, e.g. 0.9998.
        weights: Weight file for a backbone that is given by its architecture's name.
        pretrained: Load pre-trained weights; false starts from random ones, for tests.
        device: auto, cpu or cuda.
        precision: fp32, or bf16 for autocast.
        workers: Cells at a time, each in a process of its own; 0 trains all in this process.
        threads: Threads of each; the machine's processors shared out if not given.
        ray: Give the cells to Ray, on the cluster that RAY_ADDRESS names or on this machine.
        retry_failed: Train failed cells again.
        draw_only: Train nothing; draw table and page from the rows that there are.
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
    device: Literal["auto", "cpu", "cuda"] | None = None
    precision: Literal["fp32", "bf16"] | None = None
    workers: int = 1
    threads: int | None = None
    ray: bool = False
    retry_failed: bool = False
    draw_only: bool = False


@dataclass
class DemoOptions:
    """Settings of `snella demo`.

    Args:
        out: Folder for SNELLA's run; the others go into its subfolders.
        overwrite: Replace earlier runs there.
        epochs: Epochs of each method; the demonstration's own if not given.
        seed: Decides the split, the initial values and the order of the images.
        device: auto, cpu or cuda.
    """

    out: str = "runs/demo"
    overwrite: bool = True
    epochs: int | None = None
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
