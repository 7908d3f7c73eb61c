import sys

import pytest
import torch
from torch import nn

from snella_lab.recipes.trainer import build_low_bit_optimizer

CPU = torch.device("cpu")


def build(name):
    return build_low_bit_optimizer(nn.Linear(4, 4), name, CPU, lr=0.5, scalar_lr=None, weight_decay=0.1)


@pytest.fixture
def no_bitsandbytes(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)


def test_auto_falls_back_to_adamw_with_a_reason(no_bitsandbytes):
    optimizer, name = build("auto")
    assert type(optimizer) is torch.optim.AdamW
    assert name.startswith("AdamW, because 8-bit AdamW does not run on cpu (ModuleNotFoundError: ")
    assert [group["lr"] for group in optimizer.param_groups] == [0.5]
    assert build("adamw")[1] == "AdamW"


def test_adamw8bit_without_bitsandbytes_raises_with_the_package_name(no_bitsandbytes):
    with pytest.raises(
        ImportError, match=r"optimizer=adamw8bit needs bitsandbytes to run on cpu, but Module.*; pip ins"
    ):
        build("adamw8bit")


def test_auto_rejects_an_8_bit_optimizer_whose_step_has_no_effect(monkeypatch):
    class NoOpOptimizer(torch.optim.SGD):
        def step(self, closure=None):
            return None

    package = type(sys)("bitsandbytes")
    package.optim = type(sys)("optim")
    package.optim.AdamW8bit = NoOpOptimizer
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    assert "RuntimeError: its step leaves parameters unchanged" in build("auto")[1]
