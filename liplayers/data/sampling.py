"""Which samples are held out and which come in a batch; each by a seed, the same on every machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from liplayers.errors import ArgumentError

__all__ = ["BatchSampler", "MixedBatchSampler", "stratified_rows"]

# What a seed is used for; keeps the streams of one seed apart.
SHUFFLE, AUGMENT, EXTRA = 1, 2, 3


def stratified_rows(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Splits the rows in two, the second with round(fraction · N) of them, each class in proportion to within one.

    Rows are put in order of class, at random within one, and taken at equal steps. Both results are sorted. The same
    arguments give the same rows on every machine and with every version of NumPy (its legacy stream is frozen).

    Args:
        labels: (N,), the class of each row.
        fraction: of the rows in the second part, in [0, 1].
        seed: of the choice within a class.

    Returns:
        The rows of the first part, and those of the second.

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


def mixed_seed(*parts: int) -> int:
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
        num_replicas: how many processes share each batch.
        rank: which of them this one is.
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
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, SHUFFLE, self.epoch))
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
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, EXTRA, self.epoch))
        rounds = -(-self.batches * self.share // self.extra)
        order = torch.cat([torch.randperm(self.extra, generator=generator) for _ in range(rounds)])
        for number, own in enumerate(super().__iter__(), start=self.done()):
            more = order[number * self.share : (number + 1) * self.share][self.rank :: self.num_replicas]
            yield torch.cat([own, self.size + more])
