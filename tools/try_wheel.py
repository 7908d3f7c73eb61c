"""Smoke-test a wheel of snella in a new virtual environment: the library, then `[app]`, then `[lab]`.

    make wheel

Each step prints one line. A failed step prints its command and output, and exits with status 1.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import tomllib
import venv
import zipfile
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("snella", "snella_app", "snella_lab")

LIBRARY = """
import snella, torch
from peft import get_peft_model
from torch import nn

torch.manual_seed(0)
images, labels = torch.randn(16, 8), torch.arange(16) % 2
model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 2))
model = get_peft_model(model, snella.SnellaConfig(r=2, target_modules=["0"], target_sparsity=0.5))
optimizer = snella.create_snella_optimizer(model, lr=1e-2)
snella.BudgetAllocator(model, total_epochs=1, steps_per_epoch=2).attach(optimizer)
losses = []
for _ in range(2):
    loss = nn.functional.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[1] < losses[0], losses
assert "site-packages" in snella.__file__, snella.__file__
"""

PHOTOS = """
import numpy as np
from pathlib import Path
from PIL import Image

rng = np.random.default_rng(0)
for channel, name in enumerate(("red", "green")):
    Path("photos", name).mkdir(parents=True)
    for index in range(12):
        pixels = rng.integers(0, 150, (32, 32, 3))
        pixels[..., channel] += 100
        Image.fromarray(pixels.astype(np.uint8)).save(f"photos/{name}/{index}.png")
"""

EXPERIMENTS = """
from snella_lab.comparison.experiment_files import bundled_experiments, read_experiment

names = bundled_experiments()
assert {"quick", "bundled-suite"} <= set(names), names
assert all("site-packages" in str(path) for path in names.values()), names
print(len(names), "experiments,", read_experiment("quick").name)
"""

ENTRY_POINTS = """
from importlib.metadata import entry_points

from snella_app.plugins import plugins

count = 0
for group in ("commands", "methods", "data", "backbones", "choices"):  # "reports" requires the extra generation
    names = entry_points(group=f"snella.{group}").names
    assert set(plugins(group)) == set(names), group
    count += len(names)
print(count, "entry points")
"""

TRAIN = (
    *("train", "--data", "photos", "--backbone", "test_vit", "--pretrained", "false", "--img-size", "32"),
    *("--method", "snella-2", "--epochs", "1", "--batch-size", "8", "--device", "cpu", "--out", "run"),
)


def is_cache(path: Path) -> bool:
    """Return True for bytecode, caches and hidden files, which wheels exclude."""
    return any(part == "__pycache__" or part.startswith(".") for part in path.parts) or path.suffix == ".pyc"


def check_contents(wheel: Path) -> None:
    """Compare the files and entry points of the wheel with the repository.

    Raises:
        SystemExit: A file or an entry point is missing or unexpected.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        info = next(name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        parser = ConfigParser(delimiters="=")
        parser.optionxform = str  # type: ignore[assignment, method-assign]
        parser.read_string(archive.read(info).decode())
    expected = {f"{package}/py.typed" for package in PACKAGES}
    for source, target in ((ROOT / "src", ""), (ROOT / "experiments", "snella_lab/experiments/")):
        files = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
        expected |= {target + path.as_posix() for path in files if not is_cache(path)}
    foreign = {name for name in names if name.split("/")[0] not in PACKAGES or "__pycache__" in name}
    if expected - names or foreign:
        sys.exit(f"{wheel.name}: missing files {sorted(expected - names)}, unexpected files {sorted(foreign)}")
    declared = {**project["entry-points"], "console_scripts": project["scripts"]}
    built = {section: dict(parser[section]) for section in parser.sections()}
    if built != declared:
        sys.exit(f"{wheel.name}: entry points are {built}, pyproject.toml declares {declared}")
    print(f"contents: {len(names)} files, {sum(map(len, built.values()))} entry points", flush=True)


class Environment:
    """New virtual environment with a working folder."""

    def __init__(self, folder: Path) -> None:
        """Create the environment in `folder`."""
        venv.create(folder / "venv", with_pip=True)
        self.bin = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
        self.work = folder / "work"
        self.work.mkdir()

    def run(self, title: str, program: str, *args: str, status: int = 0, expected_output: str = "") -> None:
        """Run a program of the environment.

        Args:
            title: Name of the step.
            program: Name of the program.
            *args: Arguments.
            status: Expected exit status.
            expected_output: Expected part of the output.

        Raises:
            SystemExit: The status or output differs.
        """
        unset = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        environment = {name: value for name, value in os.environ.items() if name not in unset}
        environment |= {"HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
        command = [str(self.bin / program), *args]
        result = subprocess.run(command, cwd=self.work, env=environment, capture_output=True, text=True)
        output = result.stdout + result.stderr
        if result.returncode != status or expected_output not in output:
            sys.exit(
                f"{title}: status {result.returncode}, expected {status} and {expected_output!r}\n{command}\n{output}"
            )
        lines = output.strip().splitlines()
        print(f"{title}: {lines[-1].strip()[:80] if lines else 'ok'}", flush=True)

    def install(self, requirement: str) -> None:
        """Install a requirement with pip."""
        self.run(f"pip install {Path(requirement).name}", "python", "-m", "pip", "install", "--quiet", requirement)

    def python(self, title: str, code: str) -> None:
        """Run Python code."""
        self.run(title, "python", "-c", code)


def try_wheel(wheel: Path, folder: Path) -> None:
    """Install the wheel with increasing extras and test each."""
    check_contents(wheel)
    environment = Environment(folder)

    environment.install(str(wheel))
    environment.python("library: an adapted layer trains", LIBRARY)
    environment.run(
        "library: snella names the extra", "snella", "--help", status=2, expected_output="pip install 'snella[app]'"
    )

    environment.install(f"{wheel}[app]")
    environment.run(
        "app: snella --version", "snella", "--version", expected_output=f"snella {wheel.name.split('-')[1]}"
    )
    environment.run("app: snella --help", "snella", "--help", expected_output="everyday commands")
    environment.run("app: snella --completion bash", "snella", "--completion", "bash", expected_output="complete -o")
    environment.run("app: snella demo --help", "snella", "demo", "--help", expected_output="snella demo")
    environment.python("app: photos", PHOTOS)
    environment.run("app: snella train", "snella", *TRAIN, expected_output="report.html")
    environment.run("app: snella predict", "snella", "predict", "run", "photos/red/0.png", expected_output="0.png")
    environment.python("app: bundled experiments", EXPERIMENTS)
    unknown = ("compare", "--experiment", "quik", "--out", "compared")
    environment.run("app: snella compare", "snella", *unknown, status=2, expected_output="nearest: quick")

    environment.install(f"{wheel}[lab]")
    environment.python("lab: entry points", ENTRY_POINTS)


def main() -> None:
    """Parse the command line and test the wheel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="wheel file")
    wheel = parser.parse_args().wheel.resolve()
    with tempfile.TemporaryDirectory(prefix="snella-wheel-") as folder:
        try_wheel(wheel, Path(folder))
    print("all steps passed")


if __name__ == "__main__":
    main()
