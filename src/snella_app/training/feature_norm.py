"""Feature normalization before a linear head during training; the saved head is a plain linear layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from snella_app.training.checkpoints import CheckpointError, require_file
from snella_app.training.distributed import sum_across_processes

_FILE = "feature_norm.safetensors"
_MOMENTUM = 0.1
_EPS = 1e-5


class FeatureNorm(TrainerCallback):
    """Callback that standardizes the inputs of a linear head by their running mean and variance.

        y = W ẑ + b,   ẑ = (z − μ) / σ
        μ ← μ + m (mean(z) − μ),   σ² ← σ² + m (var(z) − σ²)      after each optimizer step, m = 0.1

    The head learns at the same rate along every feature, independent of its scale, and adapts to features that change
    during training. μ and σ are constants for differentiation, so a step does not depend on the split into batches and
    processes. `folded` provides the same function as a plain linear layer of `z`.

    Args:
        head: Linear layer, `[classes, width]`; its weights are converted to `ẑ` with unchanged outputs.
        features: Features before training, `[images, width]`, for the initial statistics.
    """

    def __init__(self, head: nn.Linear, features: Tensor) -> None:
        self.head = head
        device = head.weight.device
        self.mean = features.float().mean(0).to(device)
        self.var = features.float().var(0, correction=0).to(device)
        self._sums: list[Tensor] = []
        with torch.no_grad():
            head.bias.add_(head.weight @ self.mean)
            head.weight.mul_(self._std)
        self._handle = head.register_forward_pre_hook(self._normalize)

    @property
    def _std(self) -> Tensor:
        return (self.var + _EPS).sqrt()

    def _normalize(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        features = inputs[0]
        if head.training and torch.is_grad_enabled():
            z = features.detach().float()
            self._sums.append(torch.cat([z.new_tensor([len(z)]), z.sum(0), z.square().sum(0)]))
        return (((features.float() - self.mean) / self._std).to(features.dtype), *inputs[1:])

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Update the statistics with the images of the step from all batches and processes."""
        count, sums, squares = sum_across_processes(torch.stack(self._sums).sum(0)).split(
            [1, len(self.mean), len(self.mean)]
        )
        self._sums = []
        mean = sums / count
        self.mean = torch.lerp(self.mean, mean, _MOMENTUM)
        self.var = torch.lerp(self.var, (squares / count - mean.square()).clamp_min(0), _MOMENTUM)

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Use weights for unnormalized features inside the context: `W / σ` and `b − W μ / σ`."""
        weight, bias = self.head.weight.detach().clone(), self.head.bias.detach().clone()
        with torch.no_grad():
            self.head.weight.div_(self._std)
            self.head.bias.sub_(self.head.weight @ self.mean)
        try:
            yield
        finally:
            with torch.no_grad():
                self.head.weight.copy_(weight)
                self.head.bias.copy_(bias)

    def remove(self) -> None:
        """Remove the normalization; the head receives unnormalized features."""
        self._handle.remove()

    def save(self, checkpoint: Path) -> None:
        """Write the statistics to a checkpoint folder."""
        save_file({"mean": self.mean.cpu(), "var": self.var.cpu()}, checkpoint / _FILE)

    def load(self, checkpoint: Path) -> None:
        """Load the statistics from a checkpoint.

        Raises:
            CheckpointError: If the checkpoint has no statistics, or has statistics of another width.
        """
        path = require_file(checkpoint, _FILE)
        stored = load_file(path, str(self.mean.device))
        for name in ("mean", "var"):
            shape = list(stored[name].shape) if name in stored else None
            if shape != [len(self.mean)]:
                raise CheckpointError(f"{path} must contain {name!r} of shape {[len(self.mean)]}, got {shape}")
        self.mean, self.var = stored["mean"], stored["var"]


__all__ = ["FeatureNorm"]
