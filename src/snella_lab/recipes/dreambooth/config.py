"""Configuration of a DreamBooth run."""

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from snella_app.config.sections import BaseRunConfig
from snella_app.config.train import RunSettings
from snella_app.runs.folder import BaseRunFolder
from snella_app.settings import Config
from snella_lab.recipes.config import RecipeMethodConfig, RecipeOptimConfig


@dataclass(frozen=True, kw_only=True)
class DreamBoothOptimConfig(RecipeOptimConfig):
    """Batches, optimizer and precision of DreamBooth.

    Args:
        precision: fp32, or bf16 for autocast and the text encoders.
    """

    weight_decay: float | None = 1e-4
    gradient_checkpointing: bool = True


@dataclass(frozen=True, kw_only=True)
class DreamBoothConfig(RunSettings):
    """Settings of a DreamBooth run; unset optimizer settings use the method's defaults.

    Args:
        method: Fine-tuning method and its options.
        optim: Batches, optimizer and precision.
        run: Folder, seed and device.
        data: Subject images: folder:PATH for PATH/image.jpg, or dreambooth:PATH for PATH/SUBJECT/image.jpg.
        subject: Subject folder in dreambooth:PATH.
        pipeline: Stable Diffusion 3, as a local folder in diffusers format or a hub name.
        token: Rare token that denotes the subject in prompts.
        class_name: Class of the subject, e.g. dog; dreambooth:PATH can define it.
        prompt: Training prompt; defaults to "a photo of TOKEN CLASS".
        resolution: Image resolution in pixels; images are resized and center-cropped.
        steps: Number of optimizer steps, at a constant learning rate.
        weighting: Timestep sampling and loss weighting: logit_normal, mode, uniform, sigma_sqrt or cosmap.
        precondition: Compute the loss on predicted clean latents instead of velocities.
        flip: Also train on mirrored images.
        prior_weight: Weight of the prior-preservation loss on class images; 0 disables it.
        class_images: Number of class images to generate.
        class_prompt: Prompt of the class images; defaults to "a photo of CLASS".
        max_sequence_length: Maximum prompt length of the third text encoder, in tokens.
        save_every: Number of steps between checkpoints.
        samples: Number of images to generate after training, with the training prompt.
        sample_steps: Number of sampling steps.
        guidance: Guidance scale.
        skip_corrupt: Skip and count corrupt images.
    """

    minimums: ClassVar = {
        "resolution": 8,
        **dict.fromkeys(("steps", "class_images", "max_sequence_length", "save_every"), 1),
        **{"samples": 0, "sample_steps": 1},
    }
    nonnegative: ClassVar = ("prior_weight", "guidance")
    required: ClassVar[dict[str, str]] = {"data": "folder:photos/my-dog", "pipeline": "sd3-medium"}
    out_example: ClassVar[str] = "runs/my-dog"
    purpose: ClassVar[str] = "generation"
    basic: ClassVar[tuple[str, ...]] = (
        *("data", "subject", "pipeline", "out", "method", "class_name", "token", "prompt", "resolution", "steps", "lr"),
        *("prior_weight", "samples", "skip_corrupt", "device", "precision", "resume", "overwrite"),
    )

    method: RecipeMethodConfig = field(default_factory=RecipeMethodConfig)
    optim: DreamBoothOptimConfig = field(default_factory=DreamBoothOptimConfig)
    run: BaseRunConfig = field(default_factory=BaseRunConfig)
    data: str | None = None
    subject: str | None = None
    pipeline: str | None = None
    token: str = "sks"
    class_name: str | None = None
    prompt: str | None = None
    resolution: int = 512
    steps: int = 500
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

    def errors(self) -> list[str]:
        """Check the settings of all sections without loading the data or the model."""
        errors = self.missing_errors(is_started=self.run.resume)
        if not self.token.strip():
            errors.append(f"token must be a word, got {self.token!r}")
        return [*errors, *super().errors(), *self.method_errors()]

    def with_class_name(self, class_name: str | None) -> "DreamBoothConfig":
        """Return a copy with the class name and, in place of missing prompts, the default prompts.

        Args:
            class_name: Class name from the data. A class name in the settings takes precedence.

        Raises:
            ValueError: If a default prompt is needed, but neither the settings nor the data define a class name.
        """
        resolved_class = self.class_name or class_name
        missing = [] if self.prompt else ["prompt"]
        if self.prior_weight > 0 and not self.class_prompt:
            missing.append("class_prompt")
        if missing and not resolved_class:
            raise ValueError(
                f"class_name must name the class of the subject, e.g. dog, because {self.data} does not define it; "
                f"set it, or set {' and '.join(missing)}"
            )
        return dataclasses.replace(
            self,
            class_name=resolved_class,
            prompt=self.prompt or f"a photo of {self.token} {resolved_class}",
            class_prompt=self.class_prompt or (f"a photo of {resolved_class}" if resolved_class else None),
        )


