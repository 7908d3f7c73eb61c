"""Run folders with real adapters on test_vit and their JSON files."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from snella_app.methods import build_method, save_trained
from snella_app.records.record import write
from snella_app.records.run import BackboneInfo, DataInfo, RunInfo
from snella_app.runs.model import make_backbone

OLD_RUN = Path(__file__).parents[2] / "old_files" / "run"


@pytest.fixture
def old_run(tmp_path):
    """Return a finished SNELLA run of two epochs, written by commit 99db782."""
    return Path(shutil.copytree(OLD_RUN, tmp_path / "snella"))


@pytest.fixture
def save_run(tmp_path):
    """Return a function that writes a run folder with a random adapter on test_vit."""

    def make(name, method="lora-2", seed=0):
        backbone = BackboneInfo("test_vit", pretrained=False, img_size=32, num_classes=10, seed=0)
        model = build_method(method, make_backbone(backbone))
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(std=0.05)
        save_trained(model, tmp_path / name / "adapter")
        data_config = json.loads((OLD_RUN / "run.json").read_text())["data_config"]
        info = RunInfo(
            method=method,
            backbone=backbone,
            classes=[str(digit) for digit in range(10)],
            data=DataInfo("digits", seed=0),
            data_config=data_config,
            status="running",
        )
        write(info, tmp_path / name)
        return tmp_path / name

    return make
