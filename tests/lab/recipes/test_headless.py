import pytest
import torch
from peft import PeftModel
from torch import nn

from snella_app.methods import load_trained, save_trained
from snella_lab.recipes.trainer import adapt_headless


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


@pytest.mark.parametrize("method", ["snella-2", "snell-2", "lora-2", "dora-2", "full"])
def test_a_model_without_a_head_is_adapted_saved_and_loaded(method, tmp_path):
    adapted = adapt_headless(method, model(), {} if method == "full" else {"target_modules": ["0", "2"]})
    assert isinstance(adapted, PeftModel) == (method != "full")
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3)
    x = torch.randn(3, 6)
    expected = adapted.eval()(x)
    assert not torch.equal(expected, model()(x))
    save_trained(adapted, tmp_path / "adapter")
    assert torch.equal(load_trained(tmp_path / "adapter", model())(x), expected)


def test_only_the_adapter_is_trained():
    adapted = adapt_headless("lora-2", model(), {"target_modules": ["0"]})
    assert {name.split(".")[-3] for name, p in adapted.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_a_method_that_needs_a_head_is_rejected():
    with pytest.raises(ValueError, match="PEFT adapter or full for a model without a head, got 'bias'"):
        adapt_headless("bias", model(), {})
