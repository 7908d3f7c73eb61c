"""The lines before training: what will happen."""

from rich.console import Console
from rich.table import Table
from torch import nn

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
    test = f", {len(splits.test)} test" if splits.test is not None else ", no test images"
    classes = ", ".join(splits.classes[:6]) + (", …" if len(splits.classes) > 6 else "")
    table.add_row("data", f"{splits.description}: {len(splits.train)} training, {len(splits.val)} validation{test} images")
    table.add_row("classes", f"{len(splits.classes)}: {classes}")
    for note in splits.notes:
        table.add_row("note", note)
    table.add_row("backbone", f"{config.backbone}, {_count(model):,} weights, images of {size[1]}×{size[2]} px")
    table.add_row("method", f"{config.method}, {trainable_parameters(model):,} trainable parameters{_adapted(model)}")
    if _has_budgets(model):
        table.add_row("budget", _budgets(model, config))
    steps = -(-len(splits.train) // config.batch_size)
    table.add_row("training", f"{config.epochs} epochs of {steps} steps, {config.batch_size} images each, on {next(model.parameters()).device}")
    estimate = estimate_bytes(model, (size[0], size[1], size[2]), config.batch_size)
    table.add_row("memory", f"about {estimate / 2**20:,.0f} MiB for weights, gradients, optimiser and a batch (estimated)")
    console.print(table, highlight=False)


def _count(model: nn.Module) -> int:
    """Weights that are not trained."""
    return sum(p.numel() for p in model.parameters() if not p.requires_grad) or sum(p.numel() for p in model.parameters())


def _has_budgets(model: nn.Module) -> bool:
    """Whether the method is a sparse one."""
    return bool(matrices_of(model))


def _adapted(model: nn.Module) -> str:
    """How many matrices and weights are adapted."""
    matrices = matrices_of(model)
    return f"; {len(matrices)} matrices, {sum(m.size for m in matrices):,} adapted weights" if matrices else ""


def _budgets(model: nn.Module, config: TrainConfig) -> str:
    """From b_0 to b_T."""
    total = sum(matrix.size for matrix in matrices_of(model))
    settings = model.peft_config["default"]  # type: ignore[union-attr, index]
    start = round((1 - settings.init_sparsity) * total)
    end = round((1 - settings.target_sparsity) * total)
    return f"b_0 {start:,} → b_T {end:,} weights kept ({settings.target_sparsity:.0%} sparse at the end), {settings.schedule}"
