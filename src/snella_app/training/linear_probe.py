"""Linear heads on pooled features: cached features, probe initialization and feature normalization.

Pooled features are the inputs of a model's head. A linear probe is a linear head fitted to them before training.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft.utils import ModulesToSaveWrapper
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback

from snella_app.config.sections import OptimConfig
from snella_app.config.train import TrainConfig
from snella_app.data.datasets import ImageDataset
from snella_app.data.options import DataConfig
from snella_app.data.protocol import PROTOCOLS
from snella_app.data.transforms import build_transform
from snella_app.device import autocast
from snella_app.methods import method_of, spec_of
from snella_app.methods.model_parts import base_model
from snella_app.runs.layer_probe import layer_features, probed_layers
from snella_app.tasks import Task
from snella_app.training.build import RunComponents
from snella_app.training.checkpoints import CheckpointError, require_file
from snella_app.training.distributed import sum_across_processes

MAX_PROBE_IMAGES = 5_000
"""Maximum number of images per split that are used to fit a head; more images hardly change the fit."""
_NORM_FILE = "feature_norm.safetensors"
_MOMENTUM = 0.1
_EPS = 1e-5


class FeatureDataset(Dataset[tuple[Any, ...]]):
    """Dataset of precomputed image features.

    Args:
        images: Original dataset with a transform that does not depend on the epoch.
        features: Features, `[len(images), width]`.
    """

    def __init__(self, images: ImageDataset, features: Tensor) -> None:
        self.images = images
        self.features = features
        self.names = images.names
        self.labels = images.labels
        self.annotations = images.annotations

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        """Return features, target and, if present, weight."""
        return self.features[index], *self.target_and_weight(index)

    def target_and_weight(self, index: int) -> tuple[Any, ...]:
        """Return the target and, if present, the weight of an item."""
        return self.images.target_and_weight(index)

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: the features do not depend on the epoch."""

    def image(self, index: int) -> Image.Image:
        """Return the original image in RGB."""
        return self.images.image(index)


def original_images(images: ImageDataset | FeatureDataset) -> ImageDataset:
    """Return the original images of a `FeatureDataset`, or an image dataset unchanged."""
    return images.images if isinstance(images, FeatureDataset) else images


def can_cache_features(data: DataConfig, model: nn.Module) -> bool:
    """Return whether the head's inputs are constant.

    This is the case when only the head of a timm model is trained, without augmentation.
    """
    method = method_of(model)
    # rates of dropout and drop path modules, and of timm's functional dropout (`drop_rate`)
    rates = [getattr(module, name, None) for module in model.modules() for name in ("p", "drop_prob", "drop_rate")]
    return (
        method is not None
        and method.is_head_only
        and data.augment == "none"
        and data.views == 1
        and not (data.mixup or data.cutmix or data.random_erasing)
        and _has_timm_features(model)
        and isinstance(model.get_submodule(spec_of(model).head), nn.Linear)
        and not any(isinstance(rate, float) and rate > 0 for rate in rates)
    )


def _has_timm_features(model: nn.Module) -> bool:
    """Return whether the model has timm's `forward_features` and `forward_head`."""
    return all(callable(getattr(model, name, None)) for name in ("forward_features", "forward_head"))


def cache_features(parts: RunComponents, batch_size: int) -> None:
    """Replace the images of all splits with their features, and make the head the only trained part.

    Leaves the model in evaluation mode.
    """
    parts.model.eval()
    for name, images in parts.splits.parts.items():
        (features,) = extract_features(parts, images, batch_size)
        setattr(parts.splits, name, FeatureDataset(images, features))
    parts.trained_part = parts.model.get_submodule(spec_of(parts.model).head)


