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


def moved(method, backbone, **options):
    """A model of which everything that the method trains has moved."""
    model = build_method(method, copy.deepcopy(backbone), **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 + torch.rand_like(parameter)
    return model


def changed(model, backbone):
    return count_differences(merge_trained(model), backbone, "head")


def size_of(model, *endings):
    return sum(p.numel() for name, p in model.named_parameters() if name.endswith(endings) and "head" not in name)


def test_what_is_trained_directly_is_what_changes(backbone):
    assert changed(moved("linear", backbone), backbone) == 0
    assert changed(moved("bias", backbone), backbone) == size_of(backbone, "bias")
    assert changed(moved("full", backbone), backbone) == size_of(backbone, "")


def test_a_low_rank_update_changes_whole_matrices(backbone):
    matrices = size_of(backbone, "qkv.weight", "attn.proj.weight", "fc1.weight", "fc2.weight")
    assert changed(moved("lora-2", backbone), backbone) == matrices


def test_a_sparse_update_changes_as_many_weights_as_its_budget(backbone):
    model = moved("snella-2", backbone)
    matrices = adapted_matrices(model)
    for layer in {id(matrix.layer): matrix.layer for matrix in matrices}.values():
        layer.set_budget("default", [layer.in_features] * len(layer.budgets("default")))
    kept, budget = sum(matrix.nonzeros() for matrix in matrices), sum(matrix.budget for matrix in matrices)
    assert 0 < kept <= budget
    assert changed(model, backbone) == kept


def test_chosen_entries_and_biases_change(backbone):
    images, labels = torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2, 0, 1, 2])
    model = moved("gps", backbone, batches=lambda: [(images, labels)])
    entries = sum(len(module.indices) for module in model.modules() if isinstance(module, SparseUpdate))
    biases = size_of(backbone, "qkv.bias", "proj.bias", "fc1.bias", "fc2.bias")
    assert changed(model, backbone) == entries + biases
