"""`RunFolder`: the files of a run, their digests and status."""

import dataclasses
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, get_args

import yaml

from snella_app import records
from snella_app.config import SESSION_FIELDS, UNSTORED_FIELDS, RunSettings, TrainConfig
from snella_app.files import check_files, sealed, sha256_of, write_json, write_text
from snella_app.records import FORMAT, Allocation, FoldResults, Record, RunInfo, Status, read_if_present


def adapter_digest(folder: Path) -> str:
    """The first 16 digits of the SHA-256 of an adapter's weights; results that name it belong to these weights.

    Args:
        folder: `RUN/adapter`.
    """
    total = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:16]


S = TypeVar("S", bound=RunSettings)

_FILES = (
    "config.yaml",
    "run.json",
    "metrics.json",
    "allocation.json",
    "predictions.json",
    "comparison.json",
    "report.html",
)
_FOLDERS = ("adapter", "checkpoints", "commands", "heat_maps", "masks", "selection", "tracking")
_DIGESTED = ("config.yaml", "metrics.json", "allocation.json", "predictions.json")
_DIGESTED_FOLDERS = ("adapter", "selection")
CARD = "README.md"
"""The adapter's model card, which has no digest: it is meant to be edited."""
_NEW_RUN = "; once it is finished, a new run can start from what it trained: snella train --init-from {} --out NEW"
_INHERITED = (
    *("task", "backbone", "weights", "pretrained", "channels", "method", "r", "scaling"),
    *("columns", "white", "skip_corrupt", "class_order", "protocol", "seed", "test_seed", "folds", "fold"),
    *("val_fraction", "test_fraction", "val_size", "test_size"),
)
"""Settings of the run that another one starts from, without which its trained values would mean something else, or be
measured on images that they were trained on."""
_REMEDY = "copy the file again, or train again with `--overwrite`"
_UNBOUND = (*SESSION_FIELDS, *UNSTORED_FIELDS, "data")
"""Settings that may change while a run is resumed; images are compared by their own digests."""


def settings_digest(values: Mapping[str, Any]) -> str:
    """SHA-256 of the settings of a `config.yaml`, without those that may change while a run is resumed.

    Args:
        values: Content of the file.
    """
    bound = {str(name): value for name, value in values.items() if name not in _UNBOUND}
    return hashlib.sha256(json.dumps(bound, sort_keys=True, default=str).encode()).hexdigest()


def status_text(status: Status) -> str:
    """The status, human-readable: a killed process leaves it at running."""
    return "running or killed" if status == "running" else status


def _as_of_file(message: str) -> str:
    """Errors of settings as those of a file: names in quotes, without examples to type."""
    missing = r"missing required settings: (.*?), e\.g\. [^;]*"
    message = re.sub(missing, lambda found: "it lacks " + ", ".join(map(repr, found[1].split(", "))), message)
    return re.sub(r"(^|; )(\w+)(?= must\b)", r"\1'\2'", message)


