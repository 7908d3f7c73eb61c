"""SNELLA, and its predecessor SNELL as a setting of it."""

from peft import PeftConfig

from snella.methods.method import Options
from snella.methods.peft_adapter import own_fields, peft_method
from snella.tuner.config import SnellaConfig

_OPTIONS = own_fields(SnellaConfig)


def _snella_config(head: str, options: Options) -> PeftConfig:
    """SNELLA with the head trained in full; `target_sparsity=0` gives the kernelised LoRA without sparsity."""
    return SnellaConfig(modules_to_save=[head], **options)


def _snell_config(head: str, options: Options) -> PeftConfig:
    """SNELL: the kernel p_linear, and the same sparsity in every matrix."""
    return _snella_config(head, {"kernel": "p_linear", "allocation": "uniform", **options})


SNELLA = peft_method(
    "sparse high-rank updates, budgets by competition",
    "SNELLA, Shen et al., arXiv 2510.24037",
    _snella_config,
    _OPTIONS,
    suffix="r",
)
SNELL = peft_method(
    "sparse updates, the same sparsity everywhere",
    "SNELL, Shen et al., arXiv 2411.01800",
    _snell_config,
    tuple(option for option in _OPTIONS if option not in ("kernel", "allocation")),
    suffix="r",
)
