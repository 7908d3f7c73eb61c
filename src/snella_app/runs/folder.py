"""`RunFolder`: paths, settings, records, digests, and status of a run.

`config.yaml` contains the settings of the run. `run.json` contains its status, and the SHA-256 digests of other files,
which show whether these files were altered.
"""

import dataclasses
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, get_args

import yaml

from snella_app.config.train import SESSION_FIELDS, UNSTORED_FIELDS, RunSettings, TrainConfig
from snella_app.files import sealed, sha256_of, write_json, write_text
from snella_app.records.record import FORMAT, Record, read_if_present, read_object, write
from snella_app.records.run import Allocation, FoldResults, RunInfo, Status, status_text


def adapter_digest(folder: Path) -> str:
    """Return a digest of the safetensors files in an adapter folder: the first 16 hex digits of a SHA-256."""
    total = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        total.update(bytes.fromhex(sha256_of(path)))
    return total.hexdigest()[:16]


def sibling_path(run: str | Path, suffix: str) -> Path:
    """Return a path next to a run folder, e.g. `runs/photos.onnx` for `runs/photos`.

    The path is absolute if `run` has no name, e.g. for `.`.
    """
    path = Path(run) if Path(run).name not in ("", "..") else Path(run).resolve()
    return path.with_name(path.name + suffix)


S = TypeVar("S", bound=RunSettings)

# files whose digests `finish` stores
_RESULTS = ("config.yaml", "metrics.json", "allocation.json", "predictions.json")
_FOLDERS = ("adapter", "checkpoints", "commands", "heat_maps", "masks", "selection", "tracking")
CARD = "README.md"
"""Model card of the adapter. It has no digest, since users edit it."""
_INHERITED = (
    *("task", "backbone", "weights", "pretrained", "channels", "method", "r", "scaling"),
    *("columns", "white", "skip_corrupt", "class_order", "protocol", "seed", "test_seed", "folds", "fold"),
    *("val_fraction", "test_fraction", "val_size", "test_size"),
)
"""Settings inherited with `init_from`. Different values would not fit the trained weights, or would evaluate them on
training images."""
_CHANGEABLE = (*SESSION_FIELDS, "data")
"""Settings that may change when a run is resumed. `data` may change, because a digest detects changed images."""
_NEW_CONFIG = ".new-config.yaml"
"""Settings of a run that is about to replace an old run."""


