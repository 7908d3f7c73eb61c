"""Checkpoints that are complete or invisible: written into a staging folder, synced, renamed."""

import contextlib
import errno
import json
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from snella.methods.adapter_files import parse_header
from snella.training.atomic_files import sync_folder, sync_tree

_NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointError(OSError):
    """A checkpoint or the best adapter could not be written (the previous one is intact), or one is damaged."""


def latest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step; None where there is none.

    Args:
        folder: The run's `checkpoints`.
    """
    if not folder.is_dir():
        return None
    steps = {int(match[1]): path for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))}
    return steps[max(steps)] if steps else None


def check_complete(checkpoint: Path) -> None:
    """Look at every file of a checkpoint before anything is loaded from it.

    Args:
        checkpoint: One of the run's `checkpoints`.

    Raises:
        CheckpointError: A file is damaged; names it and the ways out.
    """
    for path in sorted(checkpoint.iterdir()):
        fault = _damage(path)
        if fault:
            raise CheckpointError(
                f"the checkpoint is damaged: {path}: {fault}; start over with --overwrite, "
                f"or remove {checkpoint} and --resume again, which trains from the first epoch"
            )


def _damage(path: Path) -> str:
    """What is wrong with a file of a checkpoint; empty if nothing is."""
    try:
        if path.suffix == ".safetensors":
            parse_header(path)
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
            return f"cut off at {path.stat().st_size} bytes"
    except ValueError as fault:
        return str(fault)
    return ""


def remove_incomplete(folder: Path) -> int:
    """Remove what a killed process left: staging folders, and checkpoints older than the latest.

    Returns:
        How many folders were removed.
    """
    latest = latest_checkpoint(folder)
    leftovers = [path for path in folder.iterdir() if path != latest] if folder.is_dir() else []
    for path in leftovers:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return len(leftovers)


@contextmanager
def staged(folder: Path, name: str) -> Iterator[Path]:
    """Collect the files of `folder/name` in a staging folder and make them visible together, by one rename.

    Args:
        folder: Where the finished folder goes.
        name: Its name; nothing of that name may be there.

    Yields:
        The staging folder; what is written into its subfolder `name` counts.

    Raises:
        CheckpointError: Writing failed, as on a full disk. Whatever was there before is still there.
    """
    staging = folder / f".staging-{name}"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        (staging / name).mkdir(parents=True)
        yield staging
        sync_tree(staging / name)
        (staging / name).rename(folder / name)
        sync_folder(folder)
    except Exception as fault:
        if is_write_failure(fault):
            raise CheckpointError(_reason(fault, folder / name)) from fault
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Report a failed write of the best adapter, whose files are replaced one by one, so that old ones are intact."""
    try:
        yield
    except Exception as fault:
        if is_write_failure(fault):
            raise CheckpointError(_reason(fault, path)) from fault
        raise


def is_write_failure(fault: BaseException) -> bool:
    """Whether an exception means that the disk did not take the data.

    Besides OSError, torch's zip writer and safetensors raise types of their own, without an errno.
    """
    if isinstance(fault, OSError):
        return not isinstance(fault, FileNotFoundError)
    text = str(fault)
    return any(
        sign in text
        for sign in ("PytorchStreamWriter", "No space left", "File too large", "unexpected pos", "iostream")
    )


def _reason(fault: BaseException, target: Path) -> str:
    """What went wrong, how much room there is, what is still good."""
    room = ""
    with contextlib.suppress(OSError):
        room = f" ({shutil.disk_usage(target.parent).free / 2**20:.0f} MiB free)"
    full = isinstance(fault, OSError) and fault.errno in (errno.ENOSPC, errno.EDQUOT)
    what = "the disk is full" if full or "No space left" in str(fault) else str(fault)
    previous = (
        latest_checkpoint(target.parent) if _NAME.fullmatch(target.name) else (target if target.exists() else None)
    )
    kept = f"the previous one, {previous}, is intact" if previous is not None else "there is no earlier one"
    return f"could not write {target}: {what}{room}; {kept}; make room and continue with --resume"
