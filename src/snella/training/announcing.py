"""The lines before training: what will happen."""

from typing import cast

from peft import PeftModel
from rich.console import Console
from torch import nn

from snella import SnellaConfig
from snella.training.assembly import Assembly
from snella.training.config import TrainConfig
from snella.training.console import counted, print_rows
from snella.training.memory import predict_step_memory
from snella.training.protocol import protocol_of
from snella.training.results import matrices_of, trainable_parameters


def announce(console: Console, config: TrainConfig, parts: Assembly) -> None:
    """Print data, model, what is trained, budgets, steps and the estimated memory.

    Args:
        console: Where to write.
        config: Resolved settings.
        parts: Data and model.
    """
    splits, model = parts.splits, parts.model
    size = tuple(parts.data_config["input_size"])
    classes = ", ".join(splits.classes[:6]) + (", …" if len(splits.classes) > 6 else "")
    batch = config.images_per_step
    steps = counted(-(-len(splits.train) // batch), "step")
    device = next(model.parameters()).device
    memory = predict_step_memory(model, (size[0], size[1], size[2]), batch).total / 2**20
    rows = [
        ("data", splits.description),
        ("classes", f"{len(splits.classes)}: {classes}"),
        *(("note", note) for note in splits.notes),
        *_protocol_rows(config),
        ("backbone", f"{config.backbone}, {_count(model):,} weights, images of {size[1]}×{size[2]} px"),
        ("method", f"{config.method}, {trainable_parameters(model):,} trainable parameters{_adapted(model)}"),
        *([("budget", _budgets(model))] if matrices_of(model) else []),
        ("training", f"{counted(config.epochs, 'epoch')} of {steps}, {counted(batch, 'image')} each, on {device}"),
        ("memory", f"about {memory:,.0f} MiB for weights, gradients, optimiser and a batch (estimated)"),
    ]
    print_rows(console, rows)


def _protocol_rows(config: TrainConfig) -> list[tuple[str, str]]:
    """How the kept weights are chosen, where that is not the usual way."""
    protocol = protocol_of(config.protocol)
    rows = [] if protocol.name == "standard" else [("protocol", f"{protocol.name}: {protocol.summary}")]
    if protocol.warning:
        rows.append(("warning", protocol.warning))
    if config.ema is not None:
        rows.append(("average", f"exponential moving average of the trained weights, decay {config.ema:g}"))
    return rows


def _count(model: nn.Module) -> int:
    """Weights that are not trained."""
    return sum(p.numel() for p in model.parameters() if not p.requires_grad) or sum(
        p.numel() for p in model.parameters()
    )


def _adapted(model: nn.Module) -> str:
    """How many matrices and weights are adapted."""
    matrices = matrices_of(model)
    return f"; {len(matrices)} matrices, {sum(m.size for m in matrices):,} adapted weights" if matrices else ""


def _budgets(model: nn.Module) -> str:
    """From b_0 to b_T, as the allocator will have it."""
    total = sum(matrix.size for matrix in matrices_of(model))
    settings = cast(SnellaConfig, cast(PeftModel, model).peft_config["default"])
    start, end = (total - round(sparsity * total) for sparsity in (settings.init_sparsity, settings.target_sparsity))
    sparsity = f"{settings.target_sparsity:.0%} sparse at the end"
    return f"b_0 {start:,} → b_T {end:,} weights kept ({sparsity}), {settings.schedule}"
