"""Instruction tuning through the command line, with a tiny random LLaMA."""

import json
import math
import shutil
import signal
import string
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from snella_app.cli.main import main
from snella_app.methods import load_trained
from snella_app.training.session import NonFiniteLossError, RunInUseError, TrainingInterrupted, lock_run
from snella_lab.recipes.instruct.config import EvaluateLanguageOptions, LanguageConfig, LanguageFolder
from snella_lab.recipes.instruct.evaluate import evaluate_language
from snella_lab.recipes.instruct.train import fine_tune, load_model, load_tokenizer
from snella_lab.recipes.trainer import RecipeTrainer

TINY = {
    "max_length": 64,
    "epochs": 2,
    "batch_size": 4,
    "accumulation": 2,
    "lr": 0.03,
    "scaling": 30.0,
    "warmup_steps": 0,
    "device": "cpu",
}


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """Save a LLaMA with two blocks and a character tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    letters = ["<pad>", "<s>", "</s>", "<unk>", "Ġ", "Ċ", *string.ascii_letters, *string.digits, *"#:.,?/"]
    ids = {letter: number for number, letter in enumerate(letters)}
    core = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    # weights large enough for distinct predictions with a frozen head
    config = LlamaConfig(
        vocab_size=len(letters), **sizes, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Write training entries and two benchmark tasks."""
    root = tmp_path_factory.mktemp("commonsense")
    entries = []
    for number in range(24):
        answer = ("true", "false")[number % 2]
        question = f"is {number} even?"
        output = f"the correct answer is {answer}"
        entries.append({"instruction": question, "input": "", "output": output, "answer": answer})
    (root / "train.json").write_text(json.dumps(entries))
    for task, pair in (("boolq", ("true", "false")), ("piqa", ("solution1", "solution2"))):
        (root / task).mkdir()
        test = [
            {**entry, "answer": pair[k % 2], "output": f"the correct answer is {pair[k % 2]}"}
            for k, entry in enumerate(entries[:5])
        ]
        (root / task / "test.json").write_text(json.dumps(test))
    return root


def evaluation(run, data, **options):
    return EvaluateLanguageOptions(run=str(run), data=str(data), device="cpu", **options)


@pytest.fixture
def settings(llama, data, tmp_path):
    base = {**TINY, "data": str(data / "train.json"), "model": str(llama), "out": str(tmp_path / "run")}
    return lambda **changes: LanguageConfig.from_flat(**{**base, **changes})


@pytest.fixture(scope="session")
def finished_run(llama, data, tmp_path_factory):
    """Train one run through the command line."""
    out = tmp_path_factory.mktemp("tuned") / "run"
    values = {**TINY, "data": data / "train.json", "model": llama, "out": out, "epochs": 6, "val_size": 4}
    args = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["language", *args]) == 0
    return out


def test_training_lowers_the_held_out_loss_and_reaches_the_target_budget(finished_run):
    history = json.loads((finished_run / "metrics.json").read_text())["loss_history"]
    held_out = [row["eval_loss"] for row in history if "eval_loss" in row]
    assert len(held_out) == 6 and held_out[-1] < 0.9 * held_out[0]
    allocation = json.loads((finished_run / "allocation.json").read_text())
    assert len(allocation["matrices"]) == 14
    assert sum(matrix["budget"] for matrix in allocation["matrices"]) == allocation["target_budget"]
    run = json.loads((finished_run / "run.json").read_text())
    assert (run["status"], run["task"], run["data"]["sizes"]) == ("finished", "language", {"train": 20, "val": 4})


def test_all_questions_are_answered_and_counted(finished_run, data, capsys):
    args = ["--data", str(data), "--max-new-tokens", "40", "--batch-size", "2", "--device", "cpu"]
    assert main(["evaluate-language", str(finished_run), *args]) == 0
    assert "mean of tasks" in capsys.readouterr().out
    result = json.loads((finished_run / "language.json").read_text())
    assert list(result["tasks"]) == ["boolq", "piqa"]
    for task, scores in result["tasks"].items():
        rows = [json.loads(line) for line in (finished_run / "answers" / f"{task}.jsonl").read_text().splitlines()[1:]]
        assert len(rows) == scores["questions"] == 5
        assert scores["right"] == sum(row["predicted"] == row["answer"] for row in rows)
        assert scores["accuracy"] == scores["right"] / 5
        assert scores["unanswered"] == sum(row["predicted"] == "" for row in rows)
    assert result["mean"] == sum(scores["accuracy"] for scores in result["tasks"].values()) / 2


