"""First-use check of the Triton kernels."""

import importlib.util
import json
import re
import statistics
import time
from pathlib import Path

import pytest
import torch

from snella.backends import choose_backend
from snella.kernels import make_kernel
from snella.update import UpdateSpec

from .triton_problems import DEVICE, needs_triton

pytestmark = needs_triton


@pytest.fixture
def verify(monkeypatch, tmp_path):
    """Return the `verify` module with an empty cache."""
    from snella.backends.triton import verify

    monkeypatch.setenv("SNELLA_CACHE", str(tmp_path))
    monkeypatch.setattr(verify, "_results", {})
    return verify


@pytest.fixture
def wrong_gradients(monkeypatch):
    """Patch the backend: gradients of A are 1% too large."""
    from snella.backends.triton.backend import TritonBackend

    original = TritonBackend.grad_factors

    def grad_factors(self, *args, **options):
        A, *rest = original(self, *args, **options)
        return A * 1.01, *rest

    monkeypatch.setattr(TritonBackend, "grad_factors", grad_factors)


def spec_of(kernel="mix_k", mode="soft"):
    return UpdateSpec(make_kernel(kernel), (5,), mode, 10.0)


FACTORS = torch.zeros(1, 7, 4, device=DEVICE)


@pytest.mark.parametrize(("kernel", "mode"), [("mix_k", "soft"), ("mix_k", "official"), ("p_linear", "none")])
def test_kernels_pass(verify, kernel, mode):
    assert verify.failed_check(spec_of(kernel, mode), FACTORS) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_factors_pass(verify, dtype):
    assert verify.failed_check(spec_of("p_linear", "soft"), FACTORS.to(dtype)) is None


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["soft", "official", "none"])
@pytest.mark.parametrize("kernel", ["mix_k", "normalized_rbf", "p_linear"])
@pytest.mark.parametrize(("rank", "options"), [(8, {}), (8, {"softmax_dim": 1, "center_softmax": True}), (32, {})])
def test_all_kernels_and_modes_pass(verify, kernel, mode, rank, options):
    spec = UpdateSpec(make_kernel(kernel, **options), (5,), mode, 10.0)
    assert verify.failed_check(spec, torch.zeros(1, 7, rank, device=DEVICE)) is None


def test_default_device_has_no_effect(verify):
    with torch.device("meta"):
        assert verify.failed_check(spec_of("p_linear", "none"), FACTORS) is None


def test_failure_is_described_and_cached(verify, wrong_gradients, monkeypatch, tmp_path):
    reason = verify.failed_check(spec_of("p_linear", "none"), FACTORS)
    assert reason.startswith("computes a wrong gradient of A in factor_gradients for kernel='p_linear' on ")
    assert "largest error" in reason
    monkeypatch.undo()
    monkeypatch.setenv("SNELLA_CACHE", str(tmp_path))
    assert verify.failed_check(spec_of("p_linear", "none"), FACTORS) == reason  # in memory
    monkeypatch.setattr(verify, "_results", {})
    assert verify.failed_check(spec_of("p_linear", "none"), FACTORS) == reason  # on disk
    assert list(json.loads((tmp_path / "kernel_checks.json").read_text()).values()) == [reason]


def test_a_kernel_that_does_not_compile_is_a_failure_and_checked_again_by_the_next_process(
    verify, monkeypatch, tmp_path
):
    calls = []

    def fail(spec, A):
        calls.append(spec)
        raise NotImplementedError("no such instruction\nin line 3")

    monkeypatch.setattr(verify, "_compare", fail)
    reason = verify.failed_check(spec_of(), FACTORS)
    assert reason.startswith("cannot run the Triton kernels for kernel='mix_k' on ")
    assert reason.endswith(": NotImplementedError: no such instruction")
    assert verify.failed_check(spec_of(), FACTORS) == reason and len(calls) == 1
    assert not (tmp_path / "kernel_checks.json").exists()
    monkeypatch.setattr(verify, "_results", {})
    assert verify.failed_check(spec_of(), FACTORS) == reason and len(calls) == 2


def test_out_of_memory_is_not_a_failure_of_the_kernels(verify, monkeypatch):
    def fail(spec, A):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(verify, "_compare", fail)
    with pytest.raises(torch.OutOfMemoryError):
        verify.failed_check(spec_of(), FACTORS)
    assert not verify._results


def test_passed_check_is_not_repeated(verify, monkeypatch):
    monkeypatch.setattr(verify, "_compare", lambda spec, A: None)
    assert verify.failed_check(spec_of(), FACTORS) is None
    monkeypatch.setattr(verify, "_compare", lambda spec, A: pytest.fail("compared again"))
    monkeypatch.setattr(verify, "_results", {})
    assert verify.failed_check(spec_of(), FACTORS) is None


def test_source_driver_rank_and_mode_are_part_of_the_cache_key(verify, monkeypatch):
    keys = {verify._key(spec_of(), FACTORS), verify._key(spec_of(mode="official"), FACTORS)}
    keys |= {verify._key(spec_of(), FACTORS[..., :2])}
    for name in ("nvidia_driver", "_source_digest"):
        monkeypatch.setattr(verify, name, lambda: "another")
        keys.add(verify._key(spec_of(), FACTORS))
    assert len(keys) == 5


def test_corrupt_cache_is_overwritten(verify, monkeypatch, tmp_path):
    (tmp_path / "kernel_checks.json").write_text("{")
    monkeypatch.setattr(verify, "_compare", lambda spec, A: "wrong")
    assert verify.failed_check(spec_of(), FACTORS) == "wrong"
    assert list(json.loads((tmp_path / "kernel_checks.json").read_text()).values()) == ["wrong"]


