"""Shared functions of recipe runs: run record, optimizer, pre-trained models and progress bar."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.optim import Optimizer

from snella_app.backbones.create import cache_only_if_unreachable
from snella_app.config import RunSettings, command_line
from snella_app.records import BackboneInfo, DataInfo, RunInfo
from snella_app.training.optimizer import build_low_bit_optimizer
from snella_app.training.results import versions_of
from snella_lab.recipes.config import RecipeOptimConfig


def describe_run(
    config: RunSettings, command: str, backbone: BackboneInfo, data: DataInfo, packages: Iterable[str]
) -> RunInfo:
    """Build the record of a new run.

    Args:
        config: Resolved settings.
        command: Command name.
        backbone: The pre-trained model.
        data: The training data.
        packages: Packages whose versions are recorded.
    """
    default = type(config).from_flat(**dict.fromkeys((*config.required, "out"), "-"))
    return RunInfo(
        status="running",
        task=config.purpose,
        method=config.method.name,
        method_options=config.method.all_options(),
        backbone=backbone,
        classes=[],
        data=data,
        versions=versions_of(packages),
        command=command_line(config, default, command),
    )


def build_optimizer(model: nn.Module, optim: RecipeOptimConfig, device: torch.device) -> tuple[Optimizer, str]:
    """Build the optimizer and return it with its name; see `build_low_bit_optimizer`."""
    lr, decay = optim.lr or 0.0, optim.weight_decay or 0.0
    return build_low_bit_optimizer(model, optim.optimizer, device, lr=lr, scalar_lr=optim.scalar_lr, weight_decay=decay)


def load_pretrained(kind: Any, name: str, option: str, **options: Any) -> Any:
    """Load a model, tokenizer or processor from a folder or the hub.

    Args:
        kind: Class with a `from_pretrained` method.
        name: Local folder in transformers format, or hub name.
        option: Name of the option, for error messages.
        **options: Other arguments of `from_pretrained`.

    Raises:
        FileNotFoundError: If the folder does not contain an object of this class.
        ConnectionError: If `name` is not a local folder and cannot be loaded from the hub or its cache.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        try:
            with suppress_progress_bars():
                return kind.from_pretrained(folder, local_files_only=True, **options)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"{option} must be a folder in transformers format, got '{folder}', which has no {kind.__name__}: "
                f"{str(error).strip().splitlines()[0]}"
            ) from error
    with cache_only_if_unreachable() as reason, suppress_progress_bars():
        try:
            return kind.from_pretrained(name, local_files_only=bool(reason), **options)
        except (OSError, ValueError) as error:
            cause = f"it is not cached, and the hub is unreachable ({reason})" if reason else str(error)
            raise ConnectionError(
                f"{option} must be a local folder or a hub name, got {name!r}: {cause}; pass a local folder in "
                "transformers format"
            ) from error


@contextmanager
def suppress_progress_bars(*libraries: Any) -> Iterator[None]:
    """Hide the progress bars of transformers and of libraries with the same logging module, such as diffusers."""
    modules = [library.utils.logging for library in (transformers, *libraries)]
    enabled = [module for module in modules if module.is_progress_bar_enabled()]
    for module in enabled:
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module in enabled:
            module.enable_progress_bar()


def progress_bar(console: Console, *, is_shown: bool = True) -> Progress:
    """Return a progress bar with counts and remaining time, shown only on a terminal and if `is_shown`."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not (is_shown and console.is_terminal))
