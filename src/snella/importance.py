"""Importance of each adapted matrix, smoothed over steps (eqs. 7–11)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from snella.matrices import AdaptedMatrix

OF_UPDATES = ("delta_magnitude", "delta_mean_magnitude")
"""Metrics computed from the merged updates instead of the factors."""


class _Read(NamedTuple):
    """Inputs of the importance of one tensor; without a gradient, the importance is the magnitude of the value."""

    value: Tensor
    gradient: Tensor | None


@dataclass
class _Flat:
    """Both averages of all entries on one device, concatenated so that a step needs few operations."""

    keys: list[str]
    averages: Tensor
    uncertainties: Tensor
    first: Tensor | None = None

    def views_of(self, tensor: Tensor, shapes: Sequence[torch.Size]) -> dict[str, Tensor]:
        """Split a flat tensor into views by key."""
        parts = tensor.split([shape.numel() for shape in shapes])
        return {key: part.view(shape) for key, part, shape in zip(self.keys, parts, shapes, strict=True)}


class ImportanceTracker:
    """Moving averages of the importance of every factor entry, and of its uncertainty.

        I = |∇X ⊙ X|                                     for X ∈ {A, B}; `magnitude`: |X|
        Ī ← β1·Ī + (1 − β1)·I                            Ī(0) = I(0)
        U ← β2·U + (1 − β2)·|Ī − I|                      U(0) = 0
        p = mean(Ī_A ⊙ U_A) + mean(Ī_B ⊙ U_B)            one number per matrix

    `delta_magnitude` (W-Magnitude) applies eqs. 7 to 11 to the sparse update instead of the factors: `I = |S|`,
    `p = mean(Ī_S ⊙ U_S)`. It stores two numbers per adapted weight. `delta_mean_magnitude` smooths the mean of `|S|`,
    one number per matrix.

    Args:
        matrices: The adapted matrices.
        metric: `sensitivity`, `magnitude`, `delta_magnitude` or `delta_mean_magnitude`.
        beta1: Decay of Ī.
        beta2: Decay of U.
        zero_init_ema: Start Ī at 0, as the authors' code does.
    """

    def __init__(
        self,
        matrices: Sequence[AdaptedMatrix],
        *,
        metric: str = "sensitivity",
        beta1: float = 0.85,
        beta2: float = 0.85,
        zero_init_ema: bool = False,
    ) -> None:
        self.matrices = list(matrices)
        self.metric, self.beta1, self.beta2, self.zero_init_ema = metric, beta1, beta2, zero_init_ema
        self._averages: dict[str, Tensor] = {}
        self._uncertainties: dict[str, Tensor] = {}
        self._flat: dict[torch.device, _Flat] = {}

    @torch.no_grad()
    def update(self, gradient_scale: float = 1.0) -> None:
        """Update the averages with the current gradients and parameters.

        Args:
            gradient_scale: Current factor of a gradient scaler on the gradients.
        """
        read = self._read_updates() if self.metric in OF_UPDATES else self._read_factors()
        by_device: dict[torch.device, dict[str, _Read]] = {}
        for key, item in read.items():
            by_device.setdefault(item.value.device, {})[key] = item
        for device, values in by_device.items():
            self._smooth(self._averages_on(device, values), list(values.values()), 1 / gradient_scale)

    @torch.no_grad()
    def with_gradient(self) -> set[str]:
        """Return the names of matrices whose factors have a nonzero gradient."""
        _, gradients = _whole_factors(self.matrices)
        names = set()
        for matrix in self.matrices:
            grad_A, grad_B = gradients[id(matrix.layer)]
            if (
                grad_A is not None
                and grad_B is not None
                and any(bool(part.any()) for part in matrix.parts(grad_A, grad_B))
            ):
                names.add(matrix.name)
        return names

    @torch.no_grad()
    def scores(self) -> list[float]:
        """Return `p` of every matrix, 0 before the first update."""
        scores = []
        for matrix in self.matrices:
            keys = [f"{matrix.name}/{key}" for key in ("A", "B", "S") if f"{matrix.name}/{key}" in self._averages]
            parts = [(self._averages[key] * self._uncertainties[key]).mean(dtype=torch.float64) for key in keys]
            scores.append(torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64))
        # one transfer for all matrices
        return torch.stack([score.cpu() for score in scores]).tolist() if scores else []

    def _read_factors(self) -> dict[str, _Read]:
        """Return the factors and their gradients, by matrix name and letter."""
        read = {}
        values, gradients = _whole_factors(self.matrices)
        for matrix in self.matrices:
            factors, (grad_A, grad_B) = matrix.parts(*values[id(matrix.layer)]), gradients[id(matrix.layer)]
            if self.metric == "magnitude":
                parts: tuple[Tensor | None, ...] = (None, None)
            elif grad_A is None or grad_B is None:
                parts = tuple(map(torch.zeros_like, factors))
            else:
                parts = matrix.parts(grad_A, grad_B)
            for letter, factor, gradient in zip("AB", factors, parts, strict=True):
                read[f"{matrix.name}/{letter}"] = _Read(factor.detach(), gradient)
        return read

    def _read_updates(self) -> dict[str, _Read]:
        """Return every sparse update, or its mean magnitude. Fused layers are merged once.

        Raises:
            NotImplementedError: If the factors are sharded, because no update can be merged between passes.
        """
        if any(is_sharded(factor) for factor in _factors_of(self.matrices[0])):
            raise NotImplementedError(
                f"importance={self.metric!r} merges the updates between passes, when FSDP shards the factors; "
                "set importance='sensitivity', or train with DDP"
            )
        merged: dict[int, list[Tensor]] = {}
        read = {}
        for matrix in self.matrices:
            if id(matrix.layer) not in merged:
                merged[id(matrix.layer)] = list(matrix.layer.sparse_updates(matrix.adapter_name))
            update = merged[id(matrix.layer)][matrix.group]
            read[f"{matrix.name}/S"] = _Read(update if self.metric == "delta_magnitude" else update.abs().mean(), None)
        return read

    def _averages_on(self, device: torch.device, values: Mapping[str, _Read]) -> _Flat:
        """Return the flat averages of these entries; initialize new ones."""
        flat = self._flat.get(device)
        if flat is None or flat.keys != list(values) or self._averages.get(flat.keys[0]) is not flat.first:
            averages, uncertainties = [], []
            for key, (value, _) in values.items():
                zeros = torch.zeros(value.numel(), dtype=torch.float32, device=device)
                average = self._averages.get(key)
                # NaN marks an average that starts at its first value
                start = zeros if self.zero_init_ema else torch.full_like(zeros, torch.nan)
                averages.append(start if average is None else average.to(device).reshape(-1))
                uncertainty = self._uncertainties.get(key)
                uncertainties.append(zeros if uncertainty is None else uncertainty.to(device).reshape(-1))
            shapes = [item.value.shape for item in values.values()]
            flat = self._flat[device] = _Flat(list(values), torch.cat(averages), torch.cat(uncertainties))
            self._averages |= flat.views_of(flat.averages, shapes)
            self._uncertainties |= flat.views_of(flat.uncertainties, shapes)
            flat.first = self._averages[flat.keys[0]]
        return flat

    def _smooth(self, flat: _Flat, read: Sequence[_Read], scale: float) -> None:
        """Update both moving averages of all entries; non-finite values leave their averages unchanged.

        A moving average never recovers from an infinity, and half-precision gradients overflow occasionally.
        """
        value = torch.cat([item.value.reshape(-1) for item in read]).float()
        gradients = [item.gradient.reshape(-1) for item in read if item.gradient is not None]
        if gradients:
            value = torch.cat(gradients).float().mul_(scale).mul_(value)
        value.abs_()
        is_new = torch.isnan(flat.averages)
        value = torch.where(value < torch.inf, value, torch.where(is_new, 0, flat.averages))
        torch.where(is_new, value, flat.averages, out=flat.averages)
        flat.averages.lerp_(value, 1 - self.beta1)
        flat.uncertainties.lerp_(value.sub_(flat.averages).abs_(), 1 - self.beta2)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as a dict of tensors and plain values."""
        return {"averages": dict(self._averages), "uncertainties": dict(self._uncertainties)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the averages.

        Raises:
            ValueError: If the state has other matrices.
        """
        known = {matrix.name: matrix for matrix in self.matrices}
        for key in state["averages"]:
            name = key.rpartition("/")[0]
            if name not in known:
                raise ValueError(
                    f"the allocator's state has the matrix {name!r}, which this model does not adapt; "
                    f"this model adapts e.g. {list(known)[:3]}"
                )
        self._averages, self._uncertainties = (
            {key: value.clone().to(known[key.rpartition("/")[0]].factors[0].device) for key, value in part.items()}
            for part in (state["averages"], state["uncertainties"])
        )


def _factors_of(matrix: AdaptedMatrix) -> tuple[Tensor, Tensor]:
    """Return both factors of a matrix's layer, as the optimizer has them."""
    return matrix.layer.snella_A[matrix.adapter_name], matrix.layer.snella_B[matrix.adapter_name]


def is_sharded(factor: Tensor) -> bool:
    """Return whether a factor is sharded: a `DTensor`, or a flat piece of FSDP1."""
    return isinstance(factor, DTensor) or factor.dim() == 1


def _whole_factors(
    matrices: Sequence[AdaptedMatrix],
) -> tuple[dict[int, list[Tensor]], dict[int, list[Tensor | None]]]:
    """Return `A` and `B` of every layer by its id, and their gradients; gather them if they are sharded."""
    values: dict[int, list[Tensor]] = {}
    gradients: dict[int, list[Tensor | None]] = {}
    pieces: list[tuple[int, int, torch.Size]] = []
    for matrix in matrices:
        layer = matrix.layer
        if id(layer) in values:
            continue
        factors, rows = _factors_of(matrix), layer.row_counts[matrix.adapter_name]
        values[id(layer)] = [factor.detach() for factor in factors]
        gradients[id(layer)] = [factor.grad for factor in factors]
        rank = layer.snella_config[matrix.adapter_name].rank_of(layer.module_name)
        shapes = torch.Size((len(rows), layer.in_features, rank)), torch.Size((layer.out_features, rank))
        for k, (factor, shape) in enumerate(zip(factors, shapes, strict=True)):
            if isinstance(factor, DTensor):
                values[id(layer)][k] = factor.full_tensor().detach()
                gradients[id(layer)][k] = factor.grad.full_tensor() if isinstance(factor.grad, DTensor) else None
            elif is_sharded(factor):
                pieces.append((id(layer), k, shape))
    if pieces:
        local = [(values[key][k], gradients[key][k], shape) for key, k, shape in pieces]
        for (key, k, _), (value, gradient) in zip(pieces, _gather_pieces(local), strict=True):
            values[key][k], gradients[key][k] = value, gradient
    return values, gradients


def _gather_pieces(
    pieces: Sequence[tuple[Tensor, Tensor | None, torch.Size]],
) -> list[tuple[Tensor, Tensor | None]]:
    """Gather tensors that FSDP1 split into flat pieces in rank order, and their gradients.

    Raises:
        NotImplementedError: If the pieces of all processes do not form one tensor, as with `HYBRID_SHARD`.
    """
    distributed = torch.distributed
    world, device = distributed.get_world_size(), pieces[0][0].device
    sizes = torch.tensor([value.numel() for value, _, _ in pieces], device=device)
    by_process = [torch.empty_like(sizes) for _ in range(world)]
    distributed.all_gather(by_process, sizes)
    stacked, numbers = torch.stack(by_process).cpu(), [shape.numel() for _, _, shape in pieces]
    if stacked.sum(0).tolist() != numbers:
        raise NotImplementedError(
            f"BudgetAllocator requires one copy of the {sum(numbers)} factor entries over all {world} processes, got "
            f"{int(stacked.sum())} entries; use FSDP1's sharding_strategy FULL_SHARD or SHARD_GRAD_OP, FSDP2 or DDP"
        )
    starts = stacked[: distributed.get_rank()].sum(0).tolist()
    # each process writes its pieces into zeros, so that all_reduce concatenates them
    whole = torch.zeros(2, sum(numbers), device=device)
    has_gradient = torch.zeros(len(pieces), device=device)
    parts = [part.split(numbers) for part in whole]
    for k, ((value, gradient, _), start) in enumerate(zip(pieces, starts, strict=True)):
        parts[0][k][start : start + value.numel()] = value
        if gradient is not None:
            parts[1][k][start : start + value.numel()] = gradient
            has_gradient[k] = 1
    distributed.all_reduce(whole)
    distributed.all_reduce(has_gradient)
    return [
        (parts[0][k].view(shape), parts[1][k].view(shape) if present else None)
        for k, ((_, _, shape), present) in enumerate(zip(pieces, has_gradient.tolist(), strict=True))
    ]
