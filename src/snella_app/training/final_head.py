"""Final head of a run: the trained head, or a head on features of several layers, fitted after training.

The head on several layers is linear, or a mixture of a linear head and a kernel head. A kernel head computes outputs
from the similarity of an image to the centers, i.e. the images to which the head was fitted.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snella_app.config.sections import OptimConfig
from snella_app.config.train import TrainConfig
from snella_app.data.datasets import ImageDataset
from snella_app.data.options import DataConfig
from snella_app.data.protocol import PROTOCOLS
from snella_app.data.transforms import build_transform
from snella_app.device import autocast, move_to
from snella_app.methods import find_method
from snella_app.methods.model_parts import base_model
from snella_app.runs.layer_probe import (
    KernelHead,
    LayerProbe,
    MixedHead,
    clipped,
    gaussian_kernel,
    layer_features,
    linear_head,
    probed_layers,
)
from snella_app.tasks import Task
from snella_app.tasks.linear_fit import fit_head
from snella_app.training.build import RunComponents
from snella_app.training.linear_probe import (
    MAX_PROBE_IMAGES,
    FeatureDataset,
    balancing_weights,
    base_and_head,
    encoded_targets,
    extract_features,
    original_images,
    random_image,
    sampled_indices,
)

MIN_CENTERS = 32
"""Minimum number of images for a kernel head."""
MAX_CENTERS = 6_000
"""Maximum number n of images for a kernel head. Its size grows with n, and its fitting time with n² to n³."""
_INVERSE_PENALTY = 0.01
"""Weight C of the summed loss relative to `‖W‖²/2`, for standardized features."""
_RIDGE = 0.05
"""Penalty λ of the kernel head."""
_SCALES = [2 ** (power / 2) for power in range(13)]
"""Candidate scales s of the kernel head's outputs, 1 to 64."""
_ITERATIONS = 100
"""Maximum number of L-BFGS iterations of a linear head that is used without a kernel head."""
_MIXED_ITERATIONS = 30
"""Maximum number of L-BFGS iterations of the linear head in a mixture."""
_LINEAR_SHARE = 0.3
"""Weight of the linear head's probabilities in a mixture."""
_EPS = 1e-6
"""Lower bound of probabilities (before taking logarithms), of image weights, and of standard deviations."""
_MIN_STD = 1e-3
"""Standard deviation, relative to the median, below which heads ignore a feature."""
_CHUNK_SIZE = 1_024
"""Maximum number of images to which a head is applied at a time."""
_SECONDS_PER_PRODUCT = 1e-8
"""CPU seconds of the two linear fits in `fit_layers`, with at most `_ITERATIONS` iterations, divided by images · views
· features · outputs."""
_SECONDS_PER_SQUARE = 2e-10
"""CPU seconds of the two kernel fits in `fit_layers`, divided by n²·(features + n), for n images."""
_FIXED_SECONDS = 1.0
"""Part of the estimated time of the fits that does not depend on their sizes."""
_CUDA_SPEEDUP = 10
"""Speedup of linear fits on a GPU; kernel fits use the CPU."""
OutputsAndLabels = tuple[np.ndarray, np.ndarray]
"""Outputs reduced by `Task.reduce`, and labels."""


@dataclass
class SplitFeatures:
    """Features and targets of a split.

    Attributes:
        views: Features of the images and, with test-time augmentation, of their flips; each `[images, width]`.
        labels: Labels as collated by `Task.collate`.
        weights: Sample weights `[images]`; None for equal weights.
    """

    views: list[Tensor]
    labels: Tensor
    weights: Tensor | None


@dataclass(frozen=True)
class LayerFit:
    """Result of `fit_layers`.

    Attributes:
        probe: The probe from the final fit.
        val: Reduced outputs and labels for the validation images from the first fit; None if there are no such images.
        trained_val: The same for the trained head; None if `val` or the result of `trained_head` is None.
    """

    probe: LayerProbe
    val: OutputsAndLabels | None = None
    trained_val: OutputsAndLabels | None = None


