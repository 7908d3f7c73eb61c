"""What `snella evaluate-language` is told."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class EvaluateLanguageOptions:
    """Settings of `snella evaluate-language`.

    Args:
        run: Folder of the run.
        data: Folder with TASK/test.json for some or all of the eight tasks.
        beams: Beams of the search; 1 takes the likeliest token each time. The benchmark's own script uses 4.
        max_new_tokens: Tokens of an answer.
        batch_size: Questions at a time.
        limit: Only so many questions of each task.
        model: Where the model lies now, if not where training found it.
        overwrite: Answer anew where answers of other settings are.
        device: auto, cpu or cuda.
    """

    run: str
    data: str
    beams: int = 1
    max_new_tokens: int = 32
    batch_size: int = 8
    limit: int | None = None
    model: str | None = None
    overwrite: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
