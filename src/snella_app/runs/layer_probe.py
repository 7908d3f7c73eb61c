"""Linear classifier on pooled features of several layers: the final head of a run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from snella_app.files import write_bytes
from snella_app.methods.model_parts import base_model

LAYER_PROBE = "layer_probe.safetensors"
"""File beside a run's adapter."""
_LAYERS = 4
_TENSORS = ("weight", "intercept")


def probed_layers(model: nn.Module) -> list[int]:
    """Layers that a probe reads: up to four of those in timm's `feature_info`, the last one and evenly spaced ones.

    They are a sixth of the layers apart: 6, 8, 10 and 12 of 12 blocks, the last four of at most eight stages.

    Args:
        model: From `build_method` or `load_trained`.

    Returns:
        Indices from 0, ascending; none for models without `forward_intermediates`.
    """
    base = base_model(model)
    count = len(getattr(base, "feature_info", None) or [])
    if not callable(getattr(base, "forward_intermediates", None)):
        return []
    step = max(1, round(count / 6))
    return [layer for layer in range(count - 1 - (_LAYERS - 1) * step, count, step) if layer >= 0]


def layer_features(model: nn.Module, images: Tensor, layers: Sequence[int]) -> Tensor:
    """Pooled features of several layers.

        z ‖ mean(A_1) ‖ class token(A_1) ‖ …        A_l: the output of layer l, normalized where the model does

    Args:
        model: As for `probed_layers`.
        images: `[batch, channels, height, width]`.
        layers: Indices into timm's `feature_info`.

    Returns:
        `[batch, width]`: the model's own pooled features z, and of each layer the mean over positions and, but for the
        last layer, the class token if there is one.
    """
    base: Any = base_model(model)
    has_tokens = getattr(base, "num_prefix_tokens", 0) > 0
    options = {"return_prefix_tokens": True} if has_tokens else {}
    final, maps = base.forward_intermediates(images, indices=list(layers), norm=True, output_fmt="NCHW", **options)
    pooled = [base.forward_head(final, pre_logits=True).flatten(1)]
    for place, entry in enumerate(maps):
        positions, tokens = entry if has_tokens else (entry, None)
        pooled.append(positions.mean((2, 3)))
        if tokens is not None and place < len(maps) - 1:
            pooled.append(tokens[:, 0])
    return torch.cat(pooled, dim=1)


class LayerProbe(nn.Module):
    """A model whose outputs are linear in `layer_features`: `[batch, channels, height, width]` → `[batch, outputs]`.

    The idea is Head2Toe's (Evci et al., arXiv 2201.03529): earlier layers can separate classes better than the last one
    if the images differ from those of the pre-training.

    Args:
        model: As for `probed_layers`; its own head is not used.
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
        """Outputs of a batch."""
        features = layer_features(self.model, images, self.layers)
        return self.linear(features.to(self.linear.weight.dtype))

    def get_base_model(self) -> nn.Module:
        """The backbone with its adapters."""
        return base_model(self.model)

    def on(self, model: nn.Module) -> "LayerProbe":
        """The same probe on another model, such as the merged one."""
        linear = self.linear
        return LayerProbe(model, self.layers, linear.weight.detach(), linear.bias.detach()).to(linear.weight.device)

    def save(self, path: Path) -> None:
        """Write the probe to a file."""
        has_tokens = getattr(self.get_base_model(), "num_prefix_tokens", 0) > 0
        metadata = {"layers": json.dumps(self.layers), "has_tokens": json.dumps(has_tokens)}
        both = (self.linear.weight, self.linear.bias)
        tensors = {n: t.detach().float().cpu().contiguous() for n, t in zip(_TENSORS, both, strict=True)}
        write_bytes(path, save(tensors, metadata))


def layer_probe_snippet(path: Path) -> str:
    """Python lines that compute the outputs of a probe beside a merged model, with timm and torch alone.

    Args:
        path: The file; its model is called `model` in the lines.
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tokens = json.loads(metadata["has_tokens"])
    arguments = f"indices={metadata['layers']}, norm=True, output_fmt='NCHW'"
    arguments += ", return_prefix_tokens=True" if tokens else ""
    pooled = (
        "    for grid, tokens in maps[:-1]:\n        pooled += [grid.mean((2, 3)), tokens[:, 0]]\n"
        "    pooled += [maps[-1][0].mean((2, 3))]\n"
        if tokens
        else "    pooled += [grid.mean((2, 3)) for grid in maps]\n"
    )
    return (
        f"import torch; from safetensors.torch import load_file\nhead = load_file({str(path)!r})\n"
        "def logits_of(images):  # the outputs of snella predict: those of the final head, on several layers\n"
        f"    final, maps = model.forward_intermediates(images, {arguments})\n"
        "    pooled = [model.forward_head(final, pre_logits=True).flatten(1)]\n"
        f"{pooled}    return torch.cat(pooled, 1) @ head['weight'].T + head['intercept']"
    )


def read_layer_probe(adapter: Path, model: nn.Module) -> LayerProbe | None:
    """The probe beside an adapter; None where there is none.

    Args:
        adapter: Folder.
        model: What the probe reads the features of.

    Raises:
        ValueError: The file is damaged.
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
