"""Backbones: timm models, local weight files and folders, and backbones registered by packages."""
