"""Cost estimates from committed rows and step counts."""

import shutil
from pathlib import Path

import pytest
import timm
import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from snella import SnellaConfig
from snella_app.methods import build_method
from snella_app.training.memory import predict_step_memory
from snella_lab.bench.rows import read_rows
from snella_lab.comparison.experiment_files import read_experiment
from snella_lab.recipes.trainer import adapt_headless

ROOT = Path(__file__).parents[3]
ROWS = ROOT / "benchmarks" / "results.jsonl"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def make_row(batch, step_s, forward_s, **changes):
    row = {"benchmark": "step_time", "backbone": "vit_base_patch16_224", "method": "snella", "dtype": "float32"}
    row |= {"r": 8, "sparsity": 0.7, "rounds": 3, "device": "cpu, 2 threads", "batch": batch, "commit": "abc1234"}
    return row | {"step_s": step_s, "forward_s": forward_s, "dirty": False, "date": "2026-01-02T03:04:05"} | changes


def make_counted_step(**changes):
    from counted_step import CountedStep

    return CountedStep(
        **{"batch": 1, "adapted": 100, "forward_flop": 10, "training_flop": 30, "peak_bytes": 0} | changes
    )


def test_pages_and_experiments_match_the_committed_rows(tmp_path):
    from costs import update_costs

    for folder in ("docs", "experiments"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("images"))
    changed = [path.name for path in update_costs(ROWS, tmp_path)]
    assert not changed, f"{', '.join(changed)} differ from benchmarks/results.jsonl; run: python benchmarks/readme.py"


def test_speed_page_matches_the_committed_memory_rows(tmp_path):
    from step_memory import PAGE, ROWS, update_page

    copy = tmp_path / "speed.md"
    shutil.copy(PAGE, copy)
    assert not update_page(copy, ROWS), "run: python benchmarks/readme.py"


def test_extrapolation_from_two_depths_equals_the_full_model():
    from step_memory import count, count_full

    complete = count("gps", "vit_tiny_patch16_224", 2, None)
    extrapolated = count_full("gps", "vit_tiny_patch16_224", 2, (1, 2))
    assert extrapolated == complete


@pytest.mark.parametrize("args", ["--backbones vit_tiny_patch16_224", "--depths 1 2", "--batch 2"])
def test_other_settings_require_an_output_file(args, monkeypatch, tmp_path, capsys):
    import step_memory

    rows = tmp_path / "step_memory.jsonl"
    rows.write_text("{}\n")
    monkeypatch.setattr(step_memory, "ROWS", rows)
    monkeypatch.setattr(step_memory, "rows_of", lambda *_: [{"count": 1}])
    monkeypatch.setattr("sys.argv", ["step_memory.py", *args.split()])
    with pytest.raises(SystemExit):
        step_memory.main()
    assert rows.read_text() == "{}\n" and "--out is required" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["step_memory.py", *args.split(), "--out", str(tmp_path / "other.jsonl")])
    step_memory.main()
    assert rows.read_text() == "{}\n" and '{"count": 1}' in (tmp_path / "other.jsonl").read_text()


def test_adapted_layers_count_three_products_and_the_first_layer_two():
    from counted_step import count_step

    def build():
        config = SnellaConfig(r=2, target_modules=["0", "2"])
        return get_peft_model(nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4), nn.Linear(4, 3)), config)

    step = count_step(build, {"": torch.empty(5, 6, device="meta")})
    first, second, frozen = (2 * 5 * m * n for m, n in ((6, 10), (10, 4), (4, 3)))
    assert (step.batch, step.adapted) == (5, 100)
    assert step.forward_flop == first + second + frozen
    assert step.training_flop == 2 * first + 3 * second + 2 * frozen


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_memory_from_shapes_matches_a_real_forward_pass(name):
    from counted_step import count_step

    def build():
        return build_method("snella-8", timm.create_model(name, num_classes=5))

    side = timm.get_pretrained_cfg(name).input_size[-1]
    step = count_step(build, {"": torch.empty(16, 3, side, side, device="meta")})
    predicted = predict_step_memory(build(), (3, side, side), 16, device_type="cpu")
    assert step.peak_bytes == pytest.approx(predicted.total, rel=0.02)


