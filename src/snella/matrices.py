"""Adapted matrices of a model, used by the allocator and the reports.

A fused layer, such as `qkv`, stacks several matrices in one weight, and each matrix has its own budget.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from snella.layer import SnellaLayer

_NUMBERED = re.compile(r"(.*(?:layer|block)_)?\d+")  # "3", or torchvision's "encoder_layer_3"
_INNER_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Names under which `torch.compile`, FSDP, and activation checkpointing store the module that they wrap."""


@dataclass(frozen=True)
class AdaptedMatrix:
    """View of one adapted matrix of a layer, with its factors and budget.

    Args:
        name: Module name, plus the name of the part in fused layers, e.g. `"blocks.0.attn.qkv.q"`.
        module_name: Module name.
        kind: Matrix type: `name` without the block prefix and, in fused layers, without the layer's name, e.g.
            `"attn.q"` or `"mlp.fc1"`.
        depth: Index of the block among all blocks of the module lists that contain an adapted layer, or `None` outside
            blocks. Blocks without submodules, e.g. `nn.Identity`, do not count.
        layer: Layer that contains the matrix.
        adapter_name: Name of the adapter.
        group: Index of the matrix in its layer.
    """

    name: str
    module_name: str
    kind: str
    depth: int | None
    layer: SnellaLayer = field(repr=False)
    adapter_name: str
    group: int

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        return self.layer.row_counts[self.adapter_name][self.group], self.layer.in_features

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def budget(self) -> int:
        """Maximum number of nonzero entries of the update."""
        return self.layer.budgets(self.adapter_name)[self.group]

    @property
    def is_frozen(self) -> bool:
        """True if the budget is 0, so that the gradient of the factors is zero."""
        return self.budget == 0

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """`A` `[in, r]` and `B` `[out, r]`, views of the layer's parameters."""
        return self.slice_factors(self.layer.snella_A[self.adapter_name], self.layer.snella_B[self.adapter_name])

    def slice_factors(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return this matrix's slices of two tensors with the layout of the layer's factors."""
        return A[self.group], B[self.layer.matrix_rows(self.adapter_name)[self.group]]

    def sparse_update(self) -> Tensor:
        """Return the sparse update `S` before scaling, `[out, in]`."""
        return self.layer.sparse_updates(self.adapter_name)[self.group]

    def nonzeros(self) -> int:
        """Count the nonzero entries of the update."""
        return int(torch.count_nonzero(self.sparse_update()))


def adapted_matrices(model: nn.Module, adapter_name: str | None = None) -> list[AdaptedMatrix]:
    """Return the adapted matrices of a model in module order.

    Args:
        model: A model with SNELLA layers, wrapped by PEFT or not.
        adapter_name: Name of the adapter; defaults to the first active one, or `"default"` if none is active.

    Raises:
        ValueError: If the model has no SNELLA layer, or none with this adapter.
    """
    if isinstance(model, BaseTuner):
        model = model.model
    all_layers = {name: module for name, module in model.named_modules() if isinstance(module, SnellaLayer)}
    unwrapped: dict[str, str] = {}  # if `x` and `module.x` are different layers, `module.x` keeps its full name
    for name in sorted(all_layers, key=len):
        unwrapped.setdefault(_strip_wrappers(name), name)
    layers: dict[str, SnellaLayer] = {}
    for name, layer in all_layers.items():
        stripped = _strip_wrappers(name)
        layers[stripped if unwrapped[stripped] == name else name] = layer
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no SNELLA layer; wrap it with get_peft_model(model, SnellaConfig(…)) first"
        )
    if adapter_name is None:
        adapter_name = next((name for layer in layers.values() for name in layer.active_adapters), "default")
    adapted_layers = {name: layer for name, layer in layers.items() if adapter_name in layer.snella_A}
    if not adapted_layers:
        adapter_names = sorted({name for layer in layers.values() for name in layer.snella_A})
        raise ValueError(f"adapter_name must be one of {adapter_names}, got {adapter_name!r}")
    depths = _number_blocks(model, adapted_layers)
    matrices = []
    for name, layer in adapted_layers.items():
        block, inner_name = _split_name(name)
        depth = depths.get(_strip_wrappers(block))
        count = len(layer.row_counts[adapter_name])
        part_names = [str(group) for group in range(count)]
        if count == 3:  # assumed to be query, key, and value, because the names of fused layers differ between models
            part_names = ["q", "k", "v"]
        elif count == 2 and name.rpartition(".")[2] == "kv":
            part_names = ["k", "v"]
        for group, part_name in enumerate(part_names):
            matrix_name, kind = name, inner_name
            if count > 1:
                matrix_name = f"{name}.{part_name}"
                kind = f"{inner_name.rpartition('.')[0]}.{part_name}".lstrip(".")
            matrix = AdaptedMatrix(
                name=matrix_name,
                module_name=name,
                kind=kind,
                depth=depth,
                layer=layer,
                adapter_name=adapter_name,
                group=group,
            )
            matrices.append(matrix)
    return matrices


def _strip_wrappers(name: str) -> str:
    """Remove the parts that wrappers, e.g. PEFT, DDP, and `torch.compile`, add to a module name."""
    parts = name.split(".")
    while parts and parts[0] in {"base_model", "module", *_INNER_WRAPPERS}:
        wrapper = parts.pop(0)
        if wrapper == "base_model" and parts and parts[0] == "model":
            parts.pop(0)
    return ".".join(part for part in parts if part not in _INNER_WRAPPERS)


def _number_blocks(model: nn.Module, adapted_layers: Iterable[str]) -> dict[str, int]:
    """Number all blocks of the module lists that contain an adapted layer, including blocks that are not adapted.

    Blocks whose names differ only in the names of wrappers share a number.
    """
    adapted_blocks = [_strip_wrappers(_split_name(name)[0]) for name in adapted_layers]
    patterns = {_mask_indices(block) for block in adapted_blocks if block}
    blocks = dict.fromkeys(_split_name(_strip_wrappers(name))[0] for name, _ in model.named_modules())
    counted_blocks = [block for block in blocks if _mask_indices(block) in patterns]
    return {block: depth for depth, block in enumerate(counted_blocks)}


def _mask_indices(name: str) -> str:
    """Replace the block indices in a name with `#`."""
    masked: list[str] = []
    for part in name.split("."):
        match = _NUMBERED.fullmatch(part)
        if match is None:
            masked.append(part)
        else:
            prefix = match[1] or ""
            masked.append(f"{prefix}#")
    return ".".join(masked)


def _split_name(name: str) -> tuple[str, str]:
    """Split a name after its last block index into the block prefix and the name inside the block."""
    parts = name.split(".")
    positions = [position for position, part in enumerate(parts[:-1]) if _NUMBERED.fullmatch(part)]
    split = positions[-1] + 1 if positions else 0
    return ".".join(parts[:split]), ".".join(parts[split:])
