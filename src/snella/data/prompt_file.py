"""Lists of prompts with places for a subject's token and class: DreamBooth's own file, or plain lines."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from snella.data.folder import listed

__all__ = ["LIVE_CLASSES", "PromptFile", "read_prompt_file"]

LIVE_CLASSES = ("cat", "dog")
"""Classes of DreamBooth's live subjects, which have a list of prompts of their own."""

_LIST = re.compile(r"=\s*\[(.*?)^\s*\]", re.DOTALL | re.MULTILINE)
_TEXT = re.compile(r"^\s*(?:'([^'\n]*)'|\"([^\"\n]*)\")", re.MULTILINE)
_PLACE = re.compile(r"\{([^{}]*)\}")
_NAMES = {"{token}": "{0}", "{class}": "{1}"}


@dataclass(frozen=True)
class PromptFile:
    """Prompts with `{0}` where the token and `{1}` where the class belongs.

    Attributes:
        objects: Prompts for things.
        live: Prompts for animals; the same list in a file of plain lines.
        classes: Class of each subject, where the file tells them.
    """

    objects: list[str]
    live: list[str]
    classes: dict[str, str] = field(default_factory=dict)

    def templates(self, class_name: str | None, is_live: bool | None = None) -> list[str]:
        """The list that suits a class; `is_live` decides where the class is neither cat nor dog but an animal."""
        return self.live if (class_name in LIVE_CLASSES if is_live is None else is_live) else self.objects


def fill(template: str, token: str, class_name: str) -> str:
    """The prompt with token and class in their places, one blank where one of them is empty."""
    return " ".join(template.replace("{0}", token).replace("{1}", class_name).split())


def read_prompt_file(path: str | Path) -> PromptFile:
    """Read a list of prompts.

    Two layouts are known. DreamBooth's `prompts_and_classes.txt` has lines `subject,class` under the heading
    `subject_name,class`, then two Python lists of quoted templates, the first for objects, the second for live
    subjects. Any other text file holds one template a line; blank lines and lines that begin with `#` do not count.
    A template has `{0}` or `{token}` where the subject's token belongs, and may have `{1}` or `{class}` for its class.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: No templates, or templates without the token's place or with other places, all of them named.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"prompts must be an existing text file, got '{path}'")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as fault:
        raise ValueError(f"prompts must be a UTF-8 text file, got '{path}': {fault}") from None
    lists = [_templates(body) for body in _LIST.findall(text)]
    if not lists:
        lines = (line.strip() for line in text.splitlines())
        lists = [[_numbered(line) for line in lines if line and not line.startswith("#")]]
    _check(file, lists)
    return PromptFile(lists[0], lists[1] if len(lists) > 1 else lists[0], _classes(text))


def _templates(body: str) -> list[str]:
    """The quoted texts of a Python list, one a line."""
    return [_numbered(single or double) for single, double in _TEXT.findall(body)]


def _numbered(template: str) -> str:
    """The template with numbers for names of places."""
    for name, number in _NAMES.items():
        template = template.replace(name, number)
    return template


def _classes(text: str) -> dict[str, str]:
    """Class by subject: the lines after the heading, up to one that is not a pair."""
    classes: dict[str, str] = {}
    lines = iter(text.splitlines())
    if any(line.replace(" ", "") == "subject_name,class" for line in lines):
        for line in lines:
            subject, comma, name = (part.strip() for part in line.partition(","))
            if not comma:
                break
            classes[subject] = name
    return classes


def _check(file: Path, lists: list[list[str]]) -> None:
    """Refuse lists that cannot serve, all faults in one message."""
    faults = ["it holds no prompts"] if not all(lists) else []
    templates = list(dict.fromkeys(template for each in lists for template in each))
    without = [repr(template) for template in templates if "{0}" not in template]
    if without:
        faults.append(f"{len(without)} of {len(templates)} prompts have no {{0}}: {listed(without)}")
    strange = [
        f"{{{place}}} in {template!r}"
        for template in templates
        for place in _PLACE.findall(template)
        if place not in ("0", "1")
    ]
    if strange:
        faults.append(f"places other than {{0}} and {{1}}: {listed(strange)}")
    if faults:
        raise ValueError(
            f"prompts '{file}': {'; '.join(faults)}; write the subject's token as {{0}} (or {{token}}) and "
            "its class as {1} (or {class}), one prompt a line"
        )
