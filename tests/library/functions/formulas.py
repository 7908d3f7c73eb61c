"""Reference formulas of kernels and sparsification, entry by entry with Python floats."""

import math

import torch
from torch import Tensor

from snella.kernels import Kernel, KernelScalars


def merge_by_hand(kernel: Kernel, A: Tensor, B: Tensor, scalars: KernelScalars) -> Tensor:
    """Compute `ΔW[i, j] = κ(A[j], B[i])`, `[m, n]`, float64."""
    a_rows, b_rows = A.double().tolist(), B.double().tolist()
    coeff, alpha, beta, temperature = (None if value is None else value.tolist() for value in scalars)

    def inner(i: int, j: int) -> float:
        return math.fsum(a * b for a, b in zip(a_rows[j], b_rows[i], strict=True))

    def squared(i: int, j: int, piece: range) -> float:
        return math.fsum((a_rows[j][k] - b_rows[i][k]) ** 2 for k in piece)

    def piecewise(i: int, j: int) -> float:
        width = len(a_rows[0]) // kernel.num_pieces
        return math.fsum(
            coeff[p] * math.sqrt(squared(i, j, range(p * width, (p + 1) * width))) for p in range(kernel.num_pieces)
        )

    def softmax(i: int, j: int) -> float:
        gamma = 1.0 if temperature is None else temperature
        axis_entries = (
            [(k, j) for k in range(len(b_rows))] if kernel.softmax_dim == 0 else [(i, k) for k in range(len(a_rows))]
        )
        total = math.fsum(math.exp(piecewise(*entry) / gamma) for entry in axis_entries)
        shift = 1 / len(axis_entries) if kernel.center_softmax else 0.0
        return math.exp(piecewise(i, j) / gamma) / total - shift

    entry = {
        "linear": inner,
        "sigmoid": lambda i, j: alpha / (1 + math.exp(-inner(i, j))) + beta,
        "rbf": lambda i, j: alpha * math.exp(-squared(i, j, range(len(a_rows[0])))) + beta,
        "p_linear": piecewise,
        "normalized_rbf": lambda i, j: alpha * softmax(i, j) + beta,
        "mix_k": lambda i, j: piecewise(i, j) + alpha * softmax(i, j) + beta,
    }[kernel.name]
    return torch.tensor(
        [[entry(i, j) for j in range(len(a_rows))] for i in range(len(b_rows))], dtype=torch.float64
    ).reshape(len(b_rows), len(a_rows))


def sparsify_by_hand(delta: Tensor, budget: int) -> Tensor:
    """Apply eq. 13 with the threshold that keeps `budget` entries of a tie-free matrix, float64."""
    values = delta.double().flatten().tolist()
    magnitudes = sorted((abs(value) for value in values), reverse=True)
    threshold = magnitudes[budget] if budget < len(values) else 0.0
    sparse = [value * max(abs(value) - threshold, 0.0) for value in values]
    return torch.tensor(sparse, dtype=torch.float64).reshape(delta.shape)
