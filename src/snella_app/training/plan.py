"""Plan of a run: resolution of automatic settings, the printed summary, and the record of a started run.

The plan is the configuration of a run, with values in place of the automatic settings. Some of these values depend on
whether the model allows a linear probe, i.e. a linear head fitted to features of the pre-trained backbone.
"""

from __future__ import annotations

import dataclasses
import math
import platform
from collections.abc import Collection, Iterable
from importlib.metadata import version
from typing import Any, Literal, cast

import numpy as np
import torch
from peft import PeftModel
from rich.console import Console
from torch import nn

from snella import SnellaConfig
from snella.allocation import budget_at, schedule_length
from snella_app.config.sections import DEFAULT_BATCH_SIZE, SCHEDULE_END, OptimConfig
from snella_app.config.train import TrainConfig, command_line
from snella_app.console import counted, print_line, print_rows
from snella_app.data.options import DataConfig
from snella_app.data.protocol import PROTOCOLS
from snella_app.data.transforms import build_transform, has_flips
from snella_app.device import autocast, choose_device, choose_precision
from snella_app.methods import find_method
from snella_app.methods.model_parts import base_model, recorded_inputs
from snella_app.methods.registry import matrices_of, trainable_parameters
from snella_app.records.run import DataInfo, RunInfo
from snella_app.runs.images import SPLITS, absolute_folder, content_digests, split_sizes, splits_digest
from snella_app.runs.layer_probe import layer_features, probed_layers
from snella_app.training.build import LoadedData, RunComponents, build, read_side
from snella_app.training.distributed import broadcast_from_main, process_count, sharding_savings
from snella_app.training.final_head import leave_one_out_classes
from snella_app.training.linear_probe import (
    base_and_head,
    can_cache_features,
    can_probe,
    can_skip_training,
    extract_features,
    probe_features,
    probe_images,
    probe_indices,
    random_image,
)
from snella_app.training.sizing import (
    MIN_SIZE,
    fit_batch_size,
    fit_epochs,
    fit_image_size,
    free_memory,
    predicted_memory,
    size_step,
)

_PACKAGES = ("snella", "torch", "peft", "timm", "transformers")
"""Packages whose versions are recorded."""
_USUAL_SIZE = 224
"""Image size in pixels that is suggested on a CPU if the model's default is much larger."""
_MAX_FLIPPED = 500
"""Maximum number of training images for the flip check."""


