"""The table "Supported backbones" of docs/methods.md: supported pairs train, others are rejected."""

import re
from pathlib import Path

import pytest
import timm
import torch
from timm.models.convnext import ConvNeXt
from timm.models.swin_transformer import SwinTransformer

from snella_app.methods import METHODS, build_method, load_trained, save_trained, spec_of
from snella_app.methods.model_parts import is_inside

BACKBONES = {
    "swin": lambda: SwinTransformer(
        img_size=32, patch_size=4, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(1, 2), num_classes=3
    ),
    "convnext": lambda: ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 8, 16), num_classes=3),
    "resnet": lambda: timm.create_model("test_resnet", num_classes=3),
}

SMALL = {"shira": "shira-2", "fourierft": "fourierft-20"}
"""Methods whose default number exceeds the matrix size of these backbones."""


def documented_support():
    """Return `(method, backbone, is_supported)` from the table."""
    text = (Path(__file__).parents[3] / "docs" / "methods.md").read_text()
    section = text.split("## Supported backbones")[1].split("\n## ")[0]
    pairs = []
    for line in (line for line in section.splitlines() if "| yes |" in line):
        names, _, transformers, convolutional = (cell.strip() for cell in line.strip("|").split("|"))
        for name in re.findall(r"`([^`]+)`", names):
            for method in [m for m in METHODS if re.fullmatch(name.replace("*", ".+"), m)]:
                pairs += [(method, backbone, transformers == "yes") for backbone in ("swin", "convnext")]
                pairs.append((method, "resnet", convolutional == "yes"))
    return pairs


def make(backbone):
    torch.manual_seed(0)
    return BACKBONES[backbone]()


def test_the_table_lists_every_method():
    assert {method for method, *_ in documented_support()} == set(METHODS)


@pytest.mark.parametrize(
    ("method", "backbone"), [(m, b) for m, b, is_supported in documented_support() if is_supported]
)
def test_supported_backbones_train_and_reload(method, backbone, batches, images, train_steps, tmp_path):
    model = build_method(SMALL.get(method, method), make(backbone), batches=batches)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    train_steps(model, steps=2)
    moved = {name for name, p in model.named_parameters() if p.requires_grad and not torch.equal(before[name], p)}
    head = spec_of(model).head
    of_backbone = {name for name in moved if not is_inside(name.removeprefix("base_model.model."), head)}
    assert bool(of_backbone) == (method not in ("linear", "mlp"))
    with torch.no_grad():
        outputs = model(images)
        save_trained(model, tmp_path)
        assert torch.equal(load_trained(tmp_path, make(backbone))(images), outputs)


@pytest.mark.parametrize(
    ("method", "backbone"), [(m, b) for m, b, is_supported in documented_support() if not is_supported]
)
def test_unsupported_backbones_are_rejected_by_name(method, backbone, batches):
    with pytest.raises(ValueError, match=f"method '{method}' .*(SwinTransformer|ConvNeXt|ResNet)"):
        build_method(method, make(backbone), batches=batches)
