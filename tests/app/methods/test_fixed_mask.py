"""A SNELLA update on the most sensitive weights."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from snella_app.methods import build_method, load_trained, merge_trained, save_trained
from snella_app.training.build import build_optimizer
from snella_lab.methods.sparse_update import MaskedUpdate
from snella_lab.methods.spt import matrix_layers


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, MaskedUpdate)}


def test_the_mask_selects_the_most_sensitive_weights_of_all_matrices(make_model, batches):
    built = build_method("fixed-mask-4", make_model(), batches=batches, budget=0.001, kernel="p_linear")
    model, total = make_model().eval(), {}
    names = matrix_layers(model, "head")
    for images, labels in batches():
        model.zero_grad()
        cross_entropy(model(images), labels).backward()
        for name in names:
            total[name] = total.get(name, 0) + model.get_parameter(f"{name}.weight").grad ** 2
    threshold = torch.cat([total[name].flatten() for name in names]).sort(descending=True).values[999]
    assert set(layers(built)) == set(names)
    for name, layer in layers(built).items():
        expected = torch.nonzero((total[name] >= threshold).flatten()).flatten()
        assert torch.equal(layer.indices.long(), expected), name
        assert torch.equal(torch.nonzero((layer.weight - layer.base_layer.weight).flatten()).flatten(), expected), name
    assert sum(len(layer.indices) for layer in layers(built).values()) == 1000


def test_training_changes_only_the_mask_and_merges_bit_for_bit(make_model, batches, images):
    built = build_method("fixed-mask-4", make_model(), batches=batches, budget=0.001)
    optimizer = build_optimizer(built, lr=1e-2, scalar_lr=1e-3, head_lr=1e-3)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups[:2]] == [(1e-2, 0), (1e-3, 0)]
    built(images).square().mean().backward()
    optimizer.step()
    built.eval()
    for name, layer in layers(built).items():
        assert all(p.grad.any() for key, p in layer.factors.items() if key in "AB") == bool(len(layer.indices)), name
    with torch.no_grad():
        expected = built(images)
        assert torch.equal(merge_trained(built)(images), expected)


def test_the_mask_is_restored_without_data(make_model, batches, images, tmp_path):
    built = build_method("fixed-mask-4", make_model(), batches=batches, budget=0.001).eval()
    save_trained(built, tmp_path)
    loaded = load_trained(tmp_path, make_model())
    with torch.no_grad():
        assert torch.equal(loaded(images), built(images))
    for name, layer in layers(built).items():
        assert torch.equal(layers(loaded)[name].indices, layer.indices), name


def test_a_mask_larger_than_the_matrices_is_rejected(make_model, batches):
    with pytest.raises(ValueError, match=r"budget must be at most 0.2\d+ million, .* got 1$"):
        build_method("fixed-mask", make_model(), batches=batches, budget=1)


def test_allocation_settings_are_not_options(make_model, batches):
    with pytest.raises(ValueError, match="no option 'target_sparsity'"):
        build_method("fixed-mask", make_model(), batches=batches, target_sparsity=0.5)


def test_the_largest_budget_in_the_error_is_accepted(batches):
    layers = nn.Sequential(nn.Flatten(), nn.Linear(3072, 1113), nn.Linear(1113, 1109), nn.Linear(1109, 3))
    with pytest.raises(ValueError, match=r"at most 4.653453 million, the size of the adapted matrices, got 4.653454$"):
        build_method("fixed-mask", layers, head="3", batches=batches, budget=4.653454)
