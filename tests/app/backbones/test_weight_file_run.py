"""Run with a weight file as the backbone, from training to the merged file that timm loads."""

import io

import pytest
import timm
import torch
from rich.console import Console

from snella_app.config.train import TrainConfig
from snella_app.runs import load_run
from snella_app.runs.merge import merge
from snella_app.training.train import train


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        (
            "swin_tiny_patch4_window7_224",
            {"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4), "window_size": 4, "img_size": 32},
        ),
        ("convnext_tiny", {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 16)}),
    ],
)
def test_the_printed_code_loads_the_merged_file_of_a_run_on_a_weight_file(
    architecture, options, make_photos, no_report, tmp_path
):
    torch.manual_seed(0)
    torch.save(timm.create_model(architecture, num_classes=7, **options).state_dict(), tmp_path / "weights.pth")
    settings = {"img_size": 32, "method": "snella-2", "epochs": 1, "batch_size": 8, "device": "cpu", "progress": False}
    config = TrainConfig.from_flat(
        data=f"folder:{make_photos(tmp_path / 'photos', {'cats': 10, 'dogs': 10})}",
        backbone=str(tmp_path / "weights.pth"),
        out=str(tmp_path / "run"),
        **settings,
    )
    train(config, Console(file=io.StringIO(), width=200))
    scope: dict = {}
    exec(merge(tmp_path / "run", tmp_path / "merged.safetensors").snippet, scope)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(scope["model"](images), load_run(tmp_path / "run", device="cpu").model(images))
