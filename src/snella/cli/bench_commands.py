"""`snella bench`: its settings as they are typed, and what it calls."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast


@dataclass
class BenchOptions:
    """Settings of `snella bench`. Several values are separated by commas; every combination is measured.

    Args:
        backbones: timm names; their weights are random.
        batch: Images per step.
        methods: frozen, lora, dora, shira, full, snella, paper and variants of snella, of which snella-keep-delta on
            CUDA alone; ratios are taken to lora.
        r: Ranks.
        sparsity: Fractions of the adapted weights that SNELLA leaves as they are.
        dtype: fp32, bf16, of weights and activations alike.
        device: cpu, cuda or cuda:1.
        rounds: Steps of each contender; medians are reported.
        memory: Also measure the peak memory of each contender.
        grid: Every backbone, batch, rank, sparsity and dtype instead; takes hours.
        out: JSON lines file to append to.
        figures: Folder for the pictures of all rows in `out`.
    """

    backbones: str = "vit_base_patch16_224"
    batch: str = "4,16"
    methods: str = "frozen,lora,full,snella"
    r: str = "8"
    sparsity: str = "0.7"
    dtype: str = "fp32"
    device: str = "cpu"
    rounds: int = 5
    memory: bool = False
    grid: bool = False
    out: str | None = None
    figures: str | None = None


def _bench(settings: dict[str, Any]) -> None:
    """`snella bench`."""
    from snella.benchmark import BenchConfig, bench, grid

    options = BenchOptions(**settings)
    if options.grid:
        bench(grid(options.device, options.out))
        return
    bench(
        BenchConfig(
            backbones=_texts(options.backbones),
            batch=_numbers("batch", options.batch, int),
            methods=_texts(options.methods),
            r=_numbers("r", options.r, int),
            sparsity=_numbers("sparsity", options.sparsity, float),
            dtype=cast(Any, _texts(options.dtype)),
            device=options.device,
            rounds=options.rounds,
            memory=options.memory,
            out=options.out,
            figures=options.figures,
        )
    )


def _texts(value: str) -> list[str]:
    """What stands between the commas."""
    return [part.strip() for part in value.split(",") if part.strip()]


def _numbers(name: str, value: str, kind: type) -> list[Any]:
    """Numbers between the commas.

    Raises:
        ValueError: One of them is none.
    """
    try:
        return [kind(part) for part in _texts(str(value))]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"{name} must be {what} separated by commas, e.g. 4,16; got {value!r}") from None


BENCH_COMMANDS: dict[str, Callable[[dict[str, Any]], None]] = {"bench": _bench}
