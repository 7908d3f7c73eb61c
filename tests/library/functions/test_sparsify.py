import pytest
import torch

from snella.sparsify import keep_threshold, sparsify, sparsify_slope

from .formulas import sparsify_by_hand

DELTA = torch.tensor([[0.5, -2.0, 1.0], [-1.0, 0.0, 3.0]], dtype=torch.float64)
THRESHOLD = torch.tensor(1.0, dtype=torch.float64)


def test_soft_entries_equal_eq_13():
    saved = torch.tensor([[0.0, -2.0 * 1.0, 0.0], [0.0, 0.0, 3.0 * 2.0]], dtype=torch.float64)
    assert torch.equal(sparsify(DELTA, THRESHOLD), saved)


def test_official_entries_are_signed_squares():
    saved = torch.tensor([[0.0, -4.0, 0.0], [0.0, 0.0, 9.0]], dtype=torch.float64)
    assert torch.equal(sparsify(DELTA, THRESHOLD, "official"), saved)


def test_mode_none_returns_merged_matrix():
    assert torch.equal(sparsify(DELTA, THRESHOLD, "none"), DELTA)


@pytest.mark.parametrize("budget", [0, 1, 10, 34, 35])
def test_random_entries_equal_hand_computed_eq_13(budget):
    delta = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    actual = sparsify(delta, keep_threshold(delta, budget))
    assert actual.count_nonzero() == budget
    torch.testing.assert_close(actual, sparsify_by_hand(delta, budget), rtol=1e-15, atol=0)


@pytest.mark.parametrize("mode", ["soft", "official", "none"])
@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_slope_equals_autograd(mode, threshold):
    limit = torch.tensor(threshold, dtype=torch.float64)
    delta = DELTA.clone().requires_grad_()
    (grad,) = torch.autograd.grad(sparsify(delta, limit, mode).sum(), delta)
    assert torch.equal(sparsify_slope(DELTA, limit, mode), grad)


def test_slopes_equal_published_slopes_and_are_zero_at_threshold():
    soft = torch.tensor([[0.0, 3.0, 0.0], [0.0, 0.0, 5.0]], dtype=torch.float64)
    official = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 3.0]], dtype=torch.float64)
    assert torch.equal(sparsify_slope(DELTA, THRESHOLD), soft)
    assert torch.equal(sparsify_slope(DELTA, THRESHOLD, "official"), official)


def test_soft_slope_equals_difference_quotient():
    step = 1e-6
    delta = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    quotient = (sparsify(delta + step, THRESHOLD) - sparsify(delta - step, THRESHOLD)) / (2 * step)
    assert (delta.abs() - THRESHOLD).abs().min() > 10 * step
    torch.testing.assert_close(sparsify_slope(delta, THRESHOLD), quotient, rtol=1e-8, atol=1e-9)


def test_threshold_is_constant_for_differentiation():
    threshold = THRESHOLD.clone().requires_grad_()
    delta = DELTA.clone().requires_grad_()
    grads = torch.autograd.grad(sparsify(delta, threshold).sum(), (delta, threshold), allow_unused=True)
    assert grads[0] is not None and grads[1] is None


@pytest.mark.parametrize("mode", ["soft", "official", "none"])
def test_nan_propagates(mode):
    actual = sparsify(torch.tensor([float("nan"), 0.5]), torch.tensor(1.0), mode)
    assert actual.isnan().tolist() == [True, False]
    assert actual[1] == (0.5 if mode == "none" else 0.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_is_preserved(dtype):
    assert sparsify(DELTA.to(dtype), THRESHOLD.to(dtype)).dtype == dtype


def test_unknown_mode_error_lists_choices():
    with pytest.raises(ValueError, match=r"mode must be one of \['soft', 'official', 'none'\], got 'hard'"):
        sparsify(DELTA, THRESHOLD, "hard")


@pytest.mark.parametrize(("magnitudes", "kept"), [([1.0, 2, 3, 3], 2), ([1.0, 3, 3, 3], 0), ([3.0, 3, 3, 3], 0)])
def test_entries_tied_with_threshold_become_zero(magnitudes, kept):
    delta = torch.tensor(magnitudes)
    assert int(sparsify(delta, keep_threshold(delta, 2)).count_nonzero()) == kept
