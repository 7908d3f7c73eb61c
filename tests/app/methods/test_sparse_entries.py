"""Layer op with selected weight entries, and entries of merged matrices."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn.functional import conv2d, linear

from snella.kernels import KERNELS, Factors, KernelScalars, make_kernel
from snella.ops import Conv2dOp, LinearOp
from snella.update import UpdateSpec
from snella_lab.methods.sparse_update import fold_entries, layer_with_entries, merged_entries

INDICES = torch.tensor([1, 5, 6], dtype=torch.int32)


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_entry_is_added_at_its_position():
    weight = torch.arange(6.0).view(2, 3)
    folded = fold_entries(weight, torch.tensor([10.0, -1.0]), torch.tensor([1, 5], dtype=torch.int32))
    assert folded.tolist() == [[0.0, 11.0, 2.0], [3.0, 4.0, 4.0]]
    assert weight.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


@pytest.mark.parametrize("product", [LinearOp(), Conv2dOp(padding=(1, 1))])
def test_output_and_gradients_equal_those_of_folded_weight(product):
    torch.manual_seed(0)
    if isinstance(product, LinearOp):
        x, weight, plain = random(2, 4, 3), random(5, 3), linear
    else:
        x, weight = random(2, 3, 5, 4), random(5, 3, 3, 3)
        plain = lambda x, w, b: conv2d(x, w, b, padding=1)  # noqa: E731
    bias, values = random(5), random(3)
    y = layer_with_entries(x, weight, bias, values, INDICES, product)
    assert torch.equal(y, plain(x, fold_entries(weight, values, INDICES), bias))
    assert gradcheck(lambda *t: layer_with_entries(*t, INDICES, product), (x, weight, bias, values))


def test_dense_weight_is_not_saved_for_backward():
    saved = []
    x, weight, values = torch.randn(2, 40), torch.randn(30, 40), torch.zeros(3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer_with_entries(x, weight, None, values, INDICES, LinearOp())
    assert {t.data_ptr() for t in saved if t.numel() == weight.numel()} == {weight.data_ptr()}


def test_empty_support_still_gives_input_gradient():
    x, values = torch.ones(2, 3, requires_grad=True), torch.zeros(0, requires_grad=True)
    empty = torch.zeros(0, dtype=torch.int32)
    layer_with_entries(x, torch.ones(4, 3), None, values, empty, LinearOp()).sum().backward()
    assert values.grad.shape == (0,)
    assert x.grad.tolist() == [[4.0] * 3] * 2


@pytest.mark.parametrize("kernel", KERNELS)
def test_merged_entries_and_gradients_equal_those_of_dense_merge(kernel):
    torch.manual_seed(1)
    spec = make_kernel(kernel, num_pieces=2)
    shapes = {"piece_coeff": (2, 2), "alpha": (2,), "beta": (2,)}
    scalars = [
        random(*shapes[name]) if name in spec.scalars and name in shapes else None for name in KernelScalars._fields
    ]
    update = UpdateSpec(spec, (4, 2), scaling=3.0)
    factors = Factors(random(2, 5, 4), random(6, 4), *scalars)
    indices = torch.tensor([0, 7, 19, 20, 29], dtype=torch.int32)  # the last two belong to the second matrix
    complete = 3.0 * torch.cat([update.merge_matrix(matrix) for matrix in update.matrices(factors)]).flatten()
    torch.testing.assert_close(merged_entries(update, factors, indices), complete[indices.long()])
    tensors = tuple(t for t in factors if t is not None)
    positions = [k for k, t in enumerate(factors) if t is not None]

    def entries(*leaves):
        dense_grad = list(factors)
        for position, tensor in zip(positions, leaves, strict=True):
            dense_grad[position] = tensor
        return merged_entries(update, Factors(*dense_grad), indices)

    assert gradcheck(entries, tensors)
