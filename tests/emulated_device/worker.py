"""Run in a process with the emulated device.

worker.py LIBRARY checks           check that the device rejects CPU tensors and float64
worker.py LIBRARY steps            train with the library on both devices, and print the results as JSON
worker.py LIBRARY commands LIST    run command lines of `snella` from a JSON list
"""

import json
import sys

import torch
from device import NAME, register
from peft import get_peft_model
from timm.models.vision_transformer import VisionTransformer
from torch.nn.functional import cross_entropy

from snella import BudgetAllocator, SnellaConfig
from snella.ops import WITHOUT_FLOAT64, widest_dtype
from snella_app.cli.main import main
from snella_app.device import move_to


def check_rejections() -> None:
    """Check that the device rejects what CUDA and MPS reject."""
    values = torch.ones(2, 3, device=NAME)
    assert (values * torch.tensor(2.0)).sum().item() == 12  # 0-dim CPU tensors are accepted
    assert values[torch.tensor([0])].shape == (1, 3)  # and indices
    assert torch.conv2d(values[None, None], values[None, None]).item() == 6  # without a bias
    assert widest_dtype(NAME) == move_to(torch.ones(2).double(), torch.device(NAME)).dtype == torch.float32
    assert widest_dtype("cpu") == move_to(torch.ones(2).double(), torch.device("cpu")).dtype == torch.float64
    for error, function in (
        (RuntimeError, lambda: values + torch.ones(3)),
        (RuntimeError, lambda: values @ torch.ones(3, 2)),
        (RuntimeError, lambda: values.index_put_((torch.tensor([0]),), torch.ones(1, 3))),
        (TypeError, lambda: values.double()),
        (TypeError, lambda: values.sum(dtype=torch.float64)),
        (TypeError, lambda: torch.ones(2, dtype=torch.float64, device=NAME)),
        (TypeError, lambda: torch.ones(2, dtype=torch.float64).to(NAME)),
    ):
        try:
            function()
        except error:
            continue
        raise AssertionError(f"no {error.__name__}")


def train(device: str) -> dict[str, object]:
    """Train a small transformer for four steps and merge it."""
    torch.manual_seed(0)
    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3)
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    config = SnellaConfig(r=2, target_sparsity=0.7, impl="eager", modules_to_save=["head"], compress_activations=True)
    peft_model = get_peft_model(model, config).to(device)
    optimizer = torch.optim.AdamW(peft_model.parameters(), lr=0.01)
    allocator = BudgetAllocator(peft_model, total_epochs=2, steps_per_epoch=2)
    allocator.attach(optimizer)
    losses = []
    for _ in range(4):
        loss = cross_entropy(peft_model(images.to(device)), labels.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    merged = peft_model.eval().merge_and_unload()
    outputs = merged(images.to(device))
    assert outputs.device.type == device
    return {"losses": losses, "budgets": allocator.budgets, "outputs": outputs.tolist()}


if __name__ == "__main__":
    register(sys.argv[1])
    WITHOUT_FLOAT64.add(NAME)
    torch.set_num_threads(1)
    if sys.argv[2] == "checks":
        check_rejections()
    elif sys.argv[2] == "steps":
        print(json.dumps([train("cpu"), train(NAME)]))
    else:
        for arguments in json.loads(sys.argv[3]):
            if status := main(["--debug", *arguments]):
                sys.exit(status)
