"""`noah`: a searched combination of prompts, low-rank updates and adapters, sized per block."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from random import Random
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snella_app.methods.method import Batches, Method, Options, check_by, number, whole_number
from snella_app.methods.model_parts import attach, restoring, token_blocks, width_of_block
from snella_app.methods.partial import train_head
from snella_lab.methods.adapter import Adapter, apply_adapter
from snella_lab.methods.calibration import SelectionData, selection_data
from snella_lab.methods.prompts import Prompts, insert_prompts, make_prompts, remove_prompts
from snella_lab.methods.spt import LowRank, add_low_rank, budget_of

_PARENTS = 10
_MUTATION = 0.2
_DEPTH_MUTATION = 0.4
_TRIES = 200


class Subnet(NamedTuple):
    """Sizes in each block, 0 for none: prompts, rank of the low-rank update, width of the adapter."""

    prompts: tuple[int, ...]
    ranks: tuple[int, ...]
    widths: tuple[int, ...]


@dataclass(frozen=True)
class SubnetSpace:
    """Which combinations there are.

    Args:
        block_widths: Channels of a token in each block.
        qkv_sides: Inputs plus outputs of each block's qkv layer.
        sizes: Sizes to choose from, ascending.
        budget: Parameters that a combination may have.
    """

    block_widths: tuple[int, ...]
    qkv_sides: tuple[int, ...]
    sizes: tuple[int, ...]
    budget: int

    @property
    def depths(self) -> list[int]:
        """How many of the first blocks a kind may fill: a quarter, half, three quarters, all."""
        blocks = len(self.block_widths)
        return sorted({ceil(blocks * quarters / 4) for quarters in (1, 2, 3, 4)})

    def count(self, subnet: Subnet) -> int:
        """Parameters: Σ_blocks p·d + r·(in + out) + (2·d·a + a + d where a > 0)."""
        rows = zip(self.block_widths, self.qkv_sides, *subnet, strict=True)
        return sum(p * d + r * sides + (2 * d * a + a + d if a else 0) for d, sides, p, r, a in rows)

    def least(self) -> Subnet:
        """The smallest combination: the least size of everything in the first quarter of the blocks."""
        return Subnet(*[self._padded([self.sizes[0]] * self.depths[0])] * 3)

    def sample(self, draw: Random) -> Subnet:
        """A random combination, within the budget or not."""
        depths = (draw.choice(self.depths) for _ in range(3))
        return Subnet(*(self._padded([draw.choice(self.sizes) for _ in range(depth)]) for depth in depths))

    def mutate(self, subnet: Subnet, draw: Random) -> Subnet:
        """Draw some sizes anew, and sometimes how many blocks a kind fills."""
        kinds = []
        for sizes in subnet:
            depth = sum(size > 0 for size in sizes)
            if draw.random() < _DEPTH_MUTATION:
                depth = draw.choice(self.depths)
            kept = [draw.choice(self.sizes) if not s or draw.random() < _MUTATION else s for s in sizes[:depth]]
            kinds.append(self._padded(kept))
        return Subnet(*kinds)

    def cross(self, mother: Subnet, father: Subnet, draw: Random) -> Subnet:
        """Each kind from one of the two."""
        return Subnet(*(draw.choice(pair) for pair in zip(mother, father, strict=True)))

    def _padded(self, sizes: list[int]) -> tuple[int, ...]:
        """With 0 for the blocks behind."""
        return (*sizes, *[0] * (len(self.block_widths) - len(sizes)))


def search_subnet(
    space: SubnetSpace,
    score: Callable[[Subnet], tuple[float, float]],
    draw: Random,
    *,
    population: int,
    generations: int,
    report: Callable[[str], None],
) -> Subnet:
    """Find the combination with the highest score by evolution.

    A generation has `population` new candidates within the budget: up to a half mutations of the best ten so far, up to
    a half crossings of them, and random ones for the rest. None is measured twice.

    Args:
        space: The candidates.
        score: The higher the better.
        draw: Random numbers.
        population: Candidates in a generation.
        generations: After the first one, which is random.
        report: Is told of each generation.

    Returns:
        The best of all that were measured; of equals the one with the fewest parameters.
    """
    scores: dict[Subnet, tuple[float, float]] = {}

    def rank(subnet: Subnet) -> tuple[tuple[float, float], int, Subnet]:
        return scores[subnet], -space.count(subnet), subnet

    def breed(make: Callable[[], Subnet], wanted: int) -> None:
        for _ in range(wanted * _TRIES):
            if wanted <= 0:
                return
            subnet = make()
            if subnet not in scores and space.count(subnet) <= space.budget:
                scores[subnet] = score(subnet)
                wanted -= 1

    def mutant() -> Subnet:
        return space.mutate(draw.choice(parents), draw)

    def cross() -> Subnet:
        return space.cross(draw.choice(parents), draw.choice(parents), draw)

    for generation in range(generations + 1):
        before = len(scores)
        if generation == 0:
            scores[space.least()] = score(space.least())
        else:
            parents = sorted(scores, key=rank, reverse=True)[:_PARENTS]
            breed(mutant, population // 2)
            breed(cross, population // 2)
        breed(partial(space.sample, draw), population - (len(scores) - before))
        if len(scores) == before:
            report(f"noah: no candidates of at most {space.budget:,} parameters are left")
            break
        best = max(scores, key=rank)
        report(
            f"noah: generation {generation} of {generations}, {len(scores)} candidates measured, "
            f"best {scores[best][0]:.4f} with {space.count(best):,} parameters"
        )
    return max(scores, key=rank)


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
        attach(block, "prompts", make_prompts(supernet, block, size), before=insert_prompts, after=remove_prompts)
        attach(qkv, "low_rank", SuperLowRank(qkv.out_features, qkv.in_features, size), after=add_low_rank)
        attach(mlp, "adapter", SuperAdapter(width_of_block(block) or 0, size), after=apply_adapter)
    return supernet


def activate(supernet: nn.Module, subnet: Subnet) -> None:
    """Let the supernet compute as one of its combinations."""
    kinds: tuple[type[Prompts | SuperLowRank | SuperAdapter], ...] = (Prompts, SuperLowRank, SuperAdapter)
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
    """Share of validation images that a combination recognizes, and the negative loss, which decides between equals.

    Where outputs are no class scores (several labels, ordered classes, numbers) the share is 0 and the loss decides.

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
        right += int((outputs.argmax(dim=1) == labels).sum()) if data.has_class_scores else 0
        loss += float(data.loss(outputs, labels)) * len(images)
        images_seen += len(images)
    if not images_seen:
        raise ValueError("validation must give at least one batch of images and labels, got none")
    return right / images_seen, -loss / images_seen


