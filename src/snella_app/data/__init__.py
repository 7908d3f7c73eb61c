"""Data: image folders, tables and bundled datasets, split for training."""

from snella_app.data.datasets import Annotations, ImageDataset, MaskDataset
from snella_app.data.images import read_image
from snella_app.data.load import (
    DataSplits,
    data_folder,
    data_names,
    full_spec,
    has_columns,
    load_data,
    split_spec,
    with_class_order,
)
from snella_app.data.options import LoadOptions
from snella_app.data.transforms import build_transform, has_flips

__all__ = [
    "Annotations",
    "DataSplits",
    "ImageDataset",
    "LoadOptions",
    "MaskDataset",
    "build_transform",
    "data_folder",
    "data_names",
    "full_spec",
    "has_columns",
    "has_flips",
    "load_data",
    "read_image",
    "split_spec",
    "with_class_order",
]
