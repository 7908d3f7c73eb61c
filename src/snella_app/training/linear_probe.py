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

from snella_app.config import DataConfig, OptimConfig
from snella_app.data import ImageDataset, build_transform, has_flips
from snella_app.data.protocol import get_protocol
from snella_app.methods import method_of, spec_of
from snella_app.methods.model_parts import base_model
from snella_app.runs.layer_probe import layer_features, probed_layers
from snella_app.training.build import RunComponents
from snella_app.training.distributed import process_count
from snella_app.training.feature_norm import FeatureNorm


class FeatureDataset(Dataset[tuple[Any, ...]]):
    """Dataset of precomputed image features.

    Args:
        images: Original dataset with a transform that does not depend on the epoch.
        features: Features, `[len(images), width]`.
    """

    def __init__(self, images: ImageDataset, features: Tensor) -> None:
        self.images, self.features = images, features
        self.names, self.labels, self.annotations = images.names, images.labels, images.annotations

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        """Return features, target and, if present, weight."""
        return self.features[index], *self.target_and_weight(index)

    def target_and_weight(self, index: int) -> tuple[Any, ...]:
        """Return the target and, if present, the weight of an item."""
        return self.images.target_and_weight(index)

    def set_epoch(self, epoch: int) -> None:
        """No-op; features do not depend on the epoch."""

    def image(self, index: int) -> Image.Image:
        """Return the original image, RGB."""
        return self.images.image(index)


def original_images(images: ImageDataset | FeatureDataset) -> ImageDataset:
    """Return the original images of a `FeatureDataset`; image datasets are unchanged."""
    return images.images if isinstance(images, FeatureDataset) else images


def can_cache_features(data: DataConfig, model: nn.Module) -> bool:
    """Return whether the head's inputs are constant, as in a linear probe of a timm model without augmentation."""
    method = method_of(model)
    return (
        method is not None
        and method.is_head_only
        and data.augment == "none"
        and data.views == 1
        and not (data.mixup or data.cutmix or data.random_erasing)
        and has_timm_features(model)
        and isinstance(model.get_submodule(spec_of(model).head), nn.Linear)
        and not _has_active_dropout(model)
    )


def has_timm_features(model: nn.Module) -> bool:
    """Return whether the model has timm's `forward_features` and `forward_head`."""
    return all(callable(getattr(model, name, None)) for name in ("forward_features", "forward_head"))


def _has_active_dropout(model: nn.Module) -> bool:
    """Return whether dropout or drop path is active, as a module or as timm's functional `drop_rate`."""
    rates = ((module, name) for module in model.modules() for name in ("p", "drop_prob", "drop_rate"))
    return any(isinstance(rate := getattr(module, name, None), float) and rate > 0 for module, name in rates)


def cache_features(parts: RunComponents, batch_size: int) -> nn.Module:
    """Replace all images by their features, and return the head, the only module to train.

    Args:
        parts: Data and model; the datasets are replaced.
        batch_size: Batch size.
    """
    for name, images in parts.splits.parts.items():
        features = torch.cat(list(pooled_features(parts.model, images, batch_size, parts.workers)))
        setattr(parts.splits, name, FeatureDataset(images, features))
    return parts.model.get_submodule(spec_of(parts.model).head)


@torch.no_grad()
def pooled_features(model: nn.Module, images: ImageDataset, batch_size: int, workers: int) -> Iterator[Tensor]:
    """Yield the pooled features of each batch, on the CPU."""
    device = next(model.parameters()).device
    model.eval()
    for batch, *_ in DataLoader(images, batch_size=batch_size, num_workers=workers):
        pooled = model.forward_head(model.forward_features(batch.to(device)), pre_logits=True)  # type: ignore[operator]
        yield pooled.float().cpu()


@torch.no_grad()
def head_inputs(model: nn.Module, parts: Sequence[ImageDataset], batch_size: int) -> NDArray[np.float32]:
    """Return the inputs to the head of a model from `build_method`, `[images, width]`.

    Args:
        model: Model; left in evaluation mode.
        parts: Images with their transform.
        batch_size: Batch size.
    """
    head = spec_of(model).head
    heads = [module for name, module in model.named_modules() if name == head or name.endswith(f".model.{head}")]
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


_MAX_PROBE_IMAGES = 5_000
"""Maximum number of training images for a probe; more images hardly change the fit."""
_MAX_FLIPPED = 500
"""Maximum number of training images for the flip test."""
_FOLDS = 4
_CLEAR = 2.0
"""Minimum difference in standard errors that counts as clear."""


