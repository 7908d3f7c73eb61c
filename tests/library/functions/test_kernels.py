import itertools
from functools import partial
from importlib.metadata import EntryPoint, EntryPoints

import pytest
import torch

from snella import kernels
from snella.kernels import KERNELS, Kernel, KernelScalars, make_kernel, merge_factors, piece_distances

from .formulas import merge_by_hand

PIECEWISE = ("p_linear", "normalized_rbf", "mix_k")
SOFTMAX = ("normalized_rbf", "mix_k")


def make_factors(m, n, r, num_pieces=2, *, temperature=True, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    A = (2 * torch.rand(n, r, generator=generator, dtype=torch.float64) - 1).to(dtype)
    B = (2 * torch.rand(m, r, generator=generator, dtype=torch.float64) - 1).to(dtype)
    coeff = torch.tensor([0.7, -0.4, 0.3, -0.9][:num_pieces], dtype=dtype)
    alpha, beta, gamma = (torch.tensor(value, dtype=dtype) for value in (1.3, -0.05, 0.8))
    return A, B, KernelScalars(coeff, alpha, beta, gamma if temperature else None)


def settings():
    """Return every kernel with all of its options: pieces, temperature, softmax axis and centering."""
    for name in KERNELS:
        pieces = (1, 2, 4) if name in PIECEWISE else (2,)
        softmax = itertools.product((True, False), (0, 1), (False, True)) if name in SOFTMAX else [(True, 0, False)]
        for num_pieces, (temperature, dim, center) in itertools.product(pieces, list(softmax)):
            yield pytest.param(name, num_pieces, temperature, dim, center)


@pytest.mark.parametrize(("name", "num_pieces", "temperature", "softmax_dim", "center"), list(settings()))
def test_entries_equal_hand_computed_formula(name, num_pieces, temperature, softmax_dim, center):
    A, B, scalars = make_factors(5, 3, 4, num_pieces, temperature=temperature)
    options = {"num_pieces": num_pieces, "softmax_dim": softmax_dim, "center_softmax": center}
    by_hand = merge_by_hand(make_kernel(name, **options), A, B, scalars)
    merged = merge_factors(A, B, name, **scalars._asdict(), **options)
    torch.testing.assert_close(merged, by_hand, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(("name", "num_pieces", "temperature", "softmax_dim", "center"), list(settings()))
def test_vjp_equals_autograd(name, num_pieces, temperature, softmax_dim, center):
    A, B, scalars = make_factors(5, 3, 4, num_pieces, temperature=temperature)
    kernel = make_kernel(name, num_pieces=num_pieces, softmax_dim=softmax_dim, center_softmax=center)
    leaves = {"A": A, "B": B} | {n: v for n, v in scalars._asdict().items() if n in kernel.scalars and v is not None}
    for leaf in leaves.values():
        leaf.requires_grad_()
    grad = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.autograd.grad(kernel.merge(A, B, scalars), list(leaves.values()), grad)
    for vjp in (kernel.vjp, partial(Kernel.vjp, kernel)):  # by hand, and by default
        with torch.no_grad():
            actual = vjp(A, B, scalars, grad)._asdict()
        assert {field for field, value in actual.items() if value is not None} == set(leaves)
        for field, value in zip(leaves, expected, strict=True):
            torch.testing.assert_close(actual[field], value, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", SOFTMAX)
@pytest.mark.parametrize("softmax_dim", [0, 1])
def test_centered_softmax_sums_to_zero(name, softmax_dim):
    A, B, scalars = make_factors(6, 4, 4)
    options = {"softmax_dim": softmax_dim, "center_softmax": True}
    merged = merge_factors(A, B, name, **scalars._asdict(), **options)
    without = merge_factors(A, B, name, **scalars._replace(alpha=torch.zeros_like(scalars.alpha))._asdict(), **options)
    assert (merged - without).sum(softmax_dim).abs().max() < 1e-14


def test_temperature_1_equals_no_temperature():
    A, B, scalars = make_factors(5, 3, 4)
    with_temperature = scalars._replace(temperature=torch.ones((), dtype=torch.float64))
    without_temperature = scalars._replace(temperature=None)
    assert torch.equal(
        merge_factors(A, B, **with_temperature._asdict()), merge_factors(A, B, **without_temperature._asdict())
    )


def test_mix_k_is_p_linear_plus_normalized_rbf():
    A, B, scalars = make_factors(5, 3, 4)
    parts = [merge_factors(A, B, name, **scalars._asdict()) for name in ("p_linear", "normalized_rbf")]
    torch.testing.assert_close(merge_factors(A, B, "mix_k", **scalars._asdict()), sum(parts), rtol=1e-14, atol=1e-15)


def nearly_equal_rows():
    """Return factor rows near 1 that differ by about 1e-6, and their exact distances."""
    generator = torch.Generator().manual_seed(0)
    A = 1 + 1e-6 * torch.randn(9, 8, generator=generator)
    B = 1 + 1e-6 * torch.randn(11, 8, generator=generator)
    expected = (B.double()[:, None] - A.double()[None]).reshape(11, 9, 2, 4).square().sum(-1).sqrt().permute(2, 0, 1)
    return A, B, expected


def test_distances_of_nearly_equal_rows_are_accurate_to_a_few_ulp():
    A, B, expected = nearly_equal_rows()
    error = ((piece_distances(A, B, 2).double() - expected).abs() / expected).max().item()
    assert error < 4 * torch.finfo(torch.float32).eps


def test_expanded_square_is_inaccurate_for_nearly_equal_rows():
    A, B, expected = nearly_equal_rows()
    a, b = (factor.reshape(-1, 2, 4).transpose(0, 1) for factor in (A, B))
    expanded = b.square().sum(-1)[:, :, None] + a.square().sum(-1)[:, None] - 2 * b @ a.mT
    error = ((expanded.clamp_min(0).sqrt().double() - expected).abs() / expected).max().item()
    assert error > 0.5


def test_gradients_of_nearly_equal_rows_are_accurate_to_a_few_ulp():
    A, B, _ = nearly_equal_rows()
    grad = torch.randn(11, 9, generator=torch.Generator().manual_seed(1))
    scalars = KernelScalars(torch.tensor([0.5, -0.25]))
    actual = make_kernel("p_linear").vjp(A, B, scalars, grad)
    exact = make_kernel("p_linear").vjp(
        A.double(), B.double(), KernelScalars(scalars.piece_coeff.double()), grad.double()
    )
    for name in ("A", "B", "piece_coeff"):
        value = getattr(exact, name)
        error = (getattr(actual, name).double() - value).abs().max() / value.abs().max()
        assert error < 4 * torch.finfo(torch.float32).eps, name


@pytest.mark.parametrize("name", ["rbf", *PIECEWISE])
def test_equal_rows_have_zero_gradient(name):
    row = torch.tensor([[0.3, -1.2, 0.5, 2.0]])
    A, B = row.repeat(3, 1).requires_grad_(), row.repeat(5, 1).requires_grad_()
    _, _, scalars = make_factors(1, 1, 4, dtype=torch.float32)
    kernel = make_kernel(name)
    grad = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    by_hand = kernel.vjp(A.detach(), B.detach(), scalars, grad)
    by_autograd = torch.autograd.grad(kernel.merge(A, B, scalars), (A, B), grad)
    for value in (by_hand.A, by_hand.B, *by_autograd):
        assert torch.equal(value, torch.zeros_like(value))


def test_equal_pair_does_not_affect_other_gradients():
    A, B, scalars = make_factors(4, 3, 4)
    B[2] = A[1]
    grad = torch.ones(4, 3, dtype=torch.float64)
    without = grad.clone()
    without[2, 1] = 0
    kernel = make_kernel("p_linear")
    with_pair, without_pair = kernel.vjp(A, B, scalars, grad), kernel.vjp(A, B, scalars, without)
    assert torch.isfinite(with_pair.A).all() and torch.isfinite(with_pair.B).all()
    torch.testing.assert_close(with_pair.A, without_pair.A, rtol=1e-14, atol=0)
    torch.testing.assert_close(with_pair.B, without_pair.B, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_factors_are_merged_in_float32(name, dtype):
    A, B, scalars = make_factors(5, 3, 4, dtype=dtype)
    merged = merge_factors(A, B, name, **scalars._asdict())
    wide = KernelScalars(*(value.float() for value in scalars))
    assert merged.dtype == torch.float32
    assert torch.equal(merged, merge_factors(A.float(), B.float(), name, **wide._asdict()))


@pytest.mark.parametrize("name", KERNELS)
def test_autocast_does_not_affect_merge(name):
    A, B, scalars = make_factors(5, 3, 4, dtype=torch.float32)
    expected = merge_factors(A, B, name, **scalars._asdict())
    with torch.autocast("cpu", torch.bfloat16):
        merged = merge_factors(A, B, name, **scalars._asdict())
    assert merged.dtype == torch.float32
    assert torch.equal(merged, expected)


@pytest.mark.parametrize("name", KERNELS)
def test_strided_factors_give_the_same_matrix(name):
    A, B, scalars = make_factors(5, 3, 4)
    strided = torch.zeros(3, 8).double()[:, ::2].copy_(A), torch.zeros(4, 5).double().T.copy_(B)
    assert not any(factor.is_contiguous() for factor in strided)
    merged, expected = (merge_factors(*factors, name, **scalars._asdict()) for factors in (strided, (A, B)))
    torch.testing.assert_close(merged, expected, rtol=1e-13, atol=1e-14)  # matrix products may depend on the layout


def test_unknown_kernel_error_lists_choices():
    with pytest.raises(ValueError, match=r"kernel must be one of \[.*'mix_k'.*\], got 'cubic'"):
        merge_factors(torch.ones(3, 4), torch.ones(2, 4), "cubic")


def test_num_pieces_below_1_raises():
    with pytest.raises(ValueError, match="num_pieces must be at least 1, got -2"):
        make_kernel("mix_k", num_pieces=-2)


def test_invalid_softmax_dim_raises():
    with pytest.raises(ValueError, match=r"softmax_dim must be 0 .* or 1 .*, got 2"):
        make_kernel("mix_k", softmax_dim=2)


@pytest.mark.parametrize(
    ("name", "missing"),
    [("p_linear", "['piece_coeff']"), ("sigmoid", "['alpha', 'beta']"), ("mix_k", "['piece_coeff', 'alpha', 'beta']")],
)
def test_missing_scalars_are_listed(name, missing):
    with pytest.raises(ValueError) as raised:
        merge_factors(torch.ones(3, 4), torch.ones(2, 4), name)
    assert f"requires the scalars {missing}, got None" in str(raised.value)


def test_factors_with_different_ranks_raise_with_shapes():
    with pytest.raises(
        ValueError, match=r"A and B must be \[n, r\] and \[m, r\] with equal r, got \[3, 4\] and \[2, 6\]"
    ):
        merge_factors(torch.ones(3, 4), torch.ones(2, 6), "linear")


@pytest.mark.parametrize(("r", "suggestion"), [(7, 6), (1, 2)])
def test_indivisible_rank_error_suggests_a_rank(r, suggestion):
    with pytest.raises(ValueError, match=f"num_pieces must divide r, got num_pieces=2 and r={r}; use r={suggestion}"):
        merge_factors(torch.ones(3, r), torch.ones(2, r), "p_linear", piece_coeff=torch.ones(2))


def test_wrong_number_of_coefficients_raises():
    with pytest.raises(ValueError, match=r"piece_coeff must be \[num_pieces\] = \[2\], got \[3\]"):
        merge_factors(torch.ones(3, 4), torch.ones(2, 4), "p_linear", piece_coeff=torch.ones(3))


@pytest.mark.parametrize("name", ["alpha", "beta", "temperature"])
def test_scalars_with_an_axis_raise(name):
    scalars = {"piece_coeff": torch.ones(2), "alpha": torch.tensor(1.0), "beta": torch.tensor(0.0)}
    with pytest.raises(ValueError, match=rf"{name} must be 0-dim, got \[3\]"):
        merge_factors(torch.ones(3, 4), torch.ones(2, 4), **{**scalars, name: torch.ones(3)})


class Plugged(Kernel):
    name = "plugged"

    def merge(self, A, B, scalars):
        return B @ A.T


def install_kernel(monkeypatch, name, load):
    """Register a kernel as an entry point of an installed package."""
    installed = EntryPoints([EntryPoint(name, "module:Plugged", "snella.kernels")])
    monkeypatch.setattr(EntryPoint, "load", load)
    monkeypatch.setattr(kernels, "entry_points", lambda **query: installed.select(**query))
    monkeypatch.setattr(kernels, "KERNELS", dict(KERNELS))


def test_kernels_of_installed_packages_are_found(monkeypatch):
    install_kernel(monkeypatch, "plugged", lambda _: Plugged)
    with pytest.raises(ValueError, match=r"kernel must be one of .*'plugged'\], got 'unknown'"):
        make_kernel("unknown")
    assert type(make_kernel("plugged")) is Plugged


def test_kernel_that_cannot_be_imported_is_reported(monkeypatch):
    def load(_):
        raise ModuleNotFoundError("No module named 'absent'", name="absent")

    install_kernel(monkeypatch, "plugged", load)
    message = r"kernel 'plugged' cannot be imported \(ModuleNotFoundError: No module named 'absent'\); update or"
    with pytest.raises(ImportError, match=message):
        make_kernel("plugged")
    assert type(make_kernel("mix_k")) is KERNELS["mix_k"]


def test_kernel_with_another_name_than_its_entry_point_is_reported(monkeypatch):
    install_kernel(monkeypatch, "other", lambda _: Plugged)
    with pytest.raises(ImportError, match=r"module registers a kernel with the name 'plugged' as 'other'; the"):
        make_kernel("other")
