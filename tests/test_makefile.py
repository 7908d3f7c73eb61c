"""`make test` and `make gpu` continue after a failure and list the failed stages at the end."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def run_make(tmp_path):
    """Return a function that runs `make` with stub programs that log their calls and fail on a given argument."""
    calls = tmp_path / "calls"

    def run(failing, target="test"):
        for name in ("python", "ruff", "mypy", "snella"):
            program = tmp_path / "bin" / name
            program.parent.mkdir(exist_ok=True)
            program.write_text(
                f'#!/bin/sh\ncall="{name} $PYTHONPATH $*"\necho "$call" >> {calls}\n'
                f'case "$call" in *{failing}*) exit 1;; esac\n'
            )
            program.chmod(0o755)
        for stamp in (".installed", ".installed-for-tests"):
            (tmp_path / stamp).touch()
        environment = {
            name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "PYTHONPATH")
        }
        command = ["make", "--old-file=packages", f"VENV={tmp_path}", target]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
        return result.returncode, result.stdout.splitlines()[-1], calls.read_text()

    return run


@pytest.mark.parametrize(
    ("failing", "expected"),
    [("ruff", "[style]"), ("mypy", "[types]"), ("slow", "[tests]"), ("quantized", "[quantized]"), ("ray", "[ray]")],
)
def test_all_stages_run_and_failed_stages_are_listed(run_make, failing, expected):
    code, last, calls = run_make(failing)
    assert code != 0
    assert last == f"=== failed: {expected}"
    for call in ("ruff", "mypy", "not slow and not gpu", "test_quantization.py", "test_processes.py -k ray"):
        assert call in calls
    missing = [word for word in calls.split() if word.startswith("tests/") and not (ROOT / word).exists()]
    assert not missing


def test_make_test_succeeds_if_all_stages_pass(run_make):
    assert run_make("nothing")[:2] == (0, "=== all stages passed")


@pytest.mark.parametrize(
    ("failing", "expected"),
    [("doctor", "[doctor]"), ("pytest", "[tests]"), ("step_time", "[bench]"), ("cost_model", "[predictions]")],
)
def test_all_stages_of_make_gpu_run(run_make, failing, expected):
    code, last, calls = run_make(failing, "gpu")
    assert code != 0 and last == f"=== failed: {expected}"
    # the doctor also times steps
    assert [call.split() for call in calls.splitlines()] == [
        ["snella", "doctor", "--out", "runs/gpu/doctor.json"],
        ["python", "-m", "pytest", "-m", "gpu"],
        ["python", "benchmarks/step_time.py", "--gpu"],
        ["python", "benchmarks/cost_model.py", "--gpu"],
    ]


def test_make_gpu_times_all_methods_of_make_bench_in_both_dtypes(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import step_time

    configs = []
    monkeypatch.setattr(step_time, "bench", lambda config, console: configs.append(config))
    for name in ("measure_matrix", "measure_sampling", "measure_competition"):
        monkeypatch.setattr(step_time, name, lambda *args, **options: {"shape": [], **dict.fromkeys(KEYS)})
    monkeypatch.setattr(step_time, "append_rows", lambda path, rows: None)
    monkeypatch.setattr("sys.argv", ["step_time.py"])
    step_time.main()
    methods = {name for config in configs for name in config.methods}
    monkeypatch.setattr("sys.argv", ["step_time.py", "--gpu"])
    step_time.main()
    gpu = configs[-1]
    assert set(gpu.methods) == methods
    assert (gpu.device, gpu.batch, gpu.dtype) == ("cuda", [64], ["fp32", "bf16"])
    assert gpu.out is not None and gpu.out.endswith("benchmarks/results.jsonl")


KEYS = ("effective_s", "effective_over_product", "extra_over_matrix")
