"""Training options: early stopping, accumulation, augmentation, MixUp and CutMix, trackers."""

import math
import os
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.layers import DropPath
from torch import nn

from snella_app.config.train import TrainConfig
from snella_app.methods import build_method
from snella_app.runs import RunFolder, load_run
from snella_app.training.build import build_optimizer, checkpoint_gradients, set_drop_path
from snella_app.training.session import TrainingInterrupted
from snella_app.training.train import _tracking, train
from snella_app.training.trainer import SnellaTrainer

from .components import build_components, interrupt_before

pytestmark = pytest.mark.usefixtures("no_report")

NO_UPDATES = {"lr": 0.0, "scalar_lr": 0.0, "head_lr": 0.0, "head_norm": "none", "method_options": {}}
"""Zero learning rates, so that no epoch is better than the first."""


def adapter_of(run):
    """Return the tensors of the adapter and of the final head, by file and name."""
    files = run.adapter.glob("*.safetensors")
    return {(file.name, name): tensor for file in files for name, tensor in load_file(file).items()}


def history_of(run):
    return run.read_json("metrics.json")["history"]


def is_close(first, second, tolerance):
    return first.keys() == second.keys() and all(
        torch.allclose(first[k], second[k], rtol=0, atol=tolerance) for k in first
    )


@pytest.mark.parametrize("preset", ["paper", "official"])
def test_a_preset_trains_without_a_linear_probe_and_a_final_head(preset, photos, console, tmp_path):
    settings = {"backbone": "test_vit", "pretrained": False, "img_size": 32, "device": "cpu", "progress": False}
    config = TrainConfig.from_flat(
        **settings, data=f"folder:{photos}", preset=preset, epochs=2, out=str(tmp_path / "run")
    )
    run = train(config, console)
    assert [row["epoch"] for row in history_of(run)] == [1, 2]
    assert all(math.isfinite(row["val_loss"]) for row in history_of(run))
    assert load_run(run).probe is None


# early stopping


@pytest.mark.parametrize("final_head", ["trained", "layers"])
def test_early_stopping_ends_training_without_improvement(final_head, settings, console):
    values = {**NO_UPDATES, "method": "lora-2", "epochs": 9, "early_stopping": 2, "final_head": final_head}
    values.pop("scalar_lr")
    run = train(settings(**values), console)
    assert [row["epoch"] for row in history_of(run)] == [0, 1, 2] and run.status == "finished"
    text = console.file.getvalue()
    assert "stopping  after 2 epochs without improvement" in text and "stopped after epoch 2 of 9" in text
    assert (load_run(run).probe is not None) == (final_head == "layers")


def test_early_stopping_counts_only_evaluated_epochs(settings, console):
    values = {**NO_UPDATES, "method": "linear", "epochs": 22, "early_stopping": 2, "protocol": "official"}
    values.pop("scalar_lr")
    run = train(settings(**values), console)
    assert [row["epoch"] for row in history_of(run) if "test_loss" in row] == [1, 11, 13]
    assert history_of(run)[-1]["epoch"] == 13 and "stopped after epoch 13 of 22" in console.file.getvalue()


def test_early_stopping_waits_for_the_target_sparsity(settings, console):
    run = train(settings(**NO_UPDATES, epochs=5, early_stopping=1), console)
    rows, allocation = history_of(run), run.read_json("allocation.json")
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3, 4, 5]  # the target is reached in epoch 4 = ceil(0.7 · 5)
    assert [row["budget"] <= allocation["target_budget"] for row in rows] == [False, False, False, False, True, True]
    assert sum(matrix["budget"] for matrix in allocation["matrices"]) == allocation["target_budget"]
    assert "from epoch 4, when the budget reaches its target (schedule_end 0.7)" in console.file.getvalue()
    assert run.read_config().method.options == {"schedule_end": 0.7}


def test_a_preset_keeps_its_schedule_and_the_log_notes_that_early_stopping_has_no_effect(settings, console):
    options = {"method_options": {"preset": "paper"}}
    run = train(settings(**{**NO_UPDATES, **options}, epochs=3, early_stopping=1), console)
    assert len(history_of(run)) == 4 and run.read_config().method.options == {"preset": "paper"}
    assert "early stopping has no effect: the budget reaches its target at the last step" in console.file.getvalue()


