"""Budget allocator in Lightning's `Trainer`."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from peft import PeftModel
from torch.utils.data import DataLoader, TensorDataset

from snella.matrices import adapted_matrices

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]
EPOCHS, STEPS = 3, 4


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(Path(__file__).parents[3] / "examples" / "lightning_module.py"))


def loader():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4 * STEPS, 1, 8, 8, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(4 * STEPS) % 10), 4)


def make_trainer(*callbacks, **settings):
    defaults = {
        "accelerator": "cpu",
        "max_epochs": EPOCHS,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    }
    return L.Trainer(callbacks=list(callbacks), **defaults | settings)


def history_of(trainer):
    return json.loads(trainer.optimizers[0].state_dict()["param_groups"][0]["snella_allocator"]["history"])


def budgets_of(model):
    return {matrix.name: matrix.budget for matrix in adapted_matrices(model)}


@pytest.fixture(scope="module")
def plain(example):
    """Return history and weights of a plain training loop."""
    module = example["Classifier"]()
    optimizer = example["create_snella_optimizer"](module.model, lr=2e-2, head_lr=5e-3)
    allocator = example["BudgetAllocator"](module.model, total_epochs=EPOCHS, steps_per_epoch=STEPS).attach(optimizer)
    module.train()
    for _ in range(EPOCHS):
        for batch in loader():
            optimizer.zero_grad()
            module.training_step(batch, 0).backward()
            optimizer.step()
    return allocator.history, {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("kind", ["Classifier", "ManualClassifier"])
def test_automatic_and_manual_optimization_equal_plain_loop(example, plain, kind):
    history, weights = plain
    module, trainer = example[kind](), make_trainer()
    trainer.fit(module, loader())
    assert [entry["step"] for entry in history] == [0, 4, 8, 12]
    assert history_of(trainer) == history
    assert all(torch.equal(tensor, weights[name]) for name, tensor in module.state_dict().items())


class StopAfterFirstEpoch(Callback):
    def on_train_epoch_end(self, trainer, module):
        trainer.should_stop = True


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
def test_resumed_training_equals_uninterrupted_training_bit_for_bit(example, plain, tmp_path):
    history, weights = plain
    checkpoint_callback = ModelCheckpoint(tmp_path, "one", save_on_train_epoch_end=True)
    make_trainer(checkpoint_callback, StopAfterFirstEpoch()).fit(example["Classifier"](), loader())
    module, trainer = example["Classifier"](), make_trainer()
    trainer.fit(module, loader(), ckpt_path=tmp_path / "one.ckpt", weights_only=False)
    assert history_of(trainer) == history
    assert all(torch.equal(tensor, weights[name]) for name, tensor in module.state_dict().items())


def test_averaged_weights_keep_budgets_in_checkpoints_and_adapters(example, plain, tmp_path):
    history, weights = plain
    checkpoint_callback = ModelCheckpoint(tmp_path, "last", save_on_train_epoch_end=True)
    module, trainer = example["Classifier"](), make_trainer(EMAWeightAveraging(decay=0.9), checkpoint_callback)
    trainer.fit(module, loader(), val_dataloaders=loader())  # validation swaps model and average
    assert history_of(trainer) == history
    assert budgets_of(module.model) == history[-1]["budgets"]
    module.model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(example["make_backbone"](), tmp_path / "adapter")
    assert budgets_of(loaded) == history[-1]["budgets"]
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=False)
    names = [name for name in weights if "snella_budget" in name]
    for part in ("state_dict", "current_model_state"):
        assert sum(int(checkpoint[part][name].sum()) for name in names) == history[-1]["budget"]
    assert not all(torch.equal(tensor, weights[name]) for name, tensor in module.state_dict().items())
    assert [m.nonzeros() for m in adapted_matrices(module.model.eval())] == list(history[-1]["budgets"].values())


def test_module_without_allocator_warns(example):
    class WithoutAllocator(example["Classifier"]):
        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)

    with pytest.warns(UserWarning, match="after 2 optimizer steps no budget allocator is attached"):
        make_trainer(max_epochs=1).fit(WithoutAllocator(), loader())


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_processes_have_equal_budgets_and_weights(tmp_path):
    worker = Path(__file__).with_name("lightning_worker.py")
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    process = subprocess.run(
        [sys.executable, str(worker), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=250
    )
    assert process.returncode == 0, process.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert [entry["step"] for entry in first["history"]] == [0, 4, 8]
