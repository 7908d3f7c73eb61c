"""Plugins from other packages: `examples/plugin` and broken packages."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "plugin"


def install(folder, project, module):
    """Install a package: module, metadata and entry points."""
    (folder / f"{module[0]}.py").write_text(module[1])
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = project["entry-points"].items()
    lines = (
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items()) for group, entries in groups
    )
    (info / "entry_points.txt").write_text("\n".join(lines))


@pytest.fixture
def example(tmp_path):
    """Folder with the installed example and a data file."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    install(tmp_path, project, ("snella_norms", (EXAMPLE / "snella_norms.py").read_text()))
    pixels = np.random.default_rng(0).integers(0, 255, (24, 32, 32), np.uint8)
    np.savez(tmp_path / "small.npz", images=pixels, labels=np.arange(24) % 2)
    return tmp_path


def python(folder, code, *args):
    """Run code with the packages in a folder."""
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, "-c", code, *args], cwd=folder, env=environment, capture_output=True, text=True
    )


def snella(folder, *args):
    """Run the command line with the packages in a folder."""
    return python(folder, "import sys; from snella_app.cli.main import main; sys.exit(main())", *args)


def test_a_method_and_a_data_format_of_another_package_are_trained(example):
    args = (
        "--backbone test_vit --pretrained false --img-size 32 --epochs 1 --batch-size 8 --final-head trained --out run"
    )
    process = snella(example, "train", "--method", "norms", "--data", "npz:small.npz", *args.split())
    assert process.returncode == 0, process.stderr
    assert "24 images in 2 classes" in process.stdout and "method    norms" in process.stdout
    predicted = snella(example, "evaluate", "run")
    assert predicted.returncode == 0, predicted.stderr


def test_a_kernel_of_another_package_is_trained_and_evaluated(tmp_path):
    project = {"name": "kernels", "version": "1", "entry-points": {"snella.kernels": {"capped": "capped:Capped"}}}
    source = """
from snella.kernels import Kernel

class Capped(Kernel):
    name = "capped"
    scalars = ("alpha", "beta")

    def merge(self, A, B, scalars):
        alpha, beta = scalars.require("alpha", "beta")
        squared = (B[:, None] - A[None]).square().sum(-1)
        return alpha * squared / (1 + squared) + beta
"""
    install(tmp_path, project, ("capped", source))
    data = "--data digits --train-size 20 --val-size 20 --test-size 20 --img-size 32"
    args = f"{data} --backbone test_vit --pretrained false --method-options.kernel capped --epochs 1 --out run"
    process = snella(tmp_path, "train", *args.split())
    assert process.returncode == 0, process.stderr
    evaluated = snella(tmp_path, "evaluate", "run")
    assert evaluated.returncode == 0, evaluated.stderr


def test_a_command_of_another_package_is_listed_and_called(example):
    assert "classes" in snella(example, "--help").stdout
    assert "Dataset, as for snella train --data" in " ".join(snella(example, "classes", "--help").stdout.split())
    assert snella(example, "classes", "npz:small.npz").stdout == "0, 1\n"


def test_unknown_data_error_lists_the_data_formats_of_plugins(example):
    assert "npz:PATH" in snella(example, "classes", "nowhere").stderr


@pytest.mark.parametrize("group", ["commands", "methods", "data", "backbones"])
def test_a_plugin_with_an_import_error_is_reported_and_skipped(group, tmp_path):
    project = {"name": "broken", "version": "1", "entry-points": {f"snella.{group}": {"hello": "broken:X"}}}
    install(tmp_path, project, ("broken", "raise RuntimeError('no such thing')"))
    uses = {"data": ("data", "check", "nowhere"), "commands": ("--help",)}
    trains = ("train", "--method", "nothing", "--data", "digits", "--backbone", "nothing", "--out", "x")
    process = snella(tmp_path, *uses.get(group, trains if group == "methods" else (*trains, "--method", "lora-2")))
    message = " ".join(process.stderr.split())
    assert f"broken registers 'hello' in snella.{group}, but it cannot be imported" in message
    assert "RuntimeError: no such thing" in message and "Traceback" not in process.stderr


def test_a_plugin_cannot_replace_a_method(tmp_path):
    project = {"name": "thief", "version": "1", "entry-points": {"snella.methods": {"lora": "snella_thief:X"}}}
    install(tmp_path, project, ("snella_thief", "X = None"))
    process = python(tmp_path, "from snella_app.methods import METHODS; print(METHODS['lora'].source)")
    assert "thief registers 'lora' in snella.methods, but the name is taken; ignored" in process.stderr
    assert "2106.09685" in process.stdout


def test_a_plugin_cannot_replace_a_timm_model(tmp_path):
    project = {"name": "thief", "version": "1", "entry-points": {"snella.backbones": {"test_vit": "snella_thief:X"}}}
    install(tmp_path, project, ("snella_thief", "raise RuntimeError('stolen')"))
    code = "from snella_app.backbones.create import create_backbone; print(create_backbone('test_vit', num_classes=2, "
    process = python(tmp_path, f"{code}pretrained=False))")
    assert "thief registers 'test_vit' in snella.backbones, but the name is taken; ignored" in process.stderr
    assert "stolen" not in process.stderr and "VisionTransformer" in process.stdout


def test_a_plugin_cannot_replace_a_command(tmp_path):
    source = "from snella_app.cli.command import command\n@command('os')\ndef train() -> None:\n    print('stolen')\n"
    project = {"name": "thief", "version": "1", "entry-points": {"snella.commands": {"train": "thief:train"}}}
    install(tmp_path, project, ("thief", source))
    process = snella(tmp_path, "train", "--help")
    assert "command 'train' is already registered" in process.stderr and "stolen" not in process.stdout
    assert "--backbone" in process.stdout
