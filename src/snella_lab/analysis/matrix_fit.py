"""Kernel expressivity: curves, fits of random matrices, gradients, and definiteness.

A kernel κ merges two factors into a matrix, `W[i, j] = κ(A[j], B[i])`. The experiments are those of appendices A.2
to A.4 of the SNELLA paper (arXiv 2510.24037), to which all equation and figure numbers refer.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator
from torch import Tensor

from snella.kernels import KERNELS, Kernel, KernelScalars, kernel_names, make_kernel
from snella_app.files import sha256_of, write_json
from snella_app.report.allocation import log_axis
from snella_app.report.style import add_legend, new_figure, new_panels
from snella_lab.analysis.plot import Plot, Row, grouped
from snella_lab.style import style_of

Merge = Callable[[Tensor, Tensor, KernelScalars], Tensor]
"""Function that merges the factors `A` `[n, r]` and `B` `[m, r]`, with the kernel's scalars, into a matrix `[m, n]`."""
_STATE_FILE = "fits.json"
_MAX_RECORDED_STEPS = 100
"""Maximum number of steps at which errors and gradients are recorded."""
_MAX_REJECTED = 1_000
"""Maximum number of matrices of lower rank that are rejected in a row."""
_X_MAX = 4.0
"""Largest x of the kernel curves."""


@dataclass(frozen=True)
class FitConfig:
    """Settings for fitting random matrices with kernels (appendix A.2).

    Args:
        kernels: Kernel names, or import paths `module:name` of a `Kernel` subclass or a function of `A` `[n, r]` and
            `B` `[m, r]`.
        size: Number of rows and of columns of the matrices. The paper does not state it.
        ranks: Ranks of the matrices, at most `size`.
        density: Fraction of nonzero entries in the factors of the random matrices.
        matrices: Number of random matrices per rank.
        r: Rank of the two learnable factors, a multiple of 2.
        steps: Number of Adam steps.
        lr: Learning rate of Adam.
        seed: Seed for matrices and initial factors, shared by all kernels.
    """

    kernels: tuple[str, ...] = tuple(KERNELS)
    size: int = 48
    ranks: tuple[int, ...] = (4, 8, 16, 32, 48)
    density: float = 0.3
    matrices: int = 10
    r: int = 8
    steps: int = 2000
    lr: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        errors = [
            f"{name} must be at least 1, got {getattr(self, name)}"
            for name in ("size", "matrices", "steps")
            if getattr(self, name) < 1
        ]
        if self.r < 2 or self.r % 2:
            errors.append(f"r must be a multiple of 2, the number of pieces of a factor row, got {self.r}")
        if not self.ranks or not all(1 <= rank <= self.size for rank in self.ranks):
            errors.append(f"ranks must be one or more integers in [1, size={self.size}], got {list(self.ranks)}")
        if not 0 < self.density <= 1:
            errors.append(f"density must be in (0, 1], got {self.density}")
        if not self.lr > 0:
            errors.append(f"lr must be positive, got {self.lr}")
        if not self.kernels:
            errors.append("kernels must not be empty; add e.g. mix_k")
        if errors:
            raise ValueError("; ".join(errors))


PRESETS: dict[str, FitConfig] = {"quick": FitConfig(), "paper": FitConfig(steps=100_000, lr=1e-4)}
"""`paper` uses the optimizer, steps, and number of matrices of appendix A.2. `quick` takes minutes."""


def find_kernel(name: str) -> Merge:
    """Return the merge function of a kernel, given its name or import path.

    Raises:
        ValueError: If there is no such kernel, or the imported object is not a kernel.
    """
    if name in kernel_names():
        return make_kernel(name).merge
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(
            f"kernels must be among {', '.join(kernel_names())} or import paths such as mine:MyKernel, got {name!r}"
        )
    try:
        kernel = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot import kernel {name!r}: {error}; use a module on PYTHONPATH") from error
    if inspect.isclass(kernel) and issubclass(kernel, Kernel):
        return kernel().merge
    if callable(kernel):
        return lambda A, B, scalars: kernel(A, B)
    raise ValueError(f"kernel {name!r} must be a Kernel subclass or a function of A and B, got {kernel!r}")


