"""Image folders: `class/image`, or `train|val|test/class/image`."""

import difflib
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from snella_app.console import counted
from snella_app.data.datasets import Collection, ImageDataset
from snella_app.data.images import HEIC_HINT, IMAGE_SUFFIXES, is_heic, is_image
from snella_app.data.options import DataConfig, TargetKind
from snella_app.data.sources import FileImages, broken_rows
from snella_app.files import expand_user
from snella_app.text import listed, similar_paths

PARTS = {
    **{"train": "train", "training": "train", "test": "test", "testing": "test"},
    **{"val": "val", "validation": "val", "valid": "val", "dev": "val"},
}
"""Splits by accepted name, in lowercase."""
_TABLES = (".csv", ".tsv", ".parquet", ".xlsx")
_METADATA = "metadata.jsonl"
"""Name of the only JSON table that the `datasets` library reads in an image folder."""
_LAYOUT = "the expected layout is PATH/class/image.jpg"
_Files = dict[str, list[Path]]


def load_folder(path: str, config: DataConfig, target: TargetKind) -> Collection:
    """Load the images of a folder with one subfolder per class.

    The folder has splits if it contains a folder `train` or `training` with class folders. Every image file is decoded
    once to find broken files before training. Hidden files are ignored, and other files in class folders that are not
    images are skipped with a note. Images in nested folders belong to the enclosing class folder.
    """
    root = existing_folder(path)
    folders = _split_folders(root)
    others: Counter[str] = Counter()
    files = {part: _class_files(folder, others) for part, folder in folders.items()}
    problems = _check_classes(files, folders, root)
    notes = _skipped_notes(root, folders, others)
    paths = [file for by_class in files.values() for file in chain.from_iterable(by_class.values())]
    source = FileImages(paths, config.reading)
    names = {file: file.relative_to(root).as_posix() for file in paths}
    reasons = {paths[row]: reason for row, reason in broken_rows(source, range(len(paths))).items()}
    broken = {names[file]: reason for file, reason in reasons.items()}
    if broken:
        notes.append(broken_note(broken, len(paths), path, config.skip_corrupt))
        for by_class in files.values():
            for name, members in by_class.items():
                by_class[name] = [file for file in members if file not in reasons]
        problems = _check_classes(files, folders, root)
    classes = list(files["train"])
    indices = {name: index for index, name in enumerate(classes)}
    rows = {file: row for row, file in enumerate(paths)}
    parts: dict[str, Any] = {}
    for part, by_class in files.items():
        labels = {file: indices[name] for name, members in by_class.items() for file in members}
        part_rows = [rows[file] for file in labels]
        part_names = [names[file] for file in labels]
        parts[part] = ImageDataset(source, part_rows, list(labels.values()), part_names)
    has_parts = folders["train"] != root
    return Collection(root.name, classes, **parts, has_parts=has_parts, notes=notes, broken=broken, problems=problems)


def broken_note(broken: Mapping[str, str], count: int, folder: str | Path, skip_corrupt: bool) -> str:
    """Return the note about the `broken` images (reason by name) among `count` images.

    Raises ValueError unless `skip_corrupt`.
    """
    named = listed(f"{name} ({reason})" for name, reason in broken.items())
    if not skip_corrupt:
        raise ValueError(
            f"{len(broken)} of {count} images in '{folder}' cannot be read: {named}. Remove or replace them, or skip "
            "them with --skip-corrupt (skip_corrupt=True)"
        )
    return f"skipped {counted(len(broken), 'broken image')}: {named}"