WRONG_KERNELS = [
    ("forward", "softmax_statistics", "highest, mask", "highest + 0.001, mask", "maximum logit"),
    ("forward", "softmax_statistics", "tl.sum(total", "1.001 * tl.sum(total", "inverse sum of exponentials"),
    ("forward", "merge", "weighted + value if", "weighted - value if", "merged matrix"),
    ("forward", "count_within_bin", "(bits >> shift) & (LOW", "((bits >> shift) + 9) & (LOW", "threshold"),
    ("forward", "finish_thresholds", "rank < 0, 0.0, threshold", "rank < 0, 0.0, 1.001 * threshold", "threshold"),
    ("forward", "add_sparse", "source.to(wide) + sparse", "source.to(wide) - sparse", "effective weight"),
    ("backward", "softmax_weighted_sums", "tl.sum(weighted, 0), mask", "-tl.sum(weighted, 0), mask", "gradient of A"),
    ("backward", "factor_gradients", "-tl.sum(grad_diff, 0)", "tl.sum(grad_diff, 0)", "gradient of A"),
    ("backward", "factor_gradients", "tl.sum(grad_diff, 1), 0.0", "1.01 * tl.sum(grad_diff, 1), 0.0", "gradient of B"),
    ("backward", "scalar_gradients", "beta + group, grad_sum", "beta + group, 1.01 * grad_sum", "gradient of beta"),
]


@pytest.fixture
def replace_kernel(monkeypatch, tmp_path):
    """Return a function that replaces a `@triton.jit` kernel by one with changed code."""
    from snella.backends.triton import backward, forward

    def replace(name, kernel, old, new):
        module = {"forward": forward, "backward": backward}[name]
        code = Path(module.__file__).read_text(encoding="utf-8")
        assert code.count(old) == 1
        file = tmp_path / f"wrong_{name}.py"
        file.write_text(code.replace(old, new), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(file.stem, file)
        wrong = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(wrong)
        monkeypatch.setattr(module, kernel, getattr(wrong, kernel))

    return replace


@pytest.mark.parametrize(("module", "kernel", "old", "new", "tensor"), WRONG_KERNELS)
def test_wrong_kernel_is_caught_and_auto_selects_eager(
    verify, replace_kernel, monkeypatch, module, kernel, old, new, tensor
):
    replace_kernel(module, kernel, old, new)
    monkeypatch.setattr("snella.backends.is_on_gpu", lambda A: True)
    spec = spec_of(mode="official")
    backend, reason = choose_backend("auto", spec, FACTORS)
    assert backend == "eager"
    failure = rf"computes a wrong {tensor} in [^=]*\b{kernel}\b[^=]* for kernel='mix_k' on .*: largest error .*"
    assert re.fullmatch(f"triton {failure}; impl='eager' skips this check", reason)
    with pytest.raises(RuntimeError, match=f"impl='triton' {failure}; use impl='eager'"):
        choose_backend("triton", spec, FACTORS)


def test_auto_selects_triton_if_the_check_passes(verify, monkeypatch):
    monkeypatch.setattr("snella.backends.is_on_gpu", lambda A: True)
    assert choose_backend("auto", spec_of(), FACTORS) == ("triton", f"Triton kernels on {str(FACTORS.device)!r}")


@pytest.mark.parametrize(
    ("kernel", "launches", "inputs", "results"),
    [("mix_k", 9, 8, 11), ("normalized_rbf", 9, 8, 11), ("p_linear", 7, 5, 6)],
)
def test_check_needs_few_launches_and_copies_and_little_cpu_time(
    verify, monkeypatch, kernel, launches, inputs, results
):
    devices, launch_s = [], []
    kernel_class = type(verify.forward.merge)
    run, to = kernel_class.run, torch.Tensor.to

    def timed_run(self, *args, **options):
        start = time.thread_time()
        result = run(self, *args, **options)
        launch_s.append(time.thread_time() - start)
        return result

    def counted_to(self, *args, **options):
        devices.extend(args[:1])
        return to(self, *args, **options)

    verify.backend._layout.cache_clear()
    monkeypatch.setattr(kernel_class, "run", timed_run)
    monkeypatch.setattr(torch.Tensor, "to", counted_to)
    start = time.thread_time()
    assert verify._compare(spec_of(kernel), FACTORS) is None
    total_s = time.thread_time() - start
    assert len(launch_s) == launches
    assert devices.count(FACTORS.device) == inputs + (DEVICE == "cuda")  # to the device, including the layout
    assert devices.count("cpu") == 2 * results  # the reference's are on the CPU
    assert total_s - sum(launch_s) < 0.05


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("kernel", ["mix_k", "normalized_rbf", "p_linear"])
def test_check_takes_less_than_50_ms_after_compilation(verify, kernel):
    seconds = []
    for _ in range(6):
        torch.cuda.synchronize()
        start = time.perf_counter()
        assert verify._compare(spec_of(kernel), FACTORS) is None
        seconds.append(time.perf_counter() - start)
    assert statistics.median(seconds[1:]) < 0.05


def test_failed_check_falls_back_to_eager_or_raises_with_impl_triton(verify, monkeypatch):
    monkeypatch.setattr(verify, "failed_check", lambda spec, A: "computes a wrong threshold")
    monkeypatch.setattr("snella.backends.is_on_gpu", lambda A: True)
    with pytest.raises(RuntimeError, match=r"impl='triton' computes a wrong threshold; use impl='eager'"):
        choose_backend("triton", spec_of(), FACTORS)
    reason = "triton computes a wrong threshold; impl='eager' skips this check"
    assert choose_backend("auto", spec_of(), FACTORS) == ("eager", reason)
