"""The final head of a run: the trained one, or a linear one fitted to features of several layers after training."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from snella.data import ImageDataset, build_transform
from snella.runs.config import TrainConfig
from snella.runs.layer_probe import LayerProbe, layer_features, probed_layers
from snella.tasks import Task
from snella.training.build import RunComponents
from snella.training.distributed import process_count
from snella.training.linear_probe import FeatureDataset, base_and_head, probe_rows

INVERSE_PENALTY = 0.01
"""Weight of the sum of the images' losses beside `‖W‖²/2`, for standardized features."""
_ITERATIONS = 100
_CLEAR = 2.0
"""Standard errors from which the trained head is known to be better."""
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


@torch.no_grad()
def measure_features(
    parts: RunComponents, images: Any, config: TrainConfig, rows: Any = None, first_view: Tensor | None = None
) -> MeasuredFeatures:
    """Features of several layers of a part's images as predictions see them.

    Args:
        parts: The model, on its device.
        images: Of the part.
        config: Resolved settings; the views, the batch size and the workers count.
        rows: Which of the images; all if None.
        first_view: Features of the images as they are, if they are known.
    """
    if isinstance(images, FeatureDataset):
        images = images.images
    plain: ImageDataset = images.with_transform(build_transform(parts.data_config, train=False, augment="none"))
    if rows is not None:
        plain = plain.subset(list(rows))
    model, layers = parts.model, probed_layers(parts.model)
    device = next(model.parameters()).device
    model.eval()
    missing = range(0 if first_view is None else 1, config.views)
    views: dict[int, list[Tensor]] = {number: [] for number in missing}
    labels: list[Tensor] = []
    weights: list[Tensor] = []
    batches: Iterable[dict[str, Tensor]]
    if missing:
        batches = DataLoader(
            plain, config.effective_batch_size, collate_fn=parts.task.collate, num_workers=config.workers
        )
    else:
        targets = [(torch.empty(0), *plain.target_and_weight(index)) for index in range(len(plain))]
        batches = [parts.task.collate(targets)]
    for batch in batches:
        for number, view in views.items():
            batch_images = batch["images"].to(device)
            features = layer_features(model, batch_images.flip(-1) if number else batch_images, layers)
            view.append(features.float())
        labels.append(batch["labels"])
        weights += [batch["weights"]] if "weights" in batch else []
    return MeasuredFeatures(
        [*([] if first_view is None else [first_view]), *(torch.cat(view) for view in views.values())],
        torch.cat(labels),
        torch.cat(weights) if weights else None,
    )


def fit_layers(parts: RunComponents, config: TrainConfig, outputs: int, *, is_trained: bool = True) -> LayerFit:
    """Fit a linear head to features of several layers of the trained model.

    The validation images are predicted by a fit to the training images, and then are part of the final one.

    Args:
        parts: Data and model.
        config: Resolved settings.
        outputs: Of the head.
        is_trained: False if the model is as it was at the start, whose features need not be computed again.
    """
    known = None if is_trained else parts.start_layers
    train = measure_features(parts, parts.splits.train, config, probe_rows(parts, config), known)
    val = None if parts.splits.val is None else measure_features(parts, parts.splits.val, config)
    weight, bias = fit_linear(parts.task, train, outputs)
    layers, said = probed_layers(parts.model), None
    if val is not None:
        said = _outputs(parts.task, val, weight, bias)
        weight, bias = fit_linear(parts.task, _joined(train, val), outputs)
    return LayerFit(LayerProbe(parts.model, layers, weight, bias).to(weight.device), said)


def measure_layers(parts: RunComponents, config: TrainConfig, probe: LayerProbe, images: Any) -> Any:
    """Reduced outputs and labels of a part's images, by a probe."""
    measured = measure_features(parts, images, config)
    return _outputs(parts.task, measured, probe.linear.weight, probe.linear.bias)


def is_clearly_worse(task: Task, val: tuple[Any, Any], trained: tuple[Any, Any]) -> bool:
    """Whether the outputs `val` are worse than those of the trained head on the same validation images.

    For one class an image by McNemar's test, two standard errors of the number of images that one of both alone gets
    right; for other tasks by the monitored metric.
    """
    if task.has_one_class:
        labels = torch.as_tensor(np.asarray(trained[1]))
        right, right_trained = (
            task.sample_outputs(reduced).argmax(-1).cpu() == labels for reduced, _ in (val, trained)
        )
        lost, won = int((right_trained & ~right).sum()), int((right & ~right_trained).sum())
        return lost - won > _CLEAR * math.sqrt(lost + won)
    score, score_trained = (task.metrics(*outputs) for outputs in (val, trained))
    sign = task.monitors[task.monitor]
    return sign * score_trained[task.monitor] > sign * score[task.monitor]


def layer_fit_seconds(parts: RunComponents, config: TrainConfig) -> float:
    """About how long the fits of `fit_layers` take on a CPU, without the passes over the images."""
    base, _ = base_and_head(parts.model)
    channels = [int(entry["num_chs"]) for entry in base.feature_info]  # type: ignore[union-attr]
    width = 2 * sum(channels[layer] for layer in probed_layers(parts.model))
    rows = config.views * len(probe_rows(parts, config))
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
    weight = torch.zeros(outputs, inputs.shape[1], device=inputs.device, requires_grad=True)
    bias = torch.zeros(outputs, device=inputs.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=_ITERATIONS, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )
    penalty = 1 / (2 * INVERSE_PENALTY * len(inputs))

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = task.loss(inputs @ weight.T + bias, labels, weights) + penalty * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(objective)
    weight, bias = weight.detach() / std, bias.detach()
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


__all__ = ["LayerFit", "choose_final_head", "fit_layers", "is_clearly_worse", "layer_fit_seconds", "measure_layers"]
