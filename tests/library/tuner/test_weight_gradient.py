"""`SnellaConfig.weight_gradient`: estimated, rounded and exact gradients of a model."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from snella import SnellaConfig

TOKENS, WIDTH = 200, 8


class Net(nn.Module):
    """Attention, convolution and linear layer in sequence."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x + self.conv(x[:, None])[:, 0])


def gradients(weight_gradient, seed=0):
    torch.manual_seed(0)
    names = ["attention", "conv", "head"]
    config = SnellaConfig(r=2, target_modules=names, init_weights=False, weight_gradient=weight_gradient)
    model, x = get_peft_model(Net(), config).train(), torch.randn(1, TOKENS, WIDTH)
    torch.manual_seed(seed)
    loss = model(x).square().sum()
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_linear_layers_and_attention_are_estimated_and_convolutions_exact():
    (loss, exact), (same, actual) = gradients("exact"), gradients("sample:1/2")
    assert torch.equal(loss, same)
    different = {name for name in exact if not torch.equal(exact[name], actual[name])}
    assert different
    assert not [name for name in different if ".conv." in name]
    assert {name for name in exact if "snella_B" in name and ".conv." not in name} <= different
    for name in different:
        assert (actual[name] - exact[name]).norm() < exact[name].norm(), name


@pytest.mark.filterwarnings("ignore:this processor has no bfloat16 instructions")
def test_bfloat16_rounds_only_gradients_of_linear_layers_and_attention():
    (loss, exact), (same, actual) = gradients("exact"), gradients("bfloat16")
    assert torch.equal(loss, same)
    for name, grad in exact.items():
        assert torch.equal(grad, actual[name]) == (".conv." in name or ".base_layer." in name), name
        torch.testing.assert_close(actual[name], grad, rtol=0.05, atol=0.02 * float(grad.abs().max()))


def test_sampling_uses_torch_generator():
    first, repeated, other = (gradients("sample:1/2", seed)[1] for seed in (0, 0, 1))
    assert all(torch.equal(first[name], repeated[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_several_adapters_use_the_largest_sample():
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), SnellaConfig(target_modules=["0"]))
    layer = model.base_model.model[0]
    assert layer.linear_op.token_share == 1
    model = get_peft_model(
        nn.Sequential(nn.Linear(8, 8)), SnellaConfig(target_modules=["0"], weight_gradient="sample:1/4")
    )
    model.add_adapter("more", SnellaConfig(target_modules=["0"], weight_gradient="sample:1/2"))
    assert model.base_model.model[0].linear_op.token_share == pytest.approx(0.5)
    assert not model.base_model.model[0].linear_op.is_rounded


@pytest.mark.filterwarnings("default:this processor has no bfloat16 instructions")
@pytest.mark.parametrize("is_supported", [True, False])
def test_missing_bfloat16_support_warns(is_supported, monkeypatch, recwarn):
    monkeypatch.setattr("snella.model.has_bfloat16_instructions", lambda: is_supported)
    gradients("bfloat16")
    actual = [str(single.message) for single in recwarn if "has no bfloat16 instructions" in str(single.message)]
    assert len(actual) == (0 if is_supported else 1)


def test_deleted_and_rejected_adapters_do_not_affect_the_estimate():
    model = get_peft_model(
        nn.Sequential(nn.Linear(8, 8)), SnellaConfig(target_modules=["0"], weight_gradient="sample:1/4")
    )
    layer = model.base_model.model[0]
    model.add_adapter("exact", SnellaConfig(target_modules=["0"]))
    assert layer.linear_op.token_share == 1.0
    model.delete_adapter("exact")
    assert layer.linear_op.token_share == 0.25
    pytest.importorskip("numba")
    with pytest.raises(NotImplementedError, match="impl='numba' supports only the piecewise kernels"):
        model.add_adapter("numba", SnellaConfig(target_modules=["0"], impl="numba", kernel="rbf"))
    assert layer.linear_op.token_share == 0.25
