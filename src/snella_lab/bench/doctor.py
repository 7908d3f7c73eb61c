"""Diagnosis of a machine: hardware and versions, correctness of each backend, and step time."""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from snella.backends import choose_backend, get_backend
from snella.functional import adapted_layer
from snella.kernels import make_kernel
from snella.update import Factors, LinearOp, Update, UpdateSpec
from snella_app.console import make_console, make_table, print_line
from snella_app.files import write_json
from snella_app.text import bytes_text
from snella_lab.bench.bench import BenchConfig, bench
from snella_lab.bench.rows import conditions, device_name

SHAPES = (((1,), 1), ((96,), 80), ((17,), 33), ((40, 40, 40), 64), ((768,), 192))
"""Rows of each matrix in a weight, and columns: one entry, even, odd, fused query/key/value, a ViT layer."""
KERNELS = ("mix_k", "p_linear")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_DRAWS, _RANK, _TOKENS, _KEPT = 8, 8, 6, 0.3
_SCALARS = ("piece_coeff", "alpha", "beta", "temperature")
_PACKAGES = ("snella", "torch", "peft", "timm", "triton", "numba", "numpy")


@dataclass(frozen=True)
class BackendCheck:
    """Comparison of one backend with the float64 reference.

    The error of an output or gradient is the largest absolute error relative to the largest exact value, as the root
    mean square over random samples. The tolerance is `2·max(error of the reference in the same dtype, 8·eps) + eps/2`.

    Attributes:
        device: Device of the tensors.
        impl: Backend.
        dtype: Dtype of input, weight and gradient; factors are float32.
        cases: Number of pairs of kernel and shape.
        worst: Largest ratio of error and tolerance over all cases, outputs and gradients; correct if at most 1.
        where: Kernel, shape and tensor with the largest ratio.
        error: Reason why the backend cannot run; empty if it can.
    """

    device: str
    impl: str
    dtype: str
    cases: int = 0
    worst: float = 0.0
    where: str = ""
    error: str = ""

    @property
    def verdict(self) -> str:
        """`right`, `wrong` or `not available`."""
        if self.error:
            return "not available"
        return "right" if self.worst <= 1 else "wrong"


@dataclass
class Diagnosis:
    """Results of `snella doctor`.

    Attributes:
        machine: Operating system, CPU, threads, memory, versions and torch devices.
        checks: One entry for each device, backend and dtype.
        steps: Rows of `snella bench` for LoRA, full fine-tuning and SNELLA.
    """

    machine: dict[str, Any]
    checks: list[BackendCheck] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)

    @property
    def wrong(self) -> list[BackendCheck]:
        """Backends with wrong results."""
        return [check for check in self.checks if check.verdict == "wrong"]


def diagnose(
    *, time_steps: bool = True, out: str | Path | None = None, console: Console | None = None, rounds: int = 3
) -> Diagnosis:
    """Describe the machine, compare every backend with the reference, and time a training step of a ViT-B.

    Steps are timed on the fastest device: batch size 4 in float32 on a CPU, 64 in float32 and bfloat16 on a GPU.

    Args:
        time_steps: Time training steps, which takes about 30 seconds on two CPU cores.
        out: JSON file for the results.
        console: Output; stdout if None.
        rounds: Timed steps of each method.
    """
    console = console or make_console()
    diagnosis = Diagnosis(describe_machine())
    for name, value in diagnosis.machine.items():
        shown = ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else value
        print_line(console, f"{name:<13}{', '.join(map(str, shown)) if isinstance(shown, list) else shown}")
    for device in usable_devices():
        for impl in ("triton", "numba", "eager"):
            if (impl == "triton") == (device != "cpu") or impl == "eager":
                diagnosis.checks += [check_backend(impl, device, dtype) for dtype in DTYPES]
    table = make_table(("device", "backend", "dtype", "error / limit", "where", "verdict"), ())
    for check in diagnosis.checks:
        ratio = "–" if check.error else f"{100 * check.worst:.0f} %"
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
        checks = [{**asdict(check), "verdict": check.verdict} for check in diagnosis.checks]
        rows = {"machine": diagnosis.machine, "checks": checks, "steps": diagnosis.steps, **conditions("cpu")}
        write_json(Path(out), rows)
        print_line(console, f"results: {out}")
    if diagnosis.wrong:
        names = ", ".join(f"{check.impl} on {check.device} in {check.dtype}" for check in diagnosis.wrong)
        print_line(console, f"wrong: {names}; set --method-options.impl eager and report a bug with the file of --out")
    else:
        print_line(console, "all available backends are correct")
    return diagnosis