def compute_features(
    parts: RunComponents,
    images: ImageDataset | FeatureDataset,
    views: int,
    batch_size: int,
    first_view: Tensor | None = None,
    sampler: str = "shuffle",
) -> SplitFeatures:
    """Compute features of several layers with the evaluation transform, under the caller's autocast.

    The views are the images and, if `views` is at least 2, their flips. `first_view` contains the features of the
    unflipped images, if they are already known. If `sampler` (see `DataConfig`) is "weighted", the sample weights are
    multiplied by weights that balance the classes.
    """
    transform = build_transform(parts.data_config)
    dataset = original_images(images).with_transform(transform)
    layers = probed_layers(parts.model)
    flips = [False, True][:views]
    feature_views: list[Tensor] = []
    if first_view is not None:
        feature_views.append(first_view)
        flips = flips[1:]
    if flips:
        feature_views += extract_features(parts, dataset, batch_size, layers=layers, flips=flips)
    targets = encoded_targets(parts.task, dataset, range(len(dataset)))
    weights = targets.get("weights")
    balance = balancing_weights(dataset, parts.task, sampler)
    if balance is not None:
        factors = torch.from_numpy(balance).float()
        weights = factors if weights is None else factors * weights
    return SplitFeatures(feature_views, targets["labels"], weights)


def fit_layers(parts: RunComponents, train: ImageDataset, data: DataConfig, optim: OptimConfig) -> LayerFit:
    """Fit a head to features of several layers of the trained model.

    If there are validation images, a head is first fitted to the training images alone and evaluated on the validation
    images. The final fit uses both splits, with at most `MAX_PROBE_IMAGES` validation images.

    If `parts.initial_layer_features` is set, the model has not been trained since these features were computed, so they
    are used for the training images. All other features are computed under autocast with the training precision, since
    bfloat16 is faster. The returned probe does not enable autocast.

    If `uses_kernel` returns True for the number of images in the final fit, the head is a mixture of a kernel head and
    a linear head. Otherwise, it is linear.

    Args:
        parts: Model, task, and validation images.
        train: Training images for the head. If `parts.initial_layer_features` is set, these must be the images of
            `probe_indices`.
        data: Number of views and sampler.
        optim: Batch size and training precision.
    """
    task = parts.task
    num_outputs = parts.task.count_outputs(parts.splits.classes)
    views = data.views
    batch_size = optim.effective_batch_size
    layers = probed_layers(parts.model)

    def features_of(images: ImageDataset, first_view: Tensor | None = None) -> SplitFeatures:
        with autocast(next(parts.model.parameters()).device, optim.precision):
            return compute_features(parts, images, views, batch_size, first_view, data.sampler)

    val = None if parts.splits.val is None else original_images(parts.splits.val)
    val_indices = [] if val is None else sampled_indices(parts, len(val)).tolist()
    fit = fit_mixed if uses_kernel(task, len(train) + len(val_indices)) else fit_linear
    train_features = features_of(train, parts.initial_layer_features)
    probe = LayerProbe(parts.model, layers, fit(task, train_features, num_outputs))
    if val is None:
        return LayerFit(probe)
    trained = trained_head(parts)
    heads = [probe.head] if trained is None else [probe.head, trained]
    val_features = features_of(val.subset(val_indices))
    if len(val_indices) == len(val):  # the features of all validation images are known
        val_outputs = [_outputs(task, val_features, head) for head in heads]
    else:
        val_outputs = _compute_head_outputs(parts, heads, val, views, batch_size, optim.precision)
    all_features = _concatenate(train_features, val_features)
    probe = LayerProbe(parts.model, layers, fit(task, all_features, num_outputs))
    return LayerFit(probe, val_outputs[0], None if trained is None else val_outputs[1])


def compute_probe_outputs(
    parts: RunComponents, probe: LayerProbe, images: ImageDataset | FeatureDataset, views: int, batch_size: int
) -> OutputsAndLabels:
    """Compute a probe's reduced outputs on a split, in float32, and the labels; see `compute_features`."""
    return _compute_head_outputs(parts, [probe.head], images, views, batch_size, "fp32")[0]


