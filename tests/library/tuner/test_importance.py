"""Eqs. 7 to 11, hand-computed and against the authors' allocator."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn

from snella import SnellaConfig
from snella.allocation import budget_at
from snella.allocator import allocate
from snella.importance import ImportanceTracker
from snella.matrices import adapted_matrices

PARITY = Path(__file__).parents[1] / "functions" / "official_parity"


def matrices(shapes, **settings):
    """Return the adapted matrices of linear layers with shapes `(in, out)`."""
    model = nn.ModuleList([nn.Linear(inputs, outputs) for inputs, outputs in shapes])
    settings = {"r": 4, "init_weights": False} | settings
    model = get_peft_model(model, SnellaConfig(target_modules=[str(k) for k in range(len(shapes))], **settings))
    return adapted_matrices(model)


def set_factors(matrix, A, B, grad_A, grad_B):
    """Set the factors and gradients of a matrix."""
    layer = matrix.layer
    for factor, value, grad in (
        (layer.snella_A["default"], A[None], grad_A[None]),
        (layer.snella_B["default"], B, grad_B),
    ):
        factor.data.copy_(value)
        factor.grad = grad.to(factor.dtype).clone()


def test_three_steps_equal_hand_computation():
    (matrix,) = matrices([(1, 1)], r=1, num_pieces=1)
    tracker = ImportanceTracker([matrix], beta1=0.75, beta2=0.25)
    assert tracker.scores() == [0]
    ones = torch.ones(1, 1)
    # A: |∇A·A| = 2, 4, 1; B: always |−3·1| = 3, with uncertainty 0
    for grad in (2.0, -4.0, 1.0):
        set_factors(matrix, ones, ones, grad * ones, -3 * ones)
        tracker.update()
    # Ī: 2 → 0.75·2 + 0.25·4 = 2.5 → 0.75·2.5 + 0.25·1 = 2.125
    # U: 0 → 0.25·0 + 0.75·|2.5 − 4| = 1.125 → 0.25·1.125 + 0.75·|2.125 − 1| = 1.125
    assert tracker.scores() == [pytest.approx(2.125 * 1.125)]


def test_zero_init_ema_equals_hand_computation():
    (matrix,) = matrices([(1, 1)], r=1, num_pieces=1)
    tracker = ImportanceTracker([matrix], beta1=0.75, beta2=0.25, zero_init_ema=True)
    ones = torch.ones(1, 1)
    for _ in range(2):
        set_factors(matrix, ones, ones, 4 * ones, 0 * ones)
        tracker.update()
    # Ī: 0.25·4 = 1 → 0.75·1 + 0.25·4 = 1.75; U: 0.75·|1 − 4| = 2.25 → 0.25·2.25 + 0.75·|1.75 − 4| = 2.25
    assert tracker.scores() == [pytest.approx(1.75 * 2.25)]


def test_each_factor_is_averaged_over_its_entries():
    (matrix,) = matrices([(2, 3)], r=1, num_pieces=1)
    tracker = ImportanceTracker([matrix], beta1=0.5, beta2=0.5, zero_init_ema=True)
    A, B = torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [2.0], [3.0]])
    set_factors(matrix, A, B, torch.ones(2, 1), torch.ones(3, 1))
    tracker.update()
    # Ī = I/2, U = I/4: the product is I²/8
    assert tracker.scores() == [pytest.approx((1 + 9) / 2 / 8 + (1 + 4 + 9) / 3 / 8)]


def test_half_precision_gradients_are_multiplied_in_float32():
    (matrix,) = matrices([(1, 1)], r=1, num_pieces=1)
    layer = matrix.layer
    layer.snella_A["default"] = nn.Parameter(torch.full((1, 1, 1), 1e-4, dtype=torch.float16))
    layer.snella_A["default"].grad = torch.full((1, 1, 1), 1e-4, dtype=torch.float16)
    layer.snella_B["default"].grad = torch.zeros(1, 1)
    tracker = ImportanceTracker([matrix])
    tracker.update()
    assert tracker._averages["0/A"].item() == pytest.approx(1e-8, rel=0.01)


def test_magnitude_needs_no_gradient_and_sensitivity_is_0_without_one():
    (matrix,) = matrices([(2, 3)])
    magnitude = ImportanceTracker([matrix], metric="magnitude", zero_init_ema=True)
    magnitude.update()
    factors = [factor.detach().abs() for factor in matrix.factors]
    # Ī = 0.15·|X|, U = 0.15·0.85·|X|
    expected = sum(0.15 * 0.15 * 0.85 * factor.square().mean().item() for factor in factors)
    assert magnitude.scores() == [pytest.approx(expected)]
    sensitivity = ImportanceTracker([matrix])
    sensitivity.update()
    assert sensitivity.scores() == [0]


def test_names_with_gradient_requires_both_gradients_and_a_nonzero_one():
    with_gradient, without = matrices([(2, 3), (3, 2)])
    tracker = ImportanceTracker([with_gradient, without])
    assert tracker.names_with_gradient() == set()
    for layer in (with_gradient.layer, without.layer):
        for factor in (layer.snella_A["default"], layer.snella_B["default"]):
            factor.grad = torch.zeros_like(factor)
    assert tracker.names_with_gradient() == set()
    with_gradient.layer.snella_B["default"].grad.view(-1)[0] = 1e-6
    assert tracker.names_with_gradient() == {with_gradient.name} == {"0"}
    with_gradient.layer.snella_A["default"].grad = None
    assert tracker.names_with_gradient() == set()


@pytest.mark.parametrize("metric", ["delta_magnitude", "delta_mean_magnitude"])
def test_delta_magnitude_smooths_all_entries_or_their_mean(metric):
    (matrix,) = matrices([(2, 3)], init_sparsity=0.5)
    tracker = ImportanceTracker([matrix], metric=metric, beta1=0.5, beta2=0.5, zero_init_ema=True)
    tracker.update()
    sizes = matrix.sparse_update().abs()
    assert 0 < int(sizes.count_nonzero()) < sizes.numel()
    sizes = sizes if metric == "delta_magnitude" else sizes.mean()
    # Ī = I / 2, U = |Ī − I| / 2 = I / 4, and their product's mean over all entries
    assert tracker.scores() == [pytest.approx((sizes / 2 * sizes / 4).mean().item())]
    with torch.no_grad():
        matrix.layer.snella_A["default"].mul_(1.5)
    moved = matrix.sparse_update().abs()
    moved = moved if metric == "delta_magnitude" else moved.mean()
    tracker.update()
    average = sizes / 4 + moved / 2
    expected = average * (sizes / 8 + (average - moved).abs() / 2)
    assert tracker.scores() == [pytest.approx(expected.mean().item(), rel=1e-5)]


def test_matrices_of_fused_layer_have_separate_importance(vit):
    parts = adapted_matrices(vit.adapted(target_modules=["blocks.0.attn.qkv"]))
    layer = parts[0].layer
    layer.snella_A["default"].grad = torch.ones_like(layer.snella_A["default"])
    layer.snella_B["default"].grad = torch.ones_like(layer.snella_B["default"])
    layer.snella_B["default"].data[64:128] *= 10
    tracker = ImportanceTracker(parts, zero_init_ema=True)
    tracker.update()
    q, k, v = tracker.scores()
    assert k > 20 * max(q, v)


def test_loaded_state_is_independent_of_its_source():
    pair = matrices([(2, 3), (3, 2)])
    tracker = ImportanceTracker(pair, metric="magnitude", zero_init_ema=True)
    tracker.update()
    other = ImportanceTracker(pair, metric="magnitude", zero_init_ema=True)
    other.load_state_dict(tracker.state_dict())
    assert other.scores() == tracker.scores()
    before = other.scores()
    tracker.update()
    assert other.scores() == before


def test_authors_allocator_is_reproduced():
    record = json.loads((PARITY / "official.json").read_text())["allocator"]
    tensors = load_file(PARITY / "official.safetensors")
    matrices_by_name = matrices(record["layers"], preset="official", r=4)
    caps = [matrix.size for matrix in matrices_by_name]
    tracker = ImportanceTracker(matrices_by_name, beta1=record["beta1"], beta2=record["beta2"], zero_init_ema=True)
    target = sum(caps) - round(record["target_sparsity"] * sum(caps))

    def joined(pieces):
        return pieces.transpose(0, 1).reshape(pieces.shape[1], -1)

    num_compared = 0
    for entry in record["trace"]:
        epoch = entry["epoch"]
        assert budget_at(epoch, record["epochs"], sum(caps), target) == entry["budget"]
        if entry["score"] is not None:
            scores = tracker.scores()
            shares = [score / sum(scores) for score in scores]
            expected_shares = [entry["score"][f"l.{k}"] for k in range(len(caps))]
            assert shares == pytest.approx(expected_shares, rel=1e-5, abs=1e-9)
            # the authors' code computes in float32 and truncates fractions
            counts = allocate(scores, caps, int(entry["budget"]))
            saved = [(1 - entry["sparsity"][f"l.{k}"]) * cap for k, cap in enumerate(caps)]
            assert all(abs(count - budget) <= 3 for count, budget in zip(counts, saved, strict=True)), (counts, saved)
            num_compared += 1
        for step in range(record["steps_per_epoch"]):
            for k, matrix in enumerate(matrices_by_name):
                prefix = f"alloc.e{epoch}.s{step}.l{k}."
                names = ("In_Qs", "Out_Qs", "grad_In_Qs", "grad_Out_Qs")
                set_factors(matrix, *(joined(tensors[prefix + name]) for name in names))
            tracker.update()
    assert num_compared == record["epochs"] - 1