@torch.no_grad()
def extract_features(
    parts: RunComponents,
    images: ImageDataset,
    batch_size: int,
    *,
    layers: Sequence[int] | None = None,
    flips: Sequence[bool] = (False,),
) -> list[Tensor]:
    """Compute features of images with the model in evaluation mode, under the caller's autocast.

    Args:
        parts: Model and number of workers.
        images: Images with a transform; each is decoded once.
        batch_size: Images per forward pass.
        layers: Layers to pass to `layer_features`; None for pooled features.
        flips: One entry per view; True flips the images horizontally.

    Returns:
        One tensor per view, `[images, width]`, float32. Pooled features are on the CPU, where linear probes and data
        loaders use them. Features of `layers` are on the model's device, where heads are fitted to them.
    """
    base: Any = base_model(parts.model)
    device = next(parts.model.parameters()).device
    was_training = parts.model.training
    parts.model.eval()
    features: list[list[Tensor]] = [[] for _ in flips]
    for batch, *_ in DataLoader(images, batch_size=batch_size, num_workers=parts.workers):
        batch = batch.to(device)
        for is_flipped, view in zip(flips, features, strict=True):
            inputs = batch.flip(-1) if is_flipped else batch
            if layers is None:
                view.append(base.forward_head(base.forward_features(inputs), pre_logits=True).float().cpu())
            else:
                view.append(layer_features(parts.model, inputs, layers).float())
    parts.model.train(was_training)
    return [torch.cat(view) for view in features]


def encoded_targets(task: Task, images: ImageDataset | FeatureDataset, indices: Iterable[int]) -> dict[str, Tensor]:
    """Collate the labels (`labels`) and any sample weights (`weights`) of the images at `indices` without decoding."""
    return task.collate([(torch.empty(0), *images.target_and_weight(index)) for index in indices])


def balancing_weights(images: ImageDataset, task: Task, sampler: str) -> NDArray[np.float64] | None:
    """Return weights with mean 1 that balance the classes as the weighted sampler does; None for other samplers."""
    if sampler != "weighted":
        return None
    weights = np.asarray(task.sample_weights(images))
    return weights / weights.mean()


def probe_indices(parts: RunComponents) -> NDArray[np.int64]:
    """Return the indices of the training images for a probe; see `sampled_indices`."""
    return sampled_indices(parts, len(parts.splits.train))


def sampled_indices(parts: RunComponents, count: int) -> NDArray[np.int64]:
    """Return all indices below `count` or, if there are more than `MAX_PROBE_IMAGES`, a sorted random sample.

    The sample contains `MAX_PROBE_IMAGES` indices and depends on the run's seed.
    """
    if count <= MAX_PROBE_IMAGES:
        return np.arange(count)
    return np.sort(np.random.default_rng(parts.seed).choice(count, MAX_PROBE_IMAGES, replace=False))


def probe_features(parts: RunComponents, optim: OptimConfig) -> Tensor:
    """Return the pooled features of the probe images before training, `[images, width]`.

    The first call must take place before training; later calls return the cached features. If the final head uses
    several layers, the first call also caches the features of these layers, unless `cache_features` was called before.
    """
    if parts.probe_features is not None:
        return parts.probe_features
    train = parts.splits.train
    indices = probe_indices(parts)
    if isinstance(train, FeatureDataset):
        parts.probe_features = train.features[torch.from_numpy(indices)]
        return parts.probe_features
    uses_several_layers = optim.final_head == "layers"
    layers = probed_layers(parts.model) if uses_several_layers else None
    images = probe_images(parts, indices)
    batch_size = optim.effective_batch_size
    with autocast(next(parts.model.parameters()).device, optim.precision):
        (features,) = extract_features(parts, images, batch_size, layers=layers)
    if uses_several_layers:
        parts.initial_layer_features = features
        _, head = base_and_head(parts.model)
        features = features[:, : head.in_features].cpu()  # layer features start with the head's inputs
    parts.probe_features = features
    return features


def probe_images(parts: RunComponents, indices: NDArray[np.int64]) -> ImageDataset:
    """Return the training images at `indices` with the evaluation transform."""
    transform = build_transform(parts.data_config)
    return parts.splits.train.with_transform(transform).subset(indices.tolist())


def can_probe(parts: RunComponents) -> bool:
    """Return whether the task, the head and the number of classes allow a linear probe."""
    can_fit = parts.task.target != "class" or len(set(parts.splits.train.labels)) > 1
    return parts.task.has_linear_fit and can_fit and _find_linear_head(parts.model) is not None


