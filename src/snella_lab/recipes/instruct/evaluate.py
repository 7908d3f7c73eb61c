"""Evaluation on the commonsense benchmark: generated answers and accuracy."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from snella_app.console import make_console
from snella_app.device import choose_device
from snella_app.files import write_text
from snella_app.methods import load_trained
from snella_app.records import RunInfo, read
from snella_app.runs.folder import adapter_digest
from snella_lab.recipes.instruct.config import RESULT_FILE, LanguageConfig, LanguageFolder
from snella_lab.recipes.instruct.data import CHOICES, Instruction, Template, extract_answer, pad_left, read_benchmark
from snella_lab.recipes.instruct.train import load_model, load_tokenizer
from snella_lab.recipes.run import progress_bar


def evaluate_language(
    run: str | Path,
    data: str | Path,
    *,
    beams: int = 1,
    max_new_tokens: int = 32,
    batch_size: int = 8,
    limit: int | None = None,
    model: str | None = None,
    device: str = "auto",
    overwrite: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluate a run on all tasks in a folder.

    Answers are appended to `RUN/answers/TASK.jsonl`; an interrupted call resumes after the last one. The arguments are
    the options of `snella evaluate-language`, and a console for the progress bar.

    Returns:
        `{"tasks": {name: {"accuracy", "right", "questions", "unanswered"}}, "mean": …}`, also written to
        `RUN/language.json`.

    Raises:
        FileNotFoundError: If the run, adapter, data or model does not exist.
        FileExistsError: If the run has answers generated with other settings.
        ValueError: If the data are invalid, the run belongs to another command, or a number is out of range.
    """
    numbers = {"beams": beams, "max_new_tokens": max_new_tokens, "batch_size": batch_size, "limit": limit}
    errors = [
        f"{name} must be at least 1, got {value}" for name, value in numbers.items() if value is not None and value < 1
    ]
    if errors:
        raise ValueError("; ".join(errors))
    console = console or make_console()
    folder = LanguageFolder(run)
    if read(RunInfo, folder.path).task != "language":
        raise ValueError(f"run must be a snella language run folder, got {run}, a run of another task")
    folder.check_adapter()
    questions = {name: entries[:limit] for name, entries in read_benchmark(data, CHOICES).items()}
    config = folder.read_config()
    name, target = str(model or config.model), choose_device(device)
    settings = {"beams": beams, "max_new_tokens": max_new_tokens, "adapter": adapter_digest(folder.adapter)}
    answers = {task: _read_answers(folder, task, settings, overwrite) for task in questions}
    answers_folder = folder.path / "answers"
    answers_folder.mkdir(exist_ok=True)
    total = sum(map(len, questions.values()))
    with progress_bar(console) as bar:
        progress = bar.add_task("answering", total=total, completed=sum(map(len, answers.values())))
        generator: _AnswerGenerator | None = None
        for task, entries in questions.items():
            missing = entries[len(answers[task]) :]
            if missing and generator is None:
                generator = _AnswerGenerator(name, folder, config, target, beams, max_new_tokens)
            with (answers_folder / f"{task}.jsonl").open("a", encoding="utf-8") as file:
                for first in range(0, len(missing), batch_size):
                    batch = missing[first : first + batch_size]
                    texts = generator(batch) if generator is not None else []
                    rows = [_row(task, entry, text) for entry, text in zip(batch, texts, strict=True)]
                    file.writelines(json.dumps(row) + "\n" for row in rows)
                    file.flush()
                    answers[task] += rows
                    bar.update(progress, advance=len(rows), description=task)
    result = {"format": 1, "settings": settings, "tasks": {task: _scores(rows) for task, rows in answers.items()}}
    result["mean"] = statistics.fmean(scores["accuracy"] for scores in result["tasks"].values())  # type: ignore[attr-defined]
    folder.write_json(RESULT_FILE, result)
    return result


class _AnswerGenerator:
    """Fine-tuned model, tokenizer, template and decoding settings."""

    def __init__(
        self,
        name: str,
        run: LanguageFolder,
        config: LanguageConfig,
        device: torch.device,
        beams: int,
        max_new_tokens: int,
    ) -> None:
        self.tokenizer = load_tokenizer(name)
        self.template = Template(config.template)
        base_model = load_model(name, torch.bfloat16 if config.base == "bf16" else torch.float32)
        self.model: nn.Module = load_trained(run.adapter, base_model).to(device).eval()
        self.device, self.beams, self.max_new_tokens = device, beams, max_new_tokens

    @torch.no_grad()
    def __call__(self, entries: Sequence[Instruction]) -> list[str]:
        """Generate answers to a batch of entries."""
        prompts = [list(self.tokenizer(self.template.fill(entry)).input_ids) for entry in entries]
        prompts = [ids[:-1] if ids[-1] == self.tokenizer.eos_token_id else ids for ids in prompts]
        batch = {name: value.to(self.device) for name, value in pad_left(prompts, self.tokenizer.pad_token_id).items()}
        output_ids = self.model.generate(  # type: ignore[operator]
            **batch,
            max_new_tokens=self.max_new_tokens,
            num_beams=self.beams,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
        )
        answer_ids = output_ids[:, batch["input_ids"].shape[1] :]
        texts: list[str] = self.tokenizer.batch_decode(answer_ids, skip_special_tokens=True)
        return texts


def _row(task: str, entry: Instruction, text: str) -> dict[str, Any]:
    """Build the record of an answer."""
    predicted = extract_answer(task, text)
    return {"text": text, "predicted": predicted, "answer": entry.answer, "right": predicted == entry.answer}


def _scores(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Compute the accuracy on a task; an answer without a choice counts as wrong."""
    correct = sum(row["right"] for row in rows)
    unanswered = sum(not row["predicted"] for row in rows)
    return {"accuracy": correct / len(rows), "right": correct, "questions": len(rows), "unanswered": unanswered}


def _read_answers(run: LanguageFolder, task: str, settings: dict[str, Any], overwrite: bool) -> list[dict[str, Any]]:
    """Read existing answers, without a truncated last line; the first line contains the settings."""
    path = run.path / "answers" / f"{task}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    if rows and rows[0] != settings and not overwrite:
        raise FileExistsError(f"{path} contains answers with other settings, {rows[0]}; replace them with --overwrite")
    if not rows or rows[0] != settings:
        rows = [settings]
    path.parent.mkdir(exist_ok=True)
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows[1:]
