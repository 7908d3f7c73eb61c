"""`plan_training`: everything that settings leave open, decided once, before the first step."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console

from snella_app.config import TrainConfig
from snella_app.data.protocol import get_protocol
from snella_app.training.build import RunComponents, assemble
from snella_app.training.distributed import from_main
from snella_app.training.linear_probe import choose_augmentation, choose_final_head, choose_head_start
from snella_app.training.sizing import fit_batch_size, fit_epochs, fit_image_size


def plan_training(
    parts: RunComponents, config: TrainConfig, console: Console, begun: float, data: Any = None
) -> tuple[RunComponents, TrainConfig]:
    """Decide image size, batch size, heads, augmentation and number of epochs of a new run, in this order.

    Args:
        parts: Data and model for the settings as they are.
        config: Resolved settings; fields may be `"auto"` or None.
        console: Where decisions are written.
        begun: Start of the loading of data and model, by `time.monotonic()`.
        data: Object that `config.data` names.

    Returns:
        Data and model, built again if the image size changed, and settings without open fields.

    Raises:
        ValueError: 0 epochs without a head that is fitted and measured.
    """
    asked, loaded = config, parts

    def at_size(size: int | None) -> RunComponents:
        return assemble(dataclasses.replace(asked, img_size=size), loaded.splits, loaded.task, data=data)

    size = from_main(lambda: fit_image_size(loaded, asked, at_size, console)).img_size
    if size != config.img_size:
        parts, config = at_size(size), dataclasses.replace(config, img_size=size)
    config = from_main(lambda: fit_batch_size(parts, config, console))
    config = choose_heads(parts, config.with_batch_size_for(len(parts.splits.train)))
    return parts, from_main(lambda: fit_epochs(parts, config, console, begun))


def choose_heads(parts: RunComponents, config: TrainConfig) -> TrainConfig:
    """Decide the final head, the start of the trained head, and the augmentation.

    Args:
        parts: Data and model; the transform of the training images is replaced.
        config: Settings with a batch size.

    Raises:
        ValueError: 0 epochs without a head that is fitted and measured.
    """
    config = dataclasses.replace(config, final_head=choose_final_head(parts, config))
    config = choose_augmentation(parts, config if config.init_from else choose_head_start(parts, config))
    is_measured = get_protocol(config.protocol).selected_on == "val"
    if config.epochs == 0 and not (is_measured and config.head_init == "probe"):
        raise ValueError(
            "epochs must be at least 1, got 0: without training there is only a head that starts from a probe "
            "(head_init) and is measured on validation images (protocol)"
        )
    return config
