"""`spt-lora`, `spt-adapter` and `fixed-mask`: weights that are selected by their sensitivity before training.

SPT is sensitivity-aware visual parameter-efficient fine-tuning, He et al., arXiv 2303.08566.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from math import ceil, sqrt
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import PeftConfig
from torch import Tensor, nn
from torch.nn.utils import parametrize

from snella.config import SnellaConfig
from snella.layer import SnellaLayer
from snella.optimizer import create_snella_optimizer
from snella.targets import count_rows
from snella.update import LinearOp
from snella_app.methods.method import Batches, Method, Options, check_by, number, whole_number
from snella_app.methods.model_parts import adaptable_layers, is_inside, restoring
from snella_app.methods.partial import train_head
from snella_app.methods.peft_methods import inject, merge_adapter, own_fields
from snella_lab.methods.adapter import Adapter
from snella_lab.methods.calibration import SelectionData, loss_of, rank_entries, selection_data, squared_gradients
from snella_lab.methods.sparse_update import SparseEntries, SparseUpdate, can_be_sparse, merge_sparse

_RULES = {
    "r": whole_number(),
    "budget": number(1e-6),
    "alpha": number(1),
    "beta": number(1),
    "calibration_batches": whole_number(),
}

_WEIGHTS_OF_VIT_B = 84_934_656
_FROZEN_PARTS = {"patch_embed", "patch_embedding", "patch_merging", "downsample", "stem"}


class StructuredModule(nn.Module, ABC):
    """What a matrix with many sensitive weights gets instead of single ones.

    One that can be folded has a method `delta`: what it adds to the matrix, `[rows, columns]`.

    Args:
        rows: Of the matrix, the width of its output.
        columns: Of the matrix.
        r: Rank or width of the module.
    """

    def __init__(self, rows: int, columns: int, r: int) -> None:
        super().__init__()

    @staticmethod
    @abstractmethod
    def count(rows: int, columns: int, r: int) -> int:
        """Its parameters."""

    @abstractmethod
    def forward(self, layer: "SptLayer", x: Tensor, h: Tensor) -> Tensor:
        """The changed output of the matrix, given the layer's prepared input `x` and the output `h` so far."""


