"""The candidates of NOAH, and evolution among them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from random import Random
from typing import NamedTuple

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

    def with_budget(self, budget: int) -> "SubnetSpace":
        """The same combinations under another budget."""
        return replace(self, budget=budget)

    def count(self, subnet: Subnet) -> int:
        """Parameters: Σ_blocks p·d + r·(in + out) + (2·d·a + a + d where a > 0)."""
        rows = zip(self.block_widths, self.qkv_sides, *subnet, strict=True)
        return sum(p * d + r * sides + (2 * d * a + a + d if a else 0) for d, sides, p, r, a in rows)

    def least(self) -> Subnet:
        """The smallest combination: the least size of everything in the first quarter of the blocks."""
        return Subnet(*[self._padded([self.sizes[0]] * self.depths[0])] * 3)

    def sample(self, draw: Random) -> Subnet:
        """A random combination, within the budget or not."""
        return Subnet(*(self._padded(self._sizes(draw, draw.choice(self.depths))) for _ in range(3)))

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

    def _sizes(self, draw: Random, depth: int) -> list[int]:
        """A random size for each of so many blocks."""
        return [draw.choice(self.sizes) for _ in range(depth)]

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
