"""DreamBooth data: subject images and prompt files.

In prompts, a rare word (the token) denotes the subject.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from snella_app.console import counted
from snella_app.data.folder import broken_note, existing_folder
from snella_app.data.images import IMAGE_SUFFIXES, read_image
from snella_app.data.sources import broken_images
from snella_app.files import expand_user
from snella_app.text import listed, nearest

LIVE_CLASSES = ("cat", "dog")
"""Classes of DreamBooth's live subjects, which have a separate prompt list."""
PROMPT_FILE = "prompts_and_classes.txt"
"""The DreamBooth dataset's file with classes and prompts."""

_LIST_PATTERN = re.compile(r"=\s*\[(.*?)^\s*\]", re.DOTALL | re.MULTILINE)
_STRING_PATTERN = re.compile(r"^\s*(?:'([^'\n]*)'|\"([^\"\n]*)\")", re.MULTILINE)
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class PromptFile:
    """Prompt templates with placeholders, `{0}` for the token and `{1}` for the class.

    Attributes:
        objects: Templates for objects.
        live: Templates for live subjects, equal to `objects` if the file has a single list.
        classes: Class by subject, empty if the file does not list them.
    """

    objects: list[str]
    live: list[str]
    classes: dict[str, str] = field(default_factory=dict)

    def templates(self, class_name: str | None, is_live: bool | None = None) -> list[str]:
        """Return the templates for a class, chosen by `is_live` if it is set and by the class name otherwise."""
        if is_live is None:
            is_live = class_name in LIVE_CLASSES
        return self.live if is_live else self.objects


def fill(template: str, token: str, class_name: str) -> str:
    """Fill in the token and class, and replace runs of whitespace, e.g. around an empty token, with single spaces."""
    return " ".join(template.replace("{0}", token).replace("{1}", class_name).split())


def read_prompt_file(path: str | Path) -> PromptFile:
    """Read a prompt file.

    DreamBooth's `prompts_and_classes.txt` has lines `subject,class` below the heading `subject_name,class`, then two
    Python lists of quoted templates, for objects and for live subjects. Any other text file has one template per line;
    blank lines and lines that start with `#` are ignored. A template contains `{0}` or `{token}` for the subject's
    token, and may contain `{1}` or `{class}` for the subject's class.

    Args:
        path: UTF-8 text file.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not UTF-8, if it or one of its lists has no templates, or if templates lack the token
            placeholder or have unknown placeholders. The message lists invalid templates.
    """
    file = expand_user(path)
    if not file.is_file():
        raise FileNotFoundError(f"prompts must be an existing text file, got '{path}'")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts must be a UTF-8 text file, got '{path}': {error}") from None
    text = text.replace("{token}", "{0}").replace("{class}", "{1}")
    lists: list[list[str]] = []
    for body in _LIST_PATTERN.findall(text):
        quoted_templates = _STRING_PATTERN.findall(body)
        lists.append([single_quoted or double_quoted for single_quoted, double_quoted in quoted_templates])
    if not lists:
        lines = (line.strip() for line in text.splitlines())
        lists = [[line for line in lines if line and not line.startswith("#")]]
    _check(file, lists)
    return PromptFile(lists[0], lists[-1], _classes(text))


def _classes(text: str) -> dict[str, str]:
    """Return the class by subject from the lines between the heading and the first line without a comma."""
    classes: dict[str, str] = {}
    lines = iter(text.splitlines())
    if any(line.replace(" ", "") == "subject_name,class" for line in lines):  # consumes the lines up to the heading
        for line in lines:
            subject, comma, name = (part.strip() for part in line.partition(","))
            if not comma:
                break
            classes[subject] = name
    return classes


def _check(file: Path, lists: list[list[str]]) -> None:
    """Raise a ValueError with all errors of the prompt lists, if there are any."""
    errors = ["no prompts"] if not all(lists) else []
    templates = list(dict.fromkeys(template for prompts in lists for template in prompts))
    without_token = [repr(template) for template in templates if "{0}" not in template]
    if without_token:
        errors.append(f"{len(without_token)} of {len(templates)} prompts lack {{0}}: {listed(without_token)}")
    unknown = [
        f"{{{placeholder}}} in {template!r}"
        for template in templates
        for placeholder in _PLACEHOLDER.findall(template)
        if placeholder not in ("0", "1")
    ]
    if unknown:
        errors.append(f"placeholders other than {{0}} and {{1}}: {listed(unknown)}")
    if errors:
        raise ValueError(
            f"prompts '{file}': {'; '.join(errors)}; write one prompt per line, with {{0}} (or {{token}}) for the "
            "subject's token and {1} (or {class}) for its class"
        )


