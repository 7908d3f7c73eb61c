"""Training and prediction on an emulated accelerator without float64, such as `mps`."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from snella.ops import widest_dtype

from .device import NAME, build

BACKBONE = ["--backbone", "vit_tiny_patch16_224", "--pretrained", "false", "--img-size", "32"]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed; on Debian: apt install g++")
    folder = tmp_path_factory.getbasetemp().parent / "emulated_device"  # shared by the test processes
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        return build(folder)


@pytest.fixture(scope="module")
def work(library):
    """Return a function that runs the worker and returns its output."""

    def run(*arguments):
        worker = str(Path(__file__).with_name("worker.py"))
        process = subprocess.run(
            [sys.executable, worker, str(library), *arguments],
            capture_output=True,
            text=True,
            timeout=200,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert process.returncode == 0, process.stdout + process.stderr
        return process.stdout

    return run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images with masks, and a table with a class, two numbers and two tags for each image."""
    folder = tmp_path_factory.mktemp("data")
    rng, rows = np.random.default_rng(0), []
    for part in ("images", "masks"):
        (folder / part).mkdir()
    for number in range(50):
        pixels = rng.integers(0, 150, (32, 32, 3), dtype=np.uint8)
        pixels[8:20, 8:20, number % 2] += 100
        mask = np.zeros((32, 32), np.uint8)
        mask[8:20, 8:20] = 255
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")
        kind = ("red", "green")[number % 2]
        rows.append([f"images/{number}.png", kind, 20.5 + number, 1.7e9 + number, f"{kind}|square"])
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "kind", "age", "time", "tags"], *rows])
    return folder


def test_device_rejects_cpu_tensors_and_float64(work):
    work("checks")


def test_training_is_close_to_the_cpu(work):
    on_cpu, on_device = json.loads(work("steps"))
    assert on_device["losses"] == pytest.approx(on_cpu["losses"], rel=1e-5)
    assert on_device["budgets"] == on_cpu["budgets"]
    np.testing.assert_allclose(on_device["outputs"], on_cpu["outputs"], rtol=1e-4)


@pytest.mark.parametrize(
    ("task", "column", "expected"),
    [
        ("classification", "kind", "kernel and linear head"),
        ("regression", "age", "linear head"),
        ("multilabel", "tags", "linear head"),
        ("segmentation", None, "Dice"),
    ],
)
def test_tasks_train_evaluate_and_predict(task, column, expected, data, work, tmp_path):
    source = [f"masks:{data}"] if column is None else [f"csv:{data / 'table.csv'}", "--columns", f"label={column}"]
    run, suffix, image = str(tmp_path / "run"), "" if column is None else ".json", str(data / "images" / "0.png")
    outs = {device: tmp_path / f"{device}{suffix}" for device in (NAME, "cpu")}
    options = ["--task", task, "--method", "snella-2", "--epochs", "1", "--batch-size", "8"]
    options += [] if column is None else ["--head-init", "probe", "--final-head", "layers"]
    commands = [
        ["train", "--data", *source, *BACKBONE, *options, "--device", NAME, "--out", run],
        ["evaluate", run, "--device", NAME],
        *(["predict", run, image, "--device", device, "--out", str(out)] for device, out in outs.items()),
    ]
    output = work("commands", json.dumps(commands))
    assert f"on {NAME}:0" in output and expected in output
    on_device, on_cpu = outs.values()
    if column is None:
        pixels = [np.asarray(Image.open(next(out.glob("*.png")))) for out in (on_device, on_cpu)]
        assert (pixels[0] == pixels[1]).mean() > 0.99
    else:
        close = json.loads(on_cpu.read_text(), parse_float=lambda text: pytest.approx(float(text), rel=1e-3, abs=1e-3))
        assert json.loads(on_device.read_text()) == close


def test_targets_that_need_float64_are_rejected(data, work, tmp_path):
    source = [f"csv:{data / 'table.csv'}", "--columns", "label=time", "--task", "regression"]
    command = ["train", "--data", *source, *BACKBONE, "--device", NAME, "--out", str(tmp_path / "run")]
    with pytest.raises(AssertionError, match="has no float64, which target 'time' with mean"):
        work("commands", json.dumps([command]))


@pytest.mark.parametrize(("has_fp64", "dtype"), [(True, torch.float64), (False, torch.float32)])
def test_some_xpu_devices_have_no_float64(has_fp64, dtype, monkeypatch):
    properties = SimpleNamespace(has_fp64=has_fp64)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda *_: properties)
    assert widest_dtype("xpu") == dtype
