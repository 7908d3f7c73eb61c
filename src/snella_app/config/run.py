"""`RunConfig`: folder, seed and devices of a run; `RunSettings`: base class of configurations that a run stores."""

import json
import shlex
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from snella_app.config.base import Config, errors_of
from snella_app.config.model import BaseMethodConfig
from snella_app.config.optim import BaseOptimConfig

SESSION_FIELDS = ("out", "resume", "overwrite", "workers", "shard", "progress")
"""Settings that may change when a run is resumed."""
UNSTORED_FIELDS = ("resume", "overwrite", "progress")
"""Settings that apply to one call and are not stored in `config.yaml`."""


@dataclass(frozen=True, kw_only=True)
class BaseRunConfig(Config):
    """Folder, seed and device of a run; also the base class of the recipes' `run` sections.

    Args:
        out: Output folder of the run; created if missing.
        seed: Seed of splits, initialization, data order, augmentation and dropout.
        device: auto (a GPU if available), or a torch device such as cpu, cuda, cuda:1 or mps.
        resume: Resume the run in `out` from its last checkpoint, with its stored settings.
        overwrite: Replace an existing run in the output folder.
        progress: Show a progress bar on a terminal.
    """

    minimums: ClassVar = {"seed": 0}

    out: str | None = None
    seed: int = 0
    device: str = "auto"
    resume: bool = False
    overwrite: bool = False
    progress: bool = True

    def errors(self) -> list[str]:
        """Check that `resume` and `overwrite` are not both set, and that the device name is valid."""
        errors = super().errors()
        if self.resume and self.overwrite:
            errors.append("resume and overwrite are mutually exclusive, got both; leave one out")
        if self.device not in ("auto", "cpu", "cuda"):  # avoids importing torch
            from snella_app.device import parse_device

            errors += errors_of(parse_device, self.device)
        return errors


@dataclass(frozen=True, kw_only=True)
class RunConfig(BaseRunConfig):
    """Folder, seed, devices and trackers of a run.

    Args:
        shard: Shard the frozen weights across the torchrun processes (FSDP2). Each process gathers the weights of a
            block on demand: less memory per device, more communication. Trained weights are not sharded.
        track: Experiment trackers for losses, metrics and budgets, e.g. tensorboard or wandb,mlflow. TensorBoard files
            go to `tracking` in the run folder.
    """

    shard: bool = False
    track: str | None = None

    @property
    def trackers(self) -> list[str]:
        """Names listed in `track`."""
        return [name.strip() for name in (self.track or "").split(",") if name.strip()]

    def errors(self) -> list[str]:
        """Check the fields, and that all trackers are known."""
        errors = super().errors()
        if self.trackers:
            from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

            unknown = [name for name in self.trackers if name not in INTEGRATION_TO_CALLBACK]
            if unknown:
                errors.append(f"track must be among {', '.join(INTEGRATION_TO_CALLBACK)}, got {', '.join(unknown)}")
        return errors


class RunSettings(Config):
    """Base class of run configurations; subclasses add the setting `data`.

    Attributes:
        required: Required settings of a new run, with example values.
        out_example: Example value of `out`, which is always required.
        purpose: Key into `Method.recipes`, the defaults of settings that are None; methods without this recipe are
            rejected. Empty for `snella train`, which uses `Method.defaults`.
    """

    required: ClassVar[dict[str, str]] = {}
    out_example: ClassVar[str] = ""
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
        from snella_app.methods import find_method, parse_method

        method, current = find_method(self.method.name), self.flat()
        values = {
            name: value
            for name, value in (method.defaults_of(self.purpose) or {}).items()
            if current[name] is None and name not in self.method.options
        }
        number = parse_method(self.method.name)[1]
        if method.suffix == "r" and number is not None:
            values["r"] = number
        return self.replace(**values)

    def missing_errors(self, *, is_started: bool = False) -> list[str]:
        """Check the required settings; `is_started` means that a stored run supplies all but `out`."""
        examples = {**({} if is_started else self.required), "out": self.out_example}
        values = self.flat()
        missing = [name for name in examples if values[name] in (None, "")]
        example = " ".join(f"{name}={examples[name]!r}" for name in missing)
        return [f"missing required settings: {', '.join(missing)}, e.g. {example}"] if missing else []

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
    """Return the command line of `command` for these settings; omits options with the values of `default`."""
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
