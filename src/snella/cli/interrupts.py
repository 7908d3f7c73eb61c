"""Ctrl-C while the program's libraries are still being imported."""

import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

INTERRUPTED = 130
_PROGRAM = "snella"


def end_when_interrupted() -> None:
    """Let Ctrl-C end the program at once with one line and status 130; other programs are left alone.

    An exception would not do: libraries that are being imported swallow it or print it with a traceback.
    """
    is_ours = bool(sys.argv) and Path(sys.argv[0]).stem == _PROGRAM
    if is_ours and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _end)


def raise_when_interrupted() -> None:
    """Let Ctrl-C be an exception again, once there is something to clean up."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    """Say so and leave."""
    print(f"{_PROGRAM}: interrupted", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)