_SIZES = (5, 10, 50, 100)


def qkv_layers(model: nn.Module, head: str) -> list[tuple[str, nn.Module, nn.Linear]]:
    """The blocks of a plain ViT with the fused query-key-value layer of each, as `(name, block, qkv)`.

    Raises:
        ValueError: The model is no plain ViT, or a block has no `attn.qkv`.
    """
    found = []
    for name, block in token_blocks("noah", model, head):
        qkv = getattr(getattr(block, "attn", None), "qkv", None)
        if not isinstance(qkv, nn.Linear):
            raise ValueError(
                f"method 'noah' cannot be applied to {type(model).__name__}: {name}.attn.qkv is no linear layer, "
                f"got {type(qkv).__name__}"
            )
        found.append((name, block, qkv))
    return found


def space_of(model: nn.Module, head: str, options: Options) -> SubnetSpace:
    """The candidates for a model."""
    layers = qkv_layers(model, head)
    smallest = SubnetSpace(
        tuple(width_of_block(block) or 0 for _, block, _ in layers),
        tuple(qkv.in_features + qkv.out_features for _, _, qkv in layers),
        tuple(sorted(options.get("sizes", _SIZES))),
        budget=0,
    )
    least = smallest.count(smallest.least())
    budget = budget_of(options, model, head, on_vit_b=0.64)
    if "budget" in options and budget < least:
        raise ValueError(
            f"budget must be at least {least / 1e6:g} million parameters, those of the smallest combination of "
            f"sizes={list(smallest.sizes)}, got {options['budget']}"
        )
    return replace(smallest, budget=max(budget, least))


