"""Entry points of the adapted layer: `y = x (W0 + scaling·S)ᵀ + bias`, folded into one product."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from snella.ops.kernels import KernelScalars, make_kernel
from snella.ops.sparsify import SparsifyMode

from .backends import Backend, TorchBackend
from .eager import adapted_product_eager, effective_weight_eager
from .products import LinearProduct, Product
from .reference import adapted_product_reference, effective_weight
from .update import Update
from .weight_source import WeightSource

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
        from . import numba_backend  # noqa: F401
    except Exception as error:  # numba fails in many ways where it does not fit numpy, LLVM or the machine
        return f"numba cannot be used: {error}"
    return None


@lru_cache(maxsize=1)
def triton_problem() -> str | None:
    """Why the Triton kernels cannot be used on this machine, or `None`."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; it comes with torch for CUDA, or with: pip install triton"
    try:
        from . import triton_backend  # noqa: F401
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
    from .numba_backend import NumbaBackend, obstacle

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
    from .triton_backend import TritonBackend, obstacle

    reason = obstacle(update)
    if not torch.compiler.is_compiling():
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


def effective_weight_of(
    weight: Tensor | WeightSource | None,
    updates: Sequence[Update],
    weight_shape: torch.Size,
    impl: str = "auto",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return `W0 + Σ scaling·S` without gradients, in the bits that `adapted_product` uses with this `impl`.

    Args:
        weight: `[m, …]`, or `None` for the sum of the updates alone.
        updates: Updates of this weight.
        weight_shape: Shape of the result.
        impl: See `adapted_product`.
        dtype: Dtype of the result where `weight` is a `WeightSource`: that of the product it is made for, or float32 to
            lose nothing. A tensor's own dtype is kept.
    """
    if resolve_implementation(impl) == "reference":
        with torch.no_grad():
            if isinstance(weight, WeightSource):
                return effective_weight(weight.make_wide(), updates, weight_shape).to(dtype)
            return effective_weight(weight, updates, weight_shape)
    backends = [choose_backend(impl, update)[0] for update in updates]
    return effective_weight_eager(weight, updates, weight_shape, backends, dtype)


def adapted_product(
    x: Tensor,
    weight: Tensor | WeightSource | None,
    bias: Tensor | None,
    updates: Sequence[Update],
    product: Product,
    *,
    weight_shape: torch.Size | None = None,
    impl: str = "auto",
    keep_delta: bool = False,
) -> Tensor:
    """Apply a layer whose weight carries sparse updates.

        y = product(x, W0 + Σ_k scaling_k·S_k) + bias

    Under autocast the input and the effective weight are cast to the autocast dtype; the updates are always merged in
    at least float32.

    Args:
        x: Input of the layer.
        weight: Frozen weight `W0`, `[m, …]`; `None` applies the updates alone. A `WeightSource` is asked for it in both
            passes and decides no dtype: the product is computed in that of `x`.
        bias: `[m]` or `None`.
        updates: Updates of this weight, each `[m, n]` with `n` the product of the weight's other axes.
        product: The layer's product.
        weight_shape: Shape of the weight where `weight` is `None`; default `[m, n]`.
        impl: `"eager"` (hand-written backward that rebuilds the update, torch operations), `"numba"` (the same in
            compiled loops on the CPU), `"triton"` (the same in kernels of few launches on a CUDA device), `"auto"`
            (see `choose_backend`) or `"reference"` (autograd).
        keep_delta: Keep `ΔW` for the backward pass instead of rebuilding it: one matrix more in memory, and faster
            except with `impl="numba"`, which has nothing to gain and keeps nothing.
            Not for `"reference"`.

    Returns:
        The layer's output, in the dtype of `weight` or of autocast; with a `WeightSource` in the dtype of `x`.

    Raises:
        ValueError: `impl` is unknown, or there is neither a weight nor an update.
    """
    if weight is None and not updates:
        raise ValueError("adapted_product needs a weight or at least one update, got neither")
    if weight_shape is None:
        weight_shape = torch.Size((updates[0].num_rows, updates[0].A.shape[1])) if weight is None else weight.shape
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    elif isinstance(weight, Tensor):
        x = x.to(weight.dtype)
    bias = bias if bias is None else bias.to(x.dtype)
    if isinstance(weight, Tensor) and not updates:
        return product(x, weight.to(x.dtype), bias)
    if resolve_implementation(impl) == "reference":
        known = weight.make_wide() if isinstance(weight, WeightSource) else weight
        return adapted_product_reference(x, known, bias, updates, product, weight_shape)
    backends = [choose_backend(impl, update)[0] for update in updates]
    return adapted_product_eager(x, weight, bias, updates, product, weight_shape, backends, keep_delta)


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    *,
    budget: int,
    kernel: str = "mix_k",
    piece_coeff: Tensor | None = None,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    temperature: Tensor | None = None,
    num_pieces: int = 2,
    softmax_dim: int = 0,
    center_softmax: bool = False,
    scaling: float = 1.0,
    mode: SparsifyMode = "soft",
    impl: str = "auto",
    keep_delta: bool = False,
) -> Tensor:
    """Apply a linear layer whose weight carries one sparse, high-rank update.

        y = x (W0 + scaling·S)ᵀ + bias,   S = sparsify(merge_factors(A, B), keep_threshold(·, budget))

    Args:
        x: `[…, n]`.
        weight: Frozen weight `W0`, `[m, n]`.
        bias: `[m]` or `None`.
        A: Input-side factor, `[n, r]`.
        B: Output-side factor, `[m, r]`.
        budget: Entries of `S` that may differ from zero, in `[0, m·n]`.
        kernel: Name of the kernel function, see `merge_factors`, as are the four scalars, `num_pieces`, `softmax_dim`
            and `center_softmax`.
        piece_coeff: `[P]`.
        alpha: 0-dim.
        beta: 0-dim.
        temperature: 0-dim or `None`.
        num_pieces: `P`.
        softmax_dim: 0 or 1.
        center_softmax: Whether the softmax is shifted to mean 0.
        scaling: Factor before `S`.
        mode: `"soft"` (eq. 13), `"official"`, or `"none"` with a full budget: `S = ΔW`.
        impl: See `adapted_product`.
        keep_delta: See `adapted_product`.

    Returns:
        `[…, m]`.

    Raises:
        ValueError: Shapes, budget, kernel or scalars do not fit together.
    """
    scalars = KernelScalars(*(v if v is None else v[None] for v in (piece_coeff, alpha, beta, temperature)))
    spec = make_kernel(kernel, num_pieces=num_pieces, softmax_dim=softmax_dim, center_softmax=center_softmax)
    update = Update(A[None], B, scalars, spec, (budget,), (B.shape[0],), scaling, mode)
    update.check(weight.shape)
    return adapted_product(x, weight, bias, [update], LinearProduct(), impl=impl, keep_delta=keep_delta)
