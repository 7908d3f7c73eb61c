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
        out: File to write, ending with .safetensors.
        overwrite: Replace an existing file.
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
    """

    run: str
    report: bool = False


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
