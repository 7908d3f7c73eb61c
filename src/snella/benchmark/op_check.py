"""The op's numbers before the op's times: who computes something else is not timed."""

from __future__ import annotations

from dataclasses import replace

import torch

from snella.ops.functional import adapted_product
from snella.ops.kernels import KernelScalars, make_kernel
from snella.ops.spec import LinearProduct, Update

_SHAPES = (((96,), 80), ((40, 40, 40), 64))


def op_fault(impl: str, device: str = "cpu", sparsity: float = 0.7) -> str | None:
    """Compare output and every gradient of an implementation with the reference in float64.

    Args:
        impl: As in `adapted_product`.
        device: Where.
        sparsity: Of the update.

    Returns:
        The first thing that differs by more than float32 can excuse, or `None`.
    """
    for rows, n in _SHAPES:
        generator = torch.Generator().manual_seed(0)
        m, groups = sum(rows), len(rows)
        drawn = [torch.rand(*s, generator=generator) * 2 - 1 for s in ((groups, n, 8), (m, 8), (4, n), (m, n), (4, m))]
        A, B, x, weight, grad_y = (tensor.to(device) for tensor in drawn)
        scalars = KernelScalars(
            torch.tensor([[0.1, -0.1]], device=device).repeat(groups, 1),
            torch.ones(groups, device=device),
            torch.zeros(groups, device=device),
            None,
        )
        budgets = tuple(max(1, int(count * n * (1 - sparsity))) for count in rows)
        update = Update(A, B, scalars, make_kernel("mix_k"), budgets, rows)
        found = _solve(update, x, weight, grad_y, impl, torch.float32)
        exact = _solve(update, x, weight, grad_y, "reference", torch.float64)
        for name, (mine, true) in zip(
            ("y", "x", "A", "B", "piece_coeff", "alpha", "beta"), zip(found, exact, strict=True), strict=True
        ):
            error = (mine.double() - true).abs().max().item()
            allowed = 2e-4 * (true.abs().max().item() + 1e-3)
            if not error <= allowed:
                return f"{name} differs by {error:.2e} from the reference at {[m, n]}, allowed is {allowed:.2e}"
    return None


def _solve(
    update: Update, x: torch.Tensor, weight: torch.Tensor, grad_y: torch.Tensor, impl: str, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Output and gradients."""
    x, A, B, *scalars = (
        tensor.detach().to(dtype).requires_grad_()
        for tensor in (x, *(tensor for tensor in update.tensors() if tensor is not None))
    )
    piece_coeff, alpha, beta = scalars
    described = replace(update, A=A, B=B, scalars=KernelScalars(piece_coeff, alpha, beta), thresholds=[], handover=[])
    y = adapted_product(x, weight.to(dtype), None, [described], LinearProduct(), impl=impl)
    return [y.detach(), *torch.autograd.grad(y, [x, A, B, *scalars], grad_y.to(dtype))]
