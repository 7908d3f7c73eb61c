"""The gradient of a weight at its kept entries alone, beside the whole product: at which density which is quicker."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from snella.benchmark.rows import conditions
from snella.ops.backends.numba.backend import NumbaBackend
from snella.ops.kernels import KernelScalars, make_kernel
from snella.ops.spec import Update


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
    scalars = KernelScalars(torch.tensor([[0.1, -0.1]]), torch.ones(1), torch.zeros(1), None)
    update = Update(A, B, scalars, make_kernel("mix_k"), (round(density * m * n),), (m,))
    x, grad_y = torch.randn(tokens, n, generator=generator), torch.randn(tokens, m, generator=generator)
    backend = NumbaBackend()
    (merged,) = backend.merge_groups(update)
    if merged is None:
        raise RuntimeError(f"density must leave entries to sample, got {density}")

    def sampled() -> torch.Tensor:
        out = torch.zeros(m, n)
        backend.sample_gradient(update, 0, merged, grad_y, x, out)
        return out

    def dense() -> torch.Tensor:
        return grad_y.T @ x

    some, whole = sampled(), dense()
    if int(some.count_nonzero()) != update.budgets[0] or not torch.allclose(
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
