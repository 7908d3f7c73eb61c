"""Kernel functions κ that merge two low-rank factors into one high-rank matrix.

Entry `[i, j]` of the matrix is a function of one row of each factor. Piecewise kernels split both rows into pieces and
depend on the distances between corresponding pieces.

These classes use plain torch operations and are the reference for all faster implementations. Each kernel in this
module has a formula that autograd can differentiate (`merge`) and a hand-written derivative (`vjp`).

Shape letters: `G` stacked matrices of one weight, `m` outputs, `n` inputs, `r` rank, `P` pieces.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor


class KernelScalars(NamedTuple):
    """Learnable scalars of one matrix; a kernel reads only those that `Kernel.scalars` names.

    Args:
        piece_coeff: `α_p`, one weight per piece, `[P]`.
        alpha: `α`, the weight of the sigmoid, RBF, or softmax term, 0-dim.
        beta: `β`, a constant added to every entry, 0-dim.
        temperature: `γ`, by which the softmax's input is divided, 0-dim. `None` means 1.
    """

    piece_coeff: Tensor | None = None
    alpha: Tensor | None = None
    beta: Tensor | None = None
    temperature: Tensor | None = None

    def require(self, *names: str) -> list[Tensor]:
        """Return the scalars with these names.

        Raises:
            ValueError: If a scalar is `None`.
        """
        values = {name: getattr(self, name) for name in names}
        missing = [name for name, value in values.items() if value is None]
        if missing:
            raise ValueError(f"this kernel requires the scalars {missing}, got None")
        return list(values.values())


class Factors(NamedTuple):
    """Factors and scalars from which a weight's update is computed, or their gradients.

    Gradients of one matrix (`Kernel.vjp`) have no leading `G` and are `None` for inputs that the kernel does not use.

    Args:
        A: Input-side factors, `[G, n, r]`.
        B: Output-side factors, `[m, r]`, the rows of all matrices concatenated.
        piece_coeff: `[G, P]`. See `KernelScalars` for the meaning of the scalars.
        alpha: `[G]`.
        beta: `[G]`.
        temperature: `[G]`.
    """

    A: Tensor
    B: Tensor
    piece_coeff: Tensor | None = None
    alpha: Tensor | None = None
    beta: Tensor | None = None
    temperature: Tensor | None = None


def _split_into_pieces(factor: Tensor, num_pieces: int) -> Tensor:
    """Split `[rows, r]` into `[P, rows, r / P]`; piece `p` contains the columns `p·r/P … (p+1)·r/P − 1`."""
    rows, r = factor.shape
    return factor.reshape(rows, num_pieces, r // num_pieces).transpose(0, 1).contiguous()


def _join_pieces(pieces: Tensor) -> Tensor:
    """Undo `_split_into_pieces`."""
    num_pieces, rows, width = pieces.shape
    return pieces.transpose(0, 1).reshape(rows, num_pieces * width)


def piece_distances(A: Tensor, B: Tensor, num_pieces: int) -> Tensor:
    """Compute the Euclidean distances between the rows of two factors, per piece.

        d[p, i, j] = ‖B[i, piece p] − A[j, piece p]‖₂

    Differences are squared directly. The expansion `‖a‖² + ‖b‖² − 2⟨a, b⟩` loses all precision for close rows, and
    factors start small and close together. The gradient of a zero distance is 0.

    Args:
        A: Input-side factor, `[n, r]`.
        B: Output-side factor, `[m, r]`.
        num_pieces: `P`; must divide `r`.

    Returns:
        `[P, m, n]`.
    """
    return torch.cdist(
        _split_into_pieces(B, num_pieces),
        _split_into_pieces(A, num_pieces),
        compute_mode="donot_use_mm_for_euclid_dist",
    )


def _piece_distances_vjp(A: Tensor, B: Tensor, distances: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `A` and `B`, given `grad` = ∂L/∂d, `[P, m, n]`. Zero distances contribute nothing."""
    num_pieces = distances.shape[0]
    A_pieces, B_pieces = _split_into_pieces(A, num_pieces), _split_into_pieces(B, num_pieces)
    cdist_backward = torch.ops.aten._cdist_backward  # 2.0 selects the Euclidean norm
    grad_B = cdist_backward(grad.contiguous(), B_pieces, A_pieces, 2.0, distances)
    grad_A = cdist_backward(grad.mT.contiguous(), A_pieces, B_pieces, 2.0, distances.mT.contiguous())
    return _join_pieces(grad_A), _join_pieces(grad_B)


