"""How `--help` looks: basic options before the others, and the defaults that a method decides."""

from argparse import Action, RawDescriptionHelpFormatter
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from snella.training.defaults import METHOD_DEFAULTS

_BASIC = (
    *("data", "backbone", "out", "method", "weights", "img_size", "epochs", "batch_size", "augment"),
    *("skip_broken", "device", "workers", "resume", "overwrite"),
)
_METHOD = "snella"


class HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Defaults shown where there are any, descriptions left as written."""

    def _get_help_string(self, action: Action) -> str:
        """The help of one option, without Python types and `default: null`."""
        if action.default is not None or action.required or action.help is None:
            text = super()._get_help_string(action)
            return text.replace("type: %(type)s, ", "").replace(", type: %(type)s", "")
        if action.dest in METHOD_DEFAULTS[_METHOD]:
            return f"{action.help} (default with {_METHOD}: {METHOD_DEFAULTS[_METHOD][action.dest]})"
        return action.help


def group_options(parser: ArgumentParser, known: set[str]) -> None:
    """Show the options that most runs need first, the rest under a heading of its own.

    Args:
        parser: Of one command, with its options.
        known: Settings of the command; a command with few of them stays as it is.
    """
    if not set(_BASIC) <= known:
        return
    basic: Any = parser.add_argument_group("basic options")
    advanced: Any = parser.add_argument_group("advanced options (the defaults do for a first run)")
    optional = parser._optionals._group_actions
    for name in (*_BASIC, *(action.dest for action in optional if action.dest not in _BASIC)):
        action = next(action for action in optional if action.dest == name)
        if name in known:
            optional.remove(action)
            (basic if name in _BASIC else advanced)._group_actions.append(action)
