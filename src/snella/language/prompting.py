"""How an instruction becomes a prompt, and a prompt token ids."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snella.data.instructions import Instruction

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