@dataclass(frozen=True)
class Concept:
    """The images of a subject or, for prior preservation, of its class.

    Attributes:
        name: Name of the folder.
        paths: Image files, sorted by name.
        class_name: Class in the data, e.g. `dog` for `dog6`, or None if the data does not define it.
        notes: Notes for the user.
    """

    name: str
    paths: list[Path]
    class_name: str | None = None
    notes: list[str] = field(default_factory=list)

    def images(self) -> Iterator[Image.Image]:
        """Iterate over the images as RGB."""
        return (read_image(path) for path in self.paths)

    def digest(self) -> str:
        """Return the SHA-256 of file names and contents, independent of the folder's path."""
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()


def load_concept(spec: str, subject: str | None = None, *, skip_corrupt: bool = False) -> Concept:
    """Find the images of a subject, and verify that they can be decoded.

    Args:
        spec: `folder:PATH` for a folder of images, or `dreambooth:PATH` for one folder per subject
            (`PATH/dog6/00.jpg`) and an optional `prompts_and_classes.txt` with the classes.
        subject: Name of the subject's folder in `dreambooth:PATH`.
        skip_corrupt: Skip corrupt images with a note instead of raising an error.

    Raises:
        FileNotFoundError: If the folder or subject does not exist. The message suggests similar names, if any.
        ValueError: If `spec` or the prompt file is invalid, if `subject` is missing or not allowed, if the folder has
            no images or no subject folders, or if any image is corrupt (with `skip_corrupt`, if all are). The message
            lists corrupt images.
    """
    family, colon, path = spec.partition(":")
    if not colon or family not in ("folder", "dreambooth"):
        raise ValueError(
            f"data must be folder:PATH with the images of one subject, or dreambooth:PATH with a folder per subject, "
            f"got {spec!r}"
        )
    if family == "folder":
        if subject is not None:
            raise ValueError(
                f"subject is only valid with dreambooth:PATH, got {subject!r} with {spec!r}; omit it, "
                f"or use dreambooth:{path}"
            )
        folder = existing_folder(path, "folder", "with the images of one subject")
        classes = {}
    else:
        content = "with one folder of images per subject, as in the DreamBooth dataset"
        root = existing_folder(path, "dreambooth", content)
        folder = _subject_folder(root, subject)
        prompts = root / PROMPT_FILE
        classes = read_prompt_file(prompts).classes if prompts.is_file() else {}
    files = sorted(child for child in folder.iterdir() if child.is_file() and not child.name.startswith("."))
    paths = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    if not paths:
        content = counted(len(files), "non-image file") if files else "an empty folder"
        raise ValueError(
            f"folder '{folder}' must contain images ({', '.join(IMAGE_SUFFIXES)}) of one subject, got {content}"
        )
    broken = broken_images(paths)
    notes: list[str] = []
    if len(files) > len(paths):
        notes.append(f"skipped {counted(len(files) - len(paths), 'non-image file')}")
    if broken:
        reasons_by_name = {paths[index].name: reason for index, reason in broken.items()}
        notes.append(broken_note(reasons_by_name, len(paths), folder, skip_corrupt))  # raises unless `skip_corrupt`
        if len(broken) == len(paths):
            reasons = listed(f"{name} ({reason})" for name, reason in reasons_by_name.items())
            raise ValueError(f"all {len(paths)} images in '{folder}' are corrupt: {reasons}")
    valid = [path for index, path in enumerate(paths) if index not in broken]
    return Concept(folder.name, valid, classes.get(folder.name), notes)


def _subject_folder(root: Path, subject: str | None) -> Path:
    """Return the folder of a subject, or raise an error that names available subjects, if any."""
    names = sorted(child.name for child in root.iterdir() if child.is_dir() and not child.name.startswith("."))
    if not names:
        raise ValueError(f"dreambooth:{root} has no subject folders; put images at PATH/subject/image.jpg")
    if subject in names:
        return root / str(subject)
    if subject is None:
        raise ValueError(f"subject must name one of the {len(names)} folders in {root}: {listed(names)}")
    suggestion = nearest(subject, names, most=3, cutoff=0.4) or f"; available: {listed(names)}"
    raise FileNotFoundError(f"subject must name one of the {len(names)} folders in {root}, got {subject!r}{suggestion}")
