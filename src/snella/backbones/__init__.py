"""Backbones: timm names, local weight files and folders, and the weights that ship inside packages."""

from snella.backbones.packaged import packaged_names
from snella.backbones.registry import create_backbone

__all__ = ["create_backbone", "packaged_names"]
