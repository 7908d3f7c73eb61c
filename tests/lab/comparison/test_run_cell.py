"""Number of changed weights by method."""

import copy

import pytest
import timm
import torch

from snella.matrices import adapted_matrices
from snella_app.methods import build_method, merge_trained
from snella_lab.comparison.run_cell import count_differences
from snella_lab.methods.sparse_update import SparseUpdate


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=3, img_size=32)


def perturbed(method, backbone, **options):
    """Return a model in which every trained parameter differs from its initial value."""
    model = build_method(method, copy.deepcopy(backbone), **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 + torch.rand_like(parameter)
    return model


def num_changed(model, backbone):
    return count_differences(merge_trained(model), backbone, "head")


def size_of(model, *endings):
    return sum(p.numel() for name, p in model.named_parameters() if name.endswith(endings) and "head" not in name)


def test_directly_trained_weights_are_counted(backbone):
    assert num_changed(perturbed("linear", backbone), backbone) == 0
    assert num_changed(perturbed("bias", backbone), backbone) == size_of(backbone, "bias")
    assert num_changed(perturbed("full", backbone), backbone) == size_of(backbone, "")


def test_low_rank_update_changes_entire_matrices(backbone):
    matrices = size_of(backbone, "qkv.weight", "attn.proj.weight", "fc1.weight", "fc2.weight")
    assert num_changed(perturbed("lora-2", backbone), backbone) == matrices


def test_sparse_update_changes_its_nonzero_entries(backbone):
    model = perturbed("snella-2", backbone)
    matrices = adapted_matrices(model)
    for layer in {id(matrix.layer): matrix.layer for matrix in matrices}.values():
        layer.set_budget("default", [layer.in_features] * len(layer.budgets("default")))
    num_nonzero, budget = sum(matrix.nonzeros() for matrix in matrices), sum(matrix.budget for matrix in matrices)
    assert 0 < num_nonzero <= budget
    assert num_changed(model, backbone) == num_nonzero


def test_selected_entries_and_biases_are_counted(backbone):
    images, labels = torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2, 0, 1, 2])
    model = perturbed("gps", backbone, batches=lambda: [(images, labels)])
    entries = sum(len(module.indices) for module in model.modules() if isinstance(module, SparseUpdate))
    biases = size_of(backbone, "qkv.bias", "proj.bias", "fc1.bias", "fc2.bias")
    assert num_changed(model, backbone) == entries + biases
