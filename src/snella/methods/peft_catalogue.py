"""Methods that are configurations of PEFT and nothing else."""

import re
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import peft
from peft import PeftConfig
from torch import nn

from snella.methods.head import is_inside
from snella.methods.method import Method, Options
from snella.methods.peft_adapter import Targets, own_fields, peft_method, without_harmless_warnings
from snella.methods.targets import adaptable_layers


@dataclass(frozen=True)
class _Entry:
    """A configuration class of PEFT under a name of ours.

    Args:
        summary: As for `Method`.
        source: As for `Method`.
        config: Name of the class in `peft`.
        since: The first version of PEFT that has it.
        suffix: As for `Method`.
        values: Values that differ from PEFT's defaults, where the user gives none.
        targets: Which modules are adapted.
    """

    summary: str
    source: str
    config: str
    since: str
    suffix: str | None = None
    values: tuple[tuple[str, Any], ...] = ()
    targets: Targets = adaptable_layers


def layer_norms(model: nn.Module, head: str) -> str:
    """A regular expression for the names of the layer normalisations outside of the head.

    As plain names they would match too much: `norm` is also how `blocks.0.attn.norm` ends.

    Raises:
        ValueError: There is none.
    """
    found = [
        name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm) and not is_inside(name, head)
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no LayerNorm outside of its head {head!r}")
    return "|".join(re.escape(name) for name in found)


_ENTRIES = {
    "shira": _Entry(
        "a random choice of weights, r (m + n) of each m x n matrix",
        "SHiRA, Bhardwaj et al., arXiv 2406.13175",
        "ShiraConfig",
        "0.16",
        "r",
        (("r", 8), ("random_seed", 0)),
    ),
    "supertuning": _Entry(
        "the weights of largest magnitude", "Super-Tuning, arXiv 2607.09287", "SupertuningConfig", "0.21"
    ),
    "fourierft": _Entry(
        "coefficients of a few frequencies of each update's two-dimensional Fourier transform",
        "FourierFT, Gao et al., arXiv 2405.03003",
        "FourierFTConfig",
        "0.12",
        "n_frequency",
        (("n_frequency", 3000), ("scaling", 300.0)),
    ),
    "randlora": _Entry(
        "scales of random low-rank bases that add up to full rank",
        "RandLoRA, Albert et al., arXiv 2502.00987",
        "RandLoraConfig",
        "0.14",
        "r",
        (("save_projection", False),),
    ),
    "vera": _Entry(
        "two vectors a layer that scale shared random factors",
        "VeRA, Kopiczko et al., arXiv 2310.11454",
        "VeraConfig",
        "0.10",
        "r",
        (("r", 256), ("save_projection", False)),
    ),
    "loha": _Entry(
        "Hadamard products of two low-rank updates",
        "FedPara / LoHa, Hyeon-Woo et al., arXiv 2108.06098",
        "LoHaConfig",
        "0.6",
        "r",
    ),
    "lokr": _Entry("Kronecker products", "LoKr, Yeh et al., arXiv 2309.14859", "LoKrConfig", "0.7", "r"),
    "boft": _Entry(
        "orthogonal factors in butterfly form",
        "BOFT, Liu et al., arXiv 2311.06243",
        "BOFTConfig",
        "0.9",
        "boft_block_size",
    ),
    "hra": _Entry("chains of Householder reflections", "HRA, Yuan et al., arXiv 2405.17484", "HRAConfig", "0.12", "r"),
    "delora": _Entry(
        "low-rank updates of a learned norm", "DeLoRA, Bini et al., arXiv 2503.18225", "DeloraConfig", "0.18", "r"
    ),
    "ln_tuning": _Entry(
        "weights and biases of the layer normalisations",
        "LN tuning, Zhao et al., arXiv 2312.11420",
        "LNTuningConfig",
        "0.10",
        targets=layer_norms,
    ),
}


def catalogue() -> dict[str, Method]:
    """One row for each of PEFT's methods; one that this version of PEFT lacks says so when it is asked for."""
    return {name: _row(name, entry) for name, entry in _ENTRIES.items()}


def _row(name: str, entry: _Entry) -> Method:
    """The row of one entry."""
    kind = getattr(peft, entry.config, None)

    def config(head: str, options: Options) -> PeftConfig:
        if kind is None:
            raise ValueError(
                f"method {name!r} needs peft>={entry.since} for its {entry.config}, got peft {version('peft')}; "
                f"pip install --upgrade 'peft>={entry.since}'"
            )
        with without_harmless_warnings():
            return kind(modules_to_save=[head], **{**dict(entry.values), **options})

    options = () if kind is None else own_fields(kind)
    source = f"{entry.source}; PEFT's implementation"
    return peft_method(entry.summary, source, config, options, suffix=entry.suffix, targets=entry.targets)
