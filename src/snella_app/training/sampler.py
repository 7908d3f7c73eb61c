"""Sampler with an order that depends only on the seed and the epoch."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


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


class EpochCallback(TrainerCallback):
    """Callback that sets the epoch of datasets and samplers.

    Accelerate also does this, but not for an epoch that is resumed midway.

    Args:
        *targets: Objects with a method `set_epoch(epoch)`; epochs are counted from 0.
    """

    def __init__(self, *targets: Any) -> None:
        self.targets = targets

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
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
