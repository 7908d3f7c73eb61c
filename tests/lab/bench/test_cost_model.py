"""The cost model: counts of tiny cases by hand, committed rows, and the tables of docs/scale.md."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import timm

from snella_app.cli.commands import inspect
from snella_app.training.cost_model import (
    METHODS,
    MODELS,
    NUMBA,
    SDDMM,
    TRITON,
    Transformer,
    count_step,
    count_trainable,
)
from snella_app.training.machines import (
    GPUS,
    Rates,
    gpu_rates,
    predict_on_gpu,
    ratio_range,
    shape_of_backbone,
)

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "benchmarks"
# two tokens of width 4, one block, one head, hidden width 8: qkv 12×4, proj 4×4, fc1 8×4, fc2 4×8
TINY = Transformer(width=4, depth=1, tokens=2, heads=1, hidden=8, patch=3, image=6, outputs=5)


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)


def rows_of(name):
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


def test_the_layers_of_a_block_are_counted_by_hand():
    assert TINY.entries == 48 + 16 + 32 + 32
    assert replace(TINY, is_gated=True, kv_width=2).layers == [
        *((4, 4, 1), (2, 4, 1), (2, 4, 1), (4, 4, 1)),
        *((8, 4, 1), (8, 4, 1), (4, 8, 1)),
    ]


def test_trainable_parameters_are_counted_by_hand():
    head = (4 + 1) * 5
    assert count_trainable(TINY, "lora", 2) == head + 2 * (16 + 8 + 12 + 12)
    assert count_trainable(TINY, "dora", 2) == head + 2 * (16 + 8 + 12 + 12) + 12 + 4 + 8 + 4
    # q, k and v have an A each, and every matrix has four scalars
    assert count_trainable(TINY, "snella", 2) == head + 2 * (12 + 3 * 4 + 8 + 12 + 12) + 4 * 6
    assert count_trainable(TINY, "frozen") == head + 4


@pytest.mark.parametrize("name", ["vit_small_patch16_224", "vit_base_patch16_224", "vit_small_patch14_dinov2"])
def test_a_model_has_the_weights_of_timm(name):
    shape = shape_of_backbone(name)
    assert shape is not None
    assert shape.weights == sum(p.numel() for p in timm.create_model(name, num_classes=100).parameters())


def test_a_shape_is_read_from_a_plain_vit_only():
    assert shape_of_backbone("vit_base_patch16_224") == MODELS["ViT-B/16"]
    assert shape_of_backbone("vit_base_patch16_224", 112).tokens == 7 * 7 + 1
    assert shape_of_backbone("test_convnext") is None


def test_products_are_counted_by_hand():
    tokens = 2 * 3  # three samples
    frozen = 4 * tokens * 128 + 14 * tokens * 2 * 4 + 2 * tokens * 4 * 3  # layers, attention, patch embedding
    step = count_step(TINY, "frozen", 3)
    assert step.products == frozen and step.half_products == 0
    assert count_step(TINY, "lora", 3, r=2).products == frozen + 6 * tokens * 2 * (20 + 28)
    assert count_step(TINY, "full", 3).products == frozen + 2 * tokens * 128 + 2 * tokens * 4 * 3
    assert count_step(TINY, "snella", 3).products == frozen + 2 * tokens * 128
    assert count_step(TINY, "snella-sample", 3).products == frozen + tokens * 128
    half = count_step(TINY, "snella-bf16-gradient", 3)
    assert (half.products, half.half_products) == (frozen, 2 * tokens * 128)


def test_checkpointed_blocks_repeat_the_forward_pass_and_save_their_inputs():
    once, twice = (count_step(TINY, "lora", 3, is_checkpointed=flag) for flag in (False, True))
    assert twice.products - once.products == 2 * 6 * 128 + 4 * 6 * 2 * 4
    deep = [count_step(replace(TINY, depth=depth), "snella", 3, is_checkpointed=True).kept for depth in (1, 2)]
    assert deep[1] - deep[0] == 4 * 6 * 4


def test_merging_costs_operations_and_bytes_per_entry():
    step = count_step(TINY, "snella", 3, r=8)
    assert step.merge_vector == 128 * 180 and step.merge_moved == 128 * (16 + 4 * 4)
    assert count_step(TINY, "snella", 3, r=10).merge_vector == 128 * 200
    gpu = count_step(TINY, "snella", 3, precision="bfloat16", kernels=TRITON)
    assert gpu.merge_moved == 128 * (35 + 6 * 2) and gpu.merge_serial == TRITON.serial * (4 + 4 + 8 + 4)
    assert gpu.merge_calls == 4 * TRITON.calls
    assert count_step(TINY, "lora", 3).merge_vector == 0


def test_saved_bytes_are_counted_by_hand():
    # per token: two inputs of norms, q, k, v, output of attention, input of the activation; 1 + 4 statistics
    base = 2 * 4 + 3 * 4 + 4 + 8 + 5
    ends, columns = 2 * 4, 3 * (3 * 4 + 4 + 4 + 8)
    assert count_step(TINY, "snella", 3).kept == 4 * (6 * (base + ends) + columns)
    # outputs of norms and activation, the images
    assert count_step(TINY, "full", 3).kept == 4 * (6 * (base + 2 * 4 + 8 + ends) + 3 * 6)
    # the first block's input needs no gradient
    assert count_step(TINY, "lora", 3, r=2).kept == 4 * (6 * (base + 2 * 4 + 8 + 2 * 4 + ends - 4))


def test_eight_bits_save_a_byte_and_a_sixteenth_per_number():
    one, two = (count_step(replace(TINY, depth=depth), "snella-compress", 8).kept for depth in (1, 2))
    # inputs of norms, q, k, v and the input of the activation; statistics and softmax columns stay in float32
    encoded, statistics, columns = 2 * 4 + 3 * 4 + 8, 1 + 4, 3 * (3 * 4 + 4 + 4 + 8)
    assert two - one == 16 * (encoded * 17 / 16 + 4 * statistics) + 4 * columns


def test_a_sparse_weight_gradient_costs_less_on_a_cpu_only():
    dense, sparse = (count_step(TINY, "snella", 3, sparsity=value).products for value in (0.7, 0.99))
    assert dense - sparse == pytest.approx(2 * 6 * 128 * (1 - SDDMM[0] - 0.01 * SDDMM[1]))
    gpu = [count_step(TINY, "snella", 3, sparsity=value, kernels=TRITON).products for value in (0.7, 0.99)]
    assert gpu[0] == gpu[1]


def test_constants_of_the_kernels_are_those_of_the_committed_rows():
    rows = {
        row["kernel"]: row
        for row in rows_of("triton_resources.jsonl")
        if (row["rank"], row["capability"], row["warps"]) == (8, 90, 4)
    }
    threads = 32 * 4
    tiled = ("merge and count, mix-k", "merge, mix-k", "softmax sums, mix-k", "factor gradients, mix-k")
    per_entry = sum(rows[name]["instructions"] for name in tiled) / (32 * 64 / threads)
    per_entry += 2 * rows["count within bin, soft"]["instructions"] / (4096 / threads)
    per_entry += 2 * rows["add sparse, soft"]["instructions"] / (2048 / threads)
    assert round(per_entry) == TRITON.operations
    assert 2 * rows["softmax statistics, mix-k"]["instructions"] / 64 == TRITON.serial


def test_the_line_of_the_sparse_gradient_fits_the_committed_rows():
    newest = [row for row in rows_of("results.jsonl") if row["benchmark"] == "sampled_gradient"][-16:]
    errors = sorted(
        abs((SDDMM[0] + SDDMM[1] * row["density"]) / row["sampled_over_dense"] - 1)
        for row in newest
        if row["shape"] == [3072, 768]
    )
    assert errors[-1] < 0.1


def test_seconds_add_on_a_cpu_and_overlap_with_launches_on_a_gpu():
    step = count_step(TINY, "snella", 3)
    rates = Rates(product=1e3, half_product=2e3, vector=1e2, memory=1e4, call_s=0.5)
    device = step.products / 1e3 + (step.vector + step.merge_vector) / 1e2 + (step.moved + step.merge_moved) / 1e4
    host = 0.5 * (step.calls + step.merge_calls)
    assert rates.seconds(step) == pytest.approx(device + host)
    assert replace(rates, overlaps=True).seconds(step) == pytest.approx(max(device, host))
    assert rates.merge_seconds(step) == pytest.approx(
        step.merge_vector / 1e2 + step.merge_moved / 1e4 + 0.5 * 4 * NUMBA.calls
    )


def test_a_range_holds_the_expected_value():
    snella, lora = (count_step(MODELS["ViT-B/16"], name, 16, precision="bfloat16") for name in ("snella", "lora"))
    low, expected, high = ratio_range("h100", snella, lora)
    assert low < expected < high
    low, expected, high = predict_on_gpu("h100", MODELS["ViT-B/16"], "snella", 64, dtype="bf16")
    assert low < expected < high
    assert gpu_rates("a100", is_float32=True).product == 0.5 * GPUS["a100"].vector


def test_communication_and_shards_are_counted_by_hand():
    step = count_step(TINY, "full", 3)
    assert step.communicated(4, "ddp") == 2 * 3 / 4 * 4 * TINY.weights
    assert step.communicated(4, "fsdp2") == 3 / 4 * (2 + 1) * 4 * TINY.weights
    wide = MODELS["ViT-B/16"]
    lora = count_step(wide, "lora", 3, precision="bfloat16")
    assert lora.communicated(4, "fsdp2") == 3 / 4 * (2 * lora.weights + 2 * 4 * lora.trainable)
    saved = lora.peak - lora.sharded_peak(4)
    assert saved == pytest.approx(3 / 4 * lora.weights - 2 * lora.block_weights)


def test_options_of_inspect_name_every_gpu():
    hint = get_type_hints(inspect)["device"]
    assert get_args(get_args(hint)[0]) == ("cpu", "cuda", *GPUS)


def test_bytes_of_committed_rows_are_within_three_percent():
    from cost_model import counted_cases, peak_cases

    for pairs in (counted_cases(), peak_cases()):
        assert len(pairs) > 15
        assert max(abs(predicted / recorded - 1) for predicted, recorded in pairs) < 0.03


def test_a_held_out_configuration_does_not_enter_its_rates():
    from cost_model import fit_rates, leave_one_out, predict, timed_cases

    cases = timed_cases()
    held_out = leave_one_out(cases)
    assert len(held_out) == len(cases) and {one.case.method for one in held_out} <= set(METHODS)
    one = held_out[0]
    rest = [c for c in cases if c.machine == one.case.machine and c.configuration != one.case.configuration]
    assert one.seconds == predict(fit_rates(rest), one.case)


def test_a_fit_recovers_the_rates_of_rows_that_follow_the_model():
    from cost_model import fit_rates, predict, timed_cases

    rates = Rates(product=1e11, half_product=2e11, vector=4e10, memory=1e10, call_s=1e-5)
    cases = [replace(case, row={**case.row, "step_s": predict(rates, case)}) for case in timed_cases()]
    fitted = fit_rates(cases)
    for name in ("product", "half_product", "vector", "memory", "call_s"):
        assert math.isclose(getattr(fitted, name), getattr(rates, name), rel_tol=1e-3)


def test_tokens_until_finds_the_smallest_batch():
    from cost_model import tokens_until

    assert tokens_until(TINY, lambda batch: batch >= 7) == 14
    assert tokens_until(TINY, lambda batch: False) is None


def test_the_page_shows_the_tables_of_the_committed_rows(tmp_path):
    from cost_model import PAGE, update_page

    copy = tmp_path / PAGE.name
    shutil.copy(PAGE, copy)
    assert not update_page(copy), "run: python benchmarks/cost_model.py"
    prose = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if not line.startswith(("|", "<!--"))]
    assert len(" ".join(prose).split()) <= 900


def test_figures_are_drawn(tmp_path):
    from cost_model import draw_errors, draw_ratios, leave_one_out, timed_cases

    assert draw_errors(leave_one_out(timed_cases()), tmp_path / "errors.svg").stat().st_size > 1000
    assert draw_ratios(tmp_path / "ratios.svg").stat().st_size > 1000
