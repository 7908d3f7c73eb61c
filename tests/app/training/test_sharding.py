"""Sharding of frozen weights does not change training, for every method that supports it."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

from snella_app.config.train import TrainConfig
from snella_app.methods import METHODS, build_method
from snella_app.training.distributed import sharding_savings
from tests.processes import run_in_two_processes

REQUIRED_SETTINGS = {"data": "digits", "backbone": "test_vit", "out": "runs/x"}
QUICK = ["snella-2", "lora-2", "partial-1", "vpt-deep", "mlp"]
needs_processes = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


def run_both(folder, methods):
    """Return the printed results of both processes for every method."""
    return run_in_two_processes(Path(__file__).with_name("sharding_worker.py"), folder, *methods, timeout=280)


def assert_matches_unsharded(first, second):
    assert first["outputs"] == second["outputs"]
    # the unsharded model sums the gradients of both halves, as the processes do; one batch of all images changes the
    # order of additions, and with it RandLoRA's outputs by 3e-5 (3e-14 in float64)
    assert first["error"] < 1e-6
    # cached effective weights of all layers would take the memory of the unsharded model
    assert first["kept"] == second["kept"] == 0


@needs_processes
def test_sharding_changes_training_only_by_rounding(tmp_path):
    first, second = run_both(tmp_path, QUICK)
    for method in QUICK[:-1]:
        assert_matches_unsharded(first[method], second[method])
    # batch norm uses the images of its process; both processes get the main process's statistics
    assert first["mlp"]["outputs"] == second["mlp"]["outputs"]


@needs_processes
@pytest.mark.slow
def test_every_method_is_sharded_or_gives_a_reason(tmp_path):
    methods = [method for method in METHODS if method not in ("mlp", "full")]
    first, second = run_both(tmp_path, methods)
    for method in methods:
        if METHODS[method].unsharded_reason:
            assert "storage of size 0" in first[method]["raised"]
        else:
            assert "raised" not in first[method], (method, first[method])
            assert_matches_unsharded(first[method], second[method])
    backbone = timm.create_model("test_vit", num_classes=3)
    assert all(p.requires_grad for p in build_method("full", backbone).parameters())


def test_unsupported_sharding_is_rejected_before_loading():
    with pytest.raises(ValueError, match="shard needs another method, got 'full', which leaves no weight frozen"):
        TrainConfig.from_flat(**REQUIRED_SETTINGS, method="full", shard=True)
    with pytest.raises(ValueError, match=r"shard needs another method, got 'vqt-2', which routes gradients around"):
        TrainConfig.from_flat(**REQUIRED_SETTINGS, method="vqt-2", shard=True)
    with pytest.raises(ValueError, match=r"time_budget must not be combined with shard, got 30m"):
        TrainConfig.from_flat(**REQUIRED_SETTINGS, time_budget="30m", shard=True)
    assert TrainConfig.from_flat(**REQUIRED_SETTINGS, method="lora-2", shard=True).run.shard


def test_saved_bytes_exclude_gathered_blocks_and_weights_outside_blocks():
    backbone = timm.create_model("test_vit", num_classes=3, depth=6)
    blocks = [4 * sum(p.numel() for p in block.parameters()) for block in backbone.blocks]
    frozen = 4 * sum(p.numel() for name, p in backbone.named_parameters() if not name.startswith("head"))
    model = build_method("linear", backbone)
    assert sharding_savings(model, 1) == 0
    outside = frozen - sum(blocks)
    assert sharding_savings(model, 4) == frozen - frozen // 4 - outside - 2 * max(blocks)
    assert 0 < sharding_savings(model, 2) < sharding_savings(model, 4) < frozen
