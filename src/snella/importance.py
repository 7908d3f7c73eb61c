"""Importance of each adapted matrix, smoothed over optimizer steps (eqs. 7–11 of arXiv 2510.24037).

A matrix has two trained factors, `A` and `B`, from which its sparse update `S` is computed. The allocator divides the
budget, the maximum number of nonzero entries of all updates, among the matrices in proportion to their importance. If
FSDP shards the factors, each process tracks only the factor entries that it holds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard, cast

import torch
from torch import Tensor

from snella.matrices import AdaptedMatrix
from snella.ops import widest_dtype

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_UPDATE_METRICS = ("delta_magnitude", "delta_mean_magnitude")
"""Metrics computed from the merged updates instead of the factors."""


class _EntryRange(NamedTuple):
    """Range of a factor's entries that this process holds.

    Args:
        start: First entry in the flattened factor.
        shape: Shape of the full factor.
        copies: Number of processes that hold the same range.
    """

    start: int
    shape: torch.Size
    copies: int


class _Observation(NamedTuple):
    """Value of one tensor, and its gradient if the importance depends on it."""

    value: Tensor
    gradient: Tensor | None
    entries: _EntryRange | None = None
    """Range of the entries in `value`, or `None` if FSDP shards no factor of any matrix."""


class _FlatAverages(NamedTuple):
    """Moving averages of all observations on a device, concatenated to save operations per step."""

    keys: list[str]
    averages: Tensor
    uncertainties: Tensor


class ImportanceTracker:
    """Moving averages of the importance of every factor entry, and of its uncertainty.

        I = |∇X ⊙ X|                               for X ∈ {A, B}; with `magnitude`: |X|   (eq. 7)
        Ī ← β1·Ī + (1 − β1)·I                      Ī(0) = I(0)                             (eqs. 8, 9)
        U ← β2·U + (1 − β2)·|Ī − I|                U(0) = 0                                (eqs. 8, 10)
        p = mean(Ī_A ⊙ U_A) + mean(Ī_B ⊙ U_B)      one number per matrix                   (eq. 11)

    `delta_magnitude` (the paper's W-Magnitude) applies eqs. 7 to 11 to the sparse update instead of the factors:
    `I = |S|`, `p = mean(Ī_S ⊙ U_S)`. It stores two numbers per adapted weight. `delta_mean_magnitude` smooths only the
    mean of `|S|` and stores two numbers per matrix.

    Args:
        matrices: The adapted matrices.
        metric: `sensitivity`, `magnitude`, `delta_magnitude`, or `delta_mean_magnitude`.
        beta1: Decay of Ī.
        beta2: Decay of U.
        zero_init_ema: If True, start Ī at 0, as the authors' code does.
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
        self.metric = metric
        self.beta1 = beta1
        self.beta2 = beta2
        self.zero_init_ema = zero_init_ema
        self._averages: dict[str, Tensor] = {}
        self._uncertainties: dict[str, Tensor] = {}
        self._flat: dict[torch.device, _FlatAverages] = {}
        self._ranges: dict[str, _EntryRange] = {}
        self._flat_shard_starts: list[int] = []  # of FSDP1's flat shards

    @torch.no_grad()
    def update(self, gradient_scale: float = 1.0) -> None:
        """Update the averages with the current gradients and parameters.

        Args:
            gradient_scale: Scale of the gradients, from a gradient scaler.

        Raises:
            NotImplementedError: If FSDP shards the factors and the metric is computed from the updates, or if FSDP1
                shards the factors with `HYBRID_SHARD`.
        """
        if self.metric in _UPDATE_METRICS:
            observations = self._observe_updates()
        else:
            observations = self._observe_factors(with_gradient=self.metric != "magnitude")
        self._ranges = {key: item.entries for key, item in observations.items() if item.entries is not None}
        by_device: dict[torch.device, dict[str, _Observation]] = {}
        for key, observation in observations.items():
            by_device.setdefault(observation.value.device, {})[key] = observation
        self._flat = {device: self._flat_averages_on(device, observed) for device, observed in by_device.items()}
        # a gradient scaler that keeps halving its scale reaches 0
        inverse_scale = 1 / gradient_scale if gradient_scale else math.inf
        for device, observed in by_device.items():
            self._smooth(self._flat[device], list(observed.values()), inverse_scale)

    @torch.no_grad()
    def names_with_gradient(self) -> set[str]:
        """Return the names of the matrices with gradients of both factors, at least one of them nonzero.

        If FSDP shards the factors, a nonzero gradient of one factor suffices.
        """
        observations = self._observe_factors(with_gradient=True)
        names = [matrix.name for matrix in self.matrices]
        device = _factor_parameters(self.matrices[0])[0].device
        gradients = [cast(Tensor, observations[f"{name}/{letter}"].gradient) for name in names for letter in "AB"]
        is_nonzero = torch.stack([gradient.any().to(device) for gradient in gradients])
        flags = is_nonzero.view(-1, 2).any(1)  # [matrices], from A and B
        if self.has_sharded_factors():
            flags = _all_reduce(flags.to(torch.uint8), torch.distributed.ReduceOp.MAX)
        return {name for name, flag in zip(names, flags.tolist(), strict=True) if flag}

    @torch.no_grad()
    def scores(self) -> list[float]:
        """Return `p` of every matrix, or 0 before the first update.

        All processes must call this method, and all of them get the same result.
        """
        scores = []
        for matrix in self.matrices:
            means = []
            for key in (f"{matrix.name}/{letter}" for letter in "ABS"):
                if key not in self._averages:
                    continue
                product = self._averages[key] * self._uncertainties[key]
                entries = self._ranges.get(key)
                dtype = widest_dtype(product.device.type)
                if entries is None:
                    means.append(product.mean(dtype=dtype))
                else:  # this process's share of the mean, because the shares of all processes are added below
                    means.append(product.sum(dtype=dtype) / (entries.shape.numel() * entries.copies))
            scores.append(torch.stack(means).sum() if means else torch.zeros(()))
        # on one device, so that one transfer reads them all
        device = scores[0].device
        values = torch.stack([score.to(device, widest_dtype(device.type)) for score in scores])
        distributed = torch.distributed
        if self._ranges:
            values = _all_reduce(values, distributed.ReduceOp.SUM)
        elif distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            # gradients are already averaged, so the processes differ only by rounding; use rank 0's values
            values = values.cuda() if distributed.get_backend() == "nccl" else values.cpu()
            distributed.broadcast(values, src=0)
        return values.tolist()

    def has_sharded_factors(self) -> bool:
        """Return whether FSDP shards a factor of any matrix."""
        return any(is_sharded(factor) for matrix in self.matrices for factor in _factor_parameters(matrix))

    def _observe_factors(self, *, with_gradient: bool) -> dict[str, _Observation]:
        """Return the factors and their gradients, keyed by `"NAME/A"` and `"NAME/B"`.

        Missing gradients are zero. If FSDP shards the factors, only the local entries are returned.
        """
        if self.has_sharded_factors():
            return self._observe_shards(with_gradient=with_gradient)
        observations = {}
        for matrix in self.matrices:
            factors = matrix.factors
            grad_A, grad_B = (factor.grad for factor in _factor_parameters(matrix))
            if not with_gradient:
                gradients: tuple[Tensor | None, ...] = (None, None)
            elif grad_A is None or grad_B is None:
                gradients = tuple(map(torch.zeros_like, factors))
            else:
                gradients = matrix.slice_factors(grad_A, grad_B)
            for letter, factor, gradient in zip("AB", factors, gradients, strict=True):
                observations[f"{matrix.name}/{letter}"] = _Observation(factor.detach(), gradient)
        return observations

    def _observe_shards(self, *, with_gradient: bool) -> dict[str, _Observation]:
        """Return the local entries of the factors and their gradients."""
        factors: dict[int, Tensor] = {}
        sizes: Counter[int] = Counter()  # of each layer's full factors
        for matrix in self.matrices:
            _, shapes = _factor_layout(matrix)
            for factor, shape in zip(_factor_parameters(matrix), shapes, strict=True):
                factors[id(factor)] = factor
                sizes[id(factor)] += shape.numel()
        flat_ids = [key for key, factor in factors.items() if is_sharded(factor) and not is_dtensor(factor)]
        if flat_ids and not self._flat_shard_starts:
            self._flat_shard_starts = _find_shard_starts(
                [factors[key] for key in flat_ids], [sizes[key] for key in flat_ids]
            )
        starts = dict(zip(flat_ids, self._flat_shard_starts, strict=True))
        shards = {key: _local_shard(factor, starts.get(key, 0)) for key, factor in factors.items()}
        observations = {}
        for matrix in self.matrices:
            positions, shapes = _factor_layout(matrix)
            for letter, factor, begin, shape in zip("AB", _factor_parameters(matrix), positions, shapes, strict=True):
                part = shards[id(factor)].part(begin, shape, with_gradient=with_gradient)
                observations[f"{matrix.name}/{letter}"] = part
        return observations

    def _observe_updates(self) -> dict[str, _Observation]:
        """Return every sparse update or its mean magnitude, merging the factors of each layer only once.

        Raises:
            NotImplementedError: If the factors are sharded, because merging requires complete factors.
        """
        if self.has_sharded_factors():
            raise NotImplementedError(
                f"importance={self.metric!r} requires complete factors between passes, but FSDP shards them; "
                "set importance='sensitivity' or 'magnitude', or train with DDP"
            )
        layer_updates: dict[int, list[Tensor]] = {}
        observations = {}
        for matrix in self.matrices:
            if id(matrix.layer) not in layer_updates:
                layer_updates[id(matrix.layer)] = matrix.layer.sparse_updates(matrix.adapter_name)
            update = layer_updates[id(matrix.layer)][matrix.group]
            value = update if self.metric == "delta_magnitude" else update.abs().mean()
            observations[f"{matrix.name}/S"] = _Observation(value, None)
        return observations

    def _flat_averages_on(self, device: torch.device, observed: Mapping[str, _Observation]) -> _FlatAverages:
        """Return the flat averages of these observations, and initialize averages that do not exist yet."""
        flat = self._flat.get(device)
        if flat is not None and flat.keys == list(observed):
            return flat
        averages, uncertainties = [], []
        for key, observation in observed.items():
            value = observation.value
            zeros = torch.zeros(value.numel(), dtype=torch.float32, device=device)
            average = self._local_part(key, self._averages.get(key), value)
            # NaN marks an average that `_smooth` starts at its first value
            initial = zeros if self.zero_init_ema else torch.full_like(zeros, torch.nan)
            averages.append(initial if average is None else average.to(device).reshape(-1))
            uncertainty = self._local_part(key, self._uncertainties.get(key), value)
            uncertainties.append(zeros if uncertainty is None else uncertainty.to(device).reshape(-1))
        flat = _FlatAverages(list(observed), torch.cat(averages), torch.cat(uncertainties))
        sizes = [observation.value.numel() for observation in observed.values()]
        views = zip(flat.averages.split(sizes), flat.uncertainties.split(sizes), strict=True)
        for (key, observation), (average, uncertainty) in zip(observed.items(), views, strict=True):
            self._averages[key] = average.view(observation.value.shape)
            self._uncertainties[key] = uncertainty.view(observation.value.shape)
        return flat

    def _local_part(self, key: str, average: Tensor | None, value: Tensor) -> Tensor | None:
        """Return the local entries of an average, if there is one. `load_state_dict` restores averages unsharded."""
        if average is None or average.numel() == value.numel():
            return average
        start = self._ranges[key].start
        return average.reshape(-1)[start : start + value.numel()]

    def _smooth(self, flat: _FlatAverages, observations: Sequence[_Observation], inverse_scale: float) -> None:
        """Update both moving averages.

        Half-precision gradients occasionally overflow, and a moving average never recovers from an infinite value. A
        non-finite importance therefore counts as equal to its moving average, or as 0 if there is none yet.
        """
        importance = torch.cat([observation.value.reshape(-1) for observation in observations]).float()
        gradients = [
            observation.gradient.reshape(-1) for observation in observations if observation.gradient is not None
        ]
        if gradients:
            importance = torch.cat(gradients).float().mul_(inverse_scale).mul_(importance)
        importance.abs_()
        is_new = torch.isnan(flat.averages)
        importance = torch.where(importance < torch.inf, importance, torch.where(is_new, 0, flat.averages))
        torch.where(is_new, importance, flat.averages, out=flat.averages)
        flat.averages.lerp_(importance, 1 - self.beta1)
        flat.uncertainties.lerp_(importance.sub_(flat.averages).abs_(), 1 - self.beta2)

    def _shapes(self) -> dict[str, torch.Size]:
        """Return the full shape of every average."""
        shapes: dict[str, torch.Size] = {}
        for matrix in self.matrices:
            if self.metric == "delta_mean_magnitude":
                shapes[f"{matrix.name}/S"] = torch.Size(())
            elif self.metric in _UPDATE_METRICS:
                shapes[f"{matrix.name}/S"] = torch.Size(matrix.shape)
            else:
                _, factor_shapes = _factor_layout(matrix)
                for letter, shape in zip("AB", factor_shapes, strict=True):
                    shapes[f"{matrix.name}/{letter}"] = shape
        return shapes

    def state_dict(self) -> dict[str, Any]:
        """Return the metric and all averages. If FSDP shards the factors, every process must call this method."""
        collect = self._gather if self._ranges else dict
        averages, uncertainties = collect(self._averages), collect(self._uncertainties)
        return {"metric": self.metric, "averages": averages, "uncertainties": uncertainties}

    def _gather(self, averages: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return complete averages, with the entries of all processes."""
        sizes = [self._ranges[key].shape.numel() for key in averages]
        full = torch.zeros(sum(sizes), dtype=torch.float32, device=next(iter(averages.values())).device)
        for (key, average), part in zip(averages.items(), full.split(sizes), strict=True):
            start = self._ranges[key].start
            part[start : start + average.numel()] = average.reshape(-1)
        # each process has zeros in place of the others' entries, and no average is negative
        full = _all_reduce(full, torch.distributed.ReduceOp.MAX)
        return {key: part.view(self._ranges[key].shape) for key, part in zip(averages, full.split(sizes), strict=True)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the averages of the same matrices.

        Raises:
            ValueError: If the metric or the shapes of the averages do not match, e.g. because the rank differs.
        """
        if (metric := state.get("metric", self.metric)) != self.metric:
            raise ValueError(
                f"the allocator's state has averages of importance={metric!r}, but the model needs {self.metric!r}; "
                "load it into a model with the same importance metric"
            )
        shapes = self._shapes()
        for key, value in state["averages"].items():
            if value.shape != shapes.get(key):
                needed = list(shapes[key]) if key in shapes else "none"
                raise ValueError(
                    f"the allocator's state has averages of shape {list(value.shape)} for {key!r}, but the model needs "
                    f"{needed}; load it into a model with the same layers, rank and importance metric"
                )
        devices = {matrix.name: _factor_parameters(matrix)[0].device for matrix in self.matrices}

        def restored(averages: Mapping[str, Tensor]) -> dict[str, Tensor]:
            copies: dict[str, Tensor] = {}
            for key, value in averages.items():
                matrix_name = key.rpartition("/")[0]
                copies[key] = value.clone().to(devices[matrix_name])
            return copies

        self._ranges = {}
        self._flat = {}
        self._averages, self._uncertainties = restored(state["averages"]), restored(state["uncertainties"])


def _factor_parameters(matrix: AdaptedMatrix) -> tuple[Tensor, Tensor]:
    """Return the parameters that contain both factors of a matrix."""
    return matrix.layer.snella_A[matrix.adapter_name], matrix.layer.snella_B[matrix.adapter_name]


def is_dtensor(value: Any) -> TypeGuard[DTensor]:
    """Return whether a value is a `DTensor`, which some builds of torch do not have."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def is_sharded(factor: Tensor) -> bool:
    """Return whether a factor is a `DTensor` or a shard that FSDP1 has flattened."""
    return is_dtensor(factor) or factor.dim() == 1


def _factor_layout(matrix: AdaptedMatrix) -> tuple[tuple[int, int], tuple[torch.Size, torch.Size]]:
    """Return the positions of a matrix's `A` and `B` in the layer's flattened factors, and the shapes of both."""
    layer = matrix.layer
    rank = layer.snella_config[matrix.adapter_name].rank_of(layer.module_name)
    rows, columns = matrix.shape
    rows_before = sum(layer.row_counts[matrix.adapter_name][: matrix.group])
    positions = (matrix.group * columns * rank, rows_before * rank)
    shapes = (torch.Size((columns, rank)), torch.Size((rows, rank)))
    return positions, shapes


class _Shard(NamedTuple):
    """Local entries of a layer's flattened factor, from entry `start` on; see `_EntryRange` for `copies`."""

    value: Tensor
    gradient: Tensor | None
    start: int
    copies: int

    def part(self, begin: int, shape: torch.Size, *, with_gradient: bool) -> _Observation:
        """Return the local entries of one matrix's factor, which starts at entry `begin` of the layer's factor.

        There may be no such entries. If `with_gradient`, a missing gradient is zero.
        """
        end = begin + shape.numel()
        low = min(max(begin, self.start), end)
        high = max(low, min(end, self.start + self.value.numel()))
        local = slice(low - self.start, high - self.start) if high > low else slice(0)
        value = self.value[local]
        gradient = None
        if with_gradient:
            gradient = torch.zeros_like(value) if self.gradient is None else self.gradient[local]
        return _Observation(value, gradient, _EntryRange(low - begin, shape, self.copies))


def _local_shard(factor: Tensor, start: int) -> _Shard:
    """Return the local entries of a factor. For a flat shard of FSDP1, `start` is the position of its first entry."""
    from torch.distributed.tensor import Shard

    world_size = torch.distributed.get_world_size()
    value = factor.detach()
    gradient = factor.grad
    if not is_dtensor(value):
        copies = 1 if is_sharded(factor) else world_size
        return _Shard(value.reshape(-1), None if gradient is None else gradient.reshape(-1), start, copies)
    mesh = value.device_mesh
    rows = value.shape[0]
    mesh_dims = [dim for dim, placement in enumerate(value.placements) if not placement.is_replicate()]
    placement = value.placements[mesh_dims[0]] if len(mesh_dims) == 1 else None
    if type(placement) is not Shard or placement.dim != 0:
        # collect shards that are not ranges of rows, e.g. with tensor parallelism
        full_gradient = gradient.full_tensor().reshape(-1) if is_dtensor(gradient) else None
        return _Shard(value.full_tensor().reshape(-1), full_gradient, 0, world_size)
    num_shards = mesh.size(mesh_dims[0])
    # all shards have the same number of rows, except for the last ones
    first_row = min(mesh.get_local_rank(mesh_dims[0]) * -(-rows // num_shards), rows)
    local_gradient = gradient.to_local().reshape(-1) if is_dtensor(gradient) else None
    position = first_row * value.shape[1:].numel()
    return _Shard(value.to_local().reshape(-1), local_gradient, position, world_size // num_shards)


def _find_shard_starts(flat_shards: Sequence[Tensor], full_sizes: Sequence[int]) -> list[int]:
    """Return the position of each local flat shard in its factor, which FSDP1 splits in the order of ranks.

    Raises:
        NotImplementedError: If the shards of all processes do not form exactly one tensor, as with `HYBRID_SHARD`.
    """
    distributed = torch.distributed
    world_size = distributed.get_world_size()
    sizes = torch.zeros(world_size, len(flat_shards), dtype=torch.long, device=flat_shards[0].device)
    sizes[distributed.get_rank()] = torch.tensor([shard.numel() for shard in flat_shards])
    stacked = _all_reduce(sizes, distributed.ReduceOp.SUM).cpu()
    if stacked.sum(0).tolist() != list(full_sizes):
        raise NotImplementedError(
            f"BudgetAllocator requires one copy of the {sum(full_sizes)} factor entries over all {world_size} "
            f"processes, got {int(stacked.sum())} entries; use FSDP1's sharding_strategy FULL_SHARD or SHARD_GRAD_OP, "
            "FSDP2 or DDP"
        )
    return stacked[: distributed.get_rank()].sum(0).tolist()


def _all_reduce(values: Tensor, operation: Any) -> Tensor:
    """Reduce a tensor over all processes; NCCL requires a tensor on the GPU."""
    device = values.device
    if torch.distributed.get_backend() == "nccl":
        values = values.cuda()
    torch.distributed.all_reduce(values, operation)
    return values.to(device)