def _module_digest(name: str) -> str | None:
    """Return the SHA-256 of the module file of a kernel given as an import path.

    Returns None for kernels given by name, and for modules without a file.
    """
    if ":" not in name:
        return None
    path = getattr(importlib.import_module(name.partition(":")[0]), "__file__", None)
    return None if path is None else sha256_of(Path(path))


def random_matrices(size: int, rank: int, count: int, density: float, generator: torch.Generator) -> Tensor:
    """Sample random matrices of rank `rank` and root mean square 1, as products of two sparse Gaussian factors.

        W = U V,   U `[size, rank]`, V `[rank, size]`, each with a fraction `density` of nonzero entries

    For `rank == size`, the identity is added to both factors. Samples of lower rank are rejected.

    Returns:
        `[count, size, size]`, float32.

    Raises:
        ValueError: If the density is too low for the rank.
    """
    matrices: list[Tensor] = []
    rejected = 0
    while len(matrices) < count:
        factors = torch.randn(2, size, rank, dtype=torch.float64, generator=generator)
        mask = torch.rand(2, size, rank, dtype=torch.float64, generator=generator) < density
        left, right = factors * mask
        if rank == size:  # adding a diagonal makes both factors almost surely invertible
            left, right = (factor + torch.diag(factors.new_ones(size)) for factor in (left, right))
        matrix = left @ right.T
        if int(torch.linalg.matrix_rank(matrix)) == rank:
            matrices.append((matrix / matrix.square().mean().sqrt()).float())
            rejected = 0
            continue
        rejected += 1
        if rejected >= _MAX_REJECTED:
            raise ValueError(
                f"density must be higher for rank {rank}, got {density:g}, which gives matrices of lower rank"
            )
    return torch.stack(matrices)


@dataclass(frozen=True)
class Fit:
    """Fit results of one kernel.

    Attributes:
        kernel: Name or import path.
        mse: Final mean squared error of each matrix, `[ranks][matrices]`.
        steps: Recorded steps.
        gradient: Gradient norm of both factors at the recorded steps, averaged over all matrices.
        error: Mean squared error at the recorded steps, averaged over all matrices.
        module_digest: SHA-256 of a custom kernel's module file, by which an edited kernel is recognized and fitted
            again. None for built-in kernels, and for modules without a file.
    """

    kernel: str
    mse: list[list[float]]
    steps: list[int]
    gradient: list[float]
    error: list[float]
    module_digest: str | None = None


