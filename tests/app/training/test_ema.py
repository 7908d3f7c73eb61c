import copy

import pytest
import timm
import torch
from torch import nn

from snella import BudgetAllocator
from snella.matrices import adapted_matrices
from snella_app.methods import build_method
from snella_app.training.callbacks import WeightAverage
from snella_app.training.checkpoints import CheckpointError


@pytest.fixture
def layer():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    return model


def step(model):
    """Change every trainable parameter, as an optimizer step does."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))


def test_the_average_matches_the_formula_during_and_after_warmup(layer):
    average, expected = WeightAverage(layer, 0.5), layer.weight.detach().clone()
    for t in range(1, 15):
        step(layer)
        decay = min(0.5, (1 + t) / (10 + t))
        average.update()
        assert average.decay_now == decay
        expected = decay * expected + (1 - decay) * layer.weight.detach()
    with average.average_parameters():
        torch.testing.assert_close(layer.weight.detach(), expected)


def test_averages_are_applied_inside_the_context_and_values_restored_bit_for_bit(layer):
    average = WeightAverage(layer, 0.9)
    step(layer)
    average.update()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(KeyError), average.average_parameters():
        assert not torch.equal(layer.weight, before["weight"]) and torch.equal(layer.bias, before["bias"])
        raise KeyError
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_a_loaded_average_continues_bit_for_bit(layer, tmp_path):
    saved = WeightAverage(layer, 0.9)
    for _ in range(3):
        step(layer)
        saved.update()
    saved.save(tmp_path)
    loaded = WeightAverage(layer, 0.9)
    loaded.load(tmp_path)
    step(layer)
    for average in (saved, loaded):
        average.update()
    assert loaded.steps == 4
    values = []
    for average in (saved, loaded):
        with average.average_parameters():
            values.append(layer.weight.detach().clone())
    assert torch.equal(*values)


def test_a_checkpoint_without_averages_or_of_another_model_is_rejected(layer, tmp_path):
    average = WeightAverage(layer, 0.9)
    with pytest.raises(CheckpointError, match=r"damaged: .*ema\.safetensors is missing; start over with --overwrite"):
        average.load(tmp_path)
    WeightAverage(nn.Linear(3, 2), 0.9).save(tmp_path)
    with pytest.raises(CheckpointError, match=r"trainable parameters: only one of the two contains bias; start over"):
        average.load(tmp_path)


def test_averaged_factors_match_the_budgets_exactly():
    """The update is recomputed from averaged factors; an average of merged matrices would be dense."""
    torch.manual_seed(0)
    backbone = timm.create_model("test_vit", num_classes=3, img_size=32)
    model = build_method("snella-2", backbone, target_sparsity=0.9, init_weights=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    allocator = BudgetAllocator(model, total_epochs=4, steps_per_epoch=1).attach(optimizer)
    average, merged = WeightAverage(model, 0.99), None
    for _ in range(4):
        model(torch.randn(4, 3, 32, 32)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update()
        deltas = [matrix.layer.get_delta_weight("default").detach() for matrix in adapted_matrices(model)]
        merged = deltas if merged is None else [0.5 * old + 0.5 * new for old, new in zip(merged, deltas, strict=True)]
    matrices = adapted_matrices(model)
    with average.average_parameters():
        assert [matrix.nonzeros() for matrix in matrices] == [matrix.budget for matrix in matrices]
    assert sum(matrix.budget for matrix in matrices) == allocator.target_budget
    dense = sum(int(delta.count_nonzero()) for delta in merged)
    assert dense > 2 * allocator.target_budget
