"""SNELLA, and as settings of it its predecessor SNELL and kernelised LoRA."""

from peft import PeftConfig

from snella.methods.method import Options
from snella.methods.peft_adapter import own_fields, peft_method
from snella.tuner.config import SnellaConfig

_OPTIONS = own_fields(SnellaConfig)
_OF_SPARSITY = (
    *("target_sparsity", "init_sparsity", "sparsify_mode", "allocation", "schedule", "importance", "realloc_every"),
    *("beta1", "beta2", "min_layer_share", "zero_start", "fixed_support"),
)


def _snella_config(head: str, options: Options) -> PeftConfig:
    """SNELLA with the head trained in full."""
    return SnellaConfig(modules_to_save=[head], **options)


def _snell_config(head: str, options: Options) -> PeftConfig:
    """SNELL: the kernel p_linear, and the same sparsity in every matrix."""
    return _snella_config(head, {"kernel": "p_linear", "allocation": "uniform", **options})


def _klora_config(head: str, options: Options) -> PeftConfig:
    """Kernelised LoRA: the merged matrix as it is."""
    return _snella_config(head, {**options, "sparsify_mode": "none", "target_sparsity": 0.0})


SNELLA = peft_method(
    "sparse high-rank updates, budgets by competition",
    "SNELLA, Shen et al., arXiv 2510.24037",
    _snella_config,
    _OPTIONS,
    suffix="r",
)
"""Trains the factors `A`, `B` and scalars of every matrix, and the head:

    W = W0 + scaling · S    S[i, j] = ΔW[i, j] · max(|ΔW[i, j]| − t, 0)    ΔW[i, j] = κ(A[j], B[i])

with κ = Mix-K and `t` such that as many entries survive as the matrix's budget allows; see docs/method.md.
"""

SNELL = peft_method(
    "sparse updates, the same sparsity everywhere",
    "SNELL, Shen et al., arXiv 2411.01800",
    _snell_config,
    tuple(option for option in _OPTIONS if option not in ("kernel", "allocation")),
    suffix="r",
)
"""As SNELLA with κ = P-Linear, `ΔW[i, j] = Σ_p α_p ‖A[j, piece p] − B[i, piece p]‖`, and one sparsity for all."""

KLORA = peft_method(
    "a kernel's high-rank update without sparsity",
    "kernelised LoRA (KLoRA) of SNELLA, Shen et al., arXiv 2510.24037, Tables VII to IX",
    _klora_config,
    tuple(option for option in _OPTIONS if option not in _OF_SPARSITY),
    suffix="r",
)
"""Trains what SNELLA trains: `W = W0 + scaling · ΔW`, `ΔW[i, j] = κ(A[j], B[i])`, every entry of it.

`kernel` is mix_k (default), p_linear, rbf, …, or linear, which is LoRA's product with both factors drawn at random.
`ΔW` is not zero at the start: about 1/m with mix_k, m the outputs of the matrix.
"""