def existing_folder(
    path: str, family: str = "folder", content: str = "with one folder per class, PATH/class/image.jpg"
) -> Path:
    """Resolve the folder in a specification such as `folder:PATH`.

    Args:
        path: Path as typed.
        family: Prefix before the colon.
        content: Required content of the folder, for messages.

    Raises:
        FileNotFoundError: If the folder does not exist. The message suggests similar names, if any.
        ValueError: If the path is empty or is a file.
    """
    if not path.strip():
        raise ValueError(
            f"data must name a folder after '{family}:', got '{family}:'; write {family}:PATH, e.g. {family}:photos"
        )
    root = expand_user(path)
    if os.path.isdir(root):  # False for a path that is too long
        return root.resolve()
    if os.path.exists(root):
        raise ValueError(f"{family}:{path} must be a folder {content}, got a file")
    parent = next(folder for folder in root.absolute().parents if folder.is_dir())
    missing = root.absolute().relative_to(parent).parts[0]
    hint = similar_paths(parent / missing, cutoff=0.4, folders_only=True)
    hint = hint or f"; '{parent}' has no folder with a similar name"
    raise FileNotFoundError(f"{family}:{path}: no folder {missing!r} in '{parent}'{hint}")


def _split_folders(root: Path) -> dict[str, Path]:
    """Return the split folders, or `{"train": root}` for a folder without splits."""
    splits: dict[str, Path] = {}
    for folder in _subfolders(root):
        part = PARTS.get(folder.name.lower())
        if part is None or not _subfolders(folder):
            continue
        if part in splits:
            raise ValueError(f"folder '{root}' has two '{part}' splits: {splits[part].name!r} and {folder.name!r}")
        splits[part] = folder
    if "train" in splits:
        return {part: splits[part] for part in ("train", "val", "test") if part in splits}
    if splits and len(splits) == len(_subfolders(root)):
        names = ", ".join(repr(folder.name) for folder in splits.values())
        raise ValueError(
            f"folder '{root}' has {names} but no 'train' with class folders; add PATH/train/class/image.jpg, or use "
            "PATH/class/image.jpg without splits"
        )
    return {"train": root}


def _skipped_notes(root: Path, folders: dict[str, Path], others: Counter[str]) -> list[str]:
    """Return notes about files that are not images, images outside class folders, and folders that are not splits."""
    notes = []
    if others:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
        heic = f"; {HEIC_HINT}" if "HEIC" in others else ""
        notes.append(f"skipped {counted(others.total(), 'file')} other than {', '.join(IMAGE_SUFFIXES)}: {kinds}{heic}")
    for folder in dict.fromkeys([root, *folders.values()]):
        unassigned = [child.name for child in sorted(folder.iterdir()) if child.is_file() and is_image(child)]
        if unassigned:
            where = "" if folder == root else f" in {folder.name}"
            notes.append(
                f"skipped {counted(len(unassigned), 'image')}{where} outside class folders, e.g. {unassigned[0]!r}"
            )
    if folders["train"] != root:
        named: list[str] = []
        for child in _subfolders(root):
            if child in folders.values():
                continue
            count = sum(is_image(file) for file in walk_visible(child))
            if count:
                named.append(f"{child.name!r} with {counted(count, 'image')}")
        if named:
            notes.append(
                f"skipped {listed(named)}: not a split with class folders; split names are {', '.join(sorted(PARTS))}"
            )
    return notes


def _subfolders(folder: Path) -> list[Path]:
    """Return the visible subfolders sorted by name."""
    return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))


def _class_files(folder: Path, others: Counter[str]) -> _Files:
    """Return image files by class, and count other files by suffix in `others`."""
    files: _Files = {}
    for class_folder in _subfolders(folder):
        files[class_folder.name] = []
        for file in walk_visible(class_folder, root=folder):
            if is_image(file):
                files[class_folder.name].append(file)
            else:
                others["HEIC" if is_heic(file) else file.suffix or file.name] += 1
    return files


