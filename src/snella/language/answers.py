"""The eight tasks of the commonsense benchmark: which answers there are, and how one is found in a text."""

import re

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
