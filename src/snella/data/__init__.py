"""Data: folders of images and the real data sets that ship inside packages, split and ready for training."""

from snella.data.dataset import ImageDataset
from snella.data.images import read_image
from snella.data.mask_dataset import MaskDataset
from snella.data.registry import DataSplits, data_folder, data_names, load_data, split_spec
from snella.data.transforms import build_transform

__all__ = [
    "DataSplits",
    "ImageDataset",
    "MaskDataset",
    "build_transform",
    "data_folder",
    "data_names",
    "load_data",
    "read_image",
    "split_spec",
]
