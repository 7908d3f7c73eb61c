import pytest
import torch
from torch import nn
from torch.nn import functional as F

from snella_app.methods import build_method


def with_random_norms(model):
    """Randomize norms and layer scales, so that each affects the output."""
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if "norm" in name or "ls" in name:
            nn.init.normal_(parameter, mean=1.0, std=0.2)
    return model


@pytest.mark.parametrize("options", [{}, {"init_values": 0.5, "qk_norm": True}, {"qkv_bias": False}])
def test_a_query_token_does_not_change_other_tokens(options, make_model, images):
    plain = with_random_norms(make_model(**options)).eval()
    model = build_method("vqt-2", with_random_norms(make_model(**options))).eval()
    parts = []
    with torch.no_grad():
        x = plain.norm_pre(plain._pos_embed(plain.patch_embed(images)))
        seen = x.shape[1]
        mask = torch.zeros(seen + 2, seen + 2)
        mask[:, seen:] = -torch.inf  # no token attends to the queries
        for block, queried in zip(plain.blocks, model.blocks, strict=True):
            y = block(torch.cat([x, queried.queries.tokens.expand(4, -1, -1)], dim=1), attn_mask=mask)
            x = y[:, :seen]
            parts.append(y[:, seen:].flatten(1))
        features = plain.forward_head(plain.norm(x), pre_logits=True)
        expected = torch.cat([features, *parts], dim=1) @ model.head.weight.T + model.head.bias
        torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)


def test_the_backbone_saves_no_tensors_for_the_backward_pass(make_model, images):
    model = build_method("vqt", make_model()).train()
    assert not model.forward_features(images).requires_grad
    model(images).sum().backward()
    assert all(block.queries.tokens.grad.abs().sum() > 0 for block in model.blocks)
    assert not any(hasattr(block.attn.qkv, "stored_output") for block in model.blocks)


def test_the_head_normalizes_features_and_summaries_to_unit_length(make_model, images):
    model = build_method("vqt", make_model(), normalize=True).eval()
    parts = []

    def record(head, inputs):
        parts.extend([inputs[0], *(source.summary.flatten(1) for source in head.sources)])

    model.head.register_forward_pre_hook(record)
    with torch.no_grad():
        scores = model(images)
        lengths = [part.norm(dim=1, keepdim=True) for part in parts]
        normalized = torch.cat([part / length for part, length in zip(parts, lengths, strict=True)], dim=1)
        torch.testing.assert_close(scores, F.linear(normalized, model.head.weight, model.head.bias))
    assert len(parts) == 1 + len(model.blocks) and (torch.stack(lengths) - 1).abs().max() > 0.1


def test_an_unsupported_block_is_rejected(make_model):
    with pytest.raises(
        ValueError, match=r"'vqt' cannot be applied to ConvNeXt: its blocks do not share one token sequence"
    ):
        build_method("vqt", make_model("test_convnext"))
    model = make_model()
    model.blocks[2].attn.qkv = nn.Identity()
    with pytest.raises(
        ValueError, match=r"'vqt' cannot be applied to VisionTransformer: block 'blocks.2' is unsupported"
    ):
        build_method("vqt", model)


def test_differential_attention_is_rejected(make_model):
    model = make_model("vit_dlittle_patch16_reg1_gap_256", img_size=32, depth=1)
    with pytest.raises(ValueError, match=r"block 'blocks.0' is unsupported; the method requires a linear head"):
        build_method("vqt", model)


def test_queries_follow_the_dtype_of_the_block(make_model, images):
    model = build_method("vqt", make_model()).eval()
    half = build_method("vqt", make_model().bfloat16()).eval()
    half.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(half(images.bfloat16()).float(), model(images), atol=0.05, rtol=0.05)


def test_features_without_an_image_are_rejected(make_model):
    model = build_method("vqt", make_model())
    with pytest.raises(RuntimeError, match="requires the summaries of a forward pass, got only features"):
        model.head(torch.zeros(1, 64))


def test_normalize_must_be_a_truth_value(make_model):
    with pytest.raises(ValueError, match="method 'vqt': normalize must be one of True, False, got 'no'"):
        build_method("vqt", make_model(), normalize="no")
