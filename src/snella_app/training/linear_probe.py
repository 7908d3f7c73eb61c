"""Linear probing: cached features of a frozen backbone, and a head initialized by logistic regression."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from peft.utils import ModulesToSaveWrapper
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from snella_app.config import TrainConfig
from snella_app.data import ImageDataset, build_transform, has_flips
from snella_app.methods import method_of, spec_of
from snella_app.methods.model_parts import base_model
from snella_app.runs.images import parts_of
from snella_app.runs.layer_probe import layer_features, probed_layers
from snella_app.training.build import RunComponents
from snella_app.training.distributed import process_count
from snella_app.training.feature_norm import FeatureNorm


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


def plain_images(images: ImageDataset | FeatureDataset) -> ImageDataset:
    """The images themselves, where `cache_features` has replaced them by their features."""
    return images.images if isinstance(images, FeatureDataset) else images


def can_cache_features(config: TrainConfig, model: nn.Module) -> bool:
    """Whether nothing before the head changes during training: a linear probe of a timm model without augmentation."""
    method = method_of(model)
    return (
        method is not None
        and method.is_head_only
        and config.augment == "none"
        and config.views == 1
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


_MOST_PROBE_IMAGES = 5_000
"""Training images that a probe is fitted to, at most: more hardly change it."""
_MOST_FLIPPED = 500
"""Training images whose flips are looked at, at most."""
_FOLDS = 4
_CLEAR = 2.0
"""Standard errors from which a difference is clear."""


def choose_head_start(parts: RunComponents, config: TrainConfig) -> TrainConfig:
    """Resolve `head_init="auto"` and `head_norm="auto"`.

    The head starts from a `probe` if it is linear, in a timm classifier with at least two classes, else from `random`
    values. With the authors' own protocol it is `random`, as in their scripts. Features are normalized for a head that
    starts from a probe.
    """
    init, norm = config.head_init, config.head_norm
    if init == "auto":
        init = "probe" if config.protocol != "official" and _can_probe(parts) else "random"
    if norm == "auto":
        norm = "running" if init == "probe" else "none"
    return dataclasses.replace(config, head_init=init, head_norm=norm)


def choose_final_head(parts: RunComponents, config: TrainConfig) -> Literal["trained", "layers"]:
    """Resolve `final_head="auto"`: `layers` where the model and the task allow it, else `trained`.

    Raises:
        ValueError: `layers` was asked for, and cannot be had.
    """
    if config.final_head == "trained" or (config.final_head == "auto" and config.protocol == "official"):
        return "trained"
    reason = _reason_for_trained(parts, config)
    if reason is not None and config.final_head == "layers":
        raise ValueError(f"final_head='layers' needs {reason}; use final_head='trained'")
    return "layers" if reason is None else "trained"


def _reason_for_trained(parts: RunComponents, config: TrainConfig) -> str | None:
    """What a probe of several layers needs and this run lacks; None if nothing."""
    if not parts.task.has_linear_fit:
        return f"a task with one output an image, got {parts.task.name}"
    if process_count() > 1 or config.shard:
        return "a single process"
    layers = probed_layers(parts.model)
    if not layers or not _reads_features(parts, layers):
        return f"a timm model with forward_intermediates, got {type(parts.model).__name__}"
    return None


@torch.no_grad()
def _reads_features(parts: RunComponents, layers: Sequence[int]) -> bool:
    """Whether the features of all layers can be read, and the model's own are those that its head gets.

    Methods that add tokens, or change the forward pass as a whole, may not be followed by timm's
    `forward_intermediates`.
    """
    channels, height, width = parts.data_config["input_size"]
    model, seen = parts.model, []
    image = torch.rand(1, channels, height, width, generator=torch.Generator().manual_seed(0))
    image = image.to(next(model.parameters()).device)
    was_training = model.training
    model.eval()
    _, head = base_and_head(model)
    handle = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].flatten(1)))
    try:
        model(image)
        read = layer_features(model, image, layers)[:, : seen[0].shape[1]]
        return bool(torch.allclose(seen[0], read, atol=1e-4, rtol=1e-4))
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError, AssertionError):
        return False
    finally:
        handle.remove()
        model.train(was_training)


def normalize_features(parts: RunComponents, config: TrainConfig) -> FeatureNorm:
    """Normalize the inputs of the head from here on.

    Raises:
        ValueError: The model has no linear head on pooled features.
    """
    base, head = base_and_head(parts.model)
    if not isinstance(head, nn.Linear) or head.bias is None or not _is_probe(base, head):
        raise ValueError(
            "head_norm='running' needs a timm classifier with a linear head on its pooled features, got "
            f"{type(base).__name__} with {type(head).__name__}; use head_norm='none'"
        )
    return FeatureNorm(head, probe_features(parts, config))


def choose_augmentation(parts: RunComponents, config: TrainConfig) -> TrainConfig:
    """Resolve `augment="auto"`, and `tta="auto"` with it.

    `auto` is `Task.augment`: crops and flips for classes, labels and ranks, flips for numbers and masks. Flips are left
    out if they change the classes: of a cross-validated linear probe, the one that learns from images and their flips,
    and averages both, recognizes clearly fewer held-out images than the one without (McNemar's test, two standard
    errors). A probe that never saw flips says little: it fails on flipped figures that all face left.
    Predictions are averaged over an image and its flip where training flips images and the outputs are classes.

    Args:
        parts: Data and model; the transform of the training images is replaced.
        config: Resolved settings.
    """
    augment: Any = config.augment
    if augment == "auto":
        augment = parts.task.augment if config.protocol != "official" else "flip"
        if augment == "crop" and _flips_change_classes(parts, config):
            augment = "crop-no-flip"
        transform = build_transform(
            parts.data_config, train=True, augment=augment, random_erasing=config.random_erasing
        )
        parts.splits.train = parts.splits.train.with_transform(transform)
    tta = config.tta
    if tta == "auto":
        is_averaged = has_flips(augment) and parts.task.has_one_class and config.protocol != "official"
        tta = 2 if is_averaged else 1
    return dataclasses.replace(config, augment=augment, tta=tta)


def _can_probe(parts: RunComponents) -> bool:
    """Whether a linear probe can be fitted: the task and the head are linear, and there are two classes."""
    can_fit = parts.task.target != "class" or len(set(parts.splits.train.labels)) > 1
    return parts.task.has_linear_fit and can_fit and _is_probe(*base_and_head(parts.model))


def _flips_change_classes(parts: RunComponents, config: TrainConfig) -> bool:
    """Whether a cross-validated probe is clearly worse with flips: in training, and averaged in prediction."""
    if not parts.task.has_one_class or not _can_probe(parts):
        return False
    rows = probe_rows(parts, config)
    order = np.random.default_rng(config.seed).permutation(len(rows))[:_MOST_FLIPPED]
    plain = probe_features(parts, config)[torch.from_numpy(order)].double().numpy()
    flipped = _features_before_training(parts, config, rows[order], flip=True).double().numpy()
    labels = np.asarray(parts.splits.train.labels)[rows[order]]
    outputs = parts.task.count_outputs(parts.splits.classes)
    only_without = only_with = 0
    for held_out in np.array_split(np.arange(len(labels)), _FOLDS):
        rest = np.setdiff1d(np.arange(len(labels)), held_out)
        if len(set(labels[rest].tolist())) < 2:
            continue
        right = []
        for views in ([plain], [plain, flipped]):
            targets = np.tile(labels[rest], len(views))
            fit = parts.task.fit_linear(np.concatenate([view[rest] for view in views]), targets, outputs, None)
            logits = [torch.from_numpy(view[held_out]) @ fit[0].T + fit[1] for view in views]
            answers = parts.task.sample_outputs(parts.task.average_outputs(logits)).argmax(-1)
            right.append(answers.numpy() == labels[held_out])
        only_without += int((right[0] & ~right[1]).sum())
        only_with += int((right[1] & ~right[0]).sum())
    return is_clearly_more(only_without, only_with)


def is_clearly_more(only_first: int, only_second: int) -> bool:
    """Whether the first of two classifiers is clearly better on the same images: McNemar's test, two standard errors.

    Args:
        only_first: Images that the first one alone gets right.
        only_second: Images that the second one alone gets right.
    """
    return only_first - only_second > _CLEAR * math.sqrt(only_first + only_second)


def probe_rows(parts: RunComponents, config: TrainConfig) -> NDArray[np.int64]:
    """Numbers of the training images that a probe is fitted to: all, or a random `_MOST_PROBE_IMAGES` of them."""
    count = len(parts.splits.train)
    if count <= _MOST_PROBE_IMAGES:
        return np.arange(count)
    return np.sort(np.random.default_rng(config.seed).choice(count, _MOST_PROBE_IMAGES, replace=False))


def probe_features(parts: RunComponents, config: TrainConfig) -> Tensor:
    """Pooled features before training of the images that a probe is fitted to, `[images, width]`; computed once.

    Args:
        parts: Data and model; keeps the features.
        config: Resolved settings; the batch size, the seed and the workers count.
    """
    if parts.probe_features is None:
        train, rows = parts.splits.train, probe_rows(parts, config)
        if isinstance(train, FeatureDataset):
            parts.probe_features = train.features[torch.from_numpy(rows)]
        else:
            parts.probe_features = _features_before_training(parts, config, rows)
    return parts.probe_features


def _features_before_training(
    parts: RunComponents, config: TrainConfig, rows: NDArray[np.int64], *, flip: bool = False
) -> Tensor:
    """Pooled features of some training images, as they are or flipped left to right.

    Where the final head reads several layers, those of the images as they are are kept for it.
    """
    transform = build_transform(parts.data_config, train=False, augment="none")
    images = parts.splits.train.with_transform(_Flipped(transform) if flip else transform).subset(rows.tolist())
    base, head = base_and_head(parts.model)
    was_training = parts.model.training
    if config.final_head == "layers" and not flip:
        parts.model.eval()
        parts.start_layers = torch.cat(list(batches_of_features(parts.model, images, config)))
        features = parts.start_layers[:, : head.in_features].cpu()
    else:
        features = torch.cat(list(pooled_features(base, images, config)))
    parts.model.train(was_training)
    return features


@torch.no_grad()
def batches_of_features(model: nn.Module, images: ImageDataset, config: TrainConfig) -> Iterator[Tensor]:
    """`layer_features` of one batch after the other, on the model's device."""
    layers, device = probed_layers(model), next(model.parameters()).device
    for batch, *_ in DataLoader(images, batch_size=config.effective_batch_size, num_workers=config.workers):
        yield layer_features(model, batch.to(device), layers).float()


