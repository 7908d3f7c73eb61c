from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from snella.matrices import adapted_matrices
from snella_app.methods.model_parts import freeze_running_statistics, updated_statistics
from snella_app.records.record import read
from snella_app.records.run import Metrics
from snella_app.report.report import _saved_epoch
from snella_app.runs import load_run
from snella_app.training.callbacks import EpochSnapshots
from snella_app.training.checkpoints import CheckpointError
from snella_app.training.session import TrainingInterrupted
from snella_app.training.train import train
from snella_app.training.trainer import SnellaTrainer

from .components import build_components, interrupt_before

pytestmark = pytest.mark.usefixtures("no_report")


def test_the_mean_is_applied_inside_the_context_and_restored_bit_for_bit():
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    epoch_ends, values = EpochSnapshots(layer, 2), {}
    for epoch in (1, 2, 3):
        with torch.no_grad():
            layer.weight.normal_()
        values[epoch] = layer.weight.detach().clone()
        epoch_ends.add(epoch)
    assert epoch_ends.epochs == [2, 3]
    with epoch_ends.average_parameters([2, 3]):
        torch.testing.assert_close(layer.weight.detach(), (values[2] + values[3]) / 2)
    assert torch.equal(layer.weight, values[3])


def test_running_statistics_that_training_updates_are_averaged():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    epoch_ends, means = EpochSnapshots(model, 2), []
    for epoch in (1, 2):
        model(torch.randn(8, 3) + epoch)
        epoch_ends.add(epoch)
        means.append(model[1].running_mean.clone())
    with epoch_ends.average_parameters([1, 2]):
        torch.testing.assert_close(model[1].running_mean, (means[0] + means[1]) / 2)
    assert torch.equal(model[1].running_mean, means[1])
    freeze_running_statistics(model)
    assert not updated_statistics(model)


@pytest.mark.parametrize("layer", [nn.Linear(3, 2), nn.Conv2d(3, 2, 2).to(memory_format=torch.channels_last)])
def test_a_checkpoint_restores_the_epochs_and_rejects_another_model(layer, tmp_path):
    epoch_ends = EpochSnapshots(layer, 3)
    epoch_ends.add(4)
    epoch_ends.save(tmp_path)
    other = EpochSnapshots(deepcopy(layer), 3)
    other.load(tmp_path)
    assert other.epochs == [4] and torch.equal(other._values[4]["weight"], layer.weight)
    with pytest.raises(CheckpointError, match=r"only one of the two contains bias; start over"):
        EpochSnapshots(nn.Linear(3, 2, bias=False), 3).load(tmp_path)
    with pytest.raises(CheckpointError, match=r"epoch_ends\.safetensors is missing"):
        other.load(tmp_path / "checkpoints")


@pytest.fixture
def epoch_weights(monkeypatch):
    """Record the trained weights after each epoch of a run."""
    weights_by_epoch, evaluate = {}, SnellaTrainer.evaluate

    def recording_evaluate(trainer, *args, **kwargs):
        row = evaluate(trainer, *args, **kwargs)
        named = trainer.trained_model.named_parameters()
        weights_by_epoch[round(trainer.state.epoch)] = {n: p.detach().clone() for n, p in named if p.requires_grad}
        return row

    monkeypatch.setattr(SnellaTrainer, "evaluate", recording_evaluate)
    return weights_by_epoch


def test_swa_saves_the_mean_of_the_last_epochs_at_the_target_sparsity(settings, console, epoch_weights):
    config = settings(epochs=4, swa=3, protocol="final", target_sparsity=0.9, head_norm="none")
    run = train(config, console)
    averaged = read(Metrics, run.path).averaged
    assert (averaged.kind, averaged.epochs, averaged.offered, averaged.is_saved) == ("swa", [2, 3, 4], [2, 3, 4], True)
    model = load_run(run).model
    for name, parameter in model.named_parameters():
        if name in epoch_weights[4]:
            expected = (epoch_weights[2][name] + epoch_weights[3][name] + epoch_weights[4][name]) / 3
            torch.testing.assert_close(parameter.detach(), expected)
    matrices = adapted_matrices(model)
    total = sum(matrix.size for matrix in matrices)
    assert sum(matrix.budget for matrix in matrices) == total - round(0.9 * total)
    assert [matrix.nonzeros() for matrix in matrices] == [matrix.budget for matrix in matrices]
    assert "the average of epochs 2, 3, 4 is saved" in console.file.getvalue()
    assert _saved_epoch(read(Metrics, run.path)) == "averaged epochs 2, 3, 4 (SWA over epochs 2 to 4 of 4)"


