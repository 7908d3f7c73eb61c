"""Atomic checkpoints, and `CheckpointingTrainer`, which writes and loads them.

A checkpoint is written to a hidden staging folder and published with a single rename, so a killed process leaves no
incomplete checkpoint.
"""

import contextlib
import errno
import json
import math
import os
import pickle
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from snella_app.console import print_line
from snella_app.files import WRITE_FAILURES, is_intact, sealed, sha256_of, sync_folder, sync_tree, write_json
from snella_app.methods import load_trained_into, save_trained
from snella_app.runs.folder import BaseRunFolder
from snella_app.training.distributed import is_main, mean_across_processes, process_count, wait_for_everyone

_NAME = re.compile(r"checkpoint-(\d+)")
MANIFEST = "manifest.json"
"""Last file written to a checkpoint: the run's ID and the SHA-256 digests of all other files."""
BEST = "best"
"""Name of the folder that stores the best epoch's weights if `training/finish.py` saves the last epoch as the adapter.

The folder is next to the checkpoints.
"""
_UNLISTED = f"files not listed in {MANIFEST}: "
_PROGRESS_FILE = "progress.json"
_DEVICE_VARIABLE = "ACCELERATE_TORCH_DEVICE"
"""Environment variable from which Accelerate reads its device."""
_READ_ERRORS = (
    *(SafetensorError, pickle.UnpicklingError),
    *(EOFError, LookupError, RuntimeError, TypeError, ValueError, OSError),
)
"""Errors that loading a damaged checkpoint may raise."""


class CheckpointError(OSError):
    """Raised if a checkpoint or adapter cannot be written, or if a checkpoint is damaged.

    A failed write leaves the previous checkpoint or adapter intact.
    """


def require_file(checkpoint: Path, name: str) -> Path:
    """Return the path of a file in a checkpoint.

    Raises:
        CheckpointError: If the file is missing.
    """
    path = checkpoint / name
    if not path.is_file():
        raise CheckpointError(f"the checkpoint is damaged: {path} is missing; start over with --overwrite")
    return path


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the published checkpoint with the highest step, or None if there is none.

    The files of the checkpoint are not checked.
    """
    checkpoints = _checkpoints(folder)
    return checkpoints[0] if checkpoints else None


def _checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints in a folder, highest step first."""
    if not folder.is_dir():
        return []
    steps = {int(match[1]): path for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))}
    return [steps[step] for step in sorted(steps, reverse=True)]


def checkpoint_to_resume(run: BaseRunFolder[Any], console: Console) -> Path | None:
    """Return the latest intact checkpoint and remove all others. Return None if there are no checkpoints.

    Raises:
        CheckpointError: If all checkpoints are damaged. The message describes the damage to the latest checkpoint and
            how to recover.
    """
    damaged: dict[Path, str] = {}
    run_id = run.id
    for checkpoint in _checkpoints(run.checkpoints):
        damage = find_damage(checkpoint, run_id)
        if not damage:
            prune_checkpoints(run.checkpoints, checkpoint)
            for removed, description in damaged.items():
                print_line(console, f"note: removed the damaged checkpoint {removed}: {description}")
            print_line(console, f"resuming from {checkpoint}")
            return checkpoint
        damaged[checkpoint] = damage
    if damaged:
        latest, damage = next(iter(damaged.items()))
        repair = "remove these files and run again with --resume, " if damage.startswith(_UNLISTED) else ""
        raise CheckpointError(
            f"the checkpoint is damaged: {latest}: {damage}; {repair}start over with --overwrite, or remove "
            f"{run.checkpoints} and run again with --resume, which restarts from the first epoch"
        )
    prune_checkpoints(run.checkpoints)
    return None


def find_damage(checkpoint: Path, run_id: str | None) -> str:
    """Describe the damage to the files of a checkpoint without loading them.

    Returns an empty string for an intact checkpoint of the run with this ID.
    """
    manifest_path = checkpoint / MANIFEST
    if not manifest_path.is_file():
        return f"{MANIFEST} is missing"
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        digests = dict(manifest["files"])
    except (ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} is unreadable ({type(error).__name__}: {error})"
    if not is_intact(manifest):
        return f"{MANIFEST} was modified after it was written"
    if manifest.get("run") != run_id:
        return f"it belongs to another run ({manifest.get('run')}; this run is {run_id})"
    missing = [name for name in digests if not (checkpoint / name).is_file()]
    if missing:
        return f"missing files: {', '.join(missing)}"
    altered = [name for name, digest in digests.items() if sha256_of(checkpoint / name) != digest]
    if altered:
        return f"files modified or truncated after writing: {', '.join(altered)}"
    unlisted = [name for name in _files_of(checkpoint) if name not in (*digests, MANIFEST)]
    return f"{_UNLISTED}{', '.join(unlisted)}" if unlisted else ""


