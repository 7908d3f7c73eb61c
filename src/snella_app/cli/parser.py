"""Command-line parser, built from the commands' signatures and docstrings."""

import argparse
import inspect
import json
import os
import re
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from functools import cache
from importlib.metadata import version
from itertools import islice, pairwise
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import docstring_parser
import yaml
from jsonargparse import ArgumentParser

from snella_app.cli import commands as _commands  # noqa: F401 - registers its commands
from snella_app.cli.command import COMMANDS, Command
from snella_app.files import expand_user
from snella_app.methods.defaults import SPARSE_DEFAULTS, SPARSE_RECIPES, TRAIN_PRESETS
from snella_app.plugins import plugins
from snella_app.settings import Config, Setting, describe_type, suggest_choice, suggest_setting
from snella_app.text import nearest, similar_paths

plugins("commands")  # registers the commands of other packages
_BOOLEANS = ("true", "false", "yes", "no")
_GLOBAL_OPTIONS = ("config", "print_config", "help", "version")
_LIBRARY_HELP = {
    "--help": "Show this help and exit.",
    "--print-config": "Print the configuration as YAML and exit; =skip_default omits default values.",
}
"""Help texts of the options that argparse and jsonargparse add."""


class UsageError(ValueError):
    """Invalid command line."""


@dataclass(frozen=True)
class Option:
    """Argument of a command, declared by its function or configuration.

    Attributes:
        name: Python name, with underscores.
        type: Type annotation.
        default: Default value; `MISSING` if required.
        help: Help text from the docstring.
        is_positional: True for a positional argument.
    """

    name: str
    type: Any
    default: Any
    help: str
    is_positional: bool

    @property
    def typed(self) -> str:
        """Name on the command line: `--top-k`, `RUN`."""
        return self.name.upper() if self.is_positional else _dashed(self.name)

    @property
    def values(self) -> list[str]:
        """Fixed choices as typed, or an empty list if any value is possible."""
        kind = _without_none(self.type)
        if kind is bool:
            return ["true", "false"]
        if get_origin(kind) is Literal:
            return [str(value) for value in get_args(kind)]
        return []

    @property
    def choices(self) -> str:
        """Placeholder for the value in help: `{dice,iou}`, or the option's name in uppercase."""
        return f"{{{','.join(self.values)}}}" if self.values and not self.is_positional else self.name.upper()

    @property
    def is_list(self) -> bool:
        """True if the argument takes several values."""
        return get_origin(_without_none(self.type)) is list


def settings_class(function: Callable[..., None]) -> type[Config] | None:
    """Return the configuration class that defines a command's options; None if its parameters define them."""
    kinds = list(_hints(function).values())
    return kinds[0] if len(kinds) == 1 and isinstance(kinds[0], type) and issubclass(kinds[0], Config) else None


def options_of(function: Callable[..., None]) -> list[Option]:
    """Return the arguments of a command."""
    config = settings_class(function)
    if config is not None:
        settings = config.command_options().values()
        return [Option(s.name, s.type, s.fresh_default(), _text_of(s), s.name in config.positional) for s in settings]
    helps, hints = _texts(function), _hints(function)
    options: list[Option] = []
    for name, parameter in inspect.signature(function).parameters.items():
        default = MISSING if parameter.default is parameter.empty else parameter.default
        is_positional = parameter.kind is parameter.POSITIONAL_ONLY
        options.append(Option(name, hints[name], default, helps[name], is_positional))
    return options


