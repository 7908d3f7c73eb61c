"""Instruction data in the JSON layout of the commonsense benchmark: a list of instruction, input, output, answer."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snella_app.text import listed, near_siblings

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
"""Answers by task, named as the benchmark's folders are."""


def extract_answer(task: str, text: str) -> str:
    """The choice that comes first in a text; empty where none does, which counts as wrong.

    Args:
        task: One of `CHOICES`.
        text: What the model wrote.
    """
    found = re.search("|".join(map(re.escape, CHOICES[task])), text)
    return "" if found is None else found[0]


_TEST = "test.json"


@dataclass(frozen=True)
class Instruction:
    """One entry.

    Attributes:
        instruction: What is asked, the choices included.
        input: Further text; mostly empty.
        output: What the model is to write: "the correct answer is true".
        answer: The choice alone: "true".
    """

    instruction: str
    input: str
    output: str
    answer: str


def read_instructions(path: str | Path, choices: tuple[str, ...] | None = None) -> list[Instruction]:
    """Read a file such as `commonsense_170k.json`.

    Args:
        path: JSON file with a list of objects that have `instruction`, `output` and `answer`, and may have `input`.
        choices: What `answer` may be; anything if None.

    Raises:
        FileNotFoundError: There is no such file; near names are given.
        ValueError: Another layout, no entries, or invalid ones, all of which are counted and the first ones named.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"data must be a JSON file of instructions, got '{path}'{near_siblings(file)}")
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{file}' is not readable JSON: {error}") from None
    if not isinstance(entries, list) or not entries:
        kind = "an empty list" if entries == [] else type(entries).__name__
        raise ValueError(f"'{file}' must hold a list of objects with instruction, output and answer, got {kind}")
    found = (_error(entry, choices) for entry in entries)
    errors = [f"entry {number}: {what}" for number, what in enumerate(found) if what]
    if errors:
        raise ValueError(f"{len(errors)} of {len(entries)} entries in '{file}' are invalid: {listed(errors)}")
    return [
        Instruction(entry["instruction"], entry.get("input") or "", entry["output"], str(entry["answer"]))
        for entry in entries
    ]


def read_benchmark(folder: str | Path, choices: dict[str, tuple[str, ...]]) -> dict[str, list[Instruction]]:
    """Read the test files of the tasks that a folder holds, `FOLDER/TASK/test.json`.

    Args:
        folder: As the benchmark has it.
        choices: Possible answers of each task that is known.

    Raises:
        FileNotFoundError: No such folder, or none of the tasks in it; says what is there.
        ValueError: A invalid file.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"data must be a folder with TASK/{_TEST}, got '{folder}'{near_siblings(root)}")
    found = {name: root / name / _TEST for name in choices if (root / name / _TEST).is_file()}
    if not found:
        there = sorted(child.name for child in root.iterdir() if child.is_dir())
        raise FileNotFoundError(
            f"'{root}' holds none of {', '.join(f'{name}/{_TEST}' for name in choices)}; its folders are "
            f"{listed(there) if there else 'none'}"
        )
    return {name: read_instructions(file, choices[name]) for name, file in found.items()}


def _error(entry: Any, choices: tuple[str, ...] | None) -> str:
    """What is wrong with an entry; empty if nothing is."""
    if not isinstance(entry, dict):
        return f"must be an object, got {type(entry).__name__}"
    for name in ("instruction", "output"):
        if not isinstance(entry.get(name), str) or not entry[name].strip():
            return f"{name} must be a text, got {entry.get(name)!r:.40}"
    if not isinstance(entry.get("input") or "", str):
        return f"input must be a text, got {entry['input']!r:.40}"
    if "answer" not in entry:
        return "answer is missing"
    if choices is not None and entry["answer"] not in choices:
        return f"answer must be one of {', '.join(choices)}, got {entry['answer']!r:.40}"
    return ""


IGNORED = -100
_PLAIN = "### Instruction:\n{instruction}\n\n### Response:\n"
_WITH_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"


class Template:
    """A text with `{instruction}` and, for entries that have one, `{input}` in it; the response follows it.

    Args:
        path: A file with the template; the input, if there is one, goes behind the instruction where it has no
            `{input}`. A plain one of ours if None.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The template has no `{instruction}`.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.plain, self.with_input = _PLAIN, _WITH_INPUT
        if path is not None:
            file = Path(path).expanduser()
            if not file.is_file():
                raise FileNotFoundError(f"template must be an existing text file, got '{path}'")
            text = file.read_text(encoding="utf-8")
            if "{instruction}" not in text:
                raise ValueError(f"template '{file}' must have {{instruction}} where the instruction belongs, got none")
            has_input = "{input}" in text
            self.plain = text.replace("{input}", "")
            self.with_input = text if has_input else text.replace("{instruction}", "{instruction}\n{input}")

    def fill(self, entry: Instruction) -> str:
        """The prompt of an entry."""
        text = self.with_input if entry.input else self.plain
        before, _, after = text.partition("{instruction}")
        # one after the other, so that braces within an instruction stay what they are
        return before.replace("{input}", entry.input) + entry.instruction + after.replace("{input}", entry.input)


def encode(tokenizer: Any, prompt: str, response: str, max_length: int, *, learn_prompt: bool) -> dict[str, list[int]]:
    """Token ids of prompt and response, with the end token, and the labels that are learned.

    Args:
        tokenizer: Of the model.
        prompt: Up to where the response begins.
        response: What the model is to write.
        max_length: Tokens beyond this are cut off at the end.
        learn_prompt: Whether the prompt's own tokens are learned too.
    """
    start = list(tokenizer(prompt).input_ids)
    if start and start[-1] == tokenizer.eos_token_id:
        start.pop()
    rest = [*tokenizer(response, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    ids = [*start, *rest][:max_length]
    labels = ids if learn_prompt else [*[IGNORED] * len(start), *rest][:max_length]
    return {"input_ids": ids, "labels": list(labels)}


def pad_right(items: Sequence[dict[str, list[int]]], pad_id: int) -> dict[str, Tensor]:
    """A batch for training: ids, mask and labels of one length."""
    length = max(len(item["input_ids"]) for item in items)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for item in items:
        missing = length - len(item["input_ids"])
        rows["input_ids"].append([*item["input_ids"], *[pad_id] * missing])
        rows["attention_mask"].append([*[1] * len(item["input_ids"]), *[0] * missing])
        rows["labels"].append([*item["labels"], *[IGNORED] * missing])
    return {name: torch.tensor(values) for name, values in rows.items()}


def pad_left(prompts: Sequence[list[int]], pad_id: int) -> dict[str, Tensor]:
    """A batch for generation: prompts that end together."""
    length = max(map(len, prompts))
    ids = [[*[pad_id] * (length - len(prompt)), *prompt] for prompt in prompts]
    mask = [[*[0] * (length - len(prompt)), *[1] * len(prompt)] for prompt in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