@pytest.mark.parametrize("options", [{"schedule": "constant"}, {"preset": "paper", "init_sparsity": 0.7}])
def test_early_stopping_of_a_constant_budget_does_not_wait_for_a_target(options, settings, console):
    run = train(settings(**{**NO_UPDATES, "method_options": options}, epochs=4, early_stopping=1), console)
    assert history_of(run)[-1]["epoch"] < 3
    text, target = console.file.getvalue(), run.read_json("allocation.json")["target_budget"]
    assert "stopping  after 1 epoch without improvement\n" in text and "early stopping has no effect" not in text
    assert f"{target:,} → {target:,} weights" in text


def test_a_run_killed_after_early_stopping_is_not_trained_further(settings, console, monkeypatch):
    values = {**NO_UPDATES, "method": "linear", "epochs": 9, "early_stopping": 1, "augment": "none"}
    values.pop("scalar_lr")
    config = settings(**values)
    finish = sys.modules["snella_app.training.train"].finish
    with monkeypatch.context() as patch:
        patch.setattr("snella_app.training.train.finish", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config, console)
    assert finish is sys.modules["snella_app.training.train"].finish
    monkeypatch.setattr(SnellaTrainer, "training_step", lambda *args: pytest.fail("a step was trained"))
    run = train(TrainConfig.from_flat(out=config.run.out, resume=True), console)
    assert run.status == "finished" and [row["epoch"] for row in history_of(run)] == [0, 1]


def test_early_stopping_needs_validation_images(settings):
    with pytest.raises(ValueError, match="early_stopping needs validation images, got 3 with protocol"):
        settings(early_stopping=3, protocol="final")


# accumulation, checkpointing


@pytest.mark.parametrize("method", ["snella-2", "lora-2"])
def test_accumulated_batches_equal_one_large_batch(method, settings, console, tmp_path):
    same = {"method": method, "method_options": {}, "epochs": 2}
    large = train(settings(**same, batch_size=10, out=str(tmp_path / "large")), console)
    accumulated = train(settings(**same, batch_size=5, accumulate=2), console)  # 28 images: the last step has 5 + 3
    for first, second in zip(history_of(large)[1:], history_of(accumulated)[1:], strict=True):
        assert first["budget"] == second["budget"] and math.isclose(
            first["train_loss"], second["train_loss"], rel_tol=1e-4
        )
        assert first["lr"] == second["lr"]
    assert is_close(adapter_of(large), adapter_of(accumulated), 2e-4)
    assert "2 epochs of 3 steps, 2 × 5 images each" in console.file.getvalue()


def test_gradient_checkpointing_gives_the_same_adapter(settings, console, tmp_path):
    values = {"epochs": 1, "drop_path": 0.3}
    plain = train(settings(**values, out=str(tmp_path / "plain")), console)
    recomputed = train(settings(**values, grad_checkpointing=True), console)
    assert is_close(adapter_of(plain), adapter_of(recomputed), 1e-6)


def test_a_backbone_without_gradient_checkpointing_is_rejected():
    with pytest.raises(ValueError, match="grad_checkpointing needs a backbone that supports it"):
        checkpoint_gradients(nn.Sequential(nn.Linear(2, 2)))


# layers


@pytest.mark.parametrize("method", ["full", "lora-2", "snella-2"])
def test_learning_rates_decay_from_head_to_stem(method, settings):
    options = {} if method != "snella-2" else {"method_options": {}}
    config = settings(method=method, lr=1.0, head_lr=1.0, layer_decay=0.5, **options).resolved()
    model = build_method(method, timm.create_model("test_vit", num_classes=3, img_size=32))
    optimizer = build_optimizer(model, **config.optim.optimizer_options())
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    named = {name: rates[id(p)] for name, p in model.named_parameters() if id(p) in rates}
    count = len(timm.create_model("test_vit").blocks)
    assert len(named) == sum(p.requires_grad for p in model.parameters())
    for name, rate in named.items():
        if any(scalar in name for scalar in ("snella_alpha", "snella_beta", "piece_coeff")):
            continue  # scalar kernel parameters have a separate learning rate
        if ".blocks." in f".{name}":
            block = int(name.split("blocks.")[1].split(".")[0])
            assert rate == 0.5 ** (count - block), name
        elif "head" in name:
            assert rate == 1.0, name
    assert len({rate for rate in named.values()}) > count


