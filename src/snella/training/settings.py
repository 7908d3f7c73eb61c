"""What the settings of every kind of run can do: be stored, be read back, be compared with those of a resumed run."""

import dataclasses
import shlex
from typing import Any, ClassVar

SESSION_FIELDS = ("out", "resume", "overwrite", "workers", "progress")
"""Fields that may differ between the parts of a resumed run."""
UNSTORED_FIELDS = ("resume", "overwrite", "progress")
"""Fields that say how one call behaves; they are no part of a stored configuration."""


class RunSettings:
    """Base of the dataclasses that describe a run; they have the fields `data`, `out`, `resume` and `overwrite`.

    Attributes:
        needed: Fields without which no new run can start.
        basic: Fields that most runs set, which help shows first.
        method_defaults: By method, what fields that are None mean.
    """

    needed: ClassVar[tuple[str, ...]] = ("data",)
    basic: ClassVar[tuple[str, ...]] = ()
    method_defaults: ClassVar[dict[str, dict[str, Any]]] = {}

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values, for YAML and JSON."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    def stored(self) -> dict[str, Any]:
        """What `config.yaml` holds: `as_dict` without the fields of one call, such as `overwrite`."""
        return {name: value for name, value in self.as_dict().items() if name not in UNSTORED_FIELDS}

    def differences(self, other: "RunSettings") -> list[str]:
        """What this configuration asks for beyond the defaults that `other` does differently, one text a field."""
        texts = []
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            default = f.default if f.default is not dataclasses.MISSING else {}
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if f.name not in SESSION_FIELDS and mine != default and mine != theirs:
                texts.append(f"{f.name} is {theirs!r} there and {mine!r} here")
        return texts

    def resolved(self) -> Any:
        """The same settings with every default decided."""
        return self


def command_line(settings: RunSettings, default: RunSettings, command: str) -> str:
    """The command line that gives these settings; what is as in `default` is left out.

    Args:
        settings: Of the run.
        default: Of a run about which nothing is said.
        command: `train` and the like.
    """
    words = ["snella", command]
    for name, value in settings.as_dict().items():
        if name in UNSTORED_FIELDS or value is None or value == getattr(default, name):
            continue
        option = "--" + name.replace("_", "-")
        if isinstance(value, dict):
            words += [word for key, inner in value.items() for word in (f"{option}.{key}", str(inner))]
        else:
            words += [option, str(value).lower() if isinstance(value, bool) else str(value)]
    return shlex.join(words)
