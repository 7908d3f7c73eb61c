"""Provenance of a measurement: machine, package versions, and commit.

The dirty flag is True if tracked files differ from the commit.
"""

import functools
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias

import torch

import snella_lab

GitState: TypeAlias = tuple[str | None, bool | None]
"""Commit and dirty flag, each None if unknown."""
_state: GitState | None = None  # set by `git_state` or `set_git_state`
_BENCHMARK_PACKAGES = ("torch", "peft", "timm", "numpy", "numba", "triton")
_PACKAGES = ("snella", "peft", "transformers", "accelerate", "torch", "timm", "numpy", "scikit-learn", "numba")


def package_info() -> dict[str, str | None]:
    """Return package versions, snella's commit, and its dirty flag.

    The keys follow PEFT's method comparison, e.g. `torch-version`.
    """
    versions: dict[str, str | None] = {f"{name}-version": _version(name) for name in _PACKAGES}
    commit, is_dirty = git_state()
    dirty_text = None if is_dirty is None else str(is_dirty)
    return {**versions, "snella-commit-hash": commit, "snella-is-dirty": dirty_text}


def system_info() -> dict[str, Any]:
    """Return the operating system, CPU, GPU, and numbers of cores and torch threads.

    The keys follow PEFT's method comparison; `cores` and `threads` are additional.
    """
    return {
        "system": platform.system(),
        "release": platform.release(),
        "machine": platform.machine(),
        "processor": processor_name(),
        "accelerator": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "N/A",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def measurement_info() -> dict[str, Any]:
    """Return the commit, dirty flag, machine, and date of a measurement."""
    commit, is_dirty = git_state()
    return {"commit": commit, "is_dirty": is_dirty, "system": system_info(), "created_at": timestamp()}


def conditions(device: str, packages: Iterable[str] = _BENCHMARK_PACKAGES) -> dict[str, Any]:
    """Return the provenance of a benchmark row: command, device, versions, commit, dirty flag, and date.

    The command omits `--out` and the folders of absolute paths. A checkout with a known commit counts as dirty unless
    it is known to be clean.
    """
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    command_without_out = re.sub(r" --out[= ]\S+", "", command)
    commit, is_dirty = git_state()
    return {
        "command": re.sub(r"([ =])/\S*/", r"\1", command_without_out),
        "device": device_name(device),
        "versions": {name: number for name in packages if (number := _version(name)) is not None},
        "commit": (commit or "")[:7],
        "dirty": commit is not None and is_dirty is not False,
        "date": timestamp(),
    }


def device_name(device: str) -> str:
    """Return the device name for a benchmark row. The name of a CPU starts with `cpu`."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    if torch.device(device).type != "cpu":
        return str(torch.device(device))
    return f"cpu, {torch.get_num_threads()} threads, {processor_name()}"


def timestamp() -> str:
    """Return the current UTC time in ISO 8601 format, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@functools.cache
def processor_name() -> str:
    """Return the CPU model name, or the architecture if the name is unavailable."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git_state() -> GitState:
    """Return the commit of snella's checkout and its dirty flag.

    A value is None if it is unknown, e.g. outside a checkout. The state is cached per process. Worker processes receive
    it from their parent.
    """
    global _state
    if _state is None:
        root = Path(snella_lab.__file__).parents[2]
        is_checkout = (root / ".git").exists()
        commit = _git(root, "rev-parse", "HEAD") if is_checkout else None
        changes = _git(root, "status", "--porcelain", "--untracked-files=no") if is_checkout else None
        _state = commit, None if changes is None else bool(changes)
    return _state


def set_git_state(state: GitState) -> None:
    """Set the git state reported by the parent process."""
    global _state
    _state = state


def _git(root: Path, *args: str) -> str | None:
    """Return the output of a git command, or None if it fails."""
    try:
        result = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _version(package: str) -> str | None:
    """Return the version of a package, or None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
