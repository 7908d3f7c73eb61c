"""Matrix fitting: ranks, kernel curves, definiteness, known errors, custom kernels and resuming."""

import importlib
import json
import math
import re
import shutil
import sys

import numpy as np
import pytest
import torch

from snella.kernels import KERNELS, Kernel
from snella_app.cli.main import main
from snella_lab.analysis import matrix_fit
from snella_lab.analysis.matrix_fit import (
    PRESETS,
    FitConfig,
    definiteness,
    fit_kernel,
    fit_matrices,
    kernel_curves,
    random_matrices,
)

SMALL = FitConfig(("linear", "mix_k"), size=8, ranks=(1, 8), matrices=2, r=2, steps=300, lr=0.05)


def product(A, B):
    """LoRA's product as a custom kernel function."""
    return B @ A.T


class Doubled(Kernel):
    """Custom kernel class."""

    name = "doubled"

    def merge(self, A, B, scalars):
        return 2 * B @ A.T


@pytest.mark.parametrize(("rank", "density"), [(1, 0.5), (3, 0.3), (12, 0.3), (5, 1.0)])
def test_random_matrices_have_the_given_rank_and_unit_variance(rank, density):
    matrices = random_matrices(12, rank, 4, density, torch.Generator().manual_seed(0))
    assert [int(torch.linalg.matrix_rank(matrix.double(), rtol=1e-5)) for matrix in matrices] == [rank] * 4
    assert matrices.square().mean((1, 2)).tolist() == pytest.approx([1.0] * 4, rel=1e-5)
    assert (matrices == 0).any() == (density < 1)


def test_a_density_that_is_too_low_for_the_rank_is_rejected():
    with pytest.raises(
        ValueError, match=r"density must be higher for rank 12, got 0\.02, which gives matrices of lower rank"
    ):
        random_matrices(24, 12, 1, 0.02, torch.Generator().manual_seed(0))


def test_linear_kernel_of_rank_two_fits_matrices_up_to_rank_two():
    fit = fit_kernel("linear", SMALL)
    generator = torch.Generator().manual_seed(0)
    matrices = [random_matrices(8, rank, 2, 0.3, generator) for rank in (1, 8)]
    best = [float(torch.linalg.svdvals(m.double())[2:].square().sum() / 64) for m in matrices[1]]  # Eckart and Young
    assert max(fit.mse[0]) < 1e-4
    for error, bound in zip(fit.mse[1], best, strict=True):
        assert bound * 0.999 <= error < bound * 1.2
    assert fit.steps[0] == 0 and fit.steps[-1] == 299 and fit.gradient[-1] < fit.gradient[0]


def test_kernel_curves_match_the_formulas():
    rows = {(row["kernel"], row["x"]): row for row in kernel_curves(list(KERNELS))}
    sigma = 1 / (1 + math.exp(-2))
    xs = np.linspace(-4, 4, 161)
    probs = np.exp(abs(xs - 1)) / np.exp(abs(xs - 1)).sum()
    prob = probs[120]  # at x = 2
    expected = {
        "linear": (2.0, 1.0),
        "p_linear": (1.0, 1.0),
        "sigmoid": (sigma, sigma * (1 - sigma)),
        "rbf": (math.exp(-1), -2 * math.exp(-1)),
        "normalized_rbf": (prob, prob * (1 - prob)),
        "mix_k": (1 + prob, 1 + prob * (1 - prob)),
    }
    for kernel, (value, slope) in expected.items():
        assert rows[kernel, 2.0]["value"] == pytest.approx(value)
        assert rows[kernel, 2.0]["slope"] == pytest.approx(slope)


def test_distance_kernels_are_not_positive_semi_definite():
    rows = {row["kernel"]: row for row in definiteness(["linear", "rbf", "p_linear", "mix_k"])}
    assert rows["linear"]["is_positive_semi_definite"] and rows["rbf"]["is_positive_semi_definite"]
    distances = rows["p_linear"]
    assert distances["trace"] == 0 and distances["smallest"] < -1 and not distances["is_positive_semi_definite"]
    assert distances["conditional"] > -1e-9  # negative distances are, on vectors that sum to 0
    mixed = rows["mix_k"]
    assert mixed["smallest"] < -1 and mixed["asymmetry"] > 0 and not mixed["is_positive_semi_definite"]


