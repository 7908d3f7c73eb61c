"""The wheel contains all package files, experiments and entry points; `make wheel` also installs and runs it."""

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def try_wheel():
    spec = importlib.util.spec_from_file_location("try_wheel", ROOT / "tools" / "try_wheel.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build a wheel of this checkout; pip downloads the build backend."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    return next(folder.glob("snella-*.whl"))


@pytest.mark.slow
def test_the_wheel_is_complete(try_wheel, wheel, capsys):
    try_wheel.check_contents(wheel)
    assert "entry points" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "missing",
    [
        *("snella_app/py.typed", "snella_app/runs/serve.html"),
        *("snella_lab/experiments/quick.yaml", "snella/layer.py"),
    ],
)
def test_missing_file_is_reported(try_wheel, wheel, missing, tmp_path):
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(tmp_path / wheel.name, "w") as target:
        for name in source.namelist():
            if name != missing:
                target.writestr(name, source.read(name))
    with pytest.raises(SystemExit, match=rf"missing files \['{missing}'\], unexpected files \[\]"):
        try_wheel.check_contents(tmp_path / wheel.name)


def test_failed_step_prints_command_and_output(try_wheel, tmp_path):
    environment = object.__new__(try_wheel.Environment)
    environment.bin, environment.work = Path(sys.executable).parent, tmp_path
    program = Path(sys.executable).name
    environment.run("step", program, "-c", "print('said')", expected_output="said")
    for options in ({"status": 3}, {"expected_output": "unsaid"}):
        with pytest.raises(SystemExit, match=r"(?s)step: status 0, expected .*print\('said'\).*said"):
            environment.run("step", program, "-c", "print('said')", **options)
