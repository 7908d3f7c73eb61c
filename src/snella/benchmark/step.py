"""One contender that can take a step, and the clock it is timed by."""

from __future__ import annotations

import time
from dataclasses import dataclass

import timm
import torch
from torch import Tensor, nn

from snella.benchmark.contenders import CONTENDERS, NUM_CLASSES, Setting
from snella.tuner import BudgetAllocator, create_snella_optimizer
from snella.tuner.layer import SnellaLayer


@dataclass(frozen=True)
class StepTime:
    """Seconds of one training step."""

    forward_s: float
    backward_s: float
    step_s: float


class Runner:
    """A contender with its optimiser, ready to step.

    Args:
        name: One of `CONTENDERS`.
        setting: What it is built for.
    """

    def __init__(self, name: str, setting: Setting) -> None:
        self.device = torch.device(setting.device)
        self.model = CONTENDERS[name](setting.base(), setting).train()
        self.optimizer = create_snella_optimizer(self.model, lr=1e-4)
        if any(isinstance(module, SnellaLayer) for module in self.model.modules()):
            BudgetAllocator(self.model, total_epochs=100, steps_per_epoch=100).attach(self.optimizer)

    def step(self, images: Tensor, labels: Tensor) -> StepTime:
        """Forward, backward, optimiser."""
        start = self._now()
        loss = nn.functional.cross_entropy(self.model(images), labels)
        forward = self._now()
        loss.backward()
        backward = self._now()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return StepTime(forward - start, backward - forward, self._now() - start)

    def has_finite_gradients(self, images: Tensor, labels: Tensor) -> bool:
        """Whether a step's gradients are there and finite; also a warm-up."""
        nn.functional.cross_entropy(self.model(images), labels).backward()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        found = bool(gradients) and all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
        self.optimizer.zero_grad()
        return found

    @property
    def trainable(self) -> int:
        """Parameters that learn."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def _now(self) -> float:
        """A clock, once the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def random_batch(setting: Setting, batch: int) -> tuple[Tensor, Tensor]:
    """Images as the backbone takes them, and labels."""
    configuration = timm.get_pretrained_cfg(setting.backbone)
    side = configuration.input_size[-1] if configuration is not None else 224
    images = torch.randn(batch, 3, side, side, device=setting.device, dtype=setting.dtype)
    return images, torch.randint(0, NUM_CLASSES, (batch,), device=setting.device)
