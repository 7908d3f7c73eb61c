"""Triton kernels against the reference in float64: output and every gradient."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from snella.autograd import add_by_autograd
from snella.ops import Conv2dOp

from .problems import assert_close_to_reference, computed_weight, solve
from .test_adapted_linear import scatter
from .triton_problems import DEVICE, IS_INTERPRETED, needs_triton, on_device, triton_draws, triton_problem

pytestmark = needs_triton
PIECEWISE = ["p_linear", "normalized_rbf", "mix_k"]
MIXED = {"base_dtype": torch.bfloat16}
FUSED = {"rows": (9, 7, 5), "n": 11, "budgets": (0, 30, 55)}


def assert_triton_is_close(problems, **options):
    assert_close_to_reference(problems, impls=["triton"], cache_deltas=[False], **options)


@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        pytest.param("mix_k", {"m": 13, "n": 31}, id="mix_k"),
        pytest.param("mix_k", {"m": 13, "n": 31, "mode": "official", **MIXED}, id="mix_k-official-bfloat16"),
        pytest.param("p_linear", {"m": 37, "n": 11, "r": 6, "num_pieces": 3, **MIXED}, id="p_linear-bfloat16"),
        pytest.param("p_linear", {"m": 7, "n": 5, "mode": "official", "num_pieces": 1}, id="p_linear-official"),
        pytest.param("normalized_rbf", {"m": 7, "n": 65, "softmax_dim": 1, "center_softmax": True}, id="rbf-by-rows"),
        pytest.param("mix_k", FUSED, id="fused-with-zero-partial-and-full-budget"),
        pytest.param("mix_k", {**FUSED, "mode": "official", "center_softmax": True}, id="fused-official-centered"),
        pytest.param("mix_k", {"rows": (9, 4), "n": 35, "mode": "none", **MIXED}, id="fused-without-sparsity-bfloat16"),
        pytest.param("p_linear", {"m": 7, "n": 5, "mode": "none", "num_pieces": 1}, id="p_linear-without-sparsity"),
        pytest.param("mix_k", {"m": 1, "n": 1, "budget": 1}, id="one-entry"),
    ],
)
def test_triton_is_close_to_reference(kernel, options):
    assert_triton_is_close(triton_draws(kernel, **options))


def test_triton_is_close_to_reference_over_several_tiles():
    options = {"rows": (35, 3), "n": 67, "r": 8, "budgets": (900, 70)}
    assert_triton_is_close(triton_draws(**options, count=2 if IS_INTERPRETED else 16))


def test_triton_without_temperature_is_close_to_reference():
    problems = triton_draws("mix_k", m=9, n=7)
    assert_triton_is_close([replace(problem, tensors=problem.tensors | {"temperature": None}) for problem in problems])


def test_triton_is_close_to_reference_for_bfloat16_factors_and_without_base_weight():
    problems = triton_draws(dtype=torch.bfloat16)
    assert_triton_is_close(
        [replace(problem, tensors=problem.tensors | {"weight": None, "bias": None}) for problem in problems]
    )


def test_triton_is_close_to_reference_for_strided_tensors_and_float64_base():
    problems = [on_device(problem.cast(scatter)) for problem in triton_draws(base_dtype=torch.float64, batch=(2, 3))]
    assert_triton_is_close(problems)


def test_triton_is_close_to_reference_for_convolution():
    problems = []
    for problem in triton_draws("p_linear", m=6, n=12, count=2):
        generator = torch.Generator().manual_seed(1)
        images = {
            "x": torch.randn(2, 3, 5, 4, generator=generator).to(DEVICE),
            "weight": problem.tensors["weight"].reshape(6, 3, 2, 2),
        }
        grad_y = torch.randn(2, 6, 4, 3, generator=generator).to(DEVICE)
        tensors = problem.tensors | images
        problems.append(replace(problem, tensors=tensors, grad_y=grad_y, product=Conv2dOp()))
    assert_triton_is_close(problems)


@pytest.mark.parametrize("mode", ["soft", "official"])
def test_a_half_precision_weight_is_rounded_once(mode):
    problem = triton_problem(m=9, n=7, mode=mode, **MIXED)
    weight = problem.tensors["weight"]
    actual = computed_weight(weight, [problem.update(problem.tensors)], weight.shape, "triton")
    wide = computed_weight(weight.float(), [problem.update(problem.tensors)], weight.shape, "triton")
    torch.testing.assert_close(wide, add_by_autograd(weight.float(), [problem.update(problem.tensors)])[0])
    if IS_INTERPRETED:
        # Triton's interpreter truncates float32 to bfloat16, a GPU rounds to nearest
        expected = wide.view(torch.int32).bitwise_and(-(1 << 16)).view(torch.float32).bfloat16()
    else:
        expected = wide.bfloat16()
    assert torch.equal(actual, expected)


def test_float32_weight_under_autocast_is_rounded_like_torch():
    problem = triton_problem(m=9, n=7)
    weight = problem.tensors["weight"]
    identity = torch.eye(7, device=DEVICE)
    tensors = problem.tensors | {"x": identity, "bias": None}
    with torch.autocast(DEVICE, dtype=torch.float16):
        actual = problem.forward(tensors, "triton")
    wide = computed_weight(weight, [problem.update(problem.tensors)], weight.shape, "triton")
    assert torch.equal(actual, F.linear(identity.half(), wide.half()))


@pytest.mark.parametrize("options", [{"m": 33, "n": 66}, {**FUSED, **MIXED}], ids=["one", "fused-bfloat16"])
def test_results_are_deterministic_with_and_without_cache_delta(options):
    problem = triton_problem(**options)
    first = solve(problem, "triton")
    for cache_delta in (False, True) if problem.tensors["weight"].dtype == torch.float32 else (True,):
        repeated = solve(problem, "triton", cache_delta=cache_delta)
        assert all(torch.equal(repeated[name], first[name]) for name in first)


def test_subsets_of_gradients_equal_the_full_set():
    problem = triton_problem()
    full = solve(problem, "triton")
    for needed in (("A",), ("x", "alpha"), ("weight", "B", "temperature")):
        actual = solve(problem, "triton", needed=needed)
        assert set(actual) == {"y", *needed}
        assert all(torch.equal(actual[name], full[name]) for name in actual), needed


def test_matrices_without_budget_have_zero_gradients_and_updates():
    problem = triton_problem(rows=(5, 4), n=6, budgets=(0, 0))
    actual = solve(problem, "triton")
    base = F.linear(problem.tensors["x"], problem.tensors["weight"], problem.tensors["bias"])
    assert torch.equal(actual["y"], base)
    for name in ("A", "B", "piece_coeff", "alpha", "beta", "temperature"):
        assert not actual[name].any(), name


def test_matrix_without_budget_does_not_affect_others():
    problem = triton_problem(**FUSED)
    expected = solve(problem, "triton")
    problem.tensors["A"][0] = torch.nan
    actual = solve(problem, "triton")
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_equal_rows_have_zero_gradient():
    problem = triton_problem("p_linear", m=6, n=5)
    ones = {name: torch.ones_like(problem.tensors[name]) for name in ("A", "B")}
    actual = solve(replace(problem, tensors=problem.tensors | ones), "triton")
    assert not actual["A"].any()
    assert not actual["B"].any()


@pytest.mark.parametrize("scale", [1e-12, 1e3])
def test_softmax_does_not_overflow_or_divide_by_zero(scale):
    problem = triton_problem(m=40, n=30, r=8)
    problem = replace(problem, tensors=problem.tensors | {k: problem.tensors[k] * scale for k in ("A", "B")})
    for name, value in solve(problem, "triton").items():
        assert torch.isfinite(value).all(), name


def test_exponential_is_accurate_to_two_ulp():
    from .triton_exponential import exponentials

    values = -torch.cat([torch.linspace(0, 87, 30_011), torch.logspace(-9, 1.9, 10_007)]).to(DEVICE)
    results = torch.empty_like(values)
    exponentials[(10,)](values, results, len(values), BLOCK=4096, enable_fp_fusion=False)
    exact = torch.exp(values.double())
    unit = torch.exp2(torch.floor(torch.log2(exact)) - 23)
    assert ((results - exact).abs() / unit).max() <= 2
    assert results[0] == 1


def test_nan_in_a_factor_propagates():
    problem = triton_problem(budget=35)
    problem.tensors["A"][0, 0, 0] = torch.nan
    assert solve(problem, "triton")["y"].isnan().any()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("kernel", PIECEWISE)
@pytest.mark.parametrize("mode", ["soft", "official"])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (127, 131), (768, 3072)])
@pytest.mark.parametrize("softmax_dim", [0, 1])
def test_triton_is_close_to_reference_on_gpu(kernel, mode, base_dtype, shape, softmax_dim):
    (m, n), count = shape, 1 if shape == (768, 3072) else 16
    options = {"mode": mode, "base_dtype": base_dtype, "softmax_dim": softmax_dim}
    assert_triton_is_close(triton_draws(kernel, m=m, n=n, r=8, count=count, **options))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["soft", "official"])
@pytest.mark.parametrize("cache_delta", [False, True])
def test_op_does_not_synchronize_with_gpu(mode, cache_delta):
    problem = triton_problem(**FUSED, mode=mode, **MIXED)
    other = replace(problem, budgets=(5, 0, 9))
    solve(problem, "triton", cache_delta=cache_delta)  # warm-up: compile
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        # includes new budgets, whose table must be copied without synchronization
        solve(other, "triton", cache_delta=cache_delta)
        solve(problem, "triton", cache_delta=cache_delta)
    finally:
        torch.cuda.set_sync_debug_mode("default")
