"""Small models, a training step, and training data for methods that need it."""

from pathlib import Path

import pytest
import timm
import torch
from torch.nn.functional import cross_entropy

from snella_app.methods import SelectionData


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:  # no allocator warning for a few steps
            item.add_marker(pytest.mark.filterwarnings("ignore:.* no budget allocator is attached:UserWarning"))


@pytest.fixture
def make_model():
    """Return a new timm model with fixed random weights."""

    def make(name="test_vit", num_classes=3, **options):
        torch.manual_seed(0)
        sized = {"img_size": 32} if "vit" in name else {}
        return timm.create_model(name, num_classes=num_classes, **{**sized, **options})

    return make


@pytest.fixture
def images():
    """Return four fixed images."""
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def batches(images):
    """Selection data with two training and two validation batches."""

    def load_batches():
        return iter([(images, torch.tensor([0, 1, 2, 0])), (images.flip(0), torch.tensor([1, 2, 0, 1]))])

    return SelectionData(load_batches, load_batches)


@pytest.fixture
def train_steps(images):
    """Train a model for a few steps and return it in evaluation mode."""

    def train(model, steps=2, lr=1e-2):
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
        torch.manual_seed(1)
        for _ in range(steps):
            cross_entropy(model(images), torch.tensor([0, 1, 2, 0])).backward()
            optimizer.step()
            optimizer.zero_grad()
        return model.eval()

    return train
