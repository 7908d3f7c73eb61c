import pytest

from snella_app.methods import build_method


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_the_last_blocks_the_norm_and_the_head_are_trained(make_model):
    model = build_method("partial-2", make_model())
    expected = ("blocks.4.", "blocks.5.", "norm.", "head.")
    assert trained(model) == {n for n, _ in model.named_parameters() if n.startswith(expected)}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("test_convnext", ("stages.3.blocks.1.", "head.")),
        ("test_resnet", ("layer4.0.", "fc.")),
    ],
)
def test_partial_tuning_supports_other_architectures(name, expected, make_model):
    model = build_method("partial", make_model(name))
    assert trained(model) == {n for n, _ in model.named_parameters() if n.startswith(expected)}


def test_more_blocks_than_the_model_has_are_rejected(make_model):
    with pytest.raises(ValueError, match="'partial': blocks must be at most 6 for this model, got 7"):
        build_method("partial-7", make_model())


def test_a_model_without_blocks_is_reported():
    from torch import nn

    with pytest.raises(ValueError, match="method 'partial' cannot be applied to Sequential: it needs numbered blocks"):
        build_method("partial", nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 2)), head="2")
