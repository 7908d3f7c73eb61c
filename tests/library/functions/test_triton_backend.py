"""Selection and compilation of the Triton kernels, without a GPU."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from snella.autograd import compute_effective_weight
from snella.backends import choose_backend, get_backend, missing_reason

from .problems import with_backend
from .triton_problems import DEVICE, needs_triton, triton_problem


def update_of(kernel="mix_k", **options):
    problem = triton_problem(kernel, **options)
    return problem.update(problem.tensors)


def select_backend(impl, update):
    return choose_backend(impl, update.spec, update.factors.A)


@pytest.fixture
def uncached_availability():
    """Clear the cached availability check before and after the test."""
    for function in (missing_reason, get_backend):
        function.cache_clear()
    yield
    missing_reason.cache_clear()


@needs_triton
def test_impl_triton_selects_triton():
    backend, reason = select_backend("triton", update_of())
    assert backend == "triton"
    assert reason == f"Triton kernels on {str(update_of().factors.A.device)!r}"


@pytest.mark.skipif(DEVICE == "cuda", reason="needs a machine without a CUDA device")
def test_auto_does_not_select_triton_on_cpu():
    assert select_backend("auto", update_of())[0] != "triton"


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_auto_selects_triton_on_gpu_for_piecewise_kernels_and_eager_otherwise():
    assert select_backend("auto", update_of())[0] == "triton"
    backend, reason = select_backend("auto", update_of("rbf"))
    assert backend == "eager"
    assert reason == "triton supports only the piecewise kernels, got kernel='rbf'"


@needs_triton
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"kernel": "rbf"},
            "impl='triton' supports only the piecewise kernels, got kernel='rbf'; use impl='eager'",
        ),
        ({"kernel": "linear"}, "supports only the piecewise kernels, got kernel='linear'"),
        ({"kernel": "sigmoid"}, "supports only the piecewise kernels, got kernel='sigmoid'"),
        ({"dtype": torch.float64}, "computes in float32, got factors in torch.float64"),
    ],
)
def test_unsupported_update_raises_with_impl_triton(options, message):
    with pytest.raises(NotImplementedError, match=message):
        select_backend("triton", update_of(**options))


@needs_triton
def test_factors_on_another_device_raise():
    update = update_of()
    factors_on_meta = update._replace(factors=update.factors._replace(A=update.factors.A.to("meta")))
    with pytest.raises(NotImplementedError, match=r"impl='triton' runs on .*, got factors on 'meta'"):
        select_backend("triton", factors_on_meta)


@needs_triton
def test_intel_gpus_use_torch_operations():
    update = update_of()
    A = SimpleNamespace(device=torch.device("xpu"), dtype=torch.float32, shape=update.factors.A.shape)
    on_xpu = update._replace(factors=update.factors._replace(A=A))
    backend, reason = select_backend("auto", on_xpu)
    assert backend == "eager"
    assert reason == (missing_reason("numba") or "numba runs on the CPU, got factors on 'xpu'")
    with pytest.raises(NotImplementedError, match=r"impl='triton' runs on .*, got factors on 'xpu'"):
        select_backend("triton", on_xpu)


@needs_triton
def test_matrix_above_entry_limit_raises():
    update = update_of()
    A = update.factors.A[:, :1].expand(1, 1 << 20, 4)
    spec = replace(update.spec, row_counts=(1 << 11,))
    huge = update._replace(spec=spec, factors=update.factors._replace(A=A))
    with pytest.raises(NotImplementedError, match="supports at most 1073741824 entries per matrix, got 2147483648"):
        select_backend("triton", huge)


def test_missing_triton_raises_with_install_command(monkeypatch, uncached_availability):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"impl='triton', but triton is not installed; .* pip install triton"):
        select_backend("triton", update_of())


def test_broken_triton_is_reported(monkeypatch, uncached_availability):
    import snella.backends.triton

    module = "snella.backends.triton.backend"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.delattr(snella.backends.triton, "backend", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match="impl='triton', but triton cannot be used"):
        select_backend("triton", update_of())


@needs_triton
def test_updates_of_different_backends_are_added():
    first, second = (problem.update(problem.tensors) for problem in (triton_problem(), triton_problem("linear")))
    shape = torch.Size((7, 5))
    weight = torch.ones(shape, device=DEVICE, dtype=torch.bfloat16)
    expected, _ = compute_effective_weight(weight, [first, second], shape)
    first = with_backend(first, "triton")
    for updates in ([first, second], [second, first]):
        torch.testing.assert_close(compute_effective_weight(weight, updates, shape)[0], expected)


@needs_triton
def test_saved_and_recomputed_delta_give_equal_gradients():
    update, backend = update_of(rows=(3, 4, 5), n=6, budgets=(4, 0, 9)), get_backend("triton")
    merged = backend.prepare(update)
    grad = torch.ones(12, 6, device=DEVICE)
    expected = backend.grad_factors(update.spec, merged, grad)
    # in new memory, e.g. after a hook for saved tensors
    saved = backend.prepare(
        update._replace(thresholds=merged.thresholds), tuple(delta.clone() for delta in merged.delta)
    )
    assert all(
        torch.equal(*pair) for pair in zip(backend.grad_factors(update.spec, saved, grad), expected, strict=True)
    )
    out = torch.empty(12, 6, device=DEVICE)
    backend.add_update(update.spec, saved, torch.zeros_like(out), out)
    assert [int(out[rows].count_nonzero()) for rows in update.spec.rows] == [4, 0, 9]


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(("capability", "count"), [(80, 21), (90, 42)])
def test_kernels_compile_for_gpu(capability, count, tmp_path):
    script = Path(__file__).parents[3] / "benchmarks" / "triton_resources.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    arguments = ["--capabilities", str(capability), "--ranks", "8", "--check"]
    process = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:triton", str(script), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    assert process.stdout.splitlines()[-1] == f"{count} compiled"
