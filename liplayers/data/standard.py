"""The standard image benchmarks, read by torchvision into uint8 tensors: MNIST, CIFAR-10, CIFAR-100."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
import torchvision
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.datasets.utils import check_integrity

from liplayers.data.source import ImageSource, Loaded
from liplayers.data.split import Split
from liplayers.errors import DataError, DataNotFoundError

__all__ = ["CIFAR10", "CIFAR100", "MNIST"]

# What torchvision's readers raise on files that are not what they should be.
_UNREADABLE = (AssertionError, EOFError, KeyError, OSError, RuntimeError, TypeError, ValueError)


class _TorchvisionSource(ImageSource):
    """A benchmark under `root`, downloaded there only on request."""

    def __init__(self, root: str | Path = "data", download: bool = False) -> None:
        self.root = Path(root)
        self.download = download

    @property
    @abstractmethod
    def folder(self) -> Path:
        """Where the files lie."""

    @abstractmethod
    def _files(self) -> tuple[str, ...]:
        """The files that must lie there."""

    @abstractmethod
    def _read(self, train: bool) -> Split: ...

    @abstractmethod
    def _fetch(self) -> None:
        """Downloads what is absent."""

    def _check_files(self) -> None:
        missing = [file for file in self._files() if not (self.folder / file).is_file()]
        if missing:
            raise DataNotFoundError(
                f"{self.name}: no {', '.join(missing)} in {self.folder}; put the files there, set data.root, or pass "
                "data.download=true"
            )

    def prepare(self) -> None:
        if not self.download:
            return
        try:
            self._fetch()
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{self.name}: download into {self.root} failed: {reason}") from None

    def load(self) -> Loaded:
        self.prepare()
        self._check_files()
        try:
            return Loaded(train=self._read(train=True), test=self._read(train=False), class_names=self._class_names())
        except _UNREADABLE as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"{self.name}: the files in {self.folder} are truncated or corrupt ({reason}); replace them"
            ) from None

    @abstractmethod
    def _class_names(self) -> tuple[str, ...]: ...


class MNIST(_TorchvisionSource):
    """MNIST: 60,000 + 10,000 grey images 1 × 28 × 28 of handwritten digits, ten classes.

    Args:
        root: the folder that holds `MNIST/raw/train-images-idx3-ubyte` and the other three files.
        download: fetch the files when they are absent.

    Raises:
        DataNotFoundError: from `load`, when files are absent.
        DataError: from `load`, when files are truncated or corrupt.

    Source: LeCun et al., Gradient-based learning applied to document recognition, 1998.
    """

    name = "mnist"

    @property
    def folder(self) -> Path:
        return self.root / "MNIST" / "raw"

    def _files(self) -> tuple[str, ...]:
        return tuple(file.removesuffix(".gz") for file, _ in torchvision.datasets.MNIST.resources)

    def _fetch(self) -> None:
        torchvision.datasets.MNIST(self.root, download=True)

    def _read(self, train: bool) -> Split:
        # Not through the MNIST class, which would prefer a stale processed/*.pt beside the raw files.
        prefix = "train" if train else "t10k"
        images = read_image_file(str(self.folder / f"{prefix}-images-idx3-ubyte"))
        labels = read_label_file(str(self.folder / f"{prefix}-labels-idx1-ubyte"))
        return Split(images.unsqueeze(1), labels)

    def _class_names(self) -> tuple[str, ...]:
        return tuple("0123456789")


class _CIFAR(_TorchvisionSource):
    _source: type[torchvision.datasets.CIFAR10]

    @property
    def folder(self) -> Path:
        return self.root / self._source.base_folder

    def _checksums(self) -> dict[str, str]:
        source: Any = self._source
        return dict([*source.train_list, *source.test_list, (source.meta["filename"], source.meta["md5"])])

    def _files(self) -> tuple[str, ...]:
        return tuple(self._checksums())

    def _check_files(self) -> None:
        super()._check_files()
        # Before torchvision opens any: its files are pickles, and un-pickling a forged one runs its code.
        for file, md5 in self._checksums().items():
            if not check_integrity(str(self.folder / file), md5):
                raise DataError(
                    f"{self.name}: {file} in {self.folder} is truncated or altered (md5 is not {md5}); replace it"
                )

    def _fetch(self) -> None:
        self._source(str(self.root), download=True)

    def _read(self, train: bool) -> Split:
        data = self._source(str(self.root), train=train)
        return Split(torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets))

    def _class_names(self) -> tuple[str, ...]:
        return tuple(self._source(str(self.root), train=False).classes)


class CIFAR10(_CIFAR):
    """CIFAR-10: 50,000 + 10,000 colour images 3 × 32 × 32, ten classes.

    The files are Python pickles, which can run code when opened. None is opened before the md5 of every one has been
    found right, here and once more by torchvision.

    Args:
        root: the folder that holds `cifar-10-batches-py/data_batch_1` and the other six files.
        download: fetch the files when they are absent or damaged.

    Raises:
        DataNotFoundError: from `load`, when files are absent.
        DataError: from `load`, when the md5 of a file is wrong.

    Source: Krizhevsky, Learning multiple layers of features from tiny images, 2009.
    """

    name = "cifar10"
    _source = torchvision.datasets.CIFAR10


class CIFAR100(_CIFAR):
    """CIFAR-100: 50,000 + 10,000 colour images 3 × 32 × 32, a hundred classes (the fine labels).

    The files are Python pickles, which can run code when opened. None is opened before the md5 of every one has been
    found right, here and once more by torchvision.

    Args:
        root: the folder that holds `cifar-100-python/train`, `test` and `meta`.
        download: fetch the files when they are absent or damaged.

    Raises:
        DataNotFoundError: from `load`, when files are absent.
        DataError: from `load`, when the md5 of a file is wrong.

    Source: Krizhevsky, Learning multiple layers of features from tiny images, 2009.
    """

    name = "cifar100"
    _source = torchvision.datasets.CIFAR100
