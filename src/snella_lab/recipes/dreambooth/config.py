"""Configuration of a DreamBooth run."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from snella_app.config import RunSettings
from snella_app.methods.defaults import RECIPE_METHOD
from snella_app.runs.folder import RunFolderOf

_NONNEGATIVE = ("lr", "scalar_lr", "weight_decay", "max_grad_norm", "prior_weight", "guidance")
_MINIMUMS = {
    "resolution": 8,
    "steps": 1,
    "batch_size": 1,
    "accumulation": 1,
    "class_images": 1,
    "max_sequence_length": 1,
    "save_every": 1,
    "samples": 0,
    "sample_steps": 1,
    "seed": 0,
}


@dataclass
class DreamBoothConfig(RunSettings):
    """Settings of a DreamBooth run; None means the method's default.

    Args:
        data: Images of the subject: folder:PATH for PATH/*.jpg, or dreambooth:PATH for PATH/SUBJECT/*.jpg.
        subject: Subject folder in dreambooth:PATH.
        pipeline: Stable Diffusion 3: a local folder in diffusers format or a hub name.
        out: Run folder; created.
        method: snella, snell, lora, dora or full; lora-8 sets the rank.
        token: Rare token for the subject in prompts.
        class_name: Class of the subject, e.g. dog; dreambooth:PATH may define it.
        prompt: Training prompt; defaults to "a photo of TOKEN CLASS".
        r: Rank of the factors (lora, dora, snella, snell).
        target_sparsity: Fraction of the adapted weights left unchanged at the end of training (snella, snell).
        scaling: Factor on the sparse update (snella, snell).
        method_options: Other method arguments, e.g. --method-options.kernel rbf.
        resolution: Image resolution in pixels; images are resized and center-cropped.
        steps: Optimizer steps.
        batch_size: Images per forward pass (micro-batch size).
        accumulation: Gradient accumulation steps.
        lr: Constant learning rate of the factors (of all weights for full).
        scalar_lr: Learning rate of the scalar kernel parameters (snella, snell).
        weight_decay: Decoupled weight decay; not applied to scalar kernel parameters.
        max_grad_norm: Maximum norm for gradient clipping; 0 disables it.
        optimizer: adamw, adamw8bit (requires bitsandbytes), or auto for 8-bit AdamW if bitsandbytes works, else AdamW.
        gradient_checkpointing: Recompute each block's activations instead of storing them.
        weighting: Sampling and weighting of the timesteps: logit_normal, mode, uniform, sigma_sqrt or cosmap.
        precondition: Compute the loss on predicted images instead of velocities.
        flip: Also train on mirrored images.
        prior_weight: Weight of the prior-preservation loss on class images; 0 disables it.
        class_images: Number of class images that the pipeline generates.
        class_prompt: Prompt of the class images; defaults to "a photo of CLASS".
        max_sequence_length: Maximum prompt length of the third text encoder, in tokens.
        save_every: Steps between checkpoints.
        samples: Images to generate at the end, with the training prompt.
        sample_steps: Sampling steps.
        guidance: Guidance scale.
        skip_corrupt: Skip corrupt images and report their number.
        seed: Seed for initialization, data order, noise and dropout.
        device: auto (a GPU if available), or a torch device such as cpu, cuda, cuda:1 or mps.
        precision: fp32, or bf16 for autocast and the text encoders.
        resume: Resume the run in `out` from its last checkpoint with its stored settings.
        overwrite: Replace an existing run in `out`.
        progress: Show a progress bar on a terminal.
    """

    needed: ClassVar[dict[str, str]] = {
        "data": "folder:photos/my-dog",
        "pipeline": "sd3-medium",
    }
    out_example: ClassVar[str] = "runs/my-dog"
    purpose: ClassVar[str] = "generation"
    basic: ClassVar[tuple[str, ...]] = (
        *("data", "subject", "pipeline", "out", "method", "class_name", "token", "prompt", "resolution", "steps", "lr"),
        *("prior_weight", "samples", "skip_corrupt", "device", "precision", "resume", "overwrite"),
    )

    data: str | None = None
    subject: str | None = None
    pipeline: str | None = None
    out: str | None = None
    method: str = RECIPE_METHOD
    token: str = "sks"
    class_name: str | None = None
    prompt: str | None = None
    r: int | None = None
    target_sparsity: float | None = None
    scaling: float | None = None
    method_options: dict[str, Any] = field(default_factory=dict)
    resolution: int = 512
    steps: int = 500
    batch_size: int = 1
    accumulation: int = 4
    lr: float | None = None
    scalar_lr: float | None = None
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    optimizer: Literal["auto", "adamw", "adamw8bit"] = "auto"
    gradient_checkpointing: bool = True
    weighting: Literal["logit_normal", "mode", "uniform", "sigma_sqrt", "cosmap"] = "logit_normal"
    precondition: bool = True
    flip: bool = False
    prior_weight: float = 0.0
    class_images: int = 100
    class_prompt: str | None = None
    max_sequence_length: int = 77
    save_every: int = 100
    samples: int = 4
    sample_steps: int = 28
    guidance: float = 7.0
    skip_corrupt: bool = False
    seed: int = 0
    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    resume: bool = False
    overwrite: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        """Validate all settings that need neither data nor model; report all errors together."""
        errors = [*self.path_errors(), *self.kind_errors(), *self.device_errors()]
        errors += [] if self.token.strip() else [f"token must be a word, got {self.token!r}"]
        errors += self.minimum_errors(_MINIMUMS)
        errors += [*self.nonnegative_errors(_NONNEGATIVE), *self.method_errors()]
        if errors:
            raise ValueError("; ".join(errors))

    def named(self, class_name: str | None) -> "DreamBoothConfig":
        """Return a copy with class name and prompts.

        Args:
            class_name: Class from the data, used if the settings define none.

        Raises:
            ValueError: A prompt needs a class name and neither the settings nor the data define one.
        """
        resolved_class = self.class_name or class_name
        missing = [] if self.prompt else ["prompt"]
        missing += ["class_prompt"] if self.prior_weight > 0 and not self.class_prompt else []
        if missing and not resolved_class:
            raise ValueError(
                f"class_name must be the class of the subject, e.g. dog, got none, and {self.data} does not "
                f"define it; set it, or set {' and '.join(missing)}"
            )
        return dataclasses.replace(
            self,
            class_name=resolved_class,
            prompt=self.prompt or f"a photo of {self.token} {resolved_class}",
            class_prompt=self.class_prompt or (f"a photo of {resolved_class}" if resolved_class else None),
        )


class DreamBoothFolder(RunFolderOf[DreamBoothConfig]):
    """Paths and small files of a DreamBooth run."""

    settings_type = DreamBoothConfig
    files = (*RunFolderOf.files, "images.json", "generation.json")
    folders = (*RunFolderOf.folders, "class_images", "samples", "evaluation")
