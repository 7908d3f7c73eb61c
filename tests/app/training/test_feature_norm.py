"""Feature normalization of a head that is saved as a plain linear layer."""

import pytest
import torch
from torch import nn

from snella_app.training.callbacks import EpochSnapshots, WeightAverage
from snella_app.training.checkpoints import CheckpointError
from snella_app.training.linear_probe import FeatureNorm


def head_and_features(seed=0):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.tensor([0.01, 1.0, 30.0])
    features = torch.randn(50, 3, generator=generator) * scales + torch.tensor([5.0, 0.0, -2.0])
    torch.manual_seed(seed)
    return nn.Linear(3, 4), features


def test_normalization_standardizes_head_inputs_without_changing_outputs():
    head, features = head_and_features()
    expected = head(features)
    seen = []
    norm = FeatureNorm(head, features)
    head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    torch.testing.assert_close(head(features), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen[0].mean(0), torch.zeros(3), rtol=0, atol=1e-3)
    torch.testing.assert_close(seen[0].std(0, correction=0)[1:], torch.ones(2), rtol=1e-3, atol=0)
    norm.remove()


def test_folded_weights_give_the_same_outputs_and_are_restored():
    head, features = head_and_features()
    norm = FeatureNorm(head, features)
    head.train()
    head(features * 2 + 1)
    norm.on_step_end()
    head.eval()
    expected, weight = head(features), head.weight.detach().clone()
    with norm.folded():
        plain = nn.functional.linear(features, head.weight, head.bias)
    torch.testing.assert_close(plain, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(head.weight, weight)


def test_running_statistics_have_momentum_0_1_for_any_batching():
    means = []
    for sizes in ([50], [20, 30]):
        head, features = head_and_features()
        norm = FeatureNorm(head, torch.zeros(2, 3))
        head.train()
        for part in features.split(sizes):
            head(part)
        norm.on_step_end()
        means.append(norm.mean)
        torch.testing.assert_close(norm.mean, 0.1 * features.mean(0))
        torch.testing.assert_close(norm.var, 0.1 * features.var(0, correction=0), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(means[0], means[1])


def test_evaluation_does_not_change_the_statistics():
    head, features = head_and_features()
    norm = FeatureNorm(head, features)
    before = norm.mean.clone()
    head.eval()
    head(features * 3)
    head.train()
    with torch.no_grad():
        head(features * 3)
    head(features)
    norm.on_step_end()
    torch.testing.assert_close(norm.mean, before)


def test_checkpoints_store_the_statistics(tmp_path):
    head, features = head_and_features()
    norm = FeatureNorm(head, features)
    norm.save(tmp_path)
    loaded = FeatureNorm(nn.Linear(3, 4), features * 7)
    loaded.load(tmp_path)
    assert torch.equal(loaded.mean, norm.mean)
    assert torch.equal(loaded.var, norm.var)
    with pytest.raises(CheckpointError, match=r"'mean' of shape \[2\], got \[3\]; start over with"):
        FeatureNorm(nn.Linear(2, 4), torch.zeros(3, 2)).load(tmp_path)
    (tmp_path / "feature_norm.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"feature_norm\.safetensors is missing"):
        loaded.load(tmp_path)


def test_averages_include_the_statistics():
    head, features = head_and_features()
    norm = FeatureNorm(head, features)
    snapshots, average, means = EpochSnapshots(head, 2, norm.statistics), WeightAverage(head, 0.5, norm.statistics), []
    head.train()
    expected = norm.mean.clone()
    for epoch in (1, 2):
        head(features * 10 * epoch)
        norm.on_step_end()
        average.update()
        snapshots.add(epoch)
        means.append(norm.mean.clone())
        expected = average.decay_now * expected + (1 - average.decay_now) * norm.mean
    with snapshots.average_parameters([1, 2]):
        torch.testing.assert_close(norm.mean, (means[0] + means[1]) / 2)
    assert torch.equal(norm.mean, means[1])
    with average.average_parameters():
        torch.testing.assert_close(norm.mean, expected)
