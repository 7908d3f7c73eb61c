"""Cache folder shared by all processes of a user."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the cache folder: `$SNELLA_CACHE`, else `$XDG_CACHE_HOME/snella`, else `~/.cache/snella`."""
    if override := os.environ.get("SNELLA_CACHE"):
        return Path(override).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "snella"
