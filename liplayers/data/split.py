"""Samples held in memory, handed out as float32 images or as the numbers they are."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["Mixture", "Split"]

Batch = tuple[Tensor, Tensor]

# Samples looked at together while checking or hashing, so that no second copy of a data set is ever made.
CHUNK = 4096


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
        for start in range(0, len(self), CHUNK):
            part = slice(start, start + CHUNK)
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
