"""Head on pooled features of several layers; the final head of a run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from snella.compat.sparse_file import tensors_bytes
from snella.ops import widest_dtype
from snella_app.files import write_bytes
from snella_app.methods.model_parts import base_model

LAYER_PROBE = "layer_probe.safetensors"
"""File name in the adapter folder of a run."""
_LAYERS = 4


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
        for the last layer, the first prefix token, such as the class token, if there is one.

    Raises:
        ValueError, RuntimeError: If a layer has additional tokens, such as prompts.
    """
    base: Any = base_model(model)
    has_tokens = getattr(base, "num_prefix_tokens", 0) > 0
    options = {"return_prefix_tokens": True} if has_tokens else {}
    final, maps = base.forward_intermediates(images, indices=list(layers), norm=True, output_fmt="NCHW", **options)
    pooled = [base.forward_head(final, pre_logits=True).flatten(1)]
    for index, (layer, entry) in enumerate(zip(layers, maps, strict=True)):
        positions, tokens = entry if has_tokens else (entry, None)
        if positions.shape[1] != (expected := base.feature_info[layer]["num_chs"]):
            raise ValueError(
                f"layer {layer} must have {expected} channels, got {positions.shape[1]}; use final_head='trained' with "
                "methods that add tokens"
            )
        pooled.append(positions.mean((2, 3)))
        if tokens is not None and index < len(maps) - 1:
            pooled.append(tokens[:, 0])
    return torch.cat(pooled, dim=1)


class KernelHead(nn.Module):
    """Head with a Gaussian kernel: `[batch, width]` → `[batch, outputs]`.

        f(x) = b + Σ_j a_j k(x̂, c_j),   k(x̂, c) = exp(−‖x̂ − c‖² / (2 width)),   x̂ = clip((x − mean) / std, ±10)

    Standardized features have a mean squared distance of `2 width`. The limits of x̂ bound the distance of images from
    the training images.

    Args:
        centers: c, standardized features of the training images, `[images, width]`; rounded to float16.
        mean: `[width]`.
        std: `[width]`; infinite for features to ignore.
        weight: a, `[outputs, images]`.
        intercept: b, `[outputs]`.

    Raises:
        ValueError: If the shape of a tensor does not match the others.
    """

    def __init__(self, centers: Tensor, mean: Tensor, std: Tensor, weight: Tensor, intercept: Tensor) -> None:
        super().__init__()
        centers = centers.half().float()
        tensors = {"centers": centers, "mean": mean, "std": std, "weight": weight, "intercept": intercept}
        width = len(mean)
        outputs = len(intercept)
        images = len(centers)
        shapes = {"centers": [images, width], "mean": [width], "std": [width], "weight": [outputs, images]}
        for name, tensor in tensors.items():
            if list(tensor.shape) != shapes.get(name, [outputs]):
                raise ValueError(f"{name} must have shape {shapes.get(name, [outputs])}, got {list(tensor.shape)}")
            self.register_buffer(name, tensor)

    centers: Tensor
    mean: Tensor
    std: Tensor
    weight: Tensor
    intercept: Tensor

    @property
    def in_features(self) -> int:
        """Width of the features."""
        return len(self.mean)

    @property
    def out_features(self) -> int:
        """Number of outputs."""
        return len(self.intercept)

    def forward(self, features: Tensor) -> Tensor:
        """Return the outputs of a batch."""
        kernel = gaussian_kernel(clipped((features - self.mean) / self.std), self.centers)
        # large terms of both signs cancel, so exported graphs would differ in float32
        precise = widest_dtype(kernel.device.type)
        return (kernel.to(precise) @ self.weight.T.to(precise)).to(kernel.dtype) + self.intercept