def fit_kernel(kernel: str, config: FitConfig, on_step: Callable[[int], None] = lambda step: None) -> Fit:
    """Fit each matrix of each rank with its own factors and one kernel (eq. 15).

        min over A, B, scalars of 1/(mn) Σ_ij (W[i, j] − κ(A[j], B[i]))²,   by Adam

    Factors are initialized from a Gaussian such that inner products have variance 1. Scalars start at α = 1, β = 0, and
    α_p = ±0.1. All kernels share the matrices and the initial factors.

    Args:
        kernel: Name or import path; see `find_kernel`.
        config: Settings of the fits.
        on_step: Callback that receives the number of finished steps.

    Raises:
        ValueError: If the kernel is unknown or returns the wrong shape.
        FloatingPointError: If the error at a recorded step is infinite or NaN.
    """
    merge = find_kernel(kernel)
    digest = _module_digest(kernel)  # before the fit, during which the file may change
    generator = torch.Generator().manual_seed(config.seed)
    targets = torch.cat(
        [random_matrices(config.size, rank, config.matrices, config.density, generator) for rank in config.ranks]
    )
    count = len(targets)
    size = config.size
    scale = config.r**-0.25
    A, B = (scale * torch.randn(count, size, config.r, generator=generator) for _ in range(2))
    scalars = [torch.tensor([0.1, -0.1]).repeat(count, 1), torch.ones(count), torch.zeros(count)]
    parameters = [tensor.requires_grad_() for tensor in (A, B, *scalars)]

    def merged(A: Tensor, B: Tensor, piece_coeff: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        return merge(A, B, KernelScalars(piece_coeff, alpha, beta))

    batched = torch.vmap(merged)
    shape = list(batched(*parameters).shape)
    if shape != [count, size, size]:
        raise ValueError(f"kernel {kernel!r} must return [m, n] = {[size, size]}, got {shape[1:]}")
    optimizer = torch.optim.Adam(parameters, lr=config.lr)
    num_recorded = min(_MAX_RECORDED_STEPS, config.steps)
    recorded_steps = set(np.linspace(0, config.steps - 1, num_recorded).round().astype(int).tolist())
    steps = []
    gradients = []
    errors = []
    for step in range(config.steps):
        optimizer.zero_grad()
        losses = (batched(*parameters) - targets).square().mean((1, 2))
        losses.sum().backward()
        if step in recorded_steps:
            grads = torch.cat([factor.grad.flatten(1) for factor in (A, B) if factor.grad is not None], 1)
            steps.append(step)
            gradients.append(float(grads.norm(dim=1).mean()) if grads.numel() else 0.0)
            errors.append(float(losses.detach().mean()))
            if not math.isfinite(errors[-1]):
                raise FloatingPointError(f"kernel {kernel!r}: the error is {errors[-1]} at step {step}; reduce lr")
        optimizer.step()
        on_step(step + 1)
    with torch.no_grad():
        final = (batched(*parameters) - targets).square().mean((1, 2))
    mse = final.view(len(config.ranks), -1).tolist()
    return Fit(kernel, mse, steps, gradients, errors, digest)


def fit_matrices(
    config: FitConfig, out: str | Path | None = None, on_step: Callable[[str, int], None] = lambda kernel, step: None
) -> list[Plot]:
    """Fit random matrices with several kernels, and plot the kernels, errors, and gradients (Figure 4).

    Args:
        config: Settings of the fits.
        out: Folder for finished fits (`fits.json`), which later calls reuse. If None, the fits are not stored.
        on_step: Callback that receives the kernel and the number of finished steps.

    Returns:
        Three plots. `kernel-curves` (4a) has the additional table `kernel-curves-definiteness`; see `definiteness`.
        `fit-error` (4b) shows the mean squared error versus rank. Its additional table `fit-error-matrices` has one row
        per matrix. `fit-gradient` (4c) shows the gradient norm versus step, and its table also contains the error.

    Raises:
        ValueError: If a kernel is invalid, or the folder contains fits that are damaged or have different settings.
        FloatingPointError: If a fit diverges.
    """
    for kernel in config.kernels:
        find_kernel(kernel)
    finished = {} if out is None else _read_fits(Path(out), config)
    for kernel in config.kernels:
        if kernel not in finished or finished[kernel].module_digest != _module_digest(kernel):
            finished[kernel] = fit_kernel(kernel, config, partial(on_step, kernel))
            if out is not None:
                _write_fits(Path(out), config, finished)
    fits = [finished[kernel] for kernel in config.kernels]
    matrix_rows: list[Row] = []
    rank_rows: list[Row] = []
    step_rows: list[Row] = []
    for fit in fits:
        for rank, errors in zip(config.ranks, fit.mse, strict=True):
            for number, error in enumerate(errors):
                matrix_rows.append({"kernel": fit.kernel, "rank": rank, "matrix": number, "mse": error})
            mean = float(np.mean(errors))
            deviation = float(np.std(errors, ddof=1)) if len(errors) > 1 else math.nan
            row = {"kernel": fit.kernel, "rank": rank, "mse": mean, "std": deviation, "matrices": len(errors)}
            rank_rows.append(row)
        for step, gradient, error in zip(fit.steps, fit.gradient, fit.error, strict=True):
            step_rows.append({"kernel": fit.kernel, "step": step, "gradient_norm": gradient, "mse": error})
    curves = kernel_curves(config.kernels)
    return [
        Plot(
            "kernel-curves", curves, partial(_draw_curves, curves), (), {"definiteness": definiteness(config.kernels)}
        ),
        Plot("fit-error", rank_rows, partial(_draw_errors, rank_rows), (), {"matrices": matrix_rows}),
        Plot("fit-gradient", step_rows, partial(_draw_gradients, step_rows)),
    ]


def kernel_curves(kernels: Sequence[str]) -> list[Row]:
    """Compute κ((1, 0), (x, 0)) and its derivative for 161 values of x in [−4, 4].

    For piecewise kernels, each entry of these vectors is a piece. All scalars are 1, except β = 0. Normalized kernels
    apply their softmax over the points of the curve. Each derivative is with respect to its own x.
    """
    xs = torch.linspace(-_X_MAX, _X_MAX, 161, dtype=torch.float64)
    rows: list[Row] = []
    for name in kernels:
        evaluate = partial(_kernel_values, find_kernel(name))
        slopes = torch.autograd.functional.jacobian(evaluate, xs).diagonal()
        curve = zip(xs.tolist(), evaluate(xs).tolist(), slopes.tolist(), strict=True)
        rows += [{"kernel": name, "x": x, "value": value, "slope": slope} for x, value, slope in curve]
    return rows


def _kernel_values(merge: Merge, xs: Tensor) -> Tensor:
    """Evaluate κ((1, 0), (x, 0)) for each x, `[points]`."""
    A = xs.new_tensor([[1.0, 0.0]])
    B = torch.stack([xs, torch.zeros_like(xs)], 1)
    return merge(A, B, _unit_scalars())[:, 0]


def _unit_scalars() -> KernelScalars:
    """Return scalars with all coefficients 1 and β = 0."""
    piece_coeff = torch.ones(2, dtype=torch.float64)
    alpha = torch.ones((), dtype=torch.float64)
    beta = torch.zeros((), dtype=torch.float64)
    return KernelScalars(piece_coeff, alpha, beta)


def definiteness(kernels: Sequence[str]) -> list[Row]:
    """Test kernels for positive semi-definiteness, using the eigenvalues of `K[i, j] = κ(x_i, x_j)` (eq. 16, A.4).

    The 60 points x_i are random vectors with 8 entries. All coefficients are 1, and β = 0. Appendix A.4 claims that
    Mix-K is positive semi-definite in this case. The claim is wrong: the distance term of Mix-K has a zero diagonal and
    therefore negative eigenvalues. A distance matrix D is conditionally negative definite: `vᵀDv ≤ 0` for every vector
    `v` whose entries sum to 0.

    Args:
        kernels: Names or import paths; see `find_kernel`.

    Returns:
        One row per kernel: `trace`; `asymmetry`, the largest difference between K and its transpose; `smallest` and
        `largest`, the extreme eigenvalues of the symmetric part; `is_positive_semi_definite`, up to rounding;
        `conditional`, the smallest eigenvalue of the symmetric part of −K, projected onto vectors that sum to 0. It
        is never positive.
    """
    num_points = 60
    x = torch.randn(num_points, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    centering = torch.eye(num_points, dtype=torch.float64) - 1 / num_points
    rows: list[Row] = []
    for name in kernels:
        K = find_kernel(name)(x, x, _unit_scalars()).detach()
        asymmetry = float((K - K.T).abs().max())
        symmetric = (K + K.T) / 2
        eigenvalues = torch.linalg.eigvalsh(symmetric)
        rounding_error = float(eigenvalues.abs().max()) * num_points * torch.finfo(torch.float64).eps
        is_nonnegative = bool(eigenvalues[0] >= -rounding_error)
        rows.append(
            {
                "kernel": name,
                "trace": float(K.trace()),
                "asymmetry": asymmetry,
                "smallest": float(eigenvalues[0]),
                "largest": float(eigenvalues[-1]),
                "is_positive_semi_definite": is_nonnegative and asymmetry <= rounding_error,
                "conditional": float(torch.linalg.eigvalsh(-centering @ symmetric @ centering)[0]),
            }
        )
    return rows


def _read_fits(folder: Path, config: FitConfig) -> dict[str, Fit]:
    """Read the fits of an earlier call with the same settings, if there are any."""
    path = folder / _STATE_FILE
    if not path.is_file():
        return {}
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        settings = state["settings"]
        fits = {name: Fit(**values) for name, values in state["fits"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}; delete it to start again") from error
    if settings != _settings(config):
        raise ValueError(f"out={folder} contains fits with different settings, {settings}; choose another folder")
    return fits


def _write_fits(folder: Path, config: FitConfig, fits: Mapping[str, Fit]) -> None:
    """Write the finished fits."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {name: dataclasses.asdict(fit) for name, fit in fits.items()}
    write_json(folder / _STATE_FILE, {"settings": _settings(config), "fits": values})


def _settings(config: FitConfig) -> dict[str, Any]:
    """Return the settings that all kernels share, as JSON values."""
    values = dataclasses.asdict(config)
    values.pop("kernels")
    return {**values, "ranks": list(config.ranks)}


def _plot_kernels(
    axes: Axes, rows: Sequence[Row], x: str, y: str, markers: tuple[int, int] = (0, 1)
) -> tuple[list[Line2D], list[str]]:
    """Draw one line per kernel, and return the lines and the kernels.

    `markers` contains the marker offset from one line to the next and the interval between markers, in data points.
    """
    offset, interval = markers
    lines = []
    kernels = grouped(rows, "kernel")
    for number, points in enumerate(kernels.values()):
        color, marker = style_of(number)
        lines += axes.plot(
            [row[x] for row in points],
            [row[y] for row in points],
            color=color,
            linewidth=2,
            marker=marker,
            markersize=6,
            markevery=(offset * number, interval),
        )
    return lines, list(kernels)


def _draw_curves(rows: Sequence[Row]) -> Figure:
    """Draw kernel values and their derivatives."""
    figure, (left, right) = new_panels(860, 380, ["κ(1, x)", "Derivative"], 2)
    lines, kernels = _plot_kernels(left, rows, "x", "value", (4, 24))
    _plot_kernels(right, rows, "x", "slope", (4, 24))
    left.set_xlabel("x")
    right.set_xlabel("x")
    add_legend(figure, lines, kernels, columns=6)
    return figure


def _draw_errors(rows: Sequence[Row]) -> Figure:
    """Plot the mean error versus rank, with standard deviations."""
    figure, axes = new_figure(560, 380, "Fit error of random matrices")
    lines, kernels = _plot_kernels(axes, rows, "rank", "mse")
    for line, points in zip(lines, grouped(rows, "kernel").values(), strict=True):
        deviations = [row["std"] for row in points]
        axes.errorbar(*line.get_data(), deviations, color=line.get_color(), linewidth=1, alpha=0.6, linestyle="none")
    axes.set_xscale("log", base=2)
    ranks = sorted({row["rank"] for row in rows})
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.set_ylim(bottom=0)
    axes.set(xlabel="matrix rank", ylabel="mean squared error (unit variance)")
    add_legend(figure, lines, kernels)
    return figure


def _draw_gradients(rows: Sequence[Row]) -> Figure:
    """Plot the gradient norm versus step."""
    figure, axes = new_figure(560, 380, "Gradient norm of the factors")
    # a log scale cannot show 0
    nonzero_rows = [{**row, "gradient_norm": row["gradient_norm"] or math.nan} for row in rows]
    lines, kernels = _plot_kernels(axes, nonzero_rows, "step", "gradient_norm", (2, 14))
    log_axis(axes)
    axes.set(xlabel="step", ylabel="norm (log scale)")
    add_legend(figure, lines, kernels)
    return figure
