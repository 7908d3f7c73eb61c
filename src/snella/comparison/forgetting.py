"""Forgetting: how much less a linear probe on other data sees in the adapted features than in the frozen ones.

    forgetting = accuracy(probe on frozen features) - accuracy(probe on adapted features)

The probe is scikit-learn's logistic regression on standardised features, measured by stratified cross-validation over
training and validation images of the other data's own default split. The features are what enters the
classifier head, whatever a method has put in front of it.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader

from snella._files import write_json
from snella.data import ImageDataset, build_transform, load_data
from snella.data.splits import stratified_sample
from snella.methods import build_method, spec_of
from snella.runs import load_run
from snella.runs.build import make_backbone

_FOLDS = 5


def measure_forgetting(run: Path, data: str, images: int, cache: Path, batch_size: int = 32) -> dict[str, Any]:
    """Compare a run's features with those of its backbone.

    Args:
        run: Folder of a finished run.
        data: Other data than the run's.
        images: Use at most so many of its images.
        cache: Folder where the accuracy of frozen features is kept, which all runs of a backbone share.
        batch_size: Images at a time.

    Returns:
        `forgetting` (a share of 1; negative where the adapted features see more), `forgetting_data`,
        `probe_accuracy_frozen` and `probe_accuracy_adapted`.
    """
    loaded = load_run(run)
    items, labels = probe_images(data, images)
    transform = build_transform(loaded.info["data_config"], train=False, augment="none")
    items = [part.with_transform(transform) for part in items]
    adapted = probe_accuracy(head_inputs(loaded.model, items, batch_size), labels)
    backbone = loaded.info["backbone"]
    name = "_".join(str(part) for part in (backbone["name"], backbone["img_size"], data, images))
    seed = "" if backbone["pretrained"] else f"_{backbone['seed']}"
    path = cache / ("".join(c if c.isalnum() or c in "._-" else "-" for c in name + seed) + ".json")
    if path.is_file():
        frozen = float(json.loads(path.read_text())["accuracy"])
    else:
        model = build_method("linear", make_backbone(backbone)).to(loaded.device)
        frozen = probe_accuracy(head_inputs(model, items, batch_size), labels)
        cache.mkdir(parents=True, exist_ok=True)
        write_json(path, {"data": data, "images": len(labels), "backbone": backbone, "accuracy": frozen})
    return {
        "forgetting": frozen - adapted,
        "forgetting_data": data,
        "probe_accuracy_frozen": frozen,
        "probe_accuracy_adapted": adapted,
    }


@torch.no_grad()
def head_inputs(model: nn.Module, parts: list[ImageDataset], batch_size: int) -> NDArray[np.float32]:
    """What enters the head of a model from `build_method`, `[images, width]`.

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
        for images, _ in DataLoader(ConcatDataset(parts), batch_size):
            model(images.to(device))
    finally:
        handle.remove()
    return torch.cat(seen).numpy()


def probe_accuracy(features: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Accuracy of a logistic regression in stratified cross-validation.

    Args:
        features: `[images, width]`.
        labels: `[images]`; every class twice at least.
    """
    folds = min(_FOLDS, int(np.bincount(labels)[np.unique(labels)].min()))
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the last digits of the fit change no prediction
        split = StratifiedKFold(folds, shuffle=True, random_state=0)
        predicted = cross_val_predict(probe, features, labels, cv=split)
    return float((predicted == labels).mean())


def probe_images(data: str, images: int) -> tuple[list[ImageDataset], NDArray[np.int64]]:
    """Training and validation images of a data set, a stratified choice of at most `images`, and their labels.

    Raises:
        ValueError: Cross-validation cannot be done, since a class has one image alone.
    """
    splits = load_data(data, seed=0)
    parts = [splits.train] if splits.val is None else [splits.train, splits.val]
    labels = [label for part in parts for label in part.labels]
    if len(labels) > images:
        chosen = stratified_sample(labels, images, seed=0, classes=splits.classes, argument="forgetting_images")
        first = len(splits.train)
        inside = [[i for i in chosen if i < first], [i - first for i in chosen if i >= first]]
        parts = [part.subset(own) for part, own in zip(parts, inside, strict=False) if own]
    found = np.array([label for part in parts for label in part.labels])
    counts = np.bincount(found, minlength=len(splits.classes))
    few = [name for name, count in zip(splits.classes, counts, strict=True) if count == 1]
    if few:
        raise ValueError(
            f"forgetting on {data!r} needs two images of every class, got one of {', '.join(few)}; "
            f"raise forgetting_images ({images}) or name other data"
        )
    return parts, found
