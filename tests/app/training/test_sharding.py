"""Frozen weights that processes share out: the same training for every method that does not say why it cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

from snella_app.config import TrainConfig
from snella_app.methods import METHODS, build_method
from snella_app.training.sharding import saved_bytes
from tests.processes import in_two_processes

PLACES = {"data": "digits", "backbone": "test_vit", "out": "runs/x"}
QUICK = ["snella-2", "lora-2", "partial-1", "vpt-deep", "mlp"]
needs_processes = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


def compared(folder, methods):
    """What both processes print of every method."""
    return in_two_processes(Path(__file__).with_name("sharding_worker.py"), folder, *methods, timeout=280)


def assert_trained_as_whole(first, second):
    assert first["outputs"] == second["outputs"]
    # the whole model adds the gradients of both halves, as the processes do; one batch of all images would add in
    # another order, which alone changes RandLoRA's outputs by 3e-5 (3e-14 in float64)
    assert first["error"] < 1e-6
    # in evaluation a layer would keep its weight with the update, of which all together are the whole model again
    assert first["kept"] == second["kept"] == 0


@needs_processes
def test_sharing_changes_what_is_trained_by_rounding_alone(tmp_path):
    first, second = compared(tmp_path, QUICK)
    for method in QUICK[:-1]:
        assert_trained_as_whole(first[method], second[method])
    # a normalization over a batch sees a process's own images; its statistics are those of the main process in both
    assert first["mlp"]["outputs"] == second["mlp"]["outputs"]


@needs_processes
@pytest.mark.slow
def test_every_method_is_shared_or_says_why_not(tmp_path):
    methods = [method for method in METHODS if method not in ("mlp", "full")]
    first, second = compared(tmp_path, methods)
    for method in methods:
        if METHODS[method].unsharded_reason:
            assert "storage of size 0" in first[method]["raised"]
        else:
            assert "raised" not in first[method], (method, first[method])
            assert_trained_as_whole(first[method], second[method])
    backbone = timm.create_model("test_vit", num_classes=3)
    assert all(p.requires_grad for p in build_method("full", backbone).parameters())


def test_what_cannot_be_shared_is_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match="shard needs another method, got 'full', which leaves no weight frozen"):
        TrainConfig.from_flat(**PLACES, method="full", shard=True)
    with pytest.raises(ValueError, match=r"shard needs another method, got 'vqt-2', which routes gradients around"):
        TrainConfig.from_flat(**PLACES, method="vqt-2", shard=True)
    with pytest.raises(ValueError, match=r"time_budget must not be combined with shard, got 30m"):
        TrainConfig.from_flat(**PLACES, time_budget="30m", shard=True)
    assert TrainConfig.from_flat(**PLACES, method="lora-2", shard=True).run.shard


def test_a_process_saves_its_part_of_the_weights_but_for_those_it_works_with():
    backbone = timm.create_model("test_vit", num_classes=3, depth=6)
    blocks = [4 * sum(p.numel() for p in block.parameters()) for block in backbone.blocks]
    frozen = 4 * sum(p.numel() for name, p in backbone.named_parameters() if not name.startswith("head"))
    model = build_method("linear", backbone)
    assert saved_bytes(model, 1) == 0
    outside = frozen - sum(blocks)
    assert saved_bytes(model, 4) == frozen - frozen // 4 - outside - 2 * max(blocks)
    assert 0 < saved_bytes(model, 2) < saved_bytes(model, 4) < frozen
