"""Triton's threshold selection against `keep_threshold` and `quantile_threshold`."""

from dataclasses import replace

import pytest
import torch

from snella.sparsify import keep_threshold, quantile_threshold

from .triton_problems import DEVICE, needs_triton, triton_problem

pytestmark = needs_triton


def merged(magnitudes, budgets, mode="soft"):
    """Return the matrices and thresholds of an update with the given magnitudes, one matrix per group."""
    from snella.backends.triton.backend import TritonBackend

    groups = torch.stack(list(magnitudes))
    size = groups.shape[1]
    problem = triton_problem("p_linear", rows=(size,) * len(groups), n=1, r=1, num_pieces=1, budgets=budgets, mode=mode)
    # with A = 0 and α = ±1, the distance equals the magnitude of B
    tensors = problem.tensors | {
        "A": torch.zeros_like(problem.tensors["A"]),
        "B": groups.reshape(-1, 1).to(DEVICE),
        "piece_coeff": torch.tensor([[(-1.0) ** k] for k in range(len(groups))], device=DEVICE),
    }
    update = replace(problem, tensors=tensors).update(tensors)
    merged = TritonBackend().prepare(update)
    pairs = zip(update.spec.rows, update.budgets, strict=True)
    return [merged.delta[0][rows] if budget else None for rows, budget in pairs], merged.thresholds


def spread(size, seed=0):
    """Return magnitudes that span twenty decades, with repetitions and zeros."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=generator) * 10.0 ** torch.randint(-10, 10, (size,), generator=generator)
    values[:: size // 7] = values[1]
    values[2 :: size // 5] = 0
    return values


@pytest.mark.parametrize("budget", [1, 150, 298])
def test_threshold_equals_keep_threshold(budget):
    deltas, thresholds = merged([spread(300), spread(300, 1)], (budget, 301 - budget))
    for delta, threshold, saved in zip(deltas, thresholds, (budget, 301 - budget), strict=True):
        assert threshold.item() == keep_threshold(delta, saved).item()


def test_merged_matrix_has_the_requested_magnitudes():
    deltas, _ = merged([spread(300), spread(300, 1)], (5, 5))
    torch.testing.assert_close(deltas[0][:, 0].cpu(), spread(300).abs(), rtol=1e-6, atol=0)
    torch.testing.assert_close(deltas[1][:, 0].cpu(), -spread(300, 1).abs(), rtol=1e-6, atol=0)


def test_exactly_budget_distinct_entries_remain():
    distinct = 1 + torch.randperm(500, generator=torch.Generator().manual_seed(0)) / 2**20
    for budget in (250, 499, 500):
        (delta,), (threshold,) = merged(distinct[None], (budget,))
        assert (delta.abs() > threshold).sum() == budget


@pytest.mark.parametrize("budget", [1, 77, 300])
def test_official_threshold_is_the_interpolated_quantile(budget):
    (delta,), (threshold,) = merged(spread(300)[None], (budget,), "official")
    torch.testing.assert_close(threshold, quantile_threshold(delta, 1 - budget / 300), rtol=3e-7, atol=0)


def test_constant_matrix_keeps_no_entry():
    _, (threshold,) = merged(torch.full((1, 200), 0.75), (10,))
    assert threshold == 0.75


def test_matrix_without_budget_has_infinite_threshold():
    deltas, thresholds = merged([spread(60), spread(60)], (0, 7))
    assert deltas[0] is None
    assert thresholds[0] == torch.inf
    assert thresholds[1] == keep_threshold(deltas[1], 7)


def test_nan_is_larger_than_every_number():
    values = spread(100)
    values[:3] = torch.nan
    (delta,), (threshold,) = merged(values[None], (10,))
    assert threshold.item() == keep_threshold(delta.cpu(), 10).item()
    _, (threshold,) = merged(values[None], (2,))
    assert threshold.isnan()


def test_known_thresholds_are_reused():
    from snella.backends.triton.backend import TritonBackend

    problem = triton_problem(rows=(5, 4), n=6, budgets=(7, 9))
    update = problem.update(problem.tensors)
    thresholds = TritonBackend().prepare(update).thresholds
    repeated = TritonBackend().prepare(update._replace(thresholds=thresholds)).thresholds
    assert torch.equal(repeated, thresholds)
