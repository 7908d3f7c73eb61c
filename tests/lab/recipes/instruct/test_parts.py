from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

from snella_lab.recipes.instruct.config import LanguageConfig
from snella_lab.recipes.instruct.data import (
    CHOICES,
    Instruction,
    Template,
    encode,
    extract_answer,
)
from snella_lab.recipes.instruct.evaluate import _row, _scores
from snella_lab.recipes.instruct.train import load_model


class Letters:
    """Character tokenizer with start token 1 and end token 2."""

    eos_token_id = 2

    def __call__(self, text, add_special_tokens=True):
        ids = [ord(letter) for letter in text]
        return type("Encoding", (), {"input_ids": [1, *ids] if add_special_tokens else ids})


@pytest.mark.parametrize(
    ("task", "text", "answer"),
    [
        ("boolq", "the correct answer is false", "false"),
        ("boolq", "true, since false is wrong", "true"),
        ("piqa", "the correct answer is solution2.", "solution2"),
        ("social_i_qa", "answer3", "answer3"),
        ("hellaswag", "I take ending4 or ending1", "ending4"),
        ("winogrande", "the correct answer is option1</s>", "option1"),
        ("ARC-Easy", "answer5", "answer5"),
        ("ARC-Challenge", "the correct answer is B", ""),
        ("openbookqa", "Answer1", ""),
        ("piqa", "answer1", ""),
    ],
)
def test_first_choice_in_the_text_is_the_answer(task, text, answer):
    assert extract_answer(task, text) == answer


def test_correct_wrong_and_missing_answers_are_counted():
    entry = Instruction("is it?", "", "the correct answer is true", "true")
    rows = [_row("boolq", entry, text) for text in ("it is true", "false, not true", "who knows", "true")]
    assert [row["predicted"] for row in rows] == ["true", "false", "", "true"]
    assert _scores(rows) == {"accuracy": 0.5, "right": 2, "questions": 4, "unanswered": 1}


def test_benchmark_has_eight_tasks():
    assert len(CHOICES) == 8 and CHOICES["openbookqa"][-1] == "answer5"


def test_labels_exclude_the_prompt_unless_learn_prompt_is_set():
    encoded = encode(Letters(), "ab", "cd", 10, learn_prompt=False)
    assert encoded == {"input_ids": [1, 97, 98, 99, 100, 2], "labels": [-100, -100, -100, 99, 100, 2]}
    assert encode(Letters(), "ab", "cd", 10, learn_prompt=True)["labels"] == encoded["input_ids"]
    truncated = encode(Letters(), "ab", "cd", 4, learn_prompt=False)
    assert truncated == {"input_ids": [1, 97, 98, 99], "labels": [-100, -100, -100, 99]}


def test_template_ignores_braces_in_instruction_and_input(tmp_path):
    entry = Instruction("what is {input}?", "{instruction}", "x", "x")
    assert Template().fill(entry) == (
        "### Instruction:\nwhat is {input}?\n\n### Input:\n{instruction}\n\n### Response:\n"
    )
    path = tmp_path / "template.txt"
    path.write_text("Q: {instruction} | {input} A:")
    assert Template(path).fill(entry) == "Q: what is {input}? | {instruction} A:"
    path.write_text("Q: {instruction} A:")
    assert Template(path).fill(entry) == "Q: what is {input}?\n{instruction} A:"
    assert Template(path).fill(Instruction("why?", "", "x", "x")) == "Q: why? A:"
    path.write_text("{input}. Q: {instruction} Again: {instruction} A:")
    assert Template(path).fill(entry) == "{instruction}. Q: what is {input}? Again: what is {input}? A:"
    path.write_text("Q:")
    with pytest.raises(ValueError, match=r"template '.*template.txt' has no placeholder \{instruction\}"):
        Template(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0, "max_length": 1}, "max_length must be at least 2, got 1; epochs must be at least 1, got 0"),
        ({"lr": float("nan")}, "lr must be at least 0 and finite, got nan"),
        ({"base": "fp16"}, "base must be one of fp32, bf16, got 'fp16'"),
        ({"method": "linear"}, "method must be one of full, lora, dora, snella, snell for language, got 'linear'"),
        ({"method": "lorra"}, "got 'lorra'; nearest: lora"),
        ({"r": 3}, "r must be divisible by num_pieces=2, got r=3"),
        ({"resume": True, "overwrite": True}, "resume and overwrite are mutually exclusive, got both"),
        (
            {"data": None, "model": None, "out": None},
            "missing required settings: data, model, out, e.g. data='.*' model='.*' out='.*'$",
        ),
        ({"template": "gone.txt"}, "template must be an existing text file, got 'gone.txt'"),
        ({"r": 8, "method_options": {"r": 4}}, "r set both directly and in method_options; set only one"),
        (
            {"method": "lora", "scalar_lr": 1e-4},
            "scalar_lr applies to methods with scalar kernel parameters .*snella and snell.*, got 0.0001",
        ),
    ],
)
def test_setting_errors_contain_the_values(changes, message):
    with pytest.raises(ValueError, match=message):
        LanguageConfig.from_flat(**{"data": "d.json", "model": "m", "out": "o", **changes})


def test_missing_model_is_reported(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"model must be .*, got '.*', which has no AutoModelForCausalLM: "):
        load_model(str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConnectionError, match=r"model must be .*, got 'nobody/llama': it is not cached, and the hub is unreachable"
    ):
        load_model("nobody/llama")


def test_table_xviii_experiment_has_valid_settings():
    path = Path(__file__).parents[4] / "experiments" / "language" / "table18.yaml"
    settings = LanguageConfig.from_flat(**yaml.safe_load(path.read_text()), out="runs/llama").resolved()
    assert (settings.epochs, settings.optim.batch_size * settings.optim.accumulation, settings.max_length) == (
        3,
        16,
        256,
    )