def resolve(
    config: TrainConfig, data: LoadedData, parts: RunComponents, console: Console
) -> tuple[TrainConfig, RunComponents]:
    """Choose the precision, heads, image size, batch size, augmentation, and epochs of a new run, in this order.

    Fields of `config` may be `"auto"` or None. With `augment="auto"`, the transform of the training images is replaced.

    Returns:
        The plan, and the components, which are rebuilt if the image size changed.

    Raises:
        ValueError: If `epochs` is 0 without a probe-initialized head or without selection on validation images, or as
            for `choose_heads`.
    """
    device = choose_device(config.run.device)
    protocol = config.data.protocol
    config = config.replace(precision=broadcast_from_main(lambda: choose_precision(config.optim.precision, device)))
    config = choose_heads(parts, config)
    if config.optim.time_budget is not None:
        config = config.replace(epoch_images=None)  # `fit_epochs` sets it
    if config.optim.time_budget is not None and config.model.img_size is None:

        def at_size(size: int) -> RunComponents:
            return build(dataclasses.replace(config.model, img_size=size), config.method, data, device)

        size = broadcast_from_main(lambda: fit_image_size(parts, config, at_size, console, data.started_at))
        if size is not None:
            parts = at_size(size)
            config = config.replace(img_size=size)
    config = config.replace(batch_size=broadcast_from_main(lambda: fit_batch_size(parts, config.optim, console)))
    epoch_size = config.optim.images_per_epoch(len(parts.splits.train))
    optim = config.optim.with_batch_size_for(epoch_size)
    if config.optim.batch_size is None and epoch_size < DEFAULT_BATCH_SIZE:
        limit = "training images" if epoch_size == len(parts.splits.train) else "images per epoch"
        parts.splits.notes.append(
            f"batch size reduced from {DEFAULT_BATCH_SIZE} to {epoch_size}, the number of {limit}"
        )
    plan = dataclasses.replace(config, optim=optim)
    plan_data = broadcast_from_main(lambda: choose_augmentation(parts, plan.data, plan.optim))
    if plan.data.augment == "auto":
        augment = cast(Any, plan_data.augment)
        transform = build_transform(parts.data_config, augment=augment, random_erasing=plan_data.random_erasing)
        parts.splits.train = parts.splits.train.with_transform(transform)
    plan = dataclasses.replace(plan, data=plan_data)
    can_skip = can_skip_training(plan.optim, protocol)
    if plan.optim.class_weights == "balanced" and plan.data.sampler == "weighted":
        parts.splits.notes.append(
            "class_weights balanced and sampler weighted both compensate for class imbalance; use only one of them"
        )
    if plan.optim.epochs == 0 and not can_skip:
        raise ValueError(
            f"epochs must be at least 1, got 0 with head_init={plan.optim.head_init!r} and protocol={protocol!r}; "
            "0 epochs require head_init='probe' and a protocol that selects on validation images"
        )
    if can_skip and plan.optim.final_head == "layers" and find_method(plan.method.name).is_head_only:
        if plan.optim.epochs:
            print_line(
                console,
                f"no epochs: {plan.method.name} does not train the backbone, so epochs would not change the head on "
                "several layers; use --final-head trained to train the head",
            )
        plan = plan.replace(epochs=0)
    elif plan.optim.time_budget is not None and plan.optim.epochs:
        if plan.optim.head_init == "probe" and not can_cache_features(plan.data, parts.model):
            probe_features(parts, plan.optim)  # computed now, so that the time left for epochs is known
        epochs, epoch_images = broadcast_from_main(lambda: fit_epochs(parts, plan, console, data.started_at))
        plan = plan.replace(epochs=epochs, epoch_images=epoch_images)
    return plan, parts


def choose_heads(parts: RunComponents, config: TrainConfig) -> TrainConfig:
    """Resolve `final_head`, `head_init`, and `head_norm`, which do not depend on the image size.

    `final_head="auto"` is `layers` if the model and the task support it and there is a single process without `shard`,
    else `trained`. `head_init="auto"` is `probe` if `can_probe` returns True, else `random`. `head_norm="auto"` is
    `running` for a probe-initialized head, else `none`. Under the `official` protocol, `auto` is `trained` and
    `random`, as in the authors' scripts. A run that starts from another run keeps that run's head, so `head_init` and
    `head_norm` are unchanged.

    Raises:
        ValueError: If `final_head` is `layers`, but the model or the task does not support it, or the run has several
            processes or `shard`.
    """
    optim = config.optim
    is_official = config.data.protocol == "official"
    final_head: Literal["trained", "layers"] = "trained"
    if optim.final_head == "layers" or (optim.final_head == "auto" and not is_official):
        unmet_need = None
        if not parts.task.has_linear_fit:
            unmet_need = f"a task with one output vector per image, got {parts.task.name}"
        elif process_count() > 1 or config.run.shard:
            unmet_need = "a single process without shard"
        elif not _reads_features(parts):
            model = type(base_model(parts.model)).__name__
            unmet_need = (
                "a timm model with forward_intermediates and a method that keeps the inputs of its head, got "
                f"{model} with method {config.method.name!r}"
            )
        if unmet_need is None:
            final_head = "layers"
        elif optim.final_head == "layers":
            raise ValueError(f"final_head='layers' needs {unmet_need}; use final_head='trained'")
    init = optim.head_init
    norm = optim.head_norm
    if config.model.init_from is None:
        if init == "auto":
            init = "probe" if not is_official and can_probe(parts) else "random"
        if norm == "auto":
            norm = "running" if init == "probe" else "none"
    optim = dataclasses.replace(optim, final_head=final_head, head_init=init, head_norm=norm)
    return dataclasses.replace(config, optim=optim)


