"""Gradients from a sample of the tokens: unbiased, of the size that was asked for, exact everywhere else."""

from dataclasses import replace

import pytest
import torch

from snella.memory.sampling import LEAST_TOKENS, parse_weight_gradient, sample_tokens
from snella.update import LinearOp, layer_op_from_ints
from tests.library.functions.problems import make_problem, solve

TOKENS, OUTPUTS, INPUTS = 400, 6, 5


def uneven_tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients and inputs whose sizes differ by orders of magnitude from token to token, one far above the others."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.exp(1.5 * torch.randn(TOKENS, 1, generator=generator))
    sizes[7] = 1000
    return sizes * torch.randn(TOKENS, OUTPUTS, generator=generator), torch.randn(TOKENS, INPUTS, generator=generator)


def estimates(share: float, draws: int) -> torch.Tensor:
    torch.manual_seed(0)
    pairs = [sample_tokens(*uneven_tokens(), share) for _ in range(draws)]
    return torch.stack([grad_y.T @ x for grad_y, x in pairs])


def test_the_mean_over_many_samples_is_the_exact_gradient():
    grad_y, x = (tensor.double() for tensor in uneven_tokens())
    found = estimates(1 / 4, 2000).double()
    error = found.mean(0) - grad_y.T @ x
    deviation = found.std(0) / len(found) ** 0.5
    assert (error.abs() < 4.5 * deviation + 1e-6 * found.abs().amax()).all()


def test_a_sample_by_norm_errs_less_than_one_of_equal_chances():
    grad_y, x = uneven_tokens()
    exact, k = grad_y.T @ x, TOKENS // 4
    by_norm = (estimates(1 / 4, 200) - exact).square().sum((1, 2)).mean()
    picks = torch.stack([torch.randperm(TOKENS)[:k] for _ in range(200)])
    equal = torch.stack([4 * grad_y[pick].T @ x[pick] - exact for pick in picks]).square().sum((1, 2)).mean()
    assert by_norm < equal / 50


@pytest.mark.parametrize(("share", "drawn"), [(0.5, 200), (0.26, 104), (1e-3, LEAST_TOKENS)])
def test_as_many_tokens_are_drawn_as_were_asked_for_and_no_fewer_than_the_least(share, drawn):
    grad_y, x = sample_tokens(*uneven_tokens(), share)
    assert (grad_y.shape, x.shape) == ((drawn, OUTPUTS), (drawn, INPUTS))


def test_a_token_that_outweighs_the_others_is_always_drawn_once_and_as_it_is():
    grad_y, x = uneven_tokens()
    for seed in range(20):
        torch.manual_seed(seed)
        sampled, inputs = sample_tokens(grad_y, x, 1 / 2)
        where = (inputs == x[7]).all(1)
        assert where.sum() == 1
        torch.testing.assert_close(sampled[where][0], grad_y[7], rtol=1e-4, atol=0)


def test_few_tokens_and_a_share_of_one_are_taken_as_they_are():
    grad_y, x = uneven_tokens()
    assert sample_tokens(grad_y, x, 1.0)[0] is grad_y
    assert sample_tokens(grad_y[:LEAST_TOKENS], x[:LEAST_TOKENS], 0.1)[0].shape[0] == LEAST_TOKENS


def test_tokens_without_a_gradient_give_zero_and_what_is_not_finite_stays_visible():
    grad_y, x = uneven_tokens()
    assert torch.equal(sample_tokens(0 * grad_y, x, 0.5)[0], torch.zeros(TOKENS // 2, OUTPUTS))
    for value in (torch.nan, torch.inf):
        broken = grad_y.clone()
        broken[3, 1] = value
        sampled, inputs = sample_tokens(broken, x, 0.5)
        assert not (sampled.T @ inputs).isfinite().all()


def test_half_precision_is_divided_by_chances_too_small_for_it():
    grad_y, x = uneven_tokens()
    grad_y[20:] *= 1e-6
    sampled, _ = sample_tokens(grad_y.half(), x.half(), 0.5)
    assert sampled.dtype == torch.float16
    assert sampled.isfinite().all()


@pytest.mark.parametrize("impl", ["eager", "numba"])
@pytest.mark.parametrize("rows", [(7,), (5, 3, 4)])
def test_only_the_update_s_gradients_are_estimated(impl, rows):
    exact = make_problem(rows=rows, n=6, batch=(3, 40))
    sampled = replace(exact, product=LinearOp(0.6))
    needed = ("x", "bias", "A", "B", "piece_coeff", "alpha", "beta")
    torch.manual_seed(0)
    found, expected = solve(sampled, impl, needed=needed), solve(exact, impl, needed=needed)
    for name in ("y", "x", "bias"):
        assert torch.equal(found[name], expected[name]), name
    for name in ("A", "B", "alpha"):
        error = (found[name] - expected[name]).norm() / expected[name].norm()
        assert 1e-3 < error < 0.8, name
    torch.manual_seed(0)
    again = solve(sampled, impl, needed=needed)
    assert all(torch.equal(again[name], found[name]) for name in found)


def test_few_kept_entries_are_computed_from_tokens_as_they_are():
    exact = make_problem(rows=(40,), n=30, batch=(3, 40), budgets=(60,))
    needed = ("A", "B")
    found = solve(replace(exact, product=LinearOp(is_rounded=True)), "numba", needed=needed)
    expected = solve(exact, "numba", needed=needed)
    assert all(torch.equal(found[name], expected[name]) for name in needed)


def test_a_weight_that_is_trained_itself_gets_its_exact_gradient():
    exact = make_problem(batch=(3, 40))
    found, expected = solve(replace(exact, product=LinearOp(0.6)), "eager"), solve(exact, "eager")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("op", [LinearOp(), LinearOp(0.5), LinearOp(1 / 3), LinearOp(is_rounded=True)])
def test_a_compiled_graph_gets_the_share_to_the_last_bit(op):
    assert layer_op_from_ints(op.to_ints(torch.Size([2, 2]))) == op


@pytest.mark.parametrize("impl", ["eager", "numba"])
@pytest.mark.parametrize("rows", [(7,), (5, 3, 4)])
def test_only_the_update_s_gradients_are_computed_from_rounded_tokens(impl, rows):
    exact = make_problem(rows=rows, n=6, batch=(3, 40))
    needed = ("x", "bias", "A", "B", "piece_coeff", "alpha", "beta")
    found = solve(replace(exact, product=LinearOp(is_rounded=True)), impl, needed=needed)
    expected = solve(exact, impl, needed=needed)
    for name in ("y", "x", "bias"):
        assert torch.equal(found[name], expected[name]), name
    for name in ("A", "B", "alpha"):
        error = (found[name] - expected[name]).norm() / expected[name].norm()
        assert 1e-5 < error < 0.02, name


def test_what_is_asked_for_in_words():
    assert parse_weight_gradient("exact") == (1, False)
    assert parse_weight_gradient("bfloat16") == (1, True)
    assert parse_weight_gradient("sample:1/4") == parse_weight_gradient("sample:0.25") == (0.25, False)
    for wrong in ("sample", "sample:0", "sample:2", "sample:1/0", "sample:nan", "half", "sample:x"):
        with pytest.raises(
            ValueError, match=r"weight_gradient must be 'exact', 'bfloat16' or 'sample:P'.*samples half"
        ):
            parse_weight_gradient(wrong)
