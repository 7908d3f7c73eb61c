"""A head that starts as the linear probe."""

import io

import numpy as np
import pytest
import torch
from rich.console import Console

from snella.runs import TrainConfig
from snella.tasks.classification import fit_probe
from snella.training.build import build_components
from snella.training.linear_probe import choose_head_start, start_head_from_probe
from snella.training.train import train

QUIET = Console(quiet=True)


def config(out, **options):
    settings = {
        "data": "digits",
        "backbone": "test_vit",
        "pretrained": False,
        "img_size": 32,
        "out": str(out),
        "device": "cpu",
        "train_size": 60,
        "val_size": 20,
        "test_size": 20,
        "epochs": 1,
        "batch_size": 20,
        "r": 2,
        "augment": "flip",
        "head_init": "probe",
        "progress": False,
    }
    return TrainConfig(**settings | options)


def logits_of(parts):
    parts.model.eval()
    with torch.no_grad():
        images = torch.stack([parts.splits.train.with_transform(parts.splits.val.transform)[k][0] for k in range(60)])
        return parts.model(images), torch.tensor(parts.splits.train.labels)


@pytest.mark.parametrize("options", [{}, {"method": "lora-2", "r": None}, {"method": "linear", "r": None}])
def test_the_head_fits_the_training_images_before_the_first_step(options, tmp_path):
    settings = config(tmp_path, **options).resolved()
    parts = build_components(settings)
    random_start, labels = logits_of(parts)
    start_head_from_probe(parts, settings)
    found, _ = logits_of(parts)
    assert (random_start.argmax(1) == labels).float().mean() < 0.4
    assert (found.argmax(1) == labels).float().mean() > 0.7


def test_a_run_starts_there(tmp_path):
    cold = train(config(tmp_path / "cold", head_init="random"), QUIET).read_json("metrics.json")
    warm = train(config(tmp_path / "warm"), QUIET).read_json("metrics.json")
    assert warm["history"][0]["train_loss"] < cold["history"][0]["train_loss"] - 0.5


@pytest.mark.parametrize("classes", [2, 5])
def test_the_probe_is_scikit_learns_on_scaled_features(classes):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, 80)
    features = rng.standard_normal((80, 6)) * 3 + labels[:, None] * np.arange(6)
    weight, bias = fit_probe(features, labels, classes + 1)
    from sklearn.linear_model import LogisticRegression

    scale = np.sqrt(features.var(0).mean())
    reference = LogisticRegression(C=0.1, max_iter=2000).fit(features / scale, labels)
    logits = torch.from_numpy(features) @ weight.T + bias
    expected = torch.from_numpy(reference.predict_proba(features / scale))
    torch.testing.assert_close(logits[:, :classes].softmax(1), expected)
    assert not weight[classes].any(), "a class without images"
    assert not bias[classes].any()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "probe"),
        ({"method": "lora-2", "r": None}, "probe"),
        ({"method": "mlp-3", "r": None}, "random"),
        ({"protocol": "official", "val_size": None}, "random"),
        ({"head_init": "random"}, "random"),
        ({"method": "mlp-3", "r": None, "head_init": "probe"}, "probe"),
    ],
)
def test_auto_is_the_probe_where_there_are_few_steps_and_a_linear_head(options, expected, tmp_path):
    settings = config(tmp_path, **{"head_init": "auto"} | options).resolved()
    assert choose_head_start(build_components(settings), settings) == expected


@pytest.mark.parametrize(("epochs", "expected"), [(33, "probe"), (34, "random")])
def test_auto_is_a_random_head_where_there_are_steps_enough_to_train_it(epochs, expected, tmp_path):
    settings = config(tmp_path, head_init="auto", epochs=epochs).resolved()  # 3 steps an epoch
    assert choose_head_start(build_components(settings), settings) == expected


def test_a_run_says_and_stores_what_auto_stands_for(tmp_path):
    text = io.StringIO()
    run = train(config(tmp_path / "run", head_init="auto"), Console(file=text, width=100))
    assert "starts as a linear probe" in text.getvalue()
    assert run.read_config().head_init == "probe"


def test_a_model_without_a_linear_head_is_refused(tmp_path):
    settings = config(tmp_path, method="mlp-3", r=None).resolved()
    with pytest.raises(ValueError, match="head_init='probe' needs a timm classifier with a linear head on its pooled"):
        start_head_from_probe(build_components(settings), settings)


def test_an_unknown_start_is_named_with_the_choices(tmp_path):
    with pytest.raises(ValueError, match="head_init must be one of auto, random, probe, got 'zero'"):
        config(tmp_path, head_init="zero")
