"""Fine-tuning with Lightning's Trainer, weight averaging and checkpoints.

Requires `pip install lightning`.
"""

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from peft import PeftModel, get_peft_model
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split
from transformers import ViTConfig, ViTForImageClassification

from snella import BudgetAllocator, SnellaConfig, create_snella_optimizer

OUT = Path("runs/examples/lightning_module")


def make_backbone() -> ViTForImageClassification:
    """Create a small random ViT; use `from_pretrained` in practice."""
    L.seed_everything(0, verbose=False)
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, num_labels=10, initializer_range=0.1,
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
    )  # fmt: skip
    return ViTForImageClassification(config)


class Classifier(L.LightningModule):
    """Adapted ViT classifier."""

    def __init__(self) -> None:
        super().__init__()
        config = SnellaConfig(r=8, target_sparsity=0.8, scaling=10.0, modules_to_save=["classifier"])
        self.model = get_peft_model(make_backbone(), config)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        return F.cross_entropy(self.model(batch[0]).logits, batch[1])

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        is_correct = self.model(batch[0]).logits.argmax(1) == batch[1]
        self.log("accuracy", is_correct.double().mean(), on_epoch=True, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = create_snella_optimizer(self.model, lr=2e-2, head_lr=5e-3)
        epochs, steps = self.trainer.max_epochs, self.trainer.estimated_stepping_batches  # total number of steps
        BudgetAllocator(self.model, total_epochs=epochs, steps_per_epoch=-(-steps // epochs), total_steps=steps).attach(
            optimizer
        )  # runs in optimizer.step() and is saved with the optimizer
        return optimizer


class ManualClassifier(Classifier):
    """`Classifier` with Lightning's manual optimization."""

    automatic_optimization = False

    def training_step(self, batch: list[torch.Tensor], index: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, index))
        optimizer.step()


def make_loaders() -> tuple[DataLoader, DataLoader]:
    """Split scikit-learn's digits into 1,000 training and 797 validation images."""
    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1  # [n, 1, 8, 8]
    data, generator = TensorDataset(pixels, torch.tensor(digits.target)), torch.Generator().manual_seed(0)
    training, validation = random_split(data, [1000, 797], generator)
    return DataLoader(training, 50, shuffle=True), DataLoader(validation, 797)


if __name__ == "__main__":
    training, validation = make_loaders()
    module = Classifier()
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=4, default_root_dir=OUT,
        logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[EMAWeightAveraging(decay=0.9), ModelCheckpoint(OUT, "{epoch}", enable_version_counter=False)],
    )  # fmt: skip
    trainer.fit(module, training)
    (scores,) = trainer.validate(module, validation, verbose=False)
    print(f"accuracy of the averaged weights: {scores['accuracy']:.1%}")

    module.model.save_pretrained(OUT / "adapter")  # averaged factors, budgets and head
    loaded = PeftModel.from_pretrained(make_backbone(), OUT / "adapter")
    loaded.eval().requires_grad_(False)
    pixels, labels = next(iter(validation))
    print(f"accuracy of the loaded adapter: {(loaded(pixels).logits.argmax(1) == labels).double().mean():.1%}")
