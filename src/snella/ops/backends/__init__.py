"""The backends of an update, and the choice between them."""

from __future__ import annotations

import importlib.util
import logging
from functools import lru_cache
from typing import Literal, get_args

from torch.compiler import is_compiling

from snella.ops.backends.base import Backend
from snella.ops.backends.torch import TorchBackend
from snella.ops.spec import Update

logger = logging.getLogger(__name__)
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
    """Why the compiled loops cannot be used on this machine, or `None`."""
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed; install it with: pip install 'snella[fast]'"
    try:
        from snella.ops.backends.numba import backend  # noqa: F401
    except Exception as error:  # numba fails in many ways where it does not fit numpy, LLVM or the machine
        return f"numba cannot be used: {error}"
    return None


@lru_cache(maxsize=1)
def triton_problem() -> str | None:
    """Why the Triton kernels cannot be used on this machine, or `None`."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; it comes with torch for CUDA, or with: pip install triton"
    try:
        from snella.ops.backends.triton import backend  # noqa: F401
    except Exception as error:  # a Triton that does not fit this torch or this machine
        return f"triton cannot be used: {error}"
    return None


def choose_backend(impl: str, update: Update) -> tuple[Backend, str]:
    """Return what computes this update, and why.

    `"auto"` is `"triton"` for factors on a CUDA device and `"numba"` for factors elsewhere, where these are installed
    and can do it (a piecewise kernel, no factors in float64), else `"eager"`. The choice depends on the machine, the
    kernel, and the factors' device and dtype alone, so that a layer computes the same bits every time.

    Raises:
        ImportError: `impl` is `"triton"` or `"numba"`, and that is missing or does not work.
        NotImplementedError: `impl` is `"triton"` or `"numba"`, and the update is one that it cannot compute.
    """
    if impl not in ("auto", "triton", "numba"):
        return TorchBackend(), "as asked for"
    if impl == "triton" or (impl == "auto" and update.A.device.type == "cuda"):
        return _choose_triton(impl, update)
    problem = numba_problem()
    if problem is not None:
        if impl == "numba":
            raise ImportError(f"impl='numba', but {problem}")
        return TorchBackend(), problem
    from snella.ops.backends.numba.backend import NumbaBackend, obstacle

    reason = obstacle(update)
    if reason is None:
        return NumbaBackend(), "compiled loops on the CPU"
    if impl == "numba":
        raise NotImplementedError(f"impl='numba' {reason}; impl='eager' would work")
    return TorchBackend(), f"numba {reason}"


def _choose_triton(impl: str, update: Update) -> tuple[Backend, str]:
    """The same for `"triton"`, and for `"auto"` on a CUDA device."""
    problem = triton_problem()
    if problem is not None:
        if impl == "triton":
            raise ImportError(f"impl='triton', but {problem}")
        return TorchBackend(), problem
    from snella.ops.backends.triton.backend import TritonBackend, obstacle

    reason = obstacle(update)
    if not is_compiling():
        _log_triton(str(update.A.device), reason)
    if reason is None:
        return TritonBackend(), f"Triton kernels on {str(update.A.device)!r}"
    if impl == "triton":
        raise NotImplementedError(f"impl='triton' {reason}; impl='eager' would work")
    return TorchBackend(), f"triton {reason}"


@lru_cache(maxsize=64)
def _log_triton(device: str, reason: str | None) -> None:
    """Say once what computes updates on this device: a model is often moved there after its adapters are injected."""
    if reason is None:
        logger.info("updates on %r are computed by Triton kernels", device)
    else:
        logger.info("updates on %r are computed by torch operations: triton %s", device, reason)
