"""Weight sensitivity against hand-computed gradients."""

import pytest
import torch
from torch import nn

from snella_lab.methods.calibration import (
    SelectionData,
    loss_of,
    rank_entries,
    selection_data,
    squared_gradients,
    summed_gradients,
)

X = [torch.tensor([[1.0, 2.0]]), torch.tensor([[-3.0, 1.0]])]


def layer():
    linear = nn.Linear(2, 1)
    nn.init.zeros_(linear.weight)
    return linear.requires_grad_(False)


def total(model, images, labels):
    """Return a loss whose gradient with respect to the weight is the image."""
    return model(images).sum()


def batches():
    return iter([(x, torch.zeros(1)) for x in X])


def test_sensitivity_is_the_sum_of_squared_batch_gradients():
    sensitivity = squared_gradients(layer(), ["weight", "bias"], batches, total)
    assert sensitivity["weight"].tolist() == [[1.0 + 9.0, 4.0 + 1.0]]
    assert sensitivity["bias"].tolist() == [2.0]


def test_summed_gradients_keep_their_signs():
    assert summed_gradients(layer(), ["weight"], batches, total)["weight"].tolist() == [[-2.0, 3.0]]


def test_the_number_of_batches_is_limited():
    assert squared_gradients(layer(), ["weight"], batches, total, 1)["weight"].tolist() == [[1.0, 4.0]]


def test_the_model_is_unchanged():
    model = nn.Sequential(layer(), nn.Dropout(0.5)).train()
    model[0].bias.requires_grad_(True)
    state = torch.random.get_rng_state()
    squared_gradients(model, ["0.weight"], batches, total)
    assert model.training and model[1].training
    assert [p.requires_grad for p in model.parameters()] == [False, True]
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_existing_gradients_have_no_influence_and_are_restored():
    model = layer()
    existing = [torch.full_like(parameter, 5.0) for parameter in model.parameters()]
    model.weight.grad, model.bias.grad = existing
    assert summed_gradients(model, ["weight"], batches, total)["weight"].tolist() == [[-2.0, 3.0]]
    assert model.weight.grad is existing[0] and model.weight.grad.tolist() == [[5.0, 5.0]]
    assert model.bias.grad is existing[1]


def test_only_one_weight_gradient_exists_at_a_time():
    model = nn.Sequential(layer(), nn.Linear(1, 1))
    later_is_gone = []
    model[0].weight.requires_grad_(True).register_hook(lambda _: later_is_gone.append(model[1].weight.grad is None))
    squared_gradients(model, ["0.weight", "1.weight"], batches, total)
    assert later_is_gone == [True, True]


def test_an_unknown_parameter_is_rejected():
    with pytest.raises(ValueError, match=r"names must be parameters of Linear, got \['wieght'\]"):
        squared_gradients(layer(), ["wieght"], batches, total)


def test_a_non_finite_loss_is_reported_with_its_batch():
    with pytest.raises(ValueError, match="the loss must be finite, got inf in batch 2"):
        squared_gradients(layer(), ["weight"], batches, lambda m, x, _: m(x).sum() + (torch.inf if x[0, 0] < 0 else 0))


def test_a_gradient_that_is_not_a_number_is_rejected():
    with pytest.raises(ValueError, match=r"the gradients of \['weight'\] contain NaN"):
        squared_gradients(layer(), ["weight", "bias"], batches, lambda m, x, _: (0 * x * m.weight).sqrt().sum())


def test_zero_batches_are_rejected():
    with pytest.raises(ValueError, match="at least one batch of images and labels, got none"):
        squared_gradients(layer(), ["weight"], lambda: iter([]), total)


def test_batches_must_be_callable():
    with pytest.raises(TypeError, match=r"batches must be a callable .*, got \[1, 2\]; pass batches=lambda"):
        selection_data([1, 2])


def test_plain_batches_use_cross_entropy_and_selection_data_their_loss():
    logits, labels = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
    plain = loss_of(selection_data(batches))(nn.Identity(), logits, labels)
    torch.testing.assert_close(plain, torch.log(1 + torch.exp(torch.tensor(-2.0))))
    with_loss = SelectionData(batches, loss=lambda outputs, labels: outputs.sum())
    assert loss_of(selection_data(with_loss))(nn.Identity(), logits, labels) == 2.0


def test_entries_are_ranked_over_all_tensors_with_ties_by_position():
    values = [torch.tensor([[1.0, 5.0], [0.0, 2.0]]), torch.tensor([5.0, 0.0, 3.0])]
    owners, positions = rank_entries(values, 6)
    assert list(zip(owners.tolist(), positions.tolist(), strict=True)) == [
        (0, 1),
        (1, 0),
        (1, 2),
        (0, 3),
        (0, 0),
        (0, 2),
    ]
    assert [t.tolist() for t in rank_entries(values, 0)] == [[], []]


@pytest.mark.parametrize("count", [0, 1, 17, 60])
def test_the_ranking_is_that_of_a_stable_sort(count):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randint(4, (n,), generator=generator).float() for n in (20, 1, 39)]
    everything = torch.cat(values)
    order = everything.argsort(descending=True, stable=True)[:count]
    owners, positions = rank_entries(values, count)
    starts = torch.tensor([0, 20, 21])
    assert torch.equal(starts[owners] + positions, order)


def test_a_count_above_the_number_of_entries_is_rejected():
    with pytest.raises(ValueError, match=r"count must be in \[0, 3\] .*, got 4"):
        rank_entries([torch.zeros(3)], 4)
