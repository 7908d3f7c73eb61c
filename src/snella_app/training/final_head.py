"""The final head of a run: the trained one, or a linear one fitted to features of several layers after training."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from snella_app.data import ImageDataset, build_transform
from snella_app.methods.model_parts import base_model
from snella_app.runs.layer_probe import LayerProbe, layer_features, probed_layers
from snella_app.tasks import Task
from snella_app.tasks.linear_fit import fit_head
from snella_app.training.build import RunComponents
from snella_app.training.linear_probe import is_clearly_more, plain_images

INVERSE_PENALTY = 0.01
"""Weight of the sum of the images' losses beside `‖W‖²/2`, for standardized features."""
_ITERATIONS = 100
_EPS = 1e-6
_SECONDS_PER_PRODUCT = 1e-8
"""Time of both fits for each image, feature and output; a fit has about a hundred steps."""


@dataclass
class MeasuredFeatures:
    """Features and targets of a part.

    Attributes:
        views: Features of the images, and of their flips if predictions are averaged over these: each
            `[images, width]`.
        labels: As `Task.collate` makes them.
        weights: Sample weights `[images]`; None for ones.
    """

    views: list[Tensor]
    labels: Tensor
    weights: Tensor | None


@dataclass
class LayerFit:
    """A probe of several layers and what it says of the validation images.

    Attributes:
        probe: Fitted to the training and validation images.
        val: Reduced outputs and labels of the validation images, of a fit to the training images alone; None where
            there are none.
    """

    probe: LayerProbe
    val: tuple[np.ndarray, np.ndarray] | None


Load = Callable[[ImageDataset], Iterable[dict[str, Tensor]]]
"""Makes batches of a part's images, as `Task.collate` does."""


@torch.no_grad()
def measure_features(
    parts: RunComponents, images: Any, views: int, load: Load, first_view: Tensor | None = None
) -> MeasuredFeatures:
    """Features of several layers of a part's images as predictions see them.

    Args:
        parts: The model, on its device.
        images: Of the part.
        views: 2 for the images and their flips.
        load: Makes the batches.
        first_view: Features of the images as they are, if they are known.
    """
    plain = plain_images(images).with_transform(build_transform(parts.data_config, train=False, augment="none"))
    model, layers = parts.model, probed_layers(parts.model)
    device = next(model.parameters()).device
    model.eval()
    found: dict[int, list[Tensor]] = {number: [] for number in range(0 if first_view is None else 1, views)}
    labels: list[Tensor] = []
    weights: list[Tensor] = []
    for batch in load(plain) if found else [_targets(parts.task, plain)]:
        for number, view in found.items():
            batch_images = batch["images"].to(device)
            features = layer_features(model, batch_images.flip(-1) if number else batch_images, layers)
            view.append(features.float())
        labels.append(batch["labels"])
        weights += [batch["weights"]] if "weights" in batch else []
    known = [] if first_view is None else [first_view]
    return MeasuredFeatures(
        [*known, *(torch.cat(view) for view in found.values())],
        torch.cat(labels),
        torch.cat(weights) if weights else None,
    )


def _targets(task: Task, images: ImageDataset) -> dict[str, Tensor]:
    """A batch of all targets, without the images."""
    return task.collate([(torch.empty(0), *images.target_and_weight(index)) for index in range(len(images))])


def fit_layers(parts: RunComponents, train: ImageDataset, views: int, load: Load) -> LayerFit:
    """Fit a linear head to features of several layers of the trained model.

    The validation images are predicted by a fit to the training images, and then are part of the final one.

    Args:
        parts: Data and model; `start_layers`, if it is there, has the features of `train`.
        train: The training images that it is fitted to.
        views: As for `measure_features`.
        load: Makes the batches.
    """
    outputs = parts.task.count_outputs(parts.splits.classes)
    measured = measure_features(parts, train, views, load, parts.start_layers)
    val = None if parts.splits.val is None else measure_features(parts, parts.splits.val, views, load)
    weight, bias = fit_linear(parts.task, measured, outputs)
    layers, said = probed_layers(parts.model), None
    if val is not None:
        said = _outputs(parts.task, val, weight, bias)
        weight, bias = fit_linear(parts.task, _joined(measured, val), outputs)
    return LayerFit(LayerProbe(parts.model, layers, weight, bias).to(weight.device), said)


