"""Training with Lightning's DDP; Lightning starts the second process. Started by `test_lightning`."""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, TensorDataset

EXAMPLE = runpy.run_path(str(Path(__file__).parents[3] / "examples" / "lightning_module.py"))


def main(folder: str) -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(32, 1, 8, 8, generator=generator), torch.arange(32) % 10)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        max_epochs=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    module = EXAMPLE["Classifier"]()
    trainer.fit(module, DataLoader(data, 4))
    state = trainer.optimizers[0].state_dict()["param_groups"][0]["snella_allocator"]
    digests = {name: float(p.double().abs().sum()) for name, p in module.named_parameters() if p.requires_grad}
    result = {"history": json.loads(state["history"]), "digests": digests}
    Path(folder, f"{trainer.global_rank}.json").write_text(json.dumps(result))
    trainer.strategy.barrier()
    os._exit(0)  # gloo can deadlock if both ranks shut down concurrently


if __name__ == "__main__":
    main(sys.argv[1])