def usable_devices() -> list[str]:
    """Return the available device types, the fastest last."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def describe_machine() -> dict[str, Any]:
    """Return operating system, CPU, memory, versions and devices."""
    import psutil

    machine: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "processor": device_name("cpu"),
        "memory": bytes_text(psutil.virtual_memory().total),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "versions": {name: version(name) for name in _PACKAGES if importlib.util.find_spec(name) is not None},
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


def check_backend(impl: str, device: str, dtype: str = "fp32") -> BackendCheck:
    """Compare a backend with the float64 reference on every kernel and shape of this module.

    Args:
        impl: `triton`, `numba` or `eager`.
        device: A torch device.
        dtype: `fp32` or `bf16`, dtype of input, weight and gradient.
    """
    worst, where, cases = 0.0, "", 0
    for kernel in KERNELS:
        for rows, columns in SHAPES:
            try:
                ratios = _ratios(kernel, rows, columns, impl, device, DTYPES[dtype])
            except (ImportError, NotImplementedError) as error:
                return BackendCheck(device, impl, dtype, error=str(error))
            cases += 1
            name = max(ratios, key=lambda name: ratios[name] if ratios[name] == ratios[name] else float("inf"))
            ratio = ratios[name] if ratios[name] == ratios[name] else float("inf")
            if ratio >= worst:
                worst, where = ratio, f"{kernel} [{sum(rows)}, {columns}] {name}"
    return BackendCheck(device, impl, dtype, cases, round(worst, 3), where)


def _ratios(
    kernel: str, rows: tuple[int, ...], columns: int, impl: str, device: str, dtype: torch.dtype
) -> dict[str, float]:
    """Return the ratio of error and tolerance of a backend, for the output and each gradient."""
    exact, plain, actual = [], [], []
    for seed in range(_DRAWS):
        tensors = _tensors(kernel, rows, columns, seed, device, dtype)
        wide = {name: tensor.double() for name, tensor in tensors.items()}
        exact.append(_solve(kernel, rows, wide, "reference"))
        plain.append(_solve(kernel, rows, tensors, "reference"))
        actual.append(_solve(kernel, rows, tensors, impl))
    eps = {name: torch.finfo(tensor.dtype).eps for name, tensor in plain[0].items()}
    reference = {name: max(loss, 8 * eps[name]) for name, loss in _losses(plain, exact).items()}
    # scalar gradients are sums with cancellation, so all scalars share the largest reference error
    scalar_loss = max((reference[name] for name in _SCALARS if name in reference), default=0.0)
    limits = {name: 2 * (scalar_loss if name in _SCALARS else loss) + eps[name] / 2 for name, loss in reference.items()}
    return {name: loss / limits[name] for name, loss in _losses(actual, exact).items()}


def _tensors(
    kernel: str, rows: tuple[int, ...], columns: int, seed: int, device: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Create random input, weight, factors, scalars and gradient of one layer."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(*shape, generator=generator) - 1

    made, groups, m = make_kernel(kernel), len(rows), sum(rows)
    scalars = {
        "piece_coeff": (0.75 + uniform(groups, made.num_pieces) / 4) * (-1.0) ** torch.arange(made.num_pieces),
        "alpha": 1 + uniform(groups) / 4,
        "beta": uniform(groups) / 4,
        "temperature": 0.8 + uniform(groups) / 4,
    }
    factors = {"A": uniform(groups, columns, _RANK), "B": uniform(m, _RANK)}
    factors |= {name: scalars[name] for name in _SCALARS if name in made.scalars}
    base = {"x": uniform(_TOKENS, columns), "weight": uniform(m, columns), "grad_y": uniform(_TOKENS, m)}
    tensors = {name: tensor.to(dtype) for name, tensor in base.items()} | factors
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _solve(kernel: str, rows: tuple[int, ...], tensors: dict[str, Tensor], impl: str) -> dict[str, Tensor]:
    """Return output and gradients of one layer."""
    columns = tensors["weight"].shape[1]
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items() if name != "grad_y"}
    factors = Factors(*(leaves.get(name) for name in Factors._fields))  # type: ignore[arg-type]
    spec = UpdateSpec(make_kernel(kernel), rows)
    spec = replace(spec, backend=choose_backend(impl, spec, leaves["A"])[0])
    if spec.backend not in ("reference", "eager"):
        reason = get_backend(spec.backend).unsupported_reason(spec, leaves["A"])
        if reason is not None:
            raise NotImplementedError(reason)
    budgets = tuple(max(1, int(count * columns * _KEPT)) for count in rows)
    y, _ = adapted_layer(leaves["x"], leaves["weight"], None, [Update(spec, factors, budgets)], LinearOp())
    gradients = torch.autograd.grad(y, list(leaves.values()), tensors["grad_y"])
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def _losses(actual: list[dict[str, Tensor]], exact: list[dict[str, Tensor]]) -> dict[str, float]:
    """Return the root mean square over samples of the largest relative error, by tensor."""
    losses = {}
    for name in exact[0]:
        scale = max(solution[name].abs().max().item() for solution in exact) or 1.0
        pairs = zip(actual, exact, strict=True)
        errors = torch.tensor([(x[name].double() - true[name]).abs().max().item() / scale for x, true in pairs])
        losses[name] = errors.square().mean().sqrt().item()
    return losses
