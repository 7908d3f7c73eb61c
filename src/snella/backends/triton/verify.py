"""First-use check: the Triton kernels of an update on this device against torch operations in float64."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
import triton
from torch import Tensor

from snella._cache_folder import cache_folder
from snella.backends.base import TorchBackend
from snella.backends.triton import backend, backward, forward
from snella.update import Factors, UpdateSpec

ROWS, COLUMNS = (64,), 96
TOLERANCE = 2e-4
"""Tolerance for float32 sums, relative to the largest exact value."""
_NAMES = ("merged weight", "threshold", *(f"gradient of {name}" for name in Factors._fields))
_known: dict[str, str | None] = {}


def failed_check(spec: UpdateSpec, A: Tensor) -> str | None:
    """Return why the Triton kernels fail the check on the device of `A`, or `None` if they pass.

    Merges one matrix of 64×96 with the update's kernel, rank and sparsifier, and compares the effective weight, the
    threshold and every gradient with torch operations in float64. The result is cached in memory and in
    `kernel_checks.json` in the cache folder (`$SNELLA_CACHE`, `$XDG_CACHE_HOME/snella` or `~/.cache/snella`), by
    device, driver, versions and the kernels' source.

    Args:
        spec: Spec of the update; only kernel, sparsifier and scaling matter.
        A: Input-side factors, `[G, n, r]`, for device, dtype and rank.
    """
    key = _key(spec, A)
    if key not in _known:
        stored = _read()
        if key in stored:
            _known[key] = stored[key]
        else:
            _known[key] = _compare(spec, A)
            _write({**stored, key: _known[key]})
    return _known[key]


def _compare(spec: UpdateSpec, A: Tensor) -> str | None:
    """Return the first wrong result with its error, or `None`."""
    spec = replace(spec, row_counts=ROWS, backend="triton")
    factors = _factors(spec, A)
    wide = Factors(*(None if tensor is None else tensor.double() for tensor in factors))  # type: ignore[arg-type]
    budgets = (_clear_budget(spec.merge_matrix(next(spec.matrices(wide)))),)
    generator = torch.Generator("cpu").manual_seed(1)
    base, grad = (torch.randn(ROWS[0], COLUMNS, generator=generator, device="cpu").to(A.device) for _ in range(2))
    results = []
    for computed_by, given in ((backend.TritonBackend(), factors), (TorchBackend(), wide)):
        merged = computed_by.merge(spec, given, budgets)
        dtype = torch.float32 if given is factors else torch.float64
        weight, grad_weight = base.to(dtype), grad.to(dtype)
        out = torch.empty_like(weight)
        computed_by.add_update(spec, merged, weight, out)
        results.append((out, merged.thresholds, *computed_by.grad_factors(spec, merged, grad_weight)))
    scalars = [value.abs().max().item() for value in results[1][4:] if value is not None]
    for number, (name, mine, exact) in enumerate(zip(_NAMES, *results, strict=True)):
        if mine is None or exact is None:
            continue
        # gradients of the kernel's scalars are sums that cancel: the largest of them is the scale of all
        scale = max(scalars) if number >= 4 else exact.abs().max().item()
        error = (mine.double() - exact).abs().max().item()
        if not error <= (TOLERANCE + torch.finfo(mine.dtype).eps) * (scale + 1e-3):
            versions = f"triton {triton.__version__}, torch {torch.__version__}"
            return (
                f"computes the {name} of kernel {spec.kernel.name!r} wrong on {_device_name(A.device)}: largest error "
                f"{error:.2e}, largest value {scale:.2e} ({versions})"
            )
    return None


def _factors(spec: UpdateSpec, A: Tensor) -> Factors:
    """Return random factors and scalars of one matrix, with the rank, dtype and device of `A`."""
    generator, rank = torch.Generator("cpu").manual_seed(0), A.shape[-1]

    def uniform(*shape: int) -> Tensor:
        return (2 * torch.rand(*shape, generator=generator, device="cpu") - 1).to(A.device)

    pieces = spec.kernel.num_pieces
    signs = (-1.0) ** torch.arange(pieces, device=A.device)
    scalars = {
        "piece_coeff": (0.75 + uniform(1, pieces) / 4) * signs,
        "alpha": 1 + uniform(1) / 4,
        "beta": uniform(1) / 4,
        "temperature": 0.8 + uniform(1) / 4,
    }
    given = (scalars[name] if name in spec.kernel.scalars else None for name in Factors._fields[2:])
    return Factors(uniform(1, COLUMNS, rank).to(A.dtype), uniform(ROWS[0], rank).to(A.dtype), *given)


def _clear_budget(delta: Tensor) -> int:
    """Return a budget of 20 to 40 % whose threshold lies in the widest gap, so that rounding moves no entry."""
    magnitudes = delta.abs().flatten().sort(descending=True).values
    first, last = int(0.2 * len(magnitudes)), int(0.4 * len(magnitudes))
    gaps = magnitudes[first:last] - magnitudes[first + 1 : last + 1]
    return first + int(gaps.argmax()) + 1


def _key(spec: UpdateSpec, A: Tensor) -> str:
    """Return the cache key of a result."""
    parts = (_device_name(A.device), _driver(), torch.__version__, triton.__version__, _source_digest())
    return "; ".join((*parts, repr(spec.kernel), spec.mode, f"{spec.scaling:g}", f"r={A.shape[-1]}", str(A.dtype)))


@cache
def _device_name(device: torch.device) -> str:
    """Return name and compute capability of a device."""
    if device.type != "cuda":
        return str(device)
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} ({major}.{minor})"


@cache
def _driver() -> str:
    """Return the version line of the NVIDIA driver, or an empty string."""
    with suppress(OSError):
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0].strip()
    return ""


@cache
def _source_digest() -> str:
    """Return a digest of the kernels' source."""
    files = (forward.__file__, backward.__file__, backend.__file__)
    return hashlib.sha256(b"".join(Path(str(file)).read_bytes() for file in files)).hexdigest()[:16]


def _cache_file() -> Path:
    """Return the file that caches results between processes."""
    return cache_folder() / "kernel_checks.json"


def _read() -> dict[str, str | None]:
    """Read the stored results; empty if the file is missing or corrupt."""
    try:
        stored = json.loads(_cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}


def _write(results: dict[str, str | None]) -> None:
    """Store results atomically; without a writable folder, every process repeats the check."""
    file = _cache_file()
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(results, indent=1), encoding="utf-8")
        os.replace(partial, file)
