"""What the shapes of a weight file tell about the network it belongs to."""

from dataclasses import dataclass, field
from typing import Any

__all__ = ["InferredArchitecture"]


@dataclass(frozen=True)
class InferredArchitecture:
    """timm's name of an architecture, the input size of the weights and further arguments of `create_model`.

    `img_size` is None for networks that take any size.
    """

    name: str
    img_size: int | None
    options: dict[str, Any] = field(default_factory=dict)
