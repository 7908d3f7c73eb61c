"""A classifier head that starts as the linear probe of the model it sits on."""

from __future__ import annotations

import numpy as np
import torch
from peft.utils import ModulesToSaveWrapper
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from snella.data import build_transform
from snella.methods import spec_of
from snella.training.assembly import Assembly
from snella.training.config import TrainConfig
from snella.training.features import has_timm_features, pooled_features

_INVERSE_PENALTY = 0.5
_MAX_ITERATIONS = 2000


def start_head_from_probe(parts: Assembly, config: TrainConfig) -> None:
    """Set the head to a logistic regression on the features that the model has before training.

    A random head sends random gradients through the backbone in its first steps; one that fits already does not
    (Kumar et al., 2022, arXiv 2202.10054). The training images are seen once, without augmentation. Features are
    divided by their root mean variance, and the L2 penalty is `1/(2·0.5)·‖w‖²` beside the sum of the images' losses.

    Args:
        parts: Data and model; the head is changed in place.
        config: Resolved settings; the batch size and the workers count.

    Raises:
        ValueError: The model has no linear head on pooled features.
    """
    model = parts.model
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    head = _trained_head(base.get_submodule(spec_of(model).head))
    if not isinstance(head, nn.Linear) or not has_timm_features(base):
        raise ValueError(
            "head_start='probe' needs a timm classifier with a linear head, got "
            f"{type(base).__name__} with {type(head).__name__}; use head_start='random'"
        )
    train = parts.splits.train
    images = train.with_transform(build_transform(parts.data_config, train=False, augment="none"))
    was_training = model.training
    features = torch.cat(list(pooled_features(base, images, config))).double().numpy()
    model.train(was_training)
    weight, bias = fit_probe(features, np.asarray(train.labels), head.out_features)
    with torch.no_grad():
        head.weight.copy_(weight)
        if head.bias is not None:
            head.bias.copy_(bias)


def fit_probe(features: np.ndarray, labels: np.ndarray, classes: int) -> tuple[Tensor, Tensor]:
    """Fit a logistic regression.

    Args:
        features: `[images, width]`.
        labels: Class of each image.
        classes: How many there are; one without images keeps weights of zero.

    Returns:
        Weight `[classes, width]` and bias `[classes]` of a softmax classifier, float64.
    """
    scale = float(np.sqrt(features.var(0).mean())) or 1.0
    probe = LogisticRegression(C=_INVERSE_PENALTY, max_iter=_MAX_ITERATIONS).fit(features / scale, labels)
    weight, bias = probe.coef_ / scale, probe.intercept_
    if len(probe.classes_) == 2:
        # one score for the second class is half of it for each of the two, with opposite signs
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    of_all, of_bias = torch.zeros(classes, features.shape[1], dtype=torch.float64), torch.zeros(classes).double()
    of_all[probe.classes_], of_bias[probe.classes_] = torch.from_numpy(weight), torch.from_numpy(bias)
    return of_all, of_bias


def _trained_head(head: nn.Module) -> nn.Module:
    """The copy of the head that is trained: PEFT keeps the old one beside it."""
    if isinstance(head, ModulesToSaveWrapper):
        return head.modules_to_save[head.active_adapter]  # type: ignore[index]
    return head
