"""Head initialization from a linear probe."""

import io
import re

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from snella_app.tasks import linear_fit
from snella_app.tasks.linear_fit import fit_probe
from snella_app.training.linear_probe import init_head_from_probe
from snella_app.training.plan import choose_augmentation, choose_heads
from snella_app.training.train import train

from . import digits
from .components import build_components

pytestmark = pytest.mark.usefixtures("no_report")

QUIET = Console(quiet=True)


def config(out, **options):
    return digits.config(out, **{"augment": "flip", "head_init": "probe", "final_head": "trained"} | options)


def logits_of(parts):
    parts.model.eval()
    with torch.no_grad():
        images = torch.stack([parts.splits.train.with_transform(parts.splits.val.transform)[k][0] for k in range(60)])
        return parts.model(images), torch.tensor(parts.splits.train.labels)


@pytest.mark.parametrize("options", [{}, {"method": "lora-2", "r": None}, {"method": "linear", "r": None}])
def test_the_probe_fits_the_training_images_before_the_first_step(options, tmp_path):
    settings = config(tmp_path, **options).resolved()
    parts = build_components(settings)
    random_start, labels = logits_of(parts)
    init_head_from_probe(parts, settings.optim)
    logits, _ = logits_of(parts)
    assert (random_start.argmax(1) == labels).float().mean() < 0.4
    assert (logits.argmax(1) == labels).float().mean() > 0.7


def test_a_run_starts_from_the_probe(tmp_path):
    cold = train(config(tmp_path / "cold", head_init="random"), QUIET).read_json("metrics.json")
    warm = train(config(tmp_path / "warm"), QUIET).read_json("metrics.json")
    assert warm["history"][1]["train_loss"] < cold["history"][0]["train_loss"] - 0.5


def test_the_initial_model_is_evaluated_as_epoch_0(tmp_path):
    console = Console(file=io.StringIO(), width=200)
    metrics = train(config(tmp_path), console).read_json("metrics.json")
    assert [row["epoch"] for row in metrics["history"]] == [0, 1]
    assert metrics["history"][0]["val_accuracy"] > 0.25
    assert metrics["history"][0]["train_loss"] is None, "no steps were taken"
    assert "epoch   0/1  before training  val loss" in console.file.getvalue()


@pytest.mark.parametrize(
    "settings",
    [{"head_init": "random"}, {"protocol": "final", "val_size": None}, {"protocol": "official", "val_size": None}],
)
def test_a_random_head_or_a_protocol_without_validation_has_no_epoch_0(settings, tmp_path):
    metrics = train(config(tmp_path, **settings), QUIET).read_json("metrics.json")
    assert metrics["history"][0]["epoch"] == 1


def test_the_initial_model_is_saved_if_no_epoch_is_better(tmp_path):
    console = Console(file=io.StringIO(), width=200)
    run = train(config(tmp_path, lr=0.0, head_lr=3.0, epochs=2), console)
    metrics = run.read_json("metrics.json")
    assert metrics["best_epoch"] == 0
    assert metrics["val"]["accuracy"] == pytest.approx(metrics["history"][0]["val_accuracy"])
    assert "no epoch is better than the initial model, which is saved" in console.file.getvalue()


@pytest.mark.parametrize(
    ("final_head", "head"), [("trained", "linear probe"), ("layers", r"kernel and linear head on layers \d.*")]
)
def test_a_run_without_epochs_names_the_saved_head(final_head, head, tmp_path):
    console = Console(file=io.StringIO(), width=200)
    train(config(tmp_path, epochs=0, final_head=final_head), console)
    assert re.search(rf"^not trained \(0 epochs\); the {head} is saved: validation 0\.", console.file.getvalue(), re.M)


@pytest.mark.parametrize("classes", [2, 5])
def test_the_probe_matches_scikit_learn_on_scaled_features(classes):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, 80)
    features = rng.standard_normal((80, 6)) * 3 + labels[:, None] * np.arange(6)
    weight, bias = fit_probe(features, labels, classes + 1)
    from sklearn.linear_model import LogisticRegression

    scale = np.sqrt(features.var(0).mean())
    reference = LogisticRegression(C=0.1, max_iter=5000, tol=1e-10).fit(features / scale, labels)
    logits = torch.from_numpy(features) @ weight.T + bias
    expected = torch.from_numpy(reference.predict_proba(features / scale))
    torch.testing.assert_close(logits[:, :classes].softmax(1), expected, atol=1e-3, rtol=0)
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
def test_auto_selects_the_probe_for_a_linear_head_except_with_the_official_protocol(options, expected, tmp_path):
    settings = config(tmp_path, **{"head_init": "auto"} | options).resolved()
    parts = build_components(settings)
    assert choose_heads(parts, settings).optim.head_init == expected


