"""The final head of a run: a head on pooled features of several layers, fitted after training.

`LayerProbe` combines the trained model with such a head, which is linear or a mixture of a kernel head and a linear
head. In predictions, this head replaces the head that was trained with the model.
"""

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
_MAX_LAYERS = 4


def probed_layers(model: nn.Module) -> list[int]:
    """Select up to four layers of timm's `feature_info` for a probe, ending with the last one.

    The spacing is a sixth of all layers: blocks 6, 8, 10, and 12 of 12, or the last four of at most eight stages.

    Args:
        model: Model from `build_method` or `load_trained`.

    Returns:
        Ascending indices from 0. The list is empty for models without `forward_intermediates` or `feature_info`.
    """
    base = base_model(model)
    num_layers = len(getattr(base, "feature_info", None) or [])
    if not callable(getattr(base, "forward_intermediates", None)):
        return []
    step = max(1, round(num_layers / 6))
    first = num_layers - 1 - (_MAX_LAYERS - 1) * step  # negative for models with few layers
    return [layer for layer in range(first, num_layers, step) if layer >= 0]


def layer_features(model: nn.Module, images: Tensor, layers: Sequence[int]) -> Tensor:
    """Compute pooled features of several layers.

        z ‖ mean(A_1) ‖ class token(A_1) ‖ …        A_l: output of layer l from timm with `norm=True`

    Args:
        model: As for `probed_layers`.
        images: `[batch, channels, height, width]`.
        layers: Indices into timm's `feature_info`.

    Returns:
        `[batch, width]`: the pooled features z of the model, then for each layer the mean over positions and the first
        prefix token, such as the class token. The token is left out for the last layer and for models without one.

    Raises:
        ValueError, RuntimeError: If a layer has additional tokens, such as prompts.
    """
    base: Any = base_model(model)
    has_tokens = getattr(base, "num_prefix_tokens", 0) > 0
    options = {"return_prefix_tokens": True} if has_tokens else {}
    final, maps = base.forward_intermediates(images, indices=list(layers), norm=True, output_fmt="NCHW", **options)
    pooled = [base.forward_head(final, pre_logits=True).flatten(1)]
    last = len(maps) - 1
    for index, (layer, output) in enumerate(zip(layers, maps, strict=True)):
        positions, tokens = output if has_tokens else (output, None)
        if positions.shape[1] != (expected := base.feature_info[layer]["num_chs"]):
            raise ValueError(
                f"layer {layer} must have {expected} channels, got {positions.shape[1]}; use final_head='trained' with "
                "methods that add tokens"
            )
        pooled.append(positions.mean((2, 3)))
        if tokens is not None and index < last:
            pooled.append(tokens[:, 0])
    return torch.cat(pooled, dim=1)


class KernelHead(nn.Module):
    """Head with a Gaussian kernel: `[batch, width]` → `[batch, outputs]`.

        f(x) = b + Σ_j a_j k(x̂, c_j),   k(x̂, c) = exp(−‖x̂ − c‖² / (2 width)),   x̂ = clip((x − mean) / std, ±10)

    Standardized features have a mean squared distance of `2 width`. Clipping x̂ bounds the distance of an image from
    the training images.

    Args:
        centers: c, standardized features of the training images, `[images, width]`. They are rounded to float16, the
            precision in which they are saved.
        mean: Mean of each feature, `[width]`.
        std: Standard deviation of each feature, `[width]`; infinite for features to ignore.
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
        num_outputs = len(intercept)
        num_images = len(centers)
        shapes = {
            "centers": [num_images, width],
            "mean": [width],
            "std": [width],
            "weight": [num_outputs, num_images],
            "intercept": [num_outputs],
        }
        for name, tensor in tensors.items():
            if list(tensor.shape) != shapes[name]:
                raise ValueError(f"{name} must have shape {shapes[name]}, got {list(tensor.shape)}")
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
        # large terms of both signs cancel, so exported graphs would give different outputs in float32
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
        kernel_shape = (kernel.out_features, kernel.in_features)
        linear_shape = (linear.out_features, linear.in_features)
        if kernel_shape != linear_shape:
            raise ValueError(f"linear must have shape {kernel_shape}, got {linear_shape}")
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
        kernel_term = self.kernel(features).log_softmax(-1) + (1 - self.share).log()
        linear_term = self.linear(features).log_softmax(-1) + self.share.log()
        return torch.stack((kernel_term, linear_term)).logsumexp(0)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to save, with the centers in float16."""
        linear_tensors = {f"linear.{name}": tensor for name, tensor in _linear_tensors(self.linear).items()}
        kernel_tensors = {**self.kernel.state_dict(), "centers": self.kernel.centers.half()}
        return {**kernel_tensors, **linear_tensors, "share": self.share}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "MixedHead":
        """Create the head from the result of `tensors`."""
        linear_tensors: dict[str, Tensor] = {}
        kernel_tensors: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if name.startswith("linear."):
                linear_tensors[name.removeprefix("linear.")] = tensor
            elif name != "share":
                kernel_tensors[name] = tensor
        return cls(KernelHead(**kernel_tensors), linear_head(**linear_tensors), tensors["share"])


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
    """Return the weight and the intercept of a linear head, as for `linear_head`."""
    return {"weight": head.weight.detach().float(), "intercept": head.bias.detach().float()}


class LayerProbe(nn.Module):
    """Model with a head on `layer_features`: `[batch, channels, height, width]` → `[batch, outputs]`.

    If the images differ from the pre-training images, earlier layers can separate the classes better than the last one
    (Head2Toe, Evci et al., arXiv 2201.03529).

    Args:
        model: As for `probed_layers`; its head is not used.
        layers: As for `layer_features`.
        head: Head on these features.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int], head: nn.Linear | MixedHead) -> None:
        super().__init__()
        self.model = model
        self.layers = list(layers)
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """Return the outputs of a batch."""
        features = layer_features(self.model, images, self.layers)
        return self.head(features.to(self.head.weight.dtype))

    @property
    def has_tokens(self) -> bool:
        """True if the model has prefix tokens, such as a class token."""
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
        cpu_tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        write_bytes(path, tensors_bytes(cpu_tensors, metadata))


def read_layer_probe(adapter: Path, model: nn.Module) -> LayerProbe | None:
    """Load the probe from an adapter folder, or return None if the folder has no probe.

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
            raise ValueError(f"layers must be indices of the model's layers, got {layers}")
        head = MixedHead.from_tensors(tensors) if "share" in tensors else linear_head(**tensors)
        return LayerProbe(model, layers, head)
    except (OSError, SafetensorError, RuntimeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}; copy it again, or train again with `--overwrite`") from error
