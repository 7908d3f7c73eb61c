"""Adapted models under `torch.compile`, without graph breaks."""

import os
import shutil

import pytest
import timm
import torch
from peft import get_peft_model
from torch import nn

from snella import SnellaConfig

BACKEND = "aot_eager"  # traces forward and backward graphs without code generation


@pytest.fixture(autouse=True)
def _reset_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def vit(**options):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=4, img_size=32, depth=1)
    config = SnellaConfig(
        r=4, target_modules="all-linear", modules_to_save=["head"], target_sparsity=0.5, init_sparsity=0.5, **options
    )
    return get_peft_model(model, config).train()


def convnet():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, stride=2, padding_mode="circular")
    )
    return get_peft_model(model, SnellaConfig(r=4, target_modules=["0", "2"], target_sparsity=0.5, init_sparsity=0.5))


def sampled():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 8), nn.GELU(), nn.Linear(8, 4))
    config = SnellaConfig(
        r=4,
        target_modules=["0", "2"],
        target_sparsity=0.5,
        init_sparsity=0.5,
        weight_gradient="sample:1/2",
    )
    return get_peft_model(model, config)


def linear():
    torch.manual_seed(0)
    config = SnellaConfig(r=4, target_modules=["0"], target_sparsity=0.5, init_sparsity=0.5)
    return get_peft_model(nn.Sequential(nn.Linear(32, 8)), config)


def step(function, model, x):
    model.zero_grad()
    torch.manual_seed(1)
    y = function(x)
    y.square().sum().backward()
    return y.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("build", [vit, convnet, sampled])
def test_compiled_model_equals_eager_in_one_graph(build):
    model, x = build(), torch.randn(2, 3, 32, 32)
    y, grads = step(model, model, x)
    compiled = torch.compile(model, fullgraph=True, backend=BACKEND)
    eager_y, eager_grads = step(compiled, model, x)
    torch.testing.assert_close(eager_y, y)  # a graph may compute the same product with another op
    assert eager_grads.keys() == grads.keys()
    for name in grads:
        torch.testing.assert_close(eager_grads[name], grads[name], msg=name)


def test_operators_are_excluded_from_cuda_graphs():
    operators = (torch.ops.snella.adapted_layer, torch.ops.snella.adapted_layer_backward)
    assert all(torch.Tag.cudagraph_unsafe in operator.default.tags for operator in operators)


def test_budget_changes_do_not_recompile():
    model, x = convnet(), torch.randn(2, 3, 8, 8)
    compiled = torch.compile(model, fullgraph=True, backend=BACKEND)
    before = compiled(x)
    layer = model.base_model.model[0]
    layer.set_budget("default", [5])
    with torch._dynamo.config.patch(error_on_recompile=True):
        after = compiled(x)
    torch.testing.assert_close(after, model(x))
    assert not torch.allclose(after, before)


def test_autocast_and_two_adapters_compile():
    model, x = convnet(), torch.randn(2, 3, 8, 8)
    model.add_adapter("second", SnellaConfig(r=4, target_modules=["0", "2"], target_sparsity=0.5, init_sparsity=0.5))
    model.base_model.set_adapter(["default", "second"])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = compiled(x), model(x)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)


def test_update_dropout_is_part_of_the_graph():
    model, x = vit(update_dropout=0.5, update_drop_path=0.5), torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    y, grads = step(model, model, x)
    eager_y, eager_grads = step(compiled, model, x)
    torch.testing.assert_close(eager_y, y)
    for name in grads:
        torch.testing.assert_close(eager_grads[name], grads[name], msg=name)


def test_disabled_and_merged_adapters_compile_to_base_layer():
    model, x = convnet().eval(), torch.randn(2, 3, 8, 8)
    expected = model(x)
    with model.disable_adapter():
        base = torch.compile(model, fullgraph=True, backend="eager")(x)
        torch.testing.assert_close(base, model(x))
    model.merge_adapter()
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), expected)


def test_compiled_model_unmerges_disabled_adapters():
    model, x = convnet().eval(), torch.randn(2, 3, 8, 8)
    with model.disable_adapter():
        expected = model(x)
    model.merge_adapter()
    compiled = torch.compile(model, backend="eager")
    with model.disable_adapter():
        assert torch.equal(compiled(x), expected)


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor imports deprecated torch modules
@pytest.mark.parametrize("build", [linear, pytest.param(vit, marks=pytest.mark.slow)])
def test_inductor_equals_eager_up_to_rounding(build):
    model, x = build(), torch.randn(2, 3, 32, 32)
    y, grads = step(model, model, x)
    eager_y, eager_grads = step(torch.compile(model, fullgraph=True), model, x)
    torch.testing.assert_close(eager_y, y)
    assert eager_grads.keys() == grads.keys()
    for name in grads:
        torch.testing.assert_close(eager_grads[name], grads[name], rtol=1e-3, atol=1e-4, msg=name)
