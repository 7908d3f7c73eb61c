"""A linear probe trains on features that are computed once, and gives what it would give without."""

import time

import pytest
import timm
from timm.models import VisionTransformer

from snella_app.config import TrainConfig
from snella_app.methods import build_method
from snella_app.training import train as running_module
from snella_app.training.linear_probe import cache_features, can_cache_features
from snella_app.training.session import TrainingInterrupted
from snella_app.training.train import train
from snella_app.training.trainer import SnellaTrainer

LINEAR = {"method": "linear", "method_options": {}, "augment": "none", "epochs": 3, "final_head": "trained"}


def config(**options):
    return TrainConfig.from_flat(data="digits", backbone="test_vit", out="unused", **options)


@pytest.mark.parametrize(
    ("method", "augment", "can"),
    [("linear", "none", True), ("linear", "flip", False), ("lora-2", "none", False), ("snella-2", "none", False)],
)
def test_features_are_computed_once_only_where_they_cannot_change(method, augment, can):
    model = build_method(method, timm.create_model("test_vit", num_classes=3))
    assert can_cache_features(config(method=method, augment=augment).data, model) is can


def test_a_head_with_dropout_before_it_sees_the_images_every_time():
    model = build_method("linear", timm.create_model("test_vit", num_classes=3, drop_rate=0.5))
    assert not can_cache_features(config(method="linear", augment="none").data, model)


def test_the_probe_gives_what_it_gives_on_the_images_themselves(settings, tmp_path, monkeypatch, no_report):
    once = train(settings(out=str(tmp_path / "once"), **LINEAR))
    monkeypatch.setattr(running_module, "can_cache_features", lambda *_: False)
    every_time = train(settings(out=str(tmp_path / "every_time"), **LINEAR))
    mine, theirs = once.read_json("metrics.json"), every_time.read_json("metrics.json")
    assert mine["test"]["confusion"] == theirs["test"]["confusion"]
    assert mine["trainable_parameters"] == theirs["trainable_parameters"]
    for row, other in zip(mine["history"], theirs["history"], strict=True):
        assert row["val_loss"] == pytest.approx(other["val_loss"], rel=1e-5)


def test_the_backbone_runs_once_for_every_image(settings, monkeypatch, no_report):
    seen = []
    plain = VisionTransformer.forward_features
    monkeypatch.setattr(
        VisionTransformer, "forward_features", lambda self, x, **kw: seen.append(len(x)) or plain(self, x, **kw)
    )
    run = train(settings(**LINEAR))
    sizes = run.read_json("run.json")["data"]["sizes"]
    # two small forward passes are for the estimate of memory
    assert sum(seen) == sizes["train"] + sizes["val"] + sizes["test"] + 2 + 3


def test_the_time_of_a_probe_counts_its_features(settings, monkeypatch, no_report):
    monkeypatch.setattr(running_module, "cache_features", lambda *args: time.sleep(1.5) or cache_features(*args))
    assert train(settings(**LINEAR)).read_json("metrics.json")["train_s"] > 1.5


def test_an_interrupted_probe_resumes_to_the_same_result(settings, tmp_path, monkeypatch, no_report):
    expected = train(settings(out=str(tmp_path / "whole"), **LINEAR)).read_json("metrics.json")
    evaluate = SnellaTrainer.evaluate

    def interrupt_in_the_second_epoch(self, *args, **kwargs):
        if self.history:
            raise KeyboardInterrupt
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(SnellaTrainer, "evaluate", interrupt_in_the_second_epoch)
    config = settings(out=str(tmp_path / "cut"), **LINEAR)
    with pytest.raises(TrainingInterrupted):
        train(config)
    monkeypatch.setattr(SnellaTrainer, "evaluate", evaluate)
    found = train(TrainConfig.from_flat(out=config.run.out, resume=True, progress=False)).read_json("metrics.json")
    assert found["test"] == expected["test"]
    assert found["history"] == expected["history"]