@torch.no_grad()
def _reads_features(parts: RunComponents) -> bool:
    """Return whether `forward_intermediates` works with the method, i.e. whether it returns the head's inputs."""
    layers = probed_layers(parts.model)
    if not layers:
        return False
    model = parts.model
    image = random_image(parts)
    was_training = model.training
    model.eval()
    _, head = base_and_head(model)
    try:
        with recorded_inputs(head) as recorded:
            model(image)
        head(recorded[0])  # raises for heads with other inputs, such as the summaries of VQT
        head_inputs = recorded[0].flatten(1)
        final_features = layer_features(model, image, layers)[:, : head_inputs.shape[1]]
        return bool(torch.allclose(head_inputs, final_features, atol=1e-4, rtol=1e-4))  # equal up to rounding
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError, AssertionError):
        return False
    finally:
        model.train(was_training)


def choose_augmentation(parts: RunComponents, data: DataConfig, optim: OptimConfig) -> DataConfig:
    """Resolve `augment="auto"` and `tta="auto"`.

    `augment="auto"` selects `Task.augment`: crops and flips for single-label, multi-label, and ordinal tasks, and only
    flips for regression and segmentation. The `official` protocol always uses flips.

    If the model allows a linear probe, single-label classification leaves out flips that change the classes. Two kernel
    ridge regressions predict left-out images. The first is fitted to the images. The second is fitted to the images and
    their flips, and averages its predictions for both. Flips are left out if the second is clearly worse (McNemar's
    test, two standard errors). It would not suffice to test the first on flipped images: if all figures face left, it
    also fails on flips that keep the class.

    `tta="auto"` averages the predictions for an image and its flip if training flips images, the task is single-label
    classification, and the protocol is not `official`.
    """
    augment: Any = data.augment
    if augment == "auto":
        augment = parts.task.augment if data.protocol != "official" else "flip"
        if augment == "crop" and _flips_change_classes(parts, optim):
            augment = "crop-no-flip"
    tta = data.tta
    if tta == "auto":
        is_averaged = has_flips(augment) and parts.task.has_class_scores and data.protocol != "official"
        tta = 2 if is_averaged else 1
    return dataclasses.replace(data, augment=augment, tta=tta)


def _flips_change_classes(parts: RunComponents, optim: OptimConfig) -> bool:
    """Return whether left-out images are predicted clearly worse if flips are used in the fit and in prediction."""
    if not parts.task.has_class_scores or not can_probe(parts):
        return False
    indices = probe_indices(parts)
    sample = np.random.default_rng(parts.seed).permutation(len(indices))[:_MAX_FLIPPED]
    features = probe_features(parts, optim)[torch.from_numpy(sample)]
    images = probe_images(parts, indices[sample])
    with autocast(next(parts.model.parameters()).device, optim.precision):
        (flipped_features,) = extract_features(parts, images, optim.effective_batch_size, flips=[True])
    labels = torch.tensor(parts.splits.train.labels)[indices[sample]]
    num_classes = len(parts.splits.classes)
    correct_without = leave_one_out_classes([features], labels, num_classes) == labels
    correct_with = leave_one_out_classes([features, flipped_features], labels, num_classes) == labels
    only_without = int((correct_without & ~correct_with).sum())
    only_with = int((correct_with & ~correct_without).sum())
    return only_without - only_with > 2.0 * math.sqrt(only_without + only_with)  # McNemar's test, two standard errors


