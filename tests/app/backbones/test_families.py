"""Adapted matrices and head of each timm family."""

import functools

import pytest
import timm
import torch
from peft import get_peft_model
from timm.models.mlp_mixer import MlpMixer

from snella import SnellaConfig
from snella.matrices import adapted_matrices
from snella_app.methods.model_parts import adaptable_layers, find_head

ATTENTION = {"attn.q", "attn.k", "attn.v", "attn.proj"}
MLP = {"mlp.fc1", "mlp.fc2"}
VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}
SWIN = {"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4), "window_size": 4}
# name, arguments, matrix types, number of matrices, head
FAMILIES = [
    ("vit_base_patch16_224", VIT, ATTENTION | MLP, 12, "head"),
    ("vit_base_patch14_dinov2", VIT | {"patch_size": 16}, ATTENTION | MLP, 12, "head"),
    ("vit_base_patch14_reg4_dinov2", VIT | {"patch_size": 16}, ATTENTION | MLP, 12, "head"),
    ("vit_base_patch16_clip_224", VIT, ATTENTION | MLP, 12, "head"),
    (
        "vit_base_patch16_siglip_224",
        VIT | {"num_heads": 2},
        ATTENTION
        | MLP
        | {"attn_pool.q", "attn_pool.k", "attn_pool.v", "attn_pool.proj", "attn_pool.mlp.fc1", "attn_pool.mlp.fc2"},
        18,
        "head",
    ),
    ("swin_base_patch4_window7_224", SWIN, ATTENTION | MLP, 12, "head.fc"),
    ("convnext_base", {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 16)}, MLP, 8, "head.fc"),
    (
        "mixer",
        {"embed_dim": 16, "num_blocks": 2},
        {f"{part}.fc{k}" for part in ("mlp_tokens", "mlp_channels") for k in (1, 2)},
        8,
        "head",
    ),
]


@pytest.mark.parametrize(
    ("name", "options", "kinds", "count", "head"), FAMILIES, ids=[family[0] for family in FAMILIES]
)
def test_all_matrices_of_a_family_are_adapted_and_trained(name, options, kinds, count, head):
    torch.manual_seed(0)
    size = {} if name == "convnext_base" else {"img_size": 32}
    # timm's mixers have a fixed width
    build = MlpMixer if name == "mixer" else functools.partial(timm.create_model, name)
    model = build(num_classes=3, **options, **size)
    with torch.no_grad():
        for parameter in model.parameters():  # some heads start at zero
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert find_head(model) == head
    targets = adaptable_layers(model, head)
    adapted = get_peft_model(
        model, SnellaConfig(r=2, target_modules=targets, modules_to_save=[head], init_weights=False)
    )
    matrices = adapted_matrices(adapted)
    actual = {matrix.kind.replace("_pool.kv", "_pool") for matrix in matrices}
    assert actual == kinds
    assert len(matrices) == count
    adapted.train()(torch.randn(2, 3, 32, 32)).square().sum().backward()
    without_gradient = [name for name, p in adapted.named_parameters() if p.requires_grad and p.grad is None]
    assert not without_gradient
    assert all(matrix.layer.snella_A["default"].grad.abs().sum() > 0 for matrix in matrices)


def test_a_convolutional_network_is_adapted_except_its_stem():
    model = timm.create_model("test_resnet", num_classes=3)
    head = find_head(model)
    targets = adaptable_layers(model, head)
    assert head == "fc" and "conv1.0" not in targets and "layer1.0.conv1" in targets
    adapted = get_peft_model(
        model, SnellaConfig(r=2, target_modules=targets, modules_to_save=[head], init_weights=False)
    )
    adapted.train()(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert {matrix.module_name for matrix in adapted_matrices(adapted)} == set(targets)
    assert all(matrix.layer.snella_B["default"].grad is not None for matrix in adapted_matrices(adapted))
