"""The configuration of instruction fine-tuning."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from snella_app.config import RunSettings
from snella_app.methods.defaults import RECIPE_METHOD
from snella_app.runs.folder import RunFolderOf

_RATES = ("lr", "scalar_lr", "weight_decay", "max_grad_norm")
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
    """Settings of one instruction fine-tuning; None means the default of the method.

    Args:
        data: JSON file with a list of instruction, input, output and answer, such as commonsense_170k.json.
        model: Causal language model: a local folder in transformers' format, or a name on the hub.
        out: Folder of the run; created.
        method: snella, snell, lora, dora or full; lora-32 sets the rank.
        template: File with {instruction} and {input} in it, the response follows it; a plain one if not given.
        r: Rank of the factors (lora, dora, snella, snell).
        target_sparsity: Fraction of the adapted weights that the update leaves untouched in the end (snella, snell).
        scaling: Factor on the sparse update (snella, snell): how far a step of the learning rate moves the model.
        method_options: Further options of the method. On the command line --method-options.kernel rbf.
        max_length: Tokens of prompt and response together; what is longer is cut off.
        learn_prompt: Learn the prompt's tokens too, as the benchmark's own script does, not the response alone.
        epochs: Passes over the data.
        batch_size: Entries of one forward pass.
        accumulation: Forward passes of one optimizer step.
        lr: Highest learning rate of the factors (of all weights in full); it falls linearly to 0.
        scalar_lr: The same for the few numbers that shape how the factors are combined (snella, snell).
        weight_decay: Decoupled weight decay; none on the kernels' scalars.
        warmup_steps: Steps over which the rates rise.
        max_grad_norm: Gradients are scaled down to this norm.
        optimizer: auto is 8-bit AdamW where the package bitsandbytes runs, else AdamW; adamw8bit insists on it.
        gradient_checkpointing: Compute each block's activations a second time instead of keeping them.
        val_size: So many entries are held out, and their loss is measured each epoch.
        base: Number format of the frozen weights: fp32, or bf16 for half the memory; small changes are lost in bf16.
        seed: Decides held-out entries, initial values, order and dropout.
        device: auto (a GPU if there is one), or a device of torch such as cpu, cuda, cuda:1 or mps.
        precision: fp32, or bf16 for autocast.
        resume: Continue the run in `out` from its last checkpoint, with its own settings.
        overwrite: Start over in a folder that holds a run.
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
        """Check everything that can be known without data and model, and report all errors together."""
        errors = [*self.path_errors(), *self.kind_errors(), *self.device_errors()]
        errors += [*self._template_errors(), *self.minimum_errors(_MINIMUMS)]
        errors += [*self.nonnegative_errors(_RATES), *self.method_errors()]
        if errors:
            raise ValueError("; ".join(errors))

    def _template_errors(self) -> list[str]:
        """A template that is not there."""
        if self.template is None or Path(self.template).expanduser().is_file():
            return []
        return [f"template must be an existing text file, got {self.template!r}"]


RESULT_FILE = "language.json"


class LanguageFolder(RunFolderOf[LanguageConfig]):
    """Paths and small files of one instruction fine-tuning."""

    settings_type = LanguageConfig
    files = (*RunFolderOf.files, RESULT_FILE)
    folders = (*RunFolderOf.folders, "answers")
