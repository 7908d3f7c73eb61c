"""The wheel holds every module, template, experiment and entry point; `make wheel` also installs and runs it."""

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
    """A wheel of this checkout; pip fetches the build backend."""
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
    "lost",
    [
        *("snella_app/py.typed", "snella_app/runs/serve.html"),
        *("snella_lab/experiments/coffee.yaml", "snella/layer.py"),
    ],
)
def test_a_file_that_is_missing_from_the_wheel_is_named(try_wheel, wheel, lost, tmp_path):
    with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(tmp_path / wheel.name, "w") as part:
        for name in whole.namelist():
            if name != lost:
                part.writestr(name, whole.read(name))
    with pytest.raises(SystemExit, match=rf"missing files \['{lost}'\], unexpected files \[\]"):
        try_wheel.check_contents(tmp_path / wheel.name)


def test_a_step_that_fails_prints_its_command_and_output(try_wheel, tmp_path):
    environment = object.__new__(try_wheel.Environment)
    environment.programs, environment.work = Path(sys.executable).parent, tmp_path
    program = Path(sys.executable).name
    environment.run("step", program, "-c", "print('said')", says="said")
    for words in ({"status": 3}, {"says": "unsaid"}):
        with pytest.raises(SystemExit, match=r"(?s)step: status 0, expected .*print\('said'\).*said"):
            environment.run("step", program, "-c", "print('said')", **words)