class RunFolderOf(Generic[S]):
    """Paths and small files of one run.

    Args:
        path: The folder; need not exist yet.

    Attributes:
        settings_type: Class of the run's settings.
        files: Files at its top that are the run's own.
        folders: Folders at its top that are the run's own.
    """

    settings_type: type[S]
    files: ClassVar[tuple[str, ...]] = _FILES
    folders: ClassVar[tuple[str, ...]] = _FOLDERS

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.adapter = self.path / "adapter"
        self.checkpoints = self.path / "checkpoints"
        self.report = self.path / "report.html"
        self.lock = self.path / ".lock"

    @property
    def status(self) -> Status | None:
        """What `run.json` says; None where no run is.

        Raises:
            ValueError: The file is damaged.
        """
        if not (self.path / "run.json").is_file():
            return None
        run = self.read_json("run.json")
        if run.get("status") not in get_args(Status):
            raise ValueError(f"{self.path / 'run.json'} is damaged: it holds no status; {_REMEDY}")
        status: Status = run["status"]
        return status

    @property
    def id(self) -> str | None:
        """What tells this run from all others; None where no run is, and for runs of early versions."""
        found = self.read_json("run.json").get("id") if (self.path / "run.json").is_file() else None
        return None if found is None else str(found)

    @property
    def has_stopped(self) -> bool:
        """Whether the record says that the run is running, and no process holds its lock: it was killed.

        Where that cannot be known, as in a folder of another user, it counts as running.
        """
        if self.status != "running":
            return False
        try:
            descriptor = os.open(self.lock, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return True
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return False
        finally:
            os.close(descriptor)
        return True

    def read_json(self, name: str) -> Any:
        """Content of one of the JSON files, as it stands there; `snella_app.records.read` checks its fields.

        Raises:
            FileNotFoundError: This is not the folder of a run, or the run has not written it yet.
            ValueError: The file is damaged.
        """
        return records.read_object(self.path / name)

    def write_json(self, name: str, value: Any) -> None:
        """Write one of the JSON files atomically."""
        write_json(self.path / name, value)
        self._note_digest(name)

    def write(self, record: Record) -> None:
        """Write the file of a record atomically; those that have fields for it with the run's id and settings."""
        is_early = (self.path / "run.json").is_file() and self.id is None  # stays as it is
        if isinstance(record, RunInfo) and not is_early:
            binding: Any = self._binding()
            record = dataclasses.replace(record, **binding)
        elif isinstance(record, FoldResults):
            record = dataclasses.replace(record, settings=self._binding()["settings"])
        records.write(record, self.path)
        self._note_digest(record.file)

    def update(self, status: Status, error: str | None = None, **values: Any) -> None:
        """Change entries of `run.json`, and leave the others as they are."""
        is_there = (self.path / "run.json").is_file()
        run = self.read_json("run.json") if is_there else {"format": FORMAT, **self._binding()}
        run.update(values, status=status)
        run.pop("error", None)
        if error is not None:
            run["error"] = error
        write_json(self.path / "run.json", sealed(run))

    def finish(self) -> None:
        """Set the status to finished, with the digests of settings, results and adapter."""
        paths = [self.path / name for name in _DIGESTED]
        for folder in _DIGESTED_FOLDERS:
            files = (path for path in (self.path / folder).rglob("*") if path.is_file() and path.name != CARD)
            paths += sorted(files)
        digests = {path.relative_to(self.path).as_posix(): sha256_of(path) for path in paths if path.is_file()}
        self.update("finished", files=digests)

    def check_files(self) -> None:
        """Compare the files of a finished run with their digests in `run.json`; an unfinished run has none.

        Raises:
            ValueError: One was altered; all of them are named.
        """
        check_files(self.path, self.read_json("run.json").get("files", {}))

    def check_complete(self) -> None:
        """Refuse a finished run that lacks files which it wrote.

        Raises:
            FileNotFoundError: All that are missing are named.
        """
        files = self.read_json("run.json").get("files", {})
        if missing := [name for name in files if not (self.path / name).is_file()]:
            raise FileNotFoundError(
                f"{self.path} is finished, but lacks {', '.join(missing)}; restore it from a copy, or train again with "
                "`--overwrite`"
            )

    def _note_digest(self, name: str) -> None:
        """Bring the digest of a file of a finished run up to date, after writing it."""
        values = self.read_json("run.json") if (self.path / "run.json").is_file() else {}
        if name in values.get("files", {}):
            files = {**values["files"], name: sha256_of(self.path / name)}
            write_json(self.path / "run.json", sealed({**values, "files": files}))

    def write_config(self, config: S) -> None:
        """Write `config.yaml`: the settings of the run, not those of one call such as `overwrite`."""
        write_text(self.path / "config.yaml", yaml.safe_dump(config.stored(), sort_keys=False))
        self._note_digest("config.yaml")

    def read_config(self) -> S:
        """The configuration that the run was started with.

        Raises:
            FileNotFoundError: This is not the folder of a run.
            ValueError: It holds settings that are out of range or unknown.
        """
        path = self.path / "config.yaml"
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}: this is not the folder of a run")
        known = self._known_settings()
        try:
            stored = self._stored_settings()
            if known is None or settings_digest(stored) == known:
                values = {name: value for name, value in stored.items() if name not in UNSTORED_FIELDS}
                return self.settings_type(**values)
        except (TypeError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
            raise ValueError(f"{path} is damaged: {error}; train again with `--overwrite`") from None
        except ValueError as error:  # names settings as if they had been typed
            raise ValueError(f"{path} is damaged: {_as_of_file(str(error))}; train again with `--overwrite`") from None
        raise ValueError(
            f"{path} was altered after it was written: the run was begun with other settings; restore the file, or "
            "train again with `--overwrite`"
        )

    def check_adapter(self) -> None:
        """Refuse a missing best adapter, and files that were altered.

        Raises:
            FileNotFoundError: There is none; tells a missing one from one not written yet.
            ValueError: A file was altered.
        """
        if any(self.adapter.glob("*.safetensors")):
            self.check_files()
            return
        if self.status == "finished":
            raise FileNotFoundError(
                f"{self.adapter} is missing, though the run is finished; "
                "restore that folder from a copy, or train again with `--overwrite`"
            )
        state = status_text(self.status) if self.status else "not begun"
        raise FileNotFoundError(f"{self.path} holds no adapter yet (status {state}); finish the run with --resume")

    def resolve_settings(self, config: S) -> S:
        """Resolve the settings of a new or resumed run, before anything is loaded or written.

        Args:
            config: The settings asked for; `resume` and `overwrite` decide what happens to an existing run.

        Returns:
            Resolved settings: those of the stored run when it is resumed.

        Raises:
            FileExistsError: The folder holds a run and neither was asked for, or something that is not a run.
            FileNotFoundError: `resume` without a run, and without data and backbone to start one.
            ValueError: `resume` with settings that differ from the stored ones.
        """
        status = self.status
        settings: Any = config
        if settings.resume and status is not None:
            if status != "finished" and self.id is None:
                raise ValueError(
                    f"{self.path} was begun by a version of snella whose checkpoints do not say which run they belong "
                    "to; finish it with that version, or start over with --overwrite"
                )
            return self._resumed(config)
        is_named = all(getattr(config, name) for name in config.needed)
        if settings.resume and not is_named and (self.path / "config.yaml").is_file():
            return self._begun(config)
        if settings.resume and not is_named:
            raise FileNotFoundError(
                f"resume must name the folder of a run, got {self.path}, which holds none; "
                f"give {' and '.join(config.needed)} to start one"
            )
        if status is not None and not settings.overwrite:
            state, hint = (
                ("a finished run", "")
                if status == "finished"
                else (f"an unfinished run ({status_text(status)})", "resume it with --resume, ")
            )
            raise FileExistsError(
                f"out={self.path} holds {state}; {hint}choose another folder, or start over with --overwrite"
            )
        if status is None and self._holds_unexpected_files():
            raise FileExistsError(f"out={self.path} holds files but no run; choose an empty or a new folder")
        return config.resolved()

    def resolve_resume(self, config: S) -> tuple[S, Status | None]:
        """Resolve settings as `resolve_settings` does, and tell what became of the run that is resumed.

        Returns:
            Resolved settings, and the status of the stored run; None where a new one starts.

        Raises:
            FileNotFoundError: Or the adapter or results of a finished run are gone.
        """
        resolved: Any = self.resolve_settings(config)
        status = self.status if resolved.resume else None
        if status == "finished":
            self.check_adapter()
            self.check_complete()
        return resolved, status

    def prepare(self, config: S, *, is_resumed: bool) -> None:
        """Create the folder of a new run, or prepare the existing one for resuming."""
        self.remove_temporaries()
        if is_resumed:
            self.write_config(config)
        else:
            self.create(config)
        self.checkpoints.mkdir(exist_ok=True)

    def create(self, config: S) -> None:
        """Start a run: write `config.yaml`, remove the old run, make the folders.

        A process that is killed here leaves an old run that is refused, since its settings are others, or a folder
        without `run.json` and checkpoints, which `resume` begins by its `config.yaml`.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / "config.yaml", yaml.safe_dump(config.stored(), sort_keys=False))
        self._clear(keep="config.yaml")
        self.checkpoints.mkdir(exist_ok=True)

    def _begun(self, config: S) -> S:
        """The settings of a run that was killed before it wrote `run.json`."""
        if any(self.checkpoints.glob("checkpoint-*")):
            raise FileNotFoundError(
                f"{self.path} holds checkpoints but no run.json; copy that file there again, or start over with "
                "--overwrite"
            )
        return self._resumed(config)

    def _binding(self) -> dict[str, str | None]:
        """The id and the digest of the settings that this folder's records name; a new id where no run is."""
        has_config = (self.path / "config.yaml").is_file()
        settings = settings_digest(self._stored_settings()) if has_config else None
        return {"id": self.id or secrets.token_hex(16), "settings": settings}

    def _stored_settings(self) -> dict[str, Any]:
        """Content of `config.yaml`."""
        return dict(yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8")))

    def _known_settings(self) -> str | None:
        """The digest of the settings that the run was begun with; None for runs of early versions."""
        for name in ("run.json", FoldResults.file):
            if (self.path / name).is_file():
                known: str | None = self.read_json(name).get("settings")
                return known
        return None

    def remove_temporaries(self) -> None:
        """Remove the temporary files of writes that a killed process did not finish; its caller holds the lock."""
        for name in self.files:
            for path in self.path.glob(f".{name}.*"):
                path.unlink(missing_ok=True)

    def _resumed(self, config: S) -> S:
        """The stored settings, if `config` does not contradict them; `data` may name its new place."""
        stored = self.read_config()
        data = getattr(config, "data", None)
        run = self.read_json("run.json") if self.status is not None else {}
        if data and run.get("data", {}).get("digest"):
            setattr(stored, "data", data)  # noqa: B010 - a field of the subclass
        differences = config.differences(stored)
        if differences:
            raise ValueError(
                f"resume continues {self.path} with its own settings, but {'; '.join(differences)}; leave them out"
                + (_NEW_RUN.format(self.path) if hasattr(stored, "init_from") else "")
            )
        for name in SESSION_FIELDS:
            if hasattr(config, name):
                setattr(stored, name, getattr(config, name))
        return stored

    def _holds_unexpected_files(self) -> bool:
        """Whether the folder holds anything besides other runs and files of an unfinished run."""
        if not self.path.exists():
            return False
        if not self.path.is_dir():
            return True
        expected = {*self.files, *self.folders}
        unexpected = [e for e in self.path.iterdir() if e.name not in expected and not e.name.startswith(".")]
        return any(not (entry / "run.json").is_file() for entry in unexpected)

    def _clear(self, keep: str | None = None) -> None:
        """Remove a run, and only what belongs to it: checkpoints first, then `run.json`, which makes it a run."""
        folders = sorted(self.folders, key=lambda name: name != "checkpoints")
        files = sorted(self.files, key=lambda name: name != "run.json")
        for name in (folders[0], *files, *folders[1:]):
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif name != keep:
                path.unlink(missing_ok=True)


class RunFolder(RunFolderOf[TrainConfig]):
    """The folder of a run of `snella train`."""

    settings_type = TrainConfig

    def start_settings(self, config: TrainConfig) -> TrainConfig:
        """The settings of a run that starts from what this one has trained.

        Args:
            config: The settings asked for. Those that the trained values belong to are this run's where they are at
                their default; a budget starts where this run's adapter has it.

        Raises:
            FileNotFoundError: This is not the folder of a run, or the adapter is missing.
            ValueError: The run is not finished, or settings contradict its own.
        """
        if self.status != "finished":
            state = "which holds no run" if self.status is None else f"which is {status_text(self.status)}"
            raise ValueError(f"init_from must be the folder of a finished run, got {self.path}, {state}")
        self.check_adapter()
        stored = self.read_config()
        defaults = {f.name: f.default for f in dataclasses.fields(TrainConfig)}
        given = [name for name in _INHERITED if getattr(config, name) != defaults[name]]
        different = [
            f"{name} is {getattr(stored, name)!r} there and {getattr(config, name)!r} here"
            for name in given
            if getattr(config, name) != getattr(stored, name)
        ]
        if different:
            raise ValueError(f"init_from={self.path} sets what is trained, but {'; '.join(different)}; leave them out")
        values = {name: getattr(stored, name) for name in _INHERITED}
        for name in ("data", "train_size", "img_size", "target_sparsity"):
            values[name] = getattr(stored if getattr(config, name) is None else config, name)
        options = {**stored.method_options, **config.method_options}
        allocation = read_if_present(Allocation, self.path)
        if allocation is not None and "init_sparsity" not in config.method_options:
            kept = sum(matrix.budget for matrix in allocation.matrices)
            if kept < allocation.total_weights:
                sparsity = 1 - kept / allocation.total_weights
                options["init_sparsity"] = min(sparsity, values["target_sparsity"])
        return dataclasses.replace(config, **values, method_options=options)
