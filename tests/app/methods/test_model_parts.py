import pytest
import timm
import torch

from snella_app.methods.model_parts import find_blocks, find_head


@pytest.mark.parametrize(
    ("name", "first", "last", "count"),
    [
        ("test_vit", "blocks.0", "blocks.5", 6),
        ("test_convnext", "stages.0.blocks.0", "stages.3.blocks.1", 9),
        ("test_resnet", "layer1.0", "layer4.0", 4),
        ("test_efficientnet", "blocks.0.0", "blocks.4.0", 5),
        ("swin_tiny_patch4_window7_224", "layers.0.blocks.0", "layers.3.blocks.1", 12),
    ],
)
def test_blocks_are_found_in_forward_order(name, first, last, count):
    with torch.device("meta"):
        model = timm.create_model(name)
    head = "fc" if name == "test_resnet" else "head"
    names = [n for n, _ in find_blocks(model, head)]
    assert names[0] == first and names[-1] == last
    assert len(names) == count


def test_a_distilled_model_with_two_heads_is_rejected():
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3, depth=1)
    for declared in (("head", "head_dist"), ["head", "head_dist"]):
        model.pretrained_cfg = {**dict(model.pretrained_cfg), "classifier": declared}
        with pytest.raises(ValueError, match="has 2 heads, for distillation; use a model with one head"):
            find_head(model)
