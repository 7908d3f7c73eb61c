"""Method `noah`: prompts, low-rank updates, and adapters, with the sizes in each block found by a search.

Each choice of these sizes is a subnet. All subnets share the weights of a supernet, which has the largest size of each
module type in every block.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from random import Random
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snella_app.device import move_to
from snella_app.methods.method import Batches, Method, Options, SelectionData, check_by, integer, number
from snella_app.methods.partial import train_head
from snella_lab.methods.adapter import Adapter, apply_adapter
from snella_lab.methods.calibration import selection_data
from snella_lab.methods.parts import attach, block_width, token_blocks
from snella_lab.methods.prompts import Prompts, insert_prompts, make_prompts, remove_prompts
from snella_lab.methods.spt import LowRank, add_low_rank, budget_of

_SIZES = (5, 10, 50, 100)
"""Default candidate sizes, from the paper."""
_NUM_PARENTS = 10
"""Number of best subnets from which each generation is bred."""
_MUTATION_PROB = 0.2
"""Probability that a mutation resamples the size in a block."""
_DEPTH_MUTATION_PROB = 0.4
"""Probability that a mutation resamples the number of blocks with a module type."""
_MAX_TRIES = 200
"""Attempts per new candidate; a proposed subnet may exceed the budget or be known already."""


class Subnet(NamedTuple):
    """Sizes of the modules in each block. A block with size 0 has no module of that type.

    Attributes:
        prompts: Number of prompts.
        ranks: Rank of the low-rank update.
        widths: Bottleneck width of the adapter.
    """

    prompts: tuple[int, ...]
    ranks: tuple[int, ...]
    widths: tuple[int, ...]


@dataclass(frozen=True)
class SubnetSpace:
    """Search space of subnets.

    Args:
        block_widths: Token width of each block.
        qkv_sizes: Number of inputs plus number of outputs of each block's qkv layer.
        sizes: Candidate sizes, ascending.
        budget: Maximum number of parameters of a subnet.
    """

    block_widths: tuple[int, ...]
    qkv_sizes: tuple[int, ...]
    sizes: tuple[int, ...]
    budget: int

    @property
    def depths(self) -> list[int]:
        """Numbers of leading blocks that a module type may fill: 25%, 50%, 75%, or 100% of all blocks, rounded up."""
        num_blocks = len(self.block_widths)
        return sorted({math.ceil(num_blocks * quarters / 4) for quarters in (1, 2, 3, 4)})

    def count(self, subnet: Subnet) -> int:
        """Count the parameters of a subnet.

            Σ_blocks p·d + r·(in + out) + (2·d·a + a + d if a > 0)

        p is the number of prompts, r the rank, a the adapter width, and d the token width.
        """
        total = 0
        for d, qkv_size, p, r, a in zip(self.block_widths, self.qkv_sizes, *subnet, strict=True):
            total += p * d + r * qkv_size
            if a:
                total += 2 * d * a + a + d
        return total

    def smallest(self) -> Subnet:
        """Return the smallest subnet: each module type with the smallest size in the first quarter of the blocks."""
        sizes = self._padded([self.sizes[0]] * self.depths[0])
        return Subnet(sizes, sizes, sizes)

    def sample(self, rng: Random) -> Subnet:
        """Sample a random subnet, which may exceed the budget."""
        sampled: list[tuple[int, ...]] = []
        for _ in Subnet._fields:
            depth = rng.choice(self.depths)
            sizes = [rng.choice(self.sizes) for _ in range(depth)]
            sampled.append(self._padded(sizes))
        return Subnet(*sampled)

    def mutate(self, subnet: Subnet, rng: Random) -> Subnet:
        """Resample some sizes, and sometimes the depth, of each module type."""
        mutated = []
        for sizes in subnet:
            depth = sum(size > 0 for size in sizes)
            if rng.random() < _DEPTH_MUTATION_PROB:
                depth = rng.choice(self.depths)
            resampled: list[int] = []
            for size in sizes[:depth]:
                is_resampled = not size or rng.random() < _MUTATION_PROB  # blocks added by a greater depth have size 0
                resampled.append(rng.choice(self.sizes) if is_resampled else size)
            mutated.append(self._padded(resampled))
        return Subnet(*mutated)

    def cross(self, first: Subnet, second: Subnet, rng: Random) -> Subnet:
        """Take the sizes of each module type from a random parent."""
        return Subnet(*(rng.choice(pair) for pair in zip(first, second, strict=True)))

    def _padded(self, sizes: list[int]) -> tuple[int, ...]:
        """Pad the sizes with 0 for the remaining blocks."""
        return (*sizes, *[0] * (len(self.block_widths) - len(sizes)))


def search_subnet(
    space: SubnetSpace,
    score: Callable[[Subnet], tuple[float, float]],
    rng: Random,
    *,
    population: int,
    generations: int,
    report: Callable[[str], None],
) -> Subnet:
    """Find the subnet with the highest score (accuracy, negative loss) by evolutionary search.

    Ties go to the smallest subnet.

    Generation 0 contains the smallest subnet and random ones. Each of the `generations` that follow adds up to
    `population` new candidates within the budget: up to half are mutations of the best ten, up to half are crossovers
    of these ten, and the rest are random. The search ends early if a generation finds no new candidate. No candidate is
    evaluated twice. `report` receives one progress line per generation.
    """
    scores: dict[Subnet, tuple[float, float]] = {}

    def rank(subnet: Subnet) -> tuple[tuple[float, float], int, Subnet]:
        return scores[subnet], -space.count(subnet), subnet

    def breed(propose: Callable[[], Subnet], num_missing: int) -> None:
        for _ in range(num_missing * _MAX_TRIES):
            if num_missing <= 0:
                return
            subnet = propose()
            if subnet not in scores and space.count(subnet) <= space.budget:
                scores[subnet] = score(subnet)
                num_missing -= 1

    def mutate() -> Subnet:
        return space.mutate(rng.choice(parents), rng)

    def cross() -> Subnet:
        return space.cross(rng.choice(parents), rng.choice(parents), rng)

    for generation in range(generations + 1):
        num_earlier = len(scores)
        if generation == 0:
            scores[space.smallest()] = score(space.smallest())
        else:
            parents = sorted(scores, key=rank, reverse=True)[:_NUM_PARENTS]
            breed(mutate, population // 2)
            breed(cross, population // 2)
        breed(lambda: space.sample(rng), population - (len(scores) - num_earlier))
        if len(scores) == num_earlier:
            report(f"noah: no candidates left with at most {space.budget:,} parameters")
            break
        best = max(scores, key=rank)
        accuracy, negative_loss = scores[best]
        # the accuracy is 0 for tasks without class scores
        best_score = f"accuracy {accuracy:.4f}" if accuracy else f"loss {-negative_loss:.4f}"
        report(
            f"noah: generation {generation} of {generations}, {len(scores)} candidates evaluated, best {best_score} "
            f"with {space.count(best):,} parameters"
        )
    return max(scores, key=rank)


class SuperLowRank(LowRank):
    """Low-rank update that uses only the first `active` ranks."""

    active = 0

    def update(self, x: Tensor) -> Tensor:
        """Compute the update with the active ranks."""
        return F.linear(F.linear(x, self.A[: self.active]), self.B[:, : self.active])


class SuperAdapter(Adapter):
    """Adapter that uses only the first `active` bottleneck channels."""

    active = 0

    def forward(self, h: Tensor) -> Tensor:
        """Add the output of the active channels to `h`, or return `h` if there are none."""
        if not self.active:
            return h
        inner = F.linear(h, self.down.weight[: self.active], self.down.bias[: self.active])
        return h + F.linear(self.act(inner), self.up.weight[:, : self.active], self.up.bias)


def build_supernet(model: nn.Module, head: str, size: int) -> nn.Module:
    """Copy a frozen model, attach modules of the given size to every block, and make the head trainable."""
    sizes = (size,) * len(token_blocks("noah", model, head))
    return _apply(copy.deepcopy(model), head, Subnet(sizes, sizes, sizes), SuperLowRank, SuperAdapter)


def activate(supernet: nn.Module, subnet: Subnet) -> None:
    """Configure the supernet to compute a subnet."""
    # in the order of the fields of `Subnet`
    module_types: tuple[type[Prompts | SuperLowRank | SuperAdapter], ...] = (Prompts, SuperLowRank, SuperAdapter)
    for module_type, sizes in zip(module_types, subnet, strict=True):
        modules = [module for module in supernet.modules() if isinstance(module, module_type)]
        for module, size in zip(modules, sizes, strict=True):
            module.active = size


def train_supernet(supernet: nn.Module, space: SubnetSpace, data: SelectionData, *, epochs: int, lr: float) -> Random:
    """Train the supernet with AdamW, a random subnet per batch, and a per-epoch cosine learning-rate schedule.

    The random subnets may exceed the budget of the search space.

    Returns:
        Random number generator for the search, seeded from torch's global generator.

    Raises:
        ValueError: If `data` is empty, or a loss is not finite.
    """
    rng = Random(int(torch.randint(2**31, ())))
    device = next(supernet.parameters()).device
    optimizer = torch.optim.AdamW([p for p in supernet.parameters() if p.requires_grad], lr, weight_decay=1e-4)
    supernet.train()
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * epoch / epochs)) / 2
        total_loss = 0.0
        num_batches = 0
        for images, labels in data():
            activate(supernet, space.sample(rng))
            loss = data.loss(supernet(images.to(device)), move_to(labels, device))
            if not math.isfinite(loss.item()):
                raise ValueError(
                    f"the loss of NOAH's supernet is {loss.item()} in epoch {epoch + 1}; reduce supernet_lr, now {lr:g}"
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total_loss += loss.item()
            num_batches += 1
        if not num_batches:
            raise ValueError("batches() must yield at least one batch of images and labels, got none")
        data.report(f"noah: supernet epoch {epoch + 1} of {epochs}, loss {total_loss / num_batches:.4f}")
    return rng


@torch.no_grad()
def accuracy_of(supernet: nn.Module, subnet: Subnet, data: SelectionData) -> tuple[float, float]:
    """Compute the validation accuracy of a subnet and, as a tie-breaker, its negative loss.

    For tasks without class scores (`SelectionData.has_class_scores`), the accuracy is 0, so only the loss matters.

    Raises:
        ValueError: If `data` has no validation images.
    """
    activate(supernet, subnet)
    supernet.eval()
    device = next(supernet.parameters()).device
    num_correct = num_images = 0
    total_loss = 0.0
    for images, labels in data.validation() if data.validation is not None else ():
        outputs = supernet(images.to(device))
        labels = move_to(labels, device)
        if data.has_class_scores:
            num_correct += int((outputs.argmax(dim=1) == labels).sum())
        total_loss += float(data.loss(outputs, labels)) * len(images)
        num_images += len(images)
    if not num_images:
        raise ValueError("validation must yield at least one batch of images and labels, got none")
    return num_correct / num_images, -total_loss / num_images


def qkv_layers(model: nn.Module, head: str) -> list[tuple[str, nn.Module, nn.Linear]]:
    """Return the blocks of a plain ViT and their fused qkv layers as `(name, block, qkv)`.

    Raises:
        ValueError: If the model is not a plain ViT, or a block has no linear `attn.qkv`.
    """
    layers = []
    for name, block in token_blocks("noah", model, head):
        qkv = getattr(getattr(block, "attn", None), "qkv", None)
        if not isinstance(qkv, nn.Linear):
            raise ValueError(
                f"method 'noah' cannot be applied to {type(model).__name__}: {name}.attn.qkv must be a linear layer, "
                f"got {type(qkv).__name__}"
            )
        layers.append((name, block, qkv))
    return layers


def space_of(model: nn.Module, head: str, options: Options) -> SubnetSpace:
    """Build the search space of a model.

    Raises:
        ValueError: If `budget` is below the size of the smallest subnet, or `qkv_layers` rejects the model.
    """
    layers = qkv_layers(model, head)
    block_widths = tuple(block_width(block) or 0 for _, block, _ in layers)
    qkv_sizes = tuple(qkv.in_features + qkv.out_features for _, _, qkv in layers)
    sizes = tuple(sorted(options.get("sizes", _SIZES)))
    space = SubnetSpace(block_widths, qkv_sizes, sizes, budget=0)  # the budget is set below
    min_budget = space.count(space.smallest())
    budget = budget_of(options, model, head, vit_b_budget=0.64)  # the paper's budget
    if "budget" in options and budget < min_budget:
        raise ValueError(
            f"budget must be at least {min_budget / 1e6:.10g} million parameters, the size of the smallest subnet with "
            f"sizes={list(space.sizes)}, got {options['budget']}"
        )
    return replace(space, budget=max(budget, min_budget))


def _build(model: nn.Module, head: str, options: Options, batches: Batches | None) -> nn.Module:
    """Train a supernet built from a copy of the model, search its subnets, and apply the best one to the model."""
    data = selection_data(batches)
    space = space_of(model, head, options)
    if data.validation is None:
        raise ValueError(
            "method 'noah' requires validation images for its search, got none; "
            "pass batches=SelectionData(train=..., validation=...)"
        )
    supernet = build_supernet(model, head, space.sizes[-1])
    rng = train_supernet(
        supernet,
        space,
        data,
        epochs=options.get("supernet_epochs", 10),
        lr=options.get("supernet_lr", 5e-4),
    )
    best = search_subnet(
        space,
        lambda subnet: accuracy_of(supernet, subnet, data),
        rng,
        population=options.get("population", 20),
        generations=options.get("generations", 5),
        report=data.report,
    )
    return _apply(model, head, best)


def _apply(
    model: nn.Module,
    head: str,
    subnet: Subnet,
    low_rank_type: type[LowRank] = LowRank,
    adapter_type: type[Adapter] = Adapter,
) -> nn.Module:
    """Make the head trainable, and attach new modules with the subnet's sizes."""
    train_head(model, head)
    for (_, block, qkv), num_prompts, rank, adapter_width in zip(qkv_layers(model, head), *subnet, strict=True):
        if num_prompts:
            prompts = make_prompts(model, block, num_prompts)
            attach(block, "prompts", prompts, before=insert_prompts, after=remove_prompts)
        if rank:
            attach(qkv, "low_rank", low_rank_type(qkv.out_features, qkv.in_features, rank), after=add_low_rank)
        if adapter_width:
            adapter = adapter_type(block_width(block) or 0, adapter_width)
            attach(cast(nn.Module, block.mlp), "adapter", adapter, after=apply_adapter)
    return model


