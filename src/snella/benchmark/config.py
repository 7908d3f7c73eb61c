"""`BenchConfig`: the configuration of a benchmark."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Literal

import timm
import torch

from snella.benchmark.baselines import BASELINES, Workload

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
REFERENCE = "lora"
"""The reference baseline of ratios."""


@dataclass
class BenchConfig:
    """Settings of `snella bench`.

    Args:
        backbones: timm names; their weights are random.
        batch: Images per step.
        methods: The methods; lora is the reference of ratios.
        r: Ranks.
        sparsity: Fractions of the adapted weights that SNELLA leaves as they are.
        dtype: fp32 or bf16, of weights and activations alike.
        device: cpu, cuda or cuda:1.
        rounds: Steps of each method, of which medians are reported; 0 counts what is kept and takes none.
        memory: Also measure the peak memory of each method, in a process of its own where there is no GPU.
        out: JSON lines file to append to.
        figures: Folder to draw the pictures of all rows in `out` into.
    """

    backbones: list[str] = field(default_factory=lambda: ["vit_base_patch16_224"])
    batch: list[int] = field(default_factory=lambda: [4, 16])
    methods: list[str] = field(default_factory=lambda: ["frozen", "lora", "full", "snella"])
    r: list[int] = field(default_factory=lambda: [8])
    sparsity: list[float] = field(default_factory=lambda: [0.7])
    dtype: list[Literal["fp32", "bf16"]] = field(default_factory=lambda: ["fp32"])
    device: str = "cpu"
    rounds: int = 5
    memory: bool = False
    out: str | None = None
    figures: str | None = None

    def __post_init__(self) -> None:
        """Check everything that can be known without a model, and report all errors together."""
        errors = [f"batch must be at least 1, got {size}" for size in self.batch if size < 1]
        errors += [f"r must be at least 1, got {r}" for r in self.r if r < 1]
        errors += [f"sparsity must be in [0, 1), got {s}" for s in self.sparsity if not 0 <= s < 1]
        errors += [
            f"methods must be among {', '.join(BASELINES)}, got {name!r}"
            for name in self.methods
            if name not in BASELINES
        ]
        errors += [
            f"dtype must be among {', '.join(_DTYPES)}, got {name!r}" for name in self.dtype if name not in _DTYPES
        ]
        errors += [f"backbones must be timm names, got {name!r}" for name in self.backbones if not timm.is_model(name)]
        if self.rounds < 0:
            errors.append(f"rounds must not be negative, got {self.rounds}")
        if self.rounds == 0 and self.memory:
            errors.append("peak memory is that of steps, got memory with rounds=0; leave one out")
        if self.figures is not None and self.out is None:
            errors.append(f"figures are drawn from the rows of a file, got figures={self.figures!r} without out")
        if errors:
            raise ValueError("; ".join(errors))

    def settings(self) -> list[tuple[Workload, int]]:
        """Every combination, with its batch size."""
        axes = (self.backbones, self.r, self.sparsity, self.dtype, self.batch)
        return [
            (Workload(backbone, r, sparsity, _DTYPES[dtype], self.device), batch)
            for backbone, r, sparsity, dtype, batch in itertools.product(*axes)
        ]


def grid(device: str = "cpu", out: str | None = None) -> BenchConfig:
    """The full grid: four ViTs, batches 1 to 64, two ranks, four sparsities, two dtypes, every peer. Hours."""
    return BenchConfig(
        backbones=["vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224", "vit_huge_patch14_224"],
        batch=[1, 4, 16, 64],
        methods=[
            name for name in BASELINES if name in ("snella", "snella-keep-delta") or not name.startswith("snella")
        ],
        r=[8, 32],
        sparsity=[0.0, 0.7, 0.99, 0.9999],
        dtype=["fp32", "bf16"],
        device=device,
        memory=True,
        out=out,
    )
