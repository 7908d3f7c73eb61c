"""The backends of an update, and the choice between them."""

from __future__ import annotations

import importlib.util
from functools import cache, lru_cache
from typing import Literal, get_args

from torch import Tensor

from snella.backends.base import Backend, Gradients, Merged
from snella.update import UpdateSpec

Implementation = Literal["auto", "triton", "numba", "eager", "reference"]


def resolve_implementation(impl: str) -> str:
    """Check `impl`, and return it.

    Raises:
        ValueError: `impl` is unknown.
    """
    if impl not in get_args(Implementation):
        raise ValueError(f"impl must be one of {list(get_args(Implementation))}, got {impl!r}")
    return impl


@lru_cache(maxsize=1)
def numba_problem() -> str | None:
    """Why Numba kernels cannot be used on this machine, or `None`."""
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed; install it with: pip install 'snella[fast]'"
    try:
        from snella.backends.numba import backend  # noqa: F401
    except Exception as error:  # numba fails in many ways where it does not fit numpy, LLVM or the machine
        return f"numba cannot be used: {error}"
    return None


@lru_cache(maxsize=1)
def triton_problem() -> str | None:
    """Why Triton kernels cannot be used on this machine, or `None`."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; it comes with torch for CUDA, or with: pip install triton"
    try:
        from snella.backends.triton import backend  # noqa: F401
    except Exception as error:  # a Triton that does not fit this torch or this machine
        return f"triton cannot be used: {error}"
    return None


@cache
def get_backend(name: str) -> Backend:
    """The backend that `UpdateSpec.backend` names; `reference` has none, it is differentiated by autograd."""
    if name == "numba":
        from snella.backends.numba.backend import NumbaBackend

        return NumbaBackend()
    if name == "triton":
        from snella.backends.triton.backend import TritonBackend

        return TritonBackend()
    from snella.backends.base import TorchBackend

    return TorchBackend()


def is_checked(A: Tensor) -> bool:
    """Whether Triton kernels for such factors are compared with torch operations before their first use: on a GPU."""
    return A.device.type == "cuda"


def choose_backend(impl: str, spec: UpdateSpec, A: Tensor) -> tuple[str, str]:
    """Return the name of the backend that computes such updates, and why it is that one.

    `"auto"` is `"triton"` for factors on a CUDA device and `"numba"` for factors elsewhere, where these are installed
    and can do it (a piecewise kernel, no factors in float64), else `"eager"`. The choice depends on the machine, the
    kernel, and the factors' device and dtype alone, so that a layer computes the same bits every time.

    Args:
        impl: One of `Implementation`.
        spec: The updates' spec; its `backend` is not read.
        A: Their input-side factors, for device, dtype and size.

    Raises:
        ImportError: `impl` is `"triton"` or `"numba"`, and that is missing or does not work.
        NotImplementedError: `impl` is `"triton"` or `"numba"`, and the updates are such that it cannot compute them.
        RuntimeError: `impl` is `"triton"`, and its kernels give wrong results on this device; says which and how wrong.
        ValueError: `impl` is unknown.
    """
    if resolve_implementation(impl) in ("eager", "reference"):
        return impl, "as asked for"
    name = "triton" if impl == "triton" or (impl == "auto" and A.device.type == "cuda") else "numba"
    problem = triton_problem() if name == "triton" else numba_problem()
    if problem is not None:
        if impl == name:
            raise ImportError(f"impl={name!r}, but {problem}")
        return "eager", problem
    reason = get_backend(name).unsupported_reason(spec, A)
    if reason is not None:
        if impl == name:
            raise NotImplementedError(f"impl={name!r} {reason}; impl='eager' would work")
        return "eager", f"{name} {reason}"
    if name == "triton" and is_checked(A):
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