def evaluates_initial_model(config: TrainConfig) -> bool:
    """Return whether the model is evaluated before the first epoch, because it may be the best."""
    may_be_best = config.optim.head_init == "probe" or config.model.init_from is not None
    return may_be_best and PROTOCOLS[config.data.protocol].selected_on == "val"


def can_skip_training(optim: OptimConfig, protocol: str) -> bool:
    """Return whether `epochs` may be 0.

    This requires that the head starts from a linear probe and is evaluated on validation images.
    """
    return optim.head_init == "probe" and PROTOCOLS[protocol].selected_on == "val"


def _find_linear_head(model: nn.Module) -> nn.Linear | None:
    """Return the head if it is a single linear layer with a bias on the pooled features of a timm model; else None."""
    base, head = base_and_head(model)
    if not isinstance(head, nn.Linear) or head.bias is None or not _has_timm_features(base):
        return None
    width = getattr(base, "head_hidden_size", None) or getattr(base, "num_features", None)
    return head if width in (None, head.in_features) else None


def _require_linear_head(model: nn.Module, setting: str, alternative: str) -> nn.Linear:
    """Return the linear head that a setting needs, or raise a ValueError."""
    head = _find_linear_head(model)
    if head is None:
        found = " with ".join(type(module).__name__ for module in base_and_head(model))
        raise ValueError(
            f"{setting} needs a timm classifier with a linear head on its pooled features (one layer with a bias), "
            f"got {found}; use {alternative}"
        )
    return head


def init_head_from_probe(parts: RunComponents, optim: OptimConfig, sampler: str = "shuffle") -> None:
    """Initialize the head with a linear probe on the features before training.

    The probe is a logistic regression for single-label classification, one logistic regression per label (`multilabel`)
    or per rank (`ordinal`), and a ridge regression for regression tasks; see `Task.fit_linear`. It uses the class
    weights, sample weights and sampler (`DataConfig.sampler`) of training.

    A random head sends random gradients through the backbone in the first steps; a fitted head does not (Kumar et al.,
    2022, arXiv 2202.10054). The fit uses at most `MAX_PROBE_IMAGES` training images without augmentation. Features from
    `cache_features` are reused.

    Raises:
        ValueError: If the model has no linear head on pooled features, or the task does not support a linear fit.
    """
    head = _require_linear_head(parts.model, "head_init='probe'", "head_init='random'")
    train = parts.splits.train
    features = probe_features(parts, optim).double().numpy()
    indices = probe_indices(parts).tolist()
    targets = encoded_targets(parts.task, train, indices)
    labels = targets["labels"].numpy()
    sample_weights = targets["weights"].double().numpy() if "weights" in targets else None
    balance = balancing_weights(original_images(train).subset(indices), parts.task, sampler)
    factors = [factor for factor in (parts.task.probe_weights(labels), sample_weights, balance) if factor is not None]
    combined_weights = np.prod(factors, axis=0) if factors else None
    weight, bias = parts.task.fit_linear(features, labels, head.out_features, combined_weights)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)


def random_image(parts: RunComponents) -> Tensor:
    """Return a batch of one random image on the model's device."""
    image = torch.rand(1, *parts.data_config["input_size"], generator=torch.Generator().manual_seed(0))
    return image.to(next(parts.model.parameters()).device)