def log_summary(console: Console, plan: TrainConfig, parts: RunComponents, step_memory: int) -> None:
    """Print the data, model, method, budgets, steps, estimated memory, and warnings."""
    splits = parts.splits
    model = parts.model
    optim = plan.optim
    protocol = PROTOCOLS[plan.data.protocol]
    matrices = matrices_of(model)
    adapter = cast(SnellaConfig, cast(PeftModel, model).peft_config["default"]) if matrices else None
    trained = trainable_parameters(model)
    adapted = sum(m.size for m in matrices)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    _, height, width = parts.data_config["input_size"]

    classes = ", ".join(splits.classes[:6]) + (", …" if len(splits.classes) > 6 else "")
    rows = [
        ("data", splits.description),
        (parts.task.outputs_name, f"{len(splits.classes)}: {classes}"),
        *(("note", note) for note in splits.notes),
    ]
    if protocol.name != "standard":
        rows.append(("protocol", f"{protocol.name}: {protocol.summary}"))
    if protocol.warning:
        rows.append(("warning", protocol.warning))
    if optim.ema is not None:
        rows.append(("average", f"exponential moving average of the trained weights, decay {optim.ema:g}"))
    if optim.swa is not None:
        rows.append(("average", f"mean of the trained weights of the last {optim.swa} epochs (swa)"))
    if optim.soup is not None:
        rows.append(("average", f"greedy soup of the last {optim.soup} epochs"))
    backbone_weights = frozen or trained  # full fine-tuning freezes no weights
    rows.append(("backbone", f"{plan.model.backbone}, {backbone_weights:,} weights, images of {height}×{width} px"))
    rows.append(("method", describe_method(plan.method.name, model)))
    if plan.model.init_from is not None:
        rows.append(("start", f"trained weights of {plan.model.init_from}, including the head"))
    else:
        is_probe = optim.head_init == "probe"
        rows.append(("head", "initialized from a linear probe" if is_probe else "initialized at random"))
    if optim.epochs:
        mixers = {"mixup": plan.data.mixup, "cutmix": plan.data.cutmix, "random erasing": plan.data.random_erasing}
        rows.append(("augment", ", ".join([plan.data.augment, *(name for name, value in mixers.items() if value)])))
    is_reduced = False
    if adapter is not None and optim.epochs:
        # the budget is the number of adapted weights that the update may change
        target_budget = adapted - round(adapter.target_sparsity * adapted)
        initial_budget = adapted - round(adapter.init_sparsity * adapted)
        initial_budget = budget_at(0, 1, initial_budget, target_budget, adapter.schedule)
        is_reduced = initial_budget > target_budget
        at_end = f"{adapter.target_sparsity:.0%} sparse at the end"
        budgets = f"{initial_budget:,} → {target_budget:,} weights ({at_end})"
        rows.append(("budget", f"{budgets}, {adapter.schedule} schedule"))

    device = next(model.parameters()).device
    num_processes = process_count()
    batch_size = optim.effective_batch_size
    steps = counted(optim.steps_per_epoch(len(splits.train)), "step")
    step_images = counted(batch_size, "image")
    if optim.accumulate > 1:
        step_images = f"{optim.accumulate} × {step_images}"
    where = f"on {device}" + ("" if optim.precision == "fp32" else f" in {optim.precision}")
    if num_processes > 1:
        where += f", by {num_processes} processes" + (" with sharded frozen weights" if plan.run.shard else "")
    rows.append(("training", f"{counted(optim.epochs, 'epoch')} of {steps}, {step_images} each, {where}"))
    if plan.run.device == "auto" and device.type == "cpu" and torch.backends.mps.is_available():
        rows.append(("note", "--device mps trains on the GPU of this machine"))
    rows += _stopping_rows(optim, adapter if is_reduced else None)
    memory_mib, free_mib = step_memory / 2**20, free_memory(device) / 2**20
    estimate = "estimate for weights, gradients, optimizer, batch"
    rows.append(("memory", f"about {memory_mib:,.0f} MiB of {free_mib:,.0f} MiB free ({estimate})"))
    print_rows(console, [*rows, *_cost_warnings(plan, parts, memory_mib, free_mib)])


