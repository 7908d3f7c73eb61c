"""Linear probing: cached features of a frozen backbone, and a head initialized by logistic regression."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from peft.utils import ModulesToSaveWrapper
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from snella.data import ImageDataset, build_transform
from snella.methods import method_of, spec_of
from snella.methods.model_parts import base_model
from snella.runs.config import TrainConfig
from snella.runs.images import parts_of
from snella.training.build import RunComponents


class FeatureDataset(Dataset[tuple[Any, ...]]):
    """The features of a data set's images in their place.

    Args:
        images: The data set; its transform must be the same in every epoch.
        features: `[len(images), width]`.
    """

    def __init__(self, images: ImageDataset, features: Tensor) -> None:
        self.images, self.features = images, features
        self.names, self.labels, self.annotations = images.names, images.labels, images.annotations

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        """Features in place of the image, and what follows it."""
        return self.features[index], *self.target_and_weight(index)

    def target_and_weight(self, index: int) -> tuple[Any, ...]:
        """What follows the features in an item."""
        return self.images.target_and_weight(index)

    def set_epoch(self, epoch: int) -> None:
        """Nothing: features do not change."""

    def image(self, index: int) -> Image.Image:
        """The image itself, RGB."""
        return self.images.image(index)


def can_cache_features(config: TrainConfig, model: nn.Module) -> bool:
    """Whether nothing before the head changes during training: a linear probe of a timm model without augmentation."""
    method = method_of(model)
    return (
        method is not None
        and method.is_head_only
        and config.augment == "none"
        and not (config.mixup or config.cutmix or config.random_erasing)
        and has_timm_features(model)
        and isinstance(model.get_submodule(spec_of(model).head), nn.Linear)
        and not _draws_random_numbers(model)
    )


def has_timm_features(model: nn.Module) -> bool:
    """Whether the model has timm's `forward_features` and `forward_head`."""
    return all(callable(getattr(model, name, None)) for name in ("forward_features", "forward_head"))


def _draws_random_numbers(model: nn.Module) -> bool:
    """Whether dropout or drop-path is active somewhere, as a module or as timm's functional `drop_rate`."""
    rates = ((module, name) for module in model.modules() for name in ("p", "drop_prob", "drop_rate"))
    return any(isinstance(rate := getattr(module, name, None), float) and rate > 0 for module, name in rates)


def cache_features(parts: RunComponents, config: TrainConfig) -> nn.Module:
    """Replace all images by their features, and return the module to train: the head.

    Args:
        parts: Its data sets are replaced.
        config: Resolved settings; the batch size and the workers count.
    """
    for name, images in parts_of(parts.splits).items():
        features = torch.cat(list(pooled_features(parts.model, images, config)))
        setattr(parts.splits, name, FeatureDataset(images, features))
    return parts.model.get_submodule(spec_of(parts.model).head)


@torch.no_grad()
def pooled_features(model: nn.Module, images: ImageDataset, config: TrainConfig) -> Iterator[Tensor]:
    """Pooled features of one batch after the other, on the CPU."""
    device = next(model.parameters()).device
    model.eval()
    for batch, *_ in DataLoader(images, batch_size=config.effective_batch_size, num_workers=config.workers):
        pooled = model.forward_head(model.forward_features(batch.to(device)), pre_logits=True)  # type: ignore[operator]
        yield pooled.float().cpu()


@torch.no_grad()
def head_inputs(model: nn.Module, parts: Sequence[ImageDataset], batch_size: int) -> NDArray[np.float32]:
    """The inputs to the head of a model from `build_method`, `[images, width]`.

    Args:
        model: Put into evaluation mode.
        parts: Images with their transform.
        batch_size: Images at a time.
    """
    name = spec_of(model).head
    heads = [module for own, module in model.named_modules() if own == name or own.endswith(f".model.{name}")]
    seen: list[Tensor] = []
    handle = heads[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].flatten(1).float().cpu()))
    device = next(model.parameters()).device
    model.eval()
    try:
        for images, *_ in DataLoader(ConcatDataset(parts), batch_size):
            model(images.to(device))
    finally:
        handle.remove()
    return torch.cat(seen).numpy()


