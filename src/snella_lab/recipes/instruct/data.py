"""Instruction data in the JSON format of the commonsense benchmark (eight tasks with multiple-choice questions)."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snella_app.files import expand_user
from snella_app.text import listed, similar_paths

IGNORED = -100
"""Label of tokens that do not contribute to the loss, as in PyTorch's cross-entropy."""
_TEST_FILE = "test.json"
_WITHOUT_INPUT = "### Instruction:\n{instruction}\n\n### Response:\n"
_WITH_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
_PLACEHOLDER = re.compile(r"\{(?:instruction|input)\}")
_NUMBERED = tuple(f"answer{number}" for number in range(1, 6))
CHOICES: dict[str, tuple[str, ...]] = {
    "boolq": ("true", "false"),
    "piqa": ("solution1", "solution2"),
    "social_i_qa": _NUMBERED,
    "hellaswag": ("ending1", "ending2", "ending3", "ending4"),
    "winogrande": ("option1", "option2"),
    "ARC-Easy": _NUMBERED,
    "ARC-Challenge": _NUMBERED,
    "openbookqa": _NUMBERED,
}
"""Answer choices by task. Tasks have the names of the benchmark's folders."""


def extract_answer(task: str, text: str) -> str:
    """Return the first answer choice in a text, or an empty string if there is none.

    Args:
        task: Key of `CHOICES`.
        text: Generated text.
    """
    match = re.search("|".join(map(re.escape, CHOICES[task])), text)
    return "" if match is None else match[0]


@dataclass(frozen=True)
class Instruction:
    """An entry of an instruction file.

    Attributes:
        instruction: Question with answer choices.
        input: Optional context, which is usually empty.
        output: Target response, e.g. "the correct answer is true".
        answer: Correct choice, e.g. "true".
    """

    instruction: str
    input: str
    output: str
    answer: str


def read_instructions(path: str | Path, choices: tuple[str, ...] | None = None) -> list[Instruction]:
    """Read an instruction file, e.g. `commonsense_170k.json`.

    Args:
        path: JSON file that contains a list of objects with `instruction`, `output`, `answer`, and optionally `input`.
        choices: Allowed values of `answer`. None allows any.

    Raises:
        FileNotFoundError: If the file does not exist. The message suggests similar names.
        ValueError: If the file does not contain a nonempty JSON list, or if entries are invalid. The message counts the
            invalid entries and lists the first ones.
    """
    file = expand_user(path)
    if not file.is_file():
        raise FileNotFoundError(f"data must be a JSON file of instructions, got '{path}'{similar_paths(file)}")
    try:
        entries = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"'{file}' is not readable JSON: {error}") from None
    if not isinstance(entries, list) or not entries:
        content = "an empty list" if entries == [] else type(entries).__name__
        raise ValueError(f"'{file}' must contain a list of objects with instruction, output and answer, got {content}")
    messages = (_error(entry, choices) for entry in entries)
    errors = [f"entry {number}: {message}" for number, message in enumerate(messages) if message]
    if errors:
        raise ValueError(f"{len(errors)} of {len(entries)} entries in '{file}' are invalid: {listed(errors)}")
    return [
        Instruction(entry["instruction"], entry.get("input") or "", entry["output"], str(entry["answer"]))
        for entry in entries
    ]


def read_benchmark(folder: str | Path) -> dict[str, list[Instruction]]:
    """Read `FOLDER/TASK/test.json` of all tasks in a benchmark folder.

    Raises:
        FileNotFoundError: If the folder does not exist, or if it contains no known task. In the second case, the
            message lists its subfolders.
        ValueError: If a test file is invalid.
    """
    root = expand_user(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"data must be a folder with TASK/{_TEST_FILE}, got '{folder}'{similar_paths(root)}")
    candidates = {name: root / name / _TEST_FILE for name in CHOICES}
    files = {name: file for name, file in candidates.items() if file.is_file()}
    if not files:
        folders = sorted(child.name for child in root.iterdir() if child.is_dir())
        expected = ", ".join(f"{name}/{_TEST_FILE}" for name in CHOICES)
        found = listed(folders) if folders else "none"
        raise FileNotFoundError(f"'{root}' must contain at least one of {expected}, got folders: {found}")
    return {name: read_instructions(file, CHOICES[name]) for name, file in files.items()}


def _error(entry: Any, choices: tuple[str, ...] | None) -> str:
    """Return the error in an entry, or an empty string if the entry is valid."""
    if not isinstance(entry, dict):
        return f"must be an object, got {type(entry).__name__}"
    for name in ("instruction", "output"):
        if not isinstance(entry.get(name), str) or not entry[name].strip():
            return f"{name} must be a non-empty string, got {entry.get(name)!r:.40}"
    if not isinstance(entry.get("input") or "", str):
        return f"input must be a string, got {entry['input']!r:.40}"
    if "answer" not in entry:
        return "answer is missing"
    if choices is not None and entry["answer"] not in choices:
        return f"answer must be one of {', '.join(choices)}, got {entry['answer']!r:.40}"
    return ""


class Template:
    """Prompt template with `{instruction}` and an optional `{input}`.

    Args:
        path: Template file. If it has no `{input}`, an entry's input follows the instruction. None selects a built-in
            template.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the template has no `{instruction}`.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.plain = _WITHOUT_INPUT
        self.with_input = _WITH_INPUT
        if path is not None:
            text = expand_user(path).read_text(encoding="utf-8-sig")
            if "{instruction}" not in text:
                raise ValueError(f"template '{path}' has no placeholder {{instruction}}")
            self.plain = text.replace("{input}", "")
            self.with_input = text
            if "{input}" not in text:
                self.with_input = text.replace("{instruction}", "{instruction}\n{input}")

    def fill(self, entry: Instruction) -> str:
        """Return the prompt of an entry."""
        template = self.with_input if entry.input else self.plain
        values = {"{instruction}": entry.instruction, "{input}": entry.input}
        # in one pass, because braces in an instruction are literal
        return _PLACEHOLDER.sub(lambda match: values[match[0]], template)


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Tokenize a prompt, and drop the EOS token that some tokenizers append, because the response follows."""
    ids = list(tokenizer(prompt).input_ids)
    if ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def encode(tokenizer: Any, prompt: str, response: str, max_length: int, *, learn_prompt: bool) -> dict[str, list[int]]:
    """Tokenize a prompt and its response, append the EOS token, and create the labels.

    Args:
        tokenizer: Tokenizer of the model.
        prompt: Filled template.
        response: Target response.
        max_length: Maximum number of tokens. Longer sequences are truncated at the end.
        learn_prompt: Also compute the loss on prompt tokens.

    Returns:
        `input_ids` and `labels`. Unless `learn_prompt` is set, the labels of the prompt are `IGNORED`.
    """
    prompt_ids = encode_prompt(tokenizer, prompt)
    response_ids = [*tokenizer(response, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    prompt_labels = prompt_ids if learn_prompt else [IGNORED] * len(prompt_ids)
    ids = [*prompt_ids, *response_ids]
    labels = [*prompt_labels, *response_ids]
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}
