import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from snella.sparsify import _smallest, keep_threshold, quantile_threshold, sparsify


def tie_free(m, n, dtype=torch.float32, seed=0):
    """Return a matrix of distinct magnitudes with random signs."""
    generator = torch.Generator().manual_seed(seed)
    magnitudes = (1 + torch.randperm(m * n, generator=generator)).to(dtype) / 64
    signs = 1 - 2 * torch.randint(0, 2, (m * n,), generator=generator).to(dtype)
    return (magnitudes * signs).reshape(m, n)


@given(m=st.integers(1, 12), n=st.integers(1, 12), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_exactly_budget_entries_of_tie_free_matrix_remain(m, n, share, seed):
    delta = tie_free(m, n, seed=seed)
    budget = round(share * m * n)
    threshold = keep_threshold(delta, budget)
    assert (delta.abs() > threshold).sum() == budget
    assert sparsify(delta, threshold).count_nonzero() == budget


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_budget_is_exact_in_every_dtype(dtype):
    delta = tie_free(9, 13, dtype)
    for budget in range(delta.numel() + 1):
        threshold = keep_threshold(delta, budget)
        assert threshold.dtype == dtype and threshold.shape == ()
        assert (delta.abs() > threshold).sum() == budget


def test_threshold_is_exact_above_2_to_the_24_entries():
    side = 4100
    # an odd multiplier permutes the residues modulo 2**25, so all magnitudes differ
    order = torch.arange(side * side, dtype=torch.int32).mul_(1103515245).bitwise_and_(2**25 - 1)
    delta = order.add_(0x3D000000).view(torch.float32).reshape(side, side)
    delta[::2] *= -1
    assert delta.numel() > 2**24
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(delta, 0.5)
    budget = 5_043_001
    threshold = keep_threshold(delta, budget)
    assert (delta.abs() > threshold).sum() == budget


def test_full_budget_has_threshold_0():
    delta = tie_free(3, 5, torch.float64)
    assert keep_threshold(delta, 15) == 0


def test_budget_0_has_largest_magnitude_as_threshold():
    delta = tie_free(3, 5)
    threshold = keep_threshold(delta, 0)
    assert threshold == delta.abs().max()
    assert not sparsify(delta, threshold).any()


def test_tied_entries_at_threshold_all_become_zero():
    delta = torch.tensor([[3.0, -2.0, 2.0, 1.0]])
    assert (delta.abs() > keep_threshold(delta, 2)).sum() == 1


@pytest.mark.parametrize("budget", [-1, 16])
def test_budget_out_of_range_raises(budget):
    with pytest.raises(ValueError, match=rf"budget must be in \[0, 15\] for a matrix \[3, 5\], got {budget}"):
        keep_threshold(torch.ones(3, 5), budget)


@pytest.mark.parametrize("sparsity", [-0.25, 1.5])
def test_sparsity_out_of_range_raises(sparsity):
    with pytest.raises(ValueError, match=rf"sparsity must be in \[0, 1\], got {sparsity}"):
        quantile_threshold(torch.ones(3, 5), sparsity)


def test_quantile_of_an_empty_matrix_raises():
    with pytest.raises(ValueError, match=r"delta must have at least one entry, got \[0, 5\]"):
        quantile_threshold(torch.ones(0, 5), 0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_selection_by_kthvalue_equals_selection_by_partition(dtype):
    delta = torch.randn(31, 17, generator=torch.Generator().manual_seed(0)).to(dtype)
    for budget in (0, 1, 2, 200, 526, 527):
        assert keep_threshold(delta, budget).float() == keep_threshold(delta.float(), budget)
    ranks = [0, 5, 5, 263, 526]
    by_kthvalue = torch.stack(_smallest(delta.abs(), ranks)).float()
    by_partition = torch.stack(_smallest(delta.float().abs(), ranks))
    assert torch.equal(by_kthvalue, by_partition)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_quantile_is_between_its_neighbors(dtype):
    delta = tie_free(3, 5, dtype)
    threshold = quantile_threshold(delta, 0.7)
    below, above = delta.abs().flatten().sort().values[9:11]
    assert threshold.dtype == dtype
    assert below <= threshold <= above


@given(m=st.integers(1, 12), n=st.integers(1, 12), sparsity=st.floats(0, 1), seed=st.integers(0, 99))
def test_quantile_threshold_equals_torch_quantile(m, n, sparsity, seed):
    delta = torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = torch.quantile(delta.abs(), torch.tensor(sparsity, dtype=torch.float64))
    torch.testing.assert_close(quantile_threshold(delta, sparsity), expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    "select",
    [
        pytest.param(lambda delta: keep_threshold(delta, 7), id="keep"),
        pytest.param(lambda delta: quantile_threshold(delta, 0.5), id="quantile"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selection_does_not_modify_input_and_is_detached(select, dtype):
    base = tie_free(5, 3, dtype)
    delta = base.clone().requires_grad_()
    threshold = select(delta)
    assert not threshold.requires_grad
    assert torch.equal(delta, base)
    strided = torch.zeros(3, 5, dtype=dtype).T.copy_(base)
    assert select(strided) == threshold
    assert torch.equal(strided, base)


def test_nan_entries_do_not_lower_threshold():
    delta = torch.tensor([[1.0, float("nan"), 3.0, 2.0]])
    assert keep_threshold(delta, 2) == 2.0