class SptLayer(SparseUpdate):
    """A layer whose sparse entries are trained, and of whose matrices some carry a structured module.

    Args:
        base_layer: The frozen layer.
        indices: Positions of the sparse entries in the matrices without a module, ascending.
        row_counts: Rows of each matrix that the weight consists of (3 in a fused qkv layer).
        structured: Module by the number of its matrix.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        indices: Tensor,
        row_counts: Sequence[int],
        structured: Mapping[int, StructuredModule],
    ) -> None:
        super().__init__(base_layer, indices)
        self.row_counts = list(row_counts)
        self.structured = nn.ModuleDict({str(group): module for group, module in structured.items()})
        self.structured.to(self.base_layer.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with the sparse entries and the modules at work."""
        y = super().forward(x)
        if not self.structured:
            return y
        prepared, dim = self.prepare_input(x), self.channel_dim
        parts = list(y.split(self.row_counts, dim=dim))
        for key, module in self.structured.items():
            parts[int(key)] = module(self, prepared, parts[int(key)])
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)

    @property
    def channel_dim(self) -> int:
        """The output's dimension along which the rows of the weight lie."""
        return -3 if isinstance(self.base_layer, nn.Conv2d) else -1

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The base layer with entries and modules in its own weight."""
        base = super().merged()
        matrix = self.base_layer.weight.reshape(len(self.base_layer.weight), -1).clone()
        starts = list(accumulate(self.row_counts, initial=0))
        for key, module in self.structured.items():
            rows = slice(starts[int(key)], starts[int(key) + 1])
            matrix[rows] += cast(Any, module).delta().to(matrix.dtype)
        self.base_layer.weight.copy_(matrix.view_as(self.base_layer.weight))
        return base


@dataclass(frozen=True)
class SptSelection:
    """What SPT trains of a backbone besides the head.

    Args:
        entries: Positions of sparse entries, by the name of their weight or vector, ascending.
        structured: Numbers of the matrices with a module, by the name of the layer.
        whole: Parameters that are trained in full.
    """

    entries: dict[str, Tensor] = field(default_factory=dict)
    structured: dict[str, tuple[int, ...]] = field(default_factory=dict)
    whole: tuple[str, ...] = ()


def spend_budget(
    values: Sequence[Tensor], costs: Sequence[int], thresholds: Sequence[int], budget: int
) -> tuple[list[bool], list[Tensor]]:
    """Go down the ranking of all weights until the budget is spent to the last parameter.

    A weight costs 1. Once `thresholds[g]` weights of group `g` are among those passed, the whole group gets a
    structured module for `costs[g]` in their place, if what is left of the budget allows; its other weights are then
    passed for nothing.

    Args:
        values: Sensitivities of each group, not negative, any shapes.
        costs: Parameters of each group's module.
        thresholds: Sensitive weights that earn it, at least 1 and at most the cost.
        budget: Parameters to spend.

    Returns:
        Whether each group is structured, and the ascending positions of the chosen weights of the others (those of
        structured groups are empty). Together they cost exactly `budget`.

    Raises:
        ValueError: Even all groups cannot use up the budget.
    """
    total = sum(tensor.numel() for tensor in values)
    is_structured = [False] * len(values)
    chosen: list[list[int]] = [[] for _ in values]
    left, seen = budget, 0
    looked_at = min(total, 4 * budget)
    while left and seen < total:
        owners, positions = rank_entries(values, looked_at)
        for group, position in zip(owners[seen:].tolist(), positions[seen:].tolist(), strict=True):
            seen += 1
            if is_structured[group]:
                continue
            price = costs[group] - len(chosen[group])
            if len(chosen[group]) + 1 >= thresholds[group] and price <= left:
                is_structured[group], chosen[group] = True, []
                left -= price
            else:
                chosen[group].append(position)
                left -= 1
            if not left:
                break
        looked_at = min(total, 4 * looked_at)
    if left:
        raise ValueError(
            f"budget must be at most {(budget - left) / 1e6:g} million parameters, all that this model and r can use, "
            f"got {budget / 1e6:g}"
        )
    return is_structured, [torch.tensor(sorted(one), dtype=torch.int64) for one in chosen]


def budget_of(options: Options, model: nn.Module, head: str, on_vit_b: float = 0.4) -> int:
    """Parameters to spend: `budget` million, or `on_vit_b` million on a ViT-B/16 and as large a share of others."""
    if "budget" in options:
        return round(options["budget"] * 1e6)
    weights = sum(model.get_parameter(f"{name}.weight").numel() for name in matrix_layers(model, head))
    return max(1, round(on_vit_b * 1e6 * weights / _WEIGHTS_OF_VIT_B))


def matrix_layers(model: nn.Module, head: str) -> list[str]:
    """The layers that LoRA and SNELLA adapt, as far as single weights of them can be trained."""
    return [name for name in adaptable_layers(model, head) if can_be_sparse(model.get_submodule(name))]


def rows_of(model: nn.Module, name: str) -> tuple[int, ...]:
    """Rows of each matrix that a layer's weight consists of: three for a fused qkv layer."""
    weight = model.get_parameter(f"{name}.weight")
    parent = model.get_submodule(name.rpartition(".")[0])
    return count_rows(name, len(weight), weight[0].numel(), parent, "auto")


