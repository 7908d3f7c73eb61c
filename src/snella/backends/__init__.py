"""Selection of the backend that computes an update."""

from __future__ import annotations

import importlib.util
from functools import cache, lru_cache
from typing import Literal, get_args

from torch import Tensor

from snella.backends.base import Backend, Gradients, Merged
from snella.update import UpdateSpec

Implementation = Literal["auto", "triton", "numba", "eager", "reference"]


def resolve_implementation(impl: str) -> str:
    """Validate `impl` and return it.

    Raises:
        ValueError: If `impl` is unknown.
    """
    if impl not in get_args(Implementation):
        raise ValueError(f"impl must be one of {list(get_args(Implementation))}, got {impl!r}")
    return impl


@lru_cache(maxsize=1)
def numba_problem() -> str | None:
    """Return the reason why Numba kernels are unavailable on this machine, or `None`."""
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed; install it with: pip install 'snella[fast]'"
    try:
        from snella.backends.numba import backend  # noqa: F401
    except Exception as error:  # numba raises various errors if it is incompatible with numpy, LLVM or the machine
        return f"numba cannot be used: {error}"
    return None


@lru_cache(maxsize=1)
def triton_problem() -> str | None:
    """Return the reason why Triton kernels are unavailable on this machine, or `None`."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; it comes with torch for CUDA, or with: pip install triton"
    try:
        from snella.backends.triton import backend  # noqa: F401
    except Exception as error:  # Triton may be incompatible with torch or the machine
        return f"triton cannot be used: {error}"
    return None


@cache
def get_backend(name: str) -> Backend:
    """Return a backend by name; names other than `numba` and `triton` select the torch backend."""
    if name == "numba":
        from snella.backends.numba.backend import NumbaBackend

        return NumbaBackend()
    if name == "triton":
        from snella.backends.triton.backend import TritonBackend

        return TritonBackend()
    from snella.backends.base import TorchBackend

    return TorchBackend()


def requires_check(A: Tensor) -> bool:
    """Return whether the Triton kernels must pass the first-use check for these factors, as on a GPU."""
    return A.device.type == "cuda"


def choose_backend(impl: str, spec: UpdateSpec, A: Tensor) -> tuple[str, str]:
    """Return the backend for updates with this spec, and the reason for the choice.

    `"auto"` selects `"triton"` for factors on a CUDA device and `"numba"` for factors elsewhere. If this backend is not
    installed or does not support the update, `"auto"` selects `"eager"`. Both backends support the piecewise kernels
    and reject float64 factors. The choice depends only on the machine, the kernel, and the factors' device and dtype,
    so a layer's results are reproducible.

    Args:
        impl: One of `Implementation`.
        spec: Spec of the updates; its `backend` is ignored.
        A: Input-side factors; only device, dtype and size matter.

    Raises:
        ImportError: If `impl` is `"triton"` or `"numba"`, and the package is missing or unusable.
        NotImplementedError: If `impl` is `"triton"` or `"numba"` and does not support the updates.
        RuntimeError: If `impl` is `"triton"` and its kernels fail the first-use check; the message names the error.
        ValueError: If `impl` is unknown.
    """
    if resolve_implementation(impl) in ("eager", "reference"):
        return impl, "set by impl"
    name = "triton" if impl == "triton" or (impl == "auto" and A.device.type == "cuda") else "numba"
    problem = triton_problem() if name == "triton" else numba_problem()
    if problem is not None:
        if impl == name:
            raise ImportError(f"impl={name!r}, but {problem}")
        return "eager", problem
    reason = get_backend(name).unsupported_reason(spec, A)
    if reason is not None:
        if impl == name:
            raise NotImplementedError(f"impl={name!r} {reason}; use impl='eager'")
        return "eager", f"{name} {reason}"
    if name == "triton" and requires_check(A):
        from snella.backends.triton.verify import failed_check

        reason = failed_check(spec, A)
        if reason is not None:
            if impl == name:
                raise RuntimeError(f"impl={name!r} {reason}; use impl='eager'")
            return "eager", f"{name} {reason}"
    return name, f"Triton kernels on {str(A.device)!r}" if name == "triton" else "Numba kernels on the CPU"


__all__ = [
    "Backend",
    "Gradients",
    "Implementation",
    "Merged",
    "choose_backend",
    "get_backend",
    "numba_problem",
    "resolve_implementation",
    "triton_problem",
]