@dataclass(frozen=True)
class Kernel:
    """Kernel function that merges two factors: `ΔW[i, j] = κ(A[j], B[i])`.

    Args:
        num_pieces: `P`, the number of pieces per factor row in kernels with `piece_coeff`. It must divide `r`.
        softmax_dim: Axis of the softmax in `normalized_rbf` and `mix_k`. 0 normalizes each column over its `m` outputs,
            as the paper's text says (its eq. 6 differs). 1 normalizes each row over its `n` inputs.
        center_softmax: If True, center the softmax by subtracting its mean, so that the result sums to zero over
            `softmax_dim`. The paper does not do this.
    """

    name: ClassVar[str]
    scalars: ClassVar[tuple[str, ...]] = ()

    num_pieces: int = 2
    softmax_dim: int = 0
    center_softmax: bool = False

    def merge(self, A: Tensor, B: Tensor, scalars: KernelScalars) -> Tensor:
        """Return `ΔW`, `[m, n]`, from `A` `[n, r]` and `B` `[m, r]`."""
        raise NotImplementedError

    def vjp(self, A: Tensor, B: Tensor, scalars: KernelScalars, grad: Tensor) -> Factors:
        """Return the gradients of the inputs of `merge`, given `grad` = ∂L/∂ΔW, `[m, n]`.

        Unless a kernel overrides this method, autograd differentiates `merge`.
        """
        names = [name for name in self.scalars if getattr(scalars, name) is not None]
        scalar_values = [getattr(scalars, name) for name in names]
        inputs = [value.detach().requires_grad_() for value in (A, B, *scalar_values)]
        scalar_inputs = dict(zip(names, inputs[2:], strict=True))
        with torch.enable_grad():
            merged = self.merge(inputs[0], inputs[1], scalars._replace(**scalar_inputs))
        gradients = torch.autograd.grad(merged, inputs, grad)
        return Factors(*gradients[:2], **dict(zip(names, gradients[2:], strict=True)))


class Linear(Kernel):
    """Inner product, LoRA's merge: `ΔW[i, j] = ⟨A[j], B[i]⟩`."""

    name = "linear"

    def merge(self, A: Tensor, B: Tensor, scalars: KernelScalars) -> Tensor:  # noqa: D102
        return B @ A.T

    def vjp(self, A: Tensor, B: Tensor, scalars: KernelScalars, grad: Tensor) -> Factors:  # noqa: D102
        return Factors(A=grad.T @ B, B=grad @ A)


class Sigmoid(Kernel):
    """Sigmoid of the inner product: `ΔW[i, j] = α·σ(⟨A[j], B[i]⟩) + β`.

    The formula is not from the paper, whose Table XIV is unavailable.
    """

    name = "sigmoid"
    scalars: ClassVar[tuple[str, ...]] = ("alpha", "beta")

    def merge(self, A: Tensor, B: Tensor, scalars: KernelScalars) -> Tensor:  # noqa: D102
        alpha, beta = scalars.require("alpha", "beta")
        return alpha * torch.sigmoid(B @ A.T) + beta

    def vjp(self, A: Tensor, B: Tensor, scalars: KernelScalars, grad: Tensor) -> Factors:  # noqa: D102
        (alpha,) = scalars.require("alpha")
        sigmoid = torch.sigmoid(B @ A.T)
        grad_inner = alpha * grad * sigmoid * (1 - sigmoid)
        return Factors(A=grad_inner.T @ B, B=grad_inner @ A, alpha=(grad * sigmoid).sum(), beta=grad.sum())


