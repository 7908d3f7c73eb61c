"""Test problems for adapted layers, and the numerical tolerance of their implementations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from snella.autograd import adapted_layer, compute_effective_weight
from snella.backends import choose_backend, get_backend
from snella.kernels import Factors, Kernel, KernelScalars, make_kernel
from snella.ops import LayerOp, LazyWeight, LinearOp
from snella.update import Update, UpdateSpec

DRAWS = 16  # root-mean-square errors over several draws do not depend on the rounding of a single draw
SCALAR_NAMES = KernelScalars._fields


def with_backend(update: Update, impl: str) -> Update:
    """Return the update with the backend that `impl` selects."""
    backend, _ = choose_backend(impl, update.spec, update.factors.A)
    return update._replace(spec=replace(update.spec, backend=backend))


def layer_output(
    x: Tensor,
    weight: Tensor | LazyWeight | None,
    bias: Tensor | None,
    updates: Sequence[Update],
    op: LayerOp,
    *,
    impl: str = "auto",
    **options: object,
) -> Tensor:
    """Return the output of `adapted_layer` with one implementation."""
    return adapted_layer(x, weight, bias, [with_backend(update, impl) for update in updates], op, **options)[0]


def computed_weight(
    weight: Tensor | LazyWeight | None,
    updates: Sequence[Update],
    shape: torch.Size,
    impl: str = "auto",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the weight of `compute_effective_weight` with one implementation."""
    return compute_effective_weight(weight, [with_backend(update, impl) for update in updates], shape, dtype)[0]


@dataclass
class Problem:
    """Arguments of one call of `adapted_layer`, and ∂L/∂y."""

    tensors: dict[str, Tensor | None]  # differentiable inputs: x, weight, bias, A, B and the kernel's scalars
    kernel: Kernel
    budgets: tuple[int, ...]
    row_counts: tuple[int, ...]
    product: LayerOp
    grad_y: Tensor
    scaling: float = 1.5
    mode: str = "soft"
    weight_shape: torch.Size | None = None
    thresholds: tuple[Tensor, ...] = ()

    def cast(self, change: Callable[[Tensor], Tensor]) -> Problem:
        """Apply a function to every tensor."""
        tensors = {name: None if tensor is None else change(tensor) for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, grad_y=change(self.grad_y))

    def update(self, tensors: dict[str, Tensor | None], impl: str = "eager") -> Update:
        factors = Factors(*(tensors[name] for name in Factors._fields))
        spec = UpdateSpec(self.kernel, self.row_counts, self.mode, self.scaling)
        thresholds = torch.stack(self.thresholds) if self.thresholds else None
        return with_backend(Update(spec, factors, self.budgets, thresholds), impl)

    def forward(self, tensors: dict[str, Tensor | None], impl: str, cache_delta: bool = False) -> Tensor:
        return layer_output(
            tensors["x"],
            tensors["weight"],
            tensors["bias"],
            [self.update(tensors)],
            self.product,
            weight_shape=self.weight_shape,
            impl=impl,
            cache_delta=cache_delta,
        )


def make_problem(
    kernel: str = "mix_k",
    *,
    m: int = 7,
    n: int = 5,
    r: int = 4,
    batch: Sequence[int] = (6,),
    budget: int | None = None,
    rows: Sequence[int] | None = None,
    budgets: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    base_dtype: torch.dtype | None = None,
    seed: int = 0,
    mode: str = "soft",
    **kernel_options: object,
) -> Problem:
    """Create a linear layer with one update; `budget` defaults to 40% of the entries, or all in mode `none`."""
    generator = torch.Generator().manual_seed(seed)
    base_dtype = base_dtype or dtype

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = tuple(rows or (m,))
    groups, m = len(rows), sum(rows)
    spec = make_kernel(kernel, **kernel_options)
    scalars = {
        "piece_coeff": (0.75 + uniform(groups, spec.num_pieces) / 4) * (-1) ** torch.arange(spec.num_pieces),
        "alpha": 1 + uniform(groups) / 4,
        "beta": uniform(groups) / 4,
        "temperature": 0.8 + uniform(groups) / 4,
    }
    factors = {"A": uniform(groups, n, r), "B": uniform(m, r)} | {
        name: scalars[name] if name in spec.scalars else None for name in SCALAR_NAMES
    }
    base = {"x": normal(*batch, n), "weight": normal(m, n), "bias": normal(m)}
    tensors = {name: tensor.to(base_dtype) for name, tensor in base.items()} | {
        name: tensor if tensor is None else tensor.to(dtype) for name, tensor in factors.items()
    }
    if budgets is None:
        share = 1.0 if mode == "none" else 0.4
        budgets = tuple(max(1, int(share * count * n)) if budget is None else budget for count in rows)
    return Problem(tensors, spec, tuple(budgets), rows, LinearOp(), normal(*batch, m).to(base_dtype), mode=mode)


