"""`Conv2d`: a two-dimensional convolution with sparse updates."""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from snella.ops.spec import Conv2dOp
from snella.tuner.layer import SnellaLayer


class Conv2d(SnellaLayer):
    """A two-dimensional convolution, its weight `[m, c/groups, kh, kw]` seen as `[m, c/groups·kh·kw]`."""

    # convolutions mostly see rectified inputs, whose mean adds up over the update's mostly positive entries
    largest_start = 0.002

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # refuse here what the backward pass could not do
        self._product().padding_sizes(self._oriented_weight().shape)

    def _product(self) -> Conv2dOp:
        base = cast(nn.Conv2d, self.get_base_layer())
        padding = base.padding if base.padding_mode == "zeros" else (0, 0)
        return Conv2dOp(base.stride, padding, base.dilation, base.groups)

    def _prepare_input(self, x: Tensor) -> Tensor:
        base = cast(nn.Conv2d, self.get_base_layer())
        if base.padding_mode == "zeros":
            return x
        return F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)

    def __repr__(self) -> str:
        return "snella." + super().__repr__()


__all__ = ["Conv2d"]
