"""`RunSettings`: base class of the configurations that a run folder stores."""

import json
import shlex
from typing import Any, ClassVar, Self

from snella_app.config.base import Config
from snella_app.config.method import BaseMethodConfig
from snella_app.config.optim import BaseOptimConfig
from snella_app.config.run import BaseRunConfig

SESSION_FIELDS = ("out", "resume", "overwrite", "workers", "shard", "progress")
"""Settings that may change when a run is resumed."""
UNSTORED_FIELDS = ("resume", "overwrite", "progress")
"""Settings that apply to one call and are not stored in `config.yaml`."""


class RunSettings(Config):
    """Base class of run configurations; subclasses add the setting `data`.

    Attributes:
        required: Required settings of a new run, with example values.
        out_example: Example value of `out`, which is always required.
        basic: Settings that most runs set; help lists them first.
        purpose: Key into `Method.recipes`, the defaults of settings that are None; methods without this recipe are
            rejected. Empty for `snella train`, which uses `Method.defaults`.
    """

    required: ClassVar[dict[str, str]] = {}
    out_example: ClassVar[str] = ""
    basic: ClassVar[tuple[str, ...]] = ()
    purpose: ClassVar[str] = ""

    method: BaseMethodConfig
    optim: BaseOptimConfig
    run: BaseRunConfig

    def stored(self) -> dict[str, Any]:
        """Return the content of `config.yaml`: all settings except `UNSTORED_FIELDS`."""
        return {name: value for name, value in self.flat().items() if name not in UNSTORED_FIELDS}

    def differences(self, other: "RunSettings") -> list[str]:
        """Describe each non-default setting that differs from `other`."""
        other_values = other.flat()
        return [
            f"{name} is {other_values[name]!r} there and {value!r} here"
            for name, value in self.flat().items()
            if name not in SESSION_FIELDS and value != self.settings()[name].default and value != other_values[name]
        ]

    def resolved(self) -> Self:
        """Return a copy with the method's defaults in place of None."""
        from snella_app.methods import check_method, find_method, parse_method

        method = find_method(self.method.name)
        rank = parse_method(self.method.name)[1] if method.suffix == "r" else None
        current = self.flat()
        values = {
            name: value
            for name, value in (method.defaults_of(self.purpose) or {}).items()
            if current[name] is None and name not in self.method.options
        }
        if rank is not None:
            values["r"] = rank
        result = self.replace(**values)
        check_method(result.method.name, result.method.all_options())
        return result

    def missing_errors(self, *, is_started: bool = False) -> list[str]:
        """Check the required settings.

        Args:
            is_started: True if a stored run supplies all but `out`.
        """
        examples_by_name = {**({} if is_started else self.required), "out": self.out_example}
        values = self.flat()
        missing = [name for name in examples_by_name if values[name] in (None, "")]
        if not missing:
            return []
        examples = " ".join(f"{name}={examples_by_name[name]!r}" for name in missing)
        return [f"missing required settings: {', '.join(missing)}, e.g. {examples}"]

    def method_errors(self) -> list[str]:
        """Check that the method has a recipe for this purpose, and scalar parameters if `scalar_lr` is set."""
        from snella_app.methods import METHODS, parse_method

        try:
            family, _ = parse_method(self.method.name)
        except ValueError:
            return []  # reported by the section
        defaults = {name: values for name, m in METHODS.items() if (values := m.defaults_of(self.purpose))}
        if family not in defaults:
            return [f"method must be one of {', '.join(defaults)} for {self.purpose}, got {self.method.name!r}"]
        if self.optim.scalar_lr is None or "scalar_lr" in defaults[family]:
            return []
        *most, last = (name for name, values in defaults.items() if "scalar_lr" in values)
        return [
            f"scalar_lr applies to methods with scalar kernel parameters ({', '.join(most)} and {last}), got "
            f"{self.optim.scalar_lr} with method {self.method.name!r}"
        ]


def command_line(settings: RunSettings, default: RunSettings, command: str) -> str:
    """Return the command line for these settings, without options that equal their default.

    Args:
        settings: Settings of the run.
        default: Settings with the default values.
        command: Name of the command, e.g. `train`.
    """
    args, defaults = ["snella", command], default.flat()
    for name, value in settings.flat().items():
        if name in UNSTORED_FIELDS or value is None or value == defaults[name]:
            continue
        option = "--" + name.replace("_", "-")
        if name == "class_weights" and isinstance(value, dict):
            args += [option, json.dumps(value, ensure_ascii=False)]  # class names may contain any character
        elif isinstance(value, dict):
            args += [arg for key, inner in value.items() for arg in (f"{option}.{key}", str(inner))]
        else:
            args += [option, str(value).lower() if isinstance(value, bool) else str(value)]
    return shlex.join(args)
