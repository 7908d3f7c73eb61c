from functools import partial

import pytest
import torch
from timm.layers import BatchNormAct2d, LayerNorm2d, ScaledStdConv2d
from timm.layers.norm import LayerNorm2dFp32
from torch import nn
from transformers.models.sam.modeling_sam import SamLayerNorm

from snella_app.methods import build_method, merge_trained
from snella_lab.methods.adapter import ScaleShift


def test_each_channel_is_scaled_and_shifted():
    ssf = ScaleShift(3, init_std=0.0)
    x = torch.randn(2, 5, 3)
    assert torch.equal(ssf(x), x)
    with torch.no_grad():
        ssf.scale.copy_(torch.tensor([1.0, 2.0, 3.0]))
        ssf.shift.copy_(torch.tensor([0.5, 0.0, -0.5]))
    torch.testing.assert_close(ssf(x), x * torch.tensor([1.0, 2.0, 3.0]) + torch.tensor([0.5, 0.0, -0.5]))
    of_maps = ScaleShift(3, dim=1)
    of_maps.load_state_dict(ssf.state_dict())
    maps = x.transpose(1, 2).reshape(2, 3, 5, 1)
    torch.testing.assert_close(of_maps(maps).reshape(2, 3, 5).transpose(1, 2), ssf(x))


def test_initialization_is_near_the_identity_as_published():
    torch.manual_seed(0)
    ssf = ScaleShift(5000)
    assert ssf.scale.mean().item() == pytest.approx(1, abs=2e-3) and ssf.scale.std().item() == pytest.approx(
        0.02, rel=0.1
    )
    assert ssf.shift.mean().item() == pytest.approx(0, abs=2e-3) and ssf.shift.std().item() == pytest.approx(
        0.02, rel=0.1
    )


def test_every_operation_except_the_head_is_scaled_and_shifted(make_model):
    model = build_method("ssf", make_model())
    places = {n.removesuffix(".ssf") for n, m in model.named_modules() if isinstance(m, ScaleShift)}
    inside = {
        f"blocks.{i}.{k}" for i in range(6) for k in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    }
    assert places == inside | {"patch_embed.proj", "norm"}


@pytest.mark.parametrize(
    "make_norm", [LayerNorm2d, LayerNorm2dFp32, partial(SamLayerNorm, data_format="channels_first")]
)
def test_outputs_of_feature_map_norms_are_scaled_per_channel(make_norm):
    layers = nn.Sequential(nn.Conv2d(3, 4, 1), make_norm(4), nn.Flatten(), nn.Linear(4 * 5 * 6, 2))
    layers.num_classes = 2
    model = build_method("ssf", layers, head="3", init_std=0.3).eval()
    maps = torch.randn(2, 3, 5, 6)
    with torch.no_grad():
        ssf = model[1].ssf
        expected = make_norm(4)(model[0](maps)) * ssf.scale.view(1, 4, 1, 1) + ssf.shift.view(1, 4, 1, 1)
        torch.testing.assert_close(model[:2](maps), expected)
        outputs = model(maps)
        torch.testing.assert_close(merge_trained(model)(maps), outputs)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_resnet"])
def test_folded_weights_give_the_same_outputs(name, make_model):
    model = build_method("ssf", make_model(name), init_std=0.2).eval()
    size = 32 if "vit" in name else 64
    images = torch.randn(2, 3, size, size)
    if name == "test_resnet":
        with pytest.raises(
            ValueError,
            match=r"'ssf' cannot be merged into ResNet: it requires layers with a bias .*, unlike 'conv1.0' and",
        ):
            merge_trained(model)
        return
    with torch.no_grad():
        outputs = model(images)
        merged = merge_trained(model)
        assert not [n for n, _ in merged.named_modules() if n.endswith("ssf")]
        torch.testing.assert_close(merged(images), outputs, atol=1e-4, rtol=1e-4)


def test_layers_that_share_a_weight_are_not_merged():
    layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    layers.num_classes = 2
    layers[1].weight = layers[0].weight
    model = build_method("ssf", layers, head="2")
    with pytest.raises(ValueError, match="several layers share the weight or bias of '0' and 1 more"):
        merge_trained(model)


def test_batch_and_group_normalization_fold_too():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 2))
    layers.num_classes = 2
    model = build_method("ssf", layers, head="4", init_std=0.3).eval()
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        outputs = model(x)
        torch.testing.assert_close(merge_trained(model)(x), outputs)


def test_layer_norms_over_several_axes_remain_unchanged():
    layers = nn.Sequential(nn.Conv2d(4, 4, 1), nn.LayerNorm([4, 4, 4]), nn.Flatten(), nn.Linear(64, 2))
    model = build_method("ssf", layers, head="3", init_std=0.3).eval()
    x = torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        outputs = model(x)
        torch.testing.assert_close(merge_trained(model)(x), outputs)


def test_a_model_without_supported_operations_is_rejected():
    with pytest.raises(ValueError, match=r"'ssf' cannot be applied to Sequential: .* no .* outside the head '1'"):
        build_method("ssf", nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), head="1")


def test_unused_operations_are_reported_once(images):
    import timm

    beit = timm.create_model("beit_base_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2, num_classes=2)
    model = build_method("ssf", beit).train()
    with pytest.warns(UserWarning, match=r"has no effect on 2 layers of Beit, e.g. \['blocks.0.attn.qkv'"):
        model(images)
    model(images)


@pytest.mark.parametrize("layer", [BatchNormAct2d(4), ScaledStdConv2d(4, 4, 1)])
def test_layers_that_are_not_affine_cannot_be_merged(layer):
    model = build_method("ssf", nn.Sequential(nn.Conv2d(3, 4, 1), layer, nn.Flatten(), nn.Linear(16, 2)), head="3")
    with pytest.raises(ValueError, match="without activation or weight standardization, unlike '1'; keep"):
        merge_trained(model)


@pytest.mark.parametrize("bias", [True, False])
def test_a_projection_that_attention_reads_directly_is_unchanged_by_merging(bias):
    layers = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 2))
    layers[0].self_attn = nn.MultiheadAttention(8, 2, batch_first=True, bias=bias)
    model = build_method("ssf", layers, head="1", init_std=0.3).eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        outputs = model(x)
        torch.testing.assert_close(merge_trained(model)(x), outputs)