def vectors(model: nn.Module, head: str) -> list[str]:
    """Biases, norms and layer scales outside of head, patch embedding and stem."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 1 and not is_inside(name, head) and not _FROZEN_PARTS.intersection(name.split("."))
    ]


def select(
    model: nn.Module, head: str, options: Options, data: SelectionData, structure: type[StructuredModule]
) -> SptSelection:
    """Measure the sensitivity and decide what is trained, for exactly `budget` parameters besides the head.

    Args:
        model: Frozen.
        head: Name of its head.
        options: Of the method.
        data: Training data and the task's loss.
        structure: What a matrix with many sensitive weights gets.

    Raises:
        ValueError: The budget is more than the model can use, or less than its class token.
    """
    layers = matrix_layers(model, head)
    whole = [name for name, _ in model.named_parameters() if name == "cls_token"]
    budget = budget_of(options, model, head)
    fixed = sum(model.get_parameter(name).numel() for name in whole)
    if budget <= fixed:
        raise ValueError(
            f"budget must be more than {fixed / 1e6:g} million parameters, those of the class token, "
            f"got {budget / 1e6:g}"
        )
    plain = vectors(model, head)
    names = [*(f"{name}.weight" for name in layers), *plain]
    found = squared_gradients(model, names, data, loss_of(data), options.get("calibration_batches", 8))
    r, alpha, beta = options.get("r", 8), options.get("alpha", 10), options.get("beta", 5)
    groups: list[tuple[str, int, int]] = []
    values, costs, thresholds = [], [], []
    for name in layers:
        sensitivity = found.pop(f"{name}.weight")
        matrix = sensitivity.view(len(sensitivity), -1)
        for group, (start, stop) in enumerate(pairwise(accumulate(rows_of(model, name), initial=0))):
            groups.append((name, group, start * matrix.shape[1]))
            values.append(matrix[start:stop])
            costs.append(structure.count(stop - start, matrix.shape[1], r))
            thresholds.append(max(1, ceil(costs[-1] / alpha)))
    for name in plain:
        groups.append((name, -1, 0))
        values.append(found.pop(name))
        costs.append(values[-1].numel())
        thresholds.append(max(1, ceil(costs[-1] / beta)))
    is_structured, chosen = spend_budget(values, costs, thresholds, budget - fixed)
    entries: dict[str, list[Tensor]] = {}
    structured: dict[str, list[int]] = {}
    for (name, group, offset), gets_module, positions in zip(groups, is_structured, chosen, strict=True):
        if gets_module and group < 0:
            whole.append(name)
        elif gets_module:
            structured.setdefault(name, []).append(group)
        elif len(positions):
            entries.setdefault(name if group < 0 else f"{name}.weight", []).append(positions + offset)
    return SptSelection(
        {name: torch.cat(parts) for name, parts in entries.items()},
        {name: tuple(numbers) for name, numbers in structured.items()},
        tuple(whole),
    )


def apply_selection(
    model: nn.Module, head: str, selection: SptSelection, r: int, structure: type[StructuredModule]
) -> nn.Module:
    """Make the chosen weights, vectors and modules trainable, and the head.

    Args:
        model: Frozen; changed in place.
        head: Name of its head.
        selection: From `select`.
        r: Rank or width of the modules.
        structure: Their class.
    """
    train_head(model, head)
    for name in selection.whole:
        model.get_parameter(name).requires_grad_(True)
    layers = {name: None for name in selection.structured}
    for name, indices in selection.entries.items():
        module_name, _, parameter = name.rpartition(".")
        module = model.get_submodule(module_name)
        if model.get_parameter(name).ndim > 1:
            layers[module_name] = None
            continue
        part = SparseEntries(module.get_parameter(parameter), indices)
        parametrize.register_parametrization(module, parameter, part)
    for name in layers:
        rows, weight = rows_of(model, name), model.get_parameter(f"{name}.weight")
        indices = selection.entries.get(f"{name}.weight", torch.empty(0, dtype=torch.int64))
        modules = {group: structure(rows[group], weight[0].numel(), r) for group in selection.structured.get(name, ())}
        model.set_submodule(name, SptLayer(model.get_submodule(name), indices, rows, modules))
    return model


def restore_selection(
    model: nn.Module, head: str, options: Options, tensors: Mapping[str, Tensor], structure: type[StructuredModule]
) -> nn.Module:
    """The structure of a saved adapter, from the names and shapes of its tensors."""
    entries: dict[str, Tensor] = {}
    structured: dict[str, set[int]] = {}
    whole: list[str] = []
    for name, tensor in tensors.items():
        plain = name.replace(".base_layer.", ".")
        if ".structured." in plain:
            layer, _, rest = plain.partition(".structured.")
            structured.setdefault(layer, set()).add(int(rest.partition(".")[0]))
        elif plain.endswith(".indices"):
            module, _, vector = plain.removesuffix(".indices").partition(".parametrizations.")
            entries[f"{module}.{vector.partition('.')[0] or 'weight'}"] = tensor
        elif not plain.endswith(".values") and not is_inside(plain, head):
            whole.append(plain)
    groups = {name: tuple(sorted(numbers)) for name, numbers in structured.items()}
    with restoring(model):
        selection = SptSelection(entries, groups, tuple(whole))
        return apply_selection(model, head, selection, options.get("r", 8), structure)


def merge_selection(model: nn.Module) -> nn.Module:
    """The backbone with everything that SPT trained in its own weights and vectors."""
    merge_sparse(model)
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, str(name), leave_parametrized=True)
    return model


def spt_method(summary: str, source: str, structure: type[StructuredModule], **own: Any) -> Method:
    """The method that SPT is with one class of structured module; `own` are further fields of `Method`."""

    def build(model: nn.Module, head: str, options: Options, batches: Batches | None) -> nn.Module:
        selection = select(model, head, options, selection_data(batches), structure)
        return apply_selection(model, head, selection, options.get("r", 8), structure)

    def restore(model: nn.Module, head: str, options: Options, tensors: Mapping[str, Tensor]) -> nn.Module:
        return restore_selection(model, head, options, tensors, structure)

    return Method(
        summary,
        source,
        build,
        tuple(_RULES),
        suffix="r",
        check=check_by(_RULES),
        needs_batches=True,
        restore=restore,
        defaults={"lr": 1e-3, "head_lr": 1e-3, "weight_decay": 1e-4, "r": 8},
        **own,
    )


class AdapterBehind(StructuredModule):
    """A bottleneck on the output of one matrix: h + U gelu(D h + d) + u; see `Adapter`."""

    def __init__(self, rows: int, columns: int, r: int) -> None:
        super().__init__(rows, columns, r)
        self.adapter = Adapter(rows, r)

    def forward(self, layer: SptLayer, x: Tensor, h: Tensor) -> Tensor:
        """`h` and what the bottleneck adds, channel by channel."""
        dim = layer.channel_dim
        changed: Tensor = self.adapter(h.movedim(dim, -1)).movedim(-1, dim)
        return changed

    @staticmethod
    def count(rows: int, columns: int, r: int) -> int:
        """Its parameters."""
        return 2 * r * rows + r + rows


SPT_ADAPTER = spt_method(
    "the most sensitive weights, and an adapter behind a matrix that has many of them",
    "SPT-Adapter, He et al., arXiv 2303.08566",
    AdapterBehind,
    unmerged_reason="adds nonlinear bottlenecks behind matrices",
)
"""As `SPT_LORA`, with h + U gelu(D h + d) + u behind a matrix that has at least `(2·r·rows + r + rows) / alpha` weights
above the cut."""


class LowRank(StructuredModule):
    """A low-rank update of one matrix: h + B A x.

    `A` `[r, columns]` starts uniform in ±1/sqrt(columns), as in LoRA, `B` `[rows, r]` at zero.
    """

    def __init__(self, rows: int, columns: int, r: int) -> None:
        super().__init__(rows, columns, r)
        self.A = nn.Parameter(torch.empty(r, columns))
        self.B = nn.Parameter(torch.zeros(rows, r))
        nn.init.kaiming_uniform_(self.A, a=sqrt(5))

    def forward(self, layer: SptLayer, x: Tensor, h: Tensor) -> Tensor:
        """`h` and what the update adds."""
        if isinstance(layer.product, LinearOp):
            return h + self.update(x)
        A = self.A.to(x.dtype).view(len(self.A), *layer.base_layer.weight.shape[1:])
        return h + F.conv2d(layer.product(x, A, None), self.B.to(x.dtype)[:, :, None, None])

    def update(self, x: Tensor) -> Tensor:
        """B A x for `x` `[..., columns]`."""
        return F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))

    def delta(self) -> Tensor:
        """B A."""
        return self.B @ self.A

    @staticmethod
    def count(rows: int, columns: int, r: int) -> int:
        """Its parameters."""
        return r * (rows + columns)


def add_low_rank(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Forward hook: a linear layer's child `low_rank` adds its update to the output."""
    return output + cast(LowRank, module.low_rank).update(inputs[0])


