"""What all data sets share: splits held in memory, batches that a resumed run sees again, checks on loading."""

from __future__ import annotations

import hashlib
import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
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
_SHUFFLE, _AUGMENT, _EXTRA = 1, 2, 3

# Samples looked at together while checking or hashing, so that no second copy of a data set is ever made.
_CHUNK = 4096


@dataclass(frozen=True, eq=False)
class Split(Dataset[Batch]):
    """One split of a data set: inputs held once in memory, handed out as they are; uint8 as value / 255 in float32.

    Indexing takes one index, a slice, or a whole list or tensor of indices, and gives (inputs, labels).

    Args:
        store: all inputs kept, (N, *shape), uint8, float32 or float64; shared between splits.
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
        inputs = self.store[rows]
        return inputs.float().div_(255) if inputs.dtype == torch.uint8 else inputs, self.labels[index]

    @cached_property
    def inputs(self) -> Tensor:
        """The inputs of this split as stored; copied on first use when it shares its store."""
        return self.store if self.rows is None else self.store[self.rows]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input."""
        return tuple(self.store.shape[1:])

    def subset(self, rows: Tensor) -> Split:
        """The samples at `rows` of this split, sharing its inputs."""
        return Split(
            store=self.store,
            labels=self.labels[rows],
            sources=None if self.sources is None else tuple(self.sources[row] for row in rows.tolist()),
            rows=rows if self.rows is None else self.rows[rows],
        )

    def to(self, device: torch.device) -> Split:
        """The same samples in the memory of a device, without the others of a shared store."""
        store = self.store if self.rows is None else self.store[self.rows]
        return Split(store.to(device), self.labels.to(device), self.sources)

    def fingerprint(self) -> str:
        """The sha256 over shape, dtype, input bytes and labels, in order."""
        digest = hashlib.sha256(f"{(len(self), *self.input_shape)} {self.store.dtype}".encode())
        for start in range(0, len(self), _CHUNK):
            part = slice(start, start + _CHUNK)
            inputs = self.store[part] if self.rows is None else self.store[self.rows[part]]
            digest.update(np.ascontiguousarray(inputs.numpy()).data)
        digest.update(np.ascontiguousarray(self.labels.numpy()).data)
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Mixture(Dataset[Batch]):
    """Two splits behind one another; indexing takes a tensor that has all indices of the first one first.

    >>> def split(value):
    ...     return Split(torch.full((2, 1), value), torch.tensor([0, 1]))
    >>> Mixture(split(1.0), split(2.0))[torch.tensor([0, 3])]
    (tensor([[1.],
            [2.]]), tensor([0, 1]))
    """

    own: Split
    extra: Split

    def __len__(self) -> int:
        return len(self.own) + len(self.extra)

    def __getitem__(self, index: Tensor) -> Batch:
        count = int((index < len(self.own)).sum())
        inputs, labels = self.own[index[:count]]
        more, their_labels = self.extra[index[count:] - len(self.own)]
        return torch.cat([inputs, more]), torch.cat([labels, their_labels])


@dataclass(frozen=True)
class Scaling:
    """How the features of a table were standardised: (x − mean)/std in float64, or None where they came so.

    A certified ℓ2 radius R of the standardised features, less what `radius` takes off, lets feature j alone move by
    R·std_j of its own unit.
    """

    names: tuple[str, ...]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def radius(self, radius: Tensor, inputs: Tensor) -> Tensor:
        """What is left of certified radii where reading and standardising round: it holds for the file's own numbers.

        Args:
            radius: (N,) float64, certified for the inputs.
            inputs: (N, d), the standardised features as computed.

        Returns:
            (N,): r such that every table row x' with ‖(x' − x)/std‖₂ ≤ r, read and standardised, is within the given
            radius of x, read and standardised. The same where there is no mean and std.
        """
        if self.mean is None or self.std is None:
            return radius
        # Of z = (x − mean)/std three steps make ẑ: x is read within 8u (pandas before 3.1 does not round to nearest),
        # |x| ≤ std·|z| + |mean|; the difference and the quotient are rounded. So |ẑ − z| ≤ 11u|z| + (1 + 3u)c, with
        # c = (8u|mean| + 2⁻¹⁰⁷⁴)/std + 2⁻¹⁰⁷⁴. It counts at x and at x', ‖z'‖ ≤ ‖z‖ + r: R may be r(1 + 12u) + 23u‖ẑ‖ +
        # 3‖c‖. The rest pays for rounding here and in R·std.
        u = torch.finfo(torch.float64).eps / 2
        mean, std = (torch.tensor(column, dtype=torch.float64) for column in (self.mean, self.std))
        c = (8 * u * mean.abs() + 2.0**-1074) / std + 2.0**-1074
        error = 24 * u * inputs.double().abs().sum(1) + 4 * c.sum()
        return ((radius - error) * (1 - 32 * u)).clamp_min(0)