def measure_layers(parts: RunComponents, probe: LayerProbe, images: Any, views: int, load: Load) -> Any:
    """Reduced outputs and labels of a part's images, by a probe; arguments as for `measure_features`."""
    measured = measure_features(parts, images, views, load)
    return _outputs(parts.task, measured, probe.linear.weight, probe.linear.bias)


def is_clearly_worse(task: Task, val: tuple[Any, Any], trained: tuple[Any, Any]) -> bool:
    """Whether the outputs `val` are worse than those of the trained head on the same validation images.

    For one class an image by McNemar's test (`is_clearly_more`), for other tasks by the monitored metric.
    """
    if task.has_one_class:
        labels = torch.as_tensor(np.asarray(trained[1]))
        right, right_trained = (
            task.sample_outputs(reduced).argmax(-1).cpu() == labels for reduced, _ in (val, trained)
        )
        return is_clearly_more(int((right_trained & ~right).sum()), int((right & ~right_trained).sum()))
    score, score_trained = (task.metrics(*outputs) for outputs in (val, trained))
    sign = task.monitors[task.monitor]
    return sign * score_trained[task.monitor] > sign * score[task.monitor]


def layer_fit_seconds(parts: RunComponents, rows: int) -> float:
    """About how long the fits of `fit_layers` take on a CPU, without the passes over the images.

    Args:
        parts: Data and model.
        rows: Images times views.
    """
    base: Any = base_model(parts.model)
    channels = [int(entry["num_chs"]) for entry in base.feature_info]
    width = 2 * sum(channels[layer] for layer in probed_layers(parts.model))
    return _SECONDS_PER_PRODUCT * rows * width * parts.task.count_outputs(parts.splits.classes) + 1.0


def fit_linear(task: Task, measured: MeasuredFeatures, outputs: int) -> tuple[Tensor, Tensor]:
    """Minimize the task's loss over linear heads, with an L2 penalty.

        min_{W,b}  mean_i loss(W x̂_i + b, y_i) + ‖W‖² / (2 C n),   x̂ = (x − mean) / std,   C = 0.01

    by L-BFGS, on all views of the `n` images.

    Args:
        task: Has the loss.
        measured: Features and targets.
        outputs: Of the head.

    Returns:
        Weight `[outputs, width]` and bias `[outputs]` on the features as they are, float32.
    """
    features = torch.cat(measured.views)
    count = len(measured.views)
    mean, std = features.mean(0), features.std(0, correction=0) + _EPS
    inputs = (features - mean) / std
    labels = torch.cat([measured.labels] * count).to(inputs.device)
    weights = None if measured.weights is None else torch.cat([measured.weights] * count).to(inputs.device)
    penalty = 1 / (2 * INVERSE_PENALTY * len(inputs))
    weight, bias = fit_head(inputs, outputs, lambda found: task.loss(found, labels, weights), penalty, _ITERATIONS)
    weight = weight / std
    return weight, bias - weight @ mean


def _outputs(task: Task, measured: MeasuredFeatures, weight: Tensor, bias: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Reduced outputs, averaged over the views, and labels."""
    outputs = [nn.functional.linear(view, weight, bias) for view in measured.views]
    averaged = outputs[0] if len(outputs) == 1 else task.average_outputs(outputs)
    reduced, labels = task.reduce(averaged, measured.labels)
    return reduced.cpu().numpy(), labels.cpu().numpy()


def _joined(first: MeasuredFeatures, second: MeasuredFeatures) -> MeasuredFeatures:
    """The images of two parts; sample weights of 1 where one of them has none."""
    weights = None
    if first.weights is not None or second.weights is not None:
        given = [part.weights if part.weights is not None else torch.ones(len(part.labels)) for part in (first, second)]
        weights = torch.cat(given)
    views = [torch.cat(pair) for pair in zip(first.views, second.views, strict=True)]
    return MeasuredFeatures(views, torch.cat([first.labels, second.labels]), weights)


__all__ = ["LayerFit", "fit_layers", "is_clearly_worse", "layer_fit_seconds", "measure_layers"]
