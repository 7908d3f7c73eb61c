"""Resolution of automatic settings before the first training step."""

from __future__ import annotations

import dataclasses

from rich.console import Console

from snella_app.config import TrainConfig
from snella_app.console import print_line
from snella_app.device import choose_device, choose_precision
from snella_app.methods import find_method
from snella_app.training.build import LoadedData, RunComponents, build
from snella_app.training.distributed import broadcast_from_main
from snella_app.training.linear_probe import (
    can_skip_training,
    choose_augmentation,
    choose_final_head,
    resolve_head_init,
)
from snella_app.training.sizing import fit_batch_size, fit_epochs, fit_image_size


def resolve(
    config: TrainConfig, data: LoadedData, parts: RunComponents, console: Console
) -> tuple[TrainConfig, RunComponents]:
    """Choose precision, image size, batch size, heads, augmentation and number of epochs of a new run, in this order.

    Args:
        config: Settings with the method's defaults; fields may be `"auto"` or None.
        data: Loaded images.
        parts: Data and model for the requested settings.
        console: Output console for the choices.

    Returns:
        The plan, settings without automatic fields, and data and model, rebuilt if the image size changed.

    Raises:
        ValueError: If `epochs` is 0 without a probe-initialized head or without selection on validation images.
    """
    device = choose_device(config.run.device)
    config = config.replace(precision=broadcast_from_main(lambda: choose_precision(config.optim.precision, device)))
    if config.optim.time_budget is not None and config.model.img_size is None:
        parts, config = _at_fitting_size(config, data, parts, console)
    if config.optim.batch_size == "auto":
        config = config.replace(batch_size=broadcast_from_main(lambda: fit_batch_size(parts, config.optim, console)))
    plan = choose_heads(parts, config)
    has_final_head = plan.optim.final_head == "layers" and can_skip_training(plan.optim, plan.data.protocol)
    if has_final_head and find_method(plan.method.name).is_head_only:
        if plan.optim.epochs:
            print_line(
                console,
                f"no epochs: {plan.method.name} does not train the backbone, so epochs would not change the final "
                "head; use --final-head trained to train the head",
            )
        plan = plan.replace(epochs=0)
    elif plan.optim.time_budget is not None:
        plan = plan.replace(epochs=broadcast_from_main(lambda: fit_epochs(parts, plan, console, data.started_at)))
    return plan, parts


def _at_fitting_size(
    config: TrainConfig, data: LoadedData, parts: RunComponents, console: Console
) -> tuple[RunComponents, TrainConfig]:
    """Return data and model at the largest image size that fits in the time budget, and settings with this size."""

    def at_size(size: int) -> RunComponents:
        model = dataclasses.replace(config.model, img_size=size)
        return build(model, config.method, data, choose_device(config.run.device))

    with_heads = _with_heads(parts, config)
    size = broadcast_from_main(lambda: fit_image_size(parts, with_heads, at_size, console, data.started_at))
    return (parts, config) if size is None else (at_size(size), config.replace(img_size=size))


def choose_heads(parts: RunComponents, config: TrainConfig) -> TrainConfig:
    """Choose batch size, final head, the initialization of the trained head and the augmentation.

    Args:
        parts: Data and model; the transform of the training images is replaced.
        config: Settings, without automatic batch size.

    Raises:
        ValueError: If `epochs` is 0 without a probe-initialized head or without selection on validation images.
    """
    optim = config.optim.with_batch_size_for(len(parts.splits.train))
    config = _with_heads(parts, dataclasses.replace(config, optim=optim))
    data, optim = choose_augmentation(parts, config.data, config.optim), config.optim
    if optim.epochs == 0 and not can_skip_training(optim, data.protocol):
        raise ValueError(
            f"epochs must be at least 1, got 0 with head_init={optim.head_init!r} and protocol={data.protocol!r}; "
            "0 epochs require head_init='probe' and a protocol that selects on validation images"
        )
    return dataclasses.replace(config, data=data)


def _with_heads(parts: RunComponents, config: TrainConfig) -> TrainConfig:
    """Choose the final head and the initialization of the trained head, which do not depend on the image size."""
    optim, protocol = config.optim, config.data.protocol
    final_head = choose_final_head(parts, optim.final_head, protocol, is_sharded=config.run.shard)
    optim = dataclasses.replace(optim, final_head=final_head)
    if config.model.init_from is None:
        optim = resolve_head_init(parts, optim, protocol)
    return dataclasses.replace(config, optim=optim)