@dataclass(frozen=True)
class Loaded:
    """What a data set gives its data module: its splits and the names of the classes, in label order.

    Without `val` the module takes its validation samples from `train`.
    """

    train: Split
    test: Split
    class_names: tuple[str, ...]
    val: Split | None = None
    scaling: Scaling | None = None


def first_wrong(inputs: Tensor, wrong: Callable[[Tensor], Tensor]) -> tuple[int, ...] | None:
    """The index of the first element for which `wrong`, an elementwise condition, holds; None without one.

    >>> first_wrong(torch.tensor([[1.0, 2.0], [3.0, torch.nan]]), torch.isnan)
    (1, 1)
    """
    for start in range(0, len(inputs), _CHUNK):
        places = wrong(inputs[start : start + _CHUNK]).nonzero()
        if len(places):
            sample, *rest = places[0].tolist()
            return (start + sample, *rest)
    return None


def sample_name(index: int, sources: Sequence[str] | None) -> str:
    return f"sample {index}" if sources is None else f"sample {index} ({sources[index]})"


def validate_labels(
    labels: Tensor, samples: int, num_classes: int, where: str, noun: str, sources: Sequence[str] | None = None
) -> None:
    """Raises unless there is one label within 0 … num_classes − 1, and one source, for each of the samples.

    Args:
        labels: (N,), integers.
        samples: how many there must be.
        num_classes: the number of classes.
        where: what the data are, to begin the message with.
        noun: what the samples are called, such as "images".
        sources: the file of each sample, to name the offending one.

    Raises:
        DataError: wrong dtype or length, or a label out of range; the message names the first one.
    """
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DataError(f"{where}: labels must be integers (N,), got {labels.dtype} of shape {tuple(labels.shape)}")
    one = noun.removesuffix("s")
    if len(labels) != samples:
        raise DataError(f"{where}: {samples} {noun} but {len(labels)} labels; give one label for each {one}")
    if sources is not None and len(sources) != samples:
        raise DataError(f"{where}: {samples} {noun} but {len(sources)} sources; give one source for each {one}")
    place = first_wrong(labels, lambda part: (part < 0) | (part >= num_classes))
    if place is not None:
        raise DataError(
            f"{where}: {sample_name(place[0], sources)} has label {int(labels[place])}; labels must be within "
            f"0 … {num_classes - 1} ({num_classes} classes)"
        )


