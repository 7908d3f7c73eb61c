"""CPU benchmarks of single operations: sparse weight gradient, effective weight, importance and allocation."""

from __future__ import annotations

import statistics
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snella import BudgetAllocator, create_snella_optimizer
from snella.allocator import allocate
from snella.autograd import compute_effective_weight
from snella.backends import choose_backend
from snella.backends.numba.backend import NumbaBackend, sddmm_weight_grad
from snella.kernels import Factors, make_kernel
from snella.layer import SnellaLayer
from snella.update import Update, UpdateSpec
from snella_lab.bench.baselines import BASELINES, Workload, random_batch
from snella_lab.bench.bench import setting_fields
from snella_lab.bench.reference import op_error
from snella_lab.provenance import conditions


def measure_sampling(
    m: int, n: int, *, tokens: int = 3152, density: float = 0.01, r: int = 8, rounds: int = 5
) -> dict[str, Any]:
    """Time `∂L/∂W = grad_yᵀ x` at the nonzero entries of `S`, compared with the dense product.

    `tokens` is the number of rows of `x` and `grad_y`; `density` is the fraction of nonzero entries. The row contains
    the median times and their ratio.

    Raises:
        RuntimeError: If the sampled entries differ from the dense product, or `density` selects no entry.
    """
    factors, generator = _random_factors(m, n, r)
    spec, budget = UpdateSpec(make_kernel("mix_k"), (m,), backend="numba"), round(density * m * n)
    x, grad_y = torch.randn(tokens, n, generator=generator), torch.randn(tokens, m, generator=generator)
    backend = NumbaBackend()
    (matrix,) = backend.prepare(Update(spec, factors, (budget,))).workspace
    if matrix is None:
        raise RuntimeError(f"density must select at least one entry, got {density}; increase it")

    def sampled() -> Tensor:
        out = torch.zeros(m, n)
        sddmm_weight_grad(matrix, budget, grad_y, x, out)
        return out

    def dense() -> Tensor:
        return grad_y.T @ x

    sparse_grad, dense_grad = sampled(), dense()
    if int(sparse_grad.count_nonzero()) != budget or not torch.allclose(
        sparse_grad, torch.where(sparse_grad == 0, sparse_grad, dense_grad), atol=1e-3 * float(dense_grad.abs().max())
    ):
        raise RuntimeError(f"sampled entries differ from the dense product at density {density}; nothing was timed")
    row = {"benchmark": "sampled_gradient", "shape": [m, n], "tokens": tokens, "density": density, "r": r}
    return {**row, "rounds": rounds, **conditions("cpu"), **_interleaved(sampled, dense, rounds)}


def measure_matrix(
    m: int, n: int, *, tokens: int = 1576, r: int = 8, sparsity: float = 0.7, rounds: int = 9, impl: str = "auto"
) -> dict[str, Any]:
    """Time the effective weight of a matrix (merge, exact selection, addition), compared with its forward product.

    Returns:
        A row with both median times, their ratio, and `extra_over_matrix`: peak memory beyond weight and factors, in
        multiples of the matrix size, including 1 for the effective weight.

    Raises:
        RuntimeError: If the op differs from the reference.
    """
    error = op_error(impl, sparsity=sparsity)
    if error is not None:
        raise RuntimeError(f"impl={impl!r} does not match the reference: {error}; nothing was timed")
    factors, generator = _random_factors(m, n, r)
    weight, x = torch.randn(m, n, generator=generator), torch.randn(tokens, n, generator=generator)
    spec, budgets = UpdateSpec(make_kernel("mix_k"), (m,)), (int(m * n * (1 - sparsity)),)
    spec = replace(spec, backend=choose_backend(impl, spec, factors.A)[0])

    def effective() -> Tensor:
        return compute_effective_weight(weight, [Update(spec, factors, budgets)], weight.shape)[0]

    def product() -> Tensor:
        return F.linear(x, weight)

    effective(), product()
    row = {"benchmark": "one_matrix", "shape": [m, n], "tokens": tokens, "r": r, "sparsity": sparsity, "impl": impl}
    row |= {"rounds": rounds, **conditions("cpu"), **_interleaved(effective, product, rounds)}
    return {**row, "extra_over_matrix": round(peak_bytes(effective) / (4 * m * n), 2)}


