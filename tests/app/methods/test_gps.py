"""GPS: inputs with the largest gradient of each neuron."""

import math

import pytest
import timm
import torch
from torch.nn.functional import cross_entropy

from snella_app.methods import AdapterFileError, build_method, load_trained, save_trained
from snella_lab.methods.sparse_update import (
    SparseUpdate,
    contrastive_loss,
    neuron_layers,
    strongest_inputs,
    supervised_contrastive,
)


def sparse_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseUpdate)}


def test_each_row_gets_its_k_largest_inputs_with_ties_by_position():
    gradient = torch.tensor([[1.0, -3.0, 2.0], [0.5, 0.5, -0.5], [0.0, 0.0, 9.0]])
    assert strongest_inputs(gradient, 1).tolist() == [1, 3, 8]
    assert strongest_inputs(gradient, 2).tolist() == [1, 2, 3, 4, 6, 8]
    assert strongest_inputs(gradient, 5).tolist() == list(range(9))
    assert strongest_inputs(gradient.view(3, 1, 3, 1), 1).tolist() == [1, 3, 8]


def test_vit_b_16_has_the_number_of_neurons_in_the_paper():
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=100)
    neurons = sum(len(model.get_parameter(f"{name}.weight")) for name in neuron_layers(model, "head"))
    assert neurons == 12 * (3 * 768 + 768 + 4 * 768 + 768) + 768 == 83_712


def test_the_contrastive_loss_matches_the_formula():
    features = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    # cosines 0, 0, 1 at temperature 1; the first feature is the only one of its class
    expected = -math.log(math.e / (1 + math.e))
    loss = supervised_contrastive(features, torch.tensor([0, 1, 1]), temperature=1.0)
    torch.testing.assert_close(loss, torch.tensor(expected))
    assert supervised_contrastive(features, torch.tensor([0, 1, 2])) == 0.0


def test_the_contrastive_loss_does_not_depend_on_the_head(make_model, images):
    model, labels = make_model().eval(), torch.tensor([0, 1, 2, 0])
    loss = contrastive_loss("head")
    before = loss(model, images, labels)
    torch.nn.init.normal_(model.head.weight)
    assert torch.equal(loss(model, images, labels), before)
    assert not model.head._forward_pre_hooks


def test_the_contrastive_loss_rejects_masks(make_model, images):
    with pytest.raises(
        ValueError, match=r"one class label per image, got labels of shape \[4, 32, 32\]; use .*='task'"
    ):
        contrastive_loss("head")(make_model(), images, torch.zeros(4, 32, 32))


@pytest.mark.parametrize(("name", "k"), [("gps", 1), ("gps-3", 3)])
def test_k_weights_of_each_neuron_its_bias_and_the_head_are_trained(name, k, make_model, batches):
    model = build_method(name, make_model(), batches=batches)
    layers = sparse_layers(model)
    assert set(layers) == set(neuron_layers(make_model(), "head")) >= {"patch_embed.proj", "blocks.0.attn.qkv"}
    for layer in layers.values():
        rows = torch.bincount(layer.indices.long() // layer.weight[0].numel(), minlength=len(layer.weight))
        assert rows.tolist() == [k] * len(layer.weight)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    neurons = sum(len(layer.weight) for layer in layers.values())
    assert trained == (k + 1) * neurons + sum(p.numel() for p in model.head.parameters())
    assert not any(p.requires_grad for name, p in model.named_parameters() if "norm" in name or "cls" in name)


def test_the_selection_follows_the_gradients_and_is_deterministic(make_model, batches):
    chosen = sparse_layers(build_method("gps", make_model(), batches=batches, selection_loss="task"))
    again = sparse_layers(build_method("gps", make_model(), batches=batches, selection_loss="task"))
    model = make_model().eval()
    for images, labels in batches():
        cross_entropy(model(images), labels).backward()
    for name, layer in chosen.items():
        gradient = model.get_parameter(f"{name}.weight").grad.flatten(1)
        assert torch.equal(layer.indices.long() % gradient.shape[1], gradient.abs().argmax(1)), name
        assert torch.equal(layer.indices, again[name].indices)


def test_an_adapter_of_another_model_is_rejected(make_model, batches, tmp_path):
    save_trained(build_method("gps", make_model("test_vit2"), batches=batches), tmp_path)
    with pytest.raises(
        AdapterFileError, match=r"the adapter does not fit VisionTransformer: .*architecture it was trained"
    ):
        load_trained(tmp_path, make_model())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"k": 0}, "k must be an integer of at least 1, got 0"), ({"selection_loss": "mse"}, "got 'mse'")],
)
def test_options_out_of_range_are_rejected(options, message, make_model, batches):
    with pytest.raises(ValueError, match=message):
        build_method("gps", make_model(), batches=batches, **options)


@pytest.mark.parametrize("method", ["gps", "spt-lora", "fixed-mask"])
def test_a_model_with_sparse_layers_is_rejected(method, make_model, batches):
    model = build_method("gps", make_model(), batches=batches)
    with pytest.raises(ValueError, match="VisionTransformer already has sparse layers; apply a method only once, to a"):
        build_method(method, model, batches=batches)


@pytest.mark.parametrize("method", ["gps", "spt-lora", "fixed-mask"])
def test_a_model_whose_layers_all_have_a_custom_forward_is_rejected(method, make_model, batches):
    message = "NormFreeNet has no Linear or Conv2d layer with the original forward pass besides its head 'head.fc'"
    with pytest.raises(ValueError, match=message):
        build_method(method, make_model("nf_resnet26"), batches=batches)
