"""Run updates equal the updates of the models, and statistics match values computed by hand."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from snella.matrices import adapted_matrices
from snella_app.methods import merge_trained
from snella_app.records.record import read
from snella_app.records.run import Allocation
from snella_app.report.inspect import read_adapter
from snella_app.report.report import update_section
from snella_app.report.updates import _downsample, deepest_query
from snella_app.runs.model import load_run, make_backbone
from snella_lab.analysis.updates import (
    RunUpdates,
    _draw_similarity,
    _group_by_block,
    _Similarity,
    chance_frequencies,
    effective_rank,
    overlap,
    rank_row,
    read_updates,
    update,
    update_frequencies,
)


def test_snella_updates_equal_the_sparse_updates_of_the_layers(old_run):
    updates = read_updates(old_run, "run")
    matrices = {matrix.name: matrix for matrix in adapted_matrices(load_run(old_run, "cpu").model)}
    assert set(updates.shapes) == set(matrices)
    budgets = {matrix.name: matrix.budget for matrix in read(Allocation, old_run).matrices}
    for name in ("blocks.0.attn.qkv.k", "blocks.5.attn.qkv.v", "blocks.3.mlp.fc2"):
        value = updates.compute(name)
        torch.testing.assert_close(value, 10.0 * matrices[name].sparse_update())  # scaling 10
        assert int(value.count_nonzero()) == budgets[name] and list(value.shape) == list(updates.shapes[name])


@pytest.mark.parametrize("method", ["lora-2", "full", "dora-2"])
def test_updates_of_other_methods_are_differences_from_the_backbone(save_run, method):
    run = save_run("run", method)
    loaded = load_run(run, "cpu")
    before = make_backbone(loaded.info.backbone, "classification").state_dict()
    merged = merge_trained(loaded.model).state_dict()
    updates = read_updates(run, "run")
    difference = merged["blocks.1.attn.qkv.weight"] - before["blocks.1.attn.qkv.weight"]
    qkv_update = torch.cat([updates.compute(f"blocks.1.attn.qkv.{part}") for part in "qkv"])
    torch.testing.assert_close(qkv_update, difference, atol=1e-6, rtol=1e-4)
    assert not any(name.startswith("head") for name in updates.shapes)


def test_method_without_weight_updates_is_rejected(save_run):
    with pytest.raises(ValueError, match="vpt-deep"):
        read_updates(save_run("run", "vpt-deep-2"), "run")


def test_ranks_match_known_matrices():
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0, 2.0])) == pytest.approx(4)
    assert effective_rank(torch.tensor([5.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(
        math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    )
    row = rank_row(torch.tensor([[3.0, 0.0, 0.0], [0.0, -4.0, 0.0]]))
    assert (row["nonzeros"], row["norm"], row["rank"], row["largest_entry"]) == (2, 5.0, 2, 4.0)
    assert row["stable_rank"] == pytest.approx(25 / 16) and row["density"] == pytest.approx(1 / 3)
    assert rank_row(torch.zeros(2, 3))["effective_rank"] == 0.0 and rank_row(torch.zeros(2, 3))["rank"] == 0


def test_layer_similarity_concatenates_its_matrices():
    first = torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 0.0, 1.0, 3.0]])
    second = torch.tensor([[4.0, 1.0], [-1.0, 0.0]])
    total = _Similarity(2)
    total.add(first)
    total.add(second)
    row = total.row()
    norms = math.sqrt(1 + 4 + 16 + 1) * math.sqrt(1 + 9 + 1)
    assert row["cosine"] == pytest.approx((2 - 4) / norms)
    assert row["chance"] == pytest.approx((3 * 4 / 4 + 5 * -1 / 2) / norms)
    assert row["jaccard"] == pytest.approx(2 / 5)  # intersection 2, union 5
    assert (row["pairs"], row["least"], row["greatest"]) == (1, row["cosine"], row["cosine"])


def test_zero_updates_are_excluded_from_pairs():
    total = _Similarity(3)
    total.add(torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]]))
    row = total.row()
    assert row["pairs"] == 1 and row["cosine"] == pytest.approx(1 / math.sqrt(2))


def test_blocks_of_several_stages_are_separate_layers():
    def layers(*names):
        return _group_by_block([RunUpdates("run", dict.fromkeys(names, (2, 2)), {}, lambda name: torch.zeros(2, 2))])

    plain = ("blocks.10.attn.qkv.q", "blocks.9.mlp.fc1", "norm.fc")
    assert layers(*plain) == {"9": [plain[1]], "10": [plain[0]], "–": [plain[2]]}
    staged = ("layers.0.blocks.0.mlp.fc1", "layers.0.blocks.1.mlp.fc1", "layers.2.blocks.0.mlp.fc1")
    assert layers(*staged) == {str(depth): [name] for depth, name in enumerate(staged)}


def test_layers_without_pairs_are_not_drawn():
    row = {"layer": "0", "position": 0, "matrices": 1, **_Similarity(2).row()}
    _draw_similarity([row]).draw_without_rendering()


def test_observed_and_chance_frequencies_match_hand_counts():
    stacked = torch.tensor([[1.0, 0, 0, 2], [1, 0, -1, 0], [3, 0, 0, 0]])
    assert update_frequencies(stacked).tolist() == [1, 2, 0, 1]
    assert chance_frequencies([0.5, 0.25]) == pytest.approx([0.375, 0.5, 0.125])
    assert chance_frequencies([0.3] * 30) == pytest.approx(stats.binom.pmf(np.arange(31), 30, 0.3))


def test_downsampled_cell_is_its_largest_entry_in_magnitude():
    values = torch.zeros(5, 4)
    values[0, 1], values[1, 0], values[4, 3] = 1.0, -3.0, 0.5
    assert _downsample(values, side=3).tolist() == [[-3.0, 0.0], [0.0, 0.0], [0.0, 0.5]]


def test_update_and_overlap_compare_two_runs(save_run):
    runs = [save_run("a", seed=0), save_run("b", seed=1)]
    updates, spectrum = update(runs)
    assert [row["matrix"] for row in updates.rows] == ["blocks.5.attn.qkv.q"] * 2  # block 5 is the deepest
    assert [row["rank"] for row in updates.rows] == [2, 2]
    assert len(spectrum.tables["ranks"]) == 2 * 6
    similarity, frequencies, map_rows = overlap(runs, matrix="blocks.0.mlp.fc1")
    a, b = (torch.cat([read_updates(run, "").compute(n).flatten() for n in _block_matrices(0)]) for run in runs)
    assert similarity.rows[0]["cosine"] == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)), abs=1e-5)
    assert [row["weights"] for row in frequencies.rows] == [0, 0, 192 * 64]  # LoRA changes every weight
    assert sum(row["weights_of_all_matrices"] for row in frequencies.rows) == 6 * (4 * 64 * 64 + 2 * 192 * 64)
    assert map_rows.rows[0]["mean_tasks"] == 2.0
    for plot in (updates, spectrum, similarity, frequencies, map_rows):
        plot.draw().draw_without_rendering()


def _block_matrices(number):
    parts = ("attn.qkv.q", "attn.qkv.k", "attn.qkv.v", "attn.proj", "mlp.fc1", "mlp.fc2")
    return [f"blocks.{number}.{part}" for part in parts]


def test_deepest_query_sorts_block_numbers_numerically(save_run):
    names = list(read_updates(save_run("a", method="snella-2"), "").shapes)
    assert names[-1] == "blocks.5.mlp.fc2" and deepest_query(names) == "blocks.5.attn.qkv.q"
    assert deepest_query(["blocks.9.q_proj", "blocks.10.q_proj", "blocks.10.fc2"]) == "blocks.10.q_proj"
    assert deepest_query(["fc1", "fc2"]) == "fc2"


@pytest.mark.parametrize(("method", "shown"), [("snella-2", True), ("lora-2", True), ("bias", False)])
def test_report_shows_the_update_in_the_adapter(method, shown, save_run):
    section = update_section(read_adapter(save_run("a", method=method)), None)
    assert (section is not None) == shown
    if shown:
        assert section["name"] == "blocks.5.attn.qkv.q" and "Update of blocks.5.attn.qkv.q" in section["figure"]


def test_report_shows_a_matrix_with_a_budget(save_run):
    adapter = read_adapter(save_run("a", method="snella-2"))
    frozen = dict.fromkeys(_block_matrices(5), 0)
    assert update_section(adapter, None, frozen)["name"] == "blocks.4.attn.qkv.q"
    all_frozen = {name: 0 for number in range(6) for name in _block_matrices(number)}
    assert update_section(adapter, None, all_frozen)["name"] == "blocks.5.attn.qkv.q"


def test_overlap_requires_two_runs(save_run):
    run = save_run("a")
    with pytest.raises(ValueError, match="overlap needs at least 2 runs, got 1"):
        overlap([run])
    with pytest.raises(
        ValueError, match=r"matrix must be one that all runs change, e\.g\. 'blocks.0.*got 'blocks.9.q'"
    ):
        update([run], matrix="blocks.9.q")