def _compute_head_outputs(
    parts: RunComponents,
    heads: Sequence[Callable[[Tensor], Tensor]],
    images: ImageDataset | FeatureDataset,
    views: int,
    batch_size: int,
    precision: str,
) -> list[OutputsAndLabels]:
    """Compute the reduced outputs of each head on a split, and the labels; `precision` is that of the features."""
    dataset = original_images(images)
    device = next(parts.model.parameters()).device
    results = []
    for start in range(0, len(dataset), MAX_PROBE_IMAGES):  # bounds the memory of the features
        part = dataset.subset(range(start, min(start + MAX_PROBE_IMAGES, len(dataset))))
        with autocast(device, precision):
            features = compute_features(parts, part, views, batch_size)
        results.append([_outputs(parts.task, features, head) for head in heads])
    outputs_by_head: list[OutputsAndLabels] = []
    for head_outputs in zip(*results, strict=True):
        reduced = np.concatenate([part_reduced for part_reduced, _ in head_outputs])
        labels = np.concatenate([part_labels for _, part_labels in head_outputs])
        outputs_by_head.append((reduced, labels))
    return outputs_by_head


@torch.no_grad()
def trained_head(parts: RunComponents) -> Callable[[Tensor], Tensor] | None:
    """Return the trained head as a function of layer features, the first columns of which are the head's inputs.

    Returns None if the head is not a linear layer, or if the model applies more than this head, e.g. auxiliary heads.
    """
    model = parts.model
    _, head = base_and_head(parts.model)
    if not isinstance(head, nn.Linear):
        return None

    def outputs(features: Tensor) -> Tensor:
        return head(features[:, : head.in_features])

    image = random_image(parts)
    was_training = model.training
    model.eval()
    features = layer_features(model, image, probed_layers(model))
    is_equal = torch.allclose(outputs(features.float()), model(image).float(), atol=1e-3, rtol=1e-3)
    model.train(was_training)
    return outputs if is_equal else None


def uses_kernel(task: Task, images: int) -> bool:
    """Return whether the final head includes a kernel head; `images` counts training and validation images."""
    return task.has_kernel_fit and MIN_CENTERS <= images <= MAX_CENTERS


def is_clearly_worse(task: Task, candidate: tuple[Any, Any], trained: tuple[Any, Any]) -> bool:
    """Return whether the outputs `candidate` are clearly worse than the trained head's on the same validation images.

    Both arguments are pairs of outputs, reduced by `Task.reduce`, and labels. For single-label classification, the
    difference must exceed three standard errors, because the trained head's epoch was selected on these images, and the
    final head will also be fitted to them:

        Σ d_i > 3 √(Σ d_i²)

    d_i is the lead of the trained head on image i, for the metric `Task.monitor`:

    - accuracy: 1, 0 or −1 (McNemar's test)
    - balanced_accuracy, macro_f1: 1, 0 or −1, divided by the number of images of the image's class
    - loss: the candidate's loss minus the trained head's loss

    For other tasks, the monitored metrics are compared without a margin.
    """
    if task.has_class_scores:
        labels = torch.as_tensor(np.asarray(trained[1]))
        differences = _image_scores(task, trained[0], labels) - _image_scores(task, candidate[0], labels)
        return float(differences.sum()) > 3.0 * math.sqrt(float(differences.square().sum()))
    candidate_metrics = task.metrics(*candidate)
    trained_metrics = task.metrics(*trained)
    sign = task.monitors[task.monitor]
    return sign * trained_metrics[task.monitor] > sign * candidate_metrics[task.monitor]


def _image_scores(task: Task, reduced: Any, labels: Tensor) -> Tensor:
    """Return the contribution of each image to the monitored metric of a single-label task, up to a factor."""
    probabilities = task.sample_outputs(reduced).cpu()
    if task.monitor == "loss":
        return probabilities.gather(1, labels[:, None])[:, 0].clamp_min(_EPS).log()
    is_correct = (probabilities.argmax(-1) == labels).double()
    if task.monitor == "accuracy":
        return is_correct
    return is_correct / labels.bincount()[labels]


