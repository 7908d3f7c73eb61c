"""The lines before training: what will happen."""

from typing import cast

from peft import PeftModel
from rich.console import Console
from rich.table import Table
from torch import nn

from snella import SnellaConfig
from snella.training.assembly import Assembly
from snella.training.config import TrainConfig
from snella.training.memory import estimate_bytes
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
    table = Table.grid(padding=(0, 2))
    classes = ", ".join(splits.classes[:6]) + (", …" if len(splits.classes) > 6 else "")
    table.add_row("data", splits.description)
    table.add_row("classes", f"{len(splits.classes)}: {classes}")
    for note in splits.notes:
        table.add_row("note", note)
    table.add_row("backbone", f"{config.backbone}, {_count(model):,} weights, images of {size[1]}×{size[2]} px")
    table.add_row("method", f"{config.method}, {trainable_parameters(model):,} trainable parameters{_adapted(model)}")
    if matrices_of(model):
        table.add_row("budget", _budgets(model))
    steps = -(-len(splits.train) // config.batch_size)
    table.add_row(
        "training",
        f"{config.epochs} epochs of {steps} steps, {config.batch_size} images each, "
        f"on {next(model.parameters()).device}",
    )
    estimate = estimate_bytes(model, (size[0], size[1], size[2]), config.batch_size)
    table.add_row(
        "memory", f"about {estimate / 2**20:,.0f} MiB for weights, gradients, optimiser and a batch (estimated)"
    )
    console.print(table, highlight=False, soft_wrap=True)


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
