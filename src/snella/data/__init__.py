"""Data: folders of images and the real data sets that ship inside packages, split and ready for training."""

from snella.data.dataset import ImageDataset
from snella.data.images import read_image
from snella.data.registry import DataSplits, data_names, load_data
from snella.data.transforms import build_transform

__all__ = ["DataSplits", "ImageDataset", "build_transform", "data_names", "load_data", "read_image"]
