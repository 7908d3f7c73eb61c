"""`make test` goes on after a failure and says at the end what failed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def make_test(tmp_path):
    """Run `make test` with programs that only note how they are called, and fail where a word is among it."""
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
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout.splitlines()[-1], calls.read_text()

    return run


@pytest.mark.parametrize(
    ("failing", "named"),
    [("ruff", "[style]"), ("mypy", "[types]"), ("slow", "[tests]"), ("quantized", "[quantized]"), ("ray", "[ray]")],
)
def test_every_stage_runs_where_one_fails_and_the_end_names_it(make_test, failing, named):
    code, last, calls = make_test(failing)
    assert code != 0
    assert last == f"=== failed: {named}"
    for call in ("ruff", "mypy", "not slow and not gpu", "test_quantization.py", "test_processes.py -k ray"):
        assert call in calls
    missing = [word for word in calls.split() if word.startswith("tests/") and not (ROOT / word).exists()]
    assert not missing


def test_it_succeeds_where_all_stages_do(make_test):
    assert make_test("nothing")[:2] == (0, "=== all stages passed")
