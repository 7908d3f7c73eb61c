"""Updates with a fixed support."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from snella import BudgetAllocator, SnellaConfig
from snella.cache import pack_positions, unpack_positions
from snella.fixed_support import set_support
from snella.layer import SnellaLayer


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.out = nn.Conv2d(12, 3, 1)

    def forward(self, x):
        return self.out(self.qkv(x)[:, :, None, None]).flatten(1)


def model():
    torch.manual_seed(0)
    return Attention()


def adapted(**options):
    config = SnellaConfig(r=4, fixed_support=True, target_modules=["qkv", "out"], init_weights=False, **options)
    return get_peft_model(model(), config)


QKV = torch.tensor([2, 15, 16, 47])
"""Two entries of q, one of k and one of v; each matrix is 4×4."""


@pytest.fixture
def supported():
    peft_model = adapted()
    set_support(peft_model.base_model.model.qkv, "default", QKV)
    return peft_model


def layers(peft_model):
    return [m for m in peft_model.modules() if isinstance(m, SnellaLayer)]


def test_positions_round_trip_through_bit_mask():
    indices = torch.tensor([18, 0, 7, 8])
    packed = pack_positions(indices, 19)
    assert packed.tolist() == [0b10000001, 0b00000001, 0b00000100]
    assert unpack_positions(packed).tolist() == [0, 7, 8, 18]


@pytest.mark.parametrize(
    ("indices", "message"),
    [([3, 19], r"indices must be in \[0, 19\), got 3 to 19"), ([3, 3], r"got 2 indices, 1 of them distinct")],
)
def test_positions_out_of_range_or_repeated_raise(indices, message):
    with pytest.raises(ValueError, match=message):
        pack_positions(torch.tensor(indices), 19)


def test_update_is_merged_matrix_at_support_and_zero_elsewhere(supported):
    qkv, out = layers(supported)
    spec, factors, _, _ = qkv.get_update("default")
    merged = torch.cat([spec.merge_matrix(matrix) for matrix in spec.matrices(factors)]).detach().flatten()
    delta = qkv.get_delta_weight("default").flatten()
    assert torch.nonzero(delta).flatten().tolist() == QKV.tolist()
    torch.testing.assert_close(delta[QKV], merged[QKV])
    assert qkv.budgets("default") == (2, 1, 1)
    assert not out.get_delta_weight("default").any()


def test_training_equals_evaluation_and_all_factors_have_gradients(supported):
    x = torch.randn(3, 4)
    trained = supported.train()(x)
    trained.square().sum().backward()
    qkv, out = layers(supported)
    assert all(p.grad.abs().sum() > 0 for n, p in qkv.named_parameters() if "snella_A" in n or "snella_B" in n)
    assert not any(p.grad.any() for n, p in out.named_parameters() if "snella_" in n)
    with torch.no_grad():
        assert torch.equal(supported.eval()(x), trained)
        merged = copy.deepcopy(supported).merge_and_unload()
        assert torch.equal(merged(x), trained)


def test_support_is_saved_with_adapter(supported, tmp_path):
    x = torch.randn(3, 4)
    supported.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model(), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(x), supported.eval()(x))
    assert layers(loaded)[0].budgets("default") == (2, 1, 1)


def test_allocator_does_not_change_support(supported):
    with pytest.raises(ValueError, match=r"fixed support of \[2, 1, 1\] entries in 'qkv'"):
        layers(supported)[0].set_budget("default", [1, 1, 1])
    optimizer = torch.optim.SGD([p for p in supported.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ValueError, match="train it without a BudgetAllocator"):
        BudgetAllocator(supported, total_epochs=2, steps_per_epoch=2).attach(optimizer)


def test_set_support_requires_fixed_support():
    competing = get_peft_model(model(), SnellaConfig(r=4, target_modules=["qkv"]))
    with pytest.raises(ValueError, match=r"adapter 'default' must have a fixed support; .*fixed_support=True"):
        set_support(layers(competing)[0], "default", QKV)


def test_fixed_support_requires_a_single_active_adapter(supported):
    supported.add_adapter("other", SnellaConfig(r=4, target_modules=["qkv"]))
    supported.base_model.set_adapter(["default", "other"])
    with pytest.raises(NotImplementedError, match=r"\['default', 'other'\] cannot be trained together"):
        supported.train()(torch.randn(2, 4))
    with torch.no_grad():
        both = supported.eval()(torch.randn(2, 4))
    assert both.isfinite().all()


def test_update_regularization_raises():
    with pytest.raises(ValueError, match=r"fixed_support=True requires update_dropout=0 .*got 0.1 and 0.1"):
        SnellaConfig(fixed_support=True, preset="official")
