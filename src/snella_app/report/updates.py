"""Updates of weight matrices, computed from an adapter file, and their figures.

An update is the matrix that an adapter adds to a weight matrix. A fused layer contains several matrices, such as q, k,
and v, which have separate updates.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from safetensors import safe_open
from torch import Tensor

from snella.autograd import sparsify_update
from snella.config import SnellaConfig
from snella.kernels import Factors
from snella.update import Update, UpdateSpec
from snella_app.records.run import MatrixInfo
from snella_app.report.inspect import AdapterFile
from snella_app.report.style import ACCENT, INK, MUTED, WARM, add_legend, new_panels, shortened, signed_map
from snella_app.text import percent_text

_PREFIX = "base_model.model."
_PARTS = ("A", "B", "piece_coeff", "alpha", "beta", "temperature")
_QUERY = re.compile(r"(^|[._])(to_)?(q|query|q_proj)$")
_LORA_ALPHA = 8  # PEFT's default
MAX_CELLS = 128
"""Maximum number of rows and columns of a drawn matrix; larger matrices are downsampled."""

UpdateSource = tuple[dict[str, tuple[int, int]], Callable[[str], Tensor]]
"""Shapes `[out, in]` by matrix name, and a function that returns the scaled update of a matrix by name, in float32."""


def adapter_updates(adapter: AdapterFile, infos: Mapping[str, MatrixInfo]) -> UpdateSource | None:
    """Return the updates of a SNELLA or LoRA adapter file, or None for other adapters.

    Other adapters include DoRA, LoRA with different ranks or scalings per layer, and LoRA on convolutions. `infos`
    contains the known matrices by name.
    """
    if any(key.endswith(".snella_A") for key in adapter.shapes):
        return _snella_updates(adapter, infos)
    return _lora_updates(adapter) if _is_plain_lora(adapter) else None


def deepest_query(names: Sequence[str]) -> str:
    """Return the name of the last query projection, or of the last matrix if there is no query projection."""
    queries = [name for name in names if _QUERY.search(name)]
    return (queries or list(names))[-1]


def _snella_updates(adapter: AdapterFile, infos: Mapping[str, MatrixInfo]) -> UpdateSource:
    """Return the updates of a SNELLA adapter, computed by the reference implementation."""
    config = SnellaConfig.from_pretrained(str(adapter.path.parent))
    locations: dict[str, tuple[str, int]] = {}
    heights: dict[str, tuple[int, ...]] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for module in _modules(adapter, ".snella_A"):
        groups, n, _ = adapter.shapes[f"{_PREFIX}{module}.snella_A"]
        m = adapter.shapes[f"{_PREFIX}{module}.snella_B"][0]
        names = part_names(module, groups, infos)
        part_rows: list[int] = []
        for group, name in enumerate(names):
            num_rows = infos[name].shape[0] if name in infos else m // groups
            part_rows.append(num_rows)
            locations[name] = (module, group)
            shapes[name] = (num_rows, n)
        heights[module] = tuple(part_rows)
    kernel = config.make_kernel()
    updates: dict[str, list[Tensor]] = {}

    def compute(name: str) -> Tensor:
        module, group = locations[name]
        if module not in updates:
            updates.clear()  # keep only one layer: its matrices are computed together and requested in sequence
            spec = UpdateSpec(kernel, heights[module], config.sparsify_mode, config.scaling)  # type: ignore[arg-type]
            with safe_open(adapter.path, "pt") as file:
                keys = [f"{_PREFIX}{module}.snella_{part}" for part in _PARTS]
                values = [file.get_tensor(key) if key in adapter.shapes else None for key in keys]
                budgets = tuple(file.get_tensor(f"{_PREFIX}{module}.snella_budget").reshape(-1).tolist())
            with torch.no_grad():
                updates[module] = sparsify_update(Update(spec, Factors(*values), budgets))[0]  # type: ignore[arg-type]
        return config.scaling * updates[module][group].float()

    return shapes, compute


def _modules(adapter: AdapterFile, suffix: str) -> list[str]:
    """Return the modules that have a tensor with this suffix, sorted by the numbers in their names."""
    names = [key.removesuffix(suffix).removeprefix(_PREFIX) for key in adapter.shapes if key.endswith(suffix)]
    return sorted(names, key=lambda name: [(len(word), word) for word in re.split(r"\D+", name)])


def _is_plain_lora(adapter: AdapterFile) -> bool:
    """Return whether every update is `scaling · B A`, with matrices A and B in the file and one common scaling."""
    keys = [key for key in adapter.shapes if ".lora_" in key]
    settings = ("use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias")
    if not keys or adapter.config.get("peft_type") != "LORA":
        return False
    for key in keys:
        is_factor = key.endswith((".lora_A.weight", ".lora_B.weight"))
        if not is_factor or len(adapter.shapes[key]) != 2:
            return False
    return not any(adapter.config.get(name) for name in settings)


def _lora_updates(adapter: AdapterFile) -> UpdateSource:
    """Return the updates of a LoRA adapter, `scaling · B A`, with fused qkv layers split into q, k, and v."""
    rank = adapter.config["r"]
    divisor = rank**0.5 if adapter.config.get("use_rslora") else rank
    scaling = adapter.config.get("lora_alpha", _LORA_ALPHA) / divisor
    locations: dict[str, tuple[str, int, int]] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for module in _modules(adapter, ".lora_A.weight"):
        m = adapter.shapes[f"{_PREFIX}{module}.lora_B.weight"][0]
        n = adapter.shapes[f"{_PREFIX}{module}.lora_A.weight"][1]
        is_fused = module.endswith("qkv") and m % 3 == 0
        num_parts = 3 if is_fused else 1
        names = part_names(module, num_parts, {})
        part_rows = m // num_parts
        locations |= {name: (module, group, part_rows) for group, name in enumerate(names)}
        shapes |= {name: (part_rows, n) for name in names}

    def compute(name: str) -> Tensor:
        module, group, rows = locations[name]
        with safe_open(adapter.path, "pt") as file:
            A, B = (file.get_tensor(f"{_PREFIX}{module}.lora_{letter}.weight").float() for letter in "AB")
        return scaling * (B[group * rows : (group + 1) * rows] @ A)

    return shapes, compute


def part_names(module: str, groups: int, infos: Mapping[str, MatrixInfo]) -> list[str]:
    """Return the names of the matrices in a layer, which is fused if `groups` is more than 1.

    If `infos` contains the matrices, their names there are returned. Otherwise, the names end with q, k, and v for
    three matrices, and with an index for any other number of matrices.
    """
    if groups == 1:
        return [module]
    known = [name for name in infos if name.rpartition(".")[0] == module]
    if len(known) == groups:
        return known
    suffixes = list("qkv") if groups == 3 else [str(index) for index in range(groups)]
    return [f"{module}.{suffix}" for suffix in suffixes]


def _downsample(values: Tensor, side: int = MAX_CELLS) -> np.ndarray:
    """Downsample a matrix to at most `side` cells per side. Each cell shows its largest entry in magnitude."""
    cell = tuple(max(1, -(-size // side)) for size in values.shape)
    _, indices = F.max_pool2d(values.abs()[None], cell, ceil_mode=True, return_indices=True)
    return values.flatten()[indices[0]].numpy()


def draw_updates(updates: Mapping[str, Tensor], name: str) -> Figure:
    """Draw one panel per update, with the signs and magnitudes of its entries.

    Each panel has its own color scale, which ends at the 99% quantile of the nonzero magnitudes drawn.
    """
    columns = min(len(updates), 3)
    panel_rows = -(-len(updates) // columns)
    aspect = max(value.shape[0] / value.shape[1] for value in updates.values())
    titles = [shortened(label, 28) for label in updates]
    panel_height = min(max(250 * aspect, 110), 420)
    figure, panels = new_panels(270 * columns, (panel_height + 50) * panel_rows + 60, titles, columns)
    for axes, value in zip(panels, updates.values(), strict=True):
        drawn = _downsample(value)
        limit = float(np.quantile(np.abs(drawn)[drawn != 0], 0.99)) if drawn.any() else 1.0
        outputs, inputs = value.shape
        axes.grid(False)
        cmap = signed_map()
        extent = (0, inputs, outputs, 0)
        axes.imshow(drawn, cmap=cmap, vmin=-limit, vmax=limit, extent=extent, interpolation="none", aspect="equal")
        density = percent_text(float(value.count_nonzero()) / value.numel())
        axes.set_xlabel(f"{density} changed, max {value.abs().max():.2g}")
        axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes.spines[:].set(visible=True, color=MUTED)
    figure.suptitle(f"Update of {name}", fontsize=13, fontweight="bold", color=INK)
    add_legend(figure, [Patch(color=ACCENT), Patch(color=WARM)], ["increased", "decreased"])
    return figure
