"""A training run whose target sparsity nobody applies is told so, once."""

from __future__ import annotations

import warnings

import pytest
import torch

from snella import BudgetAllocator


def train(case, model, steps):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    model.train()
    for _ in range(steps):
        case.run(model).square().sum().backward()
        optimizer.step()


def test_exactly_one_warning_says_what_to_call(mlp):
    model = mlp.adapted(target_sparsity=0.6)
    with pytest.warns(UserWarning) as caught:
        train(mlp, model, 30)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "target_sparsity=0.6 is set, but after 10 optimizer steps no budget allocator is attached" in message
    assert "BudgetAllocator(model, total_epochs=…, steps_per_epoch=…).attach(optimizer)" in message
    assert "callbacks=[SnellaCallback()]" in message


def test_a_few_steps_are_no_training(mlp):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(mlp, mlp.adapted(), 9)


@pytest.mark.parametrize(
    "settings", [{"target_sparsity": 0.0}, {"target_sparsity": 0.5, "init_sparsity": 0.5}], ids=["dense", "constant"]
)
def test_a_run_that_needs_no_allocator_is_left_alone(mlp, settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(mlp, mlp.adapted(**settings), 15)


def test_an_attached_allocator_silences_the_warning(mlp):
    model = mlp.adapted()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    BudgetAllocator(model, total_epochs=3, steps_per_epoch=5).attach(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(mlp, model, 15)


def test_frozen_adapters_and_evaluation_are_no_training(mlp):
    model = mlp.adapted()
    model.base_model.set_requires_grad("default", False)
    other = mlp.adapted()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(15):
            mlp.run(model.train())
            mlp.run(other.eval())
            optimizer.step()