class DreamBoothFolder(BaseRunFolder[DreamBoothConfig]):
    """Folder of a run of `snella dreambooth`."""

    settings_type = DreamBoothConfig
    files = (*BaseRunFolder.files, "generation.json")
    folders = (*BaseRunFolder.folders, "class_images", "samples", "evaluation")


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(Config):
    """Options of the commands that generate images with a run.

    Args:
        run: Run folder.
        live: Use the prompt file's list for live subjects; default for cats and dogs.
        images_per_prompt: Number of images per prompt.
        steps: Sampling steps; defaults to the run's.
        batch_size: Batch size.
        pipeline: Path or hub name of the pipeline; defaults to the run's.
        device: auto, or a torch device such as cpu, cuda:1 or mps.
    """

    positional: ClassVar = ("run",)
    minimums: ClassVar = {"images_per_prompt": 1, "steps": 1, "batch_size": 1}

    run: str
    prompts: str | None = None
    live: bool | None = None
    images_per_prompt: int = 4
    steps: int | None = None
    batch_size: int = 1
    pipeline: str | None = None
    overwrite: bool = False
    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(GenerationOptions):
    """Options of `snella generate`.

    Args:
        out: Output folder for the images.
        prompt: Prompt with the run's subject token, e.g. sks.
        prompts: Prompt file with one prompt per line, {0} for the token and {1} for the class; or DreamBooth's
            prompts_and_classes.txt.
        seed: Seed of each prompt's first image; it increases by 1 for each further image.
        guidance: Guidance scale; defaults to the run's.
        overwrite: Replace existing images in the folder.
    """

    minimums: ClassVar = {**GenerationOptions.minimums, "seed": 0}
    nonnegative: ClassVar = ("guidance",)

    out: str
    prompt: str | None = None
    seed: int = 0
    guidance: float | None = None

    def errors(self) -> list[str]:
        """Check the fields, and that exactly one of `prompt` and `prompts` is set."""
        errors = super().errors()
        if bool(self.prompt) == bool(self.prompts):
            errors.append(
                f"exactly one of prompt and prompts must be set, got {'both' if self.prompt else 'neither'}; "
                "pass e.g. --prompt 'a photo of sks dog on the beach'"
            )
        return errors


@dataclass(frozen=True, kw_only=True)
class EvaluateGenerationOptions(GenerationOptions):
    """Options of `snella evaluate-generation`.

    Args:
        run: Run folder, or a folder of runs.
        clip: CLIP model: a local folder in transformers format or a hub name.
        dino: DINOv2 model: a local folder in transformers format or a hub name.
        prompts: Prompt file; defaults to prompts_and_classes.txt in the run's dreambooth: folder.
        overwrite: Replace images generated with different settings.
        out: JSON file for the results.
    """

    clip: str = "openai/clip-vit-base-patch32"
    dino: str = "facebook/dinov2-base"
    out: str | None = None