def test_a_soup_adds_epochs_greedily_by_validation_score(settings, console, epoch_weights):
    config = settings(epochs=4, soup=4, method="lora-2", head_init="random", tta=1)
    run = train(config, console)
    metrics = read(Metrics, run.path)
    parts = build_components(config.resolved())
    model, task = parts.model.eval(), parts.task
    images = [parts.splits.val[index] for index in range(len(parts.splits.val))]
    batch = task.collate(images)

    def score(epochs):
        for name, parameter in model.named_parameters():
            if name in epoch_weights[4]:
                parameter.data.copy_(sum(epoch_weights[epoch][name] for epoch in epochs) / len(epochs))
        with torch.no_grad():
            scores = task.metrics(model(batch["images"]), batch["labels"])
        return scores["accuracy"], -scores["loss"]

    best_first = sorted(epoch_weights, key=lambda epoch: score([epoch]), reverse=True)
    soup = best_first[:1]
    for epoch in best_first[1:]:
        soup = [*soup, epoch] if score([*soup, epoch]) >= score(soup) else soup
    assert metrics.averaged.epochs == sorted(soup) and metrics.averaged.is_saved
    assert score(soup) >= max(score([epoch]) for epoch in epoch_weights)
    assert metrics.val.accuracy == pytest.approx(score(soup)[0])
    assert metrics.val.loss == pytest.approx(-score(soup)[1], rel=1e-5)
    assert metrics.averaged.scores["val_loss"] == pytest.approx(metrics.val.loss, rel=1e-5)


@pytest.mark.parametrize(
    ("protocol", "split", "name"), [("standard", "val", "validation"), ("official", "test", "test")]
)
def test_an_average_worse_than_the_best_epoch_is_not_saved(protocol, split, name, settings, console, monkeypatch):
    monkeypatch.setattr(SnellaTrainer, "_evaluate_mean", lambda trainer, epochs: ((-1.0, -9.0), {"val_loss": 9.0}))
    run = train(settings(epochs=2, swa=2, method="lora-2", tta=1, protocol=protocol), console)
    metrics = read(Metrics, run.path)
    assert not metrics.averaged.is_saved and metrics.adapter_epoch == metrics.best_epoch
    assert f"is worse on the {name} set than epoch {metrics.best_epoch}, which is saved" in console.file.getvalue()
    best = next(row for row in metrics.history if row.epoch == metrics.best_epoch)
    assert getattr(metrics, split).loss == pytest.approx(best.val_loss, rel=1e-4)


def test_an_average_with_normalized_head_inputs_keeps_its_scores_when_saved(settings, console):
    metrics = read(Metrics, train(settings(epochs=4, swa=3, head_norm="running", tta=1), console).path)
    measured = metrics.averaged.scores if metrics.averaged.is_saved else vars(metrics.history[metrics.best_epoch])
    assert metrics.val.loss == pytest.approx(measured["val_loss"], rel=1e-4)


def test_the_final_head_is_compared_with_the_saved_average(settings, console):
    metrics = read(Metrics, train(settings(epochs=4, swa=3, final_head="layers", tta=1), console).path)
    measured = metrics.averaged.scores if metrics.averaged.is_saved else vars(metrics.history[metrics.best_epoch])
    assert metrics.final_head.val_trained == pytest.approx(measured["val_accuracy"])


def test_a_resumed_run_saves_a_bit_identical_average(settings, console, tmp_path):
    uninterrupted = train(settings(epochs=3, swa=3, protocol="final", out=str(tmp_path / "uninterrupted")), console)
    config = settings(epochs=3, swa=3, protocol="final")
    with interrupt_before(10, presses=2), pytest.raises(TrainingInterrupted, match="checkpoint-10"):
        train(config, console)
    resumed = train(config.replace(resume=True), console)
    expected, actual = (load_file(run.adapter / "adapter_model.safetensors") for run in (uninterrupted, resumed))
    assert expected.keys() == actual.keys() and all(torch.equal(expected[name], actual[name]) for name in expected)


def test_conflicting_averages_are_rejected(settings):
    with pytest.raises(
        ValueError, match=r"ema, swa and soup are mutually exclusive, got ema 0\.9 and swa 3; leave one"
    ):
        settings(ema=0.9, swa=3)
    with pytest.raises(ValueError, match=r"soup needs validation images.* got 3 with protocol 'final': .*use --swa 3"):
        settings(soup=3, protocol="final")
    with pytest.raises(ValueError, match="swa must be at least 2, got 1"):
        settings(swa=1)
