"""Where and with what a row was made."""

import functools
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias

import torch

import snella

GitState: TypeAlias = tuple[str | None, bool | None]
_state: GitState | None = None
_PACKAGES = ("snella", "peft", "transformers", "accelerate", "torch", "timm", "numpy", "scikit-learn", "numba")


def package_info() -> dict[str, str | None]:
    """Versions under the keys of PEFT's method comparison (`torch-version`), and the commit of snella's checkout."""
    versions: dict[str, str | None] = {f"{name}-version": _version(name) for name in _PACKAGES}
    commit, is_dirty = git_state()
    return {**versions, "snella-commit-hash": commit, "snella-is-dirty": None if is_dirty is None else str(is_dirty)}


def system_info() -> dict[str, Any]:
    """The machine, under the keys of PEFT's method comparison, with its cores and the threads that torch uses."""
    return {
        "system": platform.system(),
        "release": platform.release(),
        "machine": platform.machine(),
        "processor": _processor(),
        "accelerator": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "N/A",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def git_state() -> GitState:
    """Commit of the checkout that snella was imported from, and whether tracked files differ; None outside of one.

    Asked for once in the life of a process, or of the one that started it and handed its own on.
    """
    global _state
    if _state is None:
        _state = _ask_git()
    return _state


def take_git_state(state: GitState) -> None:
    """Hold what the process that started this one has found: the code that runs here was loaded then."""
    global _state
    _state = state


def _ask_git() -> GitState:
    """What git says of the checkout now."""
    root = Path(snella.__file__).parents[2]
    if not (root / ".git").exists():
        return None, None
    commit = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return commit, None if changes is None else bool(changes)


def _git(root: Path, *words: str) -> str | None:
    """What git says; None where it cannot be asked."""
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    """Version of a package, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@functools.cache
def _processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
