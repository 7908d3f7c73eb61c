"""A folder of images: `class/image`, or `train|val|test/class/image`."""

import difflib
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from snella_app.data.datasets import Collection, FileImages, ImageDataset, broken_rows
from snella_app.data.images import HEIC_HINT, IMAGE_SUFFIXES, RGB, Reading, is_heic, is_image
from snella_app.text import listed

PARTS = {
    **{"train": "train", "training": "train", "test": "test", "testing": "test"},
    **{"val": "val", "validation": "val", "valid": "val", "dev": "val"},
}
"""Names of parts, in folders and tables."""
_TABLES = (".csv", ".tsv", ".jsonl", ".parquet", ".xlsx")
_NAMED = 5
_LAYOUT = "images are laid out as PATH/class/image.jpg"
_Files = dict[str, list[Path]]


def load_folder(path: str, *, skip_corrupt: bool = False, reading: Reading = RGB) -> Collection:
    """Collect the images of a folder; the names of the folders inside it are the classes.

    Every file is decoded once, so that a broken one is known before training. Hidden files are passed over, files of
    other kinds are left out and noted, images in folders below a class folder belong to that class.

    Args:
        path: The folder. It counts as divided where it holds a folder `train` with class folders inside.
        skip_corrupt: Leave broken images out and note how many instead of refusing.
        reading: As for `read_image`.

    Raises:
        FileNotFoundError: There is no such folder; near names are given.
        ValueError: No class folders, an empty one, fewer than two classes, classes in a later part that training does
            not have, or broken images (named and counted).
    """
    root = existing_folder(path)
    folders, has_parts = _part_folders(root)
    others: Counter[str] = Counter()
    files = {part: _class_files(folder, others) for part, folder in folders.items()}
    _check_classes(files, folders, root)
    notes = [*([_other_kinds(others)] if others else []), *_passed_over(root, folders)]
    source = FileImages([f for c in files.values() for found in c.values() for f in found], reading=reading)
    broken = {source.paths[row]: reason for row, reason in broken_rows(source, range(len(source.paths))).items()}
    if broken:
        named = {file.relative_to(root).as_posix(): reason for file, reason in broken.items()}
        notes.append(note_broken(named, len(source.paths), path, skip_corrupt))
        files = {
            part: {name: [file for file in found if file not in broken] for name, found in classes.items()}
            for part, classes in files.items()
        }
        _check_classes(files, folders, root)
    classes = list(files["train"])
    rows = {file: row for row, file in enumerate(source.paths)}
    parts = {part: _dataset(found, classes, root, source, rows) for part, found in files.items()}
    collection = Collection(root.name, classes, parts["train"], parts.get("val"), parts.get("test"), has_parts, notes)
    collection.broken = {file.relative_to(root).as_posix(): reason for file, reason in broken.items()}
    return collection


def note_broken(broken: Mapping[str, str], count: int, folder: str | Path, skip_corrupt: bool) -> str:
    """The note about images of a folder that are left out.

    Args:
        broken: Why, by name.
        count: Images in the folder.
        folder: For the message.
        skip_corrupt: Whether they may be left out.

    Raises:
        ValueError: They may not.
    """
    named = listed(f"{name} ({reason})" for name, reason in broken.items())
    if not skip_corrupt:
        raise ValueError(
            f"{len(broken)} of {count} images in '{folder}' cannot be read: {named}. Remove or replace them, or leave "
            "them out with --skip-corrupt (skip_corrupt=True)"
        )
    return f"left out {len(broken)} broken image{'s' if len(broken) > 1 else ''}: {named}"


def existing_folder(
    path: str, family: str = "folder", needed: str = "with one folder a class, PATH/class/image.jpg"
) -> Path:
    """The folder that stands after `folder:` and the like.

    Args:
        path: As typed.
        family: What stands before the colon.
        needed: What the folder must hold, for messages.

    Raises:
        FileNotFoundError: There is no such folder; says what lies nearby under like names.
        ValueError: Nothing was typed, or it is a file.
    """
    if not path.strip():
        raise ValueError(
            f"data must name a folder after '{family}:', got '{family}:'; write {family}:PATH, e.g. {family}:photos"
        )
    root = Path(path).expanduser()
    if root.is_dir():
        return root.resolve()
    if root.exists():
        raise ValueError(f"{family}:{path} must be a folder {needed}, got a file")
    parent = next(folder for folder in root.absolute().parents if folder.is_dir())
    missing = root.absolute().relative_to(parent).parts[0]
    siblings = sorted(child.name for child in parent.iterdir() if child.is_dir() and not child.name.startswith("."))
    nearest = difflib.get_close_matches(missing, siblings, n=3, cutoff=0.4)
    hint = f"nearest there: {', '.join(map(repr, nearest))}" if nearest else f"'{parent}' has no folder of a like name"
    raise FileNotFoundError(f"{family}:{path}: there is no {missing!r} in '{parent}'; {hint}")


def _part_folders(root: Path) -> tuple[dict[str, Path], bool]:
    """The folders of the parts, `{"train": root}` where the folder is not divided."""
    found: dict[str, Path] = {}
    for folder in _subfolders(root):
        part = PARTS.get(folder.name.lower())
        if part is None or not _subfolders(folder):
            continue
        if part in found:
            raise ValueError(f"folder '{root}' has two parts '{part}': {found[part].name!r} and {folder.name!r}")
        found[part] = folder
    if "train" in found:
        return {part: found[part] for part in ("train", "val", "test") if part in found}, True
    if found and len(found) == len(_subfolders(root)):
        names = ", ".join(repr(folder.name) for folder in found.values())
        raise ValueError(
            f"folder '{root}' has {names} but no 'train' with class folders inside; add "
            "PATH/train/class/image.jpg, or leave the parts out and write PATH/class/image.jpg"
        )
    return {"train": root}, False