class MixedHead(nn.Module):
    """Mixture of a kernel head and a linear head: `[batch, width]` → `[batch, outputs]`.

        f(x) = log((1 − share) softmax(kernel(x)) + share softmax(linear(x)))

    Args:
        kernel: Kernel head.
        linear: Linear head.
        share: Weight of the linear head's probabilities, 0-dim, in (0, 1).

    Raises:
        ValueError: If the heads have different widths or numbers of outputs.
    """

    def __init__(self, kernel: KernelHead, linear: nn.Linear, share: Tensor) -> None:
        super().__init__()
        shapes = [(head.out_features, head.in_features) for head in (kernel, linear)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"linear must have shape {shapes[0]}, got {shapes[1]}")
        self.kernel = kernel
        self.linear = linear
        self.register_buffer("share", share)

    share: Tensor

    @property
    def in_features(self) -> int:
        """Width of the features."""
        return self.kernel.in_features

    @property
    def out_features(self) -> int:
        """Number of outputs."""
        return self.kernel.out_features

    @property
    def weight(self) -> Tensor:
        """Weight of the linear head."""
        return self.linear.weight

    def forward(self, features: Tensor) -> Tensor:
        """Return the log-probabilities of a batch."""
        kernel = self.kernel(features).log_softmax(-1) + (1 - self.share).log()
        linear = self.linear(features).log_softmax(-1) + self.share.log()
        return torch.stack((kernel, linear)).logsumexp(0)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to save, with the centers in float16."""
        linear = {f"linear.{name}": tensor for name, tensor in _linear_tensors(self.linear).items()}
        return {**self.kernel.state_dict(), "centers": self.kernel.centers.half(), **linear, "share": self.share}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "MixedHead":
        """Create the head from the result of `tensors`."""
        prefix = "linear."
        linear = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        kernel = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix) and name != "share"}
        return cls(KernelHead(**kernel), linear_head(**linear), tensors["share"])


def clipped(x: Tensor) -> Tensor:
    """Limit standardized features to ±10."""
    return x.clamp(-10.0, 10.0)


def gaussian_kernel(x: Tensor, centers: Tensor) -> Tensor:
    """Compute `exp(−‖x_i − c_j‖² / (2 width))`, `[images, centers]`.

    Args:
        x: `[images, width]`.
        centers: `[centers, width]`.
    """
    # can be exported to ONNX, unlike torch.cdist
    distances = x.square().sum(1, keepdim=True) + centers.square().sum(1) - 2 * x @ centers.T
    return torch.exp(distances.clamp_min(0) / (-2 * x.shape[1]))


def linear_head(weight: Tensor, intercept: Tensor) -> nn.Linear:
    """Return a frozen linear layer with the given weight, `[outputs, width]`, and intercept, `[outputs]`."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device).requires_grad_(False)
    linear.weight.copy_(weight)
    linear.bias.copy_(intercept)
    return linear


def _linear_tensors(head: nn.Linear) -> dict[str, Tensor]:
    """Return the arguments of `linear_head` for a linear head."""
    return {"weight": head.weight.detach().float(), "intercept": head.bias.detach().float()}


class LayerProbe(nn.Module):
    """Model with a head on `layer_features`: `[batch, channels, height, width]` → `[batch, outputs]`.

    As in Head2Toe (Evci et al., arXiv 2201.03529), earlier layers can separate classes better than the last one if the
    images differ from the pre-training images.

    Args:
        model: As for `probed_layers`; its head is not used.
        layers: As for `layer_features`.
        head: Head on these features.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int], head: nn.Linear | MixedHead) -> None:
        super().__init__()
        self.model, self.layers, self.head = model, list(layers), head

    def forward(self, images: Tensor) -> Tensor:
        """Return the outputs of a batch."""
        features = layer_features(self.model, images, self.layers)
        return self.head(features.to(self.head.weight.dtype))

    @property
    def has_tokens(self) -> bool:
        """True if the layers have prefix tokens, such as a class token."""
        return getattr(self.get_base_model(), "num_prefix_tokens", 0) > 0

    def get_base_model(self) -> nn.Module:
        """Return the backbone with its adapters."""
        return base_model(self.model)

    def with_model(self, model: nn.Module) -> "LayerProbe":
        """Return the same probe on another model, such as the merged model."""
        return LayerProbe(model, self.layers, self.head)

    def save(self, path: Path) -> None:
        """Write the probe to a file."""
        metadata = {"layers": json.dumps(self.layers)}
        tensors = self.head.tensors() if isinstance(self.head, MixedHead) else _linear_tensors(self.head)
        write_bytes(path, tensors_bytes({n: t.cpu().contiguous() for n, t in tensors.items()}, metadata))


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
        tensors = load_file(path)
        base: Any = base_model(model)
        if not isinstance(layers, list) or not set(layers) <= set(range(len(base.feature_info))):
            raise ValueError(f"layers are {layers}")
        head = MixedHead.from_tensors(tensors) if "share" in tensors else linear_head(**tensors)
        return LayerProbe(model, layers, head)
    except (OSError, SafetensorError, RuntimeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}; copy it again, or train again with `--overwrite`") from error