def estimate_step_memory(plan: TrainConfig, parts: RunComponents) -> int:
    """Estimate the peak memory of a training step in each process, in bytes."""
    num_processes = process_count()
    memory = predicted_memory(parts, plan.optim.precision, -(-plan.optim.effective_batch_size // num_processes))
    return memory - (sharding_savings(parts.model, num_processes) if plan.run.shard else 0)


def _cost_warnings(
    plan: TrainConfig, parts: RunComponents, memory_mib: float, free_mib: float
) -> list[tuple[str, str]]:
    """Build the rows with warnings about memory and time."""
    rows = []
    if memory_mib > free_mib:
        batch_size = plan.optim.effective_batch_size
        remedies = [f"--batch-size below {batch_size}"] if batch_size > 1 else []
        unset_options = set(find_method(plan.method.name).options) - set(plan.method.options)
        if "compress_activations" in unset_options:
            remedies.append("--method-options.compress_activations true")
        if not plan.model.grad_checkpointing:
            remedies.append("--grad-checkpointing")
        other_remedies = f"{', '.join(remedies)} or " if remedies else ""
        rows.append(("warning", f"not enough free memory; use {other_remedies}a smaller --img-size"))
    side = int(parts.data_config["input_size"][-1])
    is_on_cpu = next(parts.model.parameters()).device.type == "cpu"
    if plan.model.img_size is None and side >= 1.5 * _USUAL_SIZE and is_on_cpu:
        step = size_step(parts.model)
        usual_side = _USUAL_SIZE // step * step
        rows.append(
            (
                "warning",
                f"the model's default of {side}×{side} px takes about {(side / usual_side) ** 2:.0f} times as long on "
                f"a CPU as {usual_side}×{usual_side} px; pass --img-size {usual_side} to save time",
            )
        )
    return rows


def _stopping_rows(optim: OptimConfig, adapter: SnellaConfig | None) -> list[tuple[str, str]]:
    """Describe early stopping and its relation to the budget's schedule.

    Pass `adapter` only if its budget decreases. Without early stopping, no rows are returned.
    """
    if optim.early_stopping is None:
        return []
    text = f"after {counted(optim.early_stopping, 'epoch')} without improvement"
    if adapter is None:
        return [("stopping", text)]
    end = adapter.schedule_end or 1.0
    if end >= 1:
        note = "early stopping has no effect: the budget reaches its target at the last step (schedule_end 1)"
        return [("note", f"{note}; use --method-options.schedule_end {SCHEDULE_END}")]
    reached = schedule_length(optim.epochs, end)
    return [("stopping", f"{text}, from epoch {reached}, when the budget reaches its target (schedule_end {end:g})")]


def shorten_hint(parts: RunComponents, factor: float) -> str:
    """Return a hint on how to shorten the run by a factor.

    The hint assumes that step time is proportional to the number of pixels. This is accurate for convolutions and
    underestimates the savings in attention.
    """
    side = int(parts.data_config["input_size"][-1])
    step = size_step(parts.model)
    smaller_side = int(side / math.sqrt(factor)) // step * step
    if smaller_side < max(MIN_SIZE, step):
        return "; to shorten the run, reduce --train-size or --epochs, or use a smaller --backbone"
    fraction = (smaller_side / side) ** 2
    return f"; --img-size {smaller_side} takes about {fraction:.0%} of that time but may lower accuracy"


def describe_run(plan: TrainConfig, parts: RunComponents, step_memory: int, names: Collection[str] = SPLITS) -> RunInfo:
    """Build the record of a new or resumed run, with content digests of the splits in `names`."""
    splits = parts.splits
    return RunInfo(
        status="running",
        task=parts.task.name,
        protocol=plan.data.protocol,
        ema=plan.optim.ema,
        tta=plan.data.views,
        method=plan.method.name,
        method_options=plan.method.all_options(),
        step_memory=step_memory if plan.optim.epochs else None,
        backbone=parts.backbone,
        classes=list(splits.classes),
        task_state=parts.task.state() or None,
        data=DataInfo(
            spec=str(plan.data.spec),
            seed=plan.run.seed,
            description=splits.description,
            sizes=split_sizes(splits),
            digest=splits_digest(splits),
            contents=content_digests(splits, names),
            folder=absolute_folder(str(plan.data.spec)),
            notes=list(splits.notes),
            fold_part=splits.fold_part,
            white=plan.data.white,
            read_side=read_side(parts.data_config, splits.train),
        ),
        data_config=parts.data_config,
        versions=versions_of(_PACKAGES),
        command=command_line(plan, "train"),
    )


def describe_method(name: str, model: nn.Module) -> str:
    """Describe a method and its trainable parameters for the summary of a run."""
    matrices = matrices_of(model)
    adapted = sum(matrix.size for matrix in matrices)
    matrices_text = f"; {len(matrices)} matrices, {adapted:,} adapted weights" if matrices else ""
    return f"{name}, {trainable_parameters(model):,} trainable parameters{matrices_text}"


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of Python and of the packages, by name."""
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
