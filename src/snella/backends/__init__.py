"""Backends that compute updates: the interface, the torch backend, and the choice of a backend.

A backend merges the factors of an update into `ΔW`, sparsifies `ΔW` to `S`, adds `scaling·S` to a base weight, and
computes the gradients of the factors. The budget of a matrix is the maximum number of nonzero entries of its part of
`S`. The shape letters are defined in `snella.kernels`; `tokens` is the number of rows of a linear layer's flattened
input.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from snella.kernels import Factors
from snella.sparsify import sparsify, sparsify_slope
from snella.update import Update, UpdateSpec

Implementation = Literal["auto", "triton", "numba", "eager", "reference"]
_INSTALL = {
    "numba": "install it with: pip install 'snella[fast]'",
    "triton": "install torch for CUDA, which includes it, or: pip install triton",
}

Gradients: TypeAlias = tuple[Tensor | None, ...]
"""Gradients in the order of `Factors`: `None` for missing scalars, zeros for matrices with budget 0."""

Product: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Function that computes `grad_yᵀ x`, `[m, n]`, from `grad_y` `[tokens, m]` and `x` `[tokens, n]`."""


@dataclass(frozen=True)
class Prepared:
    """An update prepared for a pass: the result of `Backend.prepare` and an argument of the other methods.

    Args:
        factors: Factors and scalars of the update.
        budgets: Budget of each matrix.
        thresholds: `[G]`, infinite for a budget of 0.
        delta: `ΔW` of each matrix (`None` for a budget of 0), or of all matrices in one tensor. With `cache_delta`, it
            is saved for `prepare` in the backward pass. If it is empty, the effective weight is saved instead.
        columns: Softmax statistics of all columns, saved for `prepare` in the backward pass if `delta` is not saved.
        workspace: Backend-specific data, valid until the factors change.
    """

    factors: Factors
    budgets: tuple[int, ...]
    thresholds: Tensor
    delta: tuple[Tensor | None, ...] = ()
    columns: tuple[Tensor, ...] = ()
    workspace: Any = None


class Backend(ABC):
    """Interface of a backend. All backends agree with `TorchBackend` up to rounding."""

    name: str

    @abstractmethod
    def unsupported_reason(self, spec: UpdateSpec, A: Tensor) -> str | None:
        """Return the reason why updates with this spec and factors like `A` are not supported, or `None`."""

    @abstractmethod
    def prepare(self, update: Update, saved: tuple[Tensor | None, ...] = ()) -> Prepared:
        """Prepare every matrix with a nonzero budget for the other methods, and compute missing thresholds.

        Args:
            update: The update.
            saved: `Prepared.delta` or `Prepared.columns` of an earlier call with the same factors.
        """

    @abstractmethod
    def add_update(self, spec: UpdateSpec, prepared: Prepared, base: Tensor, out: Tensor) -> None:
        """Write `base + scaling·S` into `out`.

        `base` and `out` are contiguous, floating-point `[m, n]` tensors that may share memory.
        """

    @abstractmethod
    def grad_factors(self, spec: UpdateSpec, prepared: Prepared, grad_weight: Tensor) -> Gradients:
        """Return the gradients of factors and scalars, given `grad_weight` = ∂L/∂W `[m, n]`."""

    def add_and_grad_factors(
        self, spec: UpdateSpec, prepared: Prepared, grad_weight: Tensor, base: Tensor, out: Tensor
    ) -> Gradients | None:
        """Perform `add_update` and `grad_factors` in one pass; if unsupported, return `None` and leave `out` as is."""
        return None

    def grad_where_nonzero(
        self, spec: UpdateSpec, prepared: Prepared, grad_y: Tensor, x: Tensor, product: Product
    ) -> Tensor:
        """Return ∂L/∂W `[m, n]` of a linear layer. Entries where `S` is zero are not used and may be zero.

        Args:
            spec: Settings of the update.
            prepared: The prepared update. Matrices with budget 0 need no product.
            grad_y: ∂L/∂y, `[tokens, m]`.
            x: `[tokens, n]`, in the dtype of `grad_y`.
            product: Computes the dense product.
        """
        if all(prepared.budgets):
            return product(grad_y, x)
        dtype = torch.promote_types(x.dtype, torch.float32)
        result = torch.zeros(grad_y.shape[1], x.shape[1], dtype=dtype, device=x.device)
        for rows, budget in zip(spec.rows, prepared.budgets, strict=True):
            if budget:
                result[rows] = product(grad_y[:, rows], x)
        return result


def zero_gradients(factors: Factors) -> list[Tensor | None]:
    """Return zero gradients for all tensors of an update."""
    return [None if tensor is None else torch.zeros_like(tensor) for tensor in factors]


def store_gradients(grads: list[Tensor | None], group: int, rows: slice, values: Gradients) -> None:
    """Copy the gradients of one matrix into the gradients of all matrices."""
    for index, value in enumerate(values):
        target = grads[index]
        if value is not None and target is not None:
            # index 1 is `B`, which stacks the rows of all matrices
            (target[rows] if index == 1 else target[group]).copy_(value)