def _passed_over(root: Path, folders: dict[str, Path]) -> list[str]:
    """Notes about images that belong to no class, and about folders beside the parts."""
    notes = []
    for folder in {root, *folders.values()}:
        loose = [child.name for child in sorted(folder.iterdir()) if child.is_file() and is_image(child)]
        if loose:
            where = "" if folder == root else f" in {folder.name}"
            lie = "1 image that lies" if len(loose) == 1 else f"{len(loose)} images that lie"
            notes.append(f"left out {lie}{where} without a class folder, e.g. {loose[0]!r}")
    if folders.get("train") != root:
        beside = [child for child in _subfolders(root) if child not in folders.values()]
        images = {child.name: sum(is_image(file) for file in _walk(child)) for child in beside}
        named = [f"{name!r} with {count} images" for name, count in images.items() if count]
        if named:
            known = ", ".join(sorted(PARTS))
            notes.append(f"left out {listed(named)}: no part with class folders inside; parts are called {known}")
    return notes


def _subfolders(folder: Path) -> list[Path]:
    """Folders that are not hidden, by name."""
    return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))


def _class_files(folder: Path, others: Counter[str]) -> _Files:
    """Image files by class; the suffixes of files of other kinds are counted."""
    files: _Files = {}
    for class_folder in _subfolders(folder):
        files[class_folder.name] = []
        for file in _walk(class_folder):
            if is_image(file):
                files[class_folder.name].append(file)
            else:
                others["HEIC" if is_heic(file) else file.suffix or file.name] += 1
    return files


def _walk(folder: Path) -> Iterator[Path]:
    """All files below a folder that are not hidden, in the order of their names."""
    for current, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(current, name) for name in sorted(names) if not name.startswith("."))


def _check_classes(files: dict[str, _Files], folders: dict[str, Path], root: Path) -> None:
    """Refuse folders that give no classification problem, all errors in one message."""
    errors = []
    if not files["train"]:
        errors.append(_no_classes(folders["train"]))
    elif len(files["train"]) == 1:
        only = next(iter(files["train"]))
        inside = [child.name for child in _subfolders(folders["train"] / only)]
        hint = (
            f"the folders inside it, {listed([repr(name) for name in inside])}, may be the classes: give the path "
            f"of {only!r} itself"
            if len(inside) > 1
            else f"{_LAYOUT}, one folder for each class{_table_hint(folders['train'], folders['train'] / only)}"
        )
        errors.append(f"at least two classes are needed, there is one: {only!r}; {hint}")
    for part, classes in files.items():
        empty = [str((folders[part] / name).relative_to(root)) for name, found in classes.items() if not found]
        if empty:
            errors.append(
                f"class folders without a readable image: {listed([repr(name) for name in empty])}, remove them or "
                f"add images ({', '.join(IMAGE_SUFFIXES)})"
            )
        unknown = [name for name in classes if name not in files["train"]]
        if unknown:
            errors.append(
                f"classes of '{folders[part].name}' unknown to training: "
                f"{listed([_with_nearest(name, list(files['train'])) for name in unknown])}; "
                f"training has {listed([repr(name) for name in files['train']])}"
            )
    if errors:
        raise ValueError(f"folder '{root}' cannot be used: {'; '.join(errors)}")


def _no_classes(folder: Path) -> str:
    """The error of a folder without class folders: it is empty, or its images lie there loose."""
    visible = [child for child in folder.iterdir() if not child.name.startswith(".")]
    if not visible:
        return f"'{folder}' is empty; {_LAYOUT}"
    loose = sum(child.is_file() and is_image(child) for child in visible)
    return f"no class folders in '{folder}' ({loose} images lie there without a class); {_LAYOUT}{_table_hint(folder)}"


def _table_hint(*folders: Path) -> str:
    """How the labels of a table are read, where one lies beside the images."""
    table = next((child for folder in folders for child in sorted(folder.iterdir()) if child.suffix in _TABLES), None)
    if table is None:
        return ""
    if table.suffix == ".xlsx":
        return f". Labels are not read from {table.name!r}: save it as CSV, and give --data csv:FILE"
    kind = {".parquet": "parquet", ".jsonl": "hf"}.get(table.suffix, "csv")
    return f". The labels in {table.name!r} are read with --data {kind}:{table.parent if kind == 'hf' else table}"


def _with_nearest(name: str, classes: list[str]) -> str:
    """A class that training does not have, with the likeliest one that was meant."""
    lowered = {known.lower(): known for known in classes}
    near = difflib.get_close_matches(name.lower(), lowered, n=1)
    return f"{name!r} (nearest: {lowered[near[0]]!r})" if near else repr(name)


def _dataset(
    files: _Files, classes: list[str], root: Path, source: FileImages, rows: Mapping[Path, int]
) -> ImageDataset:
    """The images of one part."""
    pairs = [(file, classes.index(name)) for name, found in files.items() for file in found]
    names = [file.relative_to(root).as_posix() for file, _ in pairs]
    return ImageDataset(source, [rows[file] for file, _ in pairs], [label for _, label in pairs], names)


def _other_kinds(others: Counter[str]) -> str:
    """The note about files that are no images by their name."""
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(_NAMED))
    heic = f"; {HEIC_HINT}" if "HEIC" in others else ""
    return f"left out {others.total()} files that are not {', '.join(IMAGE_SUFFIXES)}: {kinds}{heic}"