def test_evaluation_resumes_after_a_truncated_line(finished_run, data, tmp_path):
    options = evaluation(finished_run, data, max_new_tokens=40, batch_size=2)
    first = evaluate_language(options)
    path = finished_run / "answers" / "boolq.jsonl"
    content = path.read_text()
    lines = content.splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:20])
    assert evaluate_language(options) == first
    assert path.read_text() == content
    settings_error = r"boolq.jsonl contains answers generated with different settings, .*'beams': 1.*--overwrite"
    with pytest.raises(FileExistsError, match=settings_error):
        evaluate_language(replace(options, beams=2))
    with pytest.raises(FileExistsError, match=r"answers generated with different settings, .*--overwrite"):
        evaluate_language(replace(options, model="other"))
    others = shutil.copytree(data, tmp_path / "others")
    entries = json.loads((others / "piqa" / "test.json").read_text())
    (others / "piqa" / "test.json").write_text(json.dumps(entries[1:]))
    with pytest.raises(FileExistsError, match=r"piqa.jsonl contains answers to different questions; .*--overwrite"):
        evaluate_language(replace(options, data=str(others)))
    entries[0]["instruction"] += " Answer with one word."
    (others / "piqa" / "test.json").write_text(json.dumps(entries))
    with pytest.raises(FileExistsError, match=r"piqa.jsonl contains answers to different questions; .*--overwrite"):
        evaluate_language(replace(options, data=str(others)))
    assert evaluate_language(replace(options, limit=2))["tasks"]["piqa"]["questions"] == 2
    assert json.loads((finished_run / "language.json").read_text()) == first
    shutil.rmtree(others / "piqa")
    assert list(evaluate_language(replace(options, data=str(others)))["tasks"]) == ["boolq"]
    assert json.loads((finished_run / "language.json").read_text()) == first
    with (
        lock_run(LanguageFolder(str(finished_run))),
        pytest.raises(RunInUseError, match="is locked by running process"),
    ):
        evaluate_language(options)


def test_a_changed_template_is_rejected(settings, data, tmp_path, monkeypatch):
    template = tmp_path / "template.txt"
    template.write_text("{instruction}\n")
    config = settings(template=str(template))

    def stop(*arguments, **options):
        signal.raise_signal(signal.SIGINT)
        return step(*arguments, **options)

    step = RecipeTrainer.training_step
    with monkeypatch.context() as patch, pytest.raises(TrainingInterrupted):
        patch.setattr(RecipeTrainer, "training_step", stop)
        fine_tune(config)
    template.write_text("{instruction} \n")
    message = r"template must be the file that .* was started with, but the content of .* has changed"
    with pytest.raises(ValueError, match=message):
        fine_tune(settings(template=str(template), resume=True))
    template.write_text("{instruction}\n")
    run = fine_tune(settings(template=str(template), resume=True))
    template.write_text("{instruction} \n")
    message = r"template must be the file that .* was trained with, but the content of .* has changed"
    with pytest.raises(ValueError, match=message):
        evaluate_language(evaluation(run.path, data))


def test_saved_adapter_reproduces_the_logits(finished_run, llama):
    loaded = [load_trained(finished_run / "adapter", load_model(str(llama))) for _ in range(2)]
    ids = torch.tensor([load_tokenizer(str(llama))("is 3 even?").input_ids])
    plain = load_model(str(llama)).eval()(ids).logits
    with torch.no_grad():
        first, second = (model(input_ids=ids).logits for model in loaded)
    assert torch.equal(first, second) and not torch.allclose(first, plain, atol=1e-3)


@pytest.mark.parametrize("method", ["snella", pytest.param("lora-2", marks=pytest.mark.slow)])
def test_interrupted_run_resumes_bit_identically(settings, tmp_path, method):
    scaling = {} if method == "snella" else {"scaling": None}
    uninterrupted = fine_tune(settings(method=method, **scaling))
    step = RecipeTrainer.training_step

    def step_and_interrupt(self, *arguments, **options):
        loss = step(self, *arguments, **options)
        if self.state.global_step == 1:
            signal.raise_signal(signal.SIGINT)
            RecipeTrainer.training_step = step
        return loss

    RecipeTrainer.training_step = step_and_interrupt
    try:
        with pytest.raises(
            TrainingInterrupted, match=r"checkpoint-2; resume with: snella language --out .*cut --resume"
        ):
            fine_tune(settings(method=method, **scaling, out=str(tmp_path / "cut")))
    finally:
        RecipeTrainer.training_step = step
    run = fine_tune(LanguageConfig.from_flat(out=str(tmp_path / "cut"), resume=True))
    first, second = (load_file(each.adapter / "adapter_model.safetensors") for each in (uninterrupted, run))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_full_fine_tuning_runs(settings):
    changes = dict(learn_prompt=True, precision="bf16", gradient_checkpointing=True)
    run = fine_tune(settings(method="full", scaling=None, epochs=1, lr=1e-3, **changes))
    assert (run.adapter / "trainable.safetensors").is_file()


