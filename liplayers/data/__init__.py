"""Lightning data modules: images in [0, 1], never normalised (that is a layer, and counts in the bound), and tables of
standardised features, all in memory.
"""

from liplayers.extras import extra

with extra("train"):
    from liplayers.data.augment import ColorJitter, RandAugment, RandomHorizontalFlip, RandomShift
    from liplayers.data.base import BatchSampler, DataModule, Loaded, Scaling, Split, stratified_rows, validate_inputs
    from liplayers.data.digits import Digits
    from liplayers.data.folder import ImageFolderData
    from liplayers.data.images import ImageDataModule, validate_images
    from liplayers.data.npz import NpzData
    from liplayers.data.standard import CIFAR10, CIFAR100, MNIST
    from liplayers.data.tabular import TableData, UCIData, UCISet, read_uci, uci_names

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "BatchSampler",
    "ColorJitter",
    "DataModule",
    "Digits",
    "ImageDataModule",
    "ImageFolderData",
    "Loaded",
    "NpzData",
    "RandAugment",
    "RandomHorizontalFlip",
    "RandomShift",
    "Scaling",
    "Split",
    "TableData",
    "UCIData",
    "UCISet",
    "read_uci",
    "stratified_rows",
    "uci_names",
    "validate_images",
    "validate_inputs",
]
