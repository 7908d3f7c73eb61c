"""Diagnosis of a machine: hardware, versions, backend correctness and step time."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from snella_app.console import make_console, make_table, print_line
from snella_app.files import create_folder, write_json
from snella_app.records.record import plain
from snella_app.text import bytes_text
from snella_lab.bench.bench import BenchConfig, bench
from snella_lab.bench.reference import DTYPES, BackendCheck, check_backend
from snella_lab.provenance import conditions, device_name

_PACKAGES = ("snella", "torch", "peft", "timm", "triton", "numba", "numpy")


@dataclass
class Diagnosis:
    """Results of `snella doctor`.

    Attributes:
        machine: Operating system, CPU, memory, versions and GPUs.
        checks: One check per device, backend and dtype.
        steps: Rows of `snella bench` for LoRA, full fine-tuning and SNELLA.
    """

    machine: dict[str, Any]
    checks: list[BackendCheck] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)

    @property
    def wrong(self) -> list[BackendCheck]:
        """Checks with wrong results."""
        return [check for check in self.checks if check.verdict == "wrong"]


def diagnose(
    *, time_steps: bool = True, out: str | Path | None = None, console: Console | None = None, rounds: int = 3
) -> Diagnosis:
    """Describe the machine, check each backend against the reference, and time training steps of a ViT-B.

    Steps are timed on the fastest device: batch size 4 in float32 on a CPU; 64 in float32 and bfloat16 on a GPU.

    Args:
        time_steps: Time training steps, which takes about 30 seconds on two CPU cores.
        out: JSON file for the results.
        console: Output console; stdout if None.
        rounds: Timed steps per method.
    """
    console = console or make_console()
    provenance = conditions(usable_devices()[-1], _PACKAGES)
    diagnosis = Diagnosis(describe_machine(provenance["versions"]))
    for name, value in diagnosis.machine.items():
        shown = ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else value
        print_line(console, f"{name:<13}{', '.join(map(str, shown)) if isinstance(shown, list) else shown}")
    for device in usable_devices():
        for impl in ("triton", "numba", "eager"):
            if (impl == "triton") == (device != "cpu") or impl == "eager":
                diagnosis.checks += [check_backend(impl, device, dtype) for dtype in DTYPES]
    table = make_table(("device", "backend", "dtype", "error / limit", "where", "verdict"), ())
    for check in diagnosis.checks:
        ratio = "–" if check.error else f"{100 * check.worst:.0f}%"
        table.add_row(check.device, check.impl, check.dtype, ratio, check.error or check.where, check.verdict)
    console.print(table)
    if time_steps:
        device = usable_devices()[-1]
        config = BenchConfig(
            batch=[4] if device == "cpu" else [64],
            methods=["lora", "full", "snella"],
            dtype=["fp32"] if device == "cpu" else ["fp32", "bf16"],
            device=device,
            rounds=rounds,
        )
        diagnosis.steps = bench(config, console)
    if out is not None:
        checks = [{**plain(check), "verdict": check.verdict} for check in diagnosis.checks]
        machine = {name: value for name, value in diagnosis.machine.items() if name != "versions"}
        results = {"machine": machine, "checks": checks, "steps": diagnosis.steps}
        with create_folder(Path(out).parent):
            write_json(Path(out), results | provenance)
        print_line(console, f"results: {out}")
    if diagnosis.wrong:
        names = ", ".join(f"{check.impl} on {check.device} in {check.dtype}" for check in diagnosis.wrong)
        remedy = (
            "" if any(check.impl == "eager" for check in diagnosis.wrong) else "set --method-options.impl eager, and "
        )
        print_line(console, f"wrong: {names}; {remedy}attach the --out file to a bug report")
    else:
        print_line(console, "all available backends are correct")
    return diagnosis


def usable_devices() -> list[str]:
    """Return the available device types, fastest last."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def describe_machine(versions: dict[str, str]) -> dict[str, Any]:
    """Return operating system, CPU, memory and GPUs, with the given package versions."""
    import psutil

    machine: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "processor": device_name("cpu"),
        "memory": bytes_text(psutil.virtual_memory().total),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "versions": versions,
        "gpu": [
            f"{gpu.name}, {bytes_text(gpu.total_memory)}, compute capability {gpu.major}.{gpu.minor}"
            for gpu in (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
        ]
        or "none",
    }
    if torch.cuda.is_available():
        machine["cuda"] = f"{torch.version.cuda}, bf16 {'yes' if torch.cuda.is_bf16_supported() else 'no'}"
    if threads := os.environ.get("OMP_NUM_THREADS"):
        machine["environment"] = f"OMP_NUM_THREADS={threads}"
    return machine
