"""Methods `spt-lora`, `spt-adapter`, and `fixed-mask`: weight selection by sensitivity before training.

SPT is sensitivity-aware visual parameter-efficient fine-tuning, He et al., arXiv 2303.08566. The sensitivity of a
weight is its squared gradient, summed over batches. SPT's budget is the number of parameters to train besides the
head. A matrix with many sensitive weights gets a structured module, i.e. an adapter or a low-rank update. A vector with
many sensitive weights is trained in full. Other selected weights are trained individually, as sparse entries.
`fixed-mask` instead adds SNELLA's merged matrix at the most sensitive weights.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import ceil, sqrt
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import AdamW, Optimizer

from snella.compat.attention import no_op_hook
from snella.config import SnellaConfig
from snella.ops import LinearOp
from snella.targets import count_rows
from snella_app.methods.method import Batches, Method, Options, SelectionData, check_by, integer, number
from snella_app.methods.model_parts import adaptable_layers, is_inside
from snella_app.methods.partial import train_head
from snella_lab.methods.adapter import Adapter
from snella_lab.methods.calibration import loss_of, rank_entries, selection_data, squared_gradients
from snella_lab.methods.sparse_update import (
    MaskedUpdate,
    SparseEntries,
    SparseUpdate,
    merge_sparse,
    require_sparse,
    stored_indices,
)

_RULES = {
    "r": integer(),
    "budget": number(1e-6),
    "alpha": number(1),
    "beta": number(1),
    "calibration_batches": integer(),
}

_VIT_B_WEIGHTS = 84_934_656
"""Number of weights in the adapted matrices of a ViT-B/16."""
_FROZEN_PARTS = {"patch_embed", "patch_embedding", "patch_merging", "downsample", "stem"}
"""Names of modules whose vectors (biases, norms, and layer scales) stay frozen."""

Structure = Callable[[int, int, int], nn.Module]
"""Constructor `(rows, columns, r)` of a structured module for one matrix, where `r` is the rank or bottleneck width.

