"""`snella bench` on tiny models: measurements, rows, tables and errors."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from snella.backends.numba import backend as numba_backend
from snella.layer import SnellaLayer
from snella_app.cli.main import main
from snella_app.training import memory
from snella_app.training.memory import peak_rss_mib, record_forward
from snella_lab.bench.baselines import BASELINES, NUM_CLASSES, RecomputedInputs, Workload, random_batch
from snella_lab.bench.bench import BenchConfig, Runner, bench, grid, peak_of_child, ratio_fields
from snella_lab.bench.reference import op_error
from snella_lab.bench.rows import append_rows, draw_figures, read_rows
from snella_lab.provenance import conditions

SAVING = ["lora", "snella", "snella-keep-delta"]
TINY = Workload("test_vit", r=4, sparsity=0.5)
QUIET = Console(quiet=True)

# PEFT's SHiRA creates sparse tensors without setting the invariant checks
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")


@pytest.mark.filterwarnings("ignore:this processor has no bfloat16 instructions")
@pytest.mark.parametrize("name", [name for name in BASELINES if "compiled" not in name and "triton" not in name])
def test_every_baseline_takes_a_step(name):
    runner, (images, labels) = Runner(name, TINY), random_batch(TINY, 2)
    assert runner.has_finite_gradients(images, labels)
    time = runner.step(images, labels)
    assert 0 < time.forward_s + time.backward_s < time.step_s


def test_unfused_reference_equals_the_fused_op():
    images, _ = random_batch(TINY, 2)
    results = []
    for name in ("snella", "paper"):
        model = Runner(name, TINY).model.train()
        y = model(images)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    fused, unfused = results
    # the quantile lies within one rank of the exact threshold
    torch.testing.assert_close(unfused[0], fused[0], rtol=1e-3, atol=1e-4)
    assert len(unfused) == len(fused)


def test_rows_contain_medians_ratios_and_provenance(tmp_path):
    config = BenchConfig(
        ["test_vit"], [2, 3], ["lora", "snella"], r=[4], rounds=3, out=str(tmp_path / "a" / "rows.jsonl"),
        figures=str(tmp_path / "pictures"),
    )  # fmt: skip
    rows = bench(config, QUIET)
    assert read_rows(config.out) == json.loads(json.dumps(rows))
    assert [(row["method"], row["batch"]) for row in rows] == [
        ("lora", 2), ("snella", 2), ("lora", 3), ("snella", 3)
    ]  # fmt: skip
    lora, snella, *_ = rows
    assert lora["step_over_lora"] == 1.0
    assert snella["step_over_lora"] > 0
    assert snella["saved_mib"] <= lora["saved_mib"]
    assert lora["device"].startswith("cpu, ")
    assert {"torch", "peft", "timm"} <= set(lora["versions"])
    assert {"command", "commit", "dirty", "date"} <= set(lora)
    (figure,) = (tmp_path / "pictures").iterdir()
    assert re.fullmatch(r"time-test_vit-float32-r4-sparsity0\.7-cpu-1-threads-[a-z0-9-]+\.svg", figure.name)


def test_method_with_a_wrong_op_is_not_timed(monkeypatch, capsys):
    original = numba_backend.select_threshold
    monkeypatch.setattr(numba_backend, "select_threshold", lambda *args: original(*args) * 1.5)
    assert re.fullmatch(
        r"[\w =]+ \[\d+, \d+\] \w+ differs from the reference by \S+ times the tolerance", op_error("numba")
    )
    methods = ["lora", "snella", "snella-sample", "klora", "snella-eager", "snella-reference"]
    rows = bench(BenchConfig(["test_vit"], [2], methods, r=[4], rounds=1), Console(width=200))
    assert [row["method"] for row in rows] == ["lora", "snella-eager", "snella-reference"]
    text = capsys.readouterr().out
    for name in ("snella", "snella-sample", "klora"):
        assert re.search(rf"skipped {name}: [\w =]+ \[\d+, \d+\] \w+ differs from the reference", text)


def test_method_that_does_not_fit_into_memory_is_not_timed(monkeypatch, capsys):
    def build(model, workload):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setitem(BASELINES, "dora", build)
    rows = bench(BenchConfig(["test_vit"], [2], ["lora", "dora", "full"], rounds=1), Console(width=200))
    assert [row["method"] for row in rows] == ["lora", "full"]
    assert "skipped dora: CUDA out of memory" in capsys.readouterr().out


def test_models_with_other_classifier_names_can_be_frozen():
    rows = bench(BenchConfig(["resnet18"], [2], ["frozen"], rounds=0), QUIET)
    assert rows[0]["trainable"] == 512 * NUM_CLASSES + NUM_CLASSES


def test_method_with_nonfinite_gradients_is_not_timed(monkeypatch, capsys):
    build = BASELINES["lora"]

    def broken(model, workload):
        model = build(model, workload)
        next(p for p in model.parameters() if p.requires_grad).data.fill_(torch.nan)
        return model

    monkeypatch.setitem(BASELINES, "lora", broken)
    assert bench(BenchConfig(["test_vit"], [2], ["lora"], rounds=1), Console()) == []
    assert "skipped lora: its gradients are not finite" in capsys.readouterr().out


MIB = 2**18  # values of float32


def allocate(name, before_mib, after_mib):
    """Allocate memory, read the peak, and allocate more."""
    tensors = [torch.ones(before_mib * MIB)]
    before = peak_rss_mib()
    tensors.append(torch.ones(after_mib * MIB))
    return before


def test_peak_of_child_excludes_the_memory_of_the_parent():
    parent = torch.ones(1000 * MIB)  # more than the child uses
    small, large = (peak_of_child(allocate, "allocate", 10, size) for size in (40, 140))
    assert small["peak_step_mib"] == pytest.approx(40, abs=15)
    assert large["peak_step_mib"] == pytest.approx(140, abs=15)
    assert large["peak_rss_mib"] - small["peak_rss_mib"] == pytest.approx(100, abs=30)
    assert large["peak_rss_mib"] < len(parent) / MIB


def exit_immediately(name):
    sys.exit(3)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_child_that_exits_without_a_result_raises():
    with pytest.raises(RuntimeError, match="memory measurement of 'lora' failed with exit code 3"):
        peak_of_child(exit_immediately, "lora")


@pytest.mark.slow
def test_peak_memory_differs_between_methods():
    backbone = "vit_tiny_patch16_224"
    config = BenchConfig([backbone], [8], ["frozen", "full"], rounds=1, memory=True)
    frozen, full = bench(config, QUIET)
    difference_mib = full["saved_mib"] - frozen["saved_mib"]
    assert frozen["peak_step_mib"] > frozen["saved_mib"] / 2
    assert full["peak_rss_mib"] - frozen["peak_rss_mib"] > difference_mib / 2 > 20


def test_peak_is_read_from_proc_status_if_available(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    by_usage = peak_rss_mib()
    assert by_usage > 100
    (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t    2048 kB\n")
    assert peak_rss_mib() == 2.0


def test_unavailable_device_is_a_one_line_error(capsys):
    assert main(["bench", "--device", "cuda:77", "--backbones", "test_vit"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("snella: --device cuda:77 is not available: ") and error.count("\n") == 1
    assert main(["bench", "--device", "cudda", "--backbones", "test_vit"]) == 2
    assert "--device must be auto or a torch device such as cpu, " in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests the error without a GPU")
def test_table_16_without_a_gpu_is_a_one_line_error(capsys):
    file = Path(__file__).parents[3] / "experiments" / "paper" / "table16.yaml"
    assert main(["bench", "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("snella: --device cuda is not available: torch ") and error.endswith("no GPU; use auto\n")


def test_all_configuration_errors_are_reported_together():
    with pytest.raises(ValueError, match=r"batch must be at least 1, got 0; r must be at least 1, got 0") as caught:
        BenchConfig(["vit_bse"], [0], ["lorra"], [0], [1.0], ["fp8"], rounds=-1, figures="here")
    for text in (
        "sparsity must be in [0, 1), got 1.0", "methods must be among", "got 'lorra'", "dtype must be among fp32, bf16",
        "got 'fp8'", "timm names, got 'vit_bse'", "rounds must not be negative, got -1",
        "got figures='here' without out",
    ):  # fmt: skip
        assert text in str(caught.value)


def test_grid_contains_all_settings_and_methods():
    config = grid()
    assert len(config.settings()) == 4 * 4 * 2 * 4 * 2
    baselines = {"frozen", "lora", "dora", "shira", "full", "gps", "klora", "spt-lora", "spt-adapter", "snell"}
    assert baselines | {"snella", "snella-keep-delta", "paper"} == set(config.methods)


def test_grid_command_uses_rounds_and_figures(monkeypatch):
    configs = []
    monkeypatch.setattr("snella_lab.bench.bench.bench", configs.append)
    assert main(["bench", "--grid", "--rounds", "2", "--out", "rows.jsonl", "--figures", "figures"]) == 0
    assert configs == [replace(grid(out="rows.jsonl"), rounds=2, figures="figures")]


def test_grid_command_rejects_the_axes_of_the_grid(capsys):
    assert main(["bench", "--grid", "--batch", "4", "--methods", "lora"]) == 2
    assert "grid sets batch, methods itself; leave them out, or leave out grid" in capsys.readouterr().err


def test_only_keep_delta_saves_the_effective_weight():
    rows = {row["method"]: row for row in bench(BenchConfig(["test_vit"], [2], SAVING, r=[4], rounds=0), QUIET)}
    adapted = sum(
        module.get_base_layer().weight.numel()
        for name, module in Runner("snella", TINY).model.named_modules()
        if isinstance(module, SnellaLayer)
    )
    difference_mib = rows["snella-keep-delta"]["saved_mib"] - rows["snella"]["saved_mib"]
    assert difference_mib == pytest.approx(4 * adapted / 2**20, abs=0.11)  # both values are rounded to 0.1
    assert {row["benchmark"] for row in rows.values()} == {"kept_bytes"} and "step_s" not in rows["snella"]
    assert rows["snella"]["saved_mib"] < rows["lora"]["saved_mib"]
    with pytest.raises(ValueError, match="memory requires timed steps, got rounds=0"):
        BenchConfig(["test_vit"], [2], SAVING, rounds=0, memory=True)


@pytest.mark.parametrize("method", ["lora", "full", "gps", "spt-lora", "spt-adapter"])
def test_recomputed_inputs_are_bit_identical_and_save_memory(method):
    results = []
    for name in (method, f"{method}-recompute"):
        model = Runner(name, TINY).model
        torch.manual_seed(1)
        images, _ = random_batch(TINY, 3)
        saved_bytes = record_forward(model, images).saved_bytes
        y = model(images)
        y.square().sum().backward()
        results.append((saved_bytes, [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]))
    (all_bytes, expected), (fewer_bytes, values) = results
    assert fewer_bytes < 0.75 * all_bytes
    assert len(values) == len(expected) > 2
    assert all(torch.equal(actual, reference) for actual, reference in zip(values, expected, strict=True))


def test_lora_with_recomputed_inputs_saves_as_much_as_snella():
    images, _ = random_batch(TINY, 3)
    saved_bytes = {
        name: record_forward(Runner(name, TINY).model, images).saved_bytes for name in ("lora-recompute", "snella")
    }
    assert saved_bytes["lora-recompute"] == pytest.approx(saved_bytes["snella"], rel=0.01)


def test_outputs_modified_in_place_are_saved():
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    model[1].register_forward_hook(lambda module, inputs, output: output.mul_(2))
    x = torch.randn(3, 4)
    model(x).sum().backward()
    expected = model[2].weight.grad.clone()
    model.zero_grad()
    RecomputedInputs(model)
    model(x).sum().backward()
    assert torch.equal(model[2].weight.grad, expected)


def test_ratios_have_a_median_and_quartiles():
    assert ratio_fields("a", [4.0], [2.0]) == {"step_over_a": 2.0, "step_over_a_quartiles": [2.0, 2.0]}
    fields = ratio_fields("a", [1.0, 2.0, 3.0, 4.0], [1.0] * 4)
    assert fields == {"step_over_a": 2.5, "step_over_a_quartiles": [1.75, 3.25]}


def test_truncated_last_line_is_skipped_and_a_damaged_line_raises(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_rows(path, [{"a": 1}, {"a": 2}])
    path.write_text(path.read_text() + '{"a": ')
    assert read_rows(path) == [{"a": 1}, {"a": 2}]
    append_rows(path, [{"a": 3}])
    assert read_rows(path) == [{"a": 1}, {"a": 2}, {"a": 3}]
    path.write_text('{"a": 1}')
    append_rows(path, [{"a": 2}])
    assert read_rows(path) == [{"a": 1}, {"a": 2}]
    path.write_text('{"a": \n{"a": 2}\n')
    with pytest.raises(ValueError, match=r"line 1 of .*rows.jsonl is damaged"):
        read_rows(path)


def test_memory_is_drawn_versus_model_size(tmp_path, monkeypatch):
    rows = [
        {"benchmark": "step_time", "method": name, "backbone": backbone, "r": 8, "sparsity": 0.7, "dtype": "float32",
         "batch": 4, "device": "cpu, 2 threads", "weights": weights, "step_s": 1.0, "saved_mib": weights / 1e5,
         "trainable": 1000, "date": f"2026-01-02T0{5 - rounds}:00", "rounds": rounds, **memory}
        for name in ("lora", "snella") for backbone, weights in (("small", 22e6), ("base", 86e6))
        for rounds, memory in ((3, {"peak_step_mib": 50.0} if name == "lora" else {}), (2, {"peak_step_mib": 9.0}))
    ]  # fmt: skip
    append_rows(tmp_path / "rows.jsonl", rows)
    drawn = []
    monkeypatch.setattr("snella_lab.bench.rows._draw_lines", lambda path, *drawing: drawn.append(drawing) or path)
    assert [path.name for path in draw_figures(tmp_path / "rows.jsonl", tmp_path)] == [
        "memory-batch4-float32-r8-sparsity0.7-cpu-2-threads.svg"
    ]
    ((part, _, quantity, _, _, label),) = drawn
    # the run with the most rounds, and a quantity that all of its methods have
    assert {row["rounds"] for row in part} == {3} and (quantity, label) == ("counted_mib", "estimated memory (MiB)")


@pytest.mark.parametrize("out", [["--out", "elsewhere/rows.jsonl"], ["--out=elsewhere/rows.jsonl"]])
def test_command_in_a_row_excludes_the_output_path(out, monkeypatch):
    monkeypatch.setattr("sys.argv", ["benchmarks/step_time.py", "--rounds", "2", *out, "--r", "8"])
    assert conditions("cpu")["command"] == "step_time.py --rounds 2 --r 8"


def test_command_in_a_row_excludes_folders_of_absolute_paths(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/a/bench.py", "--root", "/home/me/folders", "--cache=/b/c", "--options", "1/2"])
    assert conditions("cpu")["command"] == "bench.py --root folders --cache=c --options 1/2"


def test_conditions_omit_modules_without_package_metadata(tmp_path, monkeypatch):
    (tmp_path / "module_of_no_package.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert list(conditions("cpu", ("module_of_no_package", "torch"))["versions"]) == ["torch"]


def test_conditions_contain_the_device():
    assert conditions("cpu")["device"].startswith("cpu, 1 threads, ")


def test_command_line_accepts_comma_separated_lists(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    args = ["bench", "--backbones", "test_vit", "--batch", "1,2", "--methods", "lora", "--rounds", "1"]
    assert main([*args, "--out", str(out)]) == 0
    assert [row["batch"] for row in read_rows(out)] == [1, 2]
    assert main([*args[:3], "--batch", "a,b"]) != 0
    assert "--batch must be integers separated by commas, e.g. 4,16; got 'a,b'" in capsys.readouterr().err
    assert main([*args[:3], "--batch", ","]) != 0
    assert "--batch must contain at least one item, got ','" in capsys.readouterr().err


def test_workload_weights_are_deterministic():
    first, second = TINY.base(), replace(TINY, r=8).base()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_conditions_name_other_devices_and_do_not_call_an_unknown_state_clean(monkeypatch):
    monkeypatch.setattr("snella_lab.provenance.git_state", lambda: ("0123456789", None))
    assert conditions("mps")["device"] == "mps" and conditions("cpu")["dirty"]
    monkeypatch.setattr("snella_lab.provenance.git_state", lambda: (None, None))
    assert not conditions("cpu")["dirty"]
