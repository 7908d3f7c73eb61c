"""Contract of every registered method."""

import copy

import pytest
import torch
from safetensors import safe_open
from torch.nn.functional import cross_entropy

from snella_app.methods import (
    METHODS,
    build_method,
    check_method,
    find_method,
    load_trained,
    load_trained_into,
    merge_trained,
    save_trained,
    spec_of,
)

CHANGES_INITIAL_OUTPUTS = {
    "mlp",
    "vpt-shallow",
    "vpt-deep",
    "vqt",
    "ssf",
    "fourierft",
    "snella",
    "snella-matched",
    "snell",
    "klora",
    "fixed-mask",
    "noah",
}
"""Methods whose initial outputs differ from those of the backbone."""
QUICK = {"noah": {"supernet_epochs": 1}}
"""Options that shorten the search of a method."""


@pytest.mark.parametrize("method", METHODS)
def test_a_method_fulfills_its_contract(method, make_model, batches, train_steps, images, tmp_path):
    model = build_method(method, make_model(), batches=batches, **QUICK.get(method, {}))
    with torch.no_grad():
        plain, initial = make_model().eval()(images), model.eval()(images)
    if method not in CHANGES_INITIAL_OUTPUTS:
        torch.testing.assert_close(initial, plain, atol=2e-6, rtol=1e-5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.train()
    for _ in range(2):  # some factors have no gradient until others change
        train_steps(model, steps=1)
        cross_entropy(model(images), torch.tensor([0, 1, 2, 0])).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.requires_grad or torch.equal(before[name], parameter), name
    model.zero_grad()
    model.eval()
    with torch.no_grad():
        outputs = model(images)
        assert not torch.allclose(outputs, plain, atol=1e-4)
        save_trained(model, tmp_path)
        _check_size(method, model, tmp_path)
        _check_copies(model, images, outputs, tmp_path)
        loaded = load_trained(tmp_path, make_model())
        assert torch.equal(loaded(images), outputs) and not loaded.training
        assert spec_of(loaded) == spec_of(model)
        _check_merging(method, model, make_model, images, outputs)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_under_bfloat16_autocast(method, make_model, batches, images):
    model = build_method(method, make_model(), batches=batches, **QUICK.get(method, {})).train()
    targets, gradients = torch.tensor([0, 1, 2, 0]), []
    for is_enabled in (False, True):
        model.zero_grad()
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_enabled):
            loss = cross_entropy(model(images).float(), targets)
        loss.backward()
        trained = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
        assert all(gradient.dtype == torch.float32 for gradient in trained)
        gradients.append(torch.cat(trained))
    assert torch.isfinite(gradients[1]).all()
    if method not in ("mlp", "fourierft"):  # rounding is amplified by batch statistics and by a large random start
        assert torch.cosine_similarity(*gradients, dim=0) > 0.98


def _check_size(method, model, folder):
    """Check that the file has no tensor of the frozen backbone."""
    (weights,) = folder.glob("*.safetensors")
    with safe_open(weights, "pt") as file:
        stored = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # also stored: one or two positions per sparse value, budgets, running statistics of an MLP head
    assert trained <= stored <= 3 * trained + 300 or method == "full"


def _check_copies(model, images, outputs, folder):
    """Check that a copy works, shares no tensors, and loads saved values."""
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images), outputs)
    for parameter in twin.parameters():
        if parameter.requires_grad:
            parameter.mul_(0.5)
    assert torch.equal(model(images), outputs)
    load_trained_into(twin, folder)
    assert torch.equal(twin.train().eval()(images), outputs)


def _check_merging(method, model, make_model, images, outputs):
    """Check that merging gives a plain model with equal outputs, or an error with the reason."""
    row = METHODS[method]
    if row.merge is None:
        with pytest.raises(ValueError, match=f"method '{method}' cannot be merged .*: it {row.unmerged_reason}"):
            merge_trained(model)
        return
    merged = merge_trained(model)
    again = make_model()
    again.load_state_dict(merged.state_dict())
    torch.testing.assert_close(again.eval()(images), outputs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_has_a_summary_and_source(method):
    row = METHODS[method]
    assert row.summary and row.source
    assert row.suffix is None or row.suffix in row.options
    assert row.merge is not None or row.unmerged_reason
    assert not row.needs_batches or row.restore is not None or row.config is not None
    assert check_method(method, {}) == {}
    assert find_method(method) is row


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.suffix is not None])
def test_the_number_in_the_name_sets_the_option(method):
    suffix = METHODS[method].suffix
    assert check_method(f"{method}-4", {}) == {suffix: 4}
    with pytest.raises(ValueError, match=f"'{method}-4' sets {suffix} to 4, but got {suffix}=2"):
        check_method(f"{method}-4", {suffix: 2})


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.needs_batches])
def test_a_method_without_required_data_is_rejected(method, make_model):
    with pytest.raises(ValueError, match=f"'{method}' selects parameters from training data, got batches=None"):
        build_method(method, make_model())
