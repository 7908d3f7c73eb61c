"""First-use check of the Triton kernels on a device against torch operations in float64."""

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

from snella._utils import cache_folder, nvidia_driver
from snella.backends import TorchBackend
from snella.backends.triton import backend, backward, forward
from snella.kernels import Factors, NormalizedRBF, PLinear
from snella.update import Update, UpdateSpec

ROWS, COLUMNS = (64,), 96
TOLERANCE = 2e-4
"""Tolerance for float32 sums, relative to the largest exact value."""
_GRADIENTS = ("softmax_weighted_sums", "factor_gradients")
_SCALARS = tuple(f"gradient of {name}" for name in Factors._fields[2:])
_LAUNCHES: dict[str, tuple[str, ...]] = {
    "maximum logit": ("softmax_statistics",),
    "inverse sum of exponentials": ("softmax_statistics",),
    "merged matrix": ("merge",),
    "threshold": ("merge", "count_within_bin", "finish_thresholds"),
    "effective weight": ("add_sparse",),
    "gradient of A": _GRADIENTS,
    "gradient of B": _GRADIENTS,
    **dict.fromkeys(_SCALARS, (*_GRADIENTS, "scalar_gradients")),
}
"""Compared results in the order of computation, and the Triton kernels that compute each from the results before it."""

_results: dict[str, str | None] = {}


def failed_check(spec: UpdateSpec, A: Tensor) -> str | None:
    """Return the reason why the Triton kernels fail the check on the device of `A`, or `None` if they pass.

    Merges a 64×96 matrix with the update's kernel, rank, and sparsification mode. Compares the softmax statistics, the
    merged matrix, the threshold, the effective weight, and every gradient with those of torch operations in float64 on
    the CPU. The reason names the Triton kernels that compute the first wrong result. The outcome is cached in memory
    and in `kernel_checks.json` in the cache folder (`$SNELLA_CACHE`, `$XDG_CACHE_HOME/snella`, or `~/.cache/snella`),
    by device, driver, versions, source, kernel, mode, scaling, rank, and dtype. Failures to compile or launch a kernel
    are cached only in memory, because they may be temporary.

    Args:
        spec: Spec of the update; only kernel, mode, and scaling matter.
        A: Input-side factors, `[G, n, r]`; only device, dtype, and rank matter.
    """
    key = _key(spec, A)
    if key not in _results:
        saved = _load_results()
        if key in saved:
            _results[key] = saved[key]
        else:
            try:
                _results[key] = _compare(spec, A)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # compilers, drivers, and launchers raise many types
                lines = str(error).strip().splitlines() or ["no message"]
                failed = f"cannot run the Triton kernels for kernel={spec.kernel.name!r} on {_device_name(A.device)}"
                _results[key] = f"{failed}: {type(error).__name__}: {lines[0]}"
            else:
                _save_results({**saved, key: _results[key]})
    return _results[key]


def _compare(spec: UpdateSpec, A: Tensor) -> str | None:
    """Return a message about the first wrong result, or `None` if all are correct."""
    spec = replace(spec, row_counts=ROWS, backend="triton")
    factors = _factors(spec, A)
    wide_factors = _cast(factors, torch.float64)
    budgets = (_unambiguous_budget(spec.merge_matrix(next(spec.matrices(wide_factors)))),)
    generator = torch.Generator("cpu").manual_seed(1)
    base, grad = (torch.randn(ROWS[0], COLUMNS, generator=generator, device="cpu") for _ in range(2))
    # the reference runs on the CPU, because on a GPU, torch would first have to load each of its kernels
    sides = (
        (backend.TritonBackend(), _cast(factors, A.device), base.to(A.device), grad.to(A.device)),
        (TorchBackend(), wide_factors, base.double(), grad.double()),
    )
    results = []
    for implementation, inputs, weight, grad_weight in sides:
        prepared = implementation.prepare(Update(spec, inputs, budgets))
        out = torch.empty_like(weight)
        implementation.add_update(spec, prepared, weight, out)
        stats = prepared.workspace or _softmax_stats(spec, inputs)
        grads = implementation.grad_factors(spec, prepared, grad_weight)
        tensors = (*stats, prepared.delta[0], prepared.thresholds, out, *grads)
        results.append([None if tensor is None else tensor.to("cpu") for tensor in tensors])
    exact = zip(_LAUNCHES, results[1], strict=True)
    sizes = {name: value.abs().max().item() for name, value in exact if value is not None}
    for name, actual, expected in zip(_LAUNCHES, *results, strict=True):
        if actual is None or expected is None:
            continue
        # gradients of the kernel's scalars are sums with cancellation: use the largest as the scale of all
        group = _SCALARS if name in _SCALARS else (name,)
        scale = max(sizes[other] for other in group if other in sizes)
        error = (actual.double() - expected).abs().max().item()
        if not error <= (TOLERANCE + torch.finfo(actual.dtype).eps) * (scale + 1e-3):
            has_softmax = isinstance(spec.kernel, NormalizedRBF)
            launches = [launch for launch in _LAUNCHES[name] if has_softmax or not launch.startswith("softmax")]
            versions = f"triton {triton.__version__}, torch {torch.__version__}"
            return (
                f"computes a wrong {name} in {' or '.join(launches)} for kernel={spec.kernel.name!r} on "
                f"{_device_name(A.device)}: largest error {error:.2e}, largest value {scale:.2e} ({versions})"
            )
    return None