class _Flipped:
    """A transform and a flip left to right; picklable."""

    def __init__(self, transform: Callable[[Any], Tensor]) -> None:
        self.transform = transform

    def __call__(self, image: Any) -> Tensor:
        return self.transform(image).flip(-1)


def _is_probe(base: nn.Module, head: nn.Module) -> bool:
    """Whether a head is one linear layer on the pooled features of a timm model, as a linear probe is."""
    width = getattr(base, "head_hidden_size", None) or getattr(base, "num_features", None)
    return isinstance(head, nn.Linear) and has_timm_features(base) and width in (None, head.in_features)


def start_head_from_probe(parts: RunComponents, config: TrainConfig) -> None:
    """Set the head to the best linear one on the features that the model has before training.

    It is a logistic regression for classes, one a label or a rank's question for `multilabel` and `ordinal`, and a
    ridge regression for numbers (`Task.fit_linear`), with the weights of classes and samples that training has.

    A random head sends random gradients through the backbone in its first steps; one that fits already does not
    (Kumar et al., 2022, arXiv 2202.10054). At most 5,000 training images are seen once, without augmentation. Features
    are divided by their root mean variance, and the L2 penalty is `1/(2·0.1)·‖w‖²` (`5 ‖w‖²`, too, for numbers) beside
    the sum of the images' losses.

    Args:
        parts: Data and model; the head is changed in place. Where `cache_features` has run, its features are taken.
        config: Resolved settings; the batch size and the workers count.

    Raises:
        ValueError: The model has no linear head on pooled features, or the task none at all.
    """
    base, head = base_and_head(parts.model)
    if not isinstance(head, nn.Linear) or not _is_probe(base, head):
        raise ValueError(
            "head_init='probe' needs a timm classifier with a linear head on its pooled features, got "
            f"{type(base).__name__} with {type(head).__name__}; use head_init='random'"
        )
    train = parts.splits.train
    features = probe_features(parts, config).double().numpy()
    targets = [train.target_and_weight(index) for index in probe_rows(parts, config).tolist()]
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


def base_and_head(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The model that PEFT wraps, if it does, and the head that is trained."""
    base = base_model(model)
    head = base.get_submodule(spec_of(model).head)
    if isinstance(head, ModulesToSaveWrapper):  # PEFT keeps the old one beside the copy that is trained
        head = head.modules_to_save[head.active_adapter]  # type: ignore[index]
    return base, head