_STEPS_THAT_TRAIN_A_HEAD = 100


def choose_head_start(parts: RunComponents, config: TrainConfig) -> Literal["random", "probe"]:
    """What `head_init` means for this model and data: itself, or what `auto` stands for.

    `auto` is `probe` for a timm classifier with a linear head that is trained for less than 100 steps, since so few
    leave a random head behind; with more steps neither start is better. With the authors' own protocol it is `random`,
    as in their scripts.
    """
    if config.head_init != "auto":
        return config.head_init
    if not parts.task.has_linear_fit or config.protocol == "official":
        return "random"
    base, head = _base_and_head(parts.model)
    labels = parts.splits.train.labels
    steps = config.steps_per_epoch(len(labels)) * config.epochs
    can_fit = parts.task.target != "class" or len(set(labels)) > 1
    return "probe" if _is_probe(base, head) and steps < _STEPS_THAT_TRAIN_A_HEAD and can_fit else "random"


def _is_probe(base: nn.Module, head: nn.Module) -> bool:
    """Whether a head is one linear layer on the pooled features of a timm model, as a linear probe is."""
    width = getattr(base, "head_hidden_size", None) or getattr(base, "num_features", None)
    return isinstance(head, nn.Linear) and has_timm_features(base) and width in (None, head.in_features)


def start_head_from_probe(parts: RunComponents, config: TrainConfig) -> None:
    """Set the head to the best linear one on the features that the model has before training.

    It is a logistic regression for classes, one a label or a rank's question for `multilabel` and `ordinal`, and a
    ridge regression for numbers (`Task.fit_linear`), with the weights of classes and samples that training has.

    A random head sends random gradients through the backbone in its first steps; one that fits already does not
    (Kumar et al., 2022, arXiv 2202.10054). The training images are seen once, without augmentation. Features are
    divided by their root mean variance, and the L2 penalty is `1/(2·0.1)·‖w‖²` (`5 ‖w‖²`, too, for numbers) beside the
    sum of the images' losses.

    Args:
        parts: Data and model; the head is changed in place. Where `cache_features` has run, its features are taken.
        config: Resolved settings; the batch size and the workers count.

    Raises:
        ValueError: The model has no linear head on pooled features, or the task none at all.
    """
    model = parts.model
    base, head = _base_and_head(model)
    if not isinstance(head, nn.Linear) or not _is_probe(base, head):
        raise ValueError(
            "head_init='probe' needs a timm classifier with a linear head on its pooled features, got "
            f"{type(base).__name__} with {type(head).__name__}; use head_init='random'"
        )
    train = parts.splits.train
    if isinstance(train, FeatureDataset):
        features = train.features.double().numpy()
    else:
        images = train.with_transform(build_transform(parts.data_config, train=False, augment="none"))
        was_training = model.training
        features = torch.cat(list(pooled_features(base, images, config))).double().numpy()
        model.train(was_training)
    targets = [train.target_and_weight(index) for index in range(len(train))]
    batch = parts.task.collate([(torch.empty(0), *target) for target in targets])
    labels = batch["labels"].numpy()
    of_samples = batch["weights"].double().numpy() if "weights" in batch else None
    given = [weight for weight in (parts.task.probe_weights(labels), of_samples) if weight is not None]
    weights = np.prod(given, axis=0) if given else None
    weight, bias = parts.task.fit_linear(features, labels, head.out_features, weights)
    with torch.no_grad():
        head.weight.copy_(weight)
        if head.bias is not None:
            head.bias.copy_(bias)


def _base_and_head(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The model that PEFT wraps, if it does, and the head that is trained."""
    base = base_model(model)
    head = base.get_submodule(spec_of(model).head)
    if isinstance(head, ModulesToSaveWrapper):  # PEFT keeps the old one beside the copy that is trained
        head = head.modules_to_save[head.active_adapter]  # type: ignore[index]
    return base, head
