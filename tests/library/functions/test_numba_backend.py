"""Selection and numerical guarantees of the Numba backend."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from snella.backends import choose_backend, get_backend, missing_reason
from snella.backends.numba import backend as numba_backend
from snella.backends.numba import compile as numba_compile
from snella.backends.numba import forward as loops
from snella.kernels import KERNELS
from snella.sparsify import keep_threshold

from .problems import computed_weight, make_problem, solve

PIECEWISE = ["p_linear", "normalized_rbf", "mix_k"]


def update_of(kernel: str = "mix_k", **options):
    problem = make_problem(kernel, **options)
    return problem.update(problem.tensors)


def select_backend(impl: str, update):
    return choose_backend(impl, update.spec, update.factors.A)


@pytest.mark.parametrize("kernel", KERNELS)
def test_auto_selects_numba_for_float32_piecewise_kernels_and_eager_otherwise(kernel):
    assert select_backend("auto", update_of(kernel))[0] == ("numba" if kernel in PIECEWISE else "eager")
    assert select_backend("auto", update_of(kernel, dtype=torch.float64))[0] == "eager"
    assert select_backend("eager", update_of(kernel))[0] == "eager"


def test_subclasses_of_piecewise_kernels_run_as_torch_operations():
    class Doubled(type(update_of().spec.kernel)):
        def merge(self, A, B, scalars):
            return 2 * super().merge(A, B, scalars)

    update = update_of()
    assert choose_backend("auto", replace(update.spec, kernel=Doubled()), update.factors.A)[0] == "eager"


def test_updates_with_different_backends_are_added():
    first, second = make_problem("mix_k"), make_problem("linear")
    shape = first.tensors["weight"].shape
    updates = [problem.update(problem.tensors) for problem in (first, second)]
    update_only = [computed_weight(None, [update], shape) for update in updates]
    torch.testing.assert_close(computed_weight(None, updates, shape), update_only[0] + update_only[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"kernel": "rbf"},
            "impl='numba' supports only the piecewise kernels, got kernel='rbf'; use impl='eager'",
        ),
        ({"dtype": torch.float64}, "computes in float32, got factors in torch.float64"),
        ({"softmax_dim": 1}, "normalizes over the outputs, got softmax_dim=1"),
    ],
)
def test_unsupported_update_raises_with_impl_numba(options, message):
    with pytest.raises(NotImplementedError, match=message):
        select_backend("numba", update_of(**options))


def test_factors_on_another_device_raise():
    update = update_of()
    factors_on_meta = update._replace(factors=update.factors._replace(A=update.factors.A.to("meta")))
    with pytest.raises(NotImplementedError, match="runs on the CPU, got factors on 'meta'"):
        select_backend("numba", factors_on_meta)


@pytest.fixture
def uncached_availability():
    """Clear the cached availability check before and after the test."""
    for function in (missing_reason, get_backend):
        function.cache_clear()
    yield
    missing_reason.cache_clear()


def test_missing_numba_falls_back_to_eager_or_raises_with_install_command(monkeypatch, uncached_availability):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    backend, reason = select_backend("auto", update_of())
    assert backend == "eager"
    assert "numba is not installed" in reason
    with pytest.raises(ImportError, match=r"impl='numba', but numba is not installed; .* pip install 'snella\[fast\]'"):
        select_backend("numba", update_of())


def test_broken_numba_is_reported(monkeypatch, uncached_availability):
    monkeypatch.delattr(sys.modules["snella.backends.numba"], "backend")
    monkeypatch.setitem(sys.modules, "snella.backends.numba.backend", None)
    backend, reason = select_backend("auto", update_of())
    assert backend == "eager"
    assert "numba cannot be used" in reason
    with pytest.raises(ImportError, match="impl='numba', but numba cannot be used"):
        select_backend("numba", update_of())


def test_kernels_compile_without_cache_folder(monkeypatch):
    def raise_cache_error(**settings):
        if settings.get("cache"):
            raise RuntimeError("cannot cache function 'f': no locator available")
        return lambda function: "compiled"

    monkeypatch.setattr(numba_compile, "njit", raise_cache_error)
    assert numba_compile.compiled({})(len) == "compiled"


def test_stale_disk_cache_is_removed(tmp_path):
    newest = max(file.stat().st_mtime for file in Path(numba_compile.__file__).parent.glob("*.py"))
    names = ("forward.add_sparse", "forward.collect", "x.add_sparse")
    stale, fresh, other = (tmp_path / f"{name}-7.py311.nbi" for name in names)
    for file, age in ((stale, 1), (fresh, -1), (other, 1)):
        file.touch()
        os.utime(file, (newest - age, newest - age))
    for function in (loops.add_sparse, loops.collect):
        numba_compile.remove_stale_index(function.py_func, tmp_path)
    assert not stale.exists() and fresh.exists() and other.exists()


def select_threshold(value, budget):
    """Select the threshold of a matrix from its histogram."""
    width, blocks = numba_backend._blocks(value.shape)
    bins = (np.abs(value).view(np.int32) >> loops._HISTOGRAM_SHIFT) - loops._FIRST_BIN
    bins = bins.clip(0, loops.HISTOGRAM_BINS - 1)
    columns = [bins[:, block * width : (block + 1) * width].ravel() for block in range(blocks)]
    counts = [np.bincount(column, minlength=loops.HISTOGRAM_BINS) for column in columns]
    return numba_backend.select_threshold(value, budget, np.array(counts, np.int32))


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), seed=st.integers(0, 1000), data=st.data())
def test_threshold_equals_keep_threshold(rows, columns, seed, data):
    value = np.random.default_rng(seed).standard_normal((rows, columns)) * 10.0 ** (seed % 9 * 3 - 14)
    value = value.astype(np.float32)
    budget = data.draw(st.integers(0, value.size))
    assert select_threshold(value, budget) == keep_threshold(torch.from_numpy(value), budget).item()


@pytest.mark.parametrize("budget", [0, 1, 500_000, 999_999, 1_000_000])
def test_threshold_is_exact_for_mostly_equal_magnitudes(budget):
    value = np.ones((1000, 1000), np.float32)
    value[::7] = -0.5
    value[3, :5] = [0, 2, -3, 1e-40, np.inf]
    assert select_threshold(value, budget) == keep_threshold(torch.from_numpy(value), budget).item()


@pytest.mark.parametrize("kernel", PIECEWISE)
@pytest.mark.parametrize(("r", "num_pieces"), [(8, 2), (8, 1), (6, 3), (5, 1), (16, 4)])
def test_row_wise_merge_equals_merged_matrix(kernel, r, num_pieces):
    for m, n in ((7, 5), (61, 97), (40, 1700)):
        problem = make_problem(kernel, m=m, n=n, r=r, num_pieces=num_pieces)
        update = problem.update(problem.tensors)
        backend = numba_backend.NumbaBackend()
        merged = backend.prepare(update)
        repeated = backend.prepare(update._replace(thresholds=merged.thresholds))
        assert all(torch.equal(*pair) for pair in zip(merged.columns, repeated.columns, strict=True))
        base, from_matrix, from_rows = torch.zeros(3, m, n)
        backend.add_update(update.spec, merged, base, from_matrix)
        backend.add_update(update.spec, repeated, base, from_rows)
        assert torch.equal(from_matrix, from_rows) and from_rows.count_nonzero() > 0


def test_threshold_is_exact_above_2_to_the_24_entries():
    value = np.random.default_rng(0).standard_normal((4100, 4100), dtype=np.float32)
    budget = 5_000_000
    threshold = select_threshold(value, budget)
    assert np.count_nonzero(np.abs(value) > threshold) == budget


def test_exponential_is_accurate_to_two_ulp():
    value = -np.concatenate([np.linspace(0, 87, 100_003), np.logspace(-9, 1.9, 10_007)]).astype(np.float32)[None]

    @njit(**numba_compile.FASTMATH_STRICT_ORDER)
    def exponentials(values, results):
        for k in range(len(values)):
            results[k] = numba_compile.exponential(values[k])

    result = np.empty_like(value)
    exponentials(value[0], result[0])
    exact = np.exp(value.astype(np.float64))
    assert (np.abs(result - exact) / np.spacing(exact.astype(np.float32))).max() <= 2
    assert result[0, 0] == 1


@pytest.mark.parametrize("kernel", PIECEWISE)
def test_results_do_not_depend_on_the_number_of_threads(kernel):
    problem = make_problem(kernel, m=601, n=401, r=8, batch=(5,))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single_threaded = solve(problem, "numba")
        torch.set_num_threads(3)
        multi_threaded = solve(problem, "numba")
    finally:
        torch.set_num_threads(threads)
    # torch may split the sums of its product by threads
    for name in set(single_threaded) - {"y", "x", "weight", "bias"}:
        torch.testing.assert_close(multi_threaded[name], single_threaded[name], rtol=1e-4, atol=1e-6)
    update = problem.update(problem.tensors)
    weight = problem.tensors["weight"]
    try:
        torch.set_num_threads(1)
        expected = computed_weight(weight, [update], weight.shape, "numba")
        torch.set_num_threads(3)
        actual = computed_weight(weight, [update], weight.shape, "numba")
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(actual, expected)


def test_default_dtype_has_no_effect():
    problem = make_problem("mix_k", m=61, n=97, r=8)
    expected = solve(problem, "numba")
    torch.set_default_dtype(torch.float64)
    try:
        actual = solve(problem, "numba")
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_concurrent_calls_are_independent():
    problems = [make_problem("mix_k", seed=seed, m=601, n=401, r=8) for seed in range(4)]
    expected = [solve(problem, "numba") for problem in problems]
    with ThreadPoolExecutor(4) as pool:
        actual = list(pool.map(lambda problem: solve(problem, "numba"), problems))
    for result, reference in zip(actual, expected, strict=True):
        assert all(torch.equal(result[name], reference[name]) for name in reference)


@pytest.mark.parametrize("scale", [1e-12, 1e3])
def test_softmax_does_not_overflow_or_divide_by_zero(scale):
    problem = make_problem("mix_k", m=40, n=30, r=8)
    problem = replace(problem, tensors=problem.tensors | {k: problem.tensors[k] * scale for k in ("A", "B")})
    for name, value in solve(problem, "numba").items():
        assert torch.isfinite(value).all(), name


def test_equal_rows_have_zero_gradient():
    problem = make_problem("p_linear", m=6, n=5)
    ones = {name: torch.ones_like(problem.tensors[name]) for name in ("A", "B")}
    actual = solve(replace(problem, tensors=problem.tensors | ones), "numba")
    assert torch.equal(actual["A"], torch.zeros_like(actual["A"]))
    assert torch.equal(actual["B"], torch.zeros_like(actual["B"]))


def test_nan_in_a_factor_propagates():
    problem = make_problem("mix_k", budget=35)
    problem.tensors["A"][0, 0, 0] = torch.nan
    assert solve(problem, "numba")["y"].isnan().any()


@pytest.mark.parametrize("temperature", [0.0, 1e-45])
def test_a_vanishing_temperature_gives_non_finite_values_as_with_eager(temperature):
    problem = make_problem("mix_k")
    problem.tensors["temperature"].fill_(temperature)
    for impl in ("eager", "numba"):
        solution = solve(problem, impl)
        assert all(not solution[name].isfinite().any() for name in ("y", "A", "B", "temperature")), impl


def test_missing_scalar_raises_as_with_eager():
    problem = make_problem("mix_k")
    problem.tensors["alpha"] = None
    for impl in ("eager", "numba"):
        with pytest.raises(ValueError, match=r"requires the scalars \[.*'alpha'.*\], got None"):
            solve(problem, impl, needed=())


SCRIPT = """
import hashlib, torch
torch.set_num_threads(1)
from problems import make_problem, solve
for m, n, mode in ((384, 1536, "soft"), (64, 64, "official"), (64, 48, "none")):
    solution = solve(make_problem(m=m, n=n, r=8, batch=(16,), mode=mode), "numba")
    print({name: hashlib.md5(value.numpy().tobytes()).hexdigest() for name, value in solution.items()})
"""


def test_compiled_and_disk_cached_kernels_give_equal_bits(tmp_path):
    paths = [str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    actual = []
    for _ in range(2):
        process = subprocess.run(
            [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, timeout=280
        )
        assert process.returncode == 0, process.stderr
        actual.append(process.stdout)
    assert list(tmp_path.rglob("*.nbc"))
    assert len(actual[0].splitlines()) == 3 and actual[0] == actual[1]