The module maps an `SptLayer`, its prepared input `x`, and the output `h` of the matrix to the adapted output. A
mergeable module has a method `delta` that returns its weight update, `[rows, columns]`.
"""


class SptLayer(SparseUpdate):
    """Layer with trainable sparse entries, and structured modules for some of its matrices.

    Args:
        base_layer: Frozen layer.
        indices: Ascending positions of the sparse entries, all in matrices without a module.
        row_counts: Number of rows of each matrix in the weight. A fused qkv weight contains three matrices.
        structured: Structured modules by matrix index.
    """

    def __init__(
        self, base_layer: nn.Module, indices: Tensor, row_counts: Sequence[int], structured: Mapping[int, nn.Module]
    ) -> None:
        super().__init__(base_layer, indices)
        self.row_counts = list(row_counts)
        self.structured = nn.ModuleDict({str(index): module for index, module in structured.items()})
        self.structured.to(self.base_layer.weight.device)
        if structured:  # a hook disables the fused function of nn.TransformerEncoderLayer, which ignores the modules
            self.register_forward_pre_hook(no_op_hook)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer with its sparse entries and structured modules."""
        y = super().forward(x)
        if not self.structured:
            return y
        prepared = self.prepare_input(x)
        dim = self.channel_dim
        matrix_outputs = list(y.split(self.row_counts, dim=dim))
        for key, module in self.structured.items():
            matrix_outputs[int(key)] = module(self, prepared, matrix_outputs[int(key)])
        return matrix_outputs[0] if len(matrix_outputs) == 1 else torch.cat(matrix_outputs, dim=dim)

    @property
    def channel_dim(self) -> int:
        """Channel dimension of the output."""
        return -3 if isinstance(self.base_layer, nn.Conv2d) else -1

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Merge the entries and modules into the base layer, and return it."""
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
    """Backbone parameters that SPT trains.

    Args:
        entries: Ascending positions of sparse entries, by parameter name.
        structured: Indices of matrices with a structured module, by layer name.
        dense: Names of fully trained parameters.
    """

    entries: dict[str, Tensor]
    structured: dict[str, tuple[int, ...]]
    dense: tuple[str, ...]


def spend_budget(
    values: Sequence[Tensor], costs: Sequence[int], thresholds: Sequence[int], budget: int, spent: int = 0
) -> tuple[list[bool], list[Tensor]]:
    """Select the most sensitive weights in descending order until the budget is spent exactly.

    A weight costs 1. Once `thresholds[g]` weights of group `g` are selected, the group switches to its structured
    module at a cost of `costs[g]`, if the remaining budget allows it. The module replaces the group's selected weights,
    whose cost is refunded. The group's other weights are skipped at no cost.

    Args:
        values: Nonnegative sensitivities of each group, of any shape.
        costs: Parameter count of each group's module.
        thresholds: Number of selected weights that triggers each module, at least 1 and at most its cost.
        budget: Number of parameters to spend.
        spent: Part of the budget that is already spent.

    Returns:
        Two lists with one item per group: whether the group uses its module, and the ascending positions of its
        selected weights, empty if it uses the module. The total cost is exactly `budget - spent`.

    Raises:
        ValueError: If all groups together cost less than `budget - spent`.
    """
    total = sum(tensor.numel() for tensor in values)
    is_structured = [False] * len(values)
    selected: list[list[int]] = [[] for _ in values]
    remaining = budget - spent
    num_seen = 0
    num_ranked = min(total, 4 * budget)  # may be too few, because some are skipped; extended below
    while remaining and num_seen < total:
        groups_by_rank, positions = rank_entries(values, num_ranked)
        for group, position in zip(groups_by_rank[num_seen:].tolist(), positions[num_seen:].tolist(), strict=True):
            num_seen += 1
            if is_structured[group]:
                continue
            extra_cost = costs[group] - len(selected[group])
            if len(selected[group]) + 1 >= thresholds[group] and extra_cost <= remaining:
                is_structured[group] = True
                selected[group] = []
                remaining -= extra_cost
            else:
                selected[group].append(position)
                remaining -= 1
            if not remaining:
                break
        num_ranked = min(total, 4 * num_ranked)
    if remaining:
        raise ValueError(
            f"budget must be at most {(budget - remaining) / 1e6:.10g} million parameters, the maximum for this model "
            f"and r, got {budget / 1e6:.10g}"
        )
    return is_structured, [torch.tensor(sorted(positions), dtype=torch.int64) for positions in selected]


def budget_of(options: Options, model: nn.Module, head: str, vit_b_budget: float = 0.4) -> int:
    """Return the budget as a number of parameters.

    The default is `vit_b_budget` million for a ViT-B/16, and proportional to the number of adapted weights for other
    models.
    """
    if "budget" in options:
        return round(options["budget"] * 1e6)
    weights = sum(model.get_parameter(f"{name}.weight").numel() for name in matrix_layers(model, head))
    return max(1, round(vit_b_budget * 1e6 * weights / _VIT_B_WEIGHTS))


def matrix_layers(model: nn.Module, head: str) -> list[str]:
    """Return the names of the layers that LoRA and SNELLA adapt and that a `SparseUpdate` can wrap.

    Output projections of `nn.MultiheadAttention` are excluded. The attention module reads their weights without calling
    them, so structured modules would have no effect.

    Raises:
        ValueError: See `require_sparse`.
    """
    names = [
        name
        for name in adaptable_layers(model, head)
        if not isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)
    ]
    return require_sparse(model, names, head)


def rows_of(model: nn.Module, name: str) -> tuple[int, ...]:
    """Return the number of rows of each matrix in a layer's weight. A fused qkv weight contains three matrices."""
    weight = model.get_parameter(f"{name}.weight")
    parent = model.get_submodule(name.rpartition(".")[0])
    return count_rows(name, len(weight), weight[0].numel(), parent, "auto")


