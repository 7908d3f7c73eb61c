"""Fixtures for tests that train or use a run; one thread per test process.

`make test` runs two processes in parallel, and more threads would oversubscribe the cores. `TEST_THREADS` sets the
number of threads (`make test-isa`).
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

from snella_app.config.train import TrainConfig

from .browser import Browser

torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))
if not torch.cuda.is_available():
    # set before any package imports Triton, so that its kernels run in the CPU interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

# fixed examples for reproducible failures; `make test-slow` samples new ones
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.register_profile("new", max_examples=500, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Headless Chromium, shared by all tests of a worker."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("chromium is not installed; on Debian: apt install chromium")
    chromium = Browser(program, tmp_path_factory.mktemp("chromium"))
    yield chromium
    chromium.close()


def write_photos(root, counts, side=32, contrast=22):
    """Write noise images with one slightly brighter channel per class, learnable in a few steps."""
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
    """Settings of a tiny run with dropout and drop-path in the update, without data and output folder."""
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
        "precision": "fp32",
        "progress": False,
    }


@pytest.fixture
def settings(photos, tiny_run, tmp_path):
    """Return a function that creates the configuration of a tiny run with changed settings."""
    base = {**tiny_run, "data": f"folder:{photos}", "out": str(tmp_path / "run")}

    def make(**changes):
        values = {**base, **changes}
        if not values["method"].startswith("snell") and "method_options" not in changes:
            values["method_options"] = {}
        return TrainConfig.from_flat(**values)

    return make


@pytest.fixture
def no_report(monkeypatch):
    """Skip the report, which takes longer than these runs and is tested separately."""
    monkeypatch.setattr("snella_app.training.finish.write_report", lambda run, images=None, **_: run / "report.html")


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=200)


@pytest.fixture(scope="session")
def finished(photos, tiny_run, tmp_path_factory):
    """Train one run, shared by all tests that only read it."""
    from snella_app.training.train import train  # imported here because it loads all libraries

    out = str(tmp_path_factory.mktemp("finished") / "run")
    config = TrainConfig.from_flat(**{**tiny_run, "method_options": {}}, data=f"folder:{photos}", out=out)
    output = io.StringIO()
    run = train(config, Console(file=output, width=200))
    run.printed = output.getvalue()
    return run


@pytest.fixture(scope="session")
def finished_default(photos, tmp_path_factory):
    """Train one run with the default method, precision and heads, shared by all tests that only read it."""
    from snella_app.training.train import train  # imported here because it loads all libraries

    settings = {"backbone": "test_vit", "pretrained": False, "img_size": 32, "epochs": 2, "device": "cpu"}
    out = str(tmp_path_factory.mktemp("finished_default") / "run")
    config = TrainConfig.from_flat(**settings, data=f"folder:{photos}", progress=False, out=out)
    return train(config, Console(file=io.StringIO()))


@pytest.fixture(params=["finished", "finished_default"])
def any_run(request):
    """Finished run that predicts with the trained head, or with the default head on several layers."""
    return request.getfixturevalue(request.param)