def test_drop_path_applies_to_every_backbone_and_method(settings):
    parts = build_components(settings(method="lora-2", drop_path=0.4).resolved())
    rates = [m.drop_prob for m in parts.model.modules() if isinstance(m, DropPath)]
    blocks = len(rates) // 2
    assert rates == [pytest.approx(0.4 * (k // 2) / (blocks - 1)) for k in range(2 * blocks)] and max(rates) == 0.4
    resnet = timm.create_model("test_resnet", num_classes=2)
    set_drop_path(resnet, "fc", 0.3)
    assert [round(m.drop_prob, 2) for m in resnet.modules() if isinstance(m, DropPath)] == [0.0, 0.1, 0.2, 0.3]
    with pytest.raises(ValueError, match="drop_path needs a backbone with stochastic depth"):
        set_drop_path(nn.Sequential(nn.Linear(2, 2)), "0", 0.1)


# augmentation and mixing


def test_the_mixed_loss_weights_both_labels(settings, console, monkeypatch):
    seen = []
    original = SnellaTrainer._mix

    def mix(self, inputs):
        mixed = original(self, inputs)
        seen.append((inputs, mixed))
        return mixed

    monkeypatch.setattr(SnellaTrainer, "_mix", mix)
    train(settings(method="linear", method_options={}, epochs=3, mixup=0.8, cutmix=1, augment="none"), console)
    assert "augment   none, mixup, cutmix" in console.file.getvalue()
    kinds = set()
    for inputs, mixed in seen:
        share, images, others = mixed["share"], inputs["images"], inputs["images"].roll(1, 0)
        assert torch.equal(mixed["other_labels"], inputs["labels"].roll(1)) and 0 <= share <= 1
        if torch.allclose(mixed["images"], share * images + (1 - share) * others, atol=1e-5):
            kinds.add("mixup")
        else:
            is_own = (mixed["images"] == images).all(1)
            assert torch.equal(torch.where(is_own[:, None], images, others), mixed["images"])
            assert math.isclose(is_own.float().mean(), share, abs_tol=0.02)
            kinds.add("cutmix")
    assert kinds == {"mixup", "cutmix"}


def test_the_mixed_loss_equals_the_soft_label_loss(settings, console):
    config = settings(method="linear", method_options={}, mixup=1.0).resolved()
    parts = build_components(config)
    run = RunFolder(config.run.out)
    run.prepare(config, is_resumed=False)
    trainer = SnellaTrainer(parts, config, run, [])
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    inputs = {"images": images, "labels": labels, "other_labels": labels.roll(1), "share": 0.3}
    one_hot = torch.eye(3)
    soft = 0.3 * one_hot[labels] + 0.7 * one_hot[labels.roll(1)]
    expected = nn.functional.cross_entropy(parts.model(images), soft)
    assert torch.allclose(trainer.compute_loss(parts.model, inputs), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixup": 0.5}, "mixup does not support masks, got 0.5"),
        ({"random_erasing": 0.5}, "random_erasing does not support masks, got 0.5"),
        ({"augment": "randaugment"}, "3augment for images with masks, got 'randaugment'"),
    ],
)
def test_settings_without_mask_support_are_rejected(changes, message, settings):
    with pytest.raises(ValueError, match=message):
        settings(task="segmentation", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulate": 0}, "accumulate must be at least 1, got 0"),
        ({"early_stopping": 0}, "early_stopping must be at least 1, got 0"),
        ({"mixup": -1.0}, "mixup must be at least 0 and finite, got -1.0"),
        ({"drop_path": 1.0}, r"drop_path must be in \[0, 1\), got 1.0"),
        ({"layer_decay": 0.0}, r"layer_decay must be in \(0, 1\], got 0.0"),
        ({"random_erasing": 2.0}, r"random_erasing must be in \[0, 1\], got 2.0"),
        ({"track": "tensorbord"}, "track must be among azure_ml, .*wandb.*, got tensorbord"),
    ],
)
def test_values_out_of_range_are_rejected(changes, message, settings):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_fp16_needs_a_gpu(settings, console):
    with pytest.raises(ValueError, match="precision must be fp32 or bf16 on device 'cpu', got 'fp16'"):
        train(settings(precision="fp16"), console)


# all options, interrupted

ALL_OPTIONS = {
    **{"accumulate": 2, "batch_size": 4, "epochs": 2, "grad_checkpointing": True, "layer_decay": 0.8, "drop_path": 0.2},
    **{"augment": "randaugment", "random_erasing": 0.5, "mixup": 0.8, "cutmix": 1.0, "early_stopping": 5},
    "final_head": "auto",
}


def test_a_run_with_all_options_resumes_bit_for_bit(settings, console, tmp_path):
    uninterrupted = train(settings(**ALL_OPTIONS, out=str(tmp_path / "uninterrupted")), console)
    config = settings(**ALL_OPTIONS)
    with interrupt_before(5), pytest.raises(TrainingInterrupted, match="checkpoint-6"):
        train(config, console)
    run = train(TrainConfig.from_flat(out=config.run.out, resume=True), console)
    assert history_of(run) == history_of(uninterrupted)
    first, second = adapter_of(run), adapter_of(uninterrupted)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in second)


