import numpy as np
import pytest
import torch
from PIL import Image

from snella_app.cli.main import main


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("photos")
    for channel, name in enumerate(("cats", "dogs")):
        (root / name).mkdir()
        for index in range(15):
            pixels = rng.integers(0, 150, (32, 32, 3))
            pixels[..., channel] += 60
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{index:02}.png")
    return root


@pytest.fixture(scope="session")
def train_args(photos):
    """Arguments of a tiny run, without `--out`."""
    return [
        "train", "--data", f"folder:{photos}", "--backbone", "test_vit", "--pretrained", "false", "--img-size", "32",
        "--epochs", "2", "--batch-size", "8", "--r", "2", "--device", "cpu",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def run(train_args, tmp_path_factory):
    """Folder of a run trained from the command line."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("cli") / "run"
    assert main([*train_args, "--out", str(out), "--target-sparsity", "0.8", "--method-options.kernel", "mix_k"]) == 0
    return out


@pytest.fixture
def failing(capsys):
    """Run a failing command and return its line on standard error."""

    def call(*args, status=2):
        assert main(list(args)) == status
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1 and captured.err.startswith("snella: ") and "Traceback" not in captured.err
        return captured.err

    return call
