"""Pure functions of tensors: merge, select, sparsify, apply. Knows torch and nothing else of this project."""

from snella.ops.functional import adapted_layer, adapted_linear, effective_weight
from snella.ops.kernels import KERNELS, KernelScalars, make_kernel, merge_factors
from snella.ops.sparsify import keep_threshold, quantile_threshold, sparsify

__all__ = [
    "KERNELS",
    "KernelScalars",
    "adapted_layer",
    "adapted_linear",
    "effective_weight",
    "keep_threshold",
    "make_kernel",
    "merge_factors",
    "quantile_threshold",
    "sparsify",
]