# trackers


def test_tensorboard_gets_losses_budgets_and_all_matrices(settings, console):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(settings(epochs=3, track="tensorboard"), console)
    events = EventAccumulator(str(run.path / "tracking")).Reload()
    shown = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    rows, allocation = history_of(run), run.read_json("allocation.json")
    assert shown["train/val_accuracy"] == pytest.approx([row["val_accuracy"] for row in rows])
    assert shown["train/snella/budget"] == [row["budget"] for row in rows]
    assert shown["train/loss"] and shown["train/images_per_s"][0] > 0
    for matrix in allocation["matrices"]:
        name = matrix["name"]
        assert len(shown[f"train/threshold/{name}"]) == 4 and len(shown[f"train/update_size/{name}"]) == 4
        assert shown[f"train/budget/{name}"][-1] <= matrix["size"]
    assert shown["train/snella/update_size"][-1] > 0 and shown["train/snella/frozen_matrices"][0] == 0
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ


def test_a_tracker_error_is_one_line_and_environment_variables_are_restored(settings, tmp_path):
    class RefusedError(Exception):
        __module__ = "mlflow.exceptions"

    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    with (
        pytest.raises(ValueError, match=r"track=mlflow: no folders$"),
        _tracking(settings(track="mlflow").run.trackers, run),
    ):
        assert os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{run.path}/tracking/mlflow.db"
        assert os.environ["WANDB_DIR"] == str(run.path / "tracking") and (run.path / "tracking").is_dir()
        raise RefusedError("no folders\nbut databases")
    assert "MLFLOW_TRACKING_URI" not in os.environ
    with pytest.raises(RefusedError), _tracking(settings().run.trackers, run):
        raise RefusedError


@pytest.mark.parametrize("error", [ImportError, RuntimeError, ValueError])
def test_a_missing_tracker_package_is_reported_before_loading(error, settings, console, monkeypatch):
    def missing():
        raise error("WandbCallback requires wandb to be installed. Run `pip install wandb`.")

    monkeypatch.setitem(sys.modules["snella_app.training.train"].INTEGRATION_TO_CALLBACK, "wandb", missing)
    with pytest.raises(
        ImportError, match=r"^track=wandb is not available: WandbCallback requires wandb to be .*Run `pip"
    ):
        train(settings(track="wandb"), console)
    assert not os.path.exists(settings().run.out)
