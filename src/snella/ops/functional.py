"""Entry points of the adapted layer: `y = x (W0 + scaling·S)ᵀ + bias`, folded into one product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from snella.ops.autograd import adapted_product_eager, effective_weight_eager
from snella.ops.backends import choose_backend, resolve_implementation
from snella.ops.kernels import KernelScalars, make_kernel
from snella.ops.sparsify import SparsifyMode
from snella.ops.spec import LinearProduct, Product, Update, WeightSource


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


def effective_weight(weight: Tensor | None, updates: Sequence[Update], shape: torch.Size | None = None) -> Tensor:
    """Return `W0 + Σ scaling·S`, differentiable with respect to everything.

    The sum is formed in the wider of the two dtypes and rounded once to the dtype of `weight`.

    Args:
        weight: Frozen weight, `[m, …]`, or `None` for the sum of the updates alone.
        updates: Updates of this weight.
        shape: Shape of the result where `weight` is `None`, default `[m, n]`.

    Returns:
        Shape and dtype of `weight`; without one, `shape` and the dtype that the updates were merged in.
    """
    total = weight
    for update in updates:
        delta = update.scaling * torch.cat(update.sparse_groups())
        if total is None:
            total = delta.reshape(shape) if shape is not None else delta
        else:
            total = total.to(torch.promote_types(total.dtype, delta.dtype)) + delta.reshape(total.shape)
    if total is None:
        raise ValueError("effective_weight needs a weight or at least one update, got neither")
    return total if weight is None else total.to(weight.dtype)


def adapted_product_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    updates: Sequence[Update],
    product: Product,
    weight_shape: torch.Size,
) -> Tensor:
    """Same contract as `adapted_product`; autograd keeps the effective weight and every intermediate of the merge."""
    with torch.autocast(x.device.type, enabled=False):
        merged = effective_weight(weight, updates, weight_shape).to(x.dtype)
        return product(x, merged, bias)