def _files_of(checkpoint: Path) -> list[str]:
    """List the files and links in a checkpoint, except hidden ones, which are never loaded."""
    names: list[str] = []
    for path in checkpoint.rglob("*"):
        if not path.is_symlink() and path.is_dir():
            continue
        relative = path.relative_to(checkpoint)
        is_hidden = any(part.startswith(".") for part in relative.parts)
        if not is_hidden:
            names.append(relative.as_posix())
    return sorted(names)


def prune_checkpoints(folder: Path, keep: Path | None = None) -> None:
    """Remove the staging folders of killed processes, and all checkpoints except `keep`, by default the latest."""
    if not folder.is_dir():
        return
    keep = keep or latest_checkpoint(folder)
    for path in list(folder.iterdir()):
        is_removable = path.name.startswith(".staging-") or _NAME.fullmatch(path.name) is not None
        if path == keep or not is_removable:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def convert_read_errors(checkpoint: str | Path | None) -> Iterator[None]:
    """Convert read errors inside the context to `CheckpointError`.

    Raises:
        CheckpointError: If the checkpoint cannot be loaded, e.g. because a pickle would execute code.
    """
    try:
        yield
    except _READ_ERRORS as error:
        if isinstance(error, CheckpointError | torch.OutOfMemoryError):  # too little memory is not damage
            raise
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"the checkpoint {checkpoint} cannot be read: {type(error).__name__}: {reason:.300}; start over with "
            f"--overwrite, or remove {checkpoint} and run again with --resume, which restarts from the first epoch"
        ) from error


@contextmanager
def stage_checkpoint(run: BaseRunFolder[Any], name: str) -> Iterator[Path]:
    """Stage a new checkpoint inside the context, then add digests and publish it with a single rename.

    Yields:
        The staging folder; only its subfolder `name` is published.

    Raises:
        CheckpointError: If writing fails, e.g. because the disk is full. Existing checkpoints are unchanged.
    """
    target = run.checkpoints / name
    staging = run.checkpoints / f".staging-{name}"
    staged = staging / name
    try:
        # inside `try`, so that the error reports the free space before the staging folder is removed
        with convert_write_errors(target):
            shutil.rmtree(staging, ignore_errors=True)
            staged.mkdir(parents=True)
            yield staging
            files = {file: sha256_of(staged / file) for file in _files_of(staged)}
            write_json(staged / MANIFEST, sealed({"run": run.id, "files": files}))
            sync_tree(staged)
            staged.rename(target)
            sync_folder(run.checkpoints)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def convert_write_errors(target: Path) -> Iterator[None]:
    """Convert a failed write of a checkpoint or adapter inside the context to `CheckpointError`.

    Raises:
        CheckpointError: If writing fails. The message reports the free space and names the previous checkpoint or
            adapter, if any.
    """
    try:
        yield
    except Exception as error:
        if not is_write_failure(error):
            raise
        reason = str(error)
        free_space = ""
        with contextlib.suppress(OSError):
            free_space = f" ({shutil.disk_usage(target.parent).free / 2**20:.0f} MiB free)"
        if "No space left" in reason:
            reason = "the disk is full"
        elif getattr(error, "errno", None) == errno.EDQUOT:
            reason = "the disk quota is exceeded"
        elif "PytorchStreamWriter" in reason or "inline_container" in reason:  # torch's writer has no errno
            reason = "the disk is full or the file size limit is reached"
        if _NAME.fullmatch(target.name):
            previous = next((path for path in _checkpoints(target.parent) if path != target), None)
        else:  # an adapter, whose files are replaced atomically
            previous = target if any(target.glob("*.safetensors")) else None
        remedy = "free some space" if reason.startswith("the disk") else "fix the cause"
        intact = f"the previous one, {previous}, is intact" if previous is not None else "no earlier one exists"
        raise CheckpointError(
            f"could not write {target}: {reason}{free_space}; {intact}; {remedy} and resume with --resume"
        ) from error


def is_write_failure(error: BaseException) -> bool:
    """Return whether an exception indicates a failed write.

    torch's zip writer raises RuntimeError and safetensors its own type, both without an errno. These errors are
    recognized by their messages.
    """
    if isinstance(error, OSError):
        return not isinstance(error, FileNotFoundError)
    return any(sign in str(error) for sign in WRITE_FAILURES)


