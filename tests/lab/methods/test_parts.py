"""Modules attached to a model, and the MLPs of a backbone."""

import copy

import pytest
import timm
import torch
from torch import nn

from snella_lab.methods.parts import attach, mlps


class Add(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))


def add_after(module, inputs, output):
    return output + module.extra.value


def add_before(module, inputs):
    return (inputs[0] + module.extra.value,)


def test_an_attached_child_is_saved_and_copied():
    model = nn.Sequential(nn.Identity(), nn.ReLU())
    attach(model[1], "extra", Add(2.0), before=add_before, after=add_after)
    x = torch.tensor([-1.0, -5.0])
    assert model(x).tolist() == [3.0, 2.0]
    assert list(model.state_dict()) == ["1.extra.value"]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[1].extra.value.fill_(0.0)
    assert twin(x).tolist() == [0.0, 0.0] and model(x).tolist() == [3.0, 2.0]


def test_a_name_in_use_is_rejected():
    with pytest.raises(ValueError, match="Linear already has an attribute 'weight' \\(Parameter\\)"):
        attach(nn.Linear(2, 2), "weight", Add(1.0))


def test_the_width_of_an_mlp_is_that_of_its_last_layer():
    with torch.device("meta"):
        model = timm.create_model("test_vit")
    assert [(n, width) for n, _, width in mlps(model, "head")] == [(f"blocks.{i}.mlp", 64) for i in range(6)]
