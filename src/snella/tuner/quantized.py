"""Base layers whose weight is quantised: which ones can be adapted, and what an adapted layer needs of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from snella.ops.spec import LazyWeight

_WHAT_WORKS = (
    "of quantised layers, those of bitsandbytes (Linear4bit, Linear8bitLt) and linear layers with weight-only tensors "
    "of torchao (Int8Tensor, IntxUnpackedToInt8Tensor) can be adapted"
)


class Quantization(ABC):
    """One way to store the weight `[m, n]` of a linear layer in few bits. Knows no layer; each method is given one."""

    name: str

    @abstractmethod
    def source(self, base: nn.Module) -> LazyWeight:
        """Where the op gets the dequantised weight of `base`; stays valid when `base` is given another weight."""

    @abstractmethod
    def write(self, base: nn.Module, weight: Tensor) -> None:
        """Give `base` a new weight `[m, n]`, quantised with the settings of the present one."""

    @abstractmethod
    def snapshot(self, base: nn.Module) -> Any:
        """What `restore` needs to give `base` back every bit of its present weight; no copy is made."""

    @abstractmethod
    def restore(self, base: nn.Module, snapshot: Any) -> None:
        """Undo `write`."""

    def product_dtype(self, base: nn.Module, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which `base` computes with an input of `dtype`, autocast aside."""
        return dtype

    def is_safe_to_apply(self, base: nn.Module) -> bool:
        """Whether applying `base` itself leaves its weight as it is."""
        return True


def find_quantization(base: Any, name: str) -> Quantization | None:
    """Return how the weight of `base` is quantised, `None` where it is not. Imports neither package unless it is used.

    Args:
        base: A base layer.
        name: Its name, for errors.

    Raises:
        NotImplementedError: The weight is quantised in a way that cannot be dequantised and quantised again here.
        RuntimeError: A layer of bitsandbytes that has not been quantised yet.
    """
    weight = getattr(base, "weight", None)
    of_bitsandbytes = [cls.__name__ for cls in type(base).__mro__ if cls.__module__.startswith("bitsandbytes.")]
    if of_bitsandbytes:
        from snella.tuner.bitsandbytes_weights import Bitsandbytes4bit, Bitsandbytes8bit

        for kind in (Bitsandbytes4bit(), Bitsandbytes8bit()):
            if kind.layer_class in of_bitsandbytes:
                kind.check(base, name)
                return kind
        raise _refusal(name, f"a {type(base).__name__} of bitsandbytes")
    if type(weight).__module__.startswith("torchao."):
        from snella.tuner.torchao_weights import TorchaoWeight, obstacle

        problem = obstacle(weight) if isinstance(base, nn.Linear) else "only linear layers are supported"
        if problem is not None:
            kind_of_weight = f"{type(weight).__name__} of torchao"
            raise _refusal(name, f"a {type(base).__name__} whose weight is a {kind_of_weight}: {problem}")
        return TorchaoWeight()
    if isinstance(weight, Tensor) and not weight.is_floating_point():
        raise _refusal(name, f"a {type(base).__name__} whose weight is {weight.dtype}")
    packed = next((packed for packed in ("qweight", "W_q") if hasattr(base, packed)), None)
    if packed is not None:
        raise _refusal(name, f"a {type(base).__module__}.{type(base).__name__}, which keeps its weight as {packed}")
    return None


def _refusal(name: str, what: str) -> NotImplementedError:
    """The error for a quantised layer that cannot be adapted."""
    return NotImplementedError(
        f"target_modules matches {name!r}, {what}; {_WHAT_WORKS}; load the model in one of these forms or unquantised"
    )


__all__ = ["Quantization", "find_quantization"]
