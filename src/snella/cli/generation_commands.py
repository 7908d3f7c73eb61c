"""What the commands about personalized generators call and print."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from snella._files import write_json
from snella.cli.generation_options import EvaluateGenerationOptions, GenerateOptions
from snella.recipes.dreambooth import DreamBoothConfig
from snella.runs.console import counted, make_console, print_line


def _dreambooth(settings: dict[str, Any]) -> None:
    """`snella dreambooth`."""
    config = DreamBoothConfig(**settings)
    from snella.recipes.dreambooth import personalize

    personalize(config)


def _generate(settings: dict[str, Any]) -> None:
    """`snella generate`."""
    options = GenerateOptions(**settings)
    from snella.recipes.dreambooth.generate import generate, prompts_of

    pictures = generate(
        options.run,
        prompts_of(options.run, options.prompt, options.prompts, options.live),
        options.out,
        pictures=options.pictures,
        seed=options.seed,
        steps=options.steps,
        guidance=options.guidance,
        batch_size=options.batch_size,
        pipeline=options.pipeline,
        device=options.device,
        overwrite=options.overwrite,
    )
    print_line(make_console(), f"{counted(len(pictures), 'picture')}: {options.out}")


def _evaluate_generation(settings: dict[str, Any]) -> None:
    """`snella evaluate-generation`."""
    options = EvaluateGenerationOptions(**settings)
    from snella.recipes.dreambooth import evaluate_generation

    result = evaluate_generation(
        options.run,
        clip=options.clip,
        dino=options.dino,
        prompts=options.prompts,
        live=options.live,
        pictures=options.pictures,
        steps=options.steps,
        batch_size=options.batch_size,
        pipeline=options.pipeline,
        device=options.device,
        overwrite=options.overwrite,
    )
    make_console().print(_scores(result))
    if options.out is not None:
        write_json(Path(options.out), result)


def draw_generation_report(run: str) -> Path:
    """Draw the report page of a run of `snella dreambooth` again."""
    from snella.recipes.dreambooth import write_generation_report

    return write_generation_report(run)


def _scores(result: dict[str, Any]) -> Table:
    """One row a subject, then mean and standard error over subjects."""
    table = Table(title="alignments are cosines of CLIP embeddings, Vendi scores are of DINOv2's", title_justify="left")
    names = list(result["mean"])
    table.add_column("subject")
    table.add_column("method")
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    for row in result["runs"]:
        table.add_row(row["subject"], row["method"], *(f"{row[name]:.4f}" for name in names))
    if len(result["runs"]) > 1:
        table.add_section()
        table.add_row("mean", "", *(f"{result['mean'][name]:.4f}" for name in names))
        table.add_row("standard error", "", *(f"{result['standard_error'][name]:.4f}" for name in names))
    return table


GENERATION_COMMANDS: dict[str, Callable[[dict[str, Any]], None]] = {
    "dreambooth": _dreambooth,
    "generate": _generate,
    "evaluate-generation": _evaluate_generation,
}
