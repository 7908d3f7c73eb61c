"""Load pre-trained models in transformers format."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers

from snella_app.backbones.create import cache_only_if_unreachable
from snella_app.files import expand_user
from snella_app.text import first_line


def load_pretrained(kind: Any, name: str, option: str, **options: Any) -> Any:
    """Load a model, tokenizer, or processor from a folder or the hub.

    Args:
        kind: Class with a `from_pretrained` method.
        name: Local folder in transformers format, or hub name.
        option: Name of the setting that contains `name`, for error messages.
        **options: Other arguments of `from_pretrained`.

    Raises:
        FileNotFoundError: If no object of this class can be loaded from the folder.
        ConnectionError: If `name` is not a local folder and cannot be loaded from the hub or its cache.
    """
    folder = expand_user(name)
    if folder.is_dir():
        try:
            with suppress_progress_bars():
                return kind.from_pretrained(folder, local_files_only=True, **options)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"{option} must be a folder in transformers format, got '{folder}', which has no {kind.__name__}: "
                f"{first_line(error)}"
            ) from error
    with cache_only_if_unreachable() as reason, suppress_progress_bars():  # `reason` is None if the hub is reachable
        try:
            return kind.from_pretrained(name, local_files_only=bool(reason), **options)
        except (OSError, ValueError) as error:
            cause = f"it is not cached, and the hub is unreachable ({reason})" if reason else first_line(error)
            raise ConnectionError(
                f"{option} must be a local folder or a hub name, got {name!r}: {cause}; pass a local folder in "
                "transformers format"
            ) from error


@contextmanager
def suppress_progress_bars(*libraries: Any) -> Iterator[None]:
    """Hide the progress bars of transformers and of libraries with the same logging API, such as diffusers."""
    modules = [library.utils.logging for library in (transformers, *libraries)]
    disabled_here = [module for module in modules if module.is_progress_bar_enabled()]
    for module in disabled_here:
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module in disabled_here:
            module.enable_progress_bar()
