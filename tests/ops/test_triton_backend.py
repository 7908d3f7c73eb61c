"""When the Triton kernels are chosen, and what they do not need a GPU for: they compile."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from snella.ops.autograd import effective_weight_eager
from snella.ops.backends import _log_triton, choose_backend
from snella.ops.backends import triton_problem as problem_with_triton

from .triton_problems import DEVICE, needs_triton, triton_problem


def update_of(kernel="mix_k", **options):
    problem = triton_problem(kernel, **options)
    return problem.update(problem.tensors)


@pytest.fixture
def fresh_look():
    """Let the machine be looked at again, before and after."""
    problem_with_triton.cache_clear()
    yield
    problem_with_triton.cache_clear()


@needs_triton
def test_triton_is_chosen_where_it_is_asked_for():
    backend, reason = choose_backend("triton", update_of())
    assert backend.name == "triton"
    assert reason == f"Triton kernels on {str(update_of().A.device)!r}"


@needs_triton
def test_the_choice_is_logged_once_for_each_device(caplog):
    _log_triton.cache_clear()
    with caplog.at_level("INFO", logger="snella.ops.backends"):
        for _ in range(2):
            choose_backend("triton", update_of())
    assert caplog.messages == [f"updates on {str(update_of().A.device)!r} are computed by Triton kernels"]


@pytest.mark.skipif(DEVICE == "cuda", reason="needs a machine without a CUDA device")
def test_auto_is_never_triton_on_the_cpu():
    assert choose_backend("auto", update_of())[0].name != "triton"


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_auto_is_triton_on_the_gpu_for_piecewise_kernels_and_eager_for_the_others():
    assert choose_backend("auto", update_of())[0].name == "triton"
    backend, reason = choose_backend("auto", update_of("rbf"))
    assert backend.name == "eager"
    assert reason == "triton has the piecewise kernels only, got kernel='rbf'"


@needs_triton
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "rbf"}, "impl='triton' has the piecewise kernels only, got kernel='rbf'; impl='eager' would work"),
        ({"kernel": "linear"}, "has the piecewise kernels only, got kernel='linear'"),
        ({"kernel": "sigmoid"}, "has the piecewise kernels only, got kernel='sigmoid'"),
        ({"dtype": torch.float64}, "computes in float32, got factors in torch.float64"),
    ],
)
def test_what_triton_cannot_compute_is_refused_when_it_is_asked_for(options, message):
    with pytest.raises(NotImplementedError, match=message):
        choose_backend("triton", update_of(**options))


@needs_triton
def test_factors_on_another_device_are_refused():
    update = update_of()
    elsewhere = replace(update, A=update.A.to("meta"), B=update.B.to("meta"))
    with pytest.raises(NotImplementedError, match="impl='triton' runs on a CUDA device, got factors on 'meta'"):
        choose_backend("triton", elsewhere)


@needs_triton
def test_a_matrix_of_more_entries_than_can_be_counted_is_refused():
    update = update_of()
    huge = replace(update, A=update.A[:, :1].expand(1, 1 << 20, 4), row_counts=(1 << 11,))
    with pytest.raises(NotImplementedError, match="counts at most 1073741824 entries a matrix, got 2147483648"):
        choose_backend("triton", huge)


def test_without_triton_asking_for_it_names_the_command(monkeypatch, fresh_look):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"impl='triton', but triton is not installed; .* pip install triton"):
        choose_backend("triton", update_of())


def test_a_triton_that_does_not_work_is_said_to_be_so(monkeypatch, fresh_look):
    module = "snella.ops.backends.triton.backend"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.delattr(sys.modules["snella.ops.backends.triton"], "backend", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match="impl='triton', but triton cannot be used"):
        choose_backend("triton", update_of())


@needs_triton
def test_updates_of_different_backends_are_added():
    from snella.ops.backends.torch import TorchBackend
    from snella.ops.backends.triton.backend import TritonBackend

    first, second = (problem.update(problem.tensors) for problem in (triton_problem(), triton_problem("linear")))
    shape = torch.Size((7, 5))
    weight = torch.ones(shape, device=DEVICE, dtype=torch.bfloat16)
    orders = [
        ([first, second], [TritonBackend(), TorchBackend()]),
        ([second, first], [TorchBackend(), TritonBackend()]),
    ]
    expected = effective_weight_eager(weight, [first, second], shape, [TorchBackend(), TorchBackend()])
    for updates, backends in orders:
        torch.testing.assert_close(effective_weight_eager(weight, updates, shape, backends), expected)


@needs_triton
def test_matrices_that_were_kept_apart_are_put_together_again():
    from snella.ops.backends.base import Merged
    from snella.ops.backends.triton.backend import TritonBackend

    backend = TritonBackend()
    update = update_of(rows=(3, 4, 5), n=6, budgets=(4, 0, 9))
    merged = backend.merge_groups(update)
    grad = torch.ones(12, 6, device=DEVICE)
    expected = backend.group_gradients(update, merged, grad)
    # as a hook for saved tensors may leave them: each in a memory of its own
    apart = [one and Merged(one.delta.clone()) for one in merged]
    only_last = [None, None, apart[2]]
    for found, true in zip(backend.group_gradients(update, apart, grad), expected, strict=True):
        assert torch.equal(found, true)
    alone = replace(update, budgets=(0, 0, 9))
    out = torch.empty(12, 6, device=DEVICE)
    backend.add_groups(alone, only_last, torch.zeros_like(out), out)
    assert out[:7].count_nonzero() == 0
    assert out[7:].count_nonzero() == 9


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles_for_a_gpu(capability, tmp_path):
    script = Path(__file__).with_name("compile_triton.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:triton", str(script), str(capability)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "21 compiled"
