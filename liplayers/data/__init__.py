"""Lightning data modules: in-memory images in [0, 1], never normalised (that is a layer, and counts in the bound)."""

from liplayers.data.augment import RandomHorizontalFlip, RandomShift
from liplayers.data.base import BatchSampler, ImageDataModule, Loaded, Split, stratified_rows, validate_images
from liplayers.data.digits import Digits
from liplayers.data.folder import ImageFolderData
from liplayers.data.npz import NpzData
from liplayers.data.standard import CIFAR10, CIFAR100, MNIST

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "BatchSampler",
    "Digits",
    "ImageDataModule",
    "ImageFolderData",
    "Loaded",
    "NpzData",
    "RandomHorizontalFlip",
    "RandomShift",
    "Split",
    "stratified_rows",
    "validate_images",
]
