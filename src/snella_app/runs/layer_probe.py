"""Linear head on pooled features of several layers; the final head of a run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from snella.compat.sparse_file import tensors_bytes
from snella_app.files import write_bytes
from snella_app.methods.model_parts import base_model

LAYER_PROBE = "layer_probe.safetensors"
"""File name in the adapter folder of a run."""
_LAYERS = 4
_TENSORS = ("weight", "intercept")


def probed_layers(model: nn.Module) -> list[int]:
    """Select up to four layers of timm's `feature_info` for a probe, ending with the last one.

    The spacing is a sixth of all layers: blocks 6, 8, 10 and 12 of 12, or the last four of at most eight stages.

    Args:
        model: Model from `build_method` or `load_trained`.

    Returns:
        Ascending indices from 0; empty for models without `forward_intermediates`.
    """
    base = base_model(model)
    count = len(getattr(base, "feature_info", None) or [])
    if not callable(getattr(base, "forward_intermediates", None)):
        return []
    step = max(1, round(count / 6))
    return [layer for layer in range(count - 1 - (_LAYERS - 1) * step, count, step) if layer >= 0]


def layer_features(model: nn.Module, images: Tensor, layers: Sequence[int]) -> Tensor:
    """Compute pooled features of several layers.

        z ‖ mean(A_1) ‖ class token(A_1) ‖ …        A_l: output of layer l from timm with `norm=True`

    Args:
        model: As for `probed_layers`.
        images: `[batch, channels, height, width]`.
        layers: Indices into timm's `feature_info`.

    Returns:
        `[batch, width]`: the pooled features z of the model, then for each layer the mean over positions and, except
        for the last layer, the class token if there is one.
    """
    base: Any = base_model(model)
    has_tokens = getattr(base, "num_prefix_tokens", 0) > 0
    options = {"return_prefix_tokens": True} if has_tokens else {}
    final, maps = base.forward_intermediates(images, indices=list(layers), norm=True, output_fmt="NCHW", **options)
    pooled = [base.forward_head(final, pre_logits=True).flatten(1)]
    for index, entry in enumerate(maps):
        positions, tokens = entry if has_tokens else (entry, None)
        pooled.append(positions.mean((2, 3)))
        if tokens is not None and index < len(maps) - 1:
            pooled.append(tokens[:, 0])
    return torch.cat(pooled, dim=1)


class LayerProbe(nn.Module):
    """Model with a linear head on `layer_features`: `[batch, channels, height, width]` → `[batch, outputs]`.

    As in Head2Toe (Evci et al., arXiv 2201.03529), earlier layers can separate classes better than the last one if the
    images differ from the pre-training images.

    Args:
        model: As for `probed_layers`; its head is not used.
        layers: As for `layer_features`.
        weight: `[outputs, width]`.
        bias: `[outputs]`.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int], weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.model, self.layers = model, list(layers)
        self.linear = nn.Linear(weight.shape[1], weight.shape[0])
        self.linear.requires_grad_(False)
        self.linear.weight.copy_(weight)
        self.linear.bias.copy_(bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return the outputs of a batch."""
        features = layer_features(self.model, images, self.layers)
        return self.linear(features.to(self.linear.weight.dtype))

    @property
    def has_tokens(self) -> bool:
        """True if the layers have prefix tokens, such as a class token."""
        return getattr(self.get_base_model(), "num_prefix_tokens", 0) > 0

    def get_base_model(self) -> nn.Module:
        """Return the backbone with its adapters."""
        return base_model(self.model)

    def with_model(self, model: nn.Module) -> "LayerProbe":
        """Return the same probe on another model, such as the merged model."""
        linear = self.linear
        return LayerProbe(model, self.layers, linear.weight.detach(), linear.bias.detach()).to(linear.weight.device)

    def save(self, path: Path) -> None:
        """Write the probe to a file."""
        metadata = {"layers": json.dumps(self.layers), "has_tokens": json.dumps(self.has_tokens)}
        parameters = (self.linear.weight, self.linear.bias)
        tensors = {n: t.detach().float().cpu().contiguous() for n, t in zip(_TENSORS, parameters, strict=True)}
        write_bytes(path, tensors_bytes(tensors, metadata))


def read_layer_probe(adapter: Path, model: nn.Module) -> LayerProbe | None:
    """Load the probe from an adapter folder; None if it has no probe.

    Args:
        adapter: Folder of the adapter.
        model: Model that provides the features.

    Raises:
        ValueError: If the file is damaged.
    """
    path = adapter / LAYER_PROBE
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            layers = json.loads((file.metadata() or {}).get("layers", "null"))
            weight, bias = (file.get_tensor(name) for name in _TENSORS)
        base: Any = base_model(model)
        if not isinstance(layers, list) or not set(layers) <= set(range(len(base.feature_info))):
            raise ValueError(f"layers are {layers}")
        return LayerProbe(model, layers, weight, bias)
    except (OSError, SafetensorError, RuntimeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}; copy it again, or train again with `--overwrite`") from error
