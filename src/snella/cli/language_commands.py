"""What the commands about language models call and print."""

from collections.abc import Callable
from typing import Any

from rich.table import Table

from snella.cli.language_options import EvaluateLanguageOptions
from snella.recipes.instruct import LanguageConfig
from snella.runs.console import make_console


def _language(settings: dict[str, Any]) -> None:
    """`snella language`."""
    config = LanguageConfig(**settings)
    from snella.recipes.instruct import fine_tune

    fine_tune(config)


def _evaluate_language(settings: dict[str, Any]) -> None:
    """`snella evaluate-language`."""
    options = EvaluateLanguageOptions(**settings)
    from snella.recipes.instruct import evaluate_language

    result = evaluate_language(
        options.run,
        options.data,
        beams=options.beams,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        limit=options.limit,
        model=options.model,
        device=options.device,
        overwrite=options.overwrite,
    )
    table = Table()
    table.add_column("task")
    for name in ("accuracy", "right", "questions", "unanswered"):
        table.add_column(name, justify="right")
    for task, row in result["tasks"].items():
        counts = (str(row[name]) for name in ("right", "questions", "unanswered"))
        table.add_row(task, f"{row['accuracy']:.4f}", *counts)
    table.add_section()
    table.add_row("mean of tasks", f"{result['mean']:.4f}", "", "", "")
    make_console().print(table)


LANGUAGE_COMMANDS: dict[str, Callable[[dict[str, Any]], None]] = {
    "language": _language,
    "evaluate-language": _evaluate_language,
}