@pytest.mark.parametrize(("name", "factor"), [("product", 1), ("Doubled", 2)])
def test_custom_kernels_are_imported_by_path(name, factor):
    fit = fit_kernel(f"{__name__}:{name}", FitConfig(size=6, ranks=(2,), matrices=1, r=2, steps=1))
    expected = fit_kernel("linear", FitConfig(size=6, ranks=(2,), matrices=1, r=2, steps=1))
    assert (fit.error[0] == pytest.approx(expected.error[0])) == (factor == 1)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("mixk", "must be among linear, .* got 'mixk'"),
        ("nowhere:f", "cannot import kernel 'nowhere:f': No module .*; use a module on PYTHONPATH"),
        ("math:pi", "must be a Kernel subclass or a function of A and B, got 3.14"),
        ("torch:add", r"must return \[m, n\]"),
    ],
)
def test_invalid_kernel_is_rejected(kernel, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        fit_kernel(kernel, FitConfig(size=6, ranks=(2,), matrices=1, r=4, steps=1))


def test_all_out_of_range_settings_are_reported_together():
    with pytest.raises(
        ValueError,
        match=r"r must be a multiple of 2.*got 3; ranks must be one or more integers in \[1, size=8\], got \[9\]",
    ):
        FitConfig(size=8, ranks=(9,), r=3)
    assert (PRESETS["paper"].steps, PRESETS["paper"].lr, PRESETS["paper"].matrices) == (100_000, 1e-4, 10)


def test_a_diverging_fit_is_a_one_line_error(tmp_path, capsys):
    line = "fit-matrix --kernels linear --ranks 2 --size 4 --matrices 1 --r 2 --steps 4 --lr 1e30"
    assert main([*line.split(), "--out", str(tmp_path / "fits")]) == 2
    error = r"snella: kernel 'linear': the error is (nan|inf) at step \d; reduce lr\n"
    assert re.fullmatch(error, capsys.readouterr().err)


def test_an_edited_custom_kernel_is_fitted_again(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "edited_kernel.py"
    config = FitConfig(("linear", "edited_kernel:merge"), size=6, ranks=(2,), matrices=1, r=2, steps=2)
    errors, fitted = [], []
    monkeypatch.setattr(matrix_fit, "fit_kernel", lambda name, *rest: fitted.append(name) or fit_kernel(name, *rest))
    for factor in (1, 1, 3):
        module.write_text(f"def merge(A, B):\n    return {factor} * (B @ A.T)\n")
        sys.modules.pop("edited_kernel", None)
        importlib.invalidate_caches()
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        errors.append(fit_matrices(config, tmp_path / "fits")[1].rows[1]["mse"])
    assert fitted == ["linear", "edited_kernel:merge", "edited_kernel:merge"]
    assert errors[0] == errors[1] != errors[2]


def test_interrupted_call_resumes_with_the_missing_kernels(tmp_path, monkeypatch):
    short = FitConfig(("linear", "p_linear"), size=6, ranks=(2, 4), matrices=2, r=2, steps=3)
    uninterrupted = fit_matrices(short)

    class Stopped(Exception):
        pass

    def stop(kernel, step):
        if kernel == "p_linear":
            raise Stopped

    with pytest.raises(Stopped):
        fit_matrices(short, tmp_path, stop)
    assert list(json.loads((tmp_path / "fits.json").read_text())["fits"]) == ["linear"]
    fitted = []
    monkeypatch.setattr(matrix_fit, "fit_kernel", lambda name, *rest: fitted.append(name) or fit_kernel(name, *rest))
    resumed = fit_matrices(short, tmp_path)
    assert fitted == ["p_linear"] and resumed[1].rows == uninterrupted[1].rows
    assert resumed[1].rows[0]["mse"] == pytest.approx(
        np.mean([row["mse"] for row in resumed[1].tables["matrices"][:2]])
    )
    with pytest.raises(ValueError, match="contains fits with different settings"):
        fit_matrices(FitConfig(size=6, ranks=(2, 4), matrices=2, r=2, steps=4), tmp_path)
    for damaged in ('{"fits": []}', '{"fits": {}}', '{"fits": {}, "settings"'):
        (tmp_path / "damaged.json").write_text(damaged)
        (tmp_path / "damaged.json").replace(tmp_path / "fits.json")
        with pytest.raises(ValueError, match=r"fits\.json is damaged: .*; delete it to start again"):
            fit_matrices(short, tmp_path)
    for plot in resumed:
        plot.draw().draw_without_rendering()