def resolve_head_init(parts: RunComponents, optim: OptimConfig, protocol: str) -> OptimConfig:
    """Resolve `head_init="auto"` and `head_norm="auto"`.

    `head_init` is `probe` for a linear head of a timm classifier with at least two classes, else `random`. The
    `official` protocol uses `random`, as the authors' scripts do. `head_norm` is `running` for a probe-initialized
    head, else `none`.
    """
    init, norm = optim.head_init, optim.head_norm
    if init == "auto":
        init = "probe" if protocol != "official" and _can_probe(parts) else "random"
    if norm == "auto":
        norm = "running" if init == "probe" else "none"
    return dataclasses.replace(optim, head_init=init, head_norm=norm)


def can_skip_training(optim: OptimConfig, protocol: str) -> bool:
    """Return whether `epochs` may be 0: the head starts from a linear probe and is evaluated on validation images.

    Args:
        optim: Settings with `head_init` resolved.
        protocol: `DataConfig.protocol`.
    """
    return optim.head_init == "probe" and get_protocol(protocol).selected_on == "val"


def choose_final_head(
    parts: RunComponents, requested: str, protocol: str, *, is_sharded: bool = False
) -> Literal["trained", "layers"]:
    """Resolve `final_head="auto"`: `layers` if the model and the task support it, else `trained`.

    Args:
        parts: Data and model.
        requested: `OptimConfig.final_head`.
        protocol: `DataConfig.protocol`; `official` selects `trained`.
        is_sharded: True if the frozen weights will be sharded, which only `trained` supports.

    Raises:
        ValueError: If `final_head` is `layers`, but the model or the task does not support it.
    """
    if requested == "trained" or (requested == "auto" and protocol == "official"):
        return "trained"
    reason = _reason_for_trained(parts, is_sharded)
    if reason is not None and requested == "layers":
        raise ValueError(f"final_head='layers' needs {reason}; use final_head='trained'")
    return "layers" if reason is None else "trained"


def _reason_for_trained(parts: RunComponents, is_sharded: bool) -> str | None:
    """Return the missing requirement for a probe on several layers; None if all are met."""
    if not parts.task.has_linear_fit:
        return f"a task with one output per image, got {parts.task.name}"
    if process_count() > 1 or is_sharded:
        return "a single process"
    layers = probed_layers(parts.model)
    if not layers or not _reads_features(parts, layers):
        return f"a timm model with forward_intermediates, got {type(parts.model).__name__}"
    return None


@torch.no_grad()
def _reads_features(parts: RunComponents, layers: Sequence[int]) -> bool:
    """Return whether the features of all layers can be read and the final features equal the inputs of the head.

    timm's `forward_intermediates` may not support methods that add tokens or change the whole forward pass.
    """
    channels, height, width = parts.data_config["input_size"]
    model, inputs_of_head = parts.model, []
    image = torch.rand(1, channels, height, width, generator=torch.Generator().manual_seed(0))
    image = image.to(next(model.parameters()).device)
    was_training = model.training
    model.eval()
    _, head = base_and_head(model)
    handle = head.register_forward_pre_hook(lambda module, inputs: inputs_of_head.append(inputs[0].flatten(1)))
    try:
        model(image)
        final = layer_features(model, image, layers)[:, : inputs_of_head[0].shape[1]]
        return bool(torch.allclose(inputs_of_head[0], final, atol=1e-4, rtol=1e-4))
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError, AssertionError):
        return False
    finally:
        handle.remove()
        model.train(was_training)


def normalize_features(parts: RunComponents, optim: OptimConfig) -> FeatureNorm:
    """Enable the normalization of the head's inputs.

    Raises:
        ValueError: If the model has no linear head on pooled features.
    """
    base, head = base_and_head(parts.model)
    if not isinstance(head, nn.Linear) or head.bias is None or not _is_probe(base, head):
        raise ValueError(
            "head_norm='running' needs a timm classifier with a linear head on its pooled features, got "
            f"{type(base).__name__} with {type(head).__name__}; use head_norm='none'"
        )
    return FeatureNorm(head, probe_features(parts, optim))


