"""Shared code of the product scripts: command line, folder, backbone, clock and row.

A product is a function from a `Job` to a `Fitted`. The clock starts after the imports and stops when the function
returns; test predictions are not timed. This module does not import `snella`, because some environments lack it.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from metrics import score

ARCHITECTURES = {"dinov2s": "vit_small_patch14_dinov2", "efficientnet": "tf_efficientnet_lite0"}
PARTS = ("train", "val", "test")
FIXED = "fixed-epochs"  # variant without a time budget
FIXED_EPOCHS = 10  # the default of `snella train`
MARGIN = 0.03  # fraction of the budget reserved when choosing the number of epochs

Pairs = list[tuple[Path, int]]


@dataclass
class Job:
    """A run of a product.

    Attributes:
        parts: Files and class indices of train, val and test.
        start: Start of the clock.
    """

    folder: Path
    minutes: float
    pixels: int
    seed: int
    weights: str
    cache: Path
    variant: str
    classes: list[str] = field(default_factory=list)
    parts: dict[str, Pairs] = field(default_factory=dict)
    start: float = field(default_factory=time.perf_counter)

    def left_s(self) -> float:
        """Return the remaining seconds of the budget, minus a margin."""
        return self.minutes * 60 * (1 - MARGIN) - (time.perf_counter() - self.start)

    def backbone(self, num_classes: int = 0, **options: Any) -> nn.Module:
        """Create the timm model with the bundled weights, at the job's resolution."""
        sized = {"img_size": self.pixels} if self.weights == "dinov2s" else {}
        model = timm.create_model(ARCHITECTURES[self.weights], num_classes=num_classes, **sized, **options)
        state = load_file(self.cache / f"{self.weights}.safetensors")
        if "pos_embed" in state:
            state["pos_embed"] = resample_abs_pos_embed(
                state["pos_embed"], list(model.patch_embed.grid_size), antialias=False
            )
        state = {name: value for name, value in state.items() if not name.startswith(("head.", "classifier."))}
        absent, unknown = model.load_state_dict(state, strict=False)
        if unknown or any(not name.startswith(("head.", "classifier.")) for name in absent):
            raise ValueError(
                f"weights {self.weights} must match the model, got missing keys {absent} and unexpected keys {unknown}"
            )
        return model

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return the mean and standard deviation for normalizing images."""
        config = timm.get_pretrained_cfg(ARCHITECTURES[self.weights])
        return config.mean, config.std


@dataclass
class Fitted:
    """Result of a product: a function from files to probabilities, `[images, classes]`, and the stored size."""

    predict: Callable[[list[Path]], np.ndarray]
    stored_bytes: int
    details: dict[str, Any]


class Files(Dataset[tuple[Tensor, int]]):
    """Dataset of image files."""

    def __init__(self, pairs: Pairs, transform: Callable[[Image.Image], Tensor]) -> None:
        self.pairs, self.transform = pairs, transform

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.pairs[index]
        with Image.open(path) as image:
            return self.transform(image.convert("RGB")), label


def outputs(
    model: nn.Module, paths: list[Path], transform: Callable[[Image.Image], Tensor], batch_size: int = 64
) -> Tensor:
    """Return the model's outputs for files, in evaluation mode."""
    model.eval()
    loader = DataLoader(Files([(path, 0) for path in paths], transform), batch_size)
    with torch.inference_mode():
        return torch.cat([model(images) for images, _ in loader])


def fitting_epochs(job: Job, epoch_s: float, before_s: float = 0.0, max_epochs: int = 100) -> int:
    """Return the number of epochs that fit the remaining budget, at least 1; `FIXED_EPOCHS` for the variant `FIXED`."""
    if job.variant == FIXED:
        return FIXED_EPOCHS
    return int(min(max((job.left_s() - before_s) / epoch_s, 1), max_epochs))


def seconds_per_batch(batches: Callable[[], Any], step: Callable[[Any], None], limit_s: float) -> float:
    """Return the median seconds of a step including data loading, over up to 5 steps after a warm-up step."""
    times: list[float] = []
    start = last = time.perf_counter()
    for number, batch in enumerate(batches()):
        step(batch)
        now = time.perf_counter()
        times.append(now - last)
        last = now
        if number == 5 or now - start > limit_s:
            break
    return float(np.median(times[1:] or times))


def stored_size(model: nn.Module) -> int:
    """Return the bytes of a state dict."""
    return sum(value.numel() * value.element_size() for value in model.state_dict().values())


def main(product: str, fit: Callable[[Job], Fitted], packages: tuple[str, ...], variants: tuple[str, ...]) -> None:
    """Parse the command line, run the product, and write its row and probabilities."""
    parser = argparse.ArgumentParser(description=f"Run {product} once.")
    parser.add_argument("--folder", type=Path, required=True, help="folder with train/, val/ and test/")
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--pixels", type=int, default=70)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", choices=sorted(ARCHITECTURES), default="dinov2s")
    parser.add_argument("--cache", type=Path, required=True, help="output folder of weights.py")
    parser.add_argument("--variant", default=variants[0], help=", ".join(variants))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--out", type=Path, required=True, help="row.json; probabilities are written next to it as .npy"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    classes = sorted(path.name for path in (args.folder / "train").iterdir() if path.is_dir())
    parts = {
        part: [
            (file, label)
            for label, name in enumerate(classes)
            for file in sorted((args.folder / part / name).glob("*"))
        ]
        for part in PARTS
    }
    job = Job(args.folder, args.minutes, args.pixels, args.seed, args.weights, args.cache, args.variant, classes, parts)
    fitted = fit(job)
    seconds = time.perf_counter() - job.start
    paths, labels = [path for path, _ in parts["test"]], np.array([label for _, label in parts["test"]])
    probabilities = fitted.predict(paths)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    np.save(args.out.with_suffix(".npy"), probabilities.astype(np.float32))
    row = {
        "product": product if args.variant == variants[0] else f"{product}-{args.variant}",
        "folder": args.folder.name, "minutes": args.minutes, "pixels": args.pixels, "seed": args.seed,
        "weights": args.weights, "threads": args.threads, **score(probabilities.astype(np.float64), labels),
        "seconds": round(seconds, 2), "peak_mib": peak_mib(), "stored_bytes": fitted.stored_bytes,
        "classes": len(classes), "images": {part: len(parts[part]) for part in PARTS}, "details": fitted.details,
        "command": " ".join(arg.rpartition("/")[2] for arg in sys.argv), "machine": machine(), "commit": commit(),
        "versions": {name: installed(name) for name in ("torch", "timm", *packages)},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    args.out.write_text(json.dumps(row) + "\n")


def peak_mib() -> int:
    """Return the peak resident memory of this process (VmHWM); ru_maxrss would include the parent before exec."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM:"))


def machine() -> str:
    """Return CPU model and number of cores."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def commit() -> str:
    """Return the commit of the working tree, followed by `+` if modified."""
    where = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=where, capture_output=True, text=True).stdout
    changed = subprocess.run(["git", "status", "--short", "-uno"], cwd=where, capture_output=True, text=True).stdout
    return head.strip() + ("+" if changed else "")


def installed(name: str) -> str:
    """Return the version of a package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
