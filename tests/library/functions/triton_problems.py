"""Test problems for the Triton kernels: on a CUDA device if available, else in Triton's interpreter on the CPU."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from .problems import Problem, make_problem

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install triton"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IS_INTERPRETED = DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
DRAWS = 3 if IS_INTERPRETED else 16  # the interpreter is slow


def on_device(problem: Problem) -> Problem:
    """Move a problem to the device of the kernels."""
    return problem.cast(lambda tensor: tensor.to(DEVICE))


def triton_problem(kernel: str = "mix_k", **options: object) -> Problem:
    """Call `make_problem` on the device of the kernels."""
    return on_device(make_problem(kernel, **options))


def triton_draws(kernel: str = "mix_k", *, count: int = DRAWS, **options: object) -> list[Problem]:
    """Create `count` problems that differ only in their random numbers."""
    return [triton_problem(kernel, seed=seed, **options) for seed in range(count)]
