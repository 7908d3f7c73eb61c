"""timm's fine-tuning recipe for pre-trained models, built from timm's functions as in `train.py` with these options:

--opt adamw --lr 2e-4 --batch-size 64 --weight-decay 0.05 --layer-decay 0.75 --sched cosine --warmup-epochs 1
--aa rand-m9-mstd0.5 --reprob 0.25 --smoothing 0.1 --drop-path 0.1. As in `train.py`, the epoch with the best accuracy
on val is selected. The epoch time is estimated from up to five steps and one validation pass; `--variant fixed-epochs`
trains for ten epochs.
"""

import copy
from pathlib import Path

import common
import numpy as np
import torch
from timm.data import create_transform
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.utils.data import DataLoader


def fit(job: common.Job) -> common.Fitted:
    """Train for the number of epochs that fits the budget, and select the best."""
    mean, std = job.statistics()
    size = (3, job.pixels, job.pixels)
    train_transform = create_transform(
        size, is_training=True, mean=mean, std=std, auto_augment="rand-m9-mstd0.5", re_prob=0.25, re_mode="pixel"
    )
    eval_transform = create_transform(size, mean=mean, std=std)
    batch_size = min(64, len(job.parts["train"]))
    generator = torch.Generator().manual_seed(job.seed)
    loader = DataLoader(
        common.Files(job.parts["train"], train_transform), batch_size, shuffle=True, drop_last=True, generator=generator
    )
    paths, labels = zip(*job.parts["val"], strict=True)
    model = job.backbone(len(job.classes), drop_path_rate=0.1)
    loss = LabelSmoothingCrossEntropy(0.1)

    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        return create_optimizer_v2(model, opt="adamw", lr=2e-4, weight_decay=0.05, layer_decay=0.75)

    def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> None:
        optimizer.zero_grad()
        loss(model(batch[0]), batch[1]).backward()
        optimizer.step()

    trial = copy.deepcopy(model).train()
    optimizer = optimizer_of(trial)
    limit_s = 0.06 * job.minutes * 60
    step_s = common.seconds_per_batch(lambda: loader, lambda batch: train_step(trial, optimizer, batch), limit_s)
    trial.eval().requires_grad_(False)
    val_loader = DataLoader(common.Files(job.parts["val"], eval_transform), batch_size)
    eval_s = common.seconds_per_batch(lambda: val_loader, lambda batch: trial(batch[0]), limit_s)
    trial = None  # free memory
    epochs = common.fitting_epochs(job, len(loader) * step_s + len(val_loader) * eval_s)

    generator.manual_seed(job.seed)
    torch.manual_seed(job.seed)
    optimizer = optimizer_of(model)
    schedule, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=epochs, warmup_epochs=min(1, epochs - 1), warmup_lr=1e-6, min_lr=0,
        step_on_epochs=False, updates_per_epoch=len(loader),
    )  # fmt: skip
    best, best_state, updates = -1.0, model.state_dict(), 0
    for _ in range(epochs):
        model.train()
        for batch in loader:
            schedule.step_update(updates)
            train_step(model, optimizer, batch)
            updates += 1
        is_correct = common.outputs(model, list(paths), eval_transform).argmax(1) == torch.tensor(labels)
        if is_correct.float().mean() > best:
            best, best_state = float(is_correct.float().mean()), copy.deepcopy(model.state_dict())
    model.load_state_dict(best_state)

    def predict(paths: list[Path]) -> np.ndarray:
        return common.outputs(model, paths, eval_transform).softmax(1).numpy()

    details = {"epochs": epochs, "step_s": round(step_s, 3), "val_accuracy": best}
    return common.Fitted(predict, common.stored_size(model), details)


if __name__ == "__main__":
    common.main("timm", fit, ("timm",), ("default", common.FIXED))