def test_checkpointing_saves_block_inputs_and_one_block():
    from counted_step import count_step

    def bytes_of(blocks, checkpointed):
        config = LlamaConfig(
            vocab_size=7, hidden_size=8, intermediate_size=16, num_hidden_layers=blocks, num_attention_heads=2
        )
        tokens = torch.empty(3, 5, dtype=torch.long, device="meta")
        mask = torch.empty(3, 1, 5, 5, device="meta")
        inputs = {"input_ids": tokens, "attention_mask": mask, "use_cache": False}
        return count_step(
            lambda: adapt_headless("snella-8", LlamaForCausalLM(config), {}), inputs, checkpointed
        ).peak_bytes

    input_bytes = 3 * 5 * 8 * 4
    assert bytes_of(1, "layers") - bytes_of(1, "") == pytest.approx(input_bytes, abs=input_bytes)
    saved = [bytes_of(blocks, "") - bytes_of(blocks, "layers") for blocks in (3, 4, 5)]
    assert saved[0] > 4 * input_bytes
    assert saved[2] - saved[1] == saved[1] - saved[0] > 4 * input_bytes


def test_constants_are_fitted_through_two_rows():
    from estimates import row_speed

    rows = [make_row(4, 1.0 + 4 * 0.5, 0.4 + 4 * 0.1), make_row(16, 1.0 + 16 * 0.5, 0.4 + 16 * 0.1)]
    speed = row_speed(rows, make_counted_step())
    assert (speed.step.per_weight_s, speed.step.per_flop_s) == pytest.approx((1.0 / 100, 0.5 / 30))
    assert (speed.forward.per_weight_s, speed.forward.per_flop_s) == pytest.approx((0.4 / 100, 0.1 / 10))
    assert speed.device == "cpu, 2 threads"


def test_newest_row_with_enough_rounds_is_used():
    from estimates import row_speed

    rows = [make_row(4, 9.0, 3.0), make_row(16, 9.0, 3.0), make_row(4, 3.0, 1.0), make_row(4, 8.0, 2.0, rounds=2)]
    rows += [
        make_row(4, 8.0, 2.0, sparsity=0.99),
        make_row(4, 0.1, 0.1, device="NVIDIA"),
        make_row(4, 7.0, 2.0, method="lora"),
    ]
    assert row_speed(rows, make_counted_step()).step.per_flop_s == pytest.approx((9.0 - 3.0) / 12 / 30)


def test_missing_or_inconsistent_rows_are_rejected():
    from estimates import row_speed

    with pytest.raises(ValueError, match=r"at batch 4 and 16, got none at 16; run: python benchmarks/step_time.py"):
        row_speed([make_row(4, 3.0, 1.0), make_row(16, 9.0, 3.0, rounds=2)], make_counted_step())
    with pytest.raises(ValueError, match=r"one machine, got 'cpu, 2 threads' and 'cpu, 8 threads'"):
        row_speed([make_row(4, 3.0, 1.0), make_row(16, 9.0, 3.0, device="cpu, 8 threads")], make_counted_step())
    with pytest.raises(ValueError, match=r"step_s of rows at batch 4 and 16 must grow .* got 3.0 and 2.0 s"):
        row_speed([make_row(4, 3.0, 1.0), make_row(16, 2.0, 3.0)], make_counted_step())
    with pytest.raises(ValueError, match=r"forward_s of rows .* not faster, got 1.0 and 5.0 s"):
        row_speed([make_row(4, 3.0, 1.0), make_row(16, 9.0, 5.0)], make_counted_step())