def select(model: nn.Module, head: str, options: Options, data: SelectionData, structure: Structure) -> SptSelection:
    """Select exactly `budget_of(...)` backbone parameters by sensitivity.

    Raises:
        ValueError: If the model has no layer to adapt or already has sparse layers, the budget exceeds the model's
            maximum or does not exceed the class token's size, or `squared_gradients` rejects the data.
    """
    layers = matrix_layers(model, head)
    dense_names = [name for name, _ in model.named_parameters() if name == "cls_token"]
    budget = budget_of(options, model, head)
    token_size = sum(model.get_parameter(name).numel() for name in dense_names)
    if budget <= token_size:
        raise ValueError(
            f"budget must exceed {token_size / 1e6:g} million parameters, the size of the class token, got "
            f"{budget / 1e6:g}"
        )
    # biases, norms, and layer scales, except in the patch embedding, stem, and downsampling
    vector_names = [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 1 and not is_inside(name, head) and not _FROZEN_PARTS.intersection(name.split("."))
    ]
    names = [*(f"{name}.weight" for name in layers), *vector_names]
    sensitivities = squared_gradients(model, names, data, loss_of(data), options.get("calibration_batches", 8))
    r = options.get("r", 8)
    alpha = options.get("alpha", 10)
    beta = options.get("beta", 5)
    # a group is a matrix (layer, index, position of its first entry in the weight) or a vector (parameter, -1, 0)
    groups: list[tuple[str, int, int]] = []
    values = []
    costs = []
    thresholds = []
    for name in layers:
        sensitivity = sensitivities.pop(f"{name}.weight")
        matrix = sensitivity.view(len(sensitivity), -1)
        for index, (start, stop) in enumerate(pairwise(accumulate(rows_of(model, name), initial=0))):
            groups.append((name, index, start * matrix.shape[1]))
            values.append(matrix[start:stop])
            with torch.device("meta"):  # only the number of parameters is needed
                module = structure(stop - start, matrix.shape[1], r)
            costs.append(sum(parameter.numel() for parameter in module.parameters()))
            thresholds.append(max(1, ceil(costs[-1] / alpha)))
    for name in vector_names:
        groups.append((name, -1, 0))
        values.append(sensitivities.pop(name))
        costs.append(values[-1].numel())
        thresholds.append(max(1, ceil(costs[-1] / beta)))
    is_structured, selected = spend_budget(values, costs, thresholds, budget, token_size)
    entries: dict[str, list[Tensor]] = {}
    structured: dict[str, list[int]] = {}
    for (name, index, offset), gets_module, positions in zip(groups, is_structured, selected, strict=True):
        is_vector = index < 0
        if gets_module and is_vector:
            dense_names.append(name)
        elif gets_module:
            structured.setdefault(name, []).append(index)
        elif len(positions):
            entries.setdefault(name if is_vector else f"{name}.weight", []).append(positions + offset)
    return SptSelection(
        {name: torch.cat(positions) for name, positions in entries.items()},
        {name: tuple(indices) for name, indices in structured.items()},
        tuple(dense_names),
    )


def apply_selection(model: nn.Module, head: str, selection: SptSelection, r: int, structure: Structure) -> nn.Module:
    """Make the head, the selected weights and vectors, and new structured modules of rank or width `r` trainable."""
    train_head(model, head)
    for name in selection.dense:
        model.get_parameter(name).requires_grad_(True)
    layers = {name: None for name in selection.structured}  # an ordered set of the layers to wrap
    for name, indices in selection.entries.items():
        module_name, _, parameter_name = name.rpartition(".")
        module = model.get_submodule(module_name)
        if model.get_parameter(name).ndim > 1:
            layers[module_name] = None
            continue
        entries = SparseEntries(module.get_parameter(parameter_name), indices)
        parametrize.register_parametrization(module, parameter_name, entries)
    for name in layers:
        row_counts = rows_of(model, name)
        columns = model.get_parameter(f"{name}.weight")[0].numel()
        indices = selection.entries.get(f"{name}.weight", torch.empty(0, dtype=torch.int64))
        modules = {index: structure(row_counts[index], columns, r) for index in selection.structured.get(name, ())}
        model.set_submodule(name, SptLayer(model.get_submodule(name), indices, row_counts, modules))
    return model


def restore_selection(
    model: nn.Module, head: str, options: Options, tensors: Mapping[str, Tensor], structure: Structure
) -> nn.Module:
    """Rebuild the modules of a saved adapter from its tensors."""
    entries: dict[str, Tensor] = {}
    structured: dict[str, set[int]] = {}
    dense: list[str] = []
    for name, tensor in tensors.items():
        base_name = name.replace(".base_layer.", ".")
        if ".structured." in base_name:  # LAYER.structured.INDEX.A
            layer, _, remainder = base_name.partition(".structured.")
            structured.setdefault(layer, set()).add(int(remainder.partition(".")[0]))
        elif base_name.endswith(".indices"):  # LAYER.indices for a weight, MODULE.parametrizations.bias.0.indices
            module, _, vector = base_name.removesuffix(".indices").partition(".parametrizations.")
            parameter_name = vector.partition(".")[0] or "weight"
            entries[f"{module}.{parameter_name}"] = tensor
        elif not base_name.endswith(".values") and not is_inside(base_name, head):
            dense.append(base_name)
    matrix_indices = {name: tuple(sorted(indices)) for name, indices in structured.items()}
    selection = SptSelection(entries, matrix_indices, tuple(dense))
    return apply_selection(model, head, selection, options.get("r", 8), structure)


