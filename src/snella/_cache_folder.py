"""Folder for files that are kept between processes."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the cache folder: `$SNELLA_CACHE`, else `$XDG_CACHE_HOME/snella`, else `~/.cache/snella`."""
    if chosen := os.environ.get("SNELLA_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "snella"
