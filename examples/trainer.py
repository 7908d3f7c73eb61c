"""transformers' Trainer with `SnellaCallback`, resumed from a checkpoint."""

from pathlib import Path

import torch
from peft import get_peft_model
from sklearn.datasets import load_digits
from torch.utils.data import Subset
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from snella import SnellaCallback, SnellaConfig, create_snella_optimizer

OUT = Path("runs/examples/trainer")
digits = load_digits()
pixels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1  # [n, 1, 8, 8]
dataset = [{"pixel_values": image, "labels": int(label)} for image, label in zip(pixels, digits.target, strict=True)]
train_set, test_set = Subset(dataset, range(1000)), Subset(dataset, range(1000, 1797))


def make_trainer() -> Trainer:
    """Create a Trainer for an adapted small random ViT; use `from_pretrained` in practice."""
    set_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, num_labels=10, initializer_range=0.1,
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    model = get_peft_model(model, SnellaConfig(r=8, target_sparsity=0.8, scaling=10.0, modules_to_save=["classifier"]))
    return Trainer(
        model,
        TrainingArguments(
            str(OUT), num_train_epochs=4, per_device_train_batch_size=50, save_strategy="epoch",
            logging_strategy="epoch", report_to="none", disable_tqdm=True, dataloader_pin_memory=False, use_cpu=True,
        ),
        train_dataset=train_set,
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(1) == p.label_ids).mean())},
        callbacks=[SnellaCallback()],  # attaches the BudgetAllocator to the optimizer
        optimizers=(create_snella_optimizer(model, lr=2e-2, head_lr=5e-3), None),
    )  # fmt: skip


uninterrupted = make_trainer()
uninterrupted.train()
print(f"test accuracy: {uninterrupted.evaluate(test_set)['eval_accuracy']:.1%}")

# as in a new process after an interruption in the third epoch
resumed = make_trainer()
resumed.train(resume_from_checkpoint=str(OUT / "checkpoint-40"))  # two epochs of 20 steps
print(f"test accuracy, resumed after two epochs: {resumed.evaluate(test_set)['eval_accuracy']:.1%}")
