"""NOAH's supernet: modules of the largest size, of which any smaller one is the first part."""

import copy
import math
from random import Random
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snella.methods.adapter import Adapter, apply_adapter
from snella.methods.attaching import attach
from snella.methods.blocks import token_blocks, width_of_block
from snella.methods.noah_search import Subnet, SubnetSpace
from snella.methods.own_weights import train_head
from snella.methods.selection_data import SelectionData
from snella.methods.spt_lora import LowRank, add_low_rank
from snella.methods.vpt import Prompts, insert_prompts, make_prompts, remove_prompts


class SuperPrompts(nn.Module):
    """Prompts of which the first `active` stand in.

    Args:
        prompts: All of them.
    """

    def __init__(self, prompts: Prompts) -> None:
        super().__init__()
        self.prompts, self.active = prompts, 0

    def insert(self, x: Tensor) -> Tensor:
        """`x` with the active prompts behind its prefix."""
        prefix = self.prompts.prefix
        tokens = self.prompts.tokens[: self.active].to(x.dtype).expand(len(x), -1, -1)
        return torch.cat([x[:, :prefix], tokens, x[:, prefix:]], dim=1)

    def remove(self, x: Tensor) -> Tensor:
        """`x` without what became of them."""
        prefix = self.prompts.prefix
        return torch.cat([x[:, :prefix], x[:, prefix + self.active :]], dim=1)


class SuperLowRank(LowRank):
    """A low-rank update of which the first `active` ranks work."""

    active = 0

    def update(self, x: Tensor) -> Tensor:
        """What the active ranks add."""
        return F.linear(F.linear(x, self.A[: self.active]), self.B[:, : self.active])


class SuperAdapter(Adapter):
    """A bottleneck of which the first `active` channels work."""

    active = 0

    def forward(self, h: Tensor) -> Tensor:
        """`h` and what the active channels add; `h` itself without any."""
        if not self.active:
            return h
        inner = F.linear(h, self.down.weight[: self.active], self.down.bias[: self.active])
        return h + F.linear(self.act(inner), self.up.weight[:, : self.active], self.up.bias)


def build_supernet(model: nn.Module, head: str, size: int) -> nn.Module:
    """A copy of a frozen model with everything of the largest size in every block, and its head trainable."""
    supernet = copy.deepcopy(model)
    train_head(supernet, head)
    for _, block in token_blocks("noah", supernet, head):
        attention, mlp = cast(nn.Module, block.attn), cast(nn.Module, block.mlp)
        qkv = cast(nn.Linear, attention.qkv)
        prompts = SuperPrompts(make_prompts(supernet, block, size))
        attach(block, "prompts", prompts, before=insert_prompts, after=remove_prompts)
        attach(qkv, "low_rank", SuperLowRank(qkv.out_features, qkv.in_features, size), after=add_low_rank)
        attach(mlp, "adapter", SuperAdapter(width_of_block(block) or 0, size), after=apply_adapter)
    return supernet


def activate(supernet: nn.Module, subnet: Subnet) -> None:
    """Let the supernet compute as one of its combinations."""
    kinds: tuple[type[SuperPrompts | SuperLowRank | SuperAdapter], ...] = (SuperPrompts, SuperLowRank, SuperAdapter)
    for kind, sizes in zip(kinds, subnet, strict=True):
        parts = [module for module in supernet.modules() if isinstance(module, kind)]
        for part, size in zip(parts, sizes, strict=True):
            part.active = size


def train_supernet(
    supernet: nn.Module, space: SubnetSpace, data: SelectionData, *, epochs: int, lr: float, weight_decay: float
) -> Random:
    """Train with a random combination for each batch; the rate falls along a cosine, epoch by epoch.

    Args:
        supernet: From `build_supernet`.
        space: Combinations, whatever their parameters.
        data: Training batches and the loss.
        epochs: Passes over the training data.
        lr: First learning rate of AdamW.
        weight_decay: Of AdamW.

    Returns:
        The source of random numbers, seeded from torch's, for the search to go on with.

    Raises:
        ValueError: There is no batch, or a loss is not finite.
    """
    draw = Random(int(torch.randint(2**31, ())))
    device = next(supernet.parameters()).device
    optimizer = torch.optim.AdamW([p for p in supernet.parameters() if p.requires_grad], lr, weight_decay=weight_decay)
    supernet.train()
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * epoch / epochs)) / 2
        total, steps = 0.0, 0
        for images, labels in data():
            activate(supernet, space.sample(draw))
            loss = data.loss(supernet(images.to(device)), labels.to(device))
            if not math.isfinite(loss.item()):
                raise ValueError(
                    f"the loss of NOAH's supernet is {loss.item()} in epoch {epoch + 1}; lower supernet_lr={lr:g}"
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total, steps = total + loss.item(), steps + 1
        if not steps:
            raise ValueError("batches() must give at least one batch of images and labels, got none")
        data.report(f"noah: supernet epoch {epoch + 1} of {epochs}, loss {total / steps:.4f}")
    return draw


@torch.no_grad()
def accuracy_of(supernet: nn.Module, subnet: Subnet, data: SelectionData) -> tuple[float, float]:
    """Share of validation images that a combination recognises, and the negative loss, which decides between equals.

    Raises:
        ValueError: There is no validation image.
    """
    activate(supernet, subnet)
    supernet.eval()
    device = next(supernet.parameters()).device
    right = images_seen = 0
    loss = 0.0
    for images, labels in data.validation() if data.validation is not None else ():
        outputs, labels = supernet(images.to(device)), labels.to(device)
        right += int((outputs.argmax(dim=1) == labels).sum())
        loss += float(data.loss(outputs, labels)) * len(images)
        images_seen += len(images)
    if not images_seen:
        raise ValueError("validation must give at least one batch of images and labels, got none")
    return right / images_seen, -loss / images_seen
