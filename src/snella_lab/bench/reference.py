"""Correctness checks of backends against a float64 reference.

A backend computes SNELLA's update of a weight, and the gradients of the update's factors and scalars.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from snella.backends import choose_backend
from snella.functional import adapted_layer
from snella.kernels import Factors, make_kernel
from snella.ops import LinearOp
from snella.sparsify import SparsifyMode
from snella.update import Update, UpdateSpec

SHAPES = (((1,), 1), ((96,), 80), ((17,), 33), ((40, 40, 40), 64), ((768,), 192))
"""Shapes of weights, `(rows of each matrix, columns)`: a single entry, even and odd shapes, a fused layer of query,
key, and value, and a layer of a ViT."""
KERNELS = ("mix_k", "p_linear")
"""Kernels that are checked with every shape. `check_cases` yields `normalized_rbf` with only two shapes."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_SAMPLES = 8
"""Number of random samples per case."""
_TOKENS = 6
_SCALARS = ("piece_coeff", "alpha", "beta", "temperature")


@dataclass(frozen=True)
class CheckCase:
    """Case of a check: kernel, shape, rank, and sparsification mode of the update of one weight."""

    kernel: str
    rows: tuple[int, ...]
    columns: int
    r: int = 8
    mode: SparsifyMode = "soft"

    def __str__(self) -> str:
        options = ""
        if self.r != 8:
            options += f" r={self.r}"
        if self.mode != "soft":
            options += f" {self.mode}"
        return f"{self.kernel}{options} [{sum(self.rows)}, {self.columns}]"


def check_cases() -> Iterator[CheckCase]:
    """Yield cases: `KERNELS` with every shape, then `normalized_rbf`, mode `official`, and rank 32 with some shapes."""
    for kernel in KERNELS:
        for rows, columns in SHAPES:
            yield CheckCase(kernel, rows, columns)
    yield CheckCase("normalized_rbf", (17,), 33)
    yield CheckCase("normalized_rbf", (40, 40, 40), 64)
    yield CheckCase("mix_k", (17,), 33, mode="official")
    yield CheckCase("mix_k", (40, 40, 40), 64, r=32)


@dataclass(frozen=True)
class BackendCheck:
    """Comparison of one backend with the float64 reference.

    The error of an output or gradient is the root mean square, over random samples, of its largest absolute error
    divided by its largest exact magnitude in all samples. The tolerance is `2·max(error of the reference in the same
    dtype, 8·eps) + eps/2`. The gradients of all scalars share the largest of their reference errors.

    Attributes:
        device: Device of the tensors.
        impl: Backend.
        dtype: Dtype of the input, the weight, and the output's gradient. Factors and scalars are in float32.
        cases: Number of cases; see `check_cases`. 0 if a case raised an error.
        worst: Largest ratio of error to tolerance over all cases, outputs, and gradients. At most 1 for a correct
            backend. Infinite for NaN and for kernels that raise a RuntimeError, e.g. in the first-use check.
        where: Case and tensor with the largest ratio.
        error: Reason why the backend is not available, or its RuntimeError. Empty otherwise.
    """

    device: str
    impl: str
    dtype: str
    cases: int = 0
    worst: float = 0.0
    where: str = ""
    error: str = ""

    @property
    def verdict(self) -> str:
        """`correct`, `wrong`, or `not available`."""
        if self.worst > 1:
            return "wrong"
        return "not available" if self.error else "correct"


def check_backend(impl: str, device: str, dtype: str = "fp32", *, sparsity: float = 0.7) -> BackendCheck:
    """Compare a backend with the float64 reference in all `check_cases`.

    `dtype` is the dtype of the input, the weight, and the output's gradient: `fp32` or `bf16`. The check ends at the
    first case that raises an error.
    """
    worst = 0.0
    where = ""
    cases = 0
    for case in check_cases():
        try:
            ratios = _ratios(case, impl, device, DTYPES[dtype], sparsity)
        except (ImportError, NotImplementedError) as error:
            return BackendCheck(device, impl, dtype, error=str(error))
        except RuntimeError as error:  # the kernels fail the first-use check or cannot be launched
            return BackendCheck(device, impl, dtype, worst=math.inf, error=str(error))
        cases += 1
        name, ratio = max(ratios.items(), key=lambda item: item[1])
        if ratio >= worst:
            worst = ratio
            where = f"{case} {name}"
    return BackendCheck(device, impl, dtype, cases, worst, where)


