"""Diagnosis of a machine: hardware, versions, backend correctness, and time of merging and of training steps."""

from __future__ import annotations

import os
import platform
import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from snella._utils import nvidia_driver
from snella.autograd import compute_effective_weight
from snella.backends import choose_backend
from snella.kernels import Factors, make_kernel
from snella.ops import has_bfloat16_instructions
from snella.update import Update, UpdateSpec
from snella_app.console import counted, make_console, make_table, print_line
from snella_app.device import synchronized_time
from snella_app.files import create_folder, write_json
from snella_app.records.record import plain
from snella_app.text import bytes_text
from snella_lab.bench.bench import BenchConfig, bench
from snella_lab.bench.reference import DTYPES, BackendCheck, check_backend
from snella_lab.provenance import conditions, processor_name

_PACKAGES = ("snella", "torch", "peft", "timm", "triton", "numba", "numpy")
_MERGES = 20  # timed calls
_MERGED_SHAPES = {(768, 768): 48, (3072, 768): 24}
"""Number of adapted matrices in a ViT-B by shape. The 12 matrices of 768×3072 count as 3072×768."""


@dataclass
class Diagnosis:
    """Results of `snella doctor`.

    Attributes:
        machine: Operating system, CPU, memory, versions, GPUs, and driver.
        checks: One check per device, backend, and dtype.
        steps: Rows of `snella bench` for LoRA, full fine-tuning, and SNELLA.
        merges: Times of merging one matrix, i.e. computing its update and adding it to the weight; see `time_merges`.
    """

    machine: dict[str, Any]
    checks: list[BackendCheck] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    merges: list[dict[str, Any]] = field(default_factory=list)

    @property
    def wrong(self) -> list[BackendCheck]:
        """Checks with wrong results."""
        return [check for check in self.checks if check.verdict == "wrong"]


def diagnose(
    *, time_steps: bool = True, out: str | Path | None = None, console: Console | None = None, rounds: int = 3
) -> Diagnosis:
    """Describe the machine, check each backend against the reference, and time merging and training steps of a ViT-B.

    Merging computes SNELLA's update and adds it to the weight. Steps are timed on the GPU if there is one, with batch
    size 64 in float32 and in bfloat16; otherwise, they are timed on the CPU, with batch size 4 in float32.

    Args:
        time_steps: If True, time training steps and merging.
        out: JSON file for the results. None writes no file.
        console: Output console. Defaults to standard output.
        rounds: Timed steps per method.
    """
    console = console or make_console()
    provenance = conditions(usable_devices()[-1], _PACKAGES)
    diagnosis = Diagnosis(describe_machine(provenance["versions"]))
    for name, value in diagnosis.machine.items():
        if isinstance(value, dict):
            text = ", ".join(f"{key} {item}" for key, item in value.items())
        elif isinstance(value, list):
            text = ", ".join(map(str, value))
        else:
            text = str(value)
        print_line(console, f"{name:<13}{text}")
    for device in usable_devices():
        for impl in backends_of(device):
            diagnosis.checks += [check_backend(impl, device, dtype) for dtype in DTYPES]
    table = make_table(("device", "backend", "dtype", "error / limit", "where", "verdict"), ())
    for check in diagnosis.checks:
        ratio = "–" if check.error else f"{100 * check.worst:.0f}%"
        table.add_row(check.device, check.impl, check.dtype, ratio, check.error or check.where, check.verdict)
    console.print(table)
    if time_steps:
        device = usable_devices()[-1]
        is_cpu = device == "cpu"
        config = BenchConfig(
            batch=[4] if is_cpu else [64],
            methods=["lora", "full", "snella"],
            dtype=["fp32"] if is_cpu else ["fp32", "bf16"],
            device=device,
            rounds=rounds,
        )
        diagnosis.steps = bench(config, console)
        diagnosis.merges = time_merges(diagnosis.steps, device)
        merges = make_table(("merge", "backend", "dtype", "milliseconds", "share of a snella step"), ())
        for row in diagnosis.merges:
            share = "–" if row["share"] is None else f"{row['share']:.1%} ({row['matrices']} matrices)"
            size = "{}×{}".format(*row["shape"])
            milliseconds = f"{row['milliseconds']:.2f}"
            merges.add_row(size, row["backend"], row["dtype"], milliseconds, share)
        console.print(merges)
    if out is not None:
        checks = [{**plain(check), "verdict": check.verdict} for check in diagnosis.checks]
        machine = {name: value for name, value in diagnosis.machine.items() if name != "versions"}
        results = {"machine": machine, "checks": checks, "steps": diagnosis.steps, "merges": diagnosis.merges}
        with create_folder(Path(out).parent):
            write_json(Path(out), results | provenance)
        print_line(console, f"results: {out}")
    if diagnosis.wrong:
        names = ", ".join(f"{check.impl} on {check.device} in {check.dtype}" for check in diagnosis.wrong)
        remedy = "set --method-options.impl eager, and "
        if any(check.impl == "eager" for check in diagnosis.wrong):
            remedy = ""
        report = "the file written by --out" if out is None else out
        print_line(console, f"wrong: {names}; {remedy}attach {report} to a bug report")
    else:
        print_line(console, "all available backends are correct")
    return diagnosis


