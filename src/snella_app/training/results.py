"""Summaries of a run: `run.json`, `allocation.json`, generator metrics and the console summary."""

import contextlib
import math
import platform
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from peft import PeftModel
from rich.console import Console
from torch import nn

from snella import BudgetAllocator, SnellaConfig
from snella.matrices import AdaptedMatrix, adapted_matrices
from snella_app.config import SCHEDULE_END, OptimConfig, TrainConfig, command_line
from snella_app.console import counted, print_rows
from snella_app.data.protocol import get_protocol
from snella_app.device import autocast
from snella_app.methods import method_of, method_options
from snella_app.records import Allocation, AllocationStep, DataInfo, MatrixInfo, RunInfo
from snella_app.runs.images import SPLITS, absolute_folder, content_digests, split_sizes, splits_digest
from snella_app.training.build import RunComponents, read_side
from snella_app.training.distributed import process_count, sharding_savings
from snella_app.training.memory import predict_step_memory

_PACKAGES = ("snella", "torch", "peft", "timm", "transformers")
_USUAL_SIZE, MIN_SIZE = 224, 48


def describe_run(plan: TrainConfig, parts: RunComponents, names: Collection[str] = SPLITS) -> RunInfo:
    """Build the record of a new run, with the contents of the splits in `names`."""
    splits = parts.splits
    return RunInfo(
        status="running",
        task=parts.task.name,
        protocol=plan.data.protocol,
        ema=plan.optim.ema,
        tta=plan.data.views,
        method=plan.method.name,
        method_options=plan.method.all_options(),
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
        command=command_line(plan, TrainConfig.from_flat(data="-", backbone="-", out="-"), "train"),
    )


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of Python and of packages."""
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def sparsity_summary(matrices: Sequence[AdaptedMatrix]) -> str:
    """Format the number of weights that an update changes."""
    budget, total = sum(m.budget for m in matrices), sum(m.size for m in matrices)
    return f"changes {budget:,} of {total:,} weights ({1 - budget / total:.1%} sparse)"


def matrices_of(model: nn.Module) -> list[AdaptedMatrix]:
    """Return the adapted matrices of a model; empty for methods without budgets."""
    method = method_of(model)
    return adapted_matrices(model) if method is not None and method.has_budgets else []


def trainable_parameters(model: nn.Module) -> int:
    """Count the trainable parameters, including the head."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def describe_allocation(model: nn.Module, allocator: BudgetAllocator) -> Allocation:
    """Build the allocation record: matrices, budgets of the best adapter and budget history."""
    return Allocation(
        total_weights=allocator.total_weights,
        target_budget=allocator.target_budget,
        matrices=[
            MatrixInfo(m.name, m.kind, m.depth, tuple(m.shape), m.size, m.budget, m.nonzeros())
            for m in matrices_of(model)
        ],
        history=[AllocationStep(**entry) for entry in allocator.history],
    )


def best_epoch(
    history: Sequence[dict[str, Any]], selection_score: Callable[[Mapping[str, Any]], tuple[float, float]]
) -> int:
    """Return the epoch with the highest score; ties go to the latest. See `RunProtocol.selection_score`."""
    return int(max(history, key=lambda row: (selection_score(row), row["epoch"]))["epoch"])


