"""`Linear`: a linear layer with sparse updates, also transformers' `Conv1D`."""

from __future__ import annotations

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from snella.ops.spec import LayerOp, LinearOp
from snella.tuner.layer import SnellaLayer


class Linear(SnellaLayer):
    """A linear layer, or transformers' `Conv1D`, which stores its weight transposed."""

    @property
    def is_transposed(self) -> bool:
        """Whether the base weight is stored as `[in, out]`."""
        return isinstance(self.get_base_layer(), Conv1D)

    def _oriented_weight(self) -> Tensor:
        weight = self._base_tensor("weight")
        return weight.T if self.is_transposed else weight

    def _base_layout(self, oriented: Tensor) -> Tensor:
        return oriented.T if self.is_transposed else oriented

    def _product(self) -> LayerOp:
        return LinearOp()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """The update is a plain addition to the weight of a linear layer, which a low-rank fit can approximate."""
        return True

    def __repr__(self) -> str:
        return "snella." + super().__repr__()


__all__ = ["Linear"]
