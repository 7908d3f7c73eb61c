"""Configuration of an instruction fine-tuning run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from snella_app.config import RunSettings
from snella_app.methods.defaults import RECIPE_METHOD
from snella_app.runs.folder import RunFolderOf

_NONNEGATIVE = ("lr", "scalar_lr", "weight_decay", "max_grad_norm")
_MINIMUMS = {
    "max_length": 2,
    "epochs": 1,
    "batch_size": 1,
    "accumulation": 1,
    "warmup_steps": 0,
    "val_size": 0,
    "seed": 0,
}


@dataclass
class LanguageConfig(RunSettings):
    """Settings of an instruction fine-tuning run; None means the method's default.

    Args:
        data: JSON file with a list of objects with instruction, input, output and answer, e.g. commonsense_170k.json.
        model: Causal language model: a local folder in transformers format or a hub name.
        out: Run folder; created.
        method: snella, snell, lora, dora or full; lora-32 sets the rank.
        template: Prompt template file with {instruction} and {input}; defaults to a plain built-in template.
        r: Rank of the factors (lora, dora, snella, snell).
        target_sparsity: Fraction of the adapted weights left unchanged at the end of training (snella, snell).
        scaling: Factor on the sparse update (snella, snell).
        method_options: Other method arguments, e.g. --method-options.kernel rbf.
        max_length: Maximum length of prompt and response in tokens; longer sequences are truncated.
        learn_prompt: Also compute the loss on prompt tokens, as the benchmark's script does.
        epochs: Training epochs.
        batch_size: Entries per forward pass (micro-batch size).
        accumulation: Gradient accumulation steps.
        lr: Peak learning rate of the factors (of all weights for full); decays linearly to 0.
        scalar_lr: Peak learning rate of the scalar kernel parameters (snella, snell).
        weight_decay: Decoupled weight decay; not applied to scalar kernel parameters.
        warmup_steps: Learning rate warmup steps.
        max_grad_norm: Maximum norm for gradient clipping.
        optimizer: adamw, adamw8bit (requires bitsandbytes), or auto for 8-bit AdamW if bitsandbytes works, else AdamW.
        gradient_checkpointing: Recompute each block's activations instead of storing them.
        val_size: Number of held-out entries; their loss is evaluated each epoch.
        base: Dtype of the frozen weights: fp32, or bf16 for half the memory; bf16 rounds small updates away.
        seed: Seed for the held-out split, initialization, data order and dropout.
        device: auto (a GPU if available), or a torch device such as cpu, cuda, cuda:1 or mps.
        precision: fp32, or bf16 for autocast.
        resume: Resume the run in `out` from its last checkpoint with its stored settings.
        overwrite: Replace an existing run in `out`.
        progress: Show a progress bar on a terminal.
    """

    needed: ClassVar[dict[str, str]] = {
        "data": "commonsense_170k.json",
        "model": "Llama-2-7b-hf",
    }
    out_example: ClassVar[str] = "runs/llama"
    purpose: ClassVar[str] = "language"
    basic: ClassVar[tuple[str, ...]] = (
        *("data", "model", "out", "method", "template", "epochs", "batch_size", "accumulation", "max_length", "lr"),
        *("device", "precision", "resume", "overwrite"),
    )

    data: str | None = None
    model: str | None = None
    out: str | None = None
    method: str = RECIPE_METHOD
    template: str | None = None
    r: int | None = None
    target_sparsity: float | None = None
    scaling: float | None = None
    method_options: dict[str, Any] = field(default_factory=dict)
    max_length: int = 256
    learn_prompt: bool = False
    epochs: int = 3
    batch_size: int = 4
    accumulation: int = 4
    lr: float | None = None
    scalar_lr: float | None = None
    weight_decay: float = 0.0
    warmup_steps: int = 100
    max_grad_norm: float = 1.0
    optimizer: Literal["auto", "adamw", "adamw8bit"] = "adamw"
    gradient_checkpointing: bool = False
    val_size: int = 0
    base: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0
    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    resume: bool = False
    overwrite: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        """Validate all settings that need neither data nor model; report all errors together."""
        errors = [*self.path_errors(), *self.kind_errors(), *self.device_errors()]
        errors += [*self._template_errors(), *self.minimum_errors(_MINIMUMS)]
        errors += [*self.nonnegative_errors(_NONNEGATIVE), *self.method_errors()]
        if errors:
            raise ValueError("; ".join(errors))

    def _template_errors(self) -> list[str]:
        """Return an error for a missing template file."""
        if self.template is None or Path(self.template).expanduser().is_file():
            return []
        return [f"template must be an existing text file, got {self.template!r}"]


RESULT_FILE = "language.json"


class LanguageFolder(RunFolderOf[LanguageConfig]):
    """Paths and small files of an instruction fine-tuning run."""

    settings_type = LanguageConfig
    files = (*RunFolderOf.files, RESULT_FILE)
    folders = (*RunFolderOf.folders, "answers")
