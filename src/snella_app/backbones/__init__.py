"""Backbones: timm models, local weight files and folders, and backbones registered by packages."""

from snella_app.backbones.create import NamedBackbone, create_backbone, packaged_names
from snella_app.backbones.segmenter import DECODER, create_segmenter

__all__ = ["DECODER", "NamedBackbone", "create_backbone", "create_segmenter", "packaged_names"]
