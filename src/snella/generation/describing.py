"""What a personalisation run tells: lines before training, entries of `run.json` and `metrics.json`."""

from __future__ import annotations

import math
import platform
from importlib.metadata import version
from typing import Any

import torch
from rich.console import Console
from torch import nn

from snella.data.dreambooth import Concept
from snella.generation.config import DreamBoothConfig
from snella.generation.learning import Learner
from snella.training.console import counted, print_rows
from snella.training.results import folder_bytes, matrices_of, peak_rss_mib, trainable_parameters
from snella.training.settings import command_line

_PACKAGES = ("snella", "torch", "peft", "diffusers", "transformers", "accelerate")


def describe_run(config: DreamBoothConfig, concept: Concept) -> dict[str, Any]:
    """The entries of `run.json` but for the status."""
    return {
        "task": "generation",
        "method": config.method,
        "method_options": config.options_of_method(),
        "backbone": {"name": config.pipeline, "weights": None, "img_size": config.resolution},
        "classes": [],
        "data": {
            "spec": config.data,
            "subject": concept.name,
            "class_name": config.class_name,
            "seed": config.seed,
            "description": f"{counted(len(concept.paths), 'image')} of {concept.name}, learned as “{config.prompt}”",
            "sizes": {"train": len(concept.paths)},
            "digest": concept.digest(),
            "folder": str(concept.paths[0].parent),
            "files": [path.name for path in concept.paths],
            "notes": list(concept.notes),
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "command": command_line(config, DreamBoothConfig(data="-", pipeline="-", out="-"), "dreambooth"),
    }


def describe_metrics(learner: Learner) -> dict[str, Any]:
    """The content of `metrics.json`."""
    matrices = matrices_of(learner.model)
    peak = torch.cuda.max_memory_allocated(learner.device) / 2**20 if learner.device.type == "cuda" else None
    return {
        "train_s": round(learner.elapsed_s, 3),
        "trainable_parameters": trainable_parameters(learner.model),
        "adapted_weights": sum(m.size for m in matrices) if matrices else None,
        "adapter_bytes": folder_bytes(learner.run_folder.adapter),
        "peak_rss_mib": peak_rss_mib(),
        "peak_gpu_mib": peak,
        "optimizer": learner.optimizer_name,
        "fixed_loss": {"before": learner.loss_before, "after": learner.loss_after},
        "loss_history": [{key: _finite(value) for key, value in row.items()} for row in learner.history],
    }


def announce(
    console: Console,
    config: DreamBoothConfig,
    concept: Concept,
    model: nn.Module,
    optimizer: str,
    device: torch.device,
) -> None:
    """Print subject, prompts, model, what is trained and the steps."""
    matrices = matrices_of(model)
    adapted = f"; {len(matrices)} matrices, {sum(m.size for m in matrices):,} adapted weights" if matrices else ""
    looks = counted(config.batch_size * config.accumulation, "image")
    rows = [
        ("subject", f"{concept.name}, {counted(len(concept.paths), 'image')}"),
        *(("note", note) for note in concept.notes),
        ("prompt", str(config.prompt)),
        *([("class", f"{config.class_prompt}, {config.class_images} images")] if config.prior_weight > 0 else []),
        ("pipeline", f"{config.pipeline}, {config.resolution}×{config.resolution} px"),
        ("method", f"{config.method}, {trainable_parameters(model):,} trainable parameters{adapted}"),
        ("training", f"{counted(config.steps, 'step')}, {looks} each, lr {config.lr:g}, on {device}"),
        ("optimiser", optimizer),
    ]
    print_rows(console, rows)


def _finite(value: Any) -> Any:
    """None in place of a number that JSON lacks."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