def choose_augmentation(parts: RunComponents, data: DataConfig, optim: OptimConfig) -> DataConfig:
    """Resolve `augment="auto"` and `tta="auto"`.

    `augment="auto"` selects `Task.augment`: crops and flips for single-label, multi-label and ordinal tasks, flips for
    regression and segmentation. The `official` protocol uses flips.

    Single-label classification leaves out flips if they change the classes. Cross-validation compares a linear probe on
    images with a linear probe on images and their flips, which averages the predictions for both. Flips are left out if
    the second probe is clearly worse on held-out images (McNemar's test, two standard errors). Evaluating the first
    probe on flipped images is not sufficient: it fails on the flips of figures that all face left.

    `tta="auto"` averages the predictions for an image and its flip if training flips images and the task is
    single-label classification.

    Args:
        parts: Data and model; the transform of the training images is replaced.
        data: Settings to resolve.
        optim: Batch size and final head.
    """
    augment: Any = data.augment
    if augment == "auto":
        augment = parts.task.augment if data.protocol != "official" else "flip"
        if augment == "crop" and _flips_change_classes(parts, optim):
            augment = "crop-no-flip"
        transform = build_transform(parts.data_config, train=True, augment=augment, random_erasing=data.random_erasing)
        parts.splits.train = parts.splits.train.with_transform(transform)
    tta = data.tta
    if tta == "auto":
        is_averaged = has_flips(augment) and parts.task.has_one_class and data.protocol != "official"
        tta = 2 if is_averaged else 1
    return dataclasses.replace(data, augment=augment, tta=tta)


def _can_probe(parts: RunComponents) -> bool:
    """Return whether the task, the head and the number of classes allow a linear probe."""
    can_fit = parts.task.target != "class" or len(set(parts.splits.train.labels)) > 1
    return parts.task.has_linear_fit and can_fit and _is_probe(*base_and_head(parts.model))


def _flips_change_classes(parts: RunComponents, optim: OptimConfig) -> bool:
    """Return whether a cross-validated probe is clearly worse with flips, for fitting and for prediction."""
    if not parts.task.has_one_class or not _can_probe(parts):
        return False
    rows = probe_rows(parts)
    order = np.random.default_rng(parts.seed).permutation(len(rows))[:_MAX_FLIPPED]
    plain = probe_features(parts, optim)[torch.from_numpy(order)].double().numpy()
    flipped = _features_before_training(parts, optim, rows[order], flip=True).double().numpy()
    labels = np.asarray(parts.splits.train.labels)[rows[order]]
    outputs = parts.task.count_outputs(parts.splits.classes)
    only_without = only_with = 0
    for held_out in np.array_split(np.arange(len(labels)), _FOLDS):
        train_rows = np.setdiff1d(np.arange(len(labels)), held_out)
        if len(set(labels[train_rows].tolist())) < 2:
            continue
        is_correct = []
        for views in ([plain], [plain, flipped]):
            targets = np.tile(labels[train_rows], len(views))
            fit = parts.task.fit_linear(np.concatenate([view[train_rows] for view in views]), targets, outputs, None)
            logits = [torch.from_numpy(view[held_out]) @ fit[0].T + fit[1] for view in views]
            predicted = parts.task.sample_outputs(parts.task.average_outputs(logits)).argmax(-1)
            is_correct.append(predicted.numpy() == labels[held_out])
        only_without += int((is_correct[0] & ~is_correct[1]).sum())
        only_with += int((is_correct[1] & ~is_correct[0]).sum())
    return is_clearly_better(only_without, only_with)


def is_clearly_better(only_first: int, only_second: int) -> bool:
    """Return whether the first of two classifiers is clearly better (McNemar's test, two standard errors).

    Args:
        only_first: Number of images that only the first classifier predicts correctly.
        only_second: Number of images that only the second classifier predicts correctly.
    """
    return only_first - only_second > _CLEAR * math.sqrt(only_first + only_second)


def probe_rows(parts: RunComponents) -> NDArray[np.int64]:
    """Return the indices of the training images for a probe: all, or a random sample of `_MAX_PROBE_IMAGES`."""
    count = len(parts.splits.train)
    if count <= _MAX_PROBE_IMAGES:
        return np.arange(count)
    return np.sort(np.random.default_rng(parts.seed).choice(count, _MAX_PROBE_IMAGES, replace=False))


def probe_features(parts: RunComponents, optim: OptimConfig) -> Tensor:
    """Return the pooled features of the probe images before training, `[images, width]`; computed once.

    Args:
        parts: Data and model; caches the features.
        optim: Batch size and final head.
    """
    if parts.probe_features is None:
        train, rows = parts.splits.train, probe_rows(parts)
        if isinstance(train, FeatureDataset):
            parts.probe_features = train.features[torch.from_numpy(rows)]
        else:
            parts.probe_features = _features_before_training(parts, optim, rows)
    return parts.probe_features