def merge_selection(model: nn.Module) -> nn.Module:
    """Merge all trained updates into the backbone."""
    merge_sparse(model)
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, str(name), leave_parametrized=True)
    return model


def spt_method(summary: str, source: str, structure: Structure, **fields: Any) -> Method:
    """Create an SPT method whose structured modules come from `structure`; `fields` are other fields of `Method`."""

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
        **fields,
    )


class OutputAdapter(nn.Module):
    """Adapter on the output of one matrix: h + U gelu(D h + d) + u; see `Adapter`."""

    def __init__(self, rows: int, columns: int, r: int) -> None:
        super().__init__()
        self.adapter = Adapter(rows, r)

    def forward(self, layer: SptLayer, x: Tensor, h: Tensor) -> Tensor:
        """Apply the adapter along the channel dimension of `h`."""
        dim = layer.channel_dim
        adapted: Tensor = self.adapter(h.movedim(dim, -1)).movedim(-1, dim)
        return adapted


SPT_ADAPTER = spt_method(
    "the most sensitive weights, and an adapter after each matrix with many of them",
    "SPT-Adapter, He et al., arXiv 2303.08566",
    OutputAdapter,
    unmerged_reason="adds nonlinear bottlenecks after matrices",
)
"""Like `SPT_LORA`, but a matrix with at least `(2·r·rows + r + rows) / alpha` selected weights gets an adapter on its
output, h + U gelu(D h + d) + u."""


class LowRank(nn.Module):
    """Low-rank update of one matrix: h + B A x.

    `A` `[r, columns]` is initialized uniformly in ±1/sqrt(columns), as in LoRA; `B` `[rows, r]` starts at zero.
    """

    def __init__(self, rows: int, columns: int, r: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(r, columns))
        self.B = nn.Parameter(torch.zeros(rows, r))
        nn.init.kaiming_uniform_(self.A, a=sqrt(5))

    def forward(self, layer: SptLayer, x: Tensor, h: Tensor) -> Tensor:
        """Add the low-rank update to `h`."""
        if isinstance(layer.layer_op, LinearOp):
            return h + self.update(x)
        A = self.A.to(x.dtype).view(len(self.A), *layer.base_layer.weight.shape[1:])
        return h + F.conv2d(layer.layer_op(x, A, None), self.B.to(x.dtype)[:, :, None, None])

    def update(self, x: Tensor) -> Tensor:
        """Compute B A x for `x` `[..., columns]`."""
        return F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))

    def delta(self) -> Tensor:
        """Compute B A."""
        return self.B @ self.A


