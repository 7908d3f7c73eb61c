"""What the saved adapter holds, from the header of its safetensors file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from snella.analysis.run_files import MatrixInfo

__all__ = ["AdapterFile", "read_adapter", "saved_budgets"]

_WAY_OUT = "copy the adapter again, or train again with `--overwrite`"
_FILES = ("adapter_model.safetensors", "trainable.safetensors")
_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_UNTRAINED = ("snella_budget", "snella_support", "positions")
_PART = re.compile(r"\.(?P<part>(?:snella|lora)_(?!embedding)\w+?)(?:\.weight|\.\d+)?$")


@dataclass(frozen=True)
class AdapterFile:
    """The adapter's file: its tensors by name, without their values.

    `parts` counts the values of each part: `snella_A`, `snella_B`, the scalars, `positions` of entries that are trained
    one by one, and `other` for the head.
    """

    path: Path
    size_bytes: int
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    parts: Mapping[str, int]
    config: Mapping[str, Any]

    @property
    def parameters(self) -> int:
        """Number of trained values: all but budgets, masks and positions, which are integers."""
        return sum(count for part, count in self.parts.items() if part not in _UNTRAINED)

    @property
    def value_bytes(self) -> int:
        """Bytes of one trained value: those of the widest floating-point type in the file."""
        return max((_BYTES.get(kind, 4) for kind in self.dtypes.values() if kind.startswith(("F", "BF"))), default=4)


def read_adapter(run: str | Path) -> AdapterFile | None:
    """Read the header of the run's adapter and the settings beside it; None where no adapter was saved yet.

    Raises:
        ValueError: A file is damaged.
    """
    folder = Path(run) / "adapter"
    path = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if path is None:
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  not a mapping
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            dtypes = {name: str(part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}; {_WAY_OUT}") from error
    parts: dict[str, int] = {}
    for name, shape in shapes.items():
        found = _PART.search(name)
        part = found["part"] if found else "positions" if name.endswith(".indices") else "other"
        parts[part] = parts.get(part, 0) + math.prod(shape)
    return AdapterFile(path, path.stat().st_size, shapes, dtypes, parts, _config(folder))


def saved_budgets(adapter: AdapterFile, matrices: Sequence[MatrixInfo]) -> dict[str, int]:
    """Return the budgets that the adapter itself carries, by matrix name; empty for a method without budgets.

    A fused layer has one entry of `snella_budget` for each of its matrices, in their order.

    Raises:
        ValueError: The file's layers are not those of the matrices.
    """
    budgets: dict[str, int] = {}
    with safe_open(adapter.path, framework="numpy") as file:
        modules = {_module_of(key): key for key in adapter.shapes if key.endswith(".snella_budget")}
        for module, key in modules.items():
            own = (m.name for m in matrices if m.name == module)
            fused = (m.name for m in matrices if m.name.rpartition(".")[0] == module and m.name not in modules)
            names = [*own, *fused]
            values = [int(value) for value in file.get_tensor(key).reshape(-1)]
            if len(names) != len(values):
                raise ValueError(
                    f"{adapter.path}: '{key}' holds {len(values)} budgets, but allocation.json names "
                    f"{len(names)} matrices of '{module}'; it is of another run; train again with `--overwrite`"
                )
            budgets.update(zip(names, values, strict=True))
    return budgets


def _module_of(key: str) -> str:
    """The layer that a budget in a PEFT file belongs to."""
    return key.removesuffix(".snella_budget").removeprefix("base_model.model.")


def _config(folder: Path) -> dict[str, Any]:
    """The settings saved beside the adapter; empty where there are none."""
    for name in ("adapter_config.json", "method.json"):
        file = folder / name
        if file.is_file():
            try:
                values = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{file} is damaged: {error}; {_WAY_OUT}") from error
            return values if isinstance(values, dict) else {}
    return {}
