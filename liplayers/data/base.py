"""What all data sets share: splits held in memory, batches that a resumed run sees again, checks on loading.

Models get float32 images (C, H, W) with pixels in [0, 1]. Normalisation is a layer of the model, since it counts in
the Lipschitz bound.
"""

from __future__ import annotations

import hashlib
import inspect
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from liplayers.errors import ArgumentError, DataError, UnknownNameError

Batch = tuple[Tensor, Tensor]

# What a seed is used for; keeps the streams of one seed apart.
_SHUFFLE, _AUGMENT = 1, 2

# Images looked at together while checking or hashing, so that no second copy of a data set is ever made.
_CHUNK = 4096


@dataclass(frozen=True, eq=False)
class Split(Dataset[Batch]):
    """One split of a data set: images held once in memory, handed out as float32 in [0, 1].

    Indexing takes one index, a slice, or a whole list or tensor of indices, and gives (images, labels).

    Args:
        store: all images kept, (N, C, H, W), uint8 in 0 … 255 or float32 in [0, 1]; shared between splits.
        labels: int64 class indices, one for each sample of this split.
        sources: the file name of each sample of this split, or None where there are no files.
        rows: which rows of `store` belong to this split, in order; None for all.

    >>> split = Split(torch.tensor([[[[0, 255]]]], dtype=torch.uint8), torch.tensor([3]))
    >>> split[[0]]
    (tensor([[[[0., 1.]]]]), tensor([3]))
    """

    store: Tensor
    labels: Tensor
    sources: tuple[str, ...] | None = None
    rows: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Batch:
        rows = index if self.rows is None else self.rows[index]
        images = self.store[rows]
        images = images.float().div_(255) if images.dtype == torch.uint8 else images.float()
        return images, self.labels[index]

    @cached_property
    def images(self) -> Tensor:
        """The images of this split as stored (uint8 or float32); copied on first use when it shares its store."""
        return self.store if self.rows is None else self.store[self.rows]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.store.shape[1:]
        return channels, height, width

    def subset(self, rows: Tensor) -> Split:
        """The samples at `rows` of this split, sharing its images."""
        return Split(
            store=self.store,
            labels=self.labels[rows],
            sources=None if self.sources is None else tuple(self.sources[row] for row in rows.tolist()),
            rows=rows if self.rows is None else self.rows[rows],
        )

    def fingerprint(self) -> str:
        """The sha256 over shape, dtype, image bytes and labels, in order."""
        digest = hashlib.sha256(f"{(len(self), *self.image_shape)} {self.store.dtype}".encode())
        for start in range(0, len(self), _CHUNK):
            part = slice(start, start + _CHUNK)
            images = self.store[part] if self.rows is None else self.store[self.rows[part]]
            digest.update(np.ascontiguousarray(images.numpy()).data)
        digest.update(np.ascontiguousarray(self.labels.numpy()).data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Loaded:
    """What a data set gives its data module: both splits and the names of the classes, in label order."""

    train: Split
    test: Split
    class_names: tuple[str, ...]


def validate_images(
    images: Tensor, labels: Tensor, num_classes: int, where: str, sources: Sequence[str] | None = None
) -> None:
    """Raises unless images and labels can be used as they are.

    Args:
        images: (N, C, H, W), uint8, or floating point with every pixel within [0, 1].
        labels: (N,), integers in 0 … num_classes − 1.
        num_classes: the number of classes.
        where: what the images are, to begin the message with.
        sources: the file of each sample, to name the offending one.

    Raises:
        DataError: no samples, wrong number of dimensions, dtype, lengths, a label out of range, or a pixel that is not
            finite or lies outside [0, 1]; the message names the first one.

    >>> validate_images(torch.tensor([[[[0.5, 1.5]]]]), torch.tensor([0]), 1, "my images")
    Traceback (most recent call last):
    liplayers.errors.DataError: my images: sample 0 has pixel 1.5 at channel 0, row 0, column 1, outside [0, 1]; scale \
the pixels to [0, 1], e.g. divide by 255
    """

    def sample(index: int) -> str:
        return f"sample {index}" if sources is None else f"sample {index} ({sources[index]})"

    if images.ndim != 4:
        raise DataError(f"{where}: images must have 4 dimensions (N, C, H, W), got shape {tuple(images.shape)}")
    if len(images) == 0:
        raise DataError(f"{where}: the data set is empty; at least one sample is needed")
    if images.numel() == 0:
        raise DataError(f"{where}: images without pixels, shape {tuple(images.shape)}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise DataError(f"{where}: images must be uint8 (0 … 255) or floating point in [0, 1], got {images.dtype}")
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DataError(f"{where}: labels must be integers (N,), got {labels.dtype} of shape {tuple(labels.shape)}")
    if len(labels) != len(images):
        raise DataError(f"{where}: {len(images)} images but {len(labels)} labels; give one label for each image")
    if sources is not None and len(sources) != len(images):
        raise DataError(f"{where}: {len(images)} images but {len(sources)} sources; give one source for each image")
    wrong = ((labels < 0) | (labels >= num_classes)).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise DataError(
            f"{where}: {sample(first)} has label {int(labels[first])}; labels must be within 0 … {num_classes - 1} "
            f"({num_classes} classes)"
        )
    if images.dtype == torch.uint8:
        return
    for start in range(0, len(images), _CHUNK):
        part = images[start : start + _CHUNK]
        # Written so that NaN counts as bad.
        bad = ~((part >= 0) & (part <= 1))
        if bad.any():
            index, channel, row, column = bad.nonzero()[0].tolist()
            value = float(part[index, channel, row, column])
            mend = (
                "outside [0, 1]; scale the pixels to [0, 1], e.g. divide by 255"
                if np.isfinite(value)
                else "which is not finite; repair or remove the sample"
            )
            raise DataError(
                f"{where}: {sample(start + index)} has pixel {value:g} at channel {channel}, row {row}, "
                f"column {column}, {mend}"
            )


def stratified_rows(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Splits the rows in two, the second with round(fraction · N) of them, each class in proportion to within one.

    Rows are put in order of class, at random within one, and taken at equal steps. Both results are sorted. The same
    arguments give the same rows on every machine and with every version of NumPy (its legacy stream is frozen).

    >>> rest, taken = stratified_rows(torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), 0.5, seed=0)
    >>> len(rest), taken.bitwise_right_shift(2).tolist()
    (4, [0, 0, 1, 1])
    """
    n = len(labels)
    count = round(n * fraction)
    shuffled = np.random.RandomState(seed).permutation(n)
    by_class = shuffled[np.argsort(labels.numpy()[shuffled], kind="stable")]
    chosen = np.zeros(n, dtype=bool)
    # Steps of n / count ≥ 1, so no row is met twice.
    chosen[by_class[((np.arange(count) + 0.5) * n / max(count, 1)).astype(np.int64)]] = True
    return torch.from_numpy(np.flatnonzero(~chosen)), torch.from_numpy(np.flatnonzero(chosen))


def _mixed_seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


class BatchSampler(DistributedSampler[Tensor]):
    """Yields whole batches of row indices; the shuffle depends on (seed, epoch) alone.

    So a run resumed at the beginning of an epoch sees the batches that the uninterrupted run would have seen: Lightning
    calls `set_epoch`. A `DistributedSampler` so that Lightning leaves it alone under several processes, where each rank
    gets every `num_replicas`-th batch.

    Args:
        size: the number of samples.
        batch_size: samples in a batch, on each rank.
        shuffle: a new order each epoch; otherwise in order.
        drop_last: leave out an incomplete last batch, unless it is the only one.
        seed: of the shuffle.
        num_replicas, rank: how many processes share the batches, and which one this is.

    Raises:
        ArgumentError: fewer batches than processes.

    >>> [batch.tolist() for batch in BatchSampler(5, 2, shuffle=False, drop_last=False)]
    [[0, 1], [2, 3], [4]]
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        shuffle: bool,
        drop_last: bool,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__(range(size), num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.size = size
        self.batch_size = batch_size
        whole, rest = divmod(size, batch_size)
        self.batches = whole + (rest > 0 and (not drop_last or whole == 0))
        if self.batches < num_replicas:
            raise ArgumentError(
                f"batch_size={batch_size} cuts {size} samples into {self.batches} batches, fewer than the "
                f"{num_replicas} processes; take a smaller batch_size"
            )

    def __len__(self) -> int:
        return self.batches // self.num_replicas

    def __iter__(self) -> Iterator[Tensor]:
        # A generator, so the epoch is read at the first batch: Lightning may call set_epoch after iter().
        if self.shuffle:
            generator = torch.Generator().manual_seed(_mixed_seed(self.seed, _SHUFFLE, self.epoch))
            order = torch.randperm(self.size, generator=generator)
        else:
            order = torch.arange(self.size)
        for turn in range(len(self)):
            start = (turn * self.num_replicas + self.rank) * self.batch_size
            yield order[start : start + self.batch_size]


def _as_is(batch: Any) -> Any:
    return batch


def _takes_generator(module: nn.Module) -> bool:
    return "generator" in inspect.signature(module.forward).parameters


def _check_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentError(f"{name} must be an integer of at least 1, got {value!r}")


class ImageDataModule(lightning.LightningDataModule):
    """Base of the data sets: images in memory, float32 in [0, 1] by the batch, labels int64.

    A subclass sets `name` and implements `load`. Validation samples are taken from the training samples, in proportion
    to the classes, by `seed`; the test samples stay untouched. After `setup()`, which loads once, there are `name`,
    `input_shape` (C, H, W), `num_classes` and `class_names`.

    Args:
        batch_size: samples in a training batch.
        eval_batch_size: samples in a validation or test batch.
        val_fraction: the share of the training samples kept for validation, in [0, 1); 0 for none.
        augment: modules applied in order to each training batch as a whole. One whose `forward` has an argument
            `generator` gets a generator; any other runs with torch's global random state seeded for the batch. Either
            way the draws depend on `seed` and the number of batches trained on so far, so a resumed run repeats them.
        seed: of the validation split, the shuffle and the augmentation.

    Raises:
        ArgumentError: an argument out of range.
        DataError: from `setup`, when the data cannot be used.
    """

    name: str
    input_shape: tuple[int, int, int]
    num_classes: int
    class_names: tuple[str, ...]

    def __init__(
        self,
        *,
        batch_size: int = 256,
        eval_batch_size: int = 1000,
        val_fraction: float = 0.1,
        augment: Sequence[nn.Module] = (),
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_positive("batch_size", batch_size)
        _check_positive("eval_batch_size", eval_batch_size)
        if isinstance(val_fraction, bool) or not isinstance(val_fraction, int | float) or not 0 <= val_fraction < 1:
            raise ArgumentError(f"val_fraction must be a number within [0, 1), got {val_fraction!r}")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise ArgumentError(f"seed must be an integer within 0 … 2**32 - 1, got {seed!r}")
        if isinstance(augment, nn.Module) or not all(isinstance(module, nn.Module) for module in augment):
            raise ArgumentError(f"augment must be a list of nn.Module, got {augment!r}")
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.val_fraction = val_fraction
        self.augment = tuple(augment)
        self.seed = seed
        self._splits: dict[str, Split] | None = None

    @abstractmethod
    def load(self) -> Loaded:
        """Reads the train and the test split; called once, by `setup`, which checks them."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Loads and checks the data and sets the validation samples apart; does nothing when called again."""
        if self._splits is not None:
            return
        loaded = self.load()
        for which, split in (("train", loaded.train), ("test", loaded.test)):
            validate_images(
                split.store, split.labels, len(loaded.class_names), f"{self.name} {which} images", split.sources
            )
        if loaded.train.image_shape != loaded.test.image_shape:
            raise DataError(
                f"{self.name}: train images are {loaded.train.image_shape} but test images {loaded.test.image_shape} "
                "(C, H, W); both must have one shape"
            )
        self._splits = {**self._without_validation(loaded.train), "test": loaded.test}
        self.input_shape = loaded.train.image_shape
        self.class_names = loaded.class_names
        self.num_classes = len(loaded.class_names)

    def _without_validation(self, train: Split) -> dict[str, Split]:
        if self.val_fraction == 0:
            return {"train": train}
        rest, taken = stratified_rows(train.labels, self.val_fraction, self.seed)
        if len(rest) == 0 or len(taken) == 0:
            raise ArgumentError(
                f"val_fraction={self.val_fraction} of {len(train)} {self.name} training samples leaves {len(rest)} to "
                f"train on and {len(taken)} to validate on; change data.val_fraction (0: no validation)"
            )
        return {"train": train.subset(rest), "val": train.subset(taken)}

    def split(self, which: str) -> Split:
        """The split "train", "val" or "test".

        Raises:
            UnknownNameError: any other name.
            ArgumentError: "val" with `val_fraction=0`.
        """
        if which not in ("train", "val", "test"):
            raise UnknownNameError.of("split", which, ("train", "val", "test"))
        self.setup()
        assert self._splits is not None
        if which not in self._splits:
            raise ArgumentError(f"{self.name} has no split 'val' since val_fraction=0; set data.val_fraction above 0")
        return self._splits[which]

    def fingerprint(self, which: str) -> str:
        """The sha256 of a split over shape, dtype, image bytes and labels: what a report names its data by."""
        return self.split(which).fingerprint()

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled anew each epoch; drops an incomplete last batch unless it is the only one."""
        trainer = self.trainer
        split = self.split("train")
        sampler = BatchSampler(
            len(split),
            self.batch_size,
            shuffle=True,
            drop_last=True,
            seed=self.seed,
            num_replicas=1 if trainer is None else trainer.world_size,
            rank=0 if trainer is None else trainer.global_rank,
        )
        return DataLoader(split, sampler=sampler, batch_size=None, collate_fn=_as_is)

    def eval_loader(self, which: str) -> DataLoader[Batch]:
        """All samples of a split, in order and without augmentation, in batches of `eval_batch_size`."""
        split = self.split(which)
        sampler = BatchSampler(len(split), self.eval_batch_size, shuffle=False, drop_last=False)
        return DataLoader(split, sampler=sampler, batch_size=None, collate_fn=_as_is)

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        """The validation samples; no loader at all with `val_fraction=0`, which Lightning takes as no validation."""
        return self.eval_loader("val") if self.val_fraction > 0 else []

    def test_dataloader(self) -> DataLoader[Batch]:
        return self.eval_loader("test")

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        trainer = self.trainer
        if trainer is None or not trainer.training or not self.augment:
            return batch
        images, labels = batch
        # Batches rather than optimiser steps: under gradient accumulation several batches share a step.
        seen = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        return self.augmented(images, seen, trainer.global_rank), labels

    def augmented(self, images: Tensor, batch: int, rank: int = 0) -> Tensor:
        """The images as the training batch of that number would see them, on the process of that rank."""
        seed = _mixed_seed(self.seed, _AUGMENT, rank, batch)
        generator = torch.Generator().manual_seed(seed)
        for position, module in enumerate(self.augment):
            if _takes_generator(module):
                images = module(images, generator=generator)
                continue
            devices = [images.device] if images.device.type == "cuda" else []
            with torch.random.fork_rng(devices):
                torch.manual_seed(_mixed_seed(seed, position))
                images = module(images)
        return images
