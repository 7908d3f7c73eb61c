"""Atomic checkpoints: written into a staging folder, synced, renamed."""

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
"""The file of a checkpoint that is written last: the run's id, and the SHA-256 digest of every other file by name."""


class CheckpointError(OSError):
    """A checkpoint or the best adapter could not be written (the previous one is intact), or one is damaged."""


def existing_file(checkpoint: Path, name: str) -> Path:
    """A file of a checkpoint.

    Raises:
        CheckpointError: It is missing.
    """
    path = checkpoint / name
    if not path.is_file():
        raise CheckpointError(f"the checkpoint is damaged: {path} is missing; start over with --overwrite")
    return path


def latest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step; None where there is none.

    Args:
        folder: The run's `checkpoints`.
    """
    found = _checkpoints(folder)
    return found[0] if found else None


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, the highest step first."""
    if not folder.is_dir():
        return []
    steps = {int(match[1]): path for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))}
    return [steps[step] for step in sorted(steps, reverse=True)]


def intact_checkpoint(run: RunFolderOf[Any]) -> tuple[Path | None, list[str]]:
    """The checkpoint of this run of the highest step whose files are all there and as they were written.

    Args:
        run: Folder of the run.

    Returns:
        The checkpoint, None where there is none at all; and what is wrong with those of higher steps.

    Raises:
        CheckpointError: There are checkpoints, and every one is damaged; names a file of the latest and the remedies.
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
    """What is wrong with the files of a checkpoint, before anything is loaded from it; empty if nothing is.

    Args:
        checkpoint: Its folder.
        run_id: Of the run that is to be resumed.
    """
    path = checkpoint / MANIFEST
    if not path.is_file():
        return f"{MANIFEST} is missing, which a complete checkpoint has"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files = dict(manifest["files"])
    except (ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} is unreadable ({type(error).__name__}: {error})"
    if not is_intact(manifest):
        return f"{MANIFEST} was altered after it was written"
    if manifest.get("run") != run_id:
        return f"it is a checkpoint of another run ({manifest.get('run')}, where this run is {run_id})"
    missing = [name for name in files if not (checkpoint / name).is_file()]
    if missing:
        return f"{', '.join(missing)} is missing"
    altered = [name for name, digest in files.items() if sha256_of(checkpoint / name) != digest]
    if altered:
        return f"{', '.join(altered)} was altered or cut off after it was written"
    foreign = [name for name in _files_of(checkpoint) if name not in (*files, MANIFEST)]
    return f"{', '.join(foreign)} is no file of it ({MANIFEST} does not list it); remove it" if foreign else ""


def _files_of(checkpoint: Path) -> list[str]:
    """Names of everything in a checkpoint that is not a folder; hidden files, which nothing loads, are left out."""
    paths = (path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))


def _write_manifest(checkpoint: Path, run_id: str | None) -> None:
    """List the files of a checkpoint with their digests, and the run that it belongs to."""
    files = {name: sha256_of(checkpoint / name) for name in _files_of(checkpoint)}
    write_json(checkpoint / MANIFEST, sealed({"run": run_id, "files": files}))


def remove_incomplete(folder: Path, keep: Path | None = None) -> int:
    """Remove what a killed process has left: staging folders, and checkpoints that are not needed any more.

    Args:
        folder: The run's `checkpoints`.
        keep: The checkpoint to keep; the latest if None.

    Returns:
        How many folders were removed.
    """
    keep = keep or latest_checkpoint(folder)
    leftovers = [path for path in folder.iterdir() if path != keep] if folder.is_dir() else []
    for path in leftovers:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return len(leftovers)


@contextmanager
def reading_checkpoint(checkpoint: Path) -> Iterator[None]:
    """Report an error inside as a checkpoint that cannot be read.

    Raises:
        CheckpointError: Its files hold something else than a checkpoint's state, such as a pickle of foreign code.
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
def staged(run: RunFolderOf[Any], name: str) -> Iterator[Path]:
    """Collect the files of a checkpoint in a staging folder, add their digests, make them visible by one rename.

    Args:
        run: Folder of the run; the checkpoint goes into its `checkpoints`.
        name: Of the checkpoint; nothing of that name may be there.

    Yields:
        The staging folder; what is written into its subfolder `name` counts.

    Raises:
        CheckpointError: Writing failed, as on a full disk. Whatever was there before is still there.
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
def reporting_write_errors(path: Path) -> Iterator[None]:
    """Report a failed write of the best adapter, whose files are replaced one by one, so that old ones are intact."""
    try:
        yield
    except Exception as error:
        if is_write_failure(error):
            raise CheckpointError(_reason(error, path)) from error
        raise


def is_write_failure(error: BaseException) -> bool:
    """Whether an exception means that the disk did not take the data.

    Besides OSError, torch's zip writer and safetensors raise types of their own, without an errno.
    """
    if isinstance(error, OSError):
        return not isinstance(error, FileNotFoundError)
    return any(sign in str(error) for sign in WRITE_FAILURES)


def _reason(error: BaseException, target: Path) -> str:
    """The error, the free space, and what is still intact."""
    free_space = ""
    with contextlib.suppress(OSError):
        free_space = f" ({shutil.disk_usage(target.parent).free / 2**20:.0f} MiB free)"
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    # torch's zip writer knows no errno
    torn = not isinstance(error, OSError) and ("PytorchStreamWriter" in str(error) or "inline_container" in str(error))
    what = "the disk is full" if full or "No space left" in str(error) else str(error)
    what = "the disk is full, or a limit on the size of files was met" if torn else what
    if _NAME.fullmatch(target.name):
        previous = latest_checkpoint(target.parent)
    else:
        previous = target if any(target.glob("*.safetensors")) else None
    kept = f"the previous one, {previous}, is intact" if previous is not None else "there is no earlier one"
    return f"could not write {target}: {what}{free_space}; {kept}; free some space and resume with --resume"