def test_seconds_include_passes_flop_and_recomputation():
    from estimates import Line, RowSpeed, Workload, seconds

    speed = RowSpeed(step=Line(0.1, 0.001), forward=Line(0.01, 0.002), device="cpu")
    step, work = (
        make_counted_step(batch=2, forward_flop=20, training_flop=60),
        Workload(passes=5, trained=10, evaluated=7),
    )
    base_s = 5 * 0.1 * 100 + 10 * 30 * 0.001 + 7 * 10 * 0.002
    assert seconds(speed, step, work) == pytest.approx(base_s)
    assert seconds(speed, step, work, is_checkpointed=True) == pytest.approx(base_s + 5 * 0.01 * 100 + 10 * 10 * 0.002)


def test_workload_of_an_experiment_matches_its_file():
    from estimates import Workload, final_run, one_method

    vtab = read_experiment("table1-vtab")
    assert final_run(vtab) == Workload(19 * 100 * 32, 19 * 100_000, 387_904)
    fewest, most = one_method(vtab)
    assert (fewest.trained, most.trained) == (19 * 540_000, 19 * 620_000)
    assert fewest.evaluated == 3 * 387_904 + 3 * 19 * 100 * 200
    official, same = one_method(read_experiment("table1-vtab-official"))
    assert official == same
    assert official.trained == 7 * 100_000
    assert official.evaluated == 19 * (10_000 + 1_880 + 6_149 + 3_669 + 32_768 + 42_670 + 12_150)
    assert one_method(read_experiment("table1-fgvc-official"))[0].trained == 38_750 * 100


def test_file_without_a_cost_marker_is_rejected(tmp_path):
    from costs import with_cost

    with pytest.raises(ValueError, match=r"a.yaml must contain a line that starts with 'Estimated by"):
        with_cost("cost: >-\n  much\n", "", Path("a.yaml"))


@pytest.mark.parametrize(
    ("before", "indent", "after"),
    [("cost: >-\n  Counted.\n", "  ", "expected: >-\n"), ("# cost      3 epochs\n", "#           ", "# needs     a\n")],
)  # fmt: skip
def test_only_the_cost_of_an_experiment_is_replaced(before, indent, after):
    from costs import with_cost

    text = "Estimated by benchmarks/readme.py: " + "word " * 40
    content = f"{before}{indent}Estimated by benchmarks/readme.py:\n{after}"
    once = with_cost(content, text, Path("a.yaml"))
    assert once.startswith(before) and once.endswith(after) and once.count("word") == 40
    assert with_cost(once, text, Path("a.yaml")) == once
    assert with_cost(once, "Estimated by benchmarks/readme.py: x", Path("a")).count("word") == 0
    assert max(map(len, once.splitlines())) <= 120


def test_numbers_have_two_digits_and_readable_units():
    from estimates import flop_text, memory_text, time_text

    texts = [time_text(s) for s in (8.04, 660, 3600 * 22.2, 86400 * 2.84, 86400 * 93.4, 86400 * 289, 86400 * 840)]
    assert texts == ["8.0 s", "11 min", "22 hours", "2.8 days", "93 days", "290 days", "2.3 years"]
    assert flop_text(make_counted_step(batch=2, training_flop=209e9)) == "0.10 TFLOP"
    assert memory_text(make_counted_step(peak_bytes=10.2 * 2**30)) == "10 GiB"


def test_notes_mention_missing_gpu_rows_only_if_missing():
    from estimates import has_gpu_rows, notes_text, row_speed

    rows = read_rows(ROWS)
    speed = row_speed([make_row(4, 3.0, 1.0), make_row(16, 9.0, 3.0)], make_counted_step())
    assert not has_gpu_rows([make_row(4, 1, 1)]) and has_gpu_rows([*rows, {"device": "NVIDIA H100"}])
    notes = [" ".join(notes_text(speed, measured).split()) for measured in (False, True)]
    assert ["No GPU measurements" in text for text in notes] == [True, False]
