"""Data sets, transforms and loaders of labelled images."""

from v2m.data.catalog import SPLITS, DatasetInfo, describe, load_dataset
from v2m.data.config import SMALL_IMAGES, DataConfig
from v2m.data.datasets import ArrayDataset, FileDataset, ImageDataset
from v2m.data.downloads import download
from v2m.data.images import IMAGE_SUFFIXES, BadImageError, load_image, to_channels
from v2m.data.loaders import Loader, create_loader
from v2m.data.patches import shuffle_patches
from v2m.data.transforms import evaluation_transform, training_transform

__all__ = [
    "IMAGE_SUFFIXES",
    "SMALL_IMAGES",
    "SPLITS",
    "ArrayDataset",
    "BadImageError",
    "DataConfig",
    "DatasetInfo",
    "FileDataset",
    "ImageDataset",
    "Loader",
    "create_loader",
    "describe",
    "download",
    "evaluation_transform",
    "load_dataset",
    "load_image",
    "shuffle_patches",
    "to_channels",
    "training_transform",
]
