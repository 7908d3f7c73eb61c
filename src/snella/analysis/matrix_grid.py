"""Budgets of the saved adapter, and the adapted matrices arranged by depth and kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from snella.analysis.run_files import Allocation, AllocationStep, MatrixInfo, Metrics

__all__ = ["Cell", "MatrixGrid", "adapter_budgets", "adapter_step", "arrange", "epochs_of_allocation"]


@dataclass(frozen=True)
class Cell:
    """The matrices of one kind at one depth (several where a backbone counts depth anew in each stage)."""

    size: int
    budget: int
    frozen: int
    count: int

    @property
    def kept(self) -> float:
        """Share of the weights that are kept."""
        return self.budget / self.size if self.size else 0.0

    @property
    def sparsity(self) -> float:
        """Share of the weights that are zero in the update."""
        return 1.0 - self.kept

    @property
    def is_frozen(self) -> bool:
        """Whether none of its matrices is trained."""
        return self.frozen == self.count


@dataclass(frozen=True)
class MatrixGrid:
    """Cells by (kind, depth), kinds in the order in which a block uses them; depth None is outside the blocks."""

    kinds: list[str]
    depths: list[int | None]
    cells: dict[tuple[str, int | None], Cell]

    @property
    def frozen_count(self) -> int:
        """Number of matrices with budget 0."""
        return sum(cell.frozen for cell in self.cells.values())


def arrange(matrices: Sequence[MatrixInfo], budgets: Mapping[str, int]) -> MatrixGrid:
    """Arrange matrices and their budgets by kind and depth."""
    groups: dict[tuple[str, int | None], list[MatrixInfo]] = {}
    for matrix in matrices:
        groups.setdefault((matrix.kind, matrix.depth), []).append(matrix)
    cells = {
        place: Cell(
            size=sum(matrix.size for matrix in group),
            budget=sum(budgets[matrix.name] for matrix in group),
            frozen=sum(budgets[matrix.name] == 0 for matrix in group),
            count=len(group),
        )
        for place, group in groups.items()
    }
    depths = {depth for _, depth in groups}
    numbered: list[int | None] = list(sorted(depth for depth in depths if depth is not None))
    kinds = list(dict.fromkeys(kind for kind, _ in groups))
    return MatrixGrid(kinds, numbered + ([None] if None in depths else []), cells)


def epochs_of_allocation(allocation: Allocation, metrics: Metrics | None, is_finished: bool) -> int | None:
    """Return the number of epochs that the schedule's `total` stands for, None where the files do not tell.

    The allocator counts in allocations; these are epochs unless `realloc_every` is a number of steps.
    """
    if not allocation.history or metrics is None or not metrics.history:
        return None
    last, epochs = allocation.history[-1], metrics.history[-1].epoch
    if last.t == epochs:
        return last.total
    return epochs if is_finished else None


def adapter_step(allocation: Allocation, metrics: Metrics | None) -> AllocationStep | None:
    """Return the allocation that was in force when the saved adapter (the best epoch's) was measured.

    It is the last one with the total budget that the metrics note for that epoch, and where several have the same
    total (constant schedule), not after the epoch's end; the last of all where the metrics do not tell.
    """
    if not allocation.history:
        return None
    rows = {} if metrics is None else {row.epoch: row for row in metrics.history}
    best = None if metrics is None or metrics.best_epoch is None else rows.get(metrics.best_epoch)
    if best is None or best.budget is None:
        return allocation.history[-1]
    same = [entry for entry in allocation.history if entry.budget == best.budget]
    share = best.epoch / max(rows)
    reached = [entry for entry in same if entry.step <= share * allocation.history[-1].step]
    return (reached or same or allocation.history)[-1]


def adapter_budgets(allocation: Allocation, metrics: Metrics | None) -> dict[str, int]:
    """Return the budget of each matrix in the saved adapter; before the first allocation, all weights."""
    step = adapter_step(allocation, metrics)
    budgets = {matrix.name: matrix.size for matrix in allocation.matrices} if step is None else dict(step.budgets)
    return budgets | {matrix.name: matrix.budget for matrix in allocation.matrices if matrix.budget is not None}
