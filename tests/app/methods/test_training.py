"""Each method in a run of `snella train`: settings, Trainer, best adapter, reloading."""

import pytest
import torch

from snella_app.config.train import TrainConfig
from snella_app.methods import METHODS, load_trained
from snella_app.records.record import read
from snella_app.records.run import RunInfo
from snella_app.runs.model import make_backbone
from snella_app.training.train import train

QUICK = {"noah": {"supernet_epochs": 1}}


@pytest.fixture
def run(tmp_path):
    def start(method, **changes):
        settings = {
            "data": "digits",
            "backbone": "test_vit",
            "pretrained": False,
            "img_size": 32,
            "epochs": 2,
            "batch_size": 16,
            "train_size": 32,
            "val_size": 16,
            "test_size": 16,
            "progress": False,
            "method_options": QUICK.get(method, {}),
            "out": str(tmp_path / method),
        }
        return train(TrainConfig.from_flat(**{**settings, "method": method, **changes}), render_report=False)

    return start


def check(run_folder, method):
    info, metrics = run_folder.read_json("run.json"), run_folder.read_json("metrics.json")
    assert info["status"] == "finished" and info["method"] == method
    trained = [row for row in metrics["history"] if row["epoch"] > 0]
    assert len(trained) == 2 and all(row["train_loss"] > 0 for row in trained)
    # a head from a probe is evaluated before training; these two methods have no single linear head
    before = [row["train_loss"] for row in metrics["history"] if row["epoch"] == 0]
    assert before == ([] if method in ("mlp", "vqt") else [None])
    model = load_trained(run_folder.adapter, make_backbone(read(RunInfo, run_folder.path).backbone))
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    return model


def test_adalora_reduces_ranks_in_the_trainer(run):
    folder = run("adalora-2", method_options={"orth_reg_weight": 10.0})
    model = check(folder, "adalora-2")
    history = folder.read_json("metrics.json")["history"]
    # near 10 √3 while the factors are small: only the training loss includes the penalty
    assert all(row["train_loss"] > 12 for row in history[1:]) and all(row["val_loss"] < 6 for row in history)
    adapter_ranks = [int((p != 0).sum()) for name, p in model.named_parameters() if "lora_E" in name]
    # the best of two epochs of two steps: the budget is reached after the second step
    assert sum(adapter_ranks) <= 2 * 24 + 8 and len(set(adapter_ranks)) > 1


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_by_name(method, run):
    check(run(method), method)
