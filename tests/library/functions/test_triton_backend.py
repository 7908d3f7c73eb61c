"""When the Triton kernels are chosen, and what they do not need a GPU for: they compile."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from snella.backends import choose_backend, get_backend
from snella.backends import triton_problem as problem_with_triton
from snella.functional import compute_effective_weight

from .problems import with_backend
from .triton_problems import DEVICE, needs_triton, triton_problem


def update_of(kernel="mix_k", **options):
    problem = triton_problem(kernel, **options)
    return problem.update(problem.tensors)


def chosen(impl, update):
    return choose_backend(impl, update.spec, update.factors.A)


@pytest.fixture
def fresh_look():
    """Let the machine be looked at again, before and after."""
    problem_with_triton.cache_clear()
    yield
    problem_with_triton.cache_clear()


@needs_triton
def test_triton_is_chosen_where_it_is_asked_for():
    backend, reason = chosen("triton", update_of())
    assert backend == "triton"
    assert reason == f"Triton kernels on {str(update_of().factors.A.device)!r}"


@pytest.mark.skipif(DEVICE == "cuda", reason="needs a machine without a CUDA device")
def test_auto_is_never_triton_on_the_cpu():
    assert chosen("auto", update_of())[0] != "triton"


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_auto_is_triton_on_the_gpu_for_piecewise_kernels_and_eager_for_the_others():
    assert chosen("auto", update_of())[0] == "triton"
    backend, reason = chosen("auto", update_of("rbf"))
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
def test_what_triton_cannot_compute_is_refused_when_it_is_asked_for(options, message):
    with pytest.raises(NotImplementedError, match=message):
        chosen("triton", update_of(**options))


@needs_triton
def test_factors_on_another_device_are_refused():
    update = update_of()
    elsewhere = update._replace(factors=update.factors._replace(A=update.factors.A.to("meta")))
    with pytest.raises(NotImplementedError, match="impl='triton' runs on a CUDA device, got factors on 'meta'"):
        chosen("triton", elsewhere)


@needs_triton
def test_a_matrix_of_more_entries_than_can_be_counted_is_refused():
    update = update_of()
    A = update.factors.A[:, :1].expand(1, 1 << 20, 4)
    spec = replace(update.spec, row_counts=(1 << 11,))
    huge = update._replace(spec=spec, factors=update.factors._replace(A=A))
    with pytest.raises(NotImplementedError, match="supports at most 1073741824 entries per matrix, got 2147483648"):
        chosen("triton", huge)


def test_without_triton_asking_for_it_names_the_command(monkeypatch, fresh_look):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"impl='triton', but triton is not installed; .* pip install triton"):
        chosen("triton", update_of())


def test_a_triton_that_does_not_work_is_said_to_be_so(monkeypatch, fresh_look):
    import snella.backends.triton

    module = "snella.backends.triton.backend"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.delattr(snella.backends.triton, "backend", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match="impl='triton', but triton cannot be used"):
        chosen("triton", update_of())


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
def test_a_matrix_that_was_kept_gives_the_gradients_of_one_that_is_merged_again():
    update, backend = update_of(rows=(3, 4, 5), n=6, budgets=(4, 0, 9)), get_backend("triton")
    merged = backend.merge(*update)
    grad = torch.ones(12, 6, device=DEVICE)
    expected = backend.grad_factors(update.spec, merged, grad)
    # as a hook for saved tensors may leave it: in a memory of its own
    kept = backend.merge(*update._replace(thresholds=merged.thresholds), tuple(delta.clone() for delta in merged.delta))
    assert all(torch.equal(*pair) for pair in zip(backend.grad_factors(update.spec, kept, grad), expected, strict=True))
    out = torch.empty(12, 6, device=DEVICE)
    backend.add_update(update.spec, kept, torch.zeros_like(out), out)
    assert [int(out[rows].count_nonzero()) for rows in update.spec.rows] == [4, 0, 9]


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles_for_a_gpu(capability, tmp_path):
    script = Path(__file__).parents[3] / "benchmarks" / "triton_resources.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    words = ["--capabilities", str(capability), "--ranks", "8", "--check"]
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:triton", str(script), *words],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "21 compiled"
