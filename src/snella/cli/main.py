"""The program `snella`: parse, build, call."""

import os
import sys
import traceback
from collections.abc import Sequence

from snella.cli.interrupts import INTERRUPTED, end_when_interrupted, raise_when_interrupted

_USER_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Errors that a user can cause are one line on standard error; `--debug` shows the traceback.

    Args:
        arguments: The command line without the program's name; that of the process if None.

    Returns:
        Exit status: 0, 1 for a comparison with failed runs, 2 for an error, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    is_debugging = "--debug" in words
    try:
        return _run(words)
    except KeyboardInterrupt:
        print("snella: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - closed with the process
        return 1
    except (ValueError, OSError, ImportError, NotImplementedError) as fault:
        return _report(fault, is_debugging)
    except Exception as fault:
        status = getattr(fault, "exit_status", None)  # of an outcome, such as an interrupted training
        if status is None:
            raise
        return _report(fault, False, status)


def _run(words: list[str]) -> int:
    """Parse, import what the command needs, and run it; importing late lets Ctrl-C end it from the first second."""
    end_when_interrupted()
    from snella.cli.parser import parse

    name, _, settings = parse(words)
    from snella.cli import commands

    commands.import_libraries(name)
    raise_when_interrupted()
    commands.COMMANDS[name](settings)
    return 0


def _report(fault: Exception, is_debugging: bool, status: int = _USER_ERROR) -> int:
    """Write one line, or the traceback."""
    from snella.cli.wording import as_flags
    from snella.runs.console import printable

    if is_debugging:
        traceback.print_exception(fault)
    else:
        print("snella: " + as_flags(printable(" ".join(str(fault).split()))), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