SPT_LORA = spt_method(
    "the most sensitive weights, in low-rank updates where a matrix has many of them",
    "SPT-LoRA, He et al., arXiv 2303.08566",
    LowRank,
    merge=merge_selection,
)
"""Trains exactly `budget` million parameters besides the head, where the task is most sensitive to them.

Sensitivity of a weight: Σ_batches (∂loss/∂w)², over `calibration_batches` batches (8), the loss being the cross entropy
of the untrained head. All weights of the adapted matrices, biases, norms and layer scales are ranked together. A matrix
with at least `r·(rows + columns) / alpha` of its weights above the cut gets h + B A x instead of single weights; a
vector with a share of at least `1 / beta` is trained in full; the rest of what is above the cut is trained weight by
weight. The class token is always trained. Defaults: `r` 8, `alpha` 10, `beta` 5, and `budget` 0.4 on a ViT-B/16 and in
proportion to the adapted weights elsewhere. Where the next module would not fit into what is left of the budget, the
next single weights take its place, so that the count is met exactly; the authors' code takes the nearest count instead.
"""


_OF_THE_SELECTION = ("budget", "calibration_batches")
_OF_THE_COMPETITION = {
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fixed_support", "target_sparsity"),
    *("init_sparsity", "sparsify_mode", "update_dropout", "update_drop_path", "dropout_exclude", "zero_init_ema"),
    *("allocation", "schedule", "importance", "realloc_every", "beta1", "beta2", "min_layer_share", "cache_delta"),
    *("weight_gradient", "impl", "preset"),
}