def time_merges(steps: list[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """Time merging one matrix of each shape at rank 8 and sparsity 0.7 with the backend that `impl="auto"` chooses.

    Args:
        steps: Rows of `bench` on this device.
        device: Device of the tensors.

    Returns:
        One row per shape, for each dtype in `steps`. A row contains the median milliseconds of all calls but the first
        and the estimated fraction of the SNELLA step that is spent on merging the ViT-B matrices of this shape in the
        forward pass. The fraction is None if `steps` has no SNELLA row of this dtype.
    """
    rows = []
    for name in dict.fromkeys(row["dtype"] for row in steps):
        step_s: float | None = None
        for step in steps:
            if step["method"] == "snella" and step["dtype"] == name:
                step_s = step["step_s"]
                break
        for shape, matrices in _MERGED_SHAPES.items():
            weight, update = _random_update(*shape, device, getattr(torch, name))
            seconds = []
            for _ in range(_MERGES + 1):
                start = synchronized_time(torch.device(device))
                compute_effective_weight(weight, [update], weight.shape)
                seconds.append(synchronized_time(torch.device(device)) - start)
            merge_s = statistics.median(seconds[1:])
            row = {"shape": list(shape), "backend": update.spec.backend, "dtype": name, "matrices": matrices}
            share = None if step_s is None else round(matrices * merge_s / step_s, 4)
            rows.append({**row, "milliseconds": round(1000 * merge_s, 3), "share": share})
    return rows


def _random_update(m: int, n: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Update]:
    """Return a random weight and an update of rank 8, with the backend that `impl="auto"` chooses for it."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(m, n, generator=generator)
    A = torch.randn(1, n, 8, generator=generator)
    B = torch.randn(m, 8, generator=generator)
    kernel = make_kernel("mix_k")
    coeff = torch.full((1, kernel.num_pieces), 0.1)
    scalars = (coeff, torch.ones(1), torch.zeros(1), torch.ones(1))
    factors = Factors(*(tensor.to(device) for tensor in (A, B, *scalars)))
    spec = UpdateSpec(kernel, (m,))
    spec = replace(spec, backend=choose_backend("auto", spec, factors.A)[0])
    budget = int(0.3 * m * n)  # at sparsity 0.7
    return weight.to(device, dtype), Update(spec, factors, (budget,))


def usable_devices() -> list[str]:
    """Return the available device types, the fastest one last."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def backends_of(device: str) -> tuple[str, str]:
    """Return the backends of a device type: the one that `impl="auto"` prefers, and `eager`."""
    return ("numba" if device == "cpu" else "triton"), "eager"


def describe_machine(versions: dict[str, str]) -> dict[str, Any]:
    """Describe the operating system, CPU, memory, GPUs, and driver, and include the given package versions.

    bfloat16 counts as supported only if the device has instructions for it, not if it is emulated.
    """
    import psutil

    machine: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "processor": f"cpu, {counted(torch.get_num_threads(), 'thread')}, {processor_name()}",
        "memory": bytes_text(psutil.virtual_memory().total),
        "instructions": torch.backends.cpu.get_cpu_capability() + _bfloat16(has_bfloat16_instructions()),
        "versions": versions,
        "gpu": [_describe_gpu(index) for index in range(torch.cuda.device_count())] or "none",
    }
    machine["driver"] = nvidia_driver() or "no NVIDIA driver found"
    if torch.cuda.is_available():
        machine["cuda"] = torch.version.cuda or f"ROCm {torch.version.hip}"
    if threads := os.environ.get("OMP_NUM_THREADS"):
        machine["environment"] = f"OMP_NUM_THREADS={threads}"
    return machine


def _describe_gpu(index: int) -> str:
    """Return the name, memory, compute capability, and bfloat16 support of a GPU."""
    gpu = torch.cuda.get_device_properties(index)
    with torch.cuda.device(index):
        is_supported = torch.cuda.is_bf16_supported(including_emulation=False)
    name = f"{gpu.name}, {bytes_text(gpu.total_memory)}, compute capability {gpu.major}.{gpu.minor}"
    return name + _bfloat16(is_supported)


def _bfloat16(is_supported: bool) -> str:
    """Return text that states whether a device has instructions for bfloat16 products."""
    return f", bfloat16 products: {'yes' if is_supported else 'no'}"