def layer_fit_seconds(parts: RunComponents, images: int, views: int) -> float:
    """Estimate how many seconds the fits in `fit_layers` take.

    Args:
        parts: Model and task.
        images: Number of training and validation images.
        views: Number of views per image.
    """
    base: Any = base_model(parts.model)
    channels = [int(entry["num_chs"]) for entry in base.feature_info]
    # at most two features per channel: the mean over positions, and a prefix token or (last layer) the head's input
    width = 2 * sum(channels[layer] for layer in probed_layers(parts.model))
    speedup = _CUDA_SPEEDUP if next(parts.model.parameters()).is_cuda else 1
    products = images * views * width * parts.task.count_outputs(parts.splits.classes)
    linear = _SECONDS_PER_PRODUCT * products / speedup
    if not uses_kernel(parts.task, images):
        return linear + _FIXED_SECONDS
    kernel = _SECONDS_PER_SQUARE * images**2 * (width + images)
    return kernel + linear * _MIXED_ITERATIONS / _ITERATIONS + _FIXED_SECONDS


def fits_last_epoch(config: TrainConfig) -> bool:
    """Return whether a run with a head on several layers fits the head to the model of the last epoch, not the best.

    This is not the case if epochs are averaged, the backbone is frozen, or no epoch is selected on validation images.
    """
    optim = config.optim
    is_averaged = optim.swa or optim.soup
    is_selected = PROTOCOLS[config.data.protocol].selected_on == "val"
    return is_selected and not is_averaged and not find_method(config.method.name).is_head_only


def fit_mixed(task: Task, split: SplitFeatures, num_outputs: int) -> MixedHead:
    """Fit a kernel head and, with fewer iterations, a linear head; the linear head's weight is `_LINEAR_SHARE`."""
    linear = fit_linear(task, split, num_outputs, _MIXED_ITERATIONS)
    kernel = fit_kernel(task, split, num_outputs)
    return MixedHead(kernel, linear, torch.tensor(_LINEAR_SHARE).to(linear.weight))


def fit_linear(task: Task, split: SplitFeatures, num_outputs: int, max_iterations: int = _ITERATIONS) -> nn.Linear:
    """Fit a linear head by minimizing the task's loss plus an L2 penalty with L-BFGS.

        min_{W,b}  mean_i loss(W x̂_i + b, y_i) + ‖W‖² / (2 C n),   x̂ = (x − mean) / std,   C = 0.01

    The `n` samples are all views of all images. Nearly constant features are ignored.

    Returns:
        Head for unnormalized features, float32.
    """
    features = torch.cat(split.views)
    num_views = len(split.views)
    mean, std = _statistics(features)
    inputs = (features - mean) / std
    labels = move_to(torch.cat([split.labels] * num_views), inputs.device)
    weights = None if split.weights is None else torch.cat([split.weights] * num_views).to(inputs.device)
    penalty = 1 / (2 * _INVERSE_PENALTY * len(inputs))

    def loss(logits: Tensor) -> Tensor:
        return task.loss(logits, labels, weights)

    weight, bias = fit_head(inputs, num_outputs, loss, penalty, max_iterations)
    weight = weight / std
    return linear_head(weight, bias - weight @ mean)


def fit_kernel(task: Task, split: SplitFeatures, num_outputs: int) -> KernelHead:
    """Fit a kernel head by kernel ridge regression of the classes.

        M = (K + λ diag(w)⁻¹)⁻¹,   A = M (Y − 1 πᵀ),   f(x) = s (π + Aᵀ k(x)),   λ = 0.05

    K is the kernel matrix of the images; their features are averaged over the views. Y is the matrix of one-hot labels.
    The weights w are the products of class and sample weights, scaled to mean 1, and π is the weighted mean of Y.
    Nearly constant features are ignored. The scale s is the one of 13 candidates with the lowest weighted cross-entropy
    of the leave-one-out predictions `s (y_i − A_i / M_ii)`.

    Sources: Saunders et al., 1998 (ridge regression); Rasmussen and Williams, 2006, eq. 5.12 (leave-one-out).
    """
    features = torch.stack(split.views).mean(0)
    centers, mean, std = _standardized(features)
    labels = split.labels
    weights = torch.ones(len(labels), device=features.device)
    for factors in (task.probe_weights(labels.numpy()), split.weights):
        if factors is not None:
            weights = weights * torch.as_tensor(factors, dtype=weights.dtype, device=weights.device)
    # on the CPU, since some devices lack float64; in float32, very unequal weights can make the matrix indefinite
    weights = (weights / weights.mean()).clamp_min(_EPS).cpu().double()
    targets = F.one_hot(labels, num_outputs).double()
    coefficients, prior, inverse = _kernel_ridge(centers, targets, weights)
    leave_one_out = targets - coefficients / inverse.diagonal()[:, None]
    del inverse

    def leave_one_out_loss(scale: float) -> float:
        return float(weights @ F.cross_entropy(scale * leave_one_out, labels, reduction="none"))

    scale = min(_SCALES, key=leave_one_out_loss)
    weight, intercept = ((scale * values).to(features) for values in (coefficients.T.contiguous(), prior))
    return KernelHead(centers, mean, std, weight, intercept)


