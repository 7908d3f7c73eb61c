"""Backward compatibility with adapters saved by commit 99db782."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from snella.matrices import adapted_matrices

FOLDER = Path(__file__).with_name("adapters_of_99db782")


@pytest.mark.parametrize("impl", ["eager", "reference", "auto"])
@pytest.mark.parametrize("name", ["default", "official", "snell"])
def test_outputs_and_gradients_equal_recorded_values(name, impl):
    expected = load_file(FOLDER / name / "expected.safetensors")
    base = nn.Sequential(nn.Linear(12, 10), nn.GELU(), nn.Linear(10, 6))
    base.load_state_dict({key: expected.pop(key) for key in base.state_dict()})
    model = PeftModel.from_pretrained(base, FOLDER / name, is_trainable=True, impl=impl)
    config = model.peft_config["default"]
    config.update_dropout = config.update_drop_path = 0.0
    y = model.train()(expected.pop("x"))
    y.square().sum().backward()
    actual = {"y": y.detach()}
    actual |= {
        parameter.replace(".default", ""): value.grad
        for parameter, value in model.named_parameters()
        if value.grad is not None
    }
    assert set(actual) == set(expected)
    for key, value in expected.items():
        # summation order depends on the machine
        torch.testing.assert_close(actual[key], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()))
    assert [matrix.budget for matrix in adapted_matrices(model)] == [40, 33]
