"""The file behind `--config`, looked at before the parser does, so that its faults are told with the file's name."""

import difflib
import json
from collections.abc import Sequence
from pathlib import Path

import yaml


def config_faults(path: str, known: Sequence[str]) -> str | None:
    """What is wrong with a configuration file, None where it can be used.

    Args:
        path: As typed after `--config`.
        known: Settings of the command.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        return f"--config must be an existing YAML file, got {path!r}{_near_file(file)}"
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as fault:
        mark = fault.problem_mark or fault.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        return f"--config {path}{line}: {fault.problem or fault.context}; settings are written as 'epochs: 20'"
    except (yaml.YAMLError, UnicodeDecodeError) as fault:
        return f"--config {path} must be a YAML text file: {fault}"
    except RecursionError:
        return f"--config {path} is nested too deep to be settings; they are written as 'epochs: 20'"
    if not isinstance(content, dict):
        return f"--config {path} must hold settings such as 'epochs: 20', got {type(content).__name__}"
    try:
        json.dumps(content, default=str)
    except (ValueError, RecursionError):
        return f"--config {path} holds a setting that contains itself; settings are written as 'epochs: 20'"
    unknown = [_unknown(str(key), known) for key in content if key not in known]
    return f"--config {path} has unknown settings: {', '.join(unknown)}" if unknown else None


def _unknown(key: str, known: Sequence[str]) -> str:
    """A key with the nearest ones that exist."""
    near = difflib.get_close_matches(key.replace("-", "_"), known, n=2, cutoff=0.5)
    return f"{key!r}" + (f" (nearest: {', '.join(near)})" if near else "")


def _near_file(file: Path) -> str:
    """A hint at files of a like name in the same folder, or that the folder is missing."""
    if not file.parent.is_dir():
        return f"; there is no folder '{file.parent}'"
    names = sorted(child.name for child in file.parent.iterdir() if child.is_file())
    near = difflib.get_close_matches(file.name, names, n=2, cutoff=0.5)
    return f"; nearest there: {', '.join(map(repr, near))}" if near else ""
