"""`make test` continues after a failure and lists the failed stages at the end."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def make_test(tmp_path):
    """Return a function that runs `make test` with stub programs that log their calls and fail on a given argument."""
    calls = tmp_path / "calls"

    def run(failing):
        for name in ("python", "ruff", "mypy"):
            program = tmp_path / "bin" / name
            program.parent.mkdir(exist_ok=True)
            program.write_text(
                f'#!/bin/sh\ncall="{name} $PYTHONPATH $*"\necho "$call" >> {calls}\n'
                f'case "$call" in *{failing}*) exit 1;; esac\n'
            )
            program.chmod(0o755)
        for stamp in (".installed", ".installed-for-tests"):
            (tmp_path / stamp).touch()
        environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
        command = ["make", "--old-file=packages", f"VENV={tmp_path}", "test"]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
        return result.returncode, result.stdout.splitlines()[-1], calls.read_text()

    return run


@pytest.mark.parametrize(
    ("failing", "expected"),
    [("ruff", "[style]"), ("mypy", "[types]"), ("slow", "[tests]"), ("quantized", "[quantized]"), ("ray", "[ray]")],
)
def test_all_stages_run_and_failed_stages_are_listed(make_test, failing, expected):
    code, last, calls = make_test(failing)
    assert code != 0
    assert last == f"=== failed: {expected}"
    for call in ("ruff", "mypy", "not slow and not gpu", "test_quantization.py", "test_processes.py -k ray"):
        assert call in calls
    missing = [word for word in calls.split() if word.startswith("tests/") and not (ROOT / word).exists()]
    assert not missing


def test_make_test_succeeds_if_all_stages_pass(make_test):
    assert make_test("nothing")[:2] == (0, "=== all stages passed")
