"""What a row of results says besides its numbers, and how rows are kept."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "peft", "timm", "numpy", "numba", "triton")


def conditions(device: str) -> dict[str, Any]:
    """Command, machine, versions, commit and date."""
    git = ["git", "-C", str(Path(__file__).parent)]
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "device": device_name(device),
        "versions": {name: version(name) for name in _PACKAGES if find_spec(name) is not None},
        "commit": _output([*git, "rev-parse", "--short", "HEAD"]),
        "dirty": bool(_output([*git, "status", "--porcelain", "--untracked-files=no", ":/"])),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def device_name(device: str) -> str:
    """What a row calls the machine; a CPU says that it is one."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads, {_processor()}"


def append_rows(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """Append rows to a JSON lines file."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a file; a line that was cut off at its end is left out.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Another line is damaged.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as fault:
            if number < len(lines):
                raise ValueError(f"line {number} of {path} is damaged: {fault}; remove it") from None
    return rows


def _processor() -> str:
    """The processor's name, where the system tells."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _output(command: list[str]) -> str:
    """What a command prints; nothing where it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
