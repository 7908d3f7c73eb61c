"""AutoGluon's `MultiModalPredictor.fit(time_limit=…)` for images, with a preset and the shared weights.

`medium_quality` and `best_quality` differ only in the backbone, which all products share, so one preset is enough.
timm's DINOv2 has a fixed size of 518 px, so the model is also registered at the job's resolution. AutoGluon requires an
older timm, which its environment contains. It trains on train, and selects and averages checkpoints on val.
"""

import json
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import common
import numpy as np
import pandas as pd
import timm
import torch
from autogluon.multimodal import MultiModalPredictor
from timm.models import register_model
from torch import nn

_NAME = "local_backbone"


def _register(job: common.Job) -> None:
    """Register the backbone at the job's resolution with timm."""
    sized = {"img_size": job.pixels} if job.weights == "dinov2s" else {}

    def create(pretrained: bool = False, **options: Any) -> nn.Module:
        options.pop("pretrained_cfg", None)
        options.pop("pretrained_cfg_overlay", None)
        return timm.create_model(common.ARCHITECTURES[job.weights], **{**options, **sized})

    create.__name__, create.__module__ = _NAME, "timm.models.vision_transformer"
    register_model(create)


def _checkpoint(job: common.Job, folder: Path) -> Path:
    """Write the weights and their configuration in AutoGluon's format for timm models."""
    folder.mkdir()
    model = job.backbone(0)
    mean, std = job.statistics()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    config = {
        "architecture": _NAME,
        "num_features": model.num_features,
        "input_size": [3, job.pixels, job.pixels],
        "mean": mean,
        "std": std,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def fit(job: common.Job) -> common.Fitted:
    """Train within the time limit."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning").setLevel(logging.ERROR)
    temporary = tempfile.TemporaryDirectory(prefix="autogluon-")
    out = Path(temporary.name)
    _register(job)

    def table(part: str) -> pd.DataFrame:
        return pd.DataFrame(
            [{"image": str(path), "label": job.classes[label]} for path, label in job.parts[part]], dtype=object
        )

    predictor = MultiModalPredictor(
        label="label", problem_type="multiclass", presets="medium_quality", path=str(out / "run"), verbosity=0
    )
    predictor.fit(
        table("train"),
        tuning_data=table("val"),
        time_limit=job.left_s(),
        seed=job.seed,
        hyperparameters={
            "model.timm_image.checkpoint_name": str(_checkpoint(job, out / "weights")),
            "env.num_gpus": 0,
            "env.num_workers": 0,
            "env.num_workers_inference": 0,
        },
    )
    stored = sum(file.stat().st_size for file in (out / "run").rglob("*.ckpt"))

    def predict(paths: list[Path]) -> np.ndarray:
        with temporary:  # deletes the run afterwards
            probabilities = predictor.predict_proba(
                pd.DataFrame({"image": [str(path) for path in paths]}, dtype=object)
            )
        return probabilities[job.classes].to_numpy()

    return common.Fitted(predict, stored, {})


if __name__ == "__main__":
    common.main("autogluon", fit, ("autogluon.multimodal",), ("default",))
