"""The data module: it holds a source's samples in memory and gives out batches that a resumed run sees again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from liplayers.core.checks import check_positive
from liplayers.data.sampling import AUGMENT, BatchSampler, MixedBatchSampler, mixed_seed, stratified_rows
from liplayers.data.scaling import Scaling
from liplayers.data.source import Loaded, Source
from liplayers.data.split import Batch, Mixture, Split
from liplayers.errors import ArgumentError, DataError, UnknownNameError

__all__ = ["DataModule"]


def _as_is(batch: Any) -> Batch:
    return batch


def _in_float32(batch: Any) -> Batch:
    return batch[0].float(), batch[1]


def _check_source(source: Source) -> None:
    kind = type(source).__name__
    if not isinstance(source, Source):
        given = source.__name__ if inspect.isclass(source) else kind
        raise ArgumentError(f"source must be a Source, such as Digits() or MNIST(root), got {given}")
    for attribute in ("name", "unit"):
        if not isinstance(getattr(source, attribute, None), str):
            raise ArgumentError(f"{kind}: has no {attribute}; a source needs one, as text")


def _takes_generator(module: nn.Module) -> bool:
    return "generator" in inspect.signature(module.forward).parameters


class DataModule(lightning.LightningDataModule):
    """The samples of a source: held in memory, split, shuffled, augmented and given out in batches.

    Validation samples are taken from the training samples, in proportion to the classes, by `seed`, unless the source
    says which they are; the test samples stay untouched. The dataloaders that Lightning trains, validates and tests
    with round inputs to float32; those of `eval_loader`, and with them what is certified, are as they were loaded.

    Data are loaded once, by `setup` or where they are first asked for.

    Attributes:
        source: what the samples are; `name`, `unit` and `input_range` are its own.
        input_shape: of one input.
        class_names: in the order of the labels.
        num_classes: how many they are.
        scaling: how the features of a table were standardised; None for other data.
        on_device: whether to hold a split in the memory of the GPU that trains, where it takes at most half of what is
            free there; False by default.

    Args:
        source: what the samples are, such as `MNIST("data")`.
        batch_size: samples in a training batch, over all processes: each of two takes half of them.
        eval_batch_size: samples in a validation or test batch; every process evaluates all of them.
        val_fraction: the share of the training samples kept for validation, in [0, 1); 0 for none. Not used where the
            source says which samples are for validation.
        augment: modules applied in order to each training batch as a whole. One whose `forward` has an argument
            `generator` gets a generator; any other runs with torch's global random state seeded for the batch. Either
            way the draws depend on `seed` and the number of batches trained on so far, so a resumed run repeats them.
        seed: of the validation split, the shuffle and the augmentation.

    Raises:
        ArgumentError: an argument out of range.
        DataError: from `setup`, when the data cannot be used.

    >>> from liplayers.data import Digits
    >>> data = DataModule(Digits(), batch_size=256, val_fraction=0.1)
    >>> data.input_shape, data.num_classes, [len(data.split(which)) for which in ("train", "val", "test")]
    ((1, 8, 8), 10, [1294, 144, 359])
    >>> images, labels = next(iter(data.train_dataloader()))
    >>> images.shape, images.dtype, labels.dtype
    (torch.Size([256, 1, 8, 8]), torch.float32, torch.int64)
    """

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int = 256,
        eval_batch_size: int = 1000,
        val_fraction: float = 0.1,
        augment: Sequence[nn.Module] = (),
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_source(source)
        check_positive(self, batch_size=batch_size, eval_batch_size=eval_batch_size)
        if isinstance(val_fraction, bool) or not isinstance(val_fraction, int | float) or not 0 <= val_fraction < 1:
            raise ArgumentError(f"val_fraction must be a number within [0, 1), got {val_fraction!r}")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise ArgumentError(f"seed must be an integer within 0 … 2**32 - 1, got {seed!r}")
        if isinstance(augment, nn.Module) or not all(isinstance(module, nn.Module) for module in augment):
            raise ArgumentError(f"augment must be a list of nn.Module, got {augment!r}")
        self.source = source
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.val_fraction = val_fraction
        self.augment = tuple(augment)
        self.seed = seed
        self.on_device = False
        self._loaded: Loaded | None = None
        self._extra: tuple[Split, int] | None = None

    @property
    def name(self) -> str:  # type: ignore[override]  # Lightning's is never set
        return self.source.name

    @property
    def unit(self) -> str:
        return self.source.unit

    @property
    def input_range(self) -> tuple[float, float] | None:
        return self.source.input_range

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self._data.train.input_shape

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._data.class_names

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def scaling(self) -> Scaling | None:
        return self._data.scaling

    @property
    def has_validation(self) -> bool:
        """Whether there is a split "val"."""
        return self._data.val is not None

    @property
    def _data(self) -> Loaded:
        self.setup()
        assert self._loaded is not None
        return self._loaded

    def prepare_data(self) -> None:
        """Lets the source fetch what is absent: Lightning calls this in one process before `setup` in all."""
        self.source.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Loads and checks the data and sets the validation samples apart; does nothing when called again."""
        if self._loaded is not None:
            return
        held_out = self.val_fraction > 0
        try:
            loaded = self.source.load_holding_out(self._hold_out) if held_out else self.source.load()
        except MemoryError as error:
            raise DataError(f"{self.name}: the data do not fit into memory ({error or 'no more is left'})") from None
        self._check(loaded)
        if held_out and loaded.val is None and loaded.no_val is None:
            rest, taken = self._hold_out(loaded.train.labels)
            loaded = replace(loaded, train=loaded.train.subset(rest), val=loaded.train.subset(taken))
        self._loaded = loaded

    def _check(self, loaded: Loaded) -> None:
        noun, train, test = self.source.noun, loaded.train, loaded.test
        for which, split in (("train", train), ("test", test), ("val", loaded.val)):
            if split is not None:
                self.source.validate(split, len(loaded.class_names), f"{self.name} {which} {noun}")
        if train.input_shape != test.input_shape:
            raise DataError(
                f"{self.name}: train {noun} are {train.input_shape} but test {noun} {test.input_shape}"
                f"{self.source.axes}; both must have one shape"
            )

    def _hold_out(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Which training samples stay, and which are for validation."""
        rest, taken = stratified_rows(labels, self.val_fraction, self.seed)
        if len(rest) == 0 or len(taken) == 0:
            raise ArgumentError(
                f"val_fraction={self.val_fraction} of {len(labels)} {self.name} training samples leaves {len(rest)} to "
                f"train on and {len(taken)} to validate on; change data.val_fraction (0: no validation)"
            )
        return rest, taken

    def split(self, which: str) -> Split:
        """The split "train", "val" or "test".

        Raises:
            UnknownNameError: any other name.
            ArgumentError: "val" where there is none.
        """
        if which not in ("train", "val", "test"):
            raise UnknownNameError.of("split", which, ("train", "val", "test"))
        split = getattr(self._data, which)
        if split is None:
            reason = self._data.no_val or "val_fraction=0; set data.val_fraction above 0"
            raise ArgumentError(f"{self.name} has no split 'val' since {reason}")
        return split

    def fingerprint(self, which: str) -> str:
        """The sha256 of a split over shape, dtype, input bytes and labels: what a report names its data by."""
        return self.split(which).fingerprint()

    def mix(self, extra: DataModule, share: float) -> None:
        """Put training samples of another data set, such as generated ones, into each training batch.

        Args:
            extra: inputs of the same shape, and classes of the same names or, numbered, no more of them.
            share: of each batch, rounded to whole samples. An epoch is still one over this data set, and its samples
                alone are validated and tested on.

        Raises:
            ArgumentError: a share that leaves no sample of one of the two in a batch.
            DataError: data that do not fit.
        """
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
            raise ArgumentError(f"extra.share must be a number between 0 and 1, got {share!r}")
        count = round(share * self.batch_size)
        if not 0 < count < self.batch_size:
            raise ArgumentError(
                f"extra.share={share} is {count} of data.batch_size={self.batch_size} samples; expected at least one "
                "extra sample and one other in a batch"
            )
        if extra.input_shape != self.input_shape:
            raise DataError(
                f"{extra.name}: extra {self.source.noun} are {extra.input_shape} but those of {self.name} "
                f"{self.input_shape}{self.source.axes}; both must have one shape"
            )
        numbers = tuple(str(label) for label in range(self.num_classes))
        if extra.class_names not in (self.class_names, numbers[: extra.num_classes]):
            raise DataError(
                f"{extra.name}: extra classes {extra.class_names}; expected those of {self.name}, {self.class_names}, "
                f"or numbers below {self.num_classes}"
            )
        self._extra = extra.split("train"), count

    def train_sampler(self, num_replicas: int = 1, rank: int = 0) -> BatchSampler:
        """The training batches, shuffled anew each epoch, or one process' share of them.

        Raises:
            ArgumentError: a batch that the processes cannot share evenly.
        """
        size, place = len(self.split("train")), {"num_replicas": num_replicas, "rank": rank}
        if self._extra is None:
            return BatchSampler(
                size, self.batch_size, shuffle=True, drop_last=True, seed=self.seed, done=self._batches_done, **place
            )
        extra, share = self._extra
        return MixedBatchSampler(
            size, self.batch_size, extra=len(extra), share=share, seed=self.seed, done=self._batches_done, **place
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled anew each epoch; drops an incomplete last batch unless it is the only one."""
        trainer = self.trainer
        sampler = (
            self.train_sampler() if trainer is None else self.train_sampler(trainer.world_size, trainer.global_rank)
        )
        own = self._placed(self.split("train"))
        samples = own if self._extra is None else Mixture(own, self._extra[0].to(own.labels.device))
        return DataLoader(samples, sampler=sampler, batch_size=None, collate_fn=_in_float32)

    def _placed(self, split: Split) -> Split:
        """The split on the GPU that trains, if that is asked for and it fits."""
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        if not self.on_device or device.type != "cuda":
            return split
        size = len(split) * split.store[0].nbytes
        return split.to(device) if size <= torch.cuda.mem_get_info(device)[0] / 2 else split

    def _batches_done(self) -> int:
        """The batches of the epoch that Lightning is about to finish after a resume; 0 in any other epoch."""
        if self.trainer is None or not self.trainer.fit_loop.epoch_loop.restarting:
            return 0
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def eval_loader(self, which: str) -> DataLoader[Batch]:
        """All samples of a split as they are, in order and without augmentation, in batches of `eval_batch_size`."""
        return self._in_order(which, _as_is)

    def _in_order(self, which: str, collate: Callable[[Any], Batch]) -> DataLoader[Batch]:
        split = self._placed(self.split(which))
        sampler = BatchSampler(len(split), self.eval_batch_size, shuffle=False, drop_last=False)
        return DataLoader(split, sampler=sampler, batch_size=None, collate_fn=collate)

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        """The validation samples; no loader at all without any, which Lightning takes as no validation."""
        return self._in_order("val", _in_float32) if self.has_validation else []

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._in_order("test", _in_float32)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        trainer = self.trainer
        if trainer is None or not trainer.training or not self.augment:
            return batch
        inputs, labels = batch
        # Batches rather than optimiser steps: under gradient accumulation several batches share a step. Not the total
        # that Lightning counts either: it has a batch that was interrupted twice.
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        number = trainer.current_epoch * int(trainer.num_training_batches) + done
        return self.augmented(inputs, number, trainer.global_rank), labels

    def augmented(self, inputs: Tensor, batch: int, rank: int = 0) -> Tensor:
        """The inputs as the training batch of that number would see them, on the process of that rank."""
        seed = mixed_seed(self.seed, AUGMENT, rank, batch)
        generator = torch.Generator().manual_seed(seed)
        for position, module in enumerate(self.augment):
            if _takes_generator(module):
                inputs = module(inputs, generator=generator)
                continue
            devices = [inputs.device] if inputs.device.type == "cuda" else []
            with torch.random.fork_rng(devices):
                torch.manual_seed(mixed_seed(seed, position))
                inputs = module(inputs)
        return inputs
