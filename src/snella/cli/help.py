"""How `--help` looks: basic options before the others, and the defaults that a method decides."""

from argparse import Action, RawDescriptionHelpFormatter
from collections.abc import Sequence
from typing import Any, ClassVar

from jsonargparse import ArgumentParser, DefaultHelpFormatter

_BASIC = (
    *("data", "backbone", "out", "task", "method", "weights", "img_size", "epochs", "batch_size", "augment"),
    *("skip_broken", "device", "workers", "resume", "overwrite"),
)
_METHOD = "snella"


class HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Defaults shown where there are any, descriptions left as written.

    Attributes:
        method_defaults: By method, what options without a value mean.
    """

    method_defaults: ClassVar[dict[str, dict[str, Any]]] = {}

    def _get_help_string(self, action: Action) -> str:
        """The help of one option, without Python types and `default: null`."""
        if action.default is not None or action.required or action.help is None:
            text = super()._get_help_string(action)
            return text.replace("type: %(type)s, ", "").replace(", type: %(type)s", "")
        decided = self.method_defaults.get(_METHOD, {})
        if action.dest in decided:
            return f"{action.help} (default with {_METHOD}: {decided[action.dest]})"
        return action.help


def formatter_for(options: type) -> type[HelpFormatter]:
    """The formatter of a command, which knows what its methods decide.

    Args:
        options: The dataclass of the command's settings.
    """
    return type("HelpFormatter", (HelpFormatter,), {"method_defaults": getattr(options, "method_defaults", {})})


def group_options(parser: ArgumentParser, known: set[str], first: Sequence[str] = ()) -> None:
    """Show the options that most runs need first, the rest under a heading of its own.

    Args:
        parser: Of one command, with its options.
        known: Settings of the command; a command with few of them stays as it is.
        first: Which of them come first, if not those of `snella train`.
    """
    first = first or _BASIC
    if not set(first) <= known:
        return
    basic: Any = parser.add_argument_group("basic options")
    advanced: Any = parser.add_argument_group("advanced options (the defaults do for a first run)")
    optional = parser._optionals._group_actions
    for name in (*first, *(action.dest for action in optional if action.dest not in first)):
        action = next(action for action in optional if action.dest == name)
        if name in known:
            optional.remove(action)
            (basic if name in first else advanced)._group_actions.append(action)