def _features_before_training(
    parts: RunComponents, optim: OptimConfig, rows: NDArray[np.int64], *, flip: bool = False
) -> Tensor:
    """Return the pooled features of training images, optionally flipped horizontally.

    If the final head uses several layers, this also caches the features of these layers for unflipped images.
    """
    transform = build_transform(parts.data_config, train=False, augment="none")
    images = parts.splits.train.with_transform(_Flipped(transform) if flip else transform).subset(rows.tolist())
    base, head = base_and_head(parts.model)
    was_training = parts.model.training
    batch_size, workers = optim.effective_batch_size, parts.workers
    if optim.final_head == "layers" and not flip:
        parts.model.eval()
        parts.initial_layer_features = torch.cat(list(batches_of_features(parts.model, images, batch_size, workers)))
        features = parts.initial_layer_features[:, : head.in_features].cpu()
    else:
        features = torch.cat(list(pooled_features(base, images, batch_size, workers)))
    parts.model.train(was_training)
    return features


@torch.no_grad()
def batches_of_features(model: nn.Module, images: ImageDataset, batch_size: int, workers: int) -> Iterator[Tensor]:
    """Yield the `layer_features` of each batch, on the model's device."""
    layers, device = probed_layers(model), next(model.parameters()).device
    for batch, *_ in DataLoader(images, batch_size=batch_size, num_workers=workers):
        yield layer_features(model, batch.to(device), layers).float()


class _Flipped:
    """Picklable transform followed by a horizontal flip."""

    def __init__(self, transform: Callable[[Any], Tensor]) -> None:
        self.transform = transform

    def __call__(self, image: Any) -> Tensor:
        return self.transform(image).flip(-1)


def _is_probe(base: nn.Module, head: nn.Module) -> bool:
    """Return whether a head is a single linear layer on the pooled features of a timm model."""
    width = getattr(base, "head_hidden_size", None) or getattr(base, "num_features", None)
    return isinstance(head, nn.Linear) and has_timm_features(base) and width in (None, head.in_features)


def init_head_from_probe(parts: RunComponents, optim: OptimConfig) -> None:
    """Initialize the head with a linear probe on the features before training.

    The probe is a logistic regression for single-label classification, one logistic regression per label (`multilabel`)
    or per rank (`ordinal`), and a ridge regression for regression; see `Task.fit_linear`. It uses the class weights and
    sample weights of training.

    A random head sends random gradients through the backbone in the first steps; a fitted head does not (Kumar et al.,
    2022, arXiv 2202.10054). The fit uses at most 5,000 training images without augmentation. Features are divided by
    their root mean variance. The L2 penalty is `1/(2·0.1)·‖w‖² = 5 ‖w‖²`, added to the sum of the images' losses.

    Args:
        parts: Data and model; the head is changed in place. Features from `cache_features` are reused.
        optim: Batch size and final head.

    Raises:
        ValueError: If the model has no linear head on pooled features, or the task does not support a linear fit.
    """
    base, head = base_and_head(parts.model)
    if not isinstance(head, nn.Linear) or not _is_probe(base, head):
        raise ValueError(
            "head_init='probe' needs a timm classifier with a linear head on its pooled features, got "
            f"{type(base).__name__} with {type(head).__name__}; use head_init='random'"
        )
    train = parts.splits.train
    features = probe_features(parts, optim).double().numpy()
    targets = [train.target_and_weight(index) for index in probe_rows(parts).tolist()]
    batch = parts.task.collate([(torch.empty(0), *target) for target in targets])
    labels = batch["labels"].numpy()
    sample_weights = batch["weights"].double().numpy() if "weights" in batch else None
    factors = [factor for factor in (parts.task.probe_weights(labels), sample_weights) if factor is not None]
    weights = np.prod(factors, axis=0) if factors else None
    weight, bias = parts.task.fit_linear(features, labels, head.out_features, weights)
    with torch.no_grad():
        head.weight.copy_(weight)
        if head.bias is not None:
            head.bias.copy_(bias)


def base_and_head(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return the model without PEFT's wrapper, and the trained head."""
    base = base_model(model)
    head = base.get_submodule(spec_of(model).head)
    if isinstance(head, ModulesToSaveWrapper):  # PEFT trains a copy of the head
        head = head.modules_to_save[head.active_adapter]  # type: ignore[index]
    return base, head
