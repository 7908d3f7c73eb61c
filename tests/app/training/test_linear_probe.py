"""Linear probes on cached features give the same results as on images."""

import time
from unittest import mock

import pytest
import timm
from timm.models import VisionTransformer

from snella_app.config.train import TrainConfig
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
    ("method", "augment", "is_cached"),
    [("linear", "none", True), ("linear", "flip", False), ("lora-2", "none", False), ("snella-2", "none", False)],
)
def test_features_are_cached_only_if_they_are_constant(method, augment, is_cached):
    model = build_method(method, timm.create_model("test_vit", num_classes=3))
    assert can_cache_features(config(method=method, augment=augment).data, model) is is_cached


def test_features_are_not_cached_with_dropout_before_the_head():
    model = build_method("linear", timm.create_model("test_vit", num_classes=3, drop_rate=0.5))
    assert not can_cache_features(config(method="linear", augment="none").data, model)


def test_cached_features_give_the_same_result_as_images(settings, tmp_path, monkeypatch, no_report):
    once = train(settings(out=str(tmp_path / "once"), **LINEAR))
    monkeypatch.setattr(running_module, "can_cache_features", lambda *_: False)
    every_time = train(settings(out=str(tmp_path / "every_time"), **LINEAR))
    cached, expected = once.read_json("metrics.json"), every_time.read_json("metrics.json")
    assert cached["test"]["confusion"] == expected["test"]["confusion"]
    assert cached["trainable_parameters"] == expected["trainable_parameters"]
    for row, other in zip(cached["history"], expected["history"], strict=True):
        assert row["val_loss"] == pytest.approx(other["val_loss"], rel=1e-5)


def test_the_backbone_runs_once_per_image(settings, monkeypatch, no_report):
    seen = []
    plain = VisionTransformer.forward_features
    monkeypatch.setattr(
        VisionTransformer, "forward_features", lambda self, x, **kw: seen.append(len(x)) or plain(self, x, **kw)
    )
    run = train(settings(**LINEAR))
    sizes = run.read_json("run.json")["data"]["sizes"]
    # two small forward passes estimate the memory
    assert sum(seen) == sizes["train"] + sizes["val"] + sizes["test"] + 2 + 3


def test_the_training_time_includes_feature_extraction(settings, monkeypatch, no_report):
    monotonic, offset_s = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + sum(offset_s))
    monkeypatch.setattr(running_module, "cache_features", lambda *args: offset_s.append(1e4) or cache_features(*args))
    assert train(settings(**LINEAR)).read_json("metrics.json")["train_s"] > 1e4


def test_a_probe_interrupted_during_validation_resumes_to_the_same_result(settings, tmp_path, no_report):
    expected = train(settings(out=str(tmp_path / "uninterrupted"), **LINEAR)).read_json("metrics.json")
    config = settings(out=str(tmp_path / "cut"), **LINEAR)
    evaluate = SnellaTrainer.evaluate

    def interrupt_in_the_second_epoch(trainer, *args, **kwargs):
        if len(trainer.history) == 2:  # before training, and after the first epoch
            raise KeyboardInterrupt
        return evaluate(trainer, *args, **kwargs)

    with (
        mock.patch.object(SnellaTrainer, "evaluate", interrupt_in_the_second_epoch),
        pytest.raises(TrainingInterrupted, match="checkpoint-4"),
    ):
        train(config)
    resumed = train(TrainConfig.from_flat(out=config.run.out, resume=True, progress=False)).read_json("metrics.json")
    assert resumed["test"] == expected["test"]
    assert resumed["history"] == expected["history"]
