"""Weight gradients from sampled or rounded tokens."""

from dataclasses import replace

import pytest
import torch

from snella.ops import MIN_TOKENS, LinearOp, layer_op_from_ints, parse_weight_gradient, sample_tokens
from tests.library.functions.problems import make_problem, solve

TOKENS, OUTPUTS, INPUTS = 400, 6, 5


def uneven_tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """Return gradients and inputs with very different norms per token, and one outlier."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.exp(1.5 * torch.randn(TOKENS, 1, generator=generator))
    sizes[7] = 1000
    return sizes * torch.randn(TOKENS, OUTPUTS, generator=generator), torch.randn(TOKENS, INPUTS, generator=generator)


def estimates(share: float, draws: int) -> torch.Tensor:
    torch.manual_seed(0)
    pairs = [sample_tokens(*uneven_tokens(), share) for _ in range(draws)]
    return torch.stack([grad_y.T @ x for grad_y, x in pairs])


def test_estimate_is_unbiased():
    grad_y, x = (tensor.double() for tensor in uneven_tokens())
    actual = estimates(1 / 4, 2000).double()
    error = actual.mean(0) - grad_y.T @ x
    deviation = actual.std(0) / len(actual) ** 0.5
    assert (error.abs() < 4.5 * deviation + 1e-6 * actual.abs().amax()).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_estimate_does_not_depend_on_the_default_dtype(dtype):
    grad_y, x = torch.randn(4096, 8), torch.randn(4096, 8)
    torch.manual_seed(0)
    expected = sample_tokens(grad_y, x, 0.5)
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(0)
        actual = sample_tokens(grad_y, x, 0.5)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_sampling_by_norm_has_lower_error_than_uniform_sampling():
    grad_y, x = uneven_tokens()
    exact, k = grad_y.T @ x, TOKENS // 4
    by_norm = (estimates(1 / 4, 200) - exact).square().sum((1, 2)).mean()
    indices = torch.stack([torch.randperm(TOKENS)[:k] for _ in range(200)])
    equal = torch.stack([4 * grad_y[index].T @ x[index] - exact for index in indices]).square().sum((1, 2)).mean()
    assert by_norm < equal / 50


@pytest.mark.parametrize(("share", "sample_size"), [(0.5, 200), (0.26, 104), (1e-3, MIN_TOKENS)])
def test_sample_size_is_the_share_but_at_least_the_minimum(share, sample_size):
    grad_y, x = sample_tokens(*uneven_tokens(), share)
    assert (grad_y.shape, x.shape) == ((sample_size, OUTPUTS), (sample_size, INPUTS))


def test_dominant_token_is_drawn_once_with_probability_1():
    grad_y, x = uneven_tokens()
    for seed in range(20):
        torch.manual_seed(seed)
        sampled, inputs = sample_tokens(grad_y, x, 1 / 2)
        where = (inputs == x[7]).all(1)
        assert where.sum() == 1
        torch.testing.assert_close(sampled[where][0], grad_y[7], rtol=1e-4, atol=0)


def test_few_tokens_and_share_1_are_not_sampled():
    grad_y, x = uneven_tokens()
    assert sample_tokens(grad_y, x, 1.0)[0] is grad_y
    assert sample_tokens(grad_y[:MIN_TOKENS], x[:MIN_TOKENS], 0.1)[0].shape[0] == MIN_TOKENS


def test_zero_gradients_give_zero_and_nonfinite_values_propagate():
    grad_y, x = uneven_tokens()
    assert torch.equal(sample_tokens(0 * grad_y, x, 0.5)[0], torch.zeros(TOKENS // 2, OUTPUTS))
    for value in (torch.nan, torch.inf):
        invalid = grad_y.clone()
        invalid[3, 1] = value
        sampled, inputs = sample_tokens(invalid, x, 0.5)
        assert not (sampled.T @ inputs).isfinite().all()


def test_half_precision_supports_small_probabilities():
    grad_y, x = uneven_tokens()
    grad_y[20:] *= 1e-6
    sampled, _ = sample_tokens(grad_y.half(), x.half(), 0.5)
    assert sampled.dtype == torch.float16
    assert sampled.isfinite().all()


@pytest.mark.parametrize("impl", ["eager", "numba"])
@pytest.mark.parametrize("rows", [(7,), (5, 3, 4)])
def test_only_update_gradients_are_estimated(impl, rows):
    exact = make_problem(rows=rows, n=6, batch=(3, 40))
    sampled = replace(exact, product=LinearOp(0.6))
    needed = ("x", "bias", "A", "B", "piece_coeff", "alpha", "beta")
    torch.manual_seed(0)
    actual, expected = solve(sampled, impl, needed=needed), solve(exact, impl, needed=needed)
    for name in ("y", "x", "bias"):
        assert torch.equal(actual[name], expected[name]), name
    for name in ("A", "B", "alpha"):
        error = (actual[name] - expected[name]).norm() / expected[name].norm()
        assert 1e-3 < error < 0.8, name
    torch.manual_seed(0)
    repeated = solve(sampled, impl, needed=needed)
    assert all(torch.equal(repeated[name], actual[name]) for name in actual)


def test_sparse_gradients_use_all_tokens():
    exact = make_problem(rows=(40,), n=30, batch=(3, 40), budgets=(60,))
    needed = ("A", "B")
    actual = solve(replace(exact, product=LinearOp(is_rounded=True)), "numba", needed=needed)
    expected = solve(exact, "numba", needed=needed)
    assert all(torch.equal(actual[name], expected[name]) for name in needed)


def test_trainable_weight_has_exact_gradient():
    exact = make_problem(batch=(3, 40))
    actual, expected = solve(replace(exact, product=LinearOp(0.6)), "eager"), solve(exact, "eager")
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("op", [LinearOp(), LinearOp(0.5), LinearOp(1 / 3), LinearOp(is_rounded=True)])
def test_share_is_exact_in_compiled_graphs(op):
    assert layer_op_from_ints(op.to_ints(torch.Size([2, 2]))) == op


@pytest.mark.parametrize("impl", ["eager", "numba"])
@pytest.mark.parametrize("rows", [(7,), (5, 3, 4)])
def test_only_update_gradients_use_rounded_tokens(impl, rows):
    exact = make_problem(rows=rows, n=6, batch=(3, 40))
    needed = ("x", "bias", "A", "B", "piece_coeff", "alpha", "beta")
    actual = solve(replace(exact, product=LinearOp(is_rounded=True)), impl, needed=needed)
    expected = solve(exact, impl, needed=needed)
    for name in ("y", "x", "bias"):
        assert torch.equal(actual[name], expected[name]), name
    for name in ("A", "B", "alpha"):
        error = (actual[name] - expected[name]).norm() / expected[name].norm()
        assert 1e-5 < error < 0.02, name


def test_weight_gradient_values_are_parsed():
    assert parse_weight_gradient("exact") == (1, False)
    assert parse_weight_gradient("bfloat16") == (1, True)
    for text in ("sample:1/4", "sample:0.25", "sample:.25", "sample:2.5e-1"):
        assert parse_weight_gradient(text) == (0.25, False)
    for wrong in (
        "sample",
        "sample:0",
        "sample:2",
        "sample:1/0",
        "sample:nan",
        "half",
        "sample:x",
        "sample:1e999999999",
    ):
        with pytest.raises(
            ValueError, match=r"weight_gradient must be 'exact', 'bfloat16' or 'sample:P'.*samples half"
        ):
            parse_weight_gradient(wrong)


def test_the_last_draw_is_never_a_token_without_gradient(monkeypatch):
    grad_y, x = torch.randn(TOKENS, OUTPUTS), torch.randn(TOKENS, INPUTS)
    grad_y[TOKENS // 2 :] = 0  # padding
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, 1 - 2.0**-24))
    sampled, _ = sample_tokens(grad_y, x, 1 / 4)
    assert sampled.isfinite().all() and sampled.any(1).all()
