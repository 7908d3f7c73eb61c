"""Functional API of the adapted layer, which computes `y = x (W0 + scaling·S)ᵀ + bias` with one matrix product."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from snella.autograd import adapted_layer
from snella.backends import choose_backend
from snella.kernels import Factors, KernelScalars, check_factors, make_kernel
from snella.ops import LinearOp
from snella.sparsify import SparsifyMode
from snella.update import Update, UpdateSpec

__all__ = ["adapted_layer", "adapted_linear"]


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    *,
    budget: int,
    kernel: str = "mix_k",
    piece_coeff: Tensor | None = None,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    temperature: Tensor | None = None,
    num_pieces: int = 2,
    softmax_dim: int = 0,
    center_softmax: bool = False,
    scaling: float = 1.0,
    mode: SparsifyMode = "soft",
    impl: str = "auto",
    cache_delta: bool = False,
) -> Tensor:
    """Apply a linear layer with one sparse, high-rank weight update.

        y = x (W0 + scaling·S)ᵀ + bias,   S = sparsify(ΔW, keep_threshold(ΔW, budget)),   ΔW = merge_factors(A, B)

    Args:
        x: `[…, n]`.
        weight: Base weight `W0`, `[m, n]`.
        bias: `[m]` or `None`.
        A: Input-side factor, `[n, r]`.
        B: Output-side factor, `[m, r]`.
        budget: Maximum number of nonzero entries of `S`, in `[0, m·n]`.
        kernel: Name of the kernel function. `merge_factors` documents its scalars and options.
        piece_coeff: `[P]`.
        alpha: 0-dim.
        beta: 0-dim.
        temperature: 0-dim or `None`.
        num_pieces: `P`, the number of pieces per factor row.
        softmax_dim: 0 or 1.
        center_softmax: If True, center the softmax by subtracting its mean over `softmax_dim`.
        scaling: Scaling factor of `S`.
        mode: `"soft"` (eq. 13 of arXiv 2510.24037), `"official"` (as in the authors' code, with `quantile_threshold`
            instead of `keep_threshold`), or `"none"` (`S = ΔW`), which requires a budget of `m·n`.
        impl: `"eager"` (torch operations with a hand-written backward pass that rebuilds the update), `"numba"` (Numba
            kernels on the CPU), `"triton"` (Triton kernels on a CUDA device), `"auto"` (see `choose_backend`), or
            `"reference"` (torch operations with autograd).
        cache_delta: See `adapted_layer`.

    Returns:
        `[…, m]`.

    Raises:
        ValueError: If the shapes of factors, scalars, and weight do not match, a scalar is missing, or the budget or an
            option is invalid.
        ImportError, NotImplementedError, RuntimeError: If `impl` is not available (see `choose_backend`).
    """
    kernel_function = make_kernel(kernel, num_pieces=num_pieces, softmax_dim=softmax_dim, center_softmax=center_softmax)
    scalars = KernelScalars(piece_coeff, alpha, beta, temperature)
    check_factors(A, B, kernel_function, scalars)
    if weight.ndim != 2:
        raise ValueError(f"weight must be [m, n], got {list(weight.shape)}")
    stacked_scalars = [scalar if scalar is None else scalar[None] for scalar in scalars]
    factors = Factors(A[None], B, *stacked_scalars)
    budgets = (budget,)
    spec = UpdateSpec(kernel_function, (B.shape[0],), mode, scaling)
    spec.check(factors, budgets, weight.shape)
    backend, _ = choose_backend(impl, spec, factors.A)
    update = Update(replace(spec, backend=backend), factors, budgets)
    y, _ = adapted_layer(x, weight, bias, [update], LinearOp(), cache_delta=cache_delta)
    return y
