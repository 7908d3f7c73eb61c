"""Atomic checkpoints: written to a staging folder, synced and renamed."""

import contextlib
import errno
import json
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from snella_app.files import WRITE_FAILURES, is_intact, sealed, sha256_of, sync_folder, sync_tree, write_json
from snella_app.runs.folder import RunFolderOf

_NAME = re.compile(r"checkpoint-(\d+)")
MANIFEST = "manifest.json"
"""Last file written to a checkpoint: the run's id and the SHA-256 digests of all other files."""


class CheckpointError(OSError):
    """Error for a failed write of a checkpoint or adapter (the previous one is intact), or a damaged checkpoint."""


def require_file(checkpoint: Path, name: str) -> Path:
    """Return the path of a checkpoint's file.

    Raises:
        CheckpointError: If the file is missing.
    """
    path = checkpoint / name
    if not path.is_file():
        raise CheckpointError(f"the checkpoint is damaged: {path} is missing; start over with --overwrite")
    return path


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the complete checkpoint with the highest step; None if there is none.

    Args:
        folder: The run's `checkpoints` folder.
    """
    checkpoints = _checkpoints(folder)
    return checkpoints[0] if checkpoints else None


def _checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints of a folder, highest step first."""
    if not folder.is_dir():
        return []
    steps = {int(match[1]): path for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))}
    return [steps[step] for step in sorted(steps, reverse=True)]


def intact_checkpoint(run: RunFolderOf[Any]) -> tuple[Path | None, list[str]]:
    """Find the run's undamaged checkpoint with the highest step.

    Args:
        run: Run folder.

    Returns:
        The checkpoint, None if the run has no checkpoints, and the damage of checkpoints with higher steps.

    Raises:
        CheckpointError: If all checkpoints are damaged; the message names a file and the remedies.
    """
    damages: list[str] = []
    run_id = run.id
    for checkpoint in _checkpoints(run.checkpoints):
        damage = find_damage(checkpoint, run_id)
        if not damage:
            return checkpoint, damages
        damages.append(f"{checkpoint}: {damage}")
    if damages:
        raise CheckpointError(
            f"the checkpoint is damaged: {damages[0]}; start over with --overwrite, "
            f"or remove {run.checkpoints} and --resume again, which trains from the first epoch"
        )
    return None, []


def find_damage(checkpoint: Path, run_id: str | None) -> str:
    """Describe the damage of a checkpoint's files without loading them; empty for an intact checkpoint.

    Args:
        checkpoint: Checkpoint folder.
        run_id: Id of the resumed run.
    """
    path = checkpoint / MANIFEST
    if not path.is_file():
        return f"{MANIFEST} is missing"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files = dict(manifest["files"])
    except (ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} is unreadable ({type(error).__name__}: {error})"
    if not is_intact(manifest):
        return f"{MANIFEST} was modified after it was written"
    if manifest.get("run") != run_id:
        return f"it belongs to another run ({manifest.get('run')}; this run is {run_id})"
    missing = [name for name in files if not (checkpoint / name).is_file()]
    if missing:
        return f"{', '.join(missing)} is missing"
    altered = [name for name, digest in files.items() if sha256_of(checkpoint / name) != digest]
    if altered:
        return f"{', '.join(altered)} was modified or truncated after it was written"
    unlisted = [name for name in _files_of(checkpoint) if name not in (*files, MANIFEST)]
    return f"{', '.join(unlisted)} is not listed in {MANIFEST}; remove it" if unlisted else ""


def _files_of(checkpoint: Path) -> list[str]:
    """List the files of a checkpoint, without hidden files, which are never loaded."""
    paths = (path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))


def _write_manifest(checkpoint: Path, run_id: str | None) -> None:
    """Write the run's id and the digests of a checkpoint's files."""
    files = {name: sha256_of(checkpoint / name) for name in _files_of(checkpoint)}
    write_json(checkpoint / MANIFEST, sealed({"run": run_id, "files": files}))


def remove_incomplete(folder: Path, keep: Path | None = None) -> int:
    """Remove staging folders of a killed process and obsolete checkpoints.

    Args:
        folder: The run's `checkpoints` folder.
        keep: Checkpoint to keep; the latest if None.

    Returns:
        Number of removed folders and files.
    """
    keep = keep or latest_checkpoint(folder)
    leftovers = [path for path in folder.iterdir() if path != keep] if folder.is_dir() else []
    for path in leftovers:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return len(leftovers)


@contextmanager
def convert_read_errors(checkpoint: Path) -> Iterator[None]:
    """Convert errors inside the context to `CheckpointError`.

    Raises:
        CheckpointError: If the files are not a valid checkpoint, e.g. a pickle with arbitrary code.
    """
    try:
        yield
    except (pickle.UnpicklingError, EOFError, LookupError, RuntimeError, TypeError, ValueError, OSError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"the checkpoint {checkpoint} cannot be read: {type(error).__name__}: {reason:.300}; start over with "
            f"--overwrite, or remove {checkpoint} and --resume again, which trains from the first epoch"
        ) from error


@contextmanager
def stage_checkpoint(run: RunFolderOf[Any], name: str) -> Iterator[Path]:
    """Write a checkpoint to a staging folder, add digests and publish it with a single rename.

    Args:
        run: Run folder; the checkpoint goes to its `checkpoints` folder.
        name: Name of the checkpoint; must not exist yet.

    Yields:
        The staging folder; only its subfolder `name` is published.

    Raises:
        CheckpointError: If writing fails, e.g. because the disk is full. Existing checkpoints are unchanged.
    """
    folder = run.checkpoints
    staging = folder / f".staging-{name}"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        (staging / name).mkdir(parents=True)
        yield staging
        _write_manifest(staging / name, run.id)
        sync_tree(staging / name)
        (staging / name).rename(folder / name)
        sync_folder(folder)
    except Exception as error:
        if is_write_failure(error):
            raise CheckpointError(_reason(error, folder / name)) from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def convert_write_errors(path: Path) -> Iterator[None]:
    """Convert a failed write of the best adapter to `CheckpointError`; each file is replaced atomically."""
    try:
        yield
    except Exception as error:
        if is_write_failure(error):
            raise CheckpointError(_reason(error, path)) from error
        raise


def is_write_failure(error: BaseException) -> bool:
    """Return whether an exception is a failed write.

    torch's zip writer and safetensors raise their own exception types without an errno.
    """
    if isinstance(error, OSError):
        return not isinstance(error, FileNotFoundError)
    return any(sign in str(error) for sign in WRITE_FAILURES)


def _reason(error: BaseException, target: Path) -> str:
    """Format the error with the free space and the intact previous file."""
    free_space = ""
    with contextlib.suppress(OSError):
        free_space = f" ({shutil.disk_usage(target.parent).free / 2**20:.0f} MiB free)"
    is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    # torch's zip writer reports no errno
    is_writer_error = not isinstance(error, OSError) and (
        "PytorchStreamWriter" in str(error) or "inline_container" in str(error)
    )
    cause = "the disk is full" if is_full or "No space left" in str(error) else str(error)
    cause = "the disk is full or the file size limit is reached" if is_writer_error else cause
    if _NAME.fullmatch(target.name):
        previous = latest_checkpoint(target.parent)
    else:
        previous = target if any(target.glob("*.safetensors")) else None
    intact = f"the previous one, {previous}, is intact" if previous is not None else "no earlier one exists"
    return f"could not write {target}: {cause}{free_space}; {intact}; free some space and resume with --resume"
