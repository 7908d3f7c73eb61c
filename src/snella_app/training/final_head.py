"""Final head of a run: the trained head, or a linear probe on features of several layers, fitted after training."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from snella_app.data.datasets import ImageDataset
from snella_app.data.transforms import build_transform
from snella_app.device import autocast
from snella_app.methods.model_parts import base_model
from snella_app.runs.layer_probe import LayerProbe, probed_layers
from snella_app.tasks import Task
from snella_app.tasks.linear_fit import fit_head
from snella_app.training.build import RunComponents
from snella_app.training.linear_probe import encoded_targets, extract_features, is_clearly_better, original_images

_INVERSE_PENALTY = 0.01
"""Weight C of the summed loss relative to `‖W‖²/2`, for standardized features."""
_ITERATIONS = 100
_EPS = 1e-6
_SECONDS_PER_PRODUCT = 1e-8
"""Seconds of both fits per image view, feature and output; a fit takes about a hundred steps."""


@dataclass
class MeasuredFeatures:
    """Features and targets of a split.

    Attributes:
        views: Features of the images, and of their flips with test-time augmentation; each `[images, width]`.
        labels: Labels as collated by `Task.collate`.
        weights: Sample weights `[images]`; None for equal weights.
    """

    views: list[Tensor]
    labels: Tensor
    weights: Tensor | None


def measure_features(
    parts: RunComponents, images: Any, views: int, batch_size: int, first_view: Tensor | None = None
) -> MeasuredFeatures:
    """Compute features of several layers with the evaluation transform, in the autocast context of the caller.

    The views are the images and, with `views=2`, their flips. `first_view` contains precomputed features of the images.
    """
    plain = original_images(images).with_transform(build_transform(parts.data_config, train=False, augment="none"))
    known = [] if first_view is None else [first_view]
    flips, layers = (False, True)[len(known) : views], probed_layers(parts.model)
    measured = extract_features(parts, plain, batch_size, layers=layers, flips=flips) if flips else []
    batch = encoded_targets(parts.task, plain, range(len(plain)))
    return MeasuredFeatures([*known, *measured], batch["labels"], batch.get("weights"))


def fit_layers(
    parts: RunComponents, train: ImageDataset, views: int, batch_size: int, precision: str
) -> tuple[LayerProbe, tuple[np.ndarray, np.ndarray] | None]:
    """Fit a linear head to features of several layers of the trained model.

    A first fit to the training images predicts the validation images. The final fit uses both splits.
    `parts.initial_layer_features`, if set, are the features of the training images. The others are computed in autocast
    with `precision`, which is faster in bfloat16; the returned probe computes in the precision of its inputs.

    Returns:
        The probe from the final fit, and the reduced outputs and labels of the validation images from the first fit;
        None without validation images.
    """
    task, outputs = parts.task, parts.task.count_outputs(parts.splits.classes)
    val_images, val_outputs = parts.splits.val, None
    with autocast(next(parts.model.parameters()).device, precision):
        measured = measure_features(parts, train, views, batch_size, parts.initial_layer_features)
        val = None if val_images is None else measure_features(parts, val_images, views, batch_size)
    weight, bias = fit_linear(task, measured, outputs)
    if val is not None:
        val_outputs = _outputs(task, val, weight, bias)
        weight, bias = fit_linear(task, _concatenate(measured, val), outputs)
    return LayerProbe(parts.model, probed_layers(parts.model), weight, bias).to(weight.device), val_outputs


def measure_layers(parts: RunComponents, probe: LayerProbe, images: Any, views: int, batch_size: int) -> Any:
    """Compute the reduced outputs of a probe and the labels of a split; see `measure_features` for the arguments."""
    measured = measure_features(parts, images, views, batch_size)
    return _outputs(parts.task, measured, probe.linear.weight, probe.linear.bias)


def is_clearly_worse(task: Task, val: tuple[Any, Any], trained: tuple[Any, Any]) -> bool:
    """Return whether the outputs `val` are clearly worse than the trained head's on the same validation images.

    Single-label classification uses McNemar's test with three standard errors, because the trained head's epoch was
    selected on these images, and the final head will also be fitted to them. Other tasks compare the monitored metric.
    """
    if task.has_one_class:
        labels = torch.as_tensor(np.asarray(trained[1]))
        right, right_trained = (
            task.sample_outputs(reduced).argmax(-1).cpu() == labels for reduced, _ in (val, trained)
        )
        return is_clearly_better(int((right_trained & ~right).sum()), int((right & ~right_trained).sum()), errors=3.0)
    score, score_trained = (task.metrics(*outputs) for outputs in (val, trained))
    sign = task.monitors[task.monitor]
    return sign * score_trained[task.monitor] > sign * score[task.monitor]


def layer_fit_seconds(parts: RunComponents, rows: int) -> float:
    """Estimate the CPU time of the fits in `fit_layers` in seconds; a row is one view of an image."""
    base: Any = base_model(parts.model)
    channels = [int(entry["num_chs"]) for entry in base.feature_info]
    width = 2 * sum(channels[layer] for layer in probed_layers(parts.model))
    return _SECONDS_PER_PRODUCT * rows * width * parts.task.count_outputs(parts.splits.classes) + 1.0


def fit_linear(task: Task, measured: MeasuredFeatures, outputs: int) -> tuple[Tensor, Tensor]:
    """Fit a linear head to the task's loss with an L2 penalty by L-BFGS.

        min_{W,b}  mean_i loss(W x̂_i + b, y_i) + ‖W‖² / (2 C n),   x̂ = (x − mean) / std,   C = 0.01

    The `n` samples are all views of all images.

    Returns:
        Weight `[outputs, width]` and bias `[outputs]` for unnormalized features, float32.
    """
    features = torch.cat(measured.views)
    count = len(measured.views)
    mean, std = features.mean(0), features.std(0, correction=0) + _EPS
    inputs = (features - mean) / std
    labels = torch.cat([measured.labels] * count).to(inputs.device)
    weights = None if measured.weights is None else torch.cat([measured.weights] * count).to(inputs.device)
    penalty = 1 / (2 * _INVERSE_PENALTY * len(inputs))
    weight, bias = fit_head(inputs, outputs, lambda logits: task.loss(logits, labels, weights), penalty, _ITERATIONS)
    weight = weight / std
    return weight, bias - weight @ mean


def _outputs(task: Task, measured: MeasuredFeatures, weight: Tensor, bias: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Compute reduced outputs, averaged over the views, and labels."""
    outputs = [nn.functional.linear(view, weight, bias) for view in measured.views]
    averaged = outputs[0] if len(outputs) == 1 else task.average_outputs(outputs)
    reduced, labels = task.reduce(averaged, measured.labels)
    return reduced.cpu().numpy(), labels.cpu().numpy()


def _concatenate(first: MeasuredFeatures, second: MeasuredFeatures) -> MeasuredFeatures:
    """Concatenate two splits; missing sample weights become 1."""
    weights = None
    if first.weights is not None or second.weights is not None:
        sample_weights = [
            part.weights if part.weights is not None else torch.ones(len(part.labels)) for part in (first, second)
        ]
        weights = torch.cat(sample_weights)
    views = [torch.cat(pair) for pair in zip(first.views, second.views, strict=True)]
    return MeasuredFeatures(views, torch.cat([first.labels, second.labels]), weights)
