"""Samplers with an order that depends only on the seed and the epoch."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerState


class EpochSampler(Sampler[int]):
    """Sampler over `range(length)` in an order that depends only on `(seed, epoch)`.

    Without weights, the order is a random permutation. With weights, `length` items are sampled with replacement, with
    probabilities proportional to the weights.

    Args:
        length: Number of items.
        seed: Seed of the run.
        weights: Nonnegative weight per item; None for a permutation.
    """

    def __init__(self, length: int, seed: int, weights: Sequence[float] | None = None) -> None:
        self.length = length
        self.seed = seed
        self.weights = None if weights is None else torch.tensor(weights, dtype=torch.float64)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the order."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch))
        if self.weights is None:
            return iter(torch.randperm(self.length, generator=generator).tolist())
        return iter(torch.multinomial(self.weights, self.length, replacement=True, generator=generator).tolist())

    def __len__(self) -> int:
        return self.length


class ShardedBatches(Sampler[list[int]]):
    """Batch sampler that splits each global batch into consecutive parts, one per process.

    If a small last batch leaves a process without images, it receives the first image with weight 0.

    Args:
        sampler: Indices of all images, identical in all processes.
        batch_size: Global batch size.
        rank: Rank of this process.
        count: Number of processes.
    """

    def __init__(self, sampler: Sampler[int], batch_size: int, rank: int, count: int) -> None:
        self.sampler, self.batch_size, self.rank, self.count = sampler, batch_size, rank, count

    def __iter__(self) -> Iterator[list[int]]:
        indices = list(self.sampler)
        for start in range(0, len(indices), self.batch_size):
            batch = indices[start : start + self.batch_size]
            before = sum(_shard_size(len(batch), rank, self.count) for rank in range(self.rank))
            yield batch[before : before + _shard_size(len(batch), self.rank, self.count)] or batch[:1]

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.batch_size)  # type: ignore[arg-type]

    def weight(self, number: int) -> int:
        """Return the number of images of batch `number` that belong to this process."""
        images = min(self.batch_size, len(self.sampler) - number * self.batch_size)  # type: ignore[arg-type]
        return _shard_size(images, self.rank, self.count)


def _shard_size(images: int, rank: int, count: int) -> int:
    """Return the number of images of one rank; the first ranks get one more if a batch cannot be split evenly."""
    return images // count + (rank < images % count)


class EpochCallback(TrainerCallback):
    """Callback that calls `set_epoch` of datasets and samplers, with epochs counted from 0.

    Accelerate also does this, but not for an epoch that is resumed midway.
    """

    def __init__(self, *targets: Any) -> None:
        self.targets = targets

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Set the current epoch."""
        for target in self.targets:
            target.set_epoch(state.global_step // (state.max_steps // int(state.num_train_epochs)))


def mix_seed(*parts: int) -> int:
    """Combine several numbers into one seed.

    The seed is a multiplicative hash reduced modulo 2⁶³, so that neighboring inputs give unrelated seeds.
    """
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = ((state ^ part) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**64
        state ^= state >> 31
    return state % 2**63