def test_entries_with_too_long_prompts_are_skipped_and_counted(settings, tmp_path):
    with pytest.raises(
        ValueError, match=r"more entries than val_size=0, got 0 usable entries of 24 in .*at least max_length=16"
    ):
        fine_tune(settings(max_length=16))
    with pytest.raises(ValueError, match=r"more entries than val_size=24, got 24 usable entries of 24"):
        fine_tune(settings(val_size=24))
    long = tmp_path / "long.json"
    entry = {"instruction": "why?", "output": "the correct answer is true", "answer": "true"}
    long.write_text(json.dumps([entry, entry, {**entry, "instruction": "why? " * 30}]))
    run = fine_tune(settings(data=str(long), epochs=1))
    notes = json.loads((run.path / "run.json").read_text())["data"]["notes"]
    assert notes == ["skipped entries with a prompt of at least max_length=64 tokens: 1"]


def test_nonfinite_gradient_ends_the_run_before_the_update(settings, monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator.clip_grad_norm_", lambda *args, **options: torch.tensor(math.inf))
    with pytest.raises(
        NonFiniteLossError, match=r"the gradient became inf in step 1 of 6; no checkpoint has been written yet"
    ):
        fine_tune(settings())


def test_nonfinite_loss_ends_the_run(settings, tmp_path):
    with pytest.raises(NonFiniteLossError, match=r"became (nan|inf) in step \d of 6; .*lower --lr \(now 1e\+30\)"):
        fine_tune(settings(method="full", scaling=None, lr=1e30, max_grad_norm=0.0))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def test_invalid_numbers_and_runs_are_rejected(finished_run, data, tmp_path):
    with pytest.raises(ValueError, match="beams must be at least 1, got 0; limit must be at least 1, got 0"):
        evaluation(finished_run, data, beams=0, limit=0)
    shutil.copy(Path(__file__).parents[3] / "old_files" / "run" / "run.json", tmp_path)
    with pytest.raises(
        ValueError, match=r"be a run folder created by `snella language`, got .*, a run of another task"
    ):
        evaluate_language(evaluation(tmp_path, data))


def test_resumed_run_requires_the_original_data(settings, tmp_path, data):
    copy = tmp_path / "copy.json"
    copy.write_text((data / "train.json").read_text())
    run = fine_tune(settings(data=str(copy), epochs=1))
    run.update("interrupted")
    copy.write_text(json.dumps(json.loads(copy.read_text())[:-1]))
    with pytest.raises(ValueError, match=r"the file that .*run was started with, but the content of .*copy.json has"):
        fine_tune(LanguageConfig.from_flat(out=str(run.path), resume=True))


def test_inspect_shows_the_language_results(finished_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    tasks = {"boolq": {"accuracy": 0.5}, "piqa": {"accuracy": 1.0}}
    (run / "language.json").write_text(json.dumps({"format": 1, "tasks": tasks, "mean": 0.75}))
    page = run / "report.html"
    assert main(["inspect", str(run)]) == 0
    text = " ".join(capsys.readouterr().out.replace("\N{NO-BREAK SPACE}", " ").split())
    losses = [row for row in json.loads((run / "metrics.json").read_text())["loss_history"] if "eval_loss" in row]
    for expected in (
        "20 instructions, 4 held out",
        "steps 18 (6 epochs) in",
        f"{losses[-1]['eval_loss']:.4f} on held-out entries",
        "accuracy 75.0%, the mean of boolq 50.0%, piqa 100.0%",
        "adapted weights (30",
    ):
        assert expected in text, expected
    assert "classes" not in text
    assert main(["inspect", str(run), "--report"]) != 0 and not page.exists()
    assert "got a 'language' run; snella evaluate-language uses it" in capsys.readouterr().err
