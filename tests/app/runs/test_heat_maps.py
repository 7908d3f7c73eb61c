"""Heat maps of models that depend on one known region."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from snella_app.methods import build_method
from snella_app.runs.explain import attention_rollout, heat_maps, overlay_heat
from snella_app.runs.layer_probe import LayerProbe, layer_features, linear_head, probed_layers

pytest.importorskip("captum")
SIZE = 64


SWIN = {"depths": (1, 1), "num_heads": (2, 2), "embed_dim": 16, "window_size": 4, "img_size": SIZE}


@pytest.mark.parametrize(
    ("name", "options"),
    [("test_vit", {"img_size": SIZE}), ("test_convnext", {}), ("swin_tiny_patch4_window7_224", SWIN)],
)
def test_every_architecture_has_a_map_per_image(name, options):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=2, **options).eval()
    images, outputs = torch.randn(3, 3, SIZE, SIZE), torch.tensor([0, 1, 1])
    heat = heat_maps(model, images, outputs)
    assert heat.shape == (3, SIZE, SIZE) and heat.min() >= 0 and heat.max() <= 1
    assert np.allclose(heat[1], heat_maps(model, images[1:2], outputs[1:2])[0], atol=1e-4)
    assert not np.allclose(heat[1], heat_maps(model, images[1:2], torch.tensor([0]))[0], atol=1e-2)


def test_the_map_of_a_linear_head_is_its_contribution_at_each_position():
    model = timm.create_model("test_resnet", num_classes=2).eval()
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        features = model.forward_features(images)  # [2, c, 2, 2]
        weight = model.get_classifier().weight.detach()
    grid = torch.einsum("nchw,nc->nhw", features, weight[[0, 1]]).clamp_min(0)
    grid = grid / grid.amax((1, 2), keepdim=True).clamp_min(1e-12)
    heat = heat_maps(model, images, torch.tensor([0, 1]))
    expected = nn.functional.interpolate(grid[:, None], (SIZE, SIZE), mode="bilinear", align_corners=False)[:, 0]
    assert np.allclose(heat, expected, atol=1e-5)


@pytest.mark.parametrize(("name", "options"), [("test_vit", {"img_size": SIZE}), ("test_convnext", {})])
def test_the_map_of_a_head_on_several_layers_includes_all_of_them(name, options):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=2, **options).eval()
    layers, images = probed_layers(model), torch.randn(1, 3, SIZE, SIZE)
    with torch.no_grad():
        width = layer_features(model, images, layers).shape[1]
    weight = torch.zeros(2, width)
    first = model.num_features  # the pooled features precede those of the first layer
    weight[:, first : first + 16] = torch.randn(2, 16)
    probe = LayerProbe(model, layers, linear_head(weight, torch.zeros(2))).eval()
    maps = [heat_maps(probe, images, torch.tensor([output]))[0] for output in (0, 1)]
    assert max(heat.max() for heat in maps) > 0.5 and not np.allclose(*maps)


@pytest.mark.parametrize("method", ["snella-2", "vpt-deep"])
def test_maps_exclude_prompts_and_class_tokens(method):
    torch.manual_seed(0)
    model = build_method(method, timm.create_model("test_vit", num_classes=3, img_size=SIZE)).eval()
    images = torch.randn(1, 3, SIZE, SIZE)
    seen = []
    hook = model.get_base_model() if hasattr(model, "get_base_model") else model
    layer = hook.blocks[-1].norm1
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    target = model(images)[0, 2]
    handle.remove()
    (gradient,) = torch.autograd.grad(target, seen[0])
    grid = (gradient * seen[0]).sum(-1)[0, -16:].reshape(4, 4).clamp_min(0).detach()
    heat = heat_maps(model, images, torch.tensor([2]))[0]
    for row in range(4):
        for column in range(4):
            center = heat[16 * row + 7 : 16 * row + 9, 16 * column + 7 : 16 * column + 9].mean()
            assert center == pytest.approx(float(grid[row, column] / grid.max()), abs=0.05)


@pytest.mark.parametrize("method", ["vqt-2", "vqt-20"])  # fewer and more queries than patches
def test_a_layer_that_also_processes_queries_is_rejected(method):
    model = build_method(method, timm.create_model("test_vit", num_classes=2, img_size=SIZE)).eval()
    images = torch.randn(1, 3, SIZE, SIZE)
    with pytest.raises(ValueError, match="called once per forward pass, got 2 calls of LayerNorm; use rollout"):
        heat_maps(model, images, torch.tensor([0]))
    assert attention_rollout(model, images).shape == (1, SIZE, SIZE)


@pytest.mark.parametrize(("method", "pool"), [("snella-2", "token"), ("lora-2", "avg")])
def test_rollout_is_the_product_of_attentions_with_residuals(method, pool):
    torch.manual_seed(0)
    options = {"img_size": SIZE, "global_pool": pool}
    model = build_method(method, timm.create_model("test_vit", num_classes=3, **options)).eval()
    base, images = model.get_base_model(), torch.randn(2, 3, SIZE, SIZE)
    inputs = []
    handles = [
        block.attn.register_forward_hook(lambda module, args, output: inputs.append(args[0])) for block in base.blocks
    ]
    with torch.no_grad():
        expected_outputs = model(images)
        rolled = torch.eye(inputs[0].shape[1])
        for block, tokens in zip(base.blocks, inputs, strict=True):
            attention, (n, t, _) = block.attn, tokens.shape
            q, k, _ = attention.qkv(tokens).reshape(n, t, 3, attention.num_heads, attention.head_dim).unbind(2)
            scores = torch.einsum("nqhd,nkhd->nhqk", attention.q_norm(q), attention.k_norm(k)) * attention.scale
            rolled = (scores.softmax(-1).mean(1) + torch.eye(t)) / 2 @ rolled
    for handle in handles:
        handle.remove()
    first = base.num_prefix_tokens
    grid = (rolled[:, 0] if pool == "token" else rolled[:, first:].mean(1))[:, first:].reshape(2, 4, 4)
    grid = grid - grid.amin((1, 2), keepdim=True)
    grid = grid / grid.amax((1, 2), keepdim=True)
    expected = nn.functional.interpolate(grid[:, None], (SIZE, SIZE), mode="bilinear", align_corners=False)[:, 0]
    heat = attention_rollout(model, images)
    assert np.allclose(heat, expected, atol=1e-4) and heat.std() > 0.05
    with torch.no_grad():
        assert torch.equal(model(images), expected_outputs)
    assert not any(block.attn.attn_drop._forward_pre_hooks for block in base.blocks)


def test_rollout_of_a_distilled_model_includes_both_tokens():
    torch.manual_seed(0)
    options = {"img_size": SIZE, "embed_dim": 24, "depth": 1, "num_classes": 3}
    model = timm.create_model("deit_tiny_distilled_patch16_224", **options).eval()
    images, rolled = torch.randn(1, 3, SIZE, SIZE), []
    attention = model.blocks[0].attn
    attention.attn_drop.register_forward_pre_hook(lambda module, args: rolled.append(args[0].mean(1)))
    heat = attention_rollout(model, images)
    grid = rolled[0][0, :2].mean(0)[2:].reshape(4, 4)
    grid = (grid - grid.min()) / (grid.max() - grid.min())
    expected = nn.functional.interpolate(grid[None, None], (SIZE, SIZE), mode="bilinear", align_corners=False)
    assert np.allclose(heat[0], expected[0, 0].detach(), atol=1e-4)


def test_unsupported_models_have_no_rollout():
    with pytest.raises(ValueError, match="attention rollout needs a timm ViT, got ConvNeXt; use gradcam"):
        attention_rollout(timm.create_model("test_convnext", num_classes=2), torch.zeros(1, 3, SIZE, SIZE))
    model = build_method("vpt-deep-5", timm.create_model("test_vit", num_classes=3, img_size=SIZE)).eval()
    with pytest.raises(ValueError, match="does not support prompt tokens, but the method adds 5"):
        attention_rollout(model, torch.zeros(1, 3, SIZE, SIZE))


def test_a_model_without_feature_info_is_rejected():
    with pytest.raises(ValueError, match="heat maps need a timm model with feature_info, got Linear"):
        heat_maps(nn.Linear(2, 2), torch.zeros(1, 2), torch.tensor([0]))


def test_low_values_are_nearly_transparent():
    image, heat = Image.new("RGB", (8, 8), (200, 100, 50)), np.zeros((4, 4), np.float32)
    heat[:, 2:] = 1
    shown = np.asarray(overlay_heat(image, heat)).astype(int)
    assert np.abs(shown[4, 0] - [200, 100, 50]).max() <= 32
    assert np.abs(shown[4, 7] - [200, 100, 50]).max() > 60
