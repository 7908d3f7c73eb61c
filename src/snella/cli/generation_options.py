"""What the commands about personalized generators are told, besides `snella dreambooth` itself."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class GenerateOptions:
    """Settings of `snella generate`.

    Args:
        run: Folder of the run.
        out: Folder for the pictures.
        prompt: What to draw; the word that the run gave its subject stands for it.
        prompts: File of prompts, one a line, with {0} for the subject's word and {1} for its class; or DreamBooth's
            prompts_and_classes.txt.
        live: Use that file's prompts for animals; cats and dogs get them anyhow.
        pictures: Pictures of each prompt.
        seed: Of the first picture of a prompt; the next ones count up.
        steps: Steps of the sampler; the run's own if not given.
        guidance: How strongly the sampler follows the prompt; the run's own if not given.
        batch_size: Pictures at a time.
        pipeline: Where the pipeline lies now, if not where training found it.
        overwrite: Replace other pictures in the folder.
        device: auto, cpu or cuda.
    """

    run: str
    out: str
    prompt: str | None = None
    prompts: str | None = None
    live: bool | None = None
    pictures: int = 4
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    batch_size: int = 1
    pipeline: str | None = None
    overwrite: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass
class EvaluateGenerationOptions:
    """Settings of `snella evaluate-generation`.

    Args:
        run: Folder of the run, or a folder of several.
        clip: CLIP model, a local folder in transformers' format or a name on the hub.
        dino: DINOv2 model, likewise.
        prompts: File of prompts; prompts_and_classes.txt in the run's dreambooth: folder if not given.
        live: Use that file's prompts for animals; cats and dogs get them anyhow.
        pictures: Pictures of each prompt.
        steps: Steps of the sampler; the run's own if not given.
        batch_size: Pictures at a time.
        pipeline: Where the pipeline lies now, if not where training found it.
        overwrite: Draw anew where pictures of other settings are.
        out: Also write the results to this JSON file.
        device: auto, cpu or cuda.
    """

    run: str
    clip: str = "openai/clip-vit-base-patch32"
    dino: str = "facebook/dinov2-base"
    prompts: str | None = None
    live: bool | None = None
    pictures: int = 4
    steps: int | None = None
    batch_size: int = 1
    pipeline: str | None = None
    overwrite: bool = False
    out: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