class CheckpointingTrainer(Trainer):
    """Trainer with atomic checkpoints that omit the frozen weights.

    Differences from transformers' Trainer:
    - A checkpoint contains no frozen weights and is published atomically.
    - A non-finite loss or gradient ends the run before it changes the weights. In fp16, however, a step with a
      non-finite gradient is merely skipped.
    - Elapsed time includes the time before an interruption.

    Args:
        trained: Model that holds the weights to train, built by `build_method` or, for the recipes of `snella_lab`, by
            `adapt_headless`.
        run: Run folder for checkpoints.
        **options: Options of transformers' Trainer; `model` defaults to `trained`.

    Attributes:
        last_loss: Loss of the latest micro-batch, divided by the number of accumulation steps and averaged over
            processes.
        session_start: `time.monotonic()` at the start of this session. Set it to an earlier time to count the setup
            before training toward `elapsed_s`.
    """

    def __init__(self, trained: nn.Module, run: BaseRunFolder[Any], **options: Any) -> None:
        self.trained_model = trained
        self.run_folder = run
        self.last_loss = math.nan
        self.session_start = time.monotonic()
        self._earlier_s = 0.0
        self._staging: Path | None = None
        super().__init__(**{"model": trained, **options})
        self.remove_callback(PrinterCallback)

    @property
    def elapsed_s(self) -> float:
        """Training time in seconds, including time before an interruption."""
        return self._earlier_s + time.monotonic() - self.session_start

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Run the forward and backward pass of one batch.

        Raises:
            Exception: The error that `_not_finite` builds, if the loss is not finite. The weights are unchanged.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        value = mean_across_processes(loss.item())
        if not math.isfinite(value):
            raise self._not_finite("the loss", value)
        self.last_loss = value
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the gradient norm before clipping and, except in fp16, check that it is finite."""
        norm = super()._get_grad_norm(model, grad_norm)
        if not self.args.fp16 and not math.isfinite(float(norm)):  # in fp16, the scaler skips the step
            raise self._not_finite("the gradient", float(norm))
        return norm

    def _not_finite(self, what: str, value: float) -> Exception:
        """Build the error, which reports the step, the last saved state, and the remedy. Subclasses implement this."""
        raise NotImplementedError

    def store_flos(self) -> None:
        """Do nothing: FLOPs are not tracked, and the base class would gather them from all processes."""

    def _get_output_dir(self, trial: Any) -> str:
        """Return the staging folder while a checkpoint is being written, and the checkpoints folder otherwise."""
        return str(self._staging or self.run_folder.checkpoints)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint atomically in the main process, then remove older ones."""
        folder = self.run_folder.checkpoints
        name = f"checkpoint-{self.state.global_step}"
        if is_main() and not (folder / name).is_dir():
            with stage_checkpoint(self.run_folder, name) as self._staging:
                try:
                    super()._save_checkpoint(model, trial)
                    self._write_state(self._staging / name)
                finally:
                    self._staging = None
            prune_checkpoints(folder)
        wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the trained weights."""
        save_trained(self.trained_model, output_dir or str(self.run_folder.adapter))

    def _write_state(self, checkpoint: Path, **values: Any) -> None:
        """Write the elapsed time and `values`, neither of which the Trainer's own state includes."""
        write_json(checkpoint / _PROGRESS_FILE, {"elapsed_s": self.elapsed_s, **values})

    def _read_state(self, checkpoint: Path) -> dict[str, Any]:
        """Load the state written by `_write_state`."""
        values: dict[str, Any] = json.loads((checkpoint / _PROGRESS_FILE).read_text(encoding="utf-8"))
        self._earlier_s = values["elapsed_s"]
        return values

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the trained weights and the state written by `_write_state`."""
        with convert_read_errors(resume_from_checkpoint):
            load_trained_into(self.trained_model, Path(resume_from_checkpoint))
            self._read_state(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the optimizer and scheduler states."""
        with convert_read_errors(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load the random number generator states."""
        with convert_read_errors(checkpoint):
            super()._load_rng_state(checkpoint)


def base_training_arguments(
    checkpoints: Path, device: torch.device, *, seed: int, precision: str, **options: Any
) -> TrainingArguments:
    """Return Trainer arguments shared by all runs: one device per process, no console output.

    `precision` is `"fp32"`, or `"bf16"` or `"fp16"` for autocast. `options` are additional Trainer arguments, such as
    `report_to`, which names experiment trackers (by default, none).
    """
    with _accelerate_device(device):
        arguments = TrainingArguments(
            output_dir=str(checkpoints),
            seed=seed,
            use_cpu=device.type == "cpu",
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            logging_nan_inf_filter=False,
            disable_tqdm=True,
            log_level="error",
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            label_names=["labels"],
            **{"report_to": "none", **options},
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # with several GPUs, the Trainer would use DataParallel
    return arguments


@contextmanager
def _accelerate_device(device: torch.device) -> Iterator[None]:
    """Make Accelerate use a device, e.g. `cuda:1`, inside the context.

    This has no effect on the CPU or with several processes; Accelerate then selects the devices itself. A device that
    is already set in the environment takes precedence.
    """
    if device.type == "cpu" or process_count() > 1 or _DEVICE_VARIABLE in os.environ:
        yield
        return
    os.environ[_DEVICE_VARIABLE] = str(device)
    try:
        yield
    finally:
        del os.environ[_DEVICE_VARIABLE]