def leave_one_out_classes(views: Sequence[Tensor], labels: Tensor, num_outputs: int) -> Tensor:
    """Return each image's class as predicted by a kernel ridge regression on all views of the other images.

    Let `A` and `M` be those of `fit_kernel` for equal weights, with a row for each view of each image. For an image
    with the rows b, the predictions for its views are `Y_b − (M_bb)⁻¹ A_b`. The result is the class with the largest
    mean prediction.

    Args:
        views: Features of the images in each view, `[images, width]`.
        labels: Class indices `[images]`.
        num_outputs: Number of classes.
    """
    num_views = len(views)
    targets = F.one_hot(labels, num_outputs).double().repeat(num_views, 1)
    centers, _, _ = _standardized(torch.cat(list(views)))
    coefficients, _, inverse = _kernel_ridge(centers, targets, torch.ones(len(targets)).double())
    rows = torch.arange(len(targets)).view(num_views, -1).T  # [images, views]
    blocks = inverse[rows[:, :, None], rows[:, None, :]]  # [images, views, views]
    residuals = torch.linalg.solve(blocks, coefficients[rows])  # [images, views, classes]
    predictions = targets[rows] - residuals
    return predictions.mean(1).argmax(-1)


def _statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the means and standard deviations of features; the latter are infinite for nearly constant features."""
    std = features.std(0, correction=0)
    return features.mean(0), std.where(std > _MIN_STD * std.median() + _EPS, math.inf)


def _standardized(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return standardized float16 features (nearly constant ones are 0), their means, and standard deviations."""
    mean, std = _statistics(features)
    return clipped((features - mean) / std).half(), mean, std


def _kernel_ridge(centers: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return `A`, `π`, and `M` of `fit_kernel`, in float64 on the CPU."""
    standardized = centers.cpu().double()
    prior = weights @ targets / weights.sum()
    kernel = gaussian_kernel(standardized, standardized)
    kernel.diagonal().copy_(1 + _RIDGE / weights)
    factor = torch.linalg.cholesky(kernel)
    del kernel
    return torch.cholesky_solve(targets - prior, factor), prior, torch.cholesky_inverse(factor)


@torch.no_grad()
def _outputs(task: Task, split: SplitFeatures, head: Callable[[Tensor], Tensor]) -> OutputsAndLabels:
    """Average a head's outputs over the views, and return the reduced outputs and labels."""
    outputs = [_apply_in_chunks(head, view) for view in split.views]
    averaged = outputs[0] if len(outputs) == 1 else task.average_outputs(outputs)
    reduced, labels = task.reduce(averaged, split.labels)
    return reduced.cpu().numpy(), labels.cpu().numpy()


def _apply_in_chunks(head: Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
    """Apply a head to chunks of the features, to bound the memory of intermediate values."""
    return torch.cat([head(chunk) for chunk in features.split(_CHUNK_SIZE)])


def _concatenate(first: SplitFeatures, second: SplitFeatures) -> SplitFeatures:
    """Concatenate two splits; if only one has sample weights, those of the other become 1."""
    weights = None
    if first.weights is not None or second.weights is not None:
        first_weights = torch.ones(len(first.labels)) if first.weights is None else first.weights
        second_weights = torch.ones(len(second.labels)) if second.weights is None else second.weights
        weights = torch.cat([first_weights, second_weights])
    views = [torch.cat(pair) for pair in zip(first.views, second.views, strict=True)]
    return SplitFeatures(views, torch.cat([first.labels, second.labels]), weights)
