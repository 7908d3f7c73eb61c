"""Adapted layers with every gradient, and the tolerance that an implementation is held to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from snella.backends import choose_backend, get_backend
from snella.functional import adapted_layer, compute_effective_weight
from snella.kernels import Kernel, KernelScalars, make_kernel
from snella.update import Factors, LayerOp, LazyWeight, LinearOp, Update, UpdateSpec

DRAWS = 16  # the contract compares losses over several draws, so that neither side is judged by one lucky rounding
SCALAR_NAMES = KernelScalars._fields


def with_backend(update: Update, impl: str) -> Update:
    """The same update computed by what `impl` chooses."""
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
    """Output of `adapted_layer` with one implementation."""
    return adapted_layer(x, weight, bias, [with_backend(update, impl) for update in updates], op, **options)[0]


def computed_weight(
    weight: Tensor | LazyWeight | None,
    updates: Sequence[Update],
    shape: torch.Size,
    impl: str = "auto",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight of `compute_effective_weight` with one implementation."""
    return compute_effective_weight(weight, [with_backend(update, impl) for update in updates], shape, dtype)[0]


@dataclass
class Problem:
    """Everything that one call of `adapted_layer` reads, and ∂L/∂y."""

    tensors: dict[str, Tensor | None]  # x, weight, bias, A, B and the kernel's scalars: what can have a gradient
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
        """The same problem with every tensor changed."""
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
    """A linear layer with one update; `budget` defaults to two fifths of the entries, in mode `none` to all of them."""
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
        least = 1.0 if mode == "none" else 0.4
        budgets = tuple(max(1, int(least * count * n)) if budget is None else budget for count in rows)
    return Problem(tensors, spec, tuple(budgets), rows, LinearOp(), normal(*batch, m).to(base_dtype), mode=mode)


