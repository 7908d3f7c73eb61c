"""`RunConfig`: folder, seed and devices of a run."""

from dataclasses import dataclass
from typing import ClassVar

from snella_app.config.base import Config


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

            try:
                parse_device(self.device)
            except ValueError as error:
                errors.append(str(error))
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
