"""The table of methods: from a name to its row, its options and the number in the name."""

import difflib
import re

from snella.methods.adalora import ADALORA
from snella.methods.adapter import ADAPTER
from snella.methods.fixed_mask import FIXED_MASK
from snella.methods.gps import GPS
from snella.methods.lora import DORA, LORA
from snella.methods.method import Method
from snella.methods.mlp_head import MLP
from snella.methods.mosa import MOSA
from snella.methods.noah import NOAH
from snella.methods.own_weights import BIAS, FULL, LINEAR
from snella.methods.partial import PARTIAL
from snella.methods.peft_catalogue import catalogue
from snella.methods.snell_family import KLORA, SNELL, SNELLA
from snella.methods.spt_adapter import SPT_ADAPTER
from snella.methods.spt_lora import SPT_LORA
from snella.methods.ssf import SSF
from snella.methods.vpt import VPT_DEEP, VPT_SHALLOW
from snella.methods.vqt import VQT

METHODS: dict[str, Method] = {
    # weights of the backbone itself
    "linear": LINEAR,
    "bias": BIAS,
    "full": FULL,
    "partial": PARTIAL,
    # additions to a frozen backbone
    "mlp": MLP,
    "vpt-shallow": VPT_SHALLOW,
    "vpt-deep": VPT_DEEP,
    "vqt": VQT,
    "adapter": ADAPTER,
    "mosa": MOSA,
    "ssf": SSF,
    # low-rank and sparse updates
    "lora": LORA,
    "dora": DORA,
    "adalora": ADALORA,
    "snella": SNELLA,
    "snell": SNELL,
    "klora": KLORA,
    # chosen by gradients of the training data before training
    "gps": GPS,
    "spt-lora": SPT_LORA,
    "spt-adapter": SPT_ADAPTER,
    "fixed-mask": FIXED_MASK,
    "noah": NOAH,
    # configurations of PEFT and nothing else
    **catalogue(),
}
"""By name without the number. A new method is a file of its own with a `Method`, and a row here."""


def method_names() -> list[str]:
    """Names that `build_method` knows, without numbers."""
    return list(METHODS)


def find_method(name: str) -> Method:
    """The row of `snella-8` or `snella`.

    Raises:
        ValueError: As for `parse_method`.
    """
    return METHODS[parse_method(name)[0]]


def method_options(name: str) -> tuple[str, ...]:
    """Names of the options that a method takes."""
    return find_method(name).options


def parse_method(name: str) -> tuple[str, int | None]:
    """Split `vpt-deep-50` into `("vpt-deep", 50)`; the number is None where the name has none.

    Raises:
        ValueError: No such method (with the nearest names), or a number where the method takes none.
    """
    match = None if name in METHODS else re.fullmatch(r"(.+)-(\d+)", name)
    family, digits = (match[1], match[2]) if match else (name, None)
    if family not in METHODS:
        near = difflib.get_close_matches(family, METHODS, n=3, cutoff=0.5)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        numbered = ", ".join(f"{key}-N" for key, method in METHODS.items() if method.suffix is not None)
        plain = ", ".join(key for key, method in METHODS.items() if method.suffix is None)
        raise ValueError(f"method must be one of {plain}, {numbered} (-N may be left out), got {name!r}{hint}")
    if digits is None:
        return family, None
    suffix = METHODS[family].suffix
    if suffix is None:
        raise ValueError(f"method {family!r} takes no number, got {name!r}; write {family!r}")
    if int(digits) < 1:
        raise ValueError(f"the number in a method's name, {suffix}, must be at least 1, got {name!r}")
    return family, int(digits)
