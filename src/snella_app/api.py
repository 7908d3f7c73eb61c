"""Python entry point for training, `snella.train`."""

import os
from pathlib import Path
from typing import Any

from rich.console import Console

from snella_app.config.sections import AUTO_METHOD
from snella_app.config.train import TrainConfig
from snella_app.plugins import plugin
from snella_app.records.run import FoldResults
from snella_app.runs.folder import RunFolder
from snella_app.training.folds import train_folds
from snella_app.training.train import train as train_run


def train(config: TrainConfig | None = None, *, console: Console | None = None, **settings: Any) -> RunFolder:
    """Fine-tune a pre-trained vision model on labeled images, as the command `snella train` does.

        run = snella.train(data="photos", backbone="vit_base_patch16_224.augreg_in21k", out="runs/photos", epochs=20)
        snella.load(run).predict("new.jpg").label

    Args:
        config: Configuration of the run, as an alternative to `settings`.
        console: Console for progress and results. None selects standard output.
        **settings: Settings of `TrainConfig` by flat name (without the section), e.g. `lr`. `data` may also be a torch
            or Hugging Face dataset, or a mapping from split names (train, val, test) to datasets.

    Returns:
        Run folder. With `folds` but no `fold`, this is the folder of the cross-validation run.

    Raises:
        TypeError: If both `config` and `settings` are given, or a setting is unknown.
        ValueError: If settings are invalid. One message lists all errors.

    All other errors are those of `snella_app.training.train.train`.
    """
    if config is not None and settings:
        raise TypeError(f"train takes either config or settings, got both: config and {', '.join(settings)}")
    is_object = not isinstance(settings.get("data"), str | os.PathLike | None)
    options = {"data": settings.pop("data")} if is_object else {}
    if is_object:
        settings["data"] = "python:data"  # the configuration stores only a name for the object
    config = TrainConfig.from_flat(**settings) if config is None else config
    if config.method.name == AUTO_METHOD:
        if is_object:
            raise ValueError("method must be a specific method for a dataset object, got 'auto'")
        choose_method = plugin("choices", "method")
        if choose_method is None:
            raise ValueError("method=auto requires the package snella_lab, which compares methods; choose a method")
        config = choose_method(config, console)
    out = str(config.run.out)
    data = config.data
    if (data.folds and data.fold is None) or (config.run.resume and (Path(out) / FoldResults.file).is_file()):
        train_folds(config, console, **options)
        return RunFolder(out)
    return train_run(config, console, **options)
