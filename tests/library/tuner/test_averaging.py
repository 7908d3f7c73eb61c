"""Weight averaging: averaged models keep their budgets."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from snella import BudgetAllocator, SnellaConfig, create_snella_optimizer
from snella.budgets import compute_seal, seal_budgets
from snella.matrices import adapted_matrices

STEPS = 6


def averaged(model, **settings):
    average = AveragedModel(model, **settings)
    return average.module, lambda: average.update_parameters(model)


def timm_ema(kind, model):
    average = kind(model, decay=0.9)
    return average.module, lambda: average.update(model)


AVERAGES = {
    "mean": lambda model: averaged(model, use_buffers=True),
    "ema": lambda model: averaged(model, use_buffers=True, avg_fn=get_ema_avg_fn(0.9)),
    "multi": lambda model: averaged(model, use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    "parameters": lambda model: averaged(model),
    "ModelEmaV2": lambda model: timm_ema(ModelEmaV2, model),
    "ModelEmaV3": lambda model: timm_ema(ModelEmaV3, model),
}


def budgets_of(model):
    return {matrix.name: matrix.budget for matrix in adapted_matrices(model)}


def train(case, model, after_step=lambda: None, **settings):
    optimizer = create_snella_optimizer(model, lr=1e-2)
    allocator = BudgetAllocator(model, total_epochs=1, steps_per_epoch=STEPS).attach(optimizer)
    model.train()
    for number in range(STEPS):
        case.run(model, case.inputs(number)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        after_step()
    allocator.detach()
    return allocator


@pytest.mark.parametrize("kind", AVERAGES)
@pytest.mark.parametrize("name", ["mlp", "timm_vit"])
def test_average_has_the_model_budgets_and_saves_them(cases, name, kind, tmp_path):
    case = cases[name]
    model = case.adapted(realloc_every=1)
    average, update = AVERAGES[kind](model)
    records = []

    def after_step():
        update()
        records.append(budgets_of(average) == budgets_of(model))

    allocator = train(case, model, after_step)
    assert records == [True] * STEPS
    update()  # saves the last average before any forward pass
    average.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path)
    assert budgets_of(loaded) == allocator.budgets
    assert sum(budgets_of(loaded).values()) == allocator.target_budget
    assert [m.nonzeros() for m in adapted_matrices(average.eval())] == list(allocator.budgets.values())
    assert not torch.equal(case.predict(average), case.predict(model.eval()))


def test_average_in_evaluation_has_budgets_in_buffers_for_compiled_graphs(mlp):
    model = mlp.adapted(realloc_every=1)
    average, update = AVERAGES["ema"](model)
    average.train()
    allocator = train(mlp, model, update)
    layers = [matrix.layer for matrix in adapted_matrices(average)]
    raw = [int(layer.snella_budget["default"]) for layer in layers]
    average.eval()
    assert [int(layer.snella_budget["default"]) for layer in layers] == list(allocator.budgets.values()) != raw


@pytest.mark.parametrize("kind", ["ema", "ModelEmaV2"])
def test_repeated_switch_to_evaluation_restores_budgets_in_buffers(kind, mlp):
    model = mlp.adapted(realloc_every=1)
    average, update = AVERAGES[kind](model)
    average.eval()
    allocator = train(mlp, model, update)
    layers = [matrix.layer for matrix in adapted_matrices(average)]
    raw = [int(layer.snella_budget["default"]) for layer in layers]
    average.eval()  # no change of the mode
    assert [int(layer.snella_budget["default"]) for layer in layers] == list(allocator.budgets.values()) != raw


def test_copies_have_independent_budgets(mlp):
    model = mlp.adapted(realloc_every=1)
    dense = budgets_of(model)
    snapshot = copy.deepcopy(model)
    first = train(mlp, model)
    assert budgets_of(snapshot) == dense != first.budgets
    other = copy.deepcopy(snapshot)
    second = train(mlp, other)
    other_layer = adapted_matrices(other)[0].layer
    other_layer.set_budget("default", [7])
    assert budgets_of(model) == first.budgets
    assert budgets_of(other) == second.budgets | {"lin0": 7}
    snapshot.load_state_dict(model.state_dict())
    assert budgets_of(snapshot) == first.budgets


def test_average_of_seals_is_not_the_seal_of_the_average():
    for budget in range(2, 200, 2):
        assert 2 * compute_seal(budget // 2) != compute_seal(0) + compute_seal(budget)


def test_budget_with_valid_seal_is_kept(mlp):
    layer = adapted_matrices(mlp.adapted())[0].layer
    layer.snella_budget["default"].fill_(11)
    assert layer.budgets("default") == (120,)
    layer.snella_budget["default"].fill_(11)
    seal_budgets(layer, "default")
    assert layer.budgets("default") == (11,)


def test_swapped_weights_do_not_reuse_thresholds(mlp):
    model = mlp.adapted(init_sparsity=0.5)
    other = mlp.adapted(init_sparsity=0.5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5 + torch.rand_like(parameter))
    expected = mlp.run(model.train())
    for exchange in range(2):  # like Lightning's WeightAveraging around validation
        for actual, reference in zip(model.parameters(), other.parameters(), strict=True):
            saved = actual.detach().clone()
            actual.data.copy_(reference.data)
            reference.data.copy_(saved)
        if exchange == 0:
            model.eval()
            mlp.run(model)
    for module in model.modules():
        module.training = True
    assert torch.equal(mlp.run(model), expected)
    assert [m.nonzeros() for m in adapted_matrices(model)] == [m.budget for m in adapted_matrices(model)]


@pytest.mark.parametrize("budgets", [[13, 13], [-1], [10**6]])
def test_invalid_budgets_are_rejected(budgets):
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), SnellaConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match=r"budgets of '0' must be one number per matrix, from 0 to \[30\], got"):
        model.base_model.model[0].set_budget("default", budgets)