class RBF(Kernel):
    """Gaussian RBF: `ΔW[i, j] = α·exp(−‖A[j] − B[i]‖²) + β`.

    The formula is not from the paper, whose Table XIV is unavailable.
    """

    name = "rbf"
    scalars: ClassVar[tuple[str, ...]] = ("alpha", "beta")

    def merge(self, A: Tensor, B: Tensor, scalars: KernelScalars) -> Tensor:  # noqa: D102
        alpha, beta = scalars.require("alpha", "beta")
        distance = piece_distances(A, B, 1)[0]
        return alpha * torch.exp(-distance * distance) + beta

    def vjp(self, A: Tensor, B: Tensor, scalars: KernelScalars, grad: Tensor) -> Factors:  # noqa: D102
        (alpha,) = scalars.require("alpha")
        distances = piece_distances(A, B, 1)
        gaussian = torch.exp(-distances[0] * distances[0])
        grad_distance = -2 * alpha * grad * gaussian * distances[0]
        grad_A, grad_B = _piece_distances_vjp(A, B, distances, grad_distance[None])
        return Factors(A=grad_A, B=grad_B, alpha=(grad * gaussian).sum(), beta=grad.sum())


class PLinear(Kernel):
    """Piecewise linear kernel of SNELL: `ΔW[i, j] = κ_p[i, j] = Σ_p α_p·d_p(A[j], B[i])`.

    `d_p` is the Euclidean distance between piece `p` of one row and piece `p` of the other. SNELL (arXiv 2411.01800) is
    the predecessor of SNELLA.
    """

    name = "p_linear"
    scalars: ClassVar[tuple[str, ...]] = ("piece_coeff",)

    def merge(self, A: Tensor, B: Tensor, scalars: KernelScalars) -> Tensor:  # noqa: D102
        (coeff,) = scalars.require("piece_coeff")
        return torch.einsum("p,pmn->mn", coeff, piece_distances(A, B, self.num_pieces))

    def vjp(self, A: Tensor, B: Tensor, scalars: KernelScalars, grad: Tensor) -> Factors:  # noqa: D102
        return self._combine_vjp(A, B, piece_distances(A, B, self.num_pieces), scalars, grad)

    @staticmethod
    def _combine_vjp(A: Tensor, B: Tensor, distances: Tensor, scalars: KernelScalars, grad: Tensor) -> Factors:
        """Return the gradients of the factors and of all `α_p`, given `grad` = ∂L/∂κ_p, `[m, n]`."""
        (coeff,) = scalars.require("piece_coeff")
        grad_coeff = torch.stack([torch.sum(grad * distance) for distance in distances])
        grad_A, grad_B = _piece_distances_vjp(A, B, distances, coeff[:, None, None] * grad)
        return Factors(A=grad_A, B=grad_B, piece_coeff=grad_coeff)


