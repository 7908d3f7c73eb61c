"""Entry point of `snella`: parse the command line, call the command, and report errors in one line."""

import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

_PROGRAM = "snella"
_USER_ERROR = 2
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    User errors are reported in one line on standard error; `--debug` shows the traceback. Unexpected errors are raised.

    Args:
        arguments: Command line without the program name; `sys.argv[1:]` if None.

    Returns:
        Exit status: 0 on success, 1 if runs of a comparison failed or the output pipe was closed, 2 after a reported
        error, 130 after Ctrl-C or another signal that stops training.

    Raises:
        SystemExit: With status 0 after `--help` and similar options, or 1 if checks of `doctor` failed.
    """
    args = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # hides DDP notes; read when torch is imported
    try:
        return _run(args)
    except KeyboardInterrupt:
        print(f"{_PROGRAM}: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - closed with the process
        return 1
    except (ValueError, OSError, ImportError, NotImplementedError, FloatingPointError) as error:
        return _report(error, args)
    except Exception as error:
        status = getattr(error, "exit_status", None)  # set by exceptions such as interrupted training
        if type(error).__name__ == "OutOfMemoryError":  # torch.OutOfMemoryError, without importing torch
            advice = "use a smaller batch size; snella train also has --accumulate, --grad-checkpointing and --img-size"
            short_error = MemoryError(f"{str(error).partition('. ')[0]}; {advice}")
            return _report(short_error.with_traceback(error.__traceback__), args)
        if status is None:
            raise
        return _report(error, args, status)


def _run(args: list[str]) -> int:
    """Parse, import and run a command. Modules are imported here, so that Ctrl-C exits even during imports."""
    exit_on_interrupt()
    try:
        from snella_app.cli.parser import call, parse

        name, settings = parse(args)
        from snella_app.cli.command import COMMANDS, record

        command = call(name, settings)
        importlib.import_module(COMMANDS[name].library)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("snella"):
            raise
        missing = str(error.name).partition(".")[0]
        extra = "generation" if missing == "diffusers" else "app"
        print(f"{_PROGRAM}: the command line needs {missing}: pip install 'snella[{extra}]'", file=sys.stderr)
        return _USER_ERROR
    raise_on_interrupt()
    command()
    if COMMANDS[name].is_recorded:
        record(name, settings)
    return 0


def _report(error: Exception, args: Sequence[str], status: int = _USER_ERROR) -> int:
    """Print an error in one line, or its traceback with `--debug`."""
    if "--debug" in args:
        traceback.print_exception(error)
        return status
    from snella_app.cli.parser import UsageError, as_flags
    from snella_app.console import printable

    line = printable(" ".join(str(error).split()))
    command = next((arg for arg in args if not arg.startswith("-")), None)
    line = line if isinstance(error, UsageError) else as_flags(line, command)
    if isinstance(error, ValueError) and not _is_raised_by_snella(error):  # not one of our messages, so possibly a bug
        line += " (--debug shows the traceback)"
    print(f"{_PROGRAM}: {line.removeprefix(f'{_PROGRAM} ')}", file=sys.stderr)
    return status


def _is_raised_by_snella(error: Exception) -> bool:
    """Return whether the innermost Python frame of an error is in one of snella's packages."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return not frames or str(frames[-1][0].f_globals.get("__name__")).startswith(_PROGRAM)


def exit_on_interrupt() -> None:
    """Make Ctrl-C exit immediately with one line and status 130; no-op outside this program's main thread.

    Raising an exception does not work during imports: libraries swallow it or print a traceback.
    """
    is_this_program = bool(sys.argv) and Path(sys.argv[0]).stem == _PROGRAM
    if is_this_program and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _handle_interrupt)


def raise_on_interrupt() -> None:
    """Make Ctrl-C raise KeyboardInterrupt again, so that commands can clean up."""
    if signal.getsignal(signal.SIGINT) is _handle_interrupt:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _handle_interrupt(number: int, frame: FrameType | None) -> None:
    """Handle SIGINT: print a line and exit."""
    print(f"{_PROGRAM}: interrupted", file=sys.stderr, flush=True)
    os._exit(_INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