def _restore(model: nn.Module, head: str, options: Options, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Rebuild a saved subnet, whose sizes are the lengths of the stored tensors."""
    block_names = [name for name, _, _ in qkv_layers(model, head)]
    tensor_names = ("prompts.tokens", "attn.qkv.low_rank.A", "mlp.adapter.down.weight")  # in the order of `Subnet`
    sizes: list[tuple[int, ...]] = []
    for tensor_name in tensor_names:
        stored = [tensors.get(f"{name}.{tensor_name}", ()) for name in block_names]  # `()`, of length 0, if missing
        sizes.append(tuple(len(tensor) for tensor in stored))
    return _apply(model, head, Subnet(*sizes))


def _list_of_sizes(sizes: Any) -> str | None:
    """Return the requirement for `sizes` if it is violated, else None."""
    is_list = isinstance(sizes, list | tuple) and len(sizes) > 0
    is_valid = is_list and all(integer()(size) is None for size in sizes)
    return None if is_valid else "a list of integers of at least 1"


_RULES = {
    "budget": number(1e-6),
    "supernet_epochs": integer(),
    "supernet_lr": number(),
    "population": integer(2),
    "generations": integer(0),
    "sizes": _list_of_sizes,
}

NOAH = Method(
    "prompts, low-rank updates of qkv, and adapters, with searched sizes per block",
    "Neural Prompt Search, Zhang et al., arXiv 2206.04673",
    _build,
    ("budget", "sizes", "supernet_epochs", "supernet_lr", "population", "generations"),
    check=check_by(_RULES),
    needs_batches=True,
    needs_validation=True,
    restore=_restore,
    unmerged_reason="adds prompt tokens and nonlinear bottlenecks, which are not weights of the backbone",
    defaults={"lr": 1e-3, "head_lr": 1e-3, "weight_decay": 1e-4},
)
"""NOAH has three steps:

1. A supernet with the largest size of each module type in every block is trained with AdamW. Each batch trains a random
   subnet: each module type fills the first 25%, 50%, 75%, or 100% of the blocks, with a random size from `sizes`
   in each block. Smaller sizes share the first prompts, ranks, and channels of larger ones.
2. Evolutionary search ranks subnets of at most `budget` million parameters by their validation accuracy with the
   supernet's weights, or by their validation loss for tasks without class scores.
3. The best subnet is reinitialized and trained like any other method; the supernet is discarded.

Defaults are the paper's sizes (5, 10, 50, 100) and its budget of 0.64 for a ViT-B/16. For other models, the budget is
proportional to the number of weights in the layers that LoRA adapts, but at least the size of the smallest subnet. The
default search effort is smaller than that of the paper, which corresponds to `supernet_epochs=500`, `population=50`,
and `generations=20`. The paper initializes adapters randomly; here they start as the identity. Parameters per block of
width d: p·d for prompts, 4·d·r for the low-rank update of a fused qkv, and 2·d·a + a + d for the adapter.
"""