def folder_bytes(folder: Path) -> int:
    """Return the size of the weight files in an adapter folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def log_summary(console: Console, plan: TrainConfig, parts: RunComponents) -> None:
    """Print data, model, method, budgets, steps and estimated memory."""
    splits, model, optim = parts.splits, parts.model, plan.optim
    protocol, matrices = get_protocol(plan.data.protocol), matrices_of(model)
    adapter = cast(SnellaConfig, cast(PeftModel, model).peft_config["default"]) if matrices else None
    trained, adapted = trainable_parameters(model), sum(m.size for m in matrices)
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
        rows.append(("average", f"greedy soup of the best of the last {optim.soup} epochs"))
    rows.append(("backbone", f"{plan.model.backbone}, {frozen or trained:,} weights, images of {height}×{width} px"))
    matrices_text = f"; {len(matrices)} matrices, {adapted:,} adapted weights" if matrices else ""
    rows.append(("method", f"{plan.method.name}, {trained:,} trainable parameters{matrices_text}"))
    if plan.model.init_from is not None:
        rows.append(("start", f"trained weights of {plan.model.init_from}, including the head"))
    else:
        is_probe = optim.head_init == "probe"
        rows.append(("head", "initialized from a linear probe" if is_probe else "initialized at random"))
    if adapter is not None:
        start, end = (adapted - round(value * adapted) for value in (adapter.init_sparsity, adapter.target_sparsity))
        at_end = f"{adapter.target_sparsity:.0%} sparse at the end"
        rows.append(("budget", f"b_0 {start:,} → b_T {end:,} weights ({at_end}), {adapter.schedule}"))

    device, count, batch = next(model.parameters()).device, process_count(), optim.effective_batch_size
    steps = counted(optim.steps_per_epoch(len(splits.train)), "step")
    images = f"{optim.accumulate} × {counted(batch, 'image')}" if optim.accumulate > 1 else counted(batch, "image")
    where = f"on {device}" + ("" if optim.precision == "fp32" else f" in {optim.precision}")
    if count > 1:
        where += f", by {count} processes" + (" with sharded frozen weights" if plan.run.shard else "")
    rows.append(("training", f"{counted(optim.epochs, 'epoch')} of {steps}, {images} each, {where}"))
    rows += _stopping_rows(optim, adapter)
    memory, free = predicted_memory(parts, optim.precision, -(-batch // count)) / 2**20, free_memory(device) / 2**20
    memory -= sharding_savings(model, count) / 2**20 if plan.run.shard else 0
    estimate = "estimate for weights, gradients, optimizer, batch"
    rows.append(("memory", f"about {memory:,.0f} MiB of {free:,.0f} MiB free ({estimate})"))
    print_rows(console, [*rows, *_cost_warnings(plan, parts, memory, free)])


def predicted_memory(parts: RunComponents, precision: str, batch_size: int) -> int:
    """Predict the peak memory of one training step, in bytes."""
    channels, height, width = parts.data_config["input_size"]
    with autocast(next(parts.model.parameters()).device, precision):
        return predict_step_memory(parts.model, (channels, height, width), batch_size).total


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a GPU, or of the machine or its container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    limit, used = (Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory.current"))
    with contextlib.suppress(OSError, ValueError):  # missing files, or the value "max"
        free = min(free, max(int(limit.read_text()) - int(used.read_text()), 0))
    return free


def shorten_hint(parts: RunComponents, factor: float) -> str:
    """Return a hint on shortening the run by a factor.

    The hint assumes that step time is proportional to the number of pixels. This holds for convolutions and
    underestimates the savings in attention.
    """
    side, patch = int(parts.data_config["input_size"][-1]), size_step(parts.model)
    shorter = int(side / math.sqrt(factor)) // patch * patch
    if shorter < max(MIN_SIZE, patch):
        return "; to shorten it, reduce --train-size or --epochs, or use a smaller --backbone"
    fraction = (shorter / side) ** 2
    return f"; --img-size {shorter} takes about {fraction:.0%} of that time but may lower accuracy"


def size_step(model: nn.Module) -> int:
    """Return the divisor of supported image sizes, from the patch size and the feature stride; 32 if unknown."""
    modules = list(model.modules())
    patches = [size[0] for module in modules if isinstance(size := getattr(module, "patch_size", None), tuple)]
    infos = [info for module in modules if isinstance(info := getattr(module, "feature_info", None), list)]
    reductions = [int(stage["reduction"]) for info in infos[:1] for stage in info[-1:]]
    return math.lcm(*map(int, patches[:1]), *reductions) if patches or reductions else 32


def _cost_warnings(plan: TrainConfig, parts: RunComponents, memory: float, free: float) -> list[tuple[str, str]]:
    """Build the warnings about memory and time."""
    rows = []
    if memory > free:
        batch_size = plan.optim.effective_batch_size
        options = [f"--batch-size below {batch_size}"] if batch_size > 1 else []
        if "compress_activations" in set(method_options(plan.method.name)) - set(plan.method.options):
            options.append("--method-options.compress_activations true")
        options += [] if plan.model.grad_checkpointing else ["--grad-checkpointing"]
        listed = f"{', '.join(options)} or " if options else ""
        rows.append(("warning", f"not enough free memory; use {listed}a smaller --img-size"))
    side = int(parts.data_config["input_size"][-1])
    is_on_cpu = next(parts.model.parameters()).device.type == "cpu"
    if plan.model.img_size is None and side >= 1.5 * _USUAL_SIZE and is_on_cpu:
        patch = size_step(parts.model)
        usual_side = _USUAL_SIZE // patch * patch
        rows.append(
            (
                "warning",
                f"the model's default of {side}×{side} px takes about {(side / usual_side) ** 2:.0f} times as long on "
                f"a CPU as {usual_side}×{usual_side} px; pass --img-size {usual_side} to reduce it",
            )
        )
    return rows


def _stopping_rows(optim: OptimConfig, adapter: SnellaConfig | None) -> list[tuple[str, str]]:
    """Describe early stopping and its relation to the sparsity schedule; `adapter` is None without budgets."""
    if optim.early_stopping is None:
        return []
    text = f"after {counted(optim.early_stopping, 'epoch')} without improvement"
    if adapter is None:
        return [("stopping", text)]
    end = adapter.schedule_end or 1.0
    if end >= 1:
        note = "early stopping has no effect: the budget reaches its target at the last step (schedule_end 1)"
        return [("note", f"{note}; use --method-options.schedule_end {SCHEDULE_END}")]
    reached = math.ceil(end * optim.epochs)
    return [("stopping", f"{text}, from epoch {reached}, when the budget reaches its target (schedule_end {end:g})")]
