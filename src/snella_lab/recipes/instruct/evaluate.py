"""Evaluation on the commonsense benchmark: generated answers and accuracy."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from torch import nn

from snella_app.console import make_console, track_progress
from snella_app.device import choose_device
from snella_app.files import expand_user, sha256_of, write_text
from snella_app.methods import load_trained
from snella_app.records.record import read
from snella_app.records.run import RunInfo
from snella_app.runs.folder import adapter_digest
from snella_app.training.session import lock_run
from snella_lab.recipes.instruct.config import RESULT_FILE, EvaluateLanguageOptions, LanguageFolder
from snella_lab.recipes.instruct.data import (
    Instruction,
    Template,
    encode_prompt,
    extract_answer,
    read_benchmark,
)
from snella_lab.recipes.instruct.train import load_model, load_tokenizer


def evaluate_language(options: EvaluateLanguageOptions, console: Console | None = None) -> dict[str, Any]:
    """Evaluate a run on all tasks in a folder.

    Answers are appended to `RUN/answers/TASK.jsonl`, so the next call after an interruption resumes after the last
    stored answer.

    Args:
        options: Options of `snella evaluate-language`.
        console: Console for the progress bar, or None for stdout.

    Returns:
        `{"format": 1, "settings": {…}, "tasks": {name: {"accuracy", "right", "questions", "unanswered"}}, "mean": …}`.
        `mean` is the mean accuracy over tasks. The result is also written to `RUN/language.json`. If that file already
        has results with the same settings, it keeps its results of other tasks and, unless `overwrite` is set, its
        results of the same tasks on more questions; its `mean` includes them.

    Raises:
        FileNotFoundError: If the run, adapter, data, or model does not exist.
        FileExistsError: If the run has answers to different questions or answers generated with different settings,
            and `overwrite` is not set.
        ConnectionError: If the model is not a local folder and cannot be loaded from the hub or its cache.
        ValueError: If the data is invalid, the template has changed, or the run belongs to another command.
        RunInUseError: If another process is training or evaluating the run.
    """
    folder = LanguageFolder(options.run)
    info = read(RunInfo, folder.path)
    if info.task != "language":
        raise ValueError(
            f"run must be a run folder created by `snella language`, got {options.run}, a run of another task"
        )
    with lock_run(folder):
        return _evaluate(folder, info, options, console)


def _evaluate(
    folder: LanguageFolder, info: RunInfo, options: EvaluateLanguageOptions, console: Console | None
) -> dict[str, Any]:
    """Evaluate a run whose lock the caller holds."""
    folder.check_adapter()
    questions = {name: entries[: options.limit] for name, entries in read_benchmark(options.data).items()}
    digest = adapter_digest(folder.adapter)
    settings = {"beams": options.beams, "max_new_tokens": options.max_new_tokens, "adapter": digest}
    if options.model is not None:
        settings["model"] = options.model
    if (template := folder.read_config().template) is not None:
        settings["template"] = sha256_of(expand_user(template))
        if settings["template"] != info.data.contents.get("template"):
            raise ValueError(
                f"template must be the file that {folder.path} was trained with, but the content of {template} "
                "has changed; restore the file"
            )
    answers: dict[str, list[dict[str, Any]]] = {}
    batches: list[tuple[str, list[Instruction]]] = []
    for task, entries in questions.items():
        stored_answers = _read_answers(folder, task, entries, settings, options.overwrite)
        answers[task] = stored_answers[: len(entries)]  # an earlier call may have had a higher limit
        for start in range(len(answers[task]), len(entries), options.batch_size):
            batches.append((task, entries[start : start + options.batch_size]))
    if batches:
        generator = _AnswerGenerator(folder, options)
        for task, batch in track_progress(batches, "answering", len(batches), console or make_console()):
            rows = [_row(task, entry, text) for entry, text in zip(batch, generator(batch), strict=True)]
            with (folder.path / "answers" / f"{task}.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            answers[task] += rows
    tasks = {task: _scores(rows) for task, rows in answers.items()}
    kept = {}
    for task, scores in _stored_tasks(folder, settings).items():
        has_more_questions = task in tasks and scores["questions"] > tasks[task]["questions"]
        if task not in tasks or (has_more_questions and not options.overwrite):
            kept[task] = scores
    folder.write_json(RESULT_FILE, _result(settings, {**tasks, **kept}))
    return _result(settings, tasks)


def _result(settings: dict[str, Any], tasks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the scores of tasks and their mean accuracy in the format of `language.json`."""
    mean = statistics.fmean(scores["accuracy"] for scores in tasks.values())
    return {"format": 1, "settings": settings, "tasks": tasks, "mean": mean}