def walk_visible(folder: Path, *, root: Path | None = None) -> Iterator[Path]:
    """Iterate over all visible files below a folder, folder by folder, sorted by name.

    Links to folders are followed only if `root` (the folder of a split) is given, each target once, and only if the
    target is outside `root` and does not contain `root`.

    Raises:
        PermissionError: If a folder may not be read.
    """

    def reject_unreadable(error: OSError) -> None:
        """Raise the error of an unreadable folder, which `os.walk` would skip; a folder may be deleted meanwhile."""
        if isinstance(error, PermissionError):
            raise error

    top = None if root is None else os.path.realpath(root)
    visited = set()
    for current, folders, names in os.walk(folder, onerror=reject_unreadable, followlinks=root is not None):
        visible = sorted(name for name in folders if not name.startswith("."))
        folders.clear()
        for name in visible:
            path = os.path.join(current, name)
            if os.path.islink(path):
                target = os.path.realpath(path)
                if top is None or target in visited or os.path.commonpath([top, target]) in (top, target):
                    continue
                visited.add(target)
            folders.append(name)
        yield from (Path(current, name) for name in sorted(names) if not name.startswith("."))


def _check_classes(files: dict[str, _Files], folders: dict[str, Path], root: Path) -> list[str]:
    """Raise ValueError with all errors in the class folders, or return `Collection.problems`."""
    errors = []
    problems = []
    if not files["train"]:
        errors.append(_no_classes_error(folders["train"], root))
    elif len(files["train"]) == 1:
        only = next(iter(files["train"]))
        only_folder = folders["train"] / only
        inside = [repr(child.name) for child in _subfolders(only_folder)]
        if len(inside) > 1:
            hint = f"its subfolders {listed(inside)} may be the classes: pass the path of {only!r}"
        else:
            hint = f"{_LAYOUT}, one folder per class{_table_hint(folders['train'], only_folder)}"
        problems.append(f"at least two classes are required, got one: {only!r}; {hint}")
    for part, classes in files.items():
        empty = [str((folders[part] / name).relative_to(root)) for name, paths in classes.items() if not paths]
        if empty:
            errors.append(
                f"class folders without readable images: {listed([repr(name) for name in empty])}; remove them or "
                f"add images ({', '.join(IMAGE_SUFFIXES)})"
            )
        unknown = [name for name in classes if name not in files["train"]]
        if unknown:
            lowered = {name.lower(): name for name in files["train"]}
            near = [difflib.get_close_matches(name.lower(), lowered, n=1) for name in unknown]
            hints = [f" (nearest: {lowered[names[0]]!r})" if names else "" for names in near]
            named = [f"{name!r}{hint}" for name, hint in zip(unknown, hints, strict=True)]
            errors.append(
                f"classes of '{folders[part].name}' missing from training: {listed(named)}; "
                f"training has {listed([repr(name) for name in files['train']])}"
            )
    if errors:
        raise ValueError(f"folder '{root}' cannot be used: {'; '.join([*problems, *errors])}")
    return [f"folder '{root}' cannot be used: {problem}" for problem in problems]


def _no_classes_error(folder: Path, root: Path) -> str:
    """Return the error for a folder without class folders."""
    visible = [child for child in folder.iterdir() if not child.name.startswith(".")]
    subject = "it" if folder == root else repr(folder.name)
    if not visible:
        return f"{subject} is empty; {_LAYOUT}"
    unassigned = sum(child.is_file() and is_image(child) for child in visible)
    images = counted(unassigned, "image")
    return f"{subject} has no class folders ({images} without a class); {_LAYOUT}{_table_hint(folder)}"


def _table_hint(*folders: Path) -> str:
    """Return a hint about a label table next to the images, or an empty string if there is none."""
    files = (child for folder in folders for child in sorted(folder.iterdir()))
    table = next((file for file in files if file.suffix in _TABLES or file.name == _METADATA), None)
    if table is None:
        return ""
    if table.suffix == ".xlsx":
        return f". To use the labels in {table.name!r}, save it as CSV and pass --data csv:FILE"
    kind = {".parquet": "parquet", ".jsonl": "hf"}.get(table.suffix, "csv")
    return f". To use the labels in {table.name!r}, pass --data {kind}:{table.parent if kind == 'hf' else table}"
