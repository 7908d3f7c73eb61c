"""First-use check of the Triton kernels."""

import json

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
    assert "computes a wrong gradient of A of kernel 'p_linear' on" in reason and "largest error" in reason
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
    assert reason.startswith("cannot run kernel ") and reason.endswith(": NotImplementedError: no such instruction")
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
    for name in ("_driver", "_source_digest"):
        monkeypatch.setattr(verify, name, lambda: "another")
        keys.add(verify._key(spec_of(), FACTORS))
    assert len(keys) == 5


def test_corrupt_cache_is_overwritten(verify, monkeypatch, tmp_path):
    (tmp_path / "kernel_checks.json").write_text("{")
    monkeypatch.setattr(verify, "_compare", lambda spec, A: "wrong")
    assert verify.failed_check(spec_of(), FACTORS) == "wrong"
    assert list(json.loads((tmp_path / "kernel_checks.json").read_text()).values()) == ["wrong"]


def test_failed_check_falls_back_to_eager_or_raises_with_impl_triton(verify, monkeypatch):
    monkeypatch.setattr(verify, "failed_check", lambda spec, A: "computes a wrong threshold")
    monkeypatch.setattr("snella.backends.requires_check", lambda A: True)
    with pytest.raises(RuntimeError, match=r"impl='triton' computes a wrong threshold; use impl='eager'"):
        choose_backend("triton", spec_of(), FACTORS)
    if DEVICE == "cuda":
        assert choose_backend("auto", spec_of(), FACTORS) == ("eager", "triton computes a wrong threshold")
