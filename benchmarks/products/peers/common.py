"""What the peers share: the command line, the folder, the backbone, the clock and the row.

A peer is a function from a `Job` to a `Fitted`. The clock starts after the imports and ends when the function returns;
predicting the test images is not counted. The environments of the peers lack `snella`, so nothing here needs it.
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
MARGIN = 0.03  # share of the budget that is kept back when the number of epochs is chosen

Pairs = list[tuple[Path, int]]


@dataclass
class Job:
    """One run of a peer.

    Attributes:
        parts: Files and class numbers of train, val and test.
        began: When the clock started.
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
    began: float = field(default_factory=time.perf_counter)

    def left_s(self) -> float:
        """Seconds of the budget that are left, without the margin."""
        return self.minutes * 60 * (1 - MARGIN) - (time.perf_counter() - self.began)

    def backbone(self, num_classes: int = 0, **options: Any) -> nn.Module:
        """The timm model with the bundled weights, at the job's resolution."""
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
            raise ValueError(f"weights {self.weights}: absent {absent}, unknown {unknown}")
        return model

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation that the backbone's images are normalized with."""
        config = timm.get_pretrained_cfg(ARCHITECTURES[self.weights])
        return config.mean, config.std


@dataclass
class Fitted:
    """What a peer ends with: probabilities `[images, classes]` of files, and the size of what is stored."""

    predict: Callable[[list[Path]], np.ndarray]
    stored_bytes: int
    details: dict[str, Any]


class Files(Dataset[tuple[Tensor, int]]):
    """Images of files."""

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
    """What the model says about files, in evaluation mode."""
    model.eval()
    loader = DataLoader(Files([(path, 0) for path in paths], transform), batch_size)
    with torch.inference_mode():
        return torch.cat([model(images) for images, _ in loader])


def fitting_epochs(job: Job, epoch_s: float, before_s: float = 0.0, most: int = 100) -> int:
    """The number of epochs that the rest of the budget has room for, at least 1."""
    return int(min(max((job.left_s() - before_s) / epoch_s, 1), most))


def seconds_per_batch(batches: Callable[[], Any], step: Callable[[Any], None], limit_s: float) -> float:
    """Seconds that loading a batch and a step on it take: the median of up to 5 after a first one."""
    times: list[float] = []
    began = last = time.perf_counter()
    for number, batch in enumerate(batches()):
        step(batch)
        now = time.perf_counter()
        times.append(now - last)
        last = now
        if number == 5 or now - began > limit_s:
            break
    return float(np.median(times[1:] or times))


def stored_size(model: nn.Module) -> int:
    """Bytes of a state dict."""
    return sum(value.numel() * value.element_size() for value in model.state_dict().values())


def main(product: str, fit: Callable[[Job], Fitted], packages: tuple[str, ...], variants: tuple[str, ...]) -> None:
    """Read the command line, run the peer, and write its row and probabilities."""
    parser = argparse.ArgumentParser(description=f"One run of {product}.")
    parser.add_argument("--folder", type=Path, required=True, help="with train/, val/ and test/")
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--pixels", type=int, default=70)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", choices=sorted(ARCHITECTURES), default="dinov2s")
    parser.add_argument("--cache", type=Path, required=True, help="folder of weights.py's files")
    parser.add_argument("--variant", default=variants[0], help=", ".join(variants))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="row.json; probabilities go beside it, as .npy")
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
    seconds = time.perf_counter() - job.began
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
        "command": " ".join(word.rpartition("/")[2] for word in sys.argv), "machine": machine(), "commit": commit(),
        "versions": {name: installed(name) for name in ("torch", "timm", *packages)},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    args.out.write_text(json.dumps(row) + "\n")


def peak_mib() -> int:
    """Peak resident memory of this process (VmHWM); ru_maxrss would include the parent's before exec."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM:"))


def machine() -> str:
    """The processor and the number of its cores."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def commit() -> str:
    """The commit of the working tree, `+` if it is changed."""
    where = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=where, capture_output=True, text=True).stdout
    changed = subprocess.run(["git", "status", "--short", "-uno"], cwd=where, capture_output=True, text=True).stdout
    return head.strip() + ("+" if changed else "")


def installed(name: str) -> str:
    """The version of a package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
