"""Modes `official` and `none` (kernelized LoRA) against the authors' released code, values and gradients in float64."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from snella.kernels import Factors, make_kernel, merge_factors
from snella.ops import LinearOp
from snella.sparsify import quantile_threshold, sparsify
from snella.update import Update, UpdateSpec

from .problems import layer_output

FOLDER = Path(__file__).parent / "official_parity"
TENSORS = load_file(FOLDER / "official.safetensors")
CASES = {name: case for name, case in json.loads((FOLDER / "official.json").read_text()).items() if name != "allocator"}
KERNEL = {"klora": "p_linear", "snell": "p_linear", "mixk": "mix_k", "snella": "mix_k"}
TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}
SPARSE = [name for name, case in CASES.items() if case["quantile"] is not None]
DENSE = [name for name in CASES if name not in SPARSE]


def load_tensors(name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): value for key, value in TENSORS.items() if key.startswith(f"{name}.")}


def join(pieces: Tensor) -> Tensor:
    """Convert the authors' layout `[P, rows, r/P]` to `[rows, r]`."""
    return pieces.transpose(0, 1).reshape(pieces.shape[1], -1)


def leaves_of(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the authors' input, factors and learnable scalars under SNELLA's names."""
    tensors = {"x": official["x"], "A": join(official["In_Qs"]), "B": join(official["Out_Qs"])}
    tensors |= {
        name: official[official_name].reshape(())
        for name, official_name in (("alpha", "alpha"), ("beta", "beta"), ("temperature", "gamma"))
        if official_name in official
    }
    return {name: value.clone().requires_grad_() for name, value in tensors.items()}


def expected_gradients(official: dict[str, Tensor]) -> dict[str, Tensor]:
    actual = {
        "x": official["grad_x"],
        "A": join(official["grad_In_Qs"]),
        "B": join(official["grad_Out_Qs"]),
    }
    for name, official_name in (("alpha", "grad_alpha"), ("beta", "grad_beta"), ("temperature", "grad_gamma")):
        if official_name in official:
            actual[name] = official[official_name].reshape(())
    return actual


def merge(official: dict[str, Tensor], leaves: dict[str, Tensor], kernel: str) -> Tensor:
    scalars = {name: leaves.get(name) for name in ("alpha", "beta", "temperature")}
    coeff = official["shared_coeff_fc"].flatten()
    return merge_factors(leaves["A"], leaves["B"], kernel, piece_coeff=coeff, **scalars)


def compare(y: Tensor, leaves: dict[str, Tensor], official: dict[str, Tensor]) -> None:
    torch.testing.assert_close(y.detach(), official["y"], **TOLERANCE)
    expected = expected_gradients(official)
    assert set(expected) == set(leaves)
    actual = torch.autograd.grad(y, list(leaves.values()), official["grad_y"])
    for name, value in zip(leaves, actual, strict=True):
        assert expected[name].any(), f"{name}: nothing to compare"
        torch.testing.assert_close(value, expected[name], **TOLERANCE)


def test_all_eight_cases_exist():
    assert len(CASES) == 8 and len(SPARSE) == 4
    assert {case["kind"] for case in CASES.values()} == set(KERNEL)


@pytest.mark.parametrize("name", CASES)
def test_merged_matrices_equal_authors(name):
    official = load_tensors(name)
    delta = merge(official, leaves_of(official), KERNEL[CASES[name]["kind"]])
    torch.testing.assert_close(delta.detach(), official["delta_dense"], **TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_equal_authors(name):
    official, case = load_tensors(name), CASES[name]
    leaves = leaves_of(official)
    sparse = merge(official, leaves, KERNEL[case["kind"]])
    if case["quantile"] is not None:
        sparse = sparsify(sparse, quantile_threshold(sparse, case["quantile"]), "official")
        torch.testing.assert_close(sparse.detach(), official["delta_sparse"], **TOLERANCE)
        assert torch.equal(sparse != 0, official["delta_sparse"] != 0)
    compare(leaves["x"] @ sparse.T, leaves, official)


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_adapted_layer_in_official_mode_equals_authors(name, impl):
    official, case = load_tensors(name), CASES[name]
    leaves = leaves_of(official)
    threshold = quantile_threshold(merge(official, leaves, KERNEL[case["kind"]]), case["quantile"])
    budget = int(official["delta_sparse"].count_nonzero())
    update = update_of(name, leaves, budget, mode="official", thresholds=threshold[None])
    compare(layer_output(leaves["x"], None, None, [update], LinearOp(), impl=impl), leaves, official)


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_adapted_layer_without_sparsity_equals_authors_kernelized_lora(name, impl):
    official, case = load_tensors(name), CASES[name]
    leaves = leaves_of(official)
    update = update_of(name, leaves, case["in_features"] * case["out_features"], mode="none")
    compare(layer_output(leaves["x"], None, None, [update], LinearOp(), impl=impl), leaves, official)


def update_of(name: str, leaves: dict[str, Tensor], budget: int, mode: str, thresholds: Tensor | None = None) -> Update:
    case = CASES[name]
    scalars = (leaves[field][None] if field in leaves else None for field in ("alpha", "beta", "temperature"))
    factors = Factors(leaves["A"][None], leaves["B"], load_tensors(name)["shared_coeff_fc"].reshape(1, -1), *scalars)
    kernel = make_kernel(KERNEL[case["kind"]], num_pieces=case["num_pieces"])
    return Update(UpdateSpec(kernel, (case["out_features"],), mode), factors, (budget,), thresholds)


@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_budget_corresponds_to_official_quantile(impl):
    official = load_tensors("snella_12x20_r8_q0.3")
    leaves = leaves_of(official)
    update = update_of("snella_12x20_r8_q0.3", leaves, 168, "official")  # 168 = 0.7 · 240
    compare(layer_output(leaves["x"], None, None, [update], LinearOp(), impl=impl), leaves, official)
