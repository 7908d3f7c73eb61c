"""What the settings of every kind of run can do: be stored, be read back, be compared with those of a resumed run."""

import dataclasses
import shlex
from collections.abc import Iterable
from typing import Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

SESSION_FIELDS = ("out", "resume", "overwrite", "workers", "progress")
"""Fields that may differ between the parts of a resumed run."""
UNSTORED_FIELDS = ("resume", "overwrite", "progress")
"""Fields that say how one call behaves; they are no part of a stored configuration."""
_OPTION_FIELDS = ("r", "target_sparsity", "scaling")
"""Options of a method that have a field of their own."""


class RunSettings:
    """Base of the dataclasses that describe a run.

    They have the fields `data`, `out`, `resume`, `overwrite`, `method`, `method_options`, `scalar_lr`, `r`,
    `target_sparsity` and `scaling`.

    Attributes:
        needed: Fields without which no new run can start, and how each error goes on after the field's name.
        out_hint: How the error goes on where there is no folder.
        basic: Fields that most runs set, which help shows first.
        method_defaults: By method, what fields that are None mean; other methods are refused.
        purpose: What the methods are for, where that leaves some of them out.
    """

    needed: ClassVar[dict[str, str]] = {}
    out_hint: ClassVar[str] = ""
    basic: ClassVar[tuple[str, ...]] = ()
    method_defaults: ClassVar[dict[str, dict[str, Any]]] = {}
    purpose: ClassVar[str] = ""

    method: str
    method_options: dict[str, Any]
    scalar_lr: float | None

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

    def resolved(self) -> Self:
        """The same settings with the method's defaults in place of None."""
        from snella.methods import check_method, find_method, parse_method

        family, number = parse_method(self.method)
        rank = number if find_method(self.method).suffix == "r" else None
        values = {
            name: value
            for name, value in self.method_defaults[family].items()
            if getattr(self, name) is None and name not in self.method_options
        }
        if rank is not None:
            values["r"] = rank
        result = dataclasses.replace(self, **values)  # type: ignore[type-var]
        check_method(result.method, result.options_of_method())
        return result

    def options_of_method(self) -> dict[str, Any]:
        """Options for `build_method`: `method_options` and the named ones that are set."""
        named = {name: getattr(self, name) for name in _OPTION_FIELDS if getattr(self, name) is not None}
        return {**named, **self.method_options}

    def place_faults(self) -> list[str]:
        """What is missing or contradictory about folder and data."""
        settings: Any = self
        faults = [] if settings.out else [f"out {self.out_hint}"]
        if not settings.resume:
            faults += [f"{name} {hint}" for name, hint in self.needed.items() if not getattr(self, name)]
        if settings.resume and settings.overwrite:
            faults.append("resume and overwrite exclude each other, got both; leave one out")
        return faults

    def choice_faults(self) -> list[str]:
        """Fields whose value is not among the choices of their type."""
        faults = []
        for name, kind in get_type_hints(type(self)).items():
            choices, value = _choices(kind), getattr(self, name)
            if choices and value is not None and value not in choices:
                faults.append(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        return faults

    def least_faults(self, least: dict[str, int]) -> list[str]:
        """Fields below the least that they may be."""
        return [
            f"{name} must be at least {bound}, got {value}"
            for name, bound in least.items()
            if (value := getattr(self, name)) is not None and value < bound
        ]

    def finite_faults(self, names: Iterable[str]) -> list[str]:
        """Fields that are negative or not finite."""
        return [
            f"{name} must be at least 0 and finite, got {value}"
            for name in names
            if (value := getattr(self, name)) is not None and not 0.0 <= value < float("inf")
        ]

    def method_faults(self) -> list[str]:
        """What the method refuses: its name, its options, their values."""
        from snella.methods import check_method, parse_method

        faults = []
        twice = [name for name in _OPTION_FIELDS if getattr(self, name) is not None and name in self.method_options]
        if twice:
            faults.append(f"{', '.join(twice)} given both by name and in method_options; leave one out")
        try:
            family, _ = parse_method(self.method)
            if family not in self.method_defaults:
                known = ", ".join(self.method_defaults)
                return [*faults, f"method must be one of {known} for {self.purpose}, got {self.method!r}"]
            if self.scalar_lr is not None and "scalar_lr" not in self.method_defaults[family]:
                *most, last = (name for name, values in self.method_defaults.items() if "scalar_lr" in values)
                faults.append(
                    f"scalar_lr is for the kernels' scalars of {', '.join(most)} and {last}, got {self.scalar_lr} "
                    f"with method {self.method!r}"
                )
            check_method(self.method, self.options_of_method())
        except (ValueError, TypeError) as fault:
            faults.append(str(fault))
        return faults


def _choices(kind: Any) -> tuple[str, ...]:
    """The values of a `Literal` of texts, also of one that may be None; none for other types."""
    parts = [kind, *get_args(kind)]
    return tuple(value for part in parts if get_origin(part) is Literal for value in get_args(part))


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