class MirrorSensitive(torch.nn.Module):
    """Model whose features are the mean brightness of the left and the right half."""

    head_hidden_size = num_features = 2

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(2, 2)

    def forward_features(self, images):
        return torch.stack([half.mean((1, 2, 3)) for half in images.tensor_split(2, -1)], 1)

    def forward_head(self, features, pre_logits=False):
        return features if pre_logits else self.head(features)

    def forward(self, images):
        return self.forward_head(self.forward_features(images))


@pytest.fixture
def halves(tmp_path):
    """Images whose class is the brighter half (`side`) or the overall brightness (`level`)."""
    rng = np.random.default_rng(0)
    for kind in ("side", "level"):
        for number in range(40):
            pixels = (rng.integers(0, 60, (16, 16, 3)) + rng.integers(0, 60, (1, 2, 1)).repeat(8, 1)).astype(np.uint8)
            label = number % 2
            (pixels[:, 8 * label : 8 * label + 8] if kind == "side" else pixels)[:] += np.uint8(
                120 * (kind == "side" or label)
            )
            folder = tmp_path / kind / f"class{label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path


def test_a_fit_with_little_memory_for_past_steps_has_the_same_minimum(monkeypatch):
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(60, 5)), rng.integers(0, 3, 60)
    expected = fit_probe(features, labels, 3)
    monkeypatch.setattr(linear_fit, "_HISTORY_BYTES", 0)
    for actual, value in zip(fit_probe(features, labels, 3), expected, strict=True):
        torch.testing.assert_close(actual, value, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("kind", "expected", "tta"), [("side", "crop-no-flip", 1), ("level", "crop", 2)])
def test_auto_omits_flips_that_change_the_classes(kind, expected, tta, halves, monkeypatch):
    settings = config(
        halves / "run", data=f"folder:{halves / kind}", method="linear", r=None, head_init="auto", augment="auto",
        train_size=None, val_size=None, test_size=None, batch_size=None,
    ).resolved()  # fmt: skip
    parts = build_components(settings)
    parts.model.forward_features = MirrorSensitive().forward_features
    parts.model.forward_head = lambda features, pre_logits: features
    chosen = choose_augmentation(parts, settings.data, settings.optim)
    assert (chosen.augment, chosen.tta) == (expected, tta)


@pytest.mark.parametrize(
    ("settings", "augment", "tta"),
    [
        ({"augment": "flip"}, "flip", 2),
        ({"augment": "none"}, "none", 1),
        ({"augment": "auto", "method": "mlp-3", "r": None}, "crop", 2),
        ({"augment": "flip", "tta": 1}, "flip", 1),
        ({"augment": "auto", "task": "regression"}, "flip", 1),
        ({"augment": "auto", "protocol": "official", "val_size": None}, "flip", 1),
    ],
)
def test_a_run_averages_flips_if_it_trains_on_them(settings, augment, tta, tmp_path):
    chosen = config(tmp_path, **{"head_init": "random", "augment": "auto"} | settings).resolved()
    parts = build_components(chosen)
    chosen = choose_augmentation(parts, chosen.data, chosen.optim)
    assert (chosen.augment, chosen.tta) == (augment, tta)


def test_a_run_prints_and_stores_the_resolved_auto_settings(tmp_path):
    text = io.StringIO()
    run = train(config(tmp_path / "run", head_init="auto"), Console(file=text, width=100))
    assert "initialized from a linear probe" in text.getvalue()
    assert run.read_config().optim.head_init == "probe"


def test_a_model_without_a_linear_head_is_rejected(tmp_path):
    settings = config(tmp_path, method="mlp-3", r=None).resolved()
    with pytest.raises(ValueError, match="head_init='probe' needs a timm classifier with a linear head on its pooled"):
        init_head_from_probe(build_components(settings), settings.optim)


def test_an_unknown_head_init_is_rejected_with_the_choices(tmp_path):
    with pytest.raises(ValueError, match="head_init must be one of auto, random, probe, got 'zero'"):
        config(tmp_path, head_init="zero")
