import json

import pytest

from snella_lab.recipes.instruct.data import Instruction, read_benchmark, read_instructions

ENTRY = {"instruction": "Is it wet? true/false", "input": "", "output": "the correct answer is true", "answer": "true"}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_input_is_optional(tmp_path):
    entries = [ENTRY, {**ENTRY, "input": "rain", "answer": "false"}, {k: v for k, v in ENTRY.items() if k != "input"}]
    instructions = read_instructions(write(tmp_path / "data.json", entries))
    assert instructions[0] == Instruction(ENTRY["instruction"], "", "the correct answer is true", "true")
    assert [entry.input for entry in instructions] == ["", "rain", ""]


def test_benchmark_reads_the_tasks_in_the_folder(tmp_path):
    write(tmp_path / "boolq" / "test.json", [ENTRY])
    write(tmp_path / "other" / "test.json", [ENTRY])
    assert list(read_benchmark(tmp_path)) == ["boolq"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not readable JSON"),
        ({"a": 1}, "must contain a list of objects with instruction, output and answer, got dict"),
        ([], "got an empty list"),
        ([ENTRY, 3], r"1 of 2 entries in .* are invalid: entry 1: must be an object, got int"),
        (
            [{**ENTRY, "output": " "}, {**ENTRY, "instruction": 5}],
            "entry 0: output must be a non-empty string, got ' ', entry 1: ins",
        ),
        ([{**ENTRY, "input": 7}], "input must be a string, got 7"),
        ([{"instruction": "a", "output": "b"}], "answer is missing"),
    ],
)
def test_invalid_file_is_rejected(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_instructions(write(tmp_path / "data.json", content))


def test_invalid_answer_is_rejected(tmp_path):
    write(tmp_path / "boolq" / "test.json", [{**ENTRY, "answer": "maybe"}])
    with pytest.raises(ValueError, match=r"entry 0: answer must be one of true, false, got 'maybe'"):
        read_benchmark(tmp_path)


def test_missing_path_suggests_existing_ones(tmp_path):
    write(tmp_path / "commonsense_170k.json", [ENTRY])
    with pytest.raises(FileNotFoundError, match=r"got '.*common_170k.json'; nearest: 'commonsense_170k.json'"):
        read_instructions(tmp_path / "common_170k.json")
    with pytest.raises(FileNotFoundError, match=r"got '.*no/data.json'; there is no folder"):
        read_instructions(tmp_path / "no" / "data.json")
    with pytest.raises(FileNotFoundError, match=r"must be a folder with TASK/test.json, got '.*nowhere'"):
        read_benchmark(tmp_path / "nowhere")
    write(tmp_path / "BoolQ" / "test.json", [ENTRY])
    with pytest.raises(FileNotFoundError, match=r"one of boolq/test.json, piqa/test.json, .*, got folders: BoolQ"):
        read_benchmark(tmp_path)


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps([ENTRY]), encoding="utf-8-sig")
    assert len(read_instructions(tmp_path / "data.json")) == 1
