"""Draw docs/images/method.svg: merge, competition within a matrix, competition across layers.

python benchmarks/method_diagram.py

All values are computed by `snella`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from snella.allocation import budget_at
from snella.allocator import allocate
from snella.kernels import merge_factors
from snella.sparsify import keep_threshold, sparsify

FIGURE = Path(__file__).parents[1] / "docs" / "images" / "method.svg"
ROWS, COLUMNS, RANK, DENSITY = 18, 24, 4, 0.3
INK, MUTED, ACCENT = "#1b1f24", "#57606a", "#0072b2"


def draw_method() -> Figure:
    """Draw the three steps from left to right."""
    generator = torch.Generator().manual_seed(3)
    A = torch.randn(COLUMNS, RANK, generator=generator)
    B = torch.randn(ROWS, RANK, generator=generator)
    scalars = {"piece_coeff": torch.tensor([0.1, -0.1]), "alpha": torch.tensor(1.0), "beta": torch.tensor(0.0)}
    delta = merge_factors(A, B, "mix_k", **scalars)
    sparse = sparsify(delta, keep_threshold(delta, round(DENSITY * delta.numel())))

    figure = Figure(figsize=(12, 4.6), facecolor="white")
    _matrix(figure.add_axes((0.015, 0.30, 0.05, 0.45)), B, "B", f"{ROWS} x {RANK}")
    _matrix(figure.add_axes((0.095, 0.78, 0.19, 0.10)), A.T, "Aᵀ", f"{RANK} x {COLUMNS}", above=True)
    _matrix(figure.add_axes((0.095, 0.30, 0.19, 0.45)), delta, "ΔW = κ(A, B)", "any rank, never stored")
    _arrow(figure, 0.292, 0.345)
    _matrix(
        figure.add_axes((0.355, 0.30, 0.19, 0.45)), sparse, "S", f"the {DENSITY:.0%} largest, shrunk by the threshold"
    )
    _arrow(figure, 0.552, 0.600)
    _budgets(figure.add_axes((0.665, 0.30, 0.325, 0.45)), generator)
    for x, title, text in (
        (0.015, "1  Merge", "A nonlinear kernel κ maps each pair of factor\nrows, one of A and one of B, to an entry"),
        (
            0.355,
            "2  Compete within a matrix",
            "Entries below a threshold become 0;\nthe layer is one product, x (W0 + S)ᵀ",
        ),
        (
            0.640,
            "3  Compete across layers",
            "All matrices share one budget that shrinks during\ntraining; important matrices keep more weights",
        ),
    ):
        figure.text(x, 0.95, title, fontsize=13, weight="bold", color=INK, va="center")
        figure.text(x, 0.125, text, fontsize=10, color=MUTED, va="center")
    return figure


def _matrix(axes: Axes, values: Tensor, name: str, note: str, above: bool = False) -> None:
    """Draw a matrix as colored squares: purple negative, white zero, orange positive."""
    bound = float(values.abs().max())
    axes.imshow(values, cmap="PuOr_r", vmin=-bound, vmax=bound, aspect="auto", interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_color(MUTED)
    if above:
        axes.text(1.02, 0.5, f"{name}  {note}", transform=axes.transAxes, fontsize=9, color=INK, va="center")
    else:
        axes.text(0.5, -0.06, f"{name}\n{note}", transform=axes.transAxes, fontsize=9, color=INK, ha="center", va="top")


def _arrow(figure: Figure, left: float, right: float) -> None:
    """Draw an arrow between panels."""
    axes = figure.add_axes((left, 0.48, right - left, 0.08))
    axes.annotate("", (1, 0.5), (0, 0.5), arrowprops={"arrowstyle": "-|>", "color": ACCENT, "lw": 2})
    axes.axis("off")


def _budgets(axes: Axes, generator: torch.Generator) -> None:
    """Draw the budgets of eight matrices at four steps of a training run (Algorithm 1)."""
    size, count, steps = ROWS * COLUMNS, 8, 4
    importance = torch.rand(count, generator=generator).add(0.15).pow(2).tolist()
    width = 0.8 / steps
    for step in range(steps):
        budget = budget_at(step, steps - 1, size * count, round(DENSITY * size * count))
        budgets = allocate(importance, [size] * count, budget)
        positions = [layer + (step - (steps - 1) / 2) * width for layer in range(count)]
        axes.bar(positions, [b / size for b in budgets], width * 0.9, color=ACCENT, alpha=0.25 + 0.25 * step)
    axes.set_xticks(range(count), [f"{k + 1}" for k in range(count)], fontsize=9, color=INK)
    axes.set_yticks([0, 0.5, 1], ["0", "½", "all"], fontsize=9, color=INK)
    axes.set_xlabel("adapted matrix; bars from start (pale) to end (dark) of training", fontsize=9, color=INK)
    axes.set_ylabel("weights kept", fontsize=9, color=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    draw_method().savefig(FIGURE, metadata={"Date": None})
    print(FIGURE)
