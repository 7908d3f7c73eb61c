"""Distributed training with `torchrun`: equal adapters, a single writer, resuming with another number of processes."""

import os
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from snella_app.config.train import TrainConfig
from snella_app.runs import RunFolder
from snella_app.training.build import EpochSampler
from snella_app.training.checkpoints import latest_checkpoint
from snella_app.training.distributed import ShardedBatches, init_process_group
from snella_app.training.linear_probe import FeatureNorm
from snella_app.training.session import TrainingInterrupted
from snella_app.training.train import train

from ..data.mask_folders import write_pairs
from .components import interrupt_before

pytestmark = [
    pytest.mark.usefixtures("no_report"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
]
SAME = {"epochs": 2, "batch_size": 9, "method_options": {}}  # 28 images: the last batch has one image for two processes
PROGRAM = """
import os, signal, sys
import yaml
from snella_app.cli.main import main
from snella_app.training import trainer
step = int(sys.argv[1])
original = trainer.SnellaTrainer.training_step
def training_step(self, *args, **kwargs):
    if self.state.global_step == 2 and os.environ["RANK"] == "1":
        frozen = [p for p in self.trained_model.parameters() if not p.requires_grad]
        held = sum(getattr(p, "_local_tensor", p).numel() for p in frozen)
        print(f"holds {held / sum(p.numel() for p in frozen):.1f} of the frozen weights")
    if self.state.global_step == step and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGINT)
    return original(self, *args, **kwargs)
trainer.SnellaTrainer.training_step = training_step
sys.exit(main(["train", *sys.argv[2:]]))
"""


def train_in_two(tmp_path, *args, interrupt_at=-1):
    """Train in two processes; interrupt the second before a step."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(interrupt_at), *args], capture_output=True, text=True, timeout=300, env=environment
    )


def adapter_of(run):
    return load_file(run.adapter / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def single_process_run(photos, tiny_run, tmp_path_factory):
    """Run trained in one process."""
    values = {**tiny_run, **SAME, "data": f"folder:{photos}"}
    return train(TrainConfig.from_flat(**values, out=str(tmp_path_factory.mktemp("single_process_run") / "run")))


def assert_same(run, single_process_run):
    """Assert equal budgets, and equal results up to rounding."""
    assert run.status == "finished"
    for row, expected in zip(
        run.read_json("metrics.json")["history"], single_process_run.read_json("metrics.json")["history"], strict=True
    ):
        assert row["budget"] == expected["budget"] and row["lr"] == expected["lr"]
        if row["epoch"] > 0:
            assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-4)
        assert row["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-3)
    actual, reference = adapter_of(run), adapter_of(single_process_run)
    assert actual.keys() == reference.keys()
    assert all(torch.allclose(actual[name], reference[name], rtol=0, atol=2e-4) for name in actual)


SHARDING = pytest.mark.parametrize("shard", [False, True], ids=["ddp", "sharded"])


@pytest.mark.slow
@SHARDING
def test_an_interrupted_run_of_two_processes_resumes_in_one(shard, settings, single_process_run, console, tmp_path):
    config = settings(**SAME, shard=shard)
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(config.stored()))
    process = train_in_two(tmp_path, "--config", str(tmp_path / "settings.yaml"), "--progress", "false", interrupt_at=5)
    run = RunFolder(config.run.out)
    assert run.status == "interrupted", process.stderr
    assert latest_checkpoint(run.checkpoints).name == "checkpoint-6"
    assert ("by 2 processes with sharded frozen weights" if shard else "by 2 processes\n") in process.stdout
    assert f"holds {0.5 if shard else 1.0} of the frozen weights" in process.stdout
    assert process.stdout.count("backbone  test_vit") == 1
    assert process.stderr.count("interrupted; saved as") == 1
    run = train(TrainConfig.from_flat(out=config.run.out, resume=True), console)
    assert_same(run, single_process_run)


@SHARDING
def test_an_interrupted_run_of_one_process_resumes_in_two(shard, settings, single_process_run, console, tmp_path):
    config = settings(**SAME)
    with interrupt_before(1), pytest.raises(TrainingInterrupted, match="checkpoint-2"):
        train(config, console)
    process = train_in_two(tmp_path, "--out", config.run.out, "--resume", *(["--shard"] if shard else []))
    assert process.returncode == 0, process.stderr
    assert f"holds {0.5 if shard else 1.0} of the frozen weights" in process.stdout
    run = RunFolder(config.run.out)
    assert_same(run, single_process_run)
    assert run.report.is_file() and process.stdout.count("best epoch") == 1
    assert (
        run.read_json("metrics.json")["val"]["confusion"]
        == single_process_run.read_json("metrics.json")["val"]["confusion"]
    )


@pytest.mark.slow
def test_processes_with_sharded_weights_predict_masks(settings, tmp_path):
    data = f"masks:{write_pairs(tmp_path / 'discs', 24)}"
    config = settings(data=data, task="segmentation", method_options={}, epochs=1, shard=True)
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(config.stored()))
    process = train_in_two(tmp_path, "--config", str(tmp_path / "settings.yaml"), "--progress", "false")
    assert process.returncode == 0, process.stderr
    run = RunFolder(config.run.out)
    masks = [item["mask"] for item in run.read_json("predictions.json")["items"] if item["mask"]]
    assert run.status == "finished" and masks and all((run.path / mask).is_file() for mask in masks)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_parts_of_a_batch_cover_it_exactly(count):
    sampler = EpochSampler(23, seed=0)
    parts = [ShardedBatches(sampler, 7, rank, count) for rank in range(count)]
    indices = list(sampler)
    for number, batches in enumerate(zip(*parts, strict=True)):
        weights = [part.weight(number) for part in parts]
        together = [index for batch, weight in zip(batches, weights, strict=True) for index in batch[:weight]]
        assert together == indices[7 * number : 7 * number + 7] and max(weights) - min(weights) <= 1
        assert all(len(batch) == max(weight, 1) for batch, weight in zip(batches, weights, strict=True))
    assert len(parts[0]) == 4


def test_an_image_with_loss_weight_0_does_not_count_in_the_feature_statistics(settings, console, monkeypatch):
    weight, update, counts = ShardedBatches.weight, FeatureNorm.on_step_end, []
    # makes the second batch of each step that of a process without images
    monkeypatch.setattr(ShardedBatches, "weight", lambda self, number: 0 if number % 2 else weight(self, number))

    def record(norm, *args, **kwargs):
        counts.append([int(sums[0]) for sums in norm._sums])
        update(norm, *args, **kwargs)

    monkeypatch.setattr(FeatureNorm, "on_step_end", record)
    train(settings(epochs=1, batch_size=7, accumulate=2), console)
    assert counts == [[7, 0], [7, 0]]


def test_a_batch_smaller_than_the_number_of_processes_is_rejected(settings, console, monkeypatch):
    monkeypatch.setattr("snella_app.training.build.process_count", lambda: 4)
    with pytest.raises(ValueError, match=r"batch_size must be at least the number of processes, 4, .* got 2"):
        train(settings(batch_size=2), console)


def test_accelerate_modes_that_shard_the_model_are_rejected_with_alternatives(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(NotImplementedError, match=r"FSDP \(ACCELERATE_USE_FSDP=true\), but .* uses DDP .*torchrun"):
        init_process_group("cpu")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    init_process_group("cpu")


def test_a_single_device_for_several_processes_is_rejected(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"device must be auto, cpu or cuda for 2 processes, got 'cuda:1'"):
        init_process_group("cuda:1")
