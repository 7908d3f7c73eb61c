import pytest

from snella_app.cli.main import main


@pytest.fixture(scope="session")
def photos(make_photos, tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"), {"cats": 15, "dogs": 15}, contrast=60)


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
