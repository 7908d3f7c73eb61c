"""Resolution of automatic settings before the first training step."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console

from snella_app.config import TrainConfig
from snella_app.console import print_line
from snella_app.methods import find_method
from snella_app.training.build import RunComponents, assemble
from snella_app.training.distributed import from_main
from snella_app.training.linear_probe import choose_augmentation, choose_final_head, choose_head_start
from snella_app.training.sizing import can_skip_training, fit_batch_size, fit_epochs, fit_image_size


def plan_training(
    parts: RunComponents, config: TrainConfig, console: Console, begun: float, data: Any = None
) -> tuple[RunComponents, TrainConfig]:
    """Choose image size, batch size, heads, augmentation and number of epochs of a new run, in this order.

    Args:
        parts: Data and model for the requested settings.
        config: Resolved settings; fields may be `"auto"` or None.
        console: Output console for the choices.
        begun: Time on the `time.monotonic()` clock at which loading of data and model started.
        data: Object named by `config.data`.

    Returns:
        Data and model, rebuilt if the image size changed, and settings without automatic fields.

    Raises:
        ValueError: If `epochs` is 0 without a probe-initialized head or without selection on validation images.
    """
    requested, loaded = config, parts

    def at_size(size: int | None) -> RunComponents:
        return assemble(dataclasses.replace(requested, img_size=size), loaded.splits, loaded.task, data=data)

    sized = _with_heads(loaded, requested)
    size = from_main(lambda: fit_image_size(loaded, sized, at_size, console)).img_size
    if size != config.img_size:
        parts, config = at_size(size), dataclasses.replace(config, img_size=size)
    config = from_main(lambda: fit_batch_size(parts, config, console))
    config = choose_heads(parts, config.with_batch_size_for(len(parts.splits.train)))
    if _needs_no_epochs(config):
        if config.epochs:
            print_line(
                console,
                f"no epochs: {config.method} does not train the backbone, so epochs would not change the final head; "
                "use --final-head trained to train the head",
            )
        return parts, dataclasses.replace(config, epochs=0)
    return parts, from_main(lambda: fit_epochs(parts, config, console, begun))


def _needs_no_epochs(config: TrainConfig) -> bool:
    """Return whether training cannot change the final head, which is fitted to features of a frozen backbone."""
    return find_method(config.method).is_head_only and config.final_head == "layers" and can_skip_training(config)


def choose_heads(parts: RunComponents, config: TrainConfig) -> TrainConfig:
    """Choose the final head, the initialization of the trained head and the augmentation.

    Args:
        parts: Data and model; the transform of the training images is replaced.
        config: Settings with a batch size.

    Raises:
        ValueError: If `epochs` is 0 without a probe-initialized head or without selection on validation images.
    """
    config = choose_augmentation(parts, _with_heads(parts, config))
    if config.epochs == 0 and not can_skip_training(config):
        raise ValueError(
            f"epochs must be at least 1, got 0 with head_init={config.head_init!r} and protocol={config.protocol!r}; "
            "0 epochs require head_init='probe' and a protocol that selects on validation images"
        )
    return config


def _with_heads(parts: RunComponents, config: TrainConfig) -> TrainConfig:
    """Choose the final head and the initialization of the trained head, which do not depend on the image size."""
    config = dataclasses.replace(config, final_head=choose_final_head(parts, config))
    return config if config.init_from else choose_head_start(parts, config)
