"""What timm keeps beside a model: its data configuration, which transforms are resolved from."""

from typing import Any

from torch import nn

__all__ = ["update_config"]


def update_config(model: nn.Module, **entries: Any) -> None:
    """Change entries of a timm model's `pretrained_cfg`, which its data config is resolved from."""
    cfg: dict[str, Any] = dict(model.pretrained_cfg)  # type: ignore[arg-type]
    cfg.update(entries)
    for alias in ("pretrained_cfg", "default_cfg"):
        setattr(model, alias, cfg)
