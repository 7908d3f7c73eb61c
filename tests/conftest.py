"""Fixtures of tests that train or use a run, and one thread a test process.

`make test` runs two processes side by side, and more threads than cores only wait. `TEST_THREADS` sets another number
(`make test-isa`).
"""

import io
import os
import shutil

import hypothesis
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from snella_app.config import TrainConfig

from .browser import Browser

torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))
if not torch.cuda.is_available():
    # read when Triton is imported, which other packages do: its kernels are then run by an interpreter on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

# the same examples in every run, so that a red test is a change of ours; `make test-slow` looks for new ones
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.register_profile("new", max_examples=500, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """One headless Chromium for all tests of a worker."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("chromium is not installed; on Debian: apt install chromium")
    chromium = Browser(program, tmp_path_factory.mktemp("chromium"))
    yield chromium
    chromium.close()


def write_photos(root, counts, side=32, contrast=22):
    """Noise in which each class has one color a little brighter: learnable, not at once."""
    rng = np.random.default_rng(0)
    for channel, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(0, 150, (side, side, 3))
            pixels[..., channel] += contrast
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{index:03}.png")
    return root


@pytest.fixture(scope="session")
def make_photos():
    return write_photos


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos") / "all", {"cats": 16, "dogs": 16, "owls": 16})


@pytest.fixture(scope="session")
def tiny_run():
    """Settings of a tiny run with dropout and drop-path in the update; where it reads and writes is missing."""
    return {
        "backbone": "test_vit",
        "pretrained": False,
        "img_size": 32,
        "method": "snella-2",
        "method_options": {"update_dropout": 0.2, "update_drop_path": 0.2},
        "epochs": 3,
        "final_head": "trained",
        "batch_size": 8,
        "device": "cpu",
        "progress": False,
    }


@pytest.fixture
def settings(photos, tiny_run, tmp_path):
    """Make the configuration of a tiny run, some of it changed."""
    base = {**tiny_run, "data": f"folder:{photos}", "out": str(tmp_path / "run")}

    def make(**changes):
        values = {**base, **changes}
        if not values["method"].startswith("snell") and "method_options" not in changes:
            values["method_options"] = {}
        return TrainConfig(**values)

    return make


@pytest.fixture
def no_report(monkeypatch):
    """Leave the report page out, which takes longer than these runs and has tests of its own."""
    monkeypatch.setattr("snella_app.training.finish.write_report", lambda run, images=None, **_: run / "report.html")


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=200)


@pytest.fixture(scope="session")
def finished(photos, tiny_run, tmp_path_factory):
    """One finished run for all tests that only read it."""
    from snella_app.training.train import train  # with all libraries, for which other tests need not wait

    out = str(tmp_path_factory.mktemp("finished") / "run")
    config = TrainConfig(**{**tiny_run, "method_options": {}}, data=f"folder:{photos}", out=out)
    output = io.StringIO()
    run = train(config, Console(file=output, width=200))
    run.printed = output.getvalue()
    return run