class TorchBackend(Backend):
    """Backend for any device and dtype, with the kernels of `snella.kernels` applied per matrix."""

    name = "eager"

    def unsupported_reason(self, spec: UpdateSpec, A: Tensor) -> str | None:  # noqa: D102
        return None

    def prepare(self, update: Update, saved: tuple[Tensor | None, ...] = ()) -> Prepared:  # noqa: D102
        spec, factors, budgets, thresholds = update
        delta = saved
        if not delta:
            matrices = zip(spec.matrices(factors), budgets, strict=True)
            delta = tuple([spec.merge_matrix(matrix) if budget else None for matrix, budget in matrices])
        if thresholds is None:
            dtype = torch.promote_types(factors.A.dtype, torch.float32)
            # no magnitude exceeds the threshold of a matrix with budget 0
            infinite = factors.B.new_full((), torch.inf, dtype=dtype)
            matrix_thresholds = [
                infinite if matrix is None else spec.find_threshold(matrix, budget)
                for matrix, budget in zip(delta, budgets, strict=True)
            ]
            thresholds = torch.stack(matrix_thresholds)
        return Prepared(factors, budgets, thresholds, delta)

    def add_update(self, spec: UpdateSpec, prepared: Prepared, base: Tensor, out: Tensor) -> None:  # noqa: D102
        for group, (rows, delta) in enumerate(zip(spec.rows, prepared.delta, strict=True)):
            if delta is not None:
                sparse = spec.scaling * sparsify(delta, prepared.thresholds[group], spec.mode)
                torch.add(base[rows], sparse, out=out[rows])
            elif out is not base:
                out[rows] = base[rows]

    def grad_factors(self, spec: UpdateSpec, prepared: Prepared, grad_weight: Tensor) -> Gradients:  # noqa: D102
        grads = zero_gradients(prepared.factors)
        for group, (matrix, rows) in enumerate(zip(spec.matrices(prepared.factors), spec.rows, strict=True)):
            delta = prepared.delta[group]
            if delta is None:
                continue
            slope = sparsify_slope(delta, prepared.thresholds[group], spec.mode)
            grad_delta = slope.mul_(grad_weight[rows].to(slope.dtype)).mul_(spec.scaling)
            store_gradients(grads, group, rows, spec.kernel.vjp(*matrix, grad_delta))
        return tuple(grads)


# selection ---------------------------------------------------------------------------------------------------------


@cache
def get_backend(name: str) -> Backend:
    """Return a backend by name; names other than `numba` and `triton` select the torch backend."""
    if name == "numba":
        from snella.backends.numba.backend import NumbaBackend

        return NumbaBackend()
    if name == "triton":
        from snella.backends.triton.backend import TritonBackend

        return TritonBackend()
    return TorchBackend()


@cache
def missing_reason(name: str) -> str | None:
    """Return the reason why the kernels of `numba` or `triton` cannot be used on this machine, or `None`."""
    if importlib.util.find_spec(name) is None:
        return f"{name} is not installed; {_INSTALL[name]}"
    try:
        get_backend(name)
    except Exception as error:  # an incompatible version or an unsupported machine can raise any type
        return f"{name} cannot be used: {error}"
    return None


def is_on_gpu(A: Tensor) -> bool:
    """Return whether these factors are on a CUDA or ROCm device, where Triton kernels are preferred and checked."""
    return A.device.type == "cuda"


def choose_backend(impl: str, spec: UpdateSpec, A: Tensor) -> tuple[str, str]:
    """Return the backend for updates with this spec, and the reason for the choice.

    `"auto"` selects `"triton"` for factors on a CUDA device and `"numba"` for factors elsewhere. If the selected
    backend is not installed or does not support the update, or if the Triton kernels fail their first-use check,
    `"auto"` selects `"eager"` instead. Triton and Numba support only the piecewise kernels (Numba only with
    `softmax_dim=0` if the kernel has a softmax) and reject float64 factors. The choice depends only on `impl`, the
    machine, the spec, and the factors' device, dtype, and size, so a layer's results are reproducible.

    Args:
        impl: One of `Implementation`.
        spec: Spec of the updates; its `backend` is ignored.
        A: Input-side factors; only device, dtype, and size matter.

    Raises:
        ImportError: If `impl` is `"triton"` or `"numba"`, and the package is missing or unusable.
        NotImplementedError: If `impl` is `"triton"` or `"numba"`, and this backend does not support the updates.
        RuntimeError: If `impl` is `"triton"` and its kernels fail the first-use check. The message contains the error
            of the compiler or launcher, or names the Triton kernels that compute the first wrong result and gives the
            largest error of this result.
        ValueError: If `impl` is unknown.
    """
    if impl not in get_args(Implementation):
        raise ValueError(f"impl must be one of {list(get_args(Implementation))}, got {impl!r}")
    if impl in ("eager", "reference"):
        return impl, "set by impl"
    name = "triton" if impl == "triton" or (impl == "auto" and is_on_gpu(A)) else "numba"
    missing = missing_reason(name)
    if missing is not None:
        if impl == name:
            raise ImportError(f"impl={name!r}, but {missing}")
        return "eager", missing
    error: type[Exception] = NotImplementedError
    reason = get_backend(name).unsupported_reason(spec, A)
    if reason is None and name == "triton" and is_on_gpu(A):
        from snella.backends.triton import verify

        error = RuntimeError
        reason = verify.failed_check(spec, A)
    if reason is None:
        return name, f"Triton kernels on {str(A.device)!r}" if name == "triton" else "Numba kernels on the CPU"
    if impl == name:
        raise error(f"impl={name!r} {reason}; use impl='eager'")
    hint = "; impl='eager' skips this check" if error is RuntimeError else ""
    return "eager", f"{name} {reason}{hint}"


__all__ = [
    "Backend",
    "Gradients",
    "Implementation",
    "Prepared",
    "TorchBackend",
    "choose_backend",
    "get_backend",
    "missing_reason",
]