def parse(arguments: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Parse a command line.

    Args:
        arguments: Command line without the program name; `--debug` is ignored. Arguments after `--` are positional.

    Returns:
        Name of the command, and its settings. If a `Config` defines the options, defaults are left out.

    Raises:
        UsageError: If a command or option is unknown, or a value is missing or malformed.
        SystemExit: After printing the help, version, configuration or completion script.
    """
    end = arguments.index("--") if "--" in arguments else len(arguments)
    args = [_with_dashes(arg) for arg in arguments[:end] if arg != "--debug"]
    operands = arguments[end:]
    if args[:1] == ["help"]:
        args = [*args[1:2], "--help"]
    option, _, shell = "".join(args[:1]).partition("=")
    if option == "--completion":
        _print_completion(shell or "".join(args[1:2]))
    name = next((arg for arg in args if not arg.startswith("-")), None)
    if name is None and not set(args) & {"-h", "--help", "--version"}:
        raise UsageError(f"missing command; choose one of {', '.join(COMMANDS)}; see snella --help")
    if name is not None and name not in COMMANDS:
        hint = nearest(name, COMMANDS, most=2, form="nearest: {}") or f"commands: {', '.join(COMMANDS)}"
        raise UsageError(f"no command {name!r}; {hint}; see snella --help")
    options = [] if name is None else options_of(COMMANDS[name].function)
    if name is not None:
        _check_options(name, options, args)
        args = _expand_flags(options, _expand_preset(name, options, _configs_first(name, args)))
    try:
        has_defaults = name is None or settings_class(COMMANDS[name].function) is None
        values = _build_parser(name).parse_args([*args, *operands], defaults=has_defaults)
    except argparse.ArgumentError as error:
        raise UsageError(_rewrite_error(str(error), str(name), options, args)) from None
    settings = values[values.command].as_dict()
    return values.command, {key: value for key, value in settings.items() if key != "config"}


def call(name: str, settings: Mapping[str, Any]) -> Callable[[], None]:
    """Bind a command to its settings.

    Args:
        name: Name of the command.
        settings: Settings from `parse`.

    Returns:
        A function without parameters that runs the command.

    Raises:
        ValueError: If the settings are invalid.
    """
    function = COMMANDS[name].function
    owner = settings_class(function)
    if owner is not None:
        config = owner.from_flat(**settings)
        return lambda: function(config)
    bound = inspect.signature(function).bind_partial()
    bound.arguments.update(settings)
    return lambda: function(*bound.args, **bound.kwargs)


def _build_parser(command: str | None) -> ArgumentParser:
    """Build the parser of `snella`, with the options of one command unless `command` is None."""
    parser = ArgumentParser(
        prog="snella",
        exit_on_error=False,
        usage="snella [-h] [--debug] [--version] [--completion SHELL] COMMAND ...",
        description="Fine-tune pre-trained vision models with sparse, high-rank updates.\n\n"
        "  snella train --data photos --backbone vit_base_patch16_224.augreg_in21k --out runs/photos\n"
        "  snella predict runs/photos new.jpg\n\n"
        "Help for a command: snella train --help",
        epilog=f"research commands:\n{_command_list(is_research=True)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="Show tracebacks of errors.")
    parser.add_argument("--version", action="version", version=f"snella {version('snella')}", help="Show the version.")
    parser.add_argument(
        "--completion",
        nargs="?",
        metavar="SHELL",
        help="Print the completion script for bash, zsh or fish: snella --completion bash > ~/.snella.bash",
    )
    _set_help(parser)
    subcommands = parser.add_subcommands(
        dest="command",
        required=True,
        metavar="COMMAND",
        help=argparse.SUPPRESS,
        title="everyday commands",
        description=textwrap.dedent(_command_list(is_research=False)),
    )
    if command is not None:
        subcommands.add_subcommand(command, _command_parser(command, COMMANDS[command].function))
    return parser


def summary(command: Command) -> str:
    """Return the first line of a command's help."""
    return str(_docstring(command.function).short_description)


def _command_list(is_research: bool) -> str:
    """List everyday or research commands, one line each."""
    width = max(map(len, COMMANDS)) + 2
    columns = max(shutil.get_terminal_size().columns - 4 - width, 30)
    indent = " " * (width + 2)
    lines: list[str] = []
    for name, command in COMMANDS.items():
        if command.is_research != is_research:
            continue
        first_line, *other_lines = textwrap.wrap(summary(command), columns)
        lines.append(f"  {name:<{width}}{first_line}")
        lines += [indent + line for line in other_lines]
    return "\n".join(lines)


def _print_completion(shell: str) -> NoReturn:
    """Print the completion script for a shell and exit. The script's generator is imported only here."""
    from snella_app.cli.completion import SHELLS, completion_script

    if shell not in SHELLS:
        raise UsageError(f"--completion must be one of {', '.join(SHELLS)}, got {shell or 'nothing'}")
    print(completion_script(shell))
    raise SystemExit(0)


def _command_parser(name: str, function: Callable[..., None]) -> ArgumentParser:
    """Build the parser of one command."""
    options = options_of(function)
    operands: list[str] = []
    required_options: list[str] = []
    for option in options:
        is_required = option.default is MISSING
        if option.is_positional:
            operand = f"{option.typed} ..." if option.is_list else option.typed
            operands.append(operand if is_required else f"[{operand}]")
        elif is_required:
            required_options.append(f"{option.typed} {option.choices}")
    parser = ArgumentParser(
        exit_on_error=False,
        usage=" ".join(["snella", name, *operands, *required_options, "[options]"]),
        description=inspect.cleandoc(function.__doc__ or "").partition("\nArgs:")[0].rstrip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        print_config="--print-config",
    )
    parser.add_argument(
        "--config", action="config", help="YAML file with any of the options below; the command line takes precedence."
    )
    _set_help(parser)
    owner = settings_class(function)
    basic = () if owner is None else owner.basic
    purpose = str(getattr(owner, "purpose", None))  # empty for `snella train`
    method_defaults = SPARSE_RECIPES.get(purpose, {}) if purpose else SPARSE_DEFAULTS
    default_method = {option.name: option.default for option in options}.get("method", "")
    basic_group: Any = parser
    advanced_group: Any = parser
    if basic:
        basic_group = parser.add_argument_group("basic options")
        advanced_group = parser.add_argument_group("advanced options (keep the defaults for a first run)")
    for option in options:
        method_default = method_defaults.get(option.name)
        text = "" if method_default is None else f" (default with {default_method}: {method_default})"
        _add(basic_group if option.name in basic else advanced_group, option, text)
    return parser


def _set_help(parser: ArgumentParser) -> None:
    """Replace the help texts of argparse and jsonargparse."""
    for action in parser._actions:
        for option in action.option_strings:
            action.help = _LIBRARY_HELP.get(option, action.help)


def _add(group: Any, option: Option, method_default: str) -> None:
    """Add one argument to a parser or a group. `method_default` states the method's default value, or is empty."""
    text = option.help.replace("%", "%%")
    default = option.default
    if default is MISSING:
        text += "" if option.is_positional else " (required)"
    elif default not in (None, {}):
        text += f" (default: {str(default).lower() if isinstance(default, bool) else default})"
    else:
        text += method_default
    if option.is_positional:
        is_needed = default is MISSING
        kind: Any = option.type
        nargs = None if is_needed else "?"
        if option.is_list:
            kind = str
            nargs = "+" if is_needed else "*"
        group.add_argument(option.name, type=kind, nargs=nargs, metavar=option.choices, help=text)
        return
    requirement: dict[str, Any] = {"required": True} if default is MISSING else {"default": default}
    group.add_argument(option.typed, type=option.type, metavar=option.choices, help=text, **requirement)


def _rewrite_error(message: str, command: str, options: Sequence[Option], args: Sequence[str]) -> str:
    """Rewrite common jsonargparse errors, e.g. as "--option must be X, got Y", and return other messages unchanged."""
    known = {option.name: option for option in options}
    # error for an invalid value: 'Parser key "top_k": ... value: many'
    wrong = re.match(r'Parser key "(?:[\w-]+\.)?(\w+)".*value: ([^\n]*)', message, re.DOTALL)
    if wrong and wrong[1] in known:
        option = known[wrong[1]]
        got = wrong[2] or "nothing"
        hint = suggest_choice(option.type, wrong[2])
        return f"{option.typed} must be {describe_type(option.type)}, got {got}{hint}"
    _, is_missing, names = message.partition("are required: ")
    missing = [name.removeprefix(f"{command}.") for name in names.split(", ")]
    if is_missing and missing == ["images"]:
        given = ""
        for before, arg in pairwise(args):
            is_option_value = before[:2] == "--" and "=" not in before
            if arg[:1] != "-" and not is_option_value:
                given = arg
                break
        if Path(given).is_file() or (Path(given).suffix and not Path(given).is_dir()):
            return f"snella {command} needs RUN, a run folder, before the images: snella {command} RUN {given}"
    if is_missing and set(missing) <= set(known):
        return f"snella {command} needs {' and '.join(known[n].typed for n in missing)}; see snella {command} --help"
    _, is_unknown, unknown = message.partition("unrecognized arguments: ")
    if is_unknown:
        before = next((previous for previous, arg in pairwise(args) if arg == unknown), "").removesuffix("=true")
        if before in [option.typed for option in options if option.type is bool]:
            hint = "; put the images before the options" if "images" in known else ""
            if before == "--resume":
                hint = f"; to resume a run: --out {unknown} --resume"
            return f"{before} must be {describe_type(bool)}, got {unknown!r}{hint}"
        return f"snella {command} takes no argument {unknown!r}; see snella {command} --help"
    _, is_bare, _ = message.partition(": expected one argument")
    if is_bare:
        return f"{message.partition('argument ')[2].partition(':')[0]} needs a value; see snella {command} --help"
    return message


def _check_options(command: str, options: Sequence[Option], args: Sequence[str]) -> None:
    """Reject unknown options and suggest the closest ones."""
    spellings = {option.name: option.typed for option in options} | {name: _dashed(name) for name in _GLOBAL_OPTIONS}
    for arg in args:
        option = re.split(r"[.=]", arg)[0]
        if arg.startswith("--") and option not in spellings.values():
            hint = suggest_setting(option[2:], spellings)
            if not hint and "method_options" in spellings:
                hint = f"options of the method are set with --method-options, e.g. --method-options.{option[2:]}"
            raise UsageError(
                f"snella {command} has no option {option}{hint and f'; {hint}'}; see snella {command} --help"
            )


def _expand_flags(options: Sequence[Option], args: Sequence[str]) -> list[str]:
    """Expand boolean flags without a value, e.g. `--resume` to `--resume=true`."""
    flags = {option.typed for option in options if option.type is bool}
    # an option of type `bool | None` takes the next argument as its value, so that an invalid value is an error
    optional_flags = {option.typed for option in options if _without_none(option.type) is bool} - flags
    followers = [*args[1:], ""]
    expanded: list[str] = []
    for arg, follower in zip(args, followers, strict=True):
        is_bare_flag = arg in flags and follower.lower() not in _BOOLEANS
        is_bare_optional = arg in optional_flags and (not follower or follower.startswith("-"))
        expanded.append(f"{arg}=true" if is_bare_flag or is_bare_optional else arg)
    return expanded


def _configs_first(command: str, args: Sequence[str]) -> list[str]:
    """Move `--config FILE` before the other options, which take precedence wherever they are."""
    start = args.index(command) + 1
    configs: list[str] = []
    others: list[str] = []
    remaining = iter(args[start:])
    for arg in remaining:
        target = configs if arg.partition("=")[0] == "--config" else others
        target.append(arg)
        if arg == "--config":
            target += islice(remaining, 1)
    return [*args[:start], *configs, *others]


def _expand_preset(command: str, options: Sequence[Option], args: Sequence[str]) -> Sequence[str]:
    """Check the configuration files, and insert the settings of the last given preset as the first `--config`."""
    preset: str | None = None
    for arg, follower in zip(args, [*args[1:], None], strict=True):
        option, sign, text = arg.partition("=")
        value = text if sign else follower
        if option == "--config" and value is not None:
            preset = _read_config(value, options).get("preset", preset)
        elif option == "--preset":
            preset = value
    values = TRAIN_PRESETS.get(str(preset)) if command == "train" else None
    if values is None:
        return args
    start = args.index(command) + 1
    return [*args[:start], f"--config={yaml.safe_dump(values)}", *args[start:]]


def _read_config(path: str, options: Sequence[Option]) -> dict[str, Any]:
    """Read the settings in a configuration file, or raise UsageError if it is invalid or has unknown settings."""
    file = expand_user(path)
    if not os.path.isfile(file):  # Path.is_file raises if the name is too long
        raise UsageError(f"--config must be an existing YAML file, got {path!r}{similar_paths(file, most=2)}")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        json.dumps(content, default=str)  # rejects recursive settings, and names that are not strings, such as dates
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reasons: dict[type[Exception], str] = {
            RecursionError: "nested too deeply",
            TypeError: "names of settings must be strings",
            UnicodeDecodeError: "must be a UTF-8 text file",
        }
        if str(error) == "Circular reference detected":
            reasons[ValueError] = "a setting must not contain itself"
        reason = getattr(error, "problem", None) or reasons.get(type(error), error)
        raise UsageError(f"--config {path}{line}: {reason}; write settings as 'epochs: 20'") from None
    if not isinstance(content, dict):
        raise UsageError(f"--config {path} must contain settings such as 'epochs: 20', got {type(content).__name__}")
    spellings = {option.name: option.name for option in options}
    hints = {key: suggest_setting(str(key), spellings) for key in content if key not in spellings}
    if hints:
        unknown: list[str] = []
        for key, hint in hints.items():
            suggestion = f" ({hint})" if hint else ""
            unknown.append(f"{str(key)!r}{suggestion}")
        raise UsageError(f"--config {path} has unknown settings: {', '.join(unknown)}")
    for option in options:
        value = content.get(option.name, [])
        is_default = value is None and option.default is None  # as written by --print-config
        if option.is_list and not isinstance(value, list) and not is_default:
            raise UsageError(f"{option.typed} must be {describe_type(option.type)}, got {value!r}")
    return content


def as_flags(message: str, command: str | None = None) -> str:
    """Replace Python names of settings in an error message with command-line options.

    Args:
        message: One line with settings such as `name=value` or `name must be ...`.
        command: Command that raised the error; at the start of a clause, only the options of this command are replaced.
            None replaces those of all commands.
    """
    options = [option for command in COMMANDS.values() for option in options_of(command.function)]
    command_options = options if command not in COMMANDS else options_of(COMMANDS[str(command)].function)
    positional = {option.name for option in command_options if option.is_positional}
    dashed = {option.name: _dashed(option.name) for option in options if option.name not in positional}
    names = "|".join(sorted({option.name for option in command_options} - positional)) or "(?!)"
    flags = "|".join(sorted({option.name for option in options if _without_none(option.type) is bool}))
    # drop parentheses that only repeat the option
    message = re.sub(rf" \((?:{flags})=(?:True|False)\)| \(test_fraction=0\)", "", message)
    message = re.sub(rf"(?<![-\w.])({flags})=True\b", lambda m: dashed[m[1]], message)
    message = re.sub(rf"(?<![-\w.])({flags})=False\b", lambda m: f"{dashed[m[1]]} false", message)
    message = message.replace("weights=PATH", "--weights PATH")
    message = re.sub(r"missing required settings: ([^;]*)", _missing_options, message)
    message = re.sub(rf"^({names})=", lambda m: f"{dashed[m[1]]} ", message)
    message = re.sub(rf"(^|; )({names})(?= must\b)", lambda m: m[1] + dashed[m[2]], message)
    pair = rf"(^|; |\bwith )({names}) and ({names})\b"
    message = re.sub(pair, lambda m: f"{m[1]}{dashed[m[2]]} and {dashed[m[3]]}", message)
    return re.sub(r"\bwith overwrite\b", "with --overwrite", message)


def _missing_options(match: re.Match[str]) -> str:
    """Format missing settings as options, with an example of each."""
    missing, _, examples = match[1].partition(", e.g. ")
    options = ", ".join(map(_dashed, missing.split(", ")))
    return f"missing required options: {options}, e.g. " + re.sub(r"(\w+)='([^']*)'", r"--\1 \2", examples)


def _with_dashes(arg: str) -> str:
    """Replace underscores with dashes in an option's name, but not in its value or dotted suffix."""
    end = re.search(r"[.=]|$", arg)
    size = end.start() if end and arg.startswith("--") else 0
    return arg[:size].replace("_", "-") + arg[size:]


def _dashed(name: str) -> str:
    """Convert `top_k` to `--top-k`."""
    return "--" + name.replace("_", "-")


def _without_none(kind: Any) -> Any:
    """Return `T` for `T | None`, and other types unchanged."""
    inner = [part for part in get_args(kind) if part is not type(None)]
    return inner[0] if get_origin(kind) in (Union, UnionType) and len(inner) == 1 else kind


def _hints(owner: Callable[..., Any]) -> dict[str, Any]:
    """Return the types of parameters or fields."""
    return {name: kind for name, kind in get_type_hints(owner).items() if name != "return"}


def _text_of(setting: Setting) -> str:
    """Return the help text of a setting from the docstring of its class or a base class."""
    return next(text for kind in setting.owner.__mro__ if (text := _texts(kind).get(setting.path[-1])))


@cache
def _texts(owner: Callable[..., Any]) -> dict[str, str]:
    """Return the descriptions of parameters or fields in a docstring."""
    return {entry.arg_name: " ".join((entry.description or "").split()) for entry in _docstring(owner).params}


def _docstring(owner: Callable[..., Any]) -> docstring_parser.Docstring:
    """Parse a docstring."""
    return docstring_parser.parse(owner.__doc__ or "", docstring_parser.DocstringStyle.GOOGLE)
