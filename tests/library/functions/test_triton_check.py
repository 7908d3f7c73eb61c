"""First-use check of the Triton kernels."""

import pytest
import torch

from snella.backends import choose_backend
from snella.kernels import make_kernel
from snella.update import UpdateSpec

from .triton_problems import DEVICE, needs_triton

pytestmark = needs_triton


@pytest.fixture
def backend():
    """Return the module of the backend without cached results."""
    from snella.backends.triton import backend

    backend._compare.cache_clear()
    yield backend
    backend._compare.cache_clear()


def spec_of(kernel="mix_k", mode="soft"):
    return UpdateSpec(make_kernel(kernel), (5,), mode, 10.0)


FACTORS = torch.zeros(1, 7, 4, device=DEVICE)


@pytest.mark.parametrize(("kernel", "mode"), [("mix_k", "soft"), ("mix_k", "official"), ("p_linear", "none")])
def test_kernels_pass(backend, kernel, mode):
    assert backend.failed_check(spec_of(kernel, mode), FACTORS) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_factors_pass(backend, dtype):
    assert backend.failed_check(spec_of("p_linear", "soft"), FACTORS.to(dtype)) is None


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["soft", "official", "none"])
@pytest.mark.parametrize("kernel", ["mix_k", "normalized_rbf", "p_linear"])
@pytest.mark.parametrize(("rank", "options"), [(8, {}), (8, {"softmax_dim": 1, "center_softmax": True}), (32, {})])
def test_all_kernels_and_modes_pass(backend, kernel, mode, rank, options):
    spec = UpdateSpec(make_kernel(kernel, **options), (5,), mode, 10.0)
    assert backend.failed_check(spec, torch.zeros(1, 7, rank, device=DEVICE)) is None


def test_default_device_has_no_effect(backend):
    with torch.device("meta"):
        assert backend.failed_check(spec_of("p_linear", "none"), FACTORS) is None


def test_failure_is_described_and_cached(backend, monkeypatch):
    original, calls = backend.TritonBackend.grad_factors, []

    def wrong_gradients(self, *args, **options):
        calls.append(args)
        A, *rest = original(self, *args, **options)
        return A * 1.01, *rest

    monkeypatch.setattr(backend.TritonBackend, "grad_factors", wrong_gradients)
    reason = backend.failed_check(spec_of("p_linear", "none"), FACTORS)
    assert "computes a wrong gradient of A of kernel 'p_linear' on" in reason and "largest error" in reason
    assert backend.failed_check(spec_of("p_linear", "none"), FACTORS) == reason and len(calls) == 1
    assert backend.failed_check(spec_of("p_linear", "none"), FACTORS[..., :2]) is not None and len(calls) == 2


def test_failed_check_falls_back_to_eager_or_raises_with_impl_triton(backend, monkeypatch):
    monkeypatch.setattr(backend, "failed_check", lambda spec, A: "computes a wrong threshold")
    monkeypatch.setattr("snella.backends.requires_check", lambda A: True)
    with pytest.raises(RuntimeError, match=r"impl='triton' computes a wrong threshold; use impl='eager'"):
        choose_backend("triton", spec_of(), FACTORS)
    if DEVICE == "cuda":
        assert choose_backend("auto", spec_of(), FACTORS) == ("eager", "triton computes a wrong threshold")