def add_low_rank(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Forward hook: add the update of a linear layer's child `low_rank` to its output."""
    return output + cast(LowRank, module.low_rank).update(inputs[0])


SPT_LORA = spt_method(
    "the most sensitive weights, and a low-rank update for each matrix with many of them",
    "SPT-LoRA, He et al., arXiv 2303.08566",
    LowRank,
    merge=merge_selection,
)
"""SPT trains the head and `budget` million other parameters, chosen by sensitivity.

The sensitivity of a weight is Σ_batches (∂loss/∂w)² over `calibration_batches` batches (default: 8), with the task's
loss and an untrained head. All weights of the adapted matrices are ranked together with the biases, norms, and layer
scales outside the patch embedding, stem, and downsampling:

- A matrix with at least `r·(rows + columns) / alpha` selected weights gets a low-rank update h + B A x instead of
  sparse entries.
- A vector is trained in full if at least `1 / beta` of its entries are selected.
- All other selected weights are trained as sparse entries.
- The class token is always trained and counts toward the budget.

Defaults are `r` 8, `alpha` 10, `beta` 5, and a `budget` of 0.4 for a ViT-B/16, scaled by the number of adapted weights
for other models. If a module exceeds the remaining budget, individual weights use up the rest, so the parameter count
is exact. The authors' code uses the closest possible count.
"""


_MASK_RULES = {"budget": number(1e-6), "calibration_batches": integer()}
_FACTOR_OPTIONS = (
    *("r", "rank_pattern", "kernel", "num_pieces", "softmax_dim", "center_softmax", "scaling", "init_weights"),
    *("learn_piece_coeff", "learn_temperature"),
)
"""Fields of `SnellaConfig` that define ΔW, the matrix that SNELLA merges from two factors, and its initialization."""


def _mask_config(options: Options) -> SnellaConfig:
    """Return the SNELLA configuration of the factors."""
    return SnellaConfig(**{name: options[name] for name in _FACTOR_OPTIONS if name in options})


def _check_mask(options: Options) -> list[str]:
    """Return the errors in the options."""
    errors = check_by(_MASK_RULES)(options)
    try:
        _mask_config(options)
    except (ValueError, TypeError) as error:
        errors.append(str(error))
    return errors


def _build_mask(model: nn.Module, head: str, options: Options, batches: Batches | None) -> nn.Module:
    """Rank the weights of all matrices by sensitivity, and add ΔW at the most sensitive ones."""
    data = selection_data(batches)
    layers = matrix_layers(model, head)
    budget = budget_of(options, model, head)
    weights = [f"{name}.weight" for name in layers]
    total = sum(model.get_parameter(name).numel() for name in weights)
    if budget > total:
        raise ValueError(
            f"budget must be at most {total / 1e6:.10g} million, the size of the adapted matrices, got "
            f"{budget / 1e6:.10g}"
        )
    sensitivities = squared_gradients(model, weights, data, loss_of(data), options.get("calibration_batches", 8))
    layer_indices, positions = rank_entries([sensitivities[name] for name in weights], budget)
    selected = {name: positions[layer_indices == index].sort().values for index, name in enumerate(layers)}
    return _apply_mask(model, head, options, selected)


def _apply_mask(model: nn.Module, head: str, options: Options, selected: Mapping[str, Tensor]) -> nn.Module:
    """Make the head trainable and wrap each layer in a `MaskedUpdate`."""
    config = _mask_config(options)
    train_head(model, head)
    for name, indices in selected.items():
        update = MaskedUpdate(model.get_submodule(name), indices, config, rows_of(model, name), name)
        model.set_submodule(name, update)
    return model


def _restore_mask(model: nn.Module, head: str, options: Options, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Rebuild the layers from the stored positions."""
    return _apply_mask(model, head, options, stored_indices(tensors))


def _mask_optimizer(
    model: nn.Module,
    optimizer_cls: Callable[..., Optimizer] = AdamW,
    *,
    lr: float,
    scalar_lr: float = 1e-4,
    head_lr: float | None = None,
    weight_decay: float = 0.0,
) -> Optimizer:
    """Create an optimizer with the parameter groups of `create_snella_optimizer`."""
    masked_updates = [module for module in model.modules() if isinstance(module, MaskedUpdate)]
    named_tensors = [item for module in masked_updates for item in module.factors.items()]
    factors = [tensor for name, tensor in named_tensors if name in ("A", "B")]
    scalars = [tensor for name, tensor in named_tensors if name not in ("A", "B") and tensor.requires_grad]
    update_ids = {id(tensor) for _, tensor in named_tensors}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in update_ids]
    other_matrices = [p for p in others if p.ndim > 1]
    other_vectors = [p for p in others if p.ndim <= 1]
    other_lr = lr if head_lr is None else head_lr
    groups = [
        {"params": factors, "lr": lr, "weight_decay": weight_decay},
        {"params": scalars, "lr": scalar_lr, "weight_decay": 0.0},
        {"params": other_matrices, "lr": other_lr, "weight_decay": weight_decay},
        {"params": other_vectors, "lr": other_lr, "weight_decay": 0.0},
    ]
    return optimizer_cls([group for group in groups if group["params"]])


FIXED_MASK = Method(
    "SNELLA's merged matrix at the most sensitive weights, selected before training",
    "SNELLA, Shen et al., arXiv 2510.24037, Table XVII; the mask is SPT's, He et al., arXiv 2303.08566",
    _build_mask,
    (*_FACTOR_OPTIONS, *_MASK_RULES),
    suffix="r",
    check=_check_mask,
    needs_batches=True,
    restore=_restore_mask,
    merge=merge_sparse,
    defaults={"lr": 1e-3, "scalar_lr": 1e-4, "head_lr": 1e-3, "weight_decay": 0.0, "r": 8},
    optimizer=_mask_optimizer,
)
"""`fixed-mask` trains the head and SNELLA's factors and scalars. The update is

    S[i, j] = scaling · ΔW[i, j]   if (i, j) is among the `budget` million weights with the largest Σ (∂loss/∂w)²

over all adapted matrices, and 0 elsewhere; the sum is over batches. This is the "pre-defined" row of Table XVII in
the SNELLA paper, with the kernels `p_linear` and `mix_k` (default). The paper does not state the mask size; the default
is SPT's budget, 0.4 for a ViT-B/16 and proportional for other models. `ΔW` and `S` are nonzero at initialization (about
1/m with mix_k, where m is the output width). The mask's positions are saved with the factors.
"""
