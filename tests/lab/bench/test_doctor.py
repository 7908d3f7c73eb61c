"""`snella doctor`: machine description and correctness of the backends."""

import io
import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from snella._utils import nvidia_driver
from snella.backends import TorchBackend, choose_backend
from snella.kernels import KernelScalars, make_kernel
from snella.ops import has_bfloat16_instructions
from snella.update import UpdateSpec
from snella_app.cli.main import main
from snella_app.text import bytes_text
from snella_lab.bench import doctor, reference
from snella_lab.bench.doctor import describe_machine, diagnose
from snella_lab.bench.reference import check_backend, op_error


@pytest.fixture(autouse=True)
def fewer_cases(monkeypatch):
    """Use fewer samples and smaller shapes."""
    monkeypatch.setattr(reference, "_SAMPLES", 3)
    monkeypatch.setattr(reference, "SHAPES", (((17,), 33), ((8, 8, 8), 12)))


@pytest.mark.parametrize("impl", ["numba", "eager"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_cpu_backends_are_correct(impl, dtype):
    if impl == "numba":
        pytest.importorskip("numba")
    check = check_backend(impl, "cpu", dtype)
    assert check.verdict == "correct" and check.cases == 8 and 0 < check.worst <= 1, check


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_triton_is_correct(dtype):
    assert check_backend("triton", "cuda", dtype).verdict == "correct"


@pytest.mark.parametrize("sparsity", [0.0, 0.7, 0.99, 0.9999])
def test_rounding_does_not_change_the_selection_of_mode_official(sparsity):
    (case,) = [case for case in reference.check_cases() if case.mode == "official"]
    size = case.rows[0] * case.columns
    budget = max(1, int(size * (1 - sparsity)))
    for seed in range(8):
        tensors = reference._tensors(case, seed, "cpu", torch.float64)
        scalars = KernelScalars(*(tensors[name][0] for name in ("piece_coeff", "alpha", "beta", "temperature")))
        delta = make_kernel(case.kernel).merge(tensors["A"][0], tensors["B"], scalars)
        magnitudes = delta.abs().flatten().sort(descending=True).values
        # a budget of all entries excludes the smallest, as the threshold is one of the entries
        first = min(budget, size - 1) - 1
        assert magnitudes[first] - magnitudes[first + 1] > 20 * torch.finfo(torch.float32).eps * magnitudes[first]


@pytest.fixture
def triton_on_cpu(monkeypatch):
    """Check Triton in its interpreter, on few cases and in float32, because the interpreter truncates to bfloat16."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is used only without a GPU")
    monkeypatch.setattr(doctor, "backends_of", lambda device: ("triton", "eager"))
    monkeypatch.setattr(doctor, "DTYPES", {"fp32": torch.float32})
    monkeypatch.setattr(reference, "KERNELS", ("mix_k",))
    monkeypatch.setattr(reference, "SHAPES", (((8, 8, 8), 12),))
    monkeypatch.setattr(reference, "_SAMPLES", 2)


def test_doctor_checks_triton(triton_on_cpu):
    diagnosis = diagnose(time_steps=False, console=Console(file=io.StringIO(), width=200))
    assert [(check.impl, check.cases, check.verdict) for check in diagnosis.checks] == [
        ("triton", 5, "correct"),
        ("eager", 5, "correct"),
    ]


def test_doctor_reports_wrong_triton_kernels_with_a_remedy(triton_on_cpu, monkeypatch, capsys):
    from snella.backends.triton.backend import TritonBackend

    original = TritonBackend.grad_factors

    def grad_factors(self, *args, **options):
        A, *rest = original(self, *args, **options)
        return A * 1.01, *rest

    monkeypatch.setattr(TritonBackend, "grad_factors", grad_factors)
    with pytest.raises(SystemExit, match="1"):
        main(["doctor", "--steps", "false"])
    output = " ".join(capsys.readouterr().out.split())
    assert "wrong: triton on cpu in fp32; set --method-options.impl eager" in output


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
    assert machine["instructions"].endswith(f"bfloat16 products: {'yes' if has_bfloat16_instructions() else 'no'}")


@pytest.mark.parametrize(("threads", "expected"), [(1, "cpu, 1 thread, "), (11, "cpu, 11 threads, ")])
def test_the_number_of_threads_is_singular_or_plural(threads, expected, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert describe_machine({})["processor"].startswith(expected)


def test_driver_and_bfloat16_products_of_a_gpu_are_described(monkeypatch):
    gpu = SimpleNamespace(name="Tesla T4", total_memory=16 * 2**30, major=7, minor=5)
    monkeypatch.setattr(doctor, "nvidia_driver", lambda: "NVRM version: 570.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    machine = describe_machine({})
    assert machine["driver"] == "NVRM version: 570.1"
    assert machine["gpu"] == [f"Tesla T4, {bytes_text(16 * 2**30)}, compute capability 7.5, bfloat16 products: no"]


@pytest.mark.parametrize(
    ("text", "version"), [("", ""), ("NVRM version: 570.1 \nGCC version: 12\n", "NVRM version: 570.1")]
)
def test_driver_version_is_the_first_line_of_its_file(text, version, monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda path, encoding: text)
    assert nvidia_driver.__wrapped__() == version


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


def test_merging_and_steps_of_lora_full_and_snella_are_timed(monkeypatch, tmp_path):
    config = doctor.BenchConfig
    monkeypatch.setattr(
        doctor, "BenchConfig", lambda **options: config(**options | {"backbones": ["test_vit"], "batch": [2]})
    )
    console = Console(file=io.StringIO(), width=200)
    diagnosis = diagnose(console=console, rounds=1, out=tmp_path / "doctor.json")
    assert [row["method"] for row in diagnosis.steps] == ["lora", "full", "snella"]
    assert {row["rounds"] for row in diagnosis.steps} == {1} and all(row["step_s"] > 0 for row in diagnosis.steps)
    assert [row["shape"] for row in diagnosis.merges] == [[768, 768], [3072, 768]]
    backend = choose_backend("auto", UpdateSpec(make_kernel("mix_k"), (1,)), torch.ones(1, 1, 8))[0]
    for row in diagnosis.merges:
        assert row["backend"] == backend and row["dtype"] == "float32" and row["milliseconds"] > 0
        seconds = row["matrices"] * row["milliseconds"] / 1000
        assert row["share"] == pytest.approx(seconds / diagnosis.steps[-1]["step_s"], rel=0.01)
        assert f"{row['milliseconds']:.2f}" in console.file.getvalue()
    assert json.loads((tmp_path / "doctor.json").read_text())["merges"] == diagnosis.merges