def _softmax_stats(spec: UpdateSpec, factors: Factors) -> backend.SoftmaxStats:
    """Return the softmax statistics of one matrix, computed by torch operations."""
    if not isinstance(spec.kernel, NormalizedRBF):
        return backend.SoftmaxStats(None, None)
    A, B, scalars = next(spec.matrices(factors))
    logits = PLinear.merge(spec.kernel, A, B, scalars)
    logits = logits if scalars.temperature is None else logits / scalars.temperature
    highest = logits.amax(spec.kernel.softmax_dim)
    return backend.SoftmaxStats(highest, (highest - logits.logsumexp(spec.kernel.softmax_dim)).exp())


def _factors(spec: UpdateSpec, A: Tensor) -> Factors:
    """Return random factors, with the rank and dtype of `A`, and random scalars, for one matrix on the CPU."""
    generator, rank = torch.Generator("cpu").manual_seed(0), A.shape[-1]

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(*shape, generator=generator, device="cpu") - 1

    pieces = spec.kernel.num_pieces
    signs = (-1.0) ** torch.arange(pieces, device="cpu")
    scalars = {
        "piece_coeff": (0.75 + uniform(1, pieces) / 4) * signs,
        "alpha": 1 + uniform(1) / 4,
        "beta": uniform(1) / 4,
        "temperature": 0.8 + uniform(1) / 4,
    }
    scalar_values = (scalars[name] if name in spec.kernel.scalars else None for name in Factors._fields[2:])
    return Factors(uniform(1, COLUMNS, rank).to(A.dtype), uniform(ROWS[0], rank).to(A.dtype), *scalar_values)


def _cast(factors: Factors, target: torch.dtype | torch.device) -> Factors:
    """Convert the tensors to a dtype or copy them to a device."""
    return Factors(*(None if tensor is None else tensor.to(target) for tensor in factors))  # type: ignore[arg-type]


def _unambiguous_budget(delta: Tensor) -> int:
    """Return the budget, 20 to 40% of the entries, with the widest gap at its threshold, to be robust to rounding."""
    magnitudes = delta.abs().flatten().sort(descending=True).values
    first, last = int(0.2 * len(magnitudes)), int(0.4 * len(magnitudes))
    gaps = magnitudes[first:last] - magnitudes[first + 1 : last + 1]
    return first + int(gaps.argmax()) + 1


def _key(spec: UpdateSpec, A: Tensor) -> str:
    """Return the cache key of a result."""
    parts = (_device_name(A.device), nvidia_driver(), torch.__version__, triton.__version__, _source_digest())
    return "; ".join((*parts, repr(spec.kernel), spec.mode, f"{spec.scaling:g}", f"r={A.shape[-1]}", str(A.dtype)))


@cache
def _device_name(device: torch.device) -> str:
    """Return the name and compute capability of a device."""
    if device.type != "cuda":
        return str(device)
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} ({major}.{minor})"


@cache
def _source_digest() -> str:
    """Return a digest of the source of the kernels and of this check."""
    files = (forward.__file__, backward.__file__, backend.__file__, __file__)
    return hashlib.sha256(b"".join(Path(str(file)).read_bytes() for file in files)).hexdigest()[:16]


def _cache_file() -> Path:
    """Return the path of the results on disk."""
    return cache_folder() / "kernel_checks.json"


def _load_results() -> dict[str, str | None]:
    """Return the results on disk, or an empty dict if the file is missing or corrupt."""
    try:
        saved = json.loads(_cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # RuntimeError: no home directory
        return {}
    return saved if isinstance(saved, dict) else {}


def _save_results(results: dict[str, str | None]) -> None:
    """Save the results atomically; without a writable folder, every process repeats the check."""
    with suppress(OSError, RuntimeError):
        file = _cache_file()
        temporary = file.with_name(f".{file.name}.{os.getpid()}.partial")
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(results, indent=1), encoding="utf-8")
        os.replace(temporary, file)
