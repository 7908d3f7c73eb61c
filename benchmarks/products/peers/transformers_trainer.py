"""Hugging Face's `run_image_classification` with its defaults, using `Trainer`.

RandomResizedCrop and flips, batch size 8, AdamW with learning rate 5e-5 and linear decay, and a linear head. It trains
on train; val is unused. The epoch time is estimated from up to five steps; `--variant fixed-epochs` trains for ten
epochs.
"""

import copy
import tempfile
from pathlib import Path

import common
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from transformers import Trainer, TrainingArguments
from transformers.utils import logging


class Classifier(nn.Module):
    """A timm model with the arguments and outputs that `Trainer` expects."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.model(pixel_values)
        return (
            {"logits": logits}
            if labels is None
            else {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}
        )


def collate(items: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
    """Collate a batch as keyword arguments."""
    images, labels = zip(*items, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.tensor(labels)}


def fit(job: common.Job) -> common.Fitted:
    """Train for the number of epochs that fits the budget."""
    logging.set_verbosity_error()
    end = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*job.statistics())]
    train_transform = v2.Compose([v2.RandomResizedCrop(job.pixels), v2.RandomHorizontalFlip(), *end])
    eval_transform = v2.Compose([v2.Resize(job.pixels), v2.CenterCrop(job.pixels), *end])
    images = common.Files(job.parts["train"], train_transform)
    model = Classifier(job.backbone(len(job.classes)))
    trial = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(trial.parameters(), 5e-5)

    def step(batch: dict[str, Tensor]) -> None:
        trial(**batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    step_s = common.seconds_per_batch(
        lambda: DataLoader(images, 8, shuffle=True, collate_fn=collate), step, 0.06 * job.minutes * 60
    )
    trial = optimizer = None  # free memory
    epochs = common.fitting_epochs(job, step_s * -(-len(images) // 8))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=epochs,
            seed=job.seed,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        Trainer(model, arguments, data_collator=collate, train_dataset=images).train()

    def predict(paths: list[Path]) -> np.ndarray:
        return common.outputs(model.model, paths, eval_transform).softmax(1).numpy()

    return common.Fitted(predict, common.stored_size(model), {"epochs": epochs, "step_s": round(step_s, 3)})


if __name__ == "__main__":
    common.main("transformers", fit, ("transformers",), ("default", common.FIXED))
