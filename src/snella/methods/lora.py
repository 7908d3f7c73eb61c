"""Low-rank updates by PEFT's LoRA: `lora` and, with a magnitude of its own for each output, `dora`."""

from peft import LoraConfig, PeftConfig

from snella.methods.method import Options
from snella.methods.peft_adapter import peft_method

_OPTIONS = ("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_rslora", "use_dora", "bias")


def lora_config(head: str, options: Options) -> PeftConfig:
    """W = W0 + (lora_alpha / r) B A, with `lora_alpha = r` (scaling 1) unless told otherwise."""
    return LoraConfig(modules_to_save=[head], **{"r": 8, "lora_alpha": options.get("r", 8), **options})


def _dora_config(head: str, options: Options) -> PeftConfig:
    """W = m ⊙ (W0 + B A) / ‖W0 + B A‖, the norm taken of each output's row; m starts as ‖W0‖."""
    return lora_config(head, {"use_dora": True, **options})


LORA = peft_method(
    "low-rank updates",
    "LoRA, Hu et al., arXiv 2106.09685; PEFT's implementation",
    lora_config,
    _OPTIONS,
    suffix="r",
)
DORA = peft_method(
    "low-rank updates of the direction and a magnitude for each output",
    "DoRA, Liu et al., arXiv 2402.09353; PEFT's implementation",
    _dora_config,
    tuple(option for option in _OPTIONS if option != "use_dora"),
    suffix="r",
)