def op_error(impl: str, device: str = "cpu", sparsity: float = 0.7) -> str | None:
    """Compare an implementation with the reference in float32.

    Returns:
        Error message with the worst tensor, or the reason why the implementation cannot run. None if all tensors are
        within tolerance.
    """
    check = check_backend(impl, device, sparsity=sparsity)
    if check.verdict == "correct":
        return None
    return check.error or f"{check.where} differs from the reference by {check.worst:.3g} times the tolerance"


def _ratios(case: CheckCase, impl: str, device: str, dtype: torch.dtype, sparsity: float) -> dict[str, float]:
    """Return a backend's ratios of error to tolerance for the output and each gradient, with infinity for NaN."""
    exact = []
    reference = []
    actual = []
    for seed in range(_SAMPLES):
        tensors = _tensors(case, seed, device, dtype)
        double_tensors = {name: tensor.double() for name, tensor in tensors.items()}
        exact.append(_solve(case, double_tensors, "reference", sparsity))
        reference.append(_solve(case, tensors, "reference", sparsity))
        actual.append(_solve(case, tensors, impl, sparsity))
    eps = {name: torch.finfo(tensor.dtype).eps for name, tensor in reference[0].items()}
    reference_errors: dict[str, float] = {}
    for name, error in _relative_errors(reference, exact).items():
        reference_errors[name] = max(error, 8 * eps[name])
    # gradients of scalars are sums with cancellation, so all scalars share the largest reference error
    scalar_error = max((reference_errors[name] for name in _SCALARS if name in reference_errors), default=0.0)
    limits: dict[str, float] = {}
    for name, error in reference_errors.items():
        reference_error = scalar_error if name in _SCALARS else error
        limits[name] = 2 * reference_error + eps[name] / 2
    ratios: dict[str, float] = {}
    for name, error in _relative_errors(actual, exact).items():
        ratios[name] = math.inf if math.isnan(error) else error / limits[name]
    return ratios


def _tensors(case: CheckCase, seed: int, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Create random tensors for one layer: input, weight, factors, scalars, and output gradient."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(*shape, generator=generator) - 1

    kernel = make_kernel(case.kernel)
    groups = len(case.rows)
    m = sum(case.rows)
    scalars = {
        "piece_coeff": (0.75 + uniform(groups, kernel.num_pieces) / 4) * (-1.0) ** torch.arange(kernel.num_pieces),
        "alpha": 1 + uniform(groups) / 4,
        "beta": uniform(groups) / 4,
        "temperature": 0.8 + uniform(groups) / 4,
    }
    factors = {"A": uniform(groups, case.columns, case.r), "B": uniform(m, case.r)}
    factors |= {name: scalars[name] for name in _SCALARS if name in kernel.scalars}
    base = {"x": uniform(_TOKENS, case.columns), "weight": uniform(m, case.columns), "grad_y": uniform(_TOKENS, m)}
    tensors = {name: tensor.to(dtype) for name, tensor in base.items()} | factors
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _solve(case: CheckCase, tensors: dict[str, Tensor], impl: str, sparsity: float) -> dict[str, Tensor]:
    """Return the output `y` of one layer and the gradients of its input, weight, factors, and scalars, by name."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items() if name != "grad_y"}
    factors = Factors(*(leaves.get(name) for name in Factors._fields))  # type: ignore[arg-type]
    spec = UpdateSpec(make_kernel(case.kernel), case.rows, case.mode)
    spec = replace(spec, backend=choose_backend(impl, spec, leaves["A"])[0])
    budgets = tuple(max(1, int(count * case.columns * (1 - sparsity))) for count in case.rows)
    y, _ = adapted_layer(leaves["x"], leaves["weight"], None, [Update(spec, factors, budgets)], LinearOp())
    gradients = torch.autograd.grad(y, list(leaves.values()), tensors["grad_y"])
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def _relative_errors(actual: list[dict[str, Tensor]], exact: list[dict[str, Tensor]]) -> dict[str, float]:
    """Return the root mean square over samples of each tensor's largest relative error."""
    relative_errors = {}
    for name in exact[0]:
        scale = max(solution[name].abs().max().item() for solution in exact) or 1.0  # avoids dividing by 0
        errors: list[float] = []
        for sample, true in zip(actual, exact, strict=True):
            errors.append((sample[name].double() - true[name]).abs().max().item() / scale)
        relative_errors[name] = torch.tensor(errors).square().mean().sqrt().item()
    return relative_errors