def solve(
    problem: Problem, impl: str, *, cache_delta: bool = False, needed: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Return the output `y` and the gradients of the tensors in `needed` (default: all)."""
    leaves = {
        name: None if tensor is None else tensor.detach().requires_grad_(needed is None or name in needed)
        for name, tensor in problem.tensors.items()
    }
    y = problem.forward(leaves, impl, cache_delta)
    required = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
    grads = torch.autograd.grad(y, list(required.values()), problem.grad_y) if required else ()
    return {"y": y.detach(), **dict(zip(required, grads, strict=True))}


def errors(actual: Sequence[dict[str, Tensor]], exact: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the largest error of `y` and of each gradient per draw, `[draws]`.

    Errors are relative to the largest exact value of all draws. `assert_close_to_reference` compares the kernel's
    scalars with the worst scalar, because their gradients are sums over a matrix with cancellation.
    """
    largest = {}
    for name in exact[0]:
        scale = max(solution[name].abs().max().item() if solution[name].numel() else 0.0 for solution in exact) or 1.0
        differences = [
            (actual_result[name].double() - expected_result[name]).abs()
            for actual_result, expected_result in zip(actual, exact, strict=True)
        ]
        largest[name] = torch.tensor(
            [difference.max().item() / scale if difference.numel() else 0.0 for difference in differences]
        )
    return largest


def rms_errors(actual: Sequence[dict[str, Tensor]], exact: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Return the root-mean-square error of `y` and of each gradient over the draws."""
    return {name: error.square().mean().sqrt().item() for name, error in errors(actual, exact).items()}


class RandomRounding(TorchDispatchMode):
    """Mode that multiplies each arithmetic result by `1 + unit·ξ` with uniform ξ in [-1, 1].

    Selections and copies remain exact, so that no entry crosses its threshold.
    """

    ARITHMETIC = (
        *("add", "sub", "rsub", "mul", "div", "sum", "mean", "pow", "sqrt", "exp", "sigmoid", "sigmoid_backward"),
        *("mv", "mm", "bmm", "addmm", "baddbmm", "convolution", "convolution_backward"),
        *("_softmax", "_softmax_backward_data", "_cdist_forward", "_cdist_backward"),
    )

    def __init__(self, unit: float, generator: torch.Generator) -> None:
        super().__init__()
        self.unit, self.generator = unit, generator

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        results = op(*args, **(kwargs or {}))
        if op.overloadpacket.__name__ not in self.ARITHMETIC or op._schema.is_mutable:
            return results
        return tree_map_only(Tensor, self.round, results)

    def round(self, result: Tensor) -> Tensor:
        noise = 2 * torch.rand(result.shape, generator=self.generator, dtype=torch.float64) - 1
        return result * (1 + self.unit * noise.to(result.device))


def simulated_errors(
    problems: Sequence[Problem], exact: Sequence[dict[str, Tensor]], needed: Sequence[str] | None = None
) -> dict[str, float]:
    """Return the errors of the float64 reference with simulated float32 rounding, the largest of many runs.

    Perturbs each operation randomly by up to one unit in the last place, because softmax, distance and product round
    more than once. The result reflects the condition of sums with cancellation, is the same on every machine, and is
    never 0 by chance.
    """
    generator = torch.Generator().manual_seed(0)
    wide_problems = [problem.cast(Tensor.double) for problem in problems]
    worst = {name: torch.zeros(len(problems)) for name in exact[0]}
    for _ in range(DRAWS):
        with RandomRounding(torch.finfo(torch.float32).eps, generator):
            rounded = [solve(problem, "reference", needed=needed) for problem in wide_problems]
        for name, error in errors(rounded, exact).items():
            worst[name] = torch.maximum(worst[name], error)
    return {name: error.square().mean().sqrt().item() for name, error in worst.items()}


def assert_close_to_reference(
    problems: Sequence[Problem],
    *,
    within: Callable[[], AbstractContextManager[object]] = nullcontext,
    impls: Sequence[str] | None = None,
    cache_deltas: Sequence[bool] = (False, True),
    needed: Sequence[str] | None = None,
) -> None:
    """Assert that an implementation's errors are at most twice those of the reference, plus one rounding.

    Compares output and gradients of all implementations with the reference in float64. If the check fails, the errors
    of the reference may be small by chance; the check then repeats with `simulated_errors` if they are larger.

    Args:
        problems: Problems that differ only in their random numbers.
        within: Context of all computations except the float64 reference, e.g. autocast.
        impls: Implementations to check; defaults to `eager`, and `numba` if it supports the problem.
        cache_deltas: Values of `cache_delta` to check.
        needed: Tensors that require gradients; defaults to all.
    """
    exact = [solve(problem.cast(Tensor.double), "reference", needed=needed) for problem in problems]
    with within():
        reference = [solve(problem, "reference", needed=needed) for problem in problems]
        actual = {
            f"{impl}, {'saved' if cache_delta else 'rebuilt'}": [
                solve(problem, impl, cache_delta=cache_delta, needed=needed) for problem in problems
            ]
            for impl in impls or handwritten(problems[0])
            for cache_delta in cache_deltas
        }
    for solutions in actual.values():
        for name, expected in exact[0].items():
            assert solutions[0][name].dtype == reference[0][name].dtype, name
            assert solutions[0][name].shape == expected.shape, name
    roundings = {name: torch.finfo(value.dtype).eps / 2 for name, value in reference[0].items()}
    reference_errors = rms_errors(reference, exact)
    errors_by_case = {case: rms_errors(solutions, exact) for case, solutions in actual.items()}
    excess = out_of_tolerance(errors_by_case, reference_errors, roundings)
    if excess:
        # scale by the unit roundoff, which is smaller in float64
        scales = {name: min(1.0, 2 * rounding / torch.finfo(torch.float32).eps) for name, rounding in roundings.items()}
        for name, error in simulated_errors(problems, exact, needed).items():
            reference_errors[name] = max(reference_errors[name], scales[name] * error)
        excess = out_of_tolerance(errors_by_case, reference_errors, roundings)
    assert not excess, excess


def out_of_tolerance(
    errors_by_case: dict[str, dict[str, float]], reference_errors: dict[str, float], roundings: dict[str, float]
) -> list[tuple[str, str, float, float]]:
    """Return case, name, error and limit of every result outside the tolerance."""
    worst_scalar = max((reference_errors.get(name, 0.0) for name in SCALAR_NAMES), default=0.0)
    limits = {
        name: 2 * (worst_scalar if name in SCALAR_NAMES else error) + roundings[name]
        for name, error in reference_errors.items()
    }
    return [
        (case, name, error, limits[name])
        for case, case_errors in errors_by_case.items()
        for name, error in case_errors.items()
        if not error <= limits[name]
    ]


def handwritten(problem: Problem) -> list[str]:
    """Return the implementations with a hand-written backward pass that support a problem."""
    update = problem.update(problem.tensors)
    return [
        "eager",
        *(["numba"] if get_backend("numba").unsupported_reason(update.spec, update.factors.A) is None else []),
    ]


def draws(kernel: str = "mix_k", *, count: int = DRAWS, **options: object) -> list[Problem]:
    """Create `count` problems that differ only in their random numbers."""
    return [make_problem(kernel, seed=seed, **options) for seed in range(count)]
