import math

import pytest
import torch

from snella_app.methods import build_method
from snella_lab.methods.prompts import Prompts


def tokens_of(model, images):
    """Return the input of the first block."""
    return model.norm_pre(model._pos_embed(model.patch_embed(images)))


def with_prompts(x, prompts):
    return torch.cat([x[:, :1], prompts.expand(len(x), -1, -1), x[:, 1:]], dim=1)


def scores(model, x):
    return model.head(model.fc_norm(model.pool(model.norm(x))))


def test_deep_prompts_are_new_at_each_block(make_model, images):
    plain = make_model().eval()
    model = build_method("vpt-deep-3", make_model()).eval()
    with torch.no_grad():
        x = tokens_of(plain, images)
        for block, prompted in zip(plain.blocks, model.blocks, strict=True):
            y = block(with_prompts(x, prompted.prompts.tokens))
            x = torch.cat([y[:, :1], y[:, 4:]], dim=1)
        torch.testing.assert_close(model(images), scores(plain, x))


def test_shallow_prompts_pass_through_all_blocks(make_model, images):
    plain = make_model().eval()
    model = build_method("vpt-shallow-3", make_model()).eval()
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "blocks.0.prompts.tokens",
        "head.weight",
        "head.bias",
    ]
    with torch.no_grad():
        x = with_prompts(tokens_of(plain, images), model.blocks[0].prompts.tokens)
        for block in plain.blocks:
            x = block(x)
        x = torch.cat([x[:, :1], x[:, 4:]], dim=1)
        torch.testing.assert_close(model(images), scores(plain, x))


@pytest.mark.parametrize("options", [{"global_pool": "avg"}, {"class_token": False, "global_pool": "avg"}])
@pytest.mark.parametrize("method", ["vpt-shallow-2", "vpt-deep-2"])
def test_pooling_over_patches_excludes_prompts(method, options, make_model, images):
    model = build_method(method, make_model(**options)).eval()
    prefix = 0 if "class_token" in options else 1
    assert model.forward_features(images).shape == (4, prefix + 4, 64)
    assert model.blocks[0].prompts.prefix == prefix


def test_initial_values_are_in_the_glorot_range():
    torch.manual_seed(0)
    tokens = Prompts(50, 64, patch_area=256).tokens
    bound = math.sqrt(6 / (3 * 256 + 64))
    assert tokens.abs().max() <= bound
    assert tokens.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_dropout_acts_on_prompts_only_in_training(make_model, images):
    model = build_method("vpt-deep-4", make_model(), dropout=0.5)
    with torch.no_grad():
        assert not torch.equal(model.train()(images), model(images))
        assert torch.equal(model.eval()(images), model(images))


def test_dropout_differs_between_images():
    torch.manual_seed(0)
    first, second = Prompts(4, 8, dropout=0.5).train().insert(torch.zeros(2, 3, 8))
    assert not torch.equal(first == 0, second == 0)


def test_a_model_without_one_token_sequence_is_rejected(make_model):
    for name in ("test_convnext", "test_resnet"):
        with pytest.raises(
            ValueError, match=r"'vpt-deep' cannot be applied to (ConvNeXt|ResNet): its blocks do not share"
        ):
            build_method("vpt-deep", make_model(name))


def test_a_model_with_rotary_embeddings_is_rejected(make_model):
    import timm

    eva = timm.create_model("eva02_tiny_patch14_224", img_size=28, depth=1, embed_dim=24, num_heads=2, num_classes=2)
    with pytest.raises(
        ValueError, match=r"'vpt-shallow' cannot be applied to Eva: its attention uses rotary or relative positions"
    ):
        build_method("vpt-shallow", eva)
    beit = timm.create_model("beit_base_patch16_224", img_size=32, depth=1, embed_dim=24, num_heads=2, num_classes=2)
    with pytest.raises(
        ValueError, match=r"'vqt' cannot be applied to Beit: its attention uses rotary or relative positions"
    ):
        build_method("vqt", beit)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("vit_srelpos_small_patch16_224", {}, "rotary or relative positions"),
        ("beit_base_patch16_224", {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}, "rotary or relative"),
        ("convit_tiny", {}, "rotary or relative positions"),
        ("xcit_nano_12_p16_224", {}, "its blocks do not share one token sequence"),
    ],
)
@pytest.mark.parametrize("method", ["vpt-deep", "vpt-shallow"])
def test_other_position_embeddings_and_feature_map_blocks_are_rejected(method, name, options, reason):
    import timm

    sizes = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2}
    with pytest.raises(ValueError, match=f"method '{method}' cannot be applied to .*{reason}"):
        build_method(method, timm.create_model(name, num_classes=2, **sizes, **options))


def test_unsupported_blocks_are_rejected():
    import timm
    from torch import nn

    model = timm.create_model("test_vit", img_size=32, num_classes=2)
    model.blocks[1].norm1 = nn.Identity()
    with pytest.raises(ValueError, match="its blocks lack attn, mlp or a normalization layer norm1"):
        build_method("vpt-deep", model)
