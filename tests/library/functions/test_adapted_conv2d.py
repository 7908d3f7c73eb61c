"""`Conv2dOp` and adapted convolutions against `F.conv2d` and autograd."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from snella.autograd import add_by_autograd
from snella.ops import Conv2dOp

from .problems import DRAWS, Problem, assert_close_to_reference, make_problem, solve

LAYERS = [  # channels in, channels out, kernel size, settings, input size
    pytest.param(4, 6, (1, 1), {}, (5, 5), id="1x1"),
    pytest.param(3, 5, (3, 3), {"padding": (1, 1)}, (6, 7), id="3x3"),
    pytest.param(3, 5, (2, 4), {"padding": (1, 2)}, (6, 7), id="2x4"),
    pytest.param(3, 5, (3, 3), {"stride": (2, 3)}, (8, 8), id="strided"),
    pytest.param(3, 8, (4, 4), {"stride": (4, 4)}, (9, 10), id="patches-with-remainder"),
    pytest.param(3, 5, (3, 2), {"dilation": (2, 3), "padding": (2, 0)}, (8, 8), id="dilated"),
    pytest.param(4, 6, (3, 3), {"groups": 2, "padding": (1, 1)}, (5, 5), id="grouped"),
    pytest.param(4, 8, (3, 3), {"groups": 4, "padding": (1, 1)}, (5, 5), id="depthwise"),
    pytest.param(3, 5, (3, 5), {"padding": "same", "dilation": (2, 1)}, (6, 7), id="same"),
    pytest.param(3, 5, (3, 3), {"padding": "valid"}, (6, 7), id="valid"),
]
BATCHES = pytest.mark.parametrize("batch", [(2,), (), (0,)], ids=["batched", "unbatched", "empty"])


def make_layer(inputs, outputs, kernel_size, settings, size, batch=(2,), seed=0, **options) -> Problem:
    product = Conv2dOp(**settings)
    generator = torch.Generator().manual_seed(seed)
    shape = torch.Size((outputs, inputs // product.groups, *kernel_size))
    problem = make_problem(m=outputs, n=shape[1:].numel(), seed=seed, **options)
    dtype = problem.tensors["x"].dtype
    x = torch.randn(*batch, inputs, *size, generator=generator, dtype=torch.float64).to(dtype)
    tensors = problem.tensors | {"x": x, "weight": problem.tensors["weight"].reshape(shape)}
    y_shape = product(x, tensors["weight"], None).shape
    grad_y = torch.randn(y_shape, generator=generator, dtype=torch.float64).to(dtype)
    return replace(problem, tensors=tensors, product=product, grad_y=grad_y)


@pytest.mark.parametrize(("inputs", "outputs", "kernel_size", "settings", "size"), LAYERS)
@BATCHES
def test_op_and_gradients_equal_conv2d(inputs, outputs, kernel_size, settings, size, batch):
    layer = make_layer(inputs, outputs, kernel_size, settings, size, batch, dtype=torch.float64)
    x, weight, bias = (layer.tensors[name].requires_grad_() for name in ("x", "weight", "bias"))
    y = F.conv2d(x, weight, bias, **settings)
    expected = torch.autograd.grad(y, (x, weight, bias), layer.grad_y)
    with torch.no_grad():
        actual = (
            layer.product.grad_input(layer.grad_y, weight, x.shape),
            layer.product.grad_weight(layer.grad_y, x, weight.shape),
            layer.product.grad_bias(layer.grad_y),
        )
        torch.testing.assert_close(layer.product(x, weight, bias), y, rtol=1e-13, atol=1e-13)
    for value, exact_value in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, exact_value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("inputs", "outputs", "kernel_size", "settings", "size"), LAYERS)
@BATCHES
@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_adapted_convolution_equals_conv2d_with_effective_weight(
    inputs, outputs, kernel_size, settings, size, batch, impl
):
    layer = make_layer(inputs, outputs, kernel_size, settings, size, batch, dtype=torch.float64)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in layer.tensors.items()}
    effective = add_by_autograd(leaves["weight"], [layer.update(leaves)])[0]
    y = F.conv2d(leaves["x"], effective, leaves["bias"], **settings)
    expected = torch.autograd.grad(y, list(leaves.values()), layer.grad_y)
    actual = solve(layer, impl)
    torch.testing.assert_close(actual["y"], y.detach(), rtol=1e-12, atol=1e-12)
    for name, exact_value in zip(leaves, expected, strict=True):
        torch.testing.assert_close(actual[name], exact_value, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 4])
def test_adapted_convolution_is_close_to_reference(base_dtype, groups):
    settings = {"padding": (1, 1), "groups": groups}
    layers = [
        make_layer(4, 8, (3, 3), settings, (5, 6), seed=seed, dtype=torch.float32, base_dtype=base_dtype)
        for seed in range(DRAWS)
    ]
    assert_close_to_reference(layers)


@pytest.mark.parametrize("channels_last_names", [("x",), ("weight",), ("x", "weight")], ids=["x", "weight", "both"])
def test_channels_last_is_close_to_reference(channels_last_names):
    layers = [make_layer(4, 6, (3, 2), {"padding": (1, 0)}, (5, 6), seed=seed) for seed in range(DRAWS)]
    for layer in layers:
        for name in channels_last_names:
            layer.tensors[name] = layer.tensors[name].to(memory_format=torch.channels_last)
    assert_close_to_reference(layers)


@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_update_without_base_weight_has_the_weight_shape(impl):
    layer = make_layer(4, 6, (3, 3), {"groups": 2}, (5, 5), dtype=torch.float64)
    shape = layer.tensors["weight"].shape
    update_only = replace(layer, tensors=layer.tensors | {"weight": None, "bias": None}, weight_shape=shape)
    sparse = add_by_autograd(None, [layer.update(layer.tensors)], shape)[0]
    expected = F.conv2d(layer.tensors["x"], sparse, groups=2)
    actual = solve(update_only, impl)
    torch.testing.assert_close(actual["y"], expected, rtol=1e-12, atol=1e-12)
    for name, exact_value in solve(update_only, "reference").items():
        torch.testing.assert_close(actual[name], exact_value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("padding", "kernel_size", "dilation", "pixels"),
    [
        ("valid", (3, 3), (1, 1), (0, 0)),
        ("same", (3, 5), (2, 1), (2, 2)),
        ("same", (2, 1), (2, 1), (1, 0)),
        ((3, 1), (2, 2), (1, 1), (3, 1)),
    ],
)
def test_padding_resolves_to_pixels(padding, kernel_size, dilation, pixels):
    product = Conv2dOp(padding=padding, dilation=dilation)
    assert product.padding_sizes(torch.Size((4, 3, *kernel_size))) == pixels


@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_same_padding_of_even_kernel_raises_before_computation(impl):
    layer = make_layer(3, 5, (2, 3), {}, (6, 6))
    layer = replace(layer, product=Conv2dOp(padding="same"))
    with pytest.raises(
        NotImplementedError,
        match=r"an odd kernel size or an even dilation, got kernel_size=\[2, 3\] with dilation=\[1, 1\]; pad",
    ):
        layer.forward(layer.tensors, impl)


def test_uninitialized_memory_is_not_read():
    layer = make_layer(4, 8, (3, 3), {"padding": (1, 1)}, (5, 6))
    before = solve(layer, "eager")
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        after = solve(layer, "eager")
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(after[name], value) and isinstance(value, Tensor) for name, value in before.items())
