"""Features of a frozen backbone, computed once: what a linear probe trains on."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from snella.data import ImageDataset
from snella.methods import spec_of
from snella.training.assembly import Assembly
from snella.training.config import TrainConfig


class FeatureDataset(Dataset[tuple[Tensor, int]]):
    """The features of a data set's images in their place.

    Args:
        images: The data set; its transform must be the same in every epoch.
        features: `[len(images), width]`.
    """

    def __init__(self, images: ImageDataset, features: Tensor) -> None:
        self.images, self.features = images, features
        self.names, self.labels = images.names, images.labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Features and class index."""
        return self.features[index], self.labels[index]

    def set_epoch(self, epoch: int) -> None:
        """Nothing to draw anew."""

    def image(self, index: int) -> Image.Image:
        """The image itself, RGB."""
        return self.images.image(index)


def can_cache_features(config: TrainConfig, model: nn.Module) -> bool:
    """Whether nothing before the head changes during training: a linear probe of a timm model without augmentation."""
    return (
        spec_of(model).family == "linear"
        and config.augment == "none"
        and has_timm_features(model)
        and isinstance(model.get_submodule(spec_of(model).head), nn.Linear)
        and not _draws_random_numbers(model)
    )


def has_timm_features(model: nn.Module) -> bool:
    """Whether the model says its pooled features in timm's way."""
    return all(callable(getattr(model, name, None)) for name in ("forward_features", "forward_head"))


def _draws_random_numbers(model: nn.Module) -> bool:
    """Whether dropout or drop-path is active somewhere, as a module or as timm's functional `drop_rate`."""
    rates = ((module, name) for module in model.modules() for name in ("p", "drop_prob", "drop_rate"))
    return any(isinstance(rate := getattr(module, name, None), float) and rate > 0 for module, name in rates)


def cache_features(parts: Assembly, config: TrainConfig) -> nn.Module:
    """Put features in the place of all images, and return what is left to train: the head.

    Args:
        parts: Its data sets are replaced.
        config: Resolved settings; the batch size and the workers count.
    """
    parts.splits.train = _featurise(parts.model, parts.splits.train, config)
    if parts.splits.val is not None:
        parts.splits.val = _featurise(parts.model, parts.splits.val, config)
    if parts.splits.test is not None:
        parts.splits.test = _featurise(parts.model, parts.splits.test, config)
    return parts.model.get_submodule(spec_of(parts.model).head)


def _featurise(model: nn.Module, images: ImageDataset, config: TrainConfig) -> ImageDataset:
    """The data set with features for images."""
    features = torch.cat(list(pooled_features(model, images, config)))
    return FeatureDataset(images, features)  # type: ignore[return-value]


@torch.no_grad()
def pooled_features(model: nn.Module, images: ImageDataset, config: TrainConfig) -> Iterator[Tensor]:
    """Pooled features of one batch after the other, on the CPU."""
    device = next(model.parameters()).device
    model.eval()
    for batch, _ in DataLoader(images, batch_size=config.images_per_step, num_workers=config.workers):
        pooled = model.forward_head(model.forward_features(batch.to(device)), pre_logits=True)  # type: ignore[operator]
        yield pooled.float().cpu()
