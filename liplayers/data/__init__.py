"""Data in memory: sources say what the samples are, and `DataModule` splits, shuffles, augments and batches them.

Images are in [0, 1] and never normalised (that is a layer, and counts in the bound); tables have standardised features.
A source needs no Lightning, only `DataModule` does.
"""

from typing import TYPE_CHECKING

from liplayers.extras import extra

with extra("train"):
    from liplayers.data.augment import ColorJitter, RandAugment, RandomHorizontalFlip, RandomShift
    from liplayers.data.checks import validate_images, validate_inputs
    from liplayers.data.digits import Digits
    from liplayers.data.folder import ImageFolder
    from liplayers.data.npz import Npz
    from liplayers.data.sampling import BatchSampler, stratified_rows
    from liplayers.data.scaling import Scaling
    from liplayers.data.source import ImageSource, Loaded, Source
    from liplayers.data.split import Split
    from liplayers.data.standard import CIFAR10, CIFAR100, MNIST
    from liplayers.data.tabular import Table

if TYPE_CHECKING:
    from liplayers.data.module import DataModule
else:

    def __getattr__(name):
        """`DataModule`, with Lightning, when it is first asked for."""
        if name != "DataModule":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        with extra("train"):
            from liplayers.data.module import DataModule
        globals()[name] = DataModule
        return DataModule


# Under these names they stand in the configs of older checkpoints.
ImageFolderData, NpzData, TableData = ImageFolder, Npz, Table

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "BatchSampler",
    "ColorJitter",
    "DataModule",
    "Digits",
    "ImageFolder",
    "ImageSource",
    "Loaded",
    "Npz",
    "RandAugment",
    "RandomHorizontalFlip",
    "RandomShift",
    "Scaling",
    "Source",
    "Split",
    "Table",
    "stratified_rows",
    "validate_images",
    "validate_inputs",
]