def _build(model: nn.Module, head: str, options: Options, batches: Batches | None) -> nn.Module:
    """Train the supernet on a copy, search it, and put the best subnet into the model."""
    data, space = selection_data(batches), space_of(model, head, options)
    if data.validation is None:
        raise ValueError(
            "method 'noah' searches on validation images, got none; "
            "pass batches=SelectionData(train=..., validation=...)"
        )
    supernet = build_supernet(model, head, space.sizes[-1])
    draw = train_supernet(
        supernet,
        space,
        data,
        epochs=options.get("supernet_epochs", 10),
        lr=options.get("supernet_lr", 5e-4),
        weight_decay=1e-4,
    )
    best = search_subnet(
        space,
        lambda subnet: accuracy_of(supernet, subnet, data),
        draw,
        population=options.get("population", 20),
        generations=options.get("generations", 5),
        report=data.report,
    )
    return _apply(model, head, best)


def _apply(model: nn.Module, head: str, subnet: Subnet) -> nn.Module:
    """Fresh modules of the found sizes; a size of 0 adds none."""
    train_head(model, head)
    for (_, block, qkv), prompts, rank, width in zip(qkv_layers(model, head), *subnet, strict=True):
        if prompts:
            attach(block, "prompts", make_prompts(model, block, prompts), before=insert_prompts, after=remove_prompts)
        if rank:
            attach(qkv, "low_rank", LowRank(qkv.out_features, qkv.in_features, rank), after=add_low_rank)
        if width:
            adapter = Adapter(width_of_block(block) or 0, width)
            attach(cast(nn.Module, block.mlp), "adapter", adapter, after=apply_adapter)
    return model


def _restore(model: nn.Module, head: str, options: Options, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The sizes are the shapes of the stored tensors."""
    with restoring(model):
        names = [name for name, _, _ in qkv_layers(model, head)]
        parts = ("prompts.tokens", "attn.qkv.low_rank.A", "mlp.adapter.down.weight")
        sizes = [tuple(len(tensors.get(f"{name}.{part}", ())) for name in names) for part in parts]
        return _apply(model, head, Subnet(*sizes))


def _list_of_sizes(sizes: Any) -> str | None:
    """The rule of `sizes`."""
    is_list = isinstance(sizes, list | tuple) and len(sizes) > 0
    is_one = is_list and all(isinstance(size, int) and size >= 1 for size in sizes)
    return None if is_one else "a list of integers of at least 1"


_RULES = {
    "budget": number(1e-6),
    "supernet_epochs": whole_number(),
    "supernet_lr": number(),
    "population": whole_number(2),
    "generations": whole_number(0),
    "sizes": _list_of_sizes,
}

NOAH = Method(
    "prompts, low-rank updates of qkv and adapters, of searched sizes in each block",
    "Neural Prompt Search, Zhang et al., arXiv 2206.04673",
    _build,
    ("budget", "sizes", "supernet_epochs", "supernet_lr", "population", "generations"),
    check=check_by(_RULES),
    needs_batches=True,
    needs_validation=True,
    restore=_restore,
    unmerged_reason="adds prompt tokens and nonlinear bottlenecks, which are no weights of the backbone",
    defaults={"lr": 1e-3, "head_lr": 1e-3, "weight_decay": 1e-4},
)
"""Three steps. (1) A supernet with the largest size of everything in every block is trained with AdamW, each batch on a
random combination: a kind fills the first quarter, half, three quarters or all of the blocks, with a random one of
`sizes` in each; smaller sizes share the first rows of larger ones. (2) Evolution over combinations of at most `budget`
million parameters, ranked by the supernet's accuracy on validation. (3) The best combination is put in anew and trained
as any method is; the supernet is thrown away.

The paper's sizes (5, 10, 50, 100) and budget (0.64 on a ViT-B/16; elsewhere in proportion to the adapted weights, at
least the smallest combination) are the defaults. Its effort is not: it trains the supernet for 500 epochs and evolves
50 candidates; `supernet_epochs=500, population=50, generations=20` gives that. Its adapters start at random values,
ours at the identity. Parameters of a block of width d: p·d for prompts, 4·d·r for the low-rank update of a fused qkv,
2·d·a + a + d for the adapter.
"""
