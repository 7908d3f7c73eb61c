"""fastai's `fine_tune` as documented: `Resize`, `aug_transforms`, one epoch of the head, then one-cycle for all layers.

The head is fastai's default, or batch norm and a linear layer with `--variant bn`. The script trains on train and
monitors val; `--variant all` trains on both, and `--variant fixed-epochs` trains on both for ten epochs, the default of
`snella train`. Images are resized to twice the resolution before `aug_transforms`, similar to 460 and 224 in the fastai
book. The epoch time is estimated from up to five steps.
"""

import copy
from collections.abc import Iterable
from pathlib import Path

import common
import numpy as np
from fastai.vision.all import (
    CategoryBlock,
    CrossEntropyLossFlat,
    DataBlock,
    ImageBlock,
    Learner,
    Normalize,
    Resize,
    accuracy,
    apply_init,
    aug_transforms,
    create_head,
    params,
    parent_label,
    set_seed,
)
from torch import nn


def fit(job: common.Job) -> common.Fitted:
    """Fine-tune for the number of epochs that fits the budget, or for ten."""
    mean, std = job.statistics()
    files = [path for part in ("train", "val") for path, _ in job.parts[part]]
    train_images, val_images = len(job.parts["train"]), len(job.parts["val"])
    val_indices = list(range(train_images, len(files)))
    if job.variant in ("all", common.FIXED):
        train_images = len(files)
    batch_size = min(64, train_images)
    block = DataBlock(
        (ImageBlock, CategoryBlock(vocab=job.classes)),
        splitter=lambda _: (list(range(train_images)), val_indices),
        get_y=parent_label,
        item_tfms=Resize(2 * job.pixels),
        batch_tfms=[*aug_transforms(size=job.pixels, min_scale=0.75), Normalize.from_stats(mean, std)],
    )
    data = block.dataloaders(files, path=job.folder, bs=batch_size, num_workers=0)
    is_pooled = job.weights == "dinov2s"
    body = job.backbone(0) if is_pooled else job.backbone(0, global_pool="")
    width, count = body.num_features, len(job.classes)
    if job.variant == "bn":
        pool = [] if is_pooled else [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        head = nn.Sequential(*pool, nn.BatchNorm1d(width), nn.Linear(width, count))
    else:
        head = create_head(width, count, pool=not is_pooled, concat_pool=not is_pooled)
    apply_init(head, nn.init.kaiming_normal_)
    model = nn.Sequential(body, head)

    details = {"epochs": common.FIXED_EPOCHS}
    if job.variant != common.FIXED:
        train, val = train_images // batch_size, -(-val_images // batch_size)
        details = budgeted_epochs(job, model, data.train, train, val)
    set_seed(job.seed)
    learner = Learner(
        data,
        model,
        loss_func=CrossEntropyLossFlat(),
        metrics=accuracy,
        splitter=lambda m: [params(m[0]), params(m[1])],
        path=job.cache,
    )
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(details["epochs"])

    def predict(paths: list[Path]) -> np.ndarray:
        with learner.no_bar(), learner.no_logging():
            return learner.get_preds(dl=data.test_dl(paths))[0].numpy()

    return common.Fitted(predict, common.stored_size(model), details)


def budgeted_epochs(job: common.Job, model: nn.Module, batches: Iterable[tuple], train: int, val: int) -> dict:
    """Return the number of epochs of `train` and `val` batches that fits the budget, and the seconds per step."""
    trial, loss = copy.deepcopy(model).train(), CrossEntropyLossFlat()

    def step(batch: tuple) -> None:
        loss(trial(batch[0]), batch[1]).backward()

    def evaluate(batch: tuple) -> None:
        trial(batch[0])

    limit_s = 0.06 * job.minutes * 60
    step_s = 1.05 * common.seconds_per_batch(lambda: batches, step, limit_s)  # 5% for the optimizer
    trial.eval().requires_grad_(False)
    eval_s = common.seconds_per_batch(lambda: batches, evaluate, limit_s)
    epochs = common.fitting_epochs(job, train * step_s + val * eval_s, before_s=(train + val) * eval_s)
    return {"epochs": epochs, "step_s": round(step_s, 3)}


if __name__ == "__main__":
    common.main("fastai", fit, ("fastai",), ("default", "bn", "all", common.FIXED))
