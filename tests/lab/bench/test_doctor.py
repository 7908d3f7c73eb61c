"""`snella doctor`: machine description and correctness of the backends."""

import io
import json

import pytest
import torch
from rich.console import Console

from snella.backends import TorchBackend
from snella_app.cli.main import main
from snella_lab.bench import doctor, reference
from snella_lab.bench.doctor import describe_machine, diagnose
from snella_lab.bench.reference import check_backend, op_error


@pytest.fixture(autouse=True)
def fewer_cases(monkeypatch):
    """Use fewer samples and shapes."""
    monkeypatch.setattr(reference, "_SAMPLES", 3)
    monkeypatch.setattr(reference, "SHAPES", (((17,), 33), ((8, 8, 8), 12)))


@pytest.mark.parametrize("impl", ["numba", "eager"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_cpu_backends_are_correct(impl, dtype):
    if impl == "numba":
        pytest.importorskip("numba")
    check = check_backend(impl, "cpu", dtype)
    assert check.verdict == "correct" and check.cases == 4 and 0 < check.worst <= 1, check


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_triton_is_correct(dtype):
    assert check_backend("triton", "cuda", dtype).verdict == "correct"


def wrong_gradient(self, *args, **options):
    """Return factor gradients with a relative error of 0.1%."""
    A, *others = CORRECT(self, *args, **options)
    return (A * 1.001, *others)


CORRECT = TorchBackend.grad_factors


def test_wrong_backend_is_reported_with_its_tensor(monkeypatch):
    monkeypatch.setattr(TorchBackend, "grad_factors", wrong_gradient)
    check = check_backend("eager", "cpu")
    assert check.verdict == "wrong" and check.worst > 1 and check.where.endswith(" A")


def test_nan_gradient_is_wrong(monkeypatch):
    def broken(self, *args, **options):
        A, B, *others = CORRECT(self, *args, **options)
        return (A, B * torch.nan, *others)

    monkeypatch.setattr(TorchBackend, "grad_factors", broken)
    check = check_backend("eager", "cpu")
    assert check.verdict == "wrong" and check.worst == float("inf") and check.where.endswith(" B")


def test_missing_backend_reports_the_reason(monkeypatch):
    monkeypatch.setattr("snella.backends.missing_reason", lambda name: "numba is not installed")
    check = check_backend("numba", "cpu")
    assert check.verdict == "not available" and "numba is not installed" in check.error


def test_failed_first_use_check_is_wrong(monkeypatch, tmp_path, capsys):
    def choose(impl, spec, A):
        if impl == "eager":
            raise RuntimeError("impl='eager' computes a wrong threshold; use impl='reference'")
        return impl, ""

    monkeypatch.setattr(reference, "choose_backend", choose)
    check = check_backend("eager", "cpu")
    assert check.verdict == "wrong" and "computes a wrong threshold" in check.error
    assert "computes a wrong threshold" in op_error("eager")
    with pytest.raises(SystemExit, match="1"):
        main(["doctor", "--steps", "false", "--out", str(tmp_path / "doctor.json")])
    assert "wrong: eager on cpu in fp32" in " ".join(capsys.readouterr().out.split())
    checks = json.loads((tmp_path / "doctor.json").read_text())["checks"]
    assert [check["verdict"] for check in checks if check["impl"] == "eager"] == ["wrong", "wrong"]


def test_machine_is_described():
    machine = describe_machine({"torch": "2.0"})
    assert machine["versions"] == {"torch": "2.0"} and "Python" in machine["system"]
    assert (machine["gpu"] == "none") == (not torch.cuda.is_available())


def test_results_are_written(tmp_path):
    console = Console(file=io.StringIO(), width=200)
    diagnosis = diagnose(time_steps=False, out=tmp_path / "new" / "doctor.json", console=console)
    stored = json.loads((tmp_path / "new" / "doctor.json").read_text())
    assert [check["verdict"] for check in stored["checks"]] == [check.verdict for check in diagnosis.checks]
    assert {"machine", "commit", "date", "versions"} <= set(stored) and stored["steps"] == []
    assert stored["versions"] == diagnosis.machine["versions"] and "snella" in stored["versions"]
    assert "versions" not in stored["machine"]
    assert "all available backends are correct" in console.file.getvalue()


def test_command_exits_with_1_if_a_backend_is_wrong(monkeypatch, capsys):
    assert main(["doctor", "--steps", "false"]) == 0
    monkeypatch.setattr(TorchBackend, "grad_factors", wrong_gradient)
    with pytest.raises(SystemExit, match="1"):
        main(["doctor", "--steps", "false"])
    assert "wrong: eager on cpu in fp32" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("sparsity", [0.0, 0.7, 0.99, 0.9999])
@pytest.mark.parametrize("impl", ["numba", "eager"])
def test_backends_are_correct_at_every_sparsity(impl, sparsity):
    if impl == "numba":
        pytest.importorskip("numba")
    assert op_error(impl, sparsity=sparsity) is None


def test_steps_are_timed_for_lora_full_and_snella(monkeypatch, tmp_path):
    config = doctor.BenchConfig
    monkeypatch.setattr(
        doctor, "BenchConfig", lambda **options: config(**options | {"backbones": ["test_vit"], "batch": [2]})
    )
    steps = diagnose(console=Console(file=io.StringIO(), width=200), rounds=1).steps
    assert [row["method"] for row in steps] == ["lora", "full", "snella"]
    assert {row["rounds"] for row in steps} == {1} and all(row["step_s"] > 0 for row in steps)
