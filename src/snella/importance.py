"""Importance of each adapted matrix, smoothed over steps (eqs. 7–11)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from snella.matrices import AdaptedMatrix

UPDATE_METRICS = ("delta_magnitude", "delta_mean_magnitude")
"""Metrics computed from the merged updates instead of the factors."""


class _Observation(NamedTuple):
    """Value and gradient of one tensor; without a gradient, the importance is the magnitude of the value."""

    value: Tensor
    gradient: Tensor | None


@dataclass
class _FlatAverages:
    """Moving averages of all entries on one device, concatenated to reduce the number of operations per step."""

    keys: list[str]
    averages: Tensor
    uncertainties: Tensor
    first_view: Tensor | None = None

    def split_views(self, tensor: Tensor, shapes: Sequence[torch.Size]) -> dict[str, Tensor]:
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
        self._flat: dict[torch.device, _FlatAverages] = {}

    @torch.no_grad()
    def update(self, gradient_scale: float = 1.0) -> None:
        """Update the averages with the current gradients and parameters.

        Args:
            gradient_scale: Scale of the gradients, from a gradient scaler.
        """
        observations = self._observe_updates() if self.metric in UPDATE_METRICS else self._observe_factors()
        by_device: dict[torch.device, dict[str, _Observation]] = {}
        for key, observation in observations.items():
            by_device.setdefault(observation.value.device, {})[key] = observation
        for device, values in by_device.items():
            self._smooth(self._flat_averages_on(device, values), list(values.values()), 1 / gradient_scale)

    @torch.no_grad()
    def with_gradient(self) -> set[str]:
        """Return the names of matrices whose factors have a nonzero gradient."""
        _, gradients = _gather_factors(self.matrices)
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

    def _observe_factors(self) -> dict[str, _Observation]:
        """Return the factors and their gradients, keyed by `"NAME/A"` and `"NAME/B"`."""
        observations = {}
        values, gradients = _gather_factors(self.matrices)
        for matrix in self.matrices:
            factors, (grad_A, grad_B) = matrix.parts(*values[id(matrix.layer)]), gradients[id(matrix.layer)]
            if self.metric == "magnitude":
                parts: tuple[Tensor | None, ...] = (None, None)
            elif grad_A is None or grad_B is None:
                parts = tuple(map(torch.zeros_like, factors))
            else:
                parts = matrix.parts(grad_A, grad_B)
            for letter, factor, gradient in zip("AB", factors, parts, strict=True):
                observations[f"{matrix.name}/{letter}"] = _Observation(factor.detach(), gradient)
        return observations

    def _observe_updates(self) -> dict[str, _Observation]:
        """Return every sparse update, or its mean magnitude; merge fused layers once.

        Raises:
            NotImplementedError: If the factors are sharded, because merging requires complete factors.
        """
        if any(is_sharded(factor) for factor in _factors_of(self.matrices[0])):
            raise NotImplementedError(
                f"importance={self.metric!r} requires complete factors between passes, got factors sharded by FSDP; "
                "set importance='sensitivity', or train with DDP"
            )
        merged: dict[int, list[Tensor]] = {}
        observations = {}
        for matrix in self.matrices:
            if id(matrix.layer) not in merged:
                merged[id(matrix.layer)] = list(matrix.layer.sparse_updates(matrix.adapter_name))
            update = merged[id(matrix.layer)][matrix.group]
            observations[f"{matrix.name}/S"] = _Observation(
                update if self.metric == "delta_magnitude" else update.abs().mean(), None
            )
        return observations

    def _flat_averages_on(self, device: torch.device, values: Mapping[str, _Observation]) -> _FlatAverages:
        """Return the flat averages of these entries; initialize missing ones."""
        flat = self._flat.get(device)
        if flat is None or flat.keys != list(values) or self._averages.get(flat.keys[0]) is not flat.first_view:
            averages, uncertainties = [], []
            for key, (value, _) in values.items():
                zeros = torch.zeros(value.numel(), dtype=torch.float32, device=device)
                average = self._averages.get(key)
                # NaN marks an average that starts at its first value
                initial = zeros if self.zero_init_ema else torch.full_like(zeros, torch.nan)
                averages.append(initial if average is None else average.to(device).reshape(-1))
                uncertainty = self._uncertainties.get(key)
                uncertainties.append(zeros if uncertainty is None else uncertainty.to(device).reshape(-1))
            shapes = [observation.value.shape for observation in values.values()]
            flat = self._flat[device] = _FlatAverages(list(values), torch.cat(averages), torch.cat(uncertainties))
            self._averages |= flat.split_views(flat.averages, shapes)
            self._uncertainties |= flat.split_views(flat.uncertainties, shapes)
            flat.first_view = self._averages[flat.keys[0]]
        return flat

    def _smooth(self, flat: _FlatAverages, observations: Sequence[_Observation], scale: float) -> None:
        """Update both moving averages; skip entries with non-finite values.

        A moving average never recovers from an infinity, and half-precision gradients overflow occasionally.
        """
        value = torch.cat([observation.value.reshape(-1) for observation in observations]).float()
        gradients = [
            observation.gradient.reshape(-1) for observation in observations if observation.gradient is not None
        ]
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
        matrices_by_name = {matrix.name: matrix for matrix in self.matrices}
        for key in state["averages"]:
            name = key.rpartition("/")[0]
            if name not in matrices_by_name:
                raise ValueError(
                    f"the allocator's state has the matrix {name!r}, which this model does not adapt; "
                    f"this model adapts e.g. {list(matrices_by_name)[:3]}"
                )
        self._averages, self._uncertainties = (
            {
                key: value.clone().to(matrices_by_name[key.rpartition("/")[0]].factors[0].device)
                for key, value in part.items()
            }
            for part in (state["averages"], state["uncertainties"])
        )


def _factors_of(matrix: AdaptedMatrix) -> tuple[Tensor, Tensor]:
    """Return the parameters that contain both factors of a matrix."""
    return matrix.layer.snella_A[matrix.adapter_name], matrix.layer.snella_B[matrix.adapter_name]


def is_sharded(factor: Tensor) -> bool:
    """Return whether a factor is sharded: a `DTensor`, or a flat shard of FSDP1."""
    return isinstance(factor, DTensor) or factor.dim() == 1


def _gather_factors(
    matrices: Sequence[AdaptedMatrix],
) -> tuple[dict[int, list[Tensor]], dict[int, list[Tensor | None]]]:
    """Return `A` and `B` of every layer by its id, and their gradients; gather sharded ones."""
    values: dict[int, list[Tensor]] = {}
    gradients: dict[int, list[Tensor | None]] = {}
    shards: list[tuple[int, int, torch.Size]] = []
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
                shards.append((id(layer), k, shape))
    if shards:
        local = [(values[key][k], gradients[key][k], shape) for key, k, shape in shards]
        for (key, k, _), (value, gradient) in zip(shards, _gather_shards(local), strict=True):
            values[key][k], gradients[key][k] = value, gradient
    return values, gradients


def _gather_shards(
    shards: Sequence[tuple[Tensor, Tensor | None, torch.Size]],
) -> list[tuple[Tensor, Tensor | None]]:
    """Gather tensors that FSDP1 splits into flat shards in rank order, and their gradients.

    Raises:
        NotImplementedError: If the shards of all processes do not form exactly one tensor, as with `HYBRID_SHARD`.
    """
    distributed = torch.distributed
    world_size, device = distributed.get_world_size(), shards[0][0].device
    sizes = torch.tensor([value.numel() for value, _, _ in shards], device=device)
    sizes_by_rank = [torch.empty_like(sizes) for _ in range(world_size)]
    distributed.all_gather(sizes_by_rank, sizes)
    stacked, full_sizes = torch.stack(sizes_by_rank).cpu(), [shape.numel() for _, _, shape in shards]
    if stacked.sum(0).tolist() != full_sizes:
        raise NotImplementedError(
            f"BudgetAllocator requires one copy of the {sum(full_sizes)} factor entries over all {world_size} "
            f"processes, got {int(stacked.sum())} entries; use FSDP1's sharding_strategy FULL_SHARD or "
            "SHARD_GRAD_OP, FSDP2 or DDP"
        )
    starts = stacked[: distributed.get_rank()].sum(0).tolist()
    # each process writes its shards into zeros, so that all_reduce concatenates them
    gathered = torch.zeros(2, sum(full_sizes), device=device)
    has_gradient = torch.zeros(len(shards), device=device)
    parts = [part.split(full_sizes) for part in gathered]
    for k, ((value, gradient, _), start) in enumerate(zip(shards, starts, strict=True)):
        parts[0][k][start : start + value.numel()] = value
        if gradient is not None:
            parts[1][k][start : start + value.numel()] = gradient
            has_gradient[k] = 1
    distributed.all_reduce(gathered)
    distributed.all_reduce(has_gradient)
    return [
        (parts[0][k].view(shape), parts[1][k].view(shape) if has_grad else None)
        for k, ((_, _, shape), has_grad) in enumerate(zip(shards, has_gradient.tolist(), strict=True))
    ]
