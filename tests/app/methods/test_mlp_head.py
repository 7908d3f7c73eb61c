import pytest
import torch
from torch import nn

from snella_app.methods import build_method
from snella_app.methods.partial import MlpHead


def test_the_forward_pass_matches_the_formula():
    torch.manual_seed(0)
    head = MlpHead(5, 3, layers=3, dropout=0.0).train()
    first, second = head.hidden[0], head.hidden[4]
    assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear) and len(head.hidden) == 8
    x = torch.randn(6, 5)

    def hidden(layer, h):
        h = torch.clamp(h @ layer.weight.T + layer.bias, min=0)
        return (h - h.mean(0)) / torch.sqrt(h.var(0, unbiased=False) + 1e-5)

    expected = hidden(second, hidden(first, x)) @ head.last.weight.T + head.last.bias
    torch.testing.assert_close(head(x), expected)


def test_one_layer_is_a_linear_head(make_model, images):
    model = build_method("mlp-1", make_model()).eval()
    assert [type(m) for m in model.head.children()] == [nn.Sequential, nn.Linear]
    assert model(images).shape == (4, 3)


def test_a_batch_of_one_image_uses_running_statistics(make_model, images):
    model = build_method("mlp-3", make_model(), dropout=0.0).train()
    model(images)
    statistics = [b.clone() for b in model.buffers()]
    outputs = model(images[:1])
    assert torch.equal(outputs, model.eval()(images[:1]))
    assert all(torch.equal(a, b) for a, b in zip(statistics, model.buffers(), strict=True))


def test_a_nonlinear_head_is_rejected(make_model):
    with pytest.raises(
        ValueError, match=r"'mlp' cannot be applied to ConvNeXt: its head 'head' must be a linear layer, got Norm"
    ):
        build_method("mlp", make_model("test_convnext"), head="head")
    with pytest.raises(ValueError, match=r"'mlp-3': dropout must be a number in \[0, 1\), got 1"):
        build_method("mlp-3", make_model(), dropout=1)