def _settings_digest(values: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the settings in `config.yaml`, except those that may change when a run is resumed."""
    fixed = {str(name): value for name, value in values.items() if name not in _CHANGEABLE}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True, default=str).encode()).hexdigest()


def _for_config_file(message: str) -> str:
    """Rephrase a settings error for a configuration file: quote the names, and drop examples for the command line."""
    missing = r"missing required settings: (.*?), e\.g\. [^;]*"

    def quote_names(match: re.Match[str]) -> str:
        """Quote the names of missing settings."""
        return "it lacks " + ", ".join(map(repr, match[1].split(", ")))

    message = re.sub(missing, quote_names, message)
    return re.sub(r"(^|; )(\w+)(?= must\b)", r"\1'\2'", message)


class BaseRunFolder(Generic[S]):
    """Folder of a run: paths, configuration, records, and status.

    Args:
        path: The folder, which need not exist yet.

    Attributes:
        settings_type: Configuration class of the run.
        files: Names of top-level files that belong to the run.
        folders: Names of top-level folders that belong to the run.
    """

    settings_type: type[S]
    files: ClassVar[tuple[str, ...]] = ("run.json", *_RESULTS, "comparison.json", "report.html")
    folders: ClassVar[tuple[str, ...]] = _FOLDERS

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.adapter = self.path / "adapter"
        self.checkpoints = self.path / "checkpoints"
        self.report = self.path / "report.html"
        self.lock = self.path / ".lock"

    @property
    def status(self) -> Status | None:
        """Status in `run.json`, or None if the folder has no run.

        Raises:
            ValueError: If the file is damaged.
        """
        run = self._read_run()
        if run is None:
            return None
        status: Status | None = run.get("status")
        if status not in get_args(Status):
            raise ValueError(
                f"{self.path / 'run.json'} is damaged: it has no valid status; copy the file again, or train again "
                "with `--overwrite`"
            )
        return status

    @property
    def id(self) -> str | None:
        """Unique ID of the run, or None if the folder has no run or an early version of snella wrote the run."""
        return (self._read_run() or {}).get("id")

    @property
    def was_killed(self) -> bool:
        """True if the process of the run was killed: the status is `running`, but no process holds the lock.

        False if the lock cannot be checked, e.g. in another user's folder.
        """
        if self.status != "running":
            return False
        try:
            with open(self.lock, opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW)) as lock:
                # fails while a running process holds its exclusive lock
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True

    def read_json(self, name: str) -> Any:
        """Read a JSON file without validating its fields; `snella_app.records.record.read` validates them.

        Raises:
            FileNotFoundError: If this is not a run folder, or the run has not written the file yet.
            ValueError: If the file is damaged.
        """
        return read_object(self.path / name)

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file atomically, and update its digest in `run.json` if one is stored there."""
        write_json(self.path / name, value)
        self._update_digest(name)

    def write(self, record: Record) -> None:
        """Write the file of a record atomically, with the run ID and the digests if the record has these fields."""
        if isinstance(record, RunInfo):
            stored_files = (self._read_run() or {}).get("files") or None
            record = dataclasses.replace(record, **self._binding(), files=stored_files)
        elif isinstance(record, FoldResults):
            record = dataclasses.replace(record, settings=self._binding()["settings"])
        write(record, self.path)
        self._update_digest(record.file)

    def update(self, status: Status, error: str | None = None, **values: Any) -> None:
        """Update entries of `run.json`; the other entries keep their values.

        The stored `error` is replaced, or removed if `error` is None.
        """
        run = self._read_run() or {"format": FORMAT, **self._binding()}
        run.update(values, status=status)
        run.pop("error", None)
        if error is not None:
            run["error"] = error
        write_json(self.path / "run.json", sealed(run))

    def finish(self) -> None:
        """Set the status to finished, and store digests of the settings, results, adapter, and selected parameters."""
        self.update("finished", files=self._digests(*_RESULTS, "adapter", "selection"))

    @contextmanager
    def writing_adapter(self) -> Iterator[None]:
        """Record the digests of an unfinished run's adapter, which the caller writes inside the context.

        A process killed inside the context leaves the run without digests. Resuming writes the adapter again.
        """
        self.update("running", files={})
        yield
        self.update("running", files=self._digests("adapter"))

    def _digests(self, *names: str) -> dict[str, str]:
        """Return the digests of files, and of all files in folders except the model card."""
        paths: list[Path] = []
        for name in names:
            path = self.path / name
            paths += sorted(path.rglob("*")) if path.is_dir() else [path]
        files = (path for path in paths if path.is_file() and path.name != CARD)
        return {path.relative_to(self.path).as_posix(): sha256_of(path) for path in files}

    def _read_run(self) -> dict[str, Any] | None:
        """Read `run.json`, or return None if the folder has no run."""
        return self.read_json("run.json") if (self.path / "run.json").is_file() else None

    def _update_digest(self, name: str) -> None:
        """Update the stored digest of a rewritten file."""
        run = self._read_run() or {}
        files = dict(run.get("files") or {})
        if name in files:
            self.update(run["status"], run.get("error"), files={**files, name: sha256_of(self.path / name)})

    def write_config(self, config: S) -> None:
        """Write `config.yaml`, without settings such as `overwrite` that apply only to a single call."""
        self._write_settings(config)
        self._update_digest("config.yaml")

    def _write_settings(self, config: S, name: str = "config.yaml") -> None:
        """Write the settings without updating their digest."""
        write_text(self.path / name, yaml.safe_dump(config.stored(), sort_keys=False))

    def complete_replacement(self) -> None:
        """Remove the old run if the settings of a new one are stored, and make them the settings of the folder.

        The caller must hold the lock.
        """
        new_config = self.path / _NEW_CONFIG
        if new_config.is_file():
            self.clear()
            new_config.replace(self.path / "config.yaml")

    def read_config(self) -> S:
        """Read the configuration of the run.

        Raises:
            FileNotFoundError: If the folder has no `config.yaml`.
            ValueError: If the file is damaged, was altered, or has invalid settings.
        """
        path = self.path / "config.yaml"
        if not path.is_file():
            state = "this is not a run folder"
            if (self.path / "run.json").is_file():
                state = "deleted; restore the file, or train again with `--overwrite`"
            raise FileNotFoundError(f"no file {path}: {state}")
        stored_digest = self._stored_digest()
        try:
            stored = self._stored_settings()
            if stored_digest in (None, _settings_digest(stored)):
                values = {name: value for name, value in stored.items() if name not in UNSTORED_FIELDS}
                return self.settings_type.from_flat(**values)
        except (TypeError, ValueError, RecursionError, yaml.YAMLError) as error:
            reason = _for_config_file(str(error))
            raise ValueError(f"{path} is damaged: {reason}; train again with `--overwrite`") from None
        raise ValueError(
            f"{path} was altered after it was written: the run was started with different settings; restore the file, "
            "or train again with `--overwrite`"
        )

    def check_adapter(self) -> None:
        """Check that the run has an adapter.

        Reading `RunInfo` checks that the adapter was not altered.

        Raises:
            FileNotFoundError: If the adapter is missing or has not been written yet.
        """
        if any(self.adapter.glob("*.safetensors")):
            return
        if self.status == "finished":
            raise FileNotFoundError(
                f"{self.adapter} is missing, although the run is finished; "
                "restore the folder from a copy, or train again with `--overwrite`"
            )
        state = status_text(self.status) if self.status else "not started"
        raise FileNotFoundError(f"{self.path} has no adapter yet (status {state}); finish the run with --resume")

    def resolve_settings(self, config: S) -> S:
        """Resolve the settings of a new or resumed run, without writing anything.

        Args:
            config: Requested settings; `resume` and `overwrite` determine what happens to an existing run.

        Returns:
            Resolved settings. For a resumed run, these are the stored settings, with the `SESSION_FIELDS` and any new
            location of the data from `config`.

        Raises:
            FileExistsError: If the folder has a run and neither `resume` nor `overwrite` is set, if it has other files
                but no run, or if the path is a file.
            FileNotFoundError: If `resume` is set, and the folder either has checkpoints but no `run.json`, or has
                neither `run.json` nor `config.yaml` while `config` lacks settings that are required to start a run.
            ValueError: If `resume` is set with settings that differ from the stored ones, if an early version of snella
                started the unfinished run, or if `run.json` or `config.yaml` is damaged or was altered.
        """
        status = self.status
        requested = config.flat()
        has_required = all(requested[name] for name in config.required)
        can_start = has_required and not any(self.checkpoints.glob("checkpoint-*"))
        if config.run.resume and (status is not None or not can_start):
            self._check_resumable(config, status)
            return self._resumed_settings(config)
        if status is not None and not config.run.overwrite:
            state = "a finished run"
            hint = ""
            if status != "finished":
                state = f"an unfinished run ({status_text(status)})"
                hint = "resume it with --resume, "
            raise FileExistsError(
                f"out={self.path} contains {state}; {hint}choose another folder, or start over with --overwrite"
            )
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"out must be a folder, got the file {str(self.path)!r}; choose another name")
        if status is None and self._has_unexpected_files(config.run.overwrite):
            raise FileExistsError(f"out={self.path} contains files but no run; choose a new or empty folder")
        return config.resolved()

    def resolve_resume(self, config: S) -> tuple[S, RunInfo | None]:
        """Resolve settings like `resolve_settings`, and return the record of a resumed run.

        If a process was killed while it replaced an old run, `resume` first completes the replacement.

        Returns:
            Resolved settings, and the content of `run.json`. The content is None for a new run, or if the file was
            never written.

        Raises:
            FileNotFoundError: As for `resolve_settings`, or if the adapter or results of a finished run are missing.
            ValueError: As for `resolve_settings`, or if `run.json` is damaged, or the adapter or results were altered.
        """
        if config.run.resume:
            self.complete_replacement()
        resolved = self.resolve_settings(config)
        info = read_if_present(RunInfo, self.path) if resolved.run.resume else None
        if info is not None and info.is_finished:
            self.check_adapter()
            if missing := [name for name in info.files or {} if not (self.path / name).is_file()]:
                raise FileNotFoundError(
                    f"{self.path} is finished, but lacks {', '.join(missing)}; restore from a copy, or train again "
                    "with `--overwrite`"
                )
        return resolved, info

    def prepare(self, config: S, *, is_resumed: bool) -> None:
        """Prepare a folder for a resumed run, or for a new run by removing the old run and writing `config.yaml`.

        If a process is killed while it prepares a new run, `resume` starts the new run if its settings were already
        stored, and continues the old run otherwise.
        """
        self.remove_temporary_files()
        if is_resumed:
            self.write_config(config)
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            self._write_settings(config, _NEW_CONFIG)
            self.complete_replacement()
        self.checkpoints.mkdir(exist_ok=True)

    def _check_resumable(self, config: S, status: Status | None) -> None:
        """Check that the folder has a run to resume, or one that was killed before it wrote `run.json`."""
        if status is None and any(self.checkpoints.glob("checkpoint-*")):
            raise FileNotFoundError(
                f"{self.path} has checkpoints but no run.json; restore that file, or start over with --overwrite"
            )
        if status is None and not (self.path / "config.yaml").is_file():
            raise FileNotFoundError(
                f"out must be the folder of a run to resume, got {self.path}, which has no run; "
                f"give {' and '.join(config.required)} to start one"
            )
        if status not in (None, "finished") and self.id is None:
            raise ValueError(
                f"{self.path} was started by an early version of snella, whose checkpoints have no run id; finish "
                "it with that version, or start over with --overwrite"
            )

    def _binding(self) -> dict[str, Any]:
        """Return the entries of `run.json` that identify the run: its ID and the digest of its settings.

        A new run gets a new ID. The result is empty for a run that an early version of snella wrote without an ID.
        """
        run = self._read_run() or {"id": secrets.token_hex(16)}
        if "id" not in run:
            return {}
        has_config = (self.path / "config.yaml").is_file()
        return {"id": run["id"], "settings": _settings_digest(self._stored_settings()) if has_config else None}

    def _stored_settings(self) -> dict[str, Any]:
        """Read `config.yaml`."""
        return dict(yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8")))

    def _stored_digest(self) -> str | None:
        """Return the settings digest in `run.json` or `folds.json`, or None if it is absent."""
        folds = self.path / FoldResults.file
        stored = self._read_run() or (read_object(folds) if folds.is_file() else {})
        return stored.get("settings")

    def remove_temporary_files(self) -> None:
        """Remove temporary files left by a killed process; the caller must hold the lock."""
        for name in (*self.files, _NEW_CONFIG):
            for path in self.path.glob(f".{name}.*"):
                path.unlink(missing_ok=True)

    def _resumed_settings(self, config: S) -> S:
        """Return the stored settings, with the `SESSION_FIELDS` and any new location of the data from `config`.

        Raise ValueError if other settings differ. The location may change if `run.json` has a digest of the data.
        """
        stored = self.read_config()
        requested = config.flat()
        run = self._read_run() or {}
        if requested.get("data") and run.get("data", {}).get("digest"):
            stored = stored.replace(data=requested["data"])
        if differences := config.differences(stored):
            command = f"snella train --init-from {self.path} --out NEW"
            hint = f"; to continue training a finished run with different settings, use {command}"
            raise ValueError(
                f"resume continues {self.path} with its stored settings, but {'; '.join(differences)}; leave them out"
                + (hint if "init_from" in requested else "")
            )
        return stored.replace(**{name: requested[name] for name in SESSION_FIELDS if name in requested})

    def _has_unexpected_files(self, overwrite: bool) -> bool:
        """Return whether a folder without `run.json` contains anything that a new run should not replace.

        Other runs, hidden files, and the files of a process that was killed before it wrote `run.json` are allowed.
        Such a process leaves its settings in `config.yaml`, an empty `checkpoints`, and a `selection`; if it was
        replacing an old run, it may leave any file of a run. `overwrite` allows all files of a run.
        """
        if not self.path.is_dir():
            return False
        if overwrite or (self.path / _NEW_CONFIG).is_file():
            own: tuple[str, ...] = (*self.files, *self.folders)
        else:
            own = ("config.yaml", "checkpoints", "selection") if self._has_only_settings() else ()
        others = (entry for entry in self.path.iterdir() if entry.name not in own)
        return any(not entry.name.startswith(".") and not (entry / "run.json").is_file() for entry in others)

    def _has_only_settings(self) -> bool:
        """Return whether the folder has the settings of a run, but no checkpoints."""
        try:
            self.read_config()
        except (FileNotFoundError, ValueError):
            return False
        return not any(self.checkpoints.glob("*"))

    def clear(self) -> None:
        """Remove only the run's own files: checkpoints first, then `run.json`, which marks a run, then the rest."""
        for name in ("checkpoints", "run.json", *self.files, *self.folders):
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


class RunFolder(BaseRunFolder[TrainConfig]):
    """Folder of a run of `snella train`."""

    settings_type = TrainConfig

    def init_from_settings(self, config: TrainConfig) -> TrainConfig:
        """Return the settings of a new run that is initialized with the trained weights of this one.

        Args:
            config: Requested settings. Inherited settings left at their defaults take the values of this run, as do
                `data`, `train_size`, `img_size`, and `target_sparsity` if they are None. Method options are merged.
                Unless `init_sparsity` is requested, the new run starts with the sparsity of this run's adapter (the
                fraction of weights that its update may not change), or with the target sparsity if that is lower.

        Raises:
            FileNotFoundError: If the adapter is missing.
            ValueError: If the run is not finished or was altered, or inherited settings differ.
        """
        info = read_if_present(RunInfo, self.path)
        if info is None or not info.is_finished:
            state = "which has no run" if info is None else f"which is {status_text(info.status)}"
            raise ValueError(f"init_from must be the folder of a finished run, got {self.path}, {state}")
        self.check_adapter()
        stored_config = self.read_config()
        if different := config.differences(stored_config, _INHERITED):
            raise ValueError(
                f"init_from={self.path} requires the settings of that run, but {'; '.join(different)}; leave them out"
            )
        stored = stored_config.flat()
        requested = config.flat()
        values = {name: stored[name] for name in _INHERITED}
        for name in ("data", "train_size", "img_size", "target_sparsity"):
            values[name] = stored[name] if requested[name] is None else requested[name]
        options = {**stored["method_options"], **requested["method_options"]}
        # a requested target replaces the stored one; either can be a setting or a method option
        if "target_sparsity" in requested["method_options"]:
            values["target_sparsity"] = requested["target_sparsity"]
        elif requested["target_sparsity"] is not None:
            options.pop("target_sparsity", None)
        allocation = read_if_present(Allocation, self.path)
        # the budget of a matrix is the number of its weights that the update may change
        if allocation is not None and "init_sparsity" not in requested["method_options"]:
            budget = sum(matrix.budget for matrix in allocation.matrices)
            if budget < allocation.total_weights:
                adapter_sparsity = 1 - budget / allocation.total_weights
                target = options.get("target_sparsity", values["target_sparsity"])
                options["init_sparsity"] = min(adapter_sparsity, target)
        return config.replace(**values, method_options=options)
