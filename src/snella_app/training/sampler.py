"""Sampler whose order, like the augmentation, depends on the seed and the epoch alone."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class EpochSampler(Sampler[int]):
    """An order of `range(length)` that depends only on `(seed, epoch)`, however often it is drawn.

    A permutation; with weights, `length` items with replacement, each as likely as its weight.

    Args:
        length: Number of items.
        seed: Seed of the run.
        weights: One an item, at least 0; None for a permutation.
    """

    def __init__(self, length: int, seed: int, weights: Sequence[float] | None = None) -> None:
        self.length = length
        self.seed = seed
        self.weights = None if weights is None else torch.tensor(weights, dtype=torch.float64)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch))
        if self.weights is None:
            return iter(torch.randperm(self.length, generator=generator).tolist())
        return iter(torch.multinomial(self.weights, self.length, replacement=True, generator=generator).tolist())

    def __len__(self) -> int:
        return self.length


class EpochCallback(TrainerCallback):
    """Set the epoch of the training images.

    Accelerate does so too, except for an epoch that is resumed in its middle.

    Args:
        *datasets: What has `set_epoch(number)`, counted from 0.
    """

    def __init__(self, *datasets: Any) -> None:
        self.datasets = datasets

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the number of the current epoch."""
        for dataset in self.datasets:
            dataset.set_epoch(state.global_step // (state.max_steps // int(state.num_train_epochs)))


def mix_seed(*parts: int) -> int:
    """One seed out of several numbers, different for different ones.

    The state of a multiplicative hash modulo 2⁶³ after each number; neighbors end up far apart.
    """
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = ((state ^ part) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**64
        state ^= state >> 31
    return state % 2**63