def _mask_config(head: str, options: Options) -> PeftConfig:
    """SNELLA with a fixed support."""
    own = {name: value for name, value in options.items() if name not in _OF_THE_SELECTION}
    return SnellaConfig(modules_to_save=[head], fixed_support=True, **own)


def _build_mask(model: nn.Module, head: str, options: Options, batches: Batches | None) -> nn.Module:
    """Measure the sensitivity, rank all weights of the matrices, and give each layer its share of the mask."""
    data, layers = selection_data(batches), matrix_layers(model, head)
    budget = budget_of(options, model, head)
    weights = [f"{name}.weight" for name in layers]
    total = sum(model.get_parameter(name).numel() for name in weights)
    if budget > total:
        raise ValueError(
            f"budget must be at most {total / 1e6:g} million, the weights of the adapted matrices, got {budget / 1e6:g}"
        )
    found = squared_gradients(model, weights, data, loss_of(data), options.get("calibration_batches", 8))
    owners, positions = rank_entries([found[name] for name in weights], budget)
    wrapped = inject(model, _mask_config(head, {"target_modules": layers, **options}))
    adapted = wrapped.get_base_model()
    for k, name in enumerate(layers):
        cast(SnellaLayer, adapted.get_submodule(name)).set_support("default", positions[owners == k])
    return wrapped


def _restore_mask(model: nn.Module, head: str, options: Options, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The same structure, its mask still to be loaded."""
    return inject(model, _mask_config(head, {"target_modules": matrix_layers(model, head), **options}))


FIXED_MASK = Method(
    "SNELLA's merged matrix at the most sensitive weights, chosen before training",
    "SNELLA, Shen et al., arXiv 2510.24037, Table XVII; the mask is SPT's, He et al., arXiv 2303.08566",
    _build_mask,
    (*(name for name in own_fields(SnellaConfig) if name not in _OF_THE_COMPETITION), *_OF_THE_SELECTION),
    suffix="r",
    check=check_by({"budget": number(1e-6), "calibration_batches": whole_number()}),
    config=_mask_config,
    needs_batches=True,
    restore=_restore_mask,
    merge=merge_adapter,
    defaults={"lr": 1e-3, "scalar_lr": 1e-4, "head_lr": 1e-3, "weight_decay": 0.0, "r": 8},
    optimizer=create_snella_optimizer,
)
"""Trains the factors and scalars of SNELLA and the head; the update is

    S[i, j] = scaling · ΔW[i, j]   where (i, j) is among the `budget` million weights of largest Σ_batches (∂loss/∂w)²

over all adapted matrices together, and 0 elsewhere: the paper's "pre-defined" row of Table XVII. Its kernels are
`kernel=p_linear` and `mix_k` (default). The paper does not give the size of its mask; the default is SPT's, 0.4 on a
ViT-B/16 and in proportion elsewhere. `ΔW` is not zero at the start (about 1/m with mix_k, m the outputs of the matrix),
so neither is `S`. The mask is saved with the adapter, a bit a weight.
"""