def _stored_tasks(folder: LanguageFolder, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the scores in `language.json` by task, or an empty dict if the file is missing or its settings differ."""
    if not (folder.path / RESULT_FILE).is_file():
        return {}
    stored = folder.read_json(RESULT_FILE)
    return stored["tasks"] if stored["settings"] == settings else {}


class _AnswerGenerator:
    """Fine-tuned model that answers questions, with its tokenizer, template, and decoding settings."""

    def __init__(self, run: LanguageFolder, options: EvaluateLanguageOptions) -> None:
        config = run.read_config()
        name = str(options.model or config.model)
        device = choose_device(options.device)
        self.tokenizer = load_tokenizer(name)
        self.template = Template(config.template)
        self.model: nn.Module = load_trained(run.adapter, load_model(name, config.base)).to(device).eval()
        self.device = device
        self.options = options

    @torch.no_grad()
    def __call__(self, entries: Sequence[Instruction]) -> list[str]:
        """Generate answers to a batch of entries."""
        tokenizer = self.tokenizer
        prompts = [encode_prompt(tokenizer, self.template.fill(entry)) for entry in entries]
        # padded on the left, so that every answer starts at the end of its prompt
        batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(self.device)
        output_ids = self.model.generate(  # type: ignore[operator]
            **batch,
            max_new_tokens=self.options.max_new_tokens,
            num_beams=self.options.beams,
            do_sample=False,
            # unset the model's sampling settings, which do not apply here
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        answer_ids = output_ids[:, batch["input_ids"].shape[1] :]  # the output starts with the prompt
        texts: list[str] = tokenizer.batch_decode(answer_ids, skip_special_tokens=True)
        return texts


def _row(task: str, entry: Instruction, text: str) -> dict[str, Any]:
    """Build the record of an answer."""
    predicted = extract_answer(task, text)
    return {**_question(entry), "text": text, "predicted": predicted, "right": predicted == entry.answer}


def _question(entry: Instruction) -> dict[str, str]:
    """Return the part of an answer's record that identifies its question."""
    return {"instruction": entry.instruction, "input": entry.input, "answer": entry.answer}


def _scores(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Compute the scores on a task. An answer without a choice counts as wrong."""
    correct = sum(row["right"] for row in rows)
    unanswered = sum(not row["predicted"] for row in rows)
    return {"accuracy": correct / len(rows), "right": correct, "questions": len(rows), "unanswered": unanswered}


def _read_answers(
    run: LanguageFolder, task: str, entries: Sequence[Instruction], settings: dict[str, Any], overwrite: bool
) -> list[dict[str, Any]]:
    """Return the stored answers to a task up to the first damaged line, and remove that line and all later ones.

    The first line of the file contains the settings. If the settings differ, or an answer belongs to a different
    question, all answers to the task are removed if `overwrite` is set; otherwise, a FileExistsError is raised.
    """
    path = run.path / "answers" / f"{task}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    mismatch = f"generated with different settings, {rows[0]}" if rows and rows[0] != settings else ""
    answered = zip(rows[1:], entries, strict=False)  # there can be fewer or more answers than entries
    if not mismatch and not all(row.items() >= _question(entry).items() for row, entry in answered):
        mismatch = "to different questions"
    if mismatch and not overwrite:
        raise FileExistsError(f"{path} contains answers {mismatch}; pass --overwrite to replace them")
    if mismatch or not rows:
        rows = [settings]
    path.parent.mkdir(exist_ok=True)
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows[1:]
