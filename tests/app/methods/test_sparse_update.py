"""Layers with individually trained weight entries."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from snella_lab.methods.sparse_update import SparseEntries, SparseUpdate, can_be_sparse, merge_sparse

INDICES = torch.tensor([0, 4, 5])


@pytest.fixture(params=["linear", "conv", "reflect"])
def case(request):
    """Return a layer and an input."""
    torch.manual_seed(0)
    if request.param == "linear":
        return nn.Linear(3, 4), torch.randn(2, 5, 3)
    mode = "zeros" if request.param == "conv" else "reflect"
    return nn.Conv2d(4, 6, 3, padding=1, groups=2, padding_mode=mode), torch.randn(2, 4, 5, 5)


def test_a_sparse_update_trains_only_the_selected_entries_and_merges_bit_for_bit(case):
    layer, x = case
    layer.requires_grad_(False)
    before, outputs = layer.weight.clone(), layer(x)
    sparse = SparseUpdate(layer, INDICES)
    assert torch.equal(sparse(x), outputs)
    optimizer = torch.optim.SGD([p for p in sparse.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        sparse(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    outputs = sparse(x)
    assert torch.equal(layer.weight, before)
    model = nn.Sequential(sparse)
    merge_sparse(model)
    assert model[0] is layer
    assert torch.equal(layer(x), outputs)
    assert torch.nonzero((layer.weight - before).flatten()).flatten().tolist() == INDICES.tolist()


def test_the_gradient_equals_the_weight_gradient_at_the_selected_entries(case):
    layer, x = case
    sparse = SparseUpdate(layer, INDICES)
    layer.requires_grad_(False)
    sparse(x).square().sum().backward()
    layer.weight.requires_grad_(True)
    layer(x).square().sum().backward()
    torch.testing.assert_close(sparse.values.grad, layer.weight.grad.flatten()[INDICES])


def test_each_entry_stores_two_numbers(case):
    sparse = SparseUpdate(case[0].requires_grad_(False), INDICES)
    assert [p.numel() for p in sparse.parameters() if p.requires_grad] == [3]
    assert sparse.saved_buffers == ("indices",)
    assert (sparse.indices.dtype, sparse.indices.numel()) == (torch.int32, 3)


def test_direct_weight_access_returns_the_trained_weight(case):
    layer, _ = case
    sparse = SparseUpdate(layer.requires_grad_(False), INDICES)
    sparse.values.data.fill_(1.0)
    assert sparse.weight.requires_grad
    assert (sparse.weight - layer.weight).flatten()[INDICES].allclose(torch.ones(3))
    assert sparse.bias is layer.bias
    assert sparse.out_features == layer.out_features if isinstance(layer, nn.Linear) else sparse.groups == 2
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = sparse.no_such_thing


def test_autocast_uses_half_precision_like_the_original_layer(case):
    layer, x = case
    sparse = SparseUpdate(layer.requires_grad_(False), INDICES)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = sparse(x)
        assert outputs.dtype == torch.bfloat16
        assert torch.equal(outputs, layer(x))
    outputs.float().sum().backward()
    assert sparse.values.grad.dtype == torch.float32


@pytest.mark.parametrize("indices", [[1, 1], [2, 1], [0, 12], [-1, 0], [[0, 1]]])
def test_positions_out_of_range_repeated_or_out_of_order_are_rejected(indices):
    with pytest.raises(ValueError, match=r"one-dimensional, strictly ascending positions in \[0, 12\), got tensor"):
        SparseUpdate(nn.Linear(3, 4), torch.tensor(indices))


def test_a_layer_with_a_custom_forward_pass_is_rejected():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    assert not can_be_sparse(Scaled(3, 4))
    with pytest.raises(TypeError, match=r"Linear or Conv2d with the original forward pass, got <class .*Scaled"):
        SparseUpdate(Scaled(3, 4), INDICES)


def test_entries_of_a_vector_are_trained_through_a_parametrization():
    norm = nn.LayerNorm(4).requires_grad_(False)
    parametrize.register_parametrization(norm, "bias", SparseEntries(norm.bias, torch.tensor([1, 3])))
    entries = norm.parametrizations["bias"][0]
    norm(torch.randn(2, 4)).sum().backward()
    assert entries.values.grad.tolist() == [2.0, 2.0]
    entries.values.data.copy_(torch.tensor([5.0, 7.0]))
    assert norm.bias.tolist() == [0.0, 5.0, 0.0, 7.0]
