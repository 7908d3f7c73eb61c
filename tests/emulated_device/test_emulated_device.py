"""Training and prediction on an accelerator without float64, such as `mps`, which the CPU emulates."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from .device import NAME, build

BACKBONE = ["--backbone", "vit_tiny_patch16_224", "--pretrained", "false", "--img-size", "32"]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed; on Debian: apt install g++")
    return build(tmp_path_factory.mktemp("emulated_device"))


@pytest.fixture(scope="module")
def work(library):
    """Return a function that runs the worker and returns its output."""

    def run(*arguments):
        worker = str(Path(__file__).with_name("worker.py"))
        process = subprocess.run(
            [sys.executable, worker, str(library), *arguments],
            capture_output=True,
            text=True,
            timeout=280,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert process.returncode == 0, process.stdout + process.stderr
        return process.stdout

    return run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images with masks, and a table with a class, a number and two tags for each image."""
    folder = tmp_path_factory.mktemp("data")
    rng, rows = np.random.default_rng(0), []
    for part in ("images", "masks"):
        (folder / part).mkdir()
    for number in range(40):
        pixels = rng.integers(0, 150, (32, 32, 3), dtype=np.uint8)
        pixels[8:20, 8:20, number % 2] += 100
        mask = np.zeros((32, 32), np.uint8)
        mask[8:20, 8:20] = 255
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")
        kind = ("red", "green")[number % 2]
        rows.append([f"images/{number}.png", kind, 20.5 + number, f"{kind}|square"])
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "kind", "age", "tags"], *rows])
    return folder


@pytest.fixture(scope="module")
def train_and_use(work, data, tmp_path_factory):
    """Return a function that trains, evaluates and predicts on the device, and returns the run folder."""

    def run(*options):
        out = str(tmp_path_factory.mktemp("runs") / "run")
        fixed = [*BACKBONE, "--epochs", "1", "--batch-size", "8", "--device", NAME, "--out", out]
        image = str(data / "images" / "0.png")
        commands = [
            ["train", *options, *fixed],
            ["evaluate", out, "--device", NAME],
            ["predict", out, image, "--device", NAME],
        ]
        work("commands", json.dumps(commands))
        return Path(out)

    return run


def test_training_is_close_to_the_cpu(work):
    on_cpu, on_device = json.loads(work("steps"))
    assert on_device["losses"] == pytest.approx(on_cpu["losses"], rel=1e-5)
    assert on_device["budgets"] == on_cpu["budgets"]
    np.testing.assert_allclose(on_device["outputs"], on_cpu["outputs"], rtol=1e-4)


@pytest.mark.parametrize(
    ("task", "column"), [("classification", "kind"), ("regression", "age"), ("multilabel", "tags")]
)
def test_tasks_run(task, column, data, train_and_use):
    table = ["--data", f"csv:{data / 'table.csv'}", "--columns", f"label={column}", "--task", task]
    run = train_and_use(*table, "--method", "snella-2")
    assert json.loads((run / "run.json").read_text())["status"] == "finished"


def test_segmentation_runs(data, work, tmp_path):
    out = str(tmp_path / "run")
    fixed = [*BACKBONE, "--epochs", "1", "--batch-size", "8", "--device", NAME, "--out", out]
    train = ["train", "--data", f"masks:{data}", "--task", "segmentation", "--method", "snella-2", *fixed]
    work("commands", json.dumps([train, ["evaluate", out, "--device", NAME]]))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"


def test_device_rejects_cpu_tensors_and_float64(work):
    work("checks")