class NormalizedRBF(PLinear):
    """Softmax of the `p_linear` value `κ_p` over `softmax_dim`: `ΔW = α·softmax(κ_p / γ) + β`."""

    name = "normalized_rbf"
    scalars: ClassVar[tuple[str, ...]] = ("piece_coeff", "alpha", "beta", "temperature")
    has_linear_term: ClassVar[bool] = False
    """True if `ΔW` also contains `κ_p` itself."""

    def merge(self, A: Tensor, B: Tensor, scalars: KernelScalars) -> Tensor:  # noqa: D102
        alpha, beta = scalars.require("alpha", "beta")
        kappa = super().merge(A, B, scalars)
        probs = torch.softmax(kappa if scalars.temperature is None else kappa / scalars.temperature, self.softmax_dim)
        if self.center_softmax:
            probs = probs - 1 / probs.shape[self.softmax_dim]
        merged = alpha * probs + beta
        return merged + kappa if self.has_linear_term else merged

    def vjp(self, A: Tensor, B: Tensor, scalars: KernelScalars, grad: Tensor) -> Factors:  # noqa: D102
        alpha, coeff = scalars.require("alpha", "piece_coeff")
        distances = piece_distances(A, B, self.num_pieces)
        kappa = torch.einsum("p,pmn->mn", coeff, distances)
        probs = torch.softmax(kappa if scalars.temperature is None else kappa / scalars.temperature, self.softmax_dim)
        weighted = grad * probs
        # ∂L/∂(κ/γ); centering subtracts a constant from the softmax and thus affects only the gradient of α
        grad_logits = alpha * (weighted - probs * weighted.sum(self.softmax_dim, keepdim=True))
        grad_alpha = weighted.sum()
        grad_temperature = None
        if self.center_softmax:
            grad_alpha = grad_alpha - grad.sum() / probs.shape[self.softmax_dim]
        if scalars.temperature is not None:
            grad_logits = grad_logits / scalars.temperature
            grad_temperature = -(grad_logits * kappa).sum() / scalars.temperature
        grad_kappa = grad_logits + grad if self.has_linear_term else grad_logits
        factor_grads = self._combine_vjp(A, B, distances, scalars, grad_kappa)
        return factor_grads._replace(alpha=grad_alpha, beta=grad.sum(), temperature=grad_temperature)


class MixK(NormalizedRBF):
    """Piecewise linear kernel plus its softmax (eq. 6), the default: `ΔW = κ_p + α·softmax(κ_p / γ) + β`."""

    name = "mix_k"
    has_linear_term = True


KERNELS: dict[str, type[Kernel]] = {
    kernel.name: kernel for kernel in (Linear, PLinear, Sigmoid, RBF, NormalizedRBF, MixK)
}


def find_kernel(name: str) -> type[Kernel] | None:
    """Return the class of a kernel, or None if neither `KERNELS` nor an installed package has it.

    A package registers a kernel as an entry point of the group `snella.kernels`. The kernel is added to `KERNELS`.

    Raises:
        ImportError: If the kernel of a package cannot be imported, or has another name than its entry point.
    """
    if name in KERNELS:
        return KERNELS[name]
    entry = next(iter(entry_points(group="snella.kernels", name=name)), None)
    if entry is None:
        return None
    package = entry.module if entry.dist is None else entry.dist.name
    try:
        kernel: type[Kernel] = entry.load()
    except Exception as error:  # a package's module may raise any error
        reason = f"{type(error).__name__}: {error}"
        raise ImportError(f"kernel {name!r} cannot be imported ({reason}); update or uninstall {package}") from error
    if kernel.name != name:
        raise ImportError(
            f"{package} registers a kernel with the name {kernel.name!r} as {name!r}; the names must be equal"
        )
    KERNELS[name] = kernel
    return kernel


def kernel_names() -> list[str]:
    """Return the names of all kernels, including those that installed packages register."""
    return list(dict.fromkeys([*KERNELS, *(entry.name for entry in entry_points(group="snella.kernels"))]))


def make_kernel(name: str, *, num_pieces: int = 2, softmax_dim: int = 0, center_softmax: bool = False) -> Kernel:
    """Create a kernel by name.

    Args:
        name: One of `KERNELS`, or a kernel that an installed package registers.
        num_pieces: `P`.
        softmax_dim: 0 or 1; see `Kernel`.
        center_softmax: See `Kernel`.

    Raises:
        ValueError: If `name` is unknown, `num_pieces` is not positive, or `softmax_dim` is neither 0 nor 1.
        ImportError: See `find_kernel`.
    """
    kernel = find_kernel(name)
    if kernel is None:
        raise ValueError(f"kernel must be one of {kernel_names()}, got {name!r}")
    if num_pieces < 1:
        raise ValueError(f"num_pieces must be at least 1, got {num_pieces}")
    if softmax_dim not in (0, 1):
        raise ValueError(f"softmax_dim must be 0 (over the outputs) or 1 (over the inputs), got {softmax_dim}")
    return kernel(num_pieces=num_pieces, softmax_dim=softmax_dim, center_softmax=center_softmax)