def validate_inputs(
    inputs: Tensor, labels: Tensor, num_classes: int, where: str, sources: Sequence[str] | None = None
) -> None:
    """Raises unless inputs (N, *shape), finite floating-point numbers, and labels can be used as they are.

    The arguments are those of `validate_labels`.

    Raises:
        DataError: no samples, wrong dtype or lengths, a label out of range, or an input that is not finite; the message
            names the first one.

    >>> validate_inputs(torch.tensor([[0.5, torch.inf]]), torch.tensor([0]), 1, "my table")
    Traceback (most recent call last):
    liplayers.errors.DataError: my table: sample 0 has inf at (1,), which is not finite; repair or remove the sample
    """
    if inputs.ndim < 2 or inputs.numel() == 0:
        raise DataError(f"{where}: expected at least one sample and one feature, got shape {tuple(inputs.shape)}")
    if not inputs.is_floating_point():
        raise DataError(f"{where}: inputs must be floating point, got {inputs.dtype}")
    validate_labels(labels, len(inputs), num_classes, where, "inputs", sources)
    place = first_wrong(inputs, lambda part: ~part.float().isfinite())  # as a network in training sees them
    if place is not None:
        value = inputs[place].item()
        wrong = "beyond the range of float32" if np.isfinite(value) else "not finite"
        raise DataError(
            f"{where}: {sample_name(place[0], sources)} has {value:g} at {place[1:]}, which is {wrong}; repair or "
            "remove the sample"
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
    """Whole batches of indices; each epoch's order depends on nothing but the seed and the epoch.

    A distributed sampler, so that Lightning neither replaces it nor forgets to tell it the epoch. Each process takes
    its share of every batch: all of them together see the batches that one process would see alone.

    Args:
        size: the number of samples.
        batch_size: samples in a batch, over all processes.
        shuffle: whether each epoch has an order of its own.
        drop_last: drop an incomplete last batch, unless it is the only one.
        seed: of the orders.
        num_replicas, rank: how many processes share each batch, and which one this is.
        done: how many batches of the epoch a resumed run has behind it; asked when the first batch is drawn.

    Raises:
        ArgumentError: a batch that the processes cannot share evenly.

    >>> [batch.tolist() for batch in BatchSampler(5, 2, shuffle=False, drop_last=False)]
    [[0, 1], [2, 3], [4]]
    >>> [batch.tolist() for batch in BatchSampler(4, 2, shuffle=False, drop_last=False, num_replicas=2, rank=1)]
    [[1], [3]]
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
        done: Callable[[], int] = int,
    ) -> None:
        super().__init__(range(size), num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.size = size
        self.batch_size = batch_size
        self.done = done
        whole, rest = divmod(size, batch_size)
        keeps_rest = rest > 0 and (not drop_last or whole == 0)
        self.batches = whole + keeps_rest
        uneven = [n for n in (batch_size if whole else 0, rest if keeps_rest else 0) if n % num_replicas]
        if uneven:
            raise ArgumentError(
                f"batch_size={batch_size} makes batches of {uneven[0]} of the {size} samples, which {num_replicas} "
                f"processes cannot share evenly; take a batch_size divisible by {num_replicas}"
            )

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Tensor]:
        # A generator, so the epoch is read at the first batch: Lightning may call set_epoch after iter().
        if self.shuffle:
            generator = torch.Generator().manual_seed(_mixed_seed(self.seed, _SHUFFLE, self.epoch))
            order = torch.randperm(self.size, generator=generator)
        else:
            order = torch.arange(self.size)
        for start in range(self.done() * self.batch_size, self.batches * self.batch_size, self.batch_size):
            yield order[start : start + self.batch_size][self.rank :: self.num_replicas]


class MixedBatchSampler(BatchSampler):
    """Batches with a fixed number of extra samples behind those of the data set, as indices into a `Mixture`.

    An epoch is one over the data set. Extra samples come in an order of their own for each epoch, all of them as often
    as one another to within one.

    Args:
        size: the number of samples of the data set.
        batch_size: samples in a batch, extra ones included, over all processes.
        extra: the number of extra samples.
        share: extra samples in a batch, within 1 … batch_size − 1.

    The other arguments are those of `BatchSampler`.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        extra: int,
        share: int,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        done: Callable[[], int] = int,
    ) -> None:
        super().__init__(
            size,
            batch_size - share,
            shuffle=True,
            drop_last=True,
            seed=seed,
            num_replicas=num_replicas,
            rank=rank,
            done=done,
        )
        if share % num_replicas:
            raise ArgumentError(
                f"a batch has {share} extra samples, which {num_replicas} processes cannot share evenly; change "
                f"extra.share or data.batch_size"
            )
        self.extra, self.share = extra, share

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(_mixed_seed(self.seed, _EXTRA, self.epoch))
        rounds = -(-self.batches * self.share // self.extra)
        order = torch.cat([torch.randperm(self.extra, generator=generator) for _ in range(rounds)])
        for number, own in enumerate(super().__iter__(), start=self.done()):
            more = order[number * self.share : (number + 1) * self.share][self.rank :: self.num_replicas]
            yield torch.cat([own, self.size + more])


def _as_is(batch: Any) -> Batch:
    return batch


def _in_float32(batch: Any) -> Batch:
    return batch[0].float(), batch[1]


def _takes_generator(module: nn.Module) -> bool:
    return "generator" in inspect.signature(module.forward).parameters


def _check_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentError(f"{name} must be an integer of at least 1, got {value!r}")


class DataModule(lightning.LightningDataModule):
    """Base of the data sets: inputs of any shape in memory, labels int64.

    The dataloaders that Lightning trains, validates and tests with round inputs to float32; those of `eval_loader`, and
    with them what is certified, are as they were loaded.

    A subclass sets `name` and `unit` and implements `load`. Validation samples are taken from the training samples, in
    proportion to the classes, by `seed`, unless `load` gives them; the test samples stay untouched. After `setup()`,
    which loads once, there are `name`, `input_shape`, `num_classes`, `class_names` and, for tables, `scaling`.

    Attributes:
        on_device: whether to hold a split in the memory of the GPU that trains, where it takes at most half of what is
            free there; False by default.
        unit: what distances are measured in, for tables and plots, such as "standardised features".
        input_range: the least and greatest value an input may hold; None for any finite number.

    Args:
        batch_size: samples in a training batch, over all processes: each of two takes half of them.
        eval_batch_size: samples in a validation or test batch; every process evaluates all of them.
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
    unit: str
    input_range: tuple[float, float] | None = None
    input_shape: tuple[int, ...]
    num_classes: int
    class_names: tuple[str, ...]
    scaling: Scaling | None = None

    # For messages: what the inputs are, what their axes are, and what gives a validation split.
    _noun = "inputs"
    _axes = ""
    _without_val = "val_fraction=0; set data.val_fraction above 0"

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
        self.on_device = False
        self._splits: dict[str, Split] | None = None
        self._extra: tuple[Split, int] | None = None

    @abstractmethod
    def load(self) -> Loaded:
        """Reads the train and the test split; called once, by `setup`, which checks them."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Loads and checks the data and sets the validation samples apart; does nothing when called again."""
        if self._splits is not None:
            return
        try:
            loaded = self.load()
        except MemoryError as error:
            raise DataError(f"{self.name}: the data do not fit into memory ({error or 'no more is left'})") from None
        splits = {"train": loaded.train, "test": loaded.test}
        if loaded.val is not None:
            splits["val"] = loaded.val
        for which, split in splits.items():
            self._validate(
                split.inputs, split.labels, len(loaded.class_names), f"{self.name} {which} {self._noun}", split.sources
            )
        if loaded.train.input_shape != loaded.test.input_shape:
            raise DataError(
                f"{self.name}: train {self._noun} are {loaded.train.input_shape} but test {self._noun} "
                f"{loaded.test.input_shape}{self._axes}; both must have one shape"
            )
        if loaded.val is None and self.val_fraction > 0:
            rest, taken = self._validation_rows(loaded.train.labels)
            splits |= {"train": loaded.train.subset(rest), "val": loaded.train.subset(taken)}
        self._splits = splits
        self.input_shape = loaded.train.input_shape
        self.class_names = loaded.class_names
        self.num_classes = len(loaded.class_names)
        self.scaling = loaded.scaling

    def _validate(
        self, inputs: Tensor, labels: Tensor, num_classes: int, where: str, sources: Sequence[str] | None
    ) -> None:
        validate_inputs(inputs, labels, num_classes, where, sources)

    def _validation_rows(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Which training samples stay, and which are for validation."""
        rest, taken = stratified_rows(labels, self.val_fraction, self.seed)
        if len(rest) == 0 or len(taken) == 0:
            raise ArgumentError(
                f"val_fraction={self.val_fraction} of {len(labels)} {self.name} training samples leaves {len(rest)} to "
                f"train on and {len(taken)} to validate on; change data.val_fraction (0: no validation)"
            )
        return rest, taken

    @property
    def has_validation(self) -> bool:
        """Whether there is a split "val"."""
        self.setup()
        assert self._splits is not None
        return "val" in self._splits

    def split(self, which: str) -> Split:
        """The split "train", "val" or "test".

        Raises:
            UnknownNameError: any other name.
            ArgumentError: "val" where there is none.
        """
        if which not in ("train", "val", "test"):
            raise UnknownNameError.of("split", which, ("train", "val", "test"))
        self.setup()
        assert self._splits is not None
        if which not in self._splits:
            raise ArgumentError(f"{self.name} has no split 'val' since {self._without_val}")
        return self._splits[which]

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
        self.setup()
        extra.setup()
        if extra.input_shape != self.input_shape:
            raise DataError(
                f"{extra.name}: extra {self._noun} are {extra.input_shape} but those of {self.name} {self.input_shape}"
                f"{self._axes}; both must have one shape"
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
        seed = _mixed_seed(self.seed, _AUGMENT, rank, batch)
        generator = torch.Generator().manual_seed(seed)
        for position, module in enumerate(self.augment):
            if _takes_generator(module):
                inputs = module(inputs, generator=generator)
                continue
            devices = [inputs.device] if inputs.device.type == "cuda" else []
            with torch.random.fork_rng(devices):
                torch.manual_seed(_mixed_seed(seed, position))
                inputs = module(inputs)
        return inputs
