"""Keeping other libraries' progress bars off our console."""

from collections.abc import Iterator
from contextlib import contextmanager

import diffusers
import transformers


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide the bars that diffusers and transformers draw while they load models."""
    logs = (diffusers.utils.logging, transformers.utils.logging)
    were_shown = [log.is_progress_bar_enabled() for log in logs]
    for log in logs:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, was_shown in zip(logs, were_shown, strict=True):
            if was_shown:
                log.enable_progress_bar()
