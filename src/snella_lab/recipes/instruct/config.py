"""Configuration of an instruction fine-tuning run."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from snella_app.config.sections import BaseRunConfig
from snella_app.config.train import RunSettings
from snella_app.files import expand_user
from snella_app.runs.folder import BaseRunFolder
from snella_app.settings import Config
from snella_lab.recipes.config import RecipeMethodConfig, RecipeOptimConfig


@dataclass(frozen=True, kw_only=True)
class LanguageOptimConfig(RecipeOptimConfig):
    """Batches, optimizer and precision of instruction fine-tuning."""

    weight_decay: float | None = 0.0
    batch_size: int = 4
    optimizer: Literal["auto", "adamw", "adamw8bit"] = "adamw"


@dataclass(frozen=True, kw_only=True)
class LanguageConfig(RunSettings):
    """Settings of an instruction fine-tuning run; unset optimizer settings use the method's defaults.

    Args:
        method: Fine-tuning method and its options.
        optim: Batches, optimizer and precision.
        run: Folder, seed and device.
        data: JSON list of objects with instruction, input (optional), output and answer, e.g. commonsense_170k.json.
        model: Causal language model: a local folder in transformers format, or a hub name.
        template: Prompt template file with {instruction} and {input}; defaults to a built-in template.
        max_length: Maximum number of tokens in prompt and response together; longer responses are truncated.
        learn_prompt: Also compute the loss on prompt tokens, as the training script of the commonsense benchmark does.
        epochs: Training epochs.
        warmup_steps: Number of learning rate warmup steps, before linear decay to 0.
        val_size: Number of held-out entries; their loss is evaluated each epoch.
        base: Dtype of the base weights: fp32, or bf16 for half the memory; bf16 loses small updates to rounding.
    """

    minimums: ClassVar = {"max_length": 2, "epochs": 1, "warmup_steps": 0, "val_size": 0}
    required: ClassVar[dict[str, str]] = {"data": "commonsense_170k.json", "model": "Llama-2-7b-hf"}
    out_example: ClassVar[str] = "runs/llama"
    purpose: ClassVar[str] = "language"
    basic: ClassVar[tuple[str, ...]] = (
        *("data", "model", "out", "method", "template", "epochs", "batch_size", "accumulation", "max_length", "lr"),
        *("device", "precision", "resume", "overwrite"),
    )

    method: RecipeMethodConfig = field(default_factory=RecipeMethodConfig)
    optim: LanguageOptimConfig = field(default_factory=LanguageOptimConfig)
    run: BaseRunConfig = field(default_factory=BaseRunConfig)
    data: str | None = None
    model: str | None = None
    template: str | None = None
    max_length: int = 256
    learn_prompt: bool = False
    epochs: int = 3
    warmup_steps: int = 100
    val_size: int = 0
    base: Literal["fp32", "bf16"] = "fp32"

    def errors(self) -> list[str]:
        """Check the settings of all sections without loading the data or the model."""
        errors = self.missing_errors(is_started=self.run.resume)
        if self.template is not None and not expand_user(self.template).is_file():
            errors.append(f"template must be an existing text file, got {self.template!r}")
        return [*errors, *super().errors(), *self.method_errors()]


RESULT_FILE = "language.json"


class LanguageFolder(BaseRunFolder[LanguageConfig]):
    """Folder of a run of `snella language`."""

    settings_type = LanguageConfig
    files = (*BaseRunFolder.files, RESULT_FILE)
    folders = (*BaseRunFolder.folders, "answers")


@dataclass(frozen=True, kw_only=True)
class EvaluateLanguageOptions(Config):
    """Options of `snella evaluate-language`.

    Args:
        run: Run folder.
        data: Folder with TASK/test.json for some or all of the eight tasks of the commonsense benchmark.
        beams: Beam search width; 1 is greedy decoding. The benchmark's script uses 4.
        max_new_tokens: Maximum number of tokens per answer.
        batch_size: Batch size.
        limit: Maximum number of questions per task.
        model: Path or hub name of the model; defaults to the run's.
        overwrite: Replace stored answers if the questions or the generation settings have changed.
        device: auto, or a torch device such as cpu, cuda:1 or mps.
    """

    positional: ClassVar = ("run",)
    minimums: ClassVar = {"beams": 1, "max_new_tokens": 1, "batch_size": 1, "limit": 1}

    run: str
    data: str
    beams: int = 1
    max_new_tokens: int = 32
    batch_size: int = 8
    limit: int | None = None
    model: str | None = None
    overwrite: bool = False
    device: str = "auto"
