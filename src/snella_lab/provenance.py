"""Machine, package versions and commit of a measurement."""

import functools
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias

import torch

import snella_lab

GitState: TypeAlias = tuple[str | None, bool | None]
_state: GitState | None = None
_PACKAGES = ("snella", "peft", "transformers", "accelerate", "torch", "timm", "numpy", "scikit-learn", "numba")


def package_info() -> dict[str, str | None]:
    """Return versions, keyed as in PEFT's method comparison (`torch-version`), and the commit of snella's checkout."""
    versions: dict[str, str | None] = {f"{name}-version": _version(name) for name in _PACKAGES}
    commit, is_dirty = git_state()
    return {**versions, "snella-commit-hash": commit, "snella-is-dirty": None if is_dirty is None else str(is_dirty)}


def system_info() -> dict[str, Any]:
    """Describe the machine, keyed as in PEFT's method comparison, with CPU cores and torch threads."""
    return {
        "system": platform.system(),
        "release": platform.release(),
        "machine": platform.machine(),
        "processor": processor_name(),
        "accelerator": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "N/A",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


@functools.cache
def processor_name() -> str:
    """Return the CPU model name, or the architecture if the system does not report one."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git_state() -> GitState:
    """Return the commit of snella's checkout and True if tracked files are modified; None outside a checkout.

    Cached per process; workers get the state from their parent.
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
    """Set the git state determined by the parent process, which matches the loaded code."""
    global _state
    _state = state


def _git(root: Path, *words: str) -> str | None:
    """Return the output of a git command; None if it fails."""
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    """Return the version of a package; None if not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
