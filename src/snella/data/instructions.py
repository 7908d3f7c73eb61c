"""Instruction data in the JSON layout of the commonsense benchmark: a list of instruction, input, output, answer."""

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snella.data.folder import listed

__all__ = ["Instruction", "read_benchmark", "read_instructions"]

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
        ValueError: Another layout, no entries, or faulty ones, all of which are counted and the first ones named.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"data must be a JSON file of instructions, got '{path}'{_near(file)}")
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as fault:
        raise ValueError(f"'{file}' is not readable JSON: {fault}") from None
    if not isinstance(entries, list) or not entries:
        kind = "an empty list" if entries == [] else type(entries).__name__
        raise ValueError(f"'{file}' must hold a list of objects with instruction, output and answer, got {kind}")
    found = (_fault(entry, choices) for entry in entries)
    faults = [f"entry {number}: {what}" for number, what in enumerate(found) if what]
    if faults:
        raise ValueError(f"{len(faults)} of {len(entries)} entries in '{file}' are faulty: {listed(faults)}")
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
        ValueError: A faulty file.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"data must be a folder with TASK/{_TEST}, got '{folder}'{_near(root)}")
    found = {name: root / name / _TEST for name in choices if (root / name / _TEST).is_file()}
    if not found:
        there = sorted(child.name for child in root.iterdir() if child.is_dir())
        raise FileNotFoundError(
            f"'{root}' holds none of {', '.join(f'{name}/{_TEST}' for name in choices)}; its folders are "
            f"{listed(there) if there else 'none'}"
        )
    return {name: read_instructions(file, choices[name]) for name, file in found.items()}


def _fault(entry: Any, choices: tuple[str, ...] | None) -> str:
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


def _near(path: Path) -> str:
    """Files and folders of a like name beside the one that is missing."""
    if not path.parent.is_dir():
        return f"; there is no folder '{path.parent}'"
    near = difflib.get_close_matches(path.name, sorted(child.name for child in path.parent.iterdir()), n=3, cutoff=0.5)
    return f"; nearest there: {', '.join(map(repr, near))}" if near else ""
