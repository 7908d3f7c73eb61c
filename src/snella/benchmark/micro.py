"""One matrix: what its effective weight costs beside the layer's product, in seconds and in memory."""

from __future__ import annotations

import statistics
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from snella.benchmark.bench import op_error
from snella.benchmark.rows import conditions
from snella.ops.backends import choose_backend
from snella.ops.backends.numba.backend import NumbaBackend, sddmm_weight_grad
from snella.ops.functional import compute_effective_weight
from snella.ops.kernels import make_kernel
from snella.ops.spec import Factors, Update, UpdateSpec


def measure_sampling(
    m: int, n: int, *, tokens: int = 3152, density: float = 0.01, r: int = 8, rounds: int = 5
) -> dict[str, Any]:
    """Time `∂L/∂W = grad_yᵀ x` where `S` is not zero, interleaved with all of it.

    Args:
        m: Outputs.
        n: Inputs.
        tokens: Rows of `x` and `grad_y`.
        density: Fraction of the entries that are kept.
        r: Rank.
        rounds: How often; medians are reported.

    Returns:
        A row: seconds of both, and their ratio.

    Raises:
        RuntimeError: The sampled entries differ from the product's.
    """
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(1, n, r, generator=generator) * n**-0.5, torch.randn(m, r, generator=generator) * m**-0.5
    factors = Factors(A, B, torch.tensor([[0.1, -0.1]]), torch.ones(1), torch.zeros(1))
    spec, budget = UpdateSpec(make_kernel("mix_k"), (m,), backend="numba"), round(density * m * n)
    x, grad_y = torch.randn(tokens, n, generator=generator), torch.randn(tokens, m, generator=generator)
    backend = NumbaBackend()
    (matrix,) = backend.merge(spec, factors, (budget,)).workspace
    if matrix is None:
        raise RuntimeError(f"density must leave entries to sample, got {density}")

    def sampled() -> torch.Tensor:
        out = torch.zeros(m, n)
        sddmm_weight_grad(matrix, budget, grad_y, x, out)
        return out

    def dense() -> torch.Tensor:
        return grad_y.T @ x

    some, whole = sampled(), dense()
    if int(some.count_nonzero()) != budget or not torch.allclose(
        some, torch.where(some == 0, some, whole), atol=1e-3 * float(whole.abs().max())
    ):
        raise RuntimeError(f"density {density} is not timed: the sampled entries differ from the product's")
    times: dict[str, list[float]] = {"sampled_s": [], "dense_s": []}
    for _ in range(rounds):
        for name, function in (("sampled_s", sampled), ("dense_s", dense)):
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    ratios = [mine / theirs for mine, theirs in zip(times["sampled_s"], times["dense_s"], strict=True)]
    return {
        "benchmark": "sampled_gradient",
        "shape": [m, n],
        "tokens": tokens,
        "density": density,
        "r": r,
        "rounds": rounds,
        **conditions("cpu"),
        **{name: round(statistics.median(values), 5) for name, values in times.items()},
        "sampled_over_dense": round(statistics.median(ratios), 3),
    }


def measure_matrix(
    m: int, n: int, *, tokens: int = 1576, r: int = 8, sparsity: float = 0.7, rounds: int = 9, impl: str = "auto"
) -> dict[str, Any]:
    """Time merging, exact selection and the effective weight of one matrix, interleaved with its forward product.

    Args:
        m: Outputs.
        n: Inputs.
        tokens: Rows of the product's input.
        r: Rank.
        sparsity: Of the update.
        rounds: How often; medians are reported.
        impl: As in `adapted_linear`.

    Returns:
        A row: seconds, their ratio, and `extra_over_matrix`, the memory held at most on top of weight and factors in
        units of the matrix's own size (the effective weight itself is one of them).

    Raises:
        RuntimeError: The op differs from the reference.
    """
    error = op_error(impl, sparsity=sparsity)
    if error is not None:
        raise RuntimeError(f"impl={impl!r} is not timed: {error}")
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(1, n, r, generator=generator) * n**-0.5, torch.randn(m, r, generator=generator) * m**-0.5
    factors = Factors(A, B, torch.tensor([[0.1, -0.1]]), torch.ones(1), torch.zeros(1))
    weight, x = torch.randn(m, n, generator=generator), torch.randn(tokens, n, generator=generator)
    spec, budgets = UpdateSpec(make_kernel("mix_k"), (m,)), (int(m * n * (1 - sparsity)),)
    spec = replace(spec, backend=choose_backend(impl, spec, A)[0])

    def effective() -> torch.Tensor:
        return compute_effective_weight(weight, [Update(spec, factors, budgets)], weight.shape)[0]

    def product() -> torch.Tensor:
        return F.linear(x, weight)

    times: dict[str, list[float]] = {"effective_s": [], "product_s": []}
    effective(), product()
    for _ in range(rounds):
        for name, function in (("effective_s", effective), ("product_s", product)):
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    ratios = [mine / theirs for mine, theirs in zip(times["effective_s"], times["product_s"], strict=True)]
    return {
        "benchmark": "one_matrix",
        "shape": [m, n],
        "tokens": tokens,
        "r": r,
        "sparsity": sparsity,
        "impl": impl,
        "rounds": rounds,
        **conditions("cpu"),
        **{name: round(statistics.median(values), 5) for name, values in times.items()},
        "effective_over_product": round(statistics.median(ratios), 3),
        "extra_over_matrix": round(_extra_bytes(effective) / (4 * m * n), 2),
    }


def _extra_bytes(function: Callable[[], torch.Tensor]) -> int:
    """Most that a call holds at once: numpy's arrays as Python counts them, torch's tensors as its profiler does."""
    tracemalloc.start()
    try:
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            result = function()
        by_numpy = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    held = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    del result
    return by_numpy + most