def merge_factors(
    A: Tensor,
    B: Tensor,
    kernel: str = "mix_k",
    *,
    piece_coeff: Tensor | None = None,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    temperature: Tensor | None = None,
    num_pieces: int = 2,
    softmax_dim: int = 0,
    center_softmax: bool = False,
) -> Tensor:
    """Merge two low-rank factors into one high-rank matrix.

        ΔW[i, j] = κ(A[j], B[i])                              (eq. 5, section 3.2 and A.3 of arXiv 2510.24037)

    Args:
        A: Input-side factor, `[n, r]`.
        B: Output-side factor, `[m, r]`.
        kernel: One of `KERNELS`.
        piece_coeff: `α_p`, `[P]`; required by `p_linear`, `normalized_rbf`, and `mix_k`.
        alpha: 0-dim; required by all kernels except `linear` and `p_linear`.
        beta: 0-dim; required by the same kernels as `alpha`.
        temperature: `γ`, 0-dim, optional.
        num_pieces: `P`. It must divide `r` in kernels with `piece_coeff`.
        softmax_dim: 0 or 1; see `Kernel`.
        center_softmax: See `Kernel`.

    Returns:
        `[m, n]`, in the dtype of `A`, or in float32 if `A` has half precision.

    Raises:
        ValueError: If the kernel or an option is invalid, the shapes do not match, `P` does not divide `r`, or a scalar
            of the kernel is missing.
    """
    kernel_function = make_kernel(kernel, num_pieces=num_pieces, softmax_dim=softmax_dim, center_softmax=center_softmax)
    scalars = KernelScalars(piece_coeff, alpha, beta, temperature)
    check_factors(A, B, kernel_function, scalars)
    dtype = torch.promote_types(A.dtype, torch.float32)
    wide_scalars = KernelScalars(*(value if value is None else value.to(dtype) for value in scalars))
    with torch.autocast(A.device.type, enabled=False):
        return kernel_function.merge(A.to(dtype), B.to(dtype), wide_scalars)


def check_factors(A: Tensor, B: Tensor, kernel: Kernel, scalars: KernelScalars) -> None:
    """Raise `ValueError` if shapes are wrong, `P` does not divide `r`, or a scalar of `kernel` is missing."""
    if A.ndim != 2 or B.ndim != 2 or A.shape[1] != B.shape[1]:
        raise ValueError(f"A and B must be [n, r] and [m, r] with equal r, got {list(A.shape)} and {list(B.shape)}")
    r = A.shape[1]
    if "piece_coeff" in kernel.scalars and r % kernel.num_pieces:
        largest_multiple = r - r % kernel.num_pieces
        raise ValueError(
            f"num_pieces must divide r, got num_pieces={kernel.num_pieces} and r={r}; "
            f"use r={largest_multiple or kernel.num_pieces}"
        )
    # the temperature is optional, because γ defaults to 1
    scalars.require(*(name for name in kernel.scalars if name != "temperature"))
    coeff = scalars.piece_coeff
    if "piece_coeff" in kernel.scalars and coeff is not None and list(coeff.shape) != [kernel.num_pieces]:
        raise ValueError(f"piece_coeff must be [num_pieces] = [{kernel.num_pieces}], got {list(coeff.shape)}")
    for name in ("alpha", "beta", "temperature"):
        value: Tensor | None = getattr(scalars, name)
        if name in kernel.scalars and value is not None and value.ndim > 0:
            raise ValueError(f"{name} must be 0-dim, got {list(value.shape)}")
