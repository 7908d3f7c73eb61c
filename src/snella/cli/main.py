"""The program `snella`: parse, build, call."""

import os
import sys
import traceback
from collections.abc import Sequence

from snella.cli.parser import UsageError, parse

_USER_ERROR = 2
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Errors that a user can cause are one line on standard error; `--debug` shows the traceback.

    Args:
        arguments: The command line without the program's name; that of the process if None.

    Returns:
        Exit status: 0, 2 for an error, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    is_debugging = "--debug" in words
    try:
        name, is_debugging, settings = parse(words)
    except UsageError as fault:
        return _report(fault, is_debugging)
    try:
        return _call(name, settings)
    except KeyboardInterrupt:
        return _report("interrupted", is_debugging, _INTERRUPTED)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - closed with the process
        return 1
    except (ValueError, OSError, ImportError, NotImplementedError) as fault:
        return _report(fault, is_debugging)


def _call(name: str, settings: dict[str, object]) -> int:
    """Import what the command needs, and run it."""
    from snella.cli import commands
    from snella.training.stopping import NonFiniteLossError, TrainingInterrupted

    try:
        commands.COMMANDS[name](settings)
    except TrainingInterrupted as fault:
        return _report(fault, False, _INTERRUPTED)
    except NonFiniteLossError as fault:
        return _report(fault, False)
    return 0


def _report(fault: Exception | str, is_debugging: bool, status: int = _USER_ERROR) -> int:
    """Write one line, or the traceback."""
    if is_debugging and isinstance(fault, Exception):
        traceback.print_exception(fault)
    else:
        print("snella: " + " ".join(str(fault).split()), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
