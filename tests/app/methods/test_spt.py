"""SPT: individually trained weights and structured modules."""

import re

import pytest
import torch
from torch import nn

from snella_app.methods import build_method, spec_of
from snella_lab.methods.adapter import Adapter
from snella_lab.methods.spt import LowRank, OutputAdapter, SptLayer, budget_of, matrix_layers, spend_budget

VALUES = [torch.tensor([9.0, 8.0, 1.0, 7.0]), torch.tensor([6.0, 0.0]), torch.tensor([5.0, 4.0, 3.0])]


@pytest.mark.parametrize(
    ("thresholds", "budget", "structured", "chosen"),
    [
        # 9 and 8 individually; 7 makes the first group a module of 3 parameters; 6 and 5 remain
        ([3, 9, 9], 5, [True, False, False], [[], [0], [0]]),
        # no group reaches its threshold
        ([9, 9, 9], 4, [False, False, False], [[0, 1, 3], [0], []]),
        # at 8 the module would cost 3 instead of 1, more than the remaining 2
        ([2, 9, 9], 2, [False, False, False], [[0, 1], [], []]),
        # other entries of a structured group are free: 1 and 0 are the last candidates
        ([1, 9, 9], 8, [True, False, False], [[], [0, 1], [0, 1, 2]]),
        ([9, 9, 9], 0, [False, False, False], [[], [], []]),
    ],
)
def test_the_budget_follows_the_ranking(thresholds, budget, structured, chosen):
    costs = [3, 9, 9]
    selection = spend_budget(VALUES, costs, thresholds, budget)
    assert selection[0] == structured
    assert [indices.tolist() for indices in selection[1]] == chosen
    assert sum(c for c, s in zip(costs, selection[0], strict=True) if s) + sum(map(len, selection[1])) == budget


def test_a_budget_above_the_capacity_of_all_groups_is_rejected():
    with pytest.raises(ValueError, match=r"budget must be at most 8e-06 million .*, got 9e-06"):
        spend_budget(VALUES, [3, 9, 9], [1, 9, 9], 9)


def test_the_largest_budget_in_the_error_includes_the_class_token(make_model, batches):
    with pytest.raises(ValueError, match=r"got 100$") as error:
        build_method("spt-lora-2", make_model(), batches=batches, budget=100)
    largest = float(re.search(r"at most (\S+) million", str(error.value))[1])
    model = build_method("spt-lora-2", make_model(), batches=batches, budget=largest)
    head = set(model.get_submodule(spec_of(model).head).parameters())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad and p not in head) == round(largest * 1e6)


@pytest.mark.parametrize("method", ["spt-lora-2", "spt-adapter-2"])
@pytest.mark.parametrize("budget", [0.0004, 0.005])
@pytest.mark.parametrize("backbone", ["test_vit", "test_resnet"])
def test_the_trained_parameters_match_the_budget(method, budget, backbone, make_model, batches):
    model = build_method(method, make_model(backbone), batches=batches, budget=budget, alpha=40)
    head = set(model.get_submodule(spec_of(model).head).parameters())
    trained = [p for p in model.parameters() if p.requires_grad and p not in head]
    assert sum(p.numel() for p in trained) == round(budget * 1e6)
    if budget > 0.001:
        assert any(isinstance(module, LowRank | OutputAdapter) for module in model.modules())


def test_the_default_budget_is_0_4_million_on_a_vit_b_16():
    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            for k, (rows, columns) in enumerate([(2304, 768), (768, 768), (3072, 768), (768, 3072)]):
                for block in range(12):
                    self.add_module(f"layer{block}_{k}", nn.Linear(columns, rows))
            self.head = nn.Linear(768, 2)

    with torch.device("meta"):
        model = Backbone()
    assert budget_of({}, model, "head") == 400_000
    assert budget_of({"budget": 0.2}, model, "head") == 200_000


@pytest.fixture
def layer():
    """Fused layer of three matrices with a module on the second."""
    torch.manual_seed(0)
    return lambda module: SptLayer(nn.Linear(4, 6).requires_grad_(False), torch.tensor([1, 20]), (2, 2, 2), {1: module})


def test_a_low_rank_update_changes_the_rows_of_its_matrix(layer):
    spt = layer(LowRank(2, 4, 3))
    nn.init.normal_(spt.structured["1"].B)
    nn.init.normal_(spt.values)
    x = torch.randn(5, 4)
    weight = spt.base_layer.weight.clone()
    weight.view(-1)[[1, 20]] += spt.values.detach()
    weight[2:4] += (spt.structured["1"].B @ spt.structured["1"].A).detach()
    expected = x @ weight.T + spt.base_layer.bias
    torch.testing.assert_close(spt(x), expected)
    torch.testing.assert_close(spt.merged()(x), expected)


def test_an_adapter_changes_the_output_of_its_matrix(layer):
    spt = layer(OutputAdapter(2, 4, 3))
    adapter = spt.structured["1"].adapter
    nn.init.normal_(adapter.up.weight)
    x = torch.randn(5, 4)
    plain = spt.base_layer(x)
    expected = torch.cat([plain[:, :2], adapter(plain[:, 2:4]), plain[:, 4:]], dim=1)
    assert isinstance(adapter, Adapter)
    torch.testing.assert_close(spt(x), expected)


def test_the_class_token_must_fit_into_the_budget(make_model, batches):
    with pytest.raises(ValueError, match=r"must exceed 6.4e-05 million parameters, .* class token, got 5e-05"):
        build_method("spt-lora", make_model(), batches=batches, budget=0.00005)


def test_the_same_seed_gives_the_same_model(make_model, batches):
    def build():
        model = make_model()
        torch.manual_seed(1)
        return build_method("spt-lora-2", model, batches=batches, budget=0.003, alpha=40).state_dict()

    first, second = build(), build()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_modules_act_in_the_fused_function_of_encoder_layers():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    layer.linear1 = SptLayer(layer.linear1, torch.tensor([], dtype=torch.int64), [16], {0: LowRank(16, 8, 2)})
    with torch.no_grad():
        for parameter in layer.linear1.structured.parameters():
            parameter.normal_()
        x = torch.randn(2, 5, 8)
        fused = layer(x)
    with torch.enable_grad():
        torch.testing.assert_close(fused, layer(x).detach())


def test_output_projections_of_torch_attentions_are_not_selected():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.mlp, self.head = nn.MultiheadAttention(8, 2), nn.Linear(8, 8), nn.Linear(8, 2)

    assert "attention.out_proj" not in matrix_layers(Model(), "head")