def base_and_head(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return the model without PEFT's wrapper, and the trained head."""
    base = base_model(model)
    head = base.get_submodule(spec_of(model).head)
    if isinstance(head, ModulesToSaveWrapper):  # PEFT trains a copy of the head
        head = head.modules_to_save[head.active_adapter]  # type: ignore[index]
    return base, head


def enable_feature_norm(parts: RunComponents, optim: OptimConfig) -> FeatureNorm:
    """Enable the normalization of the head's inputs.

    Raises:
        ValueError: If the model has no linear head on pooled features.
    """
    head = _require_linear_head(parts.model, "head_norm='running'", "head_norm='none'")
    return FeatureNorm(head, probe_features(parts, optim))


class FeatureNorm(TrainerCallback):
    """Callback that standardizes the inputs of a linear head by their running mean and variance.

        y = W ẑ + b,   ẑ = (z − μ) / σ,   σ² = v + 1e-5
        μ ← μ + m (mean(z) − μ),   v ← v + m (var(z) − v)      after each optimizer step, m = 0.1

    The head learns at the same rate along every feature, independently of its scale, and adapts to features that change
    during training. μ and σ are treated as constants in the backward pass, so a step does not depend on how the images
    are split into batches and across processes. Inside `folded`, the head's weights express the same function as a
    plain linear layer applied to `z`.

    Args:
        head: Linear layer, `[classes, width]`; its parameters are rescaled for `ẑ` so that its outputs do not change.
        features: Features before training, `[images, width]`, for the initial statistics.
    """

    def __init__(self, head: nn.Linear, features: Tensor) -> None:
        self.head = head
        device = head.weight.device
        self.mean = features.float().mean(0).to(device)
        self.var = features.float().var(0, correction=0).to(device)
        self._sums: list[Tensor] = []
        with torch.no_grad():
            head.bias.add_(head.weight @ self.mean)
            head.weight.mul_(self._std)
        self._handle = head.register_forward_pre_hook(self._normalize)

    @property
    def statistics(self) -> dict[str, Tensor]:
        """Mean and variance, keyed by name. Training updates them in place."""
        return {"feature_norm.mean": self.mean, "feature_norm.var": self.var}

    @property
    def _std(self) -> Tensor:
        return (self.var + _EPS).sqrt()

    def _normalize(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        features = inputs[0]
        if head.training and torch.is_grad_enabled():
            z = features.detach().float()
            count = z.new_tensor([len(z)])
            self._sums.append(torch.cat([count, z.sum(0), z.square().sum(0)]))
        standardized = (features.float() - self.mean) / self._std
        return (standardized.to(features.dtype), *inputs[1:])

    def discard_batch(self) -> None:
        """Exclude the last batch from the statistics, because its loss has weight 0."""
        self._sums[-1].zero_()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Update the statistics with the images of the step from all batches and processes."""
        width = len(self.mean)
        totals = sum_across_processes(torch.stack(self._sums).sum(0))
        # `count` is positive: the images of a discarded batch repeat images that another process has counted
        count, sums, squares = totals.split([1, width, width])
        self._sums = []
        mean = sums / count
        self.mean.lerp_(mean, _MOMENTUM)
        self.var.lerp_((squares / count - mean.square()).clamp_min(0), _MOMENTUM)

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Replace the head's weights inside the context with those for unnormalized features: `W / σ`, `b − W μ / σ`.

        Use it to save the weights. The model must not be called inside, since the head's inputs are still normalized.
        """
        weight, bias = self.head.weight.detach().clone(), self.head.bias.detach().clone()
        with torch.no_grad():
            self.head.weight.div_(self._std)
            self.head.bias.sub_(self.head.weight @ self.mean)
        try:
            yield
        finally:
            with torch.no_grad():
                self.head.weight.copy_(weight)
                self.head.bias.copy_(bias)

    def remove(self) -> None:
        """Stop normalizing the head's inputs.

        The weights stay the same, so the outputs are wrong until weights saved inside `folded` are loaded.
        """
        self._handle.remove()

    def save(self, checkpoint: Path) -> None:
        """Write the statistics to a checkpoint folder."""
        save_file({"mean": self.mean.cpu(), "var": self.var.cpu()}, checkpoint / _NORM_FILE)

    def load(self, checkpoint: Path) -> None:
        """Load the statistics from a checkpoint.

        Raises:
            CheckpointError: If the checkpoint has no statistics, or has statistics of a different width.
        """
        path = require_file(checkpoint, _NORM_FILE)
        stored = load_file(path, str(self.mean.device))
        for name, statistic in (("mean", self.mean), ("var", self.var)):
            if name not in stored:
                raise CheckpointError(f"{path} has no {name!r}; start over with --overwrite")
            shape = list(stored[name].shape)
            if shape != list(statistic.shape):
                raise CheckpointError(
                    f"{path} must contain {name!r} of shape {list(statistic.shape)}, got {shape}; start over with "
                    "--overwrite"
                )
            statistic.copy_(stored[name])