def solve(
    problem: Problem, impl: str, *, cache_delta: bool = False, needed: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Output `y` and the gradient of every tensor in `needed` (default: all), by one backward pass."""
    leaves = {
        name: None if tensor is None else tensor.detach().requires_grad_(needed is None or name in needed)
        for name, tensor in problem.tensors.items()
    }
    y = problem.forward(leaves, impl, cache_delta)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
    grads = torch.autograd.grad(y, list(wanted.values()), problem.grad_y) if wanted else ()
    return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}


def errors(found: Sequence[dict[str, Tensor]], exact: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The largest error of `y` and of each gradient in each draw, `[draws]`.

    A fraction of the largest exact value of all draws. The kernel's scalars are judged by the worst of them in
    `assert_close_to_reference`: their gradients are sums of one matrix that cancel down to a single number.
    """
    largest = {}
    for name in exact[0]:
        scale = max(solution[name].abs().max().item() if solution[name].numel() else 0.0 for solution in exact) or 1.0
        differences = [(mine[name].double() - true[name]).abs() for mine, true in zip(found, exact, strict=True)]
        largest[name] = torch.tensor([each.max().item() / scale if each.numel() else 0.0 for each in differences])
    return largest


def losses(found: Sequence[dict[str, Tensor]], exact: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """What is lost of `y` and of each gradient: root mean square of the errors over the draws."""
    return {name: error.square().mean().sqrt().item() for name, error in errors(found, exact).items()}


class Roundings(TorchDispatchMode):
    """Multiplies each result of the arithmetic within by `1 + unit·ξ`, ξ drawn from [-1, 1].

    Selections and copies stay exact, so that an entry at its threshold stays there.
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


def simulated_losses(
    problems: Sequence[Problem], exact: Sequence[dict[str, Tensor]], needed: Sequence[str] | None = None
) -> dict[str, float]:
    """What is lost where the reference, in float64, rounds every operation as float32 may: the worst of many times.

    Up to one unit in the last place, at random, since a softmax, a distance or a product rounds more than once. Holds
    the condition of every sum and of all that cancels; the same on every machine, and never 0 by luck, as the loss of a
    reference with few terms may be.
    """
    generator = torch.Generator().manual_seed(0)
    wide = [problem.cast(Tensor.double) for problem in problems]
    worst = {name: torch.zeros(len(problems)) for name in exact[0]}
    for _ in range(DRAWS):
        with Roundings(torch.finfo(torch.float32).eps, generator):
            rounded = [solve(problem, "reference", needed=needed) for problem in wide]
        for name, error in errors(rounded, exact).items():
            worst[name] = torch.maximum(worst[name], error)
    return {name: error.square().mean().sqrt().item() for name, error in worst.items()}


def assert_close_to_reference(
    problems: Sequence[Problem],
    *,
    within: Callable[[], AbstractContextManager[object]] = nullcontext,
    impls: Sequence[str] | None = None,
    keep: Sequence[bool] = (False, True),
    needed: Sequence[str] | None = None,
) -> None:
    """An implementation loses at most twice what the reference itself loses, plus one rounding: output and gradients.

    Where that is not so, the reference may have been lucky: it then counts as losing what `simulated_losses` says, if
    that is more. Holds for `impls`, by default `eager`, and `numba` where it can compute the problem, each with ΔW
    rebuilt and kept. They and the reference are compared with the reference in float64; `within` surrounds all but that
    one; `needed` are the tensors whose gradients are asked for, default all.
    """
    exact = [solve(problem.cast(Tensor.double), "reference", needed=needed) for problem in problems]
    with within():
        plain = [solve(problem, "reference", needed=needed) for problem in problems]
        found = {
            f"{impl}, {'kept' if cache_delta else 'rebuilt'}": [
                solve(problem, impl, cache_delta=cache_delta, needed=needed) for problem in problems
            ]
            for impl in impls or handwritten(problems[0])
            for cache_delta in keep
        }
    for solutions in found.values():
        for name, true in exact[0].items():
            assert solutions[0][name].dtype == plain[0][name].dtype, name
            assert solutions[0][name].shape == true.shape, name
    roundings = {name: torch.finfo(value.dtype).eps / 2 for name, value in plain[0].items()}
    reference_losses = losses(plain, exact)
    found_losses = {case: losses(solutions, exact) for case, solutions in found.items()}
    excess = excess_of(found_losses, reference_losses, roundings)
    if excess:
        # proportional to the rounding, which is finer in float64
        finer = {name: min(1.0, 2 * rounding / torch.finfo(torch.float32).eps) for name, rounding in roundings.items()}
        for name, loss in simulated_losses(problems, exact, needed).items():
            reference_losses[name] = max(reference_losses[name], finer[name] * loss)
        excess = excess_of(found_losses, reference_losses, roundings)
    assert not excess, excess


def excess_of(
    found_losses: dict[str, dict[str, float]], reference_losses: dict[str, float], roundings: dict[str, float]
) -> list[tuple[str, str, float, float]]:
    """Case, name, loss and limit of everything that loses more than the law allows."""
    worst_scalar = max((reference_losses.get(name, 0.0) for name in SCALAR_NAMES), default=0.0)
    limits = {
        name: 2 * (worst_scalar if name in SCALAR_NAMES else loss) + roundings[name]
        for name, loss in reference_losses.items()
    }
    return [
        (case, name, loss, limits[name])
        for case, of_case in found_losses.items()
        for name, loss in of_case.items()
        if not loss <= limits[name]
    ]


def handwritten(problem: Problem) -> list[str]:
    """The implementations with a hand-written backward that can compute this problem."""
    update = problem.update(problem.tensors)
    return [
        "eager",
        *(["numba"] if get_backend("numba").unsupported_reason(update.spec, update.factors.A) is None else []),
    ]


def draws(kernel: str = "mix_k", *, count: int = DRAWS, **options: object) -> list[Problem]:
    """`count` problems that differ only in their random numbers."""
    return [make_problem(kernel, seed=seed, **options) for seed in range(count)]
