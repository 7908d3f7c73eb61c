"""Backbones: timm names, local weight files and folders, and bundled backbones."""

from snella.backbones.bundled import packaged_names
from snella.backbones.create import create_backbone
from snella.backbones.segmenter import DECODER, create_segmenter

__all__ = ["DECODER", "create_backbone", "create_segmenter", "packaged_names"]