def measure_competition(
    backbone: str = "vit_base_patch16_224", *, batch: int = 4, r: int = 8, sparsity: float = 0.7, rounds: int = 5
) -> dict[str, Any]:
    """Measure the CPU time of layer-level and weight-level competition in a SNELLA training step.

    Layer level: importance, once per step, and budget allocation, once per epoch. Weight level: selection, measured as
    the time of all effective weights minus the time without selection. A step selects once, because the backward pass
    reuses the thresholds. The row contains the seconds of a step and of each part, and `competition_over_step`, the
    share of importance and selection.
    """
    workload = Workload(backbone, r, sparsity)
    images, labels = random_batch(workload, batch)
    model = BASELINES["snella"](workload.base(), workload).train()
    optimizer = create_snella_optimizer(model, lr=1e-4)
    allocator = BudgetAllocator(model, total_epochs=100, steps_per_epoch=100)
    layers = [module for module in model.modules() if isinstance(module, SnellaLayer)]
    caps = [matrix.size for matrix in allocator.matrices]

    def train_step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    @torch.no_grad()
    def merge(*, with_selection: bool) -> None:
        for layer in layers:
            update, weight = layer.get_update("default"), cast(Tensor, layer.get_base_layer().weight)
            if not with_selection:
                full_budgets = tuple(rows * weight.shape[1] for rows in update.spec.row_counts)
                update = update._replace(budgets=full_budgets)
            compute_effective_weight(weight, [update._replace(thresholds=None)], weight.shape)

    parts: dict[str, Callable[[], object]] = {
        "learn_s": train_step,
        "importance_s": allocator.importance.update,
        "allocate_s": lambda: allocate(allocator.importance.scores(), caps, allocator.target_budget),
        "merge_s": lambda: merge(with_selection=False),
        "merge_and_select_s": lambda: merge(with_selection=True),
    }
    times: dict[str, list[float]] = {name: [] for name in parts}
    for k in range(rounds + 1):  # round 0 compiles
        for name, part in parts.items():
            start = time.process_time()
            part()
            times[name] += [time.process_time() - start] if k else []
    medians = {name: round(statistics.median(values), 5) for name, values in times.items()}
    select_s = medians["merge_and_select_s"] - medians["merge_s"]
    step_s = medians["learn_s"] + medians["importance_s"]
    return {
        "benchmark": "competition",
        **setting_fields(workload, batch),
        "rounds": rounds,
        "clock": "process time",
        **conditions("cpu"),
        **medians,
        "select_s": round(select_s, 5),
        "step_s": round(step_s, 5),
        "competition_over_step": round((select_s + medians["importance_s"]) / step_s, 4),
    }


def _random_factors(m: int, n: int, r: int) -> tuple[Factors, torch.Generator]:
    """Return random factors of a matrix, and the generator."""
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(1, n, r, generator=generator) * n**-0.5, torch.randn(m, r, generator=generator) * m**-0.5
    return Factors(A, B, torch.tensor([[0.1, -0.1]]), torch.ones(1), torch.zeros(1)), generator


def _interleaved(first: Callable[[], object], second: Callable[[], object], rounds: int) -> dict[str, float]:
    """Call two functions alternately, and return their median seconds and median ratio by the functions' names."""
    times: list[tuple[float, float]] = []
    for _ in range(rounds):
        start = time.perf_counter()
        first()
        middle = time.perf_counter()
        second()
        times.append((middle - start, time.perf_counter() - middle))
    first_s, second_s = (round(statistics.median(values), 5) for values in zip(*times, strict=True))
    ratio = round(statistics.median(first_s / second_s for first_s, second_s in times), 3)
    names = first.__name__, second.__name__
    return {f"{names[0]}_s": first_s, f"{names[1]}_s": second_s, f"{names[0]}_over_{names[1]}": ratio}


def peak_bytes(function: Callable[[], Tensor]) -> int:
    """Return the peak bytes of a call: NumPy arrays (tracemalloc) plus torch tensors (profiler)."""
    tracemalloc.start()
    try:
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            result = function()
        numpy_peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    current = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    del result
    return numpy_peak + peak
