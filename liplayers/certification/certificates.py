"""What was certified of each sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from liplayers.certification.radius import certified_accuracy
from liplayers.errors import ShapeError

__all__ = ["Certificates"]


@dataclass(frozen=True)
class Certificates:
    """The result for each sample, or for each of its M outputs: tensors of one shape, (N,) or (N, M).

    For classes `prediction` is −1 where logits are NaN or infinite (of numbers it is NaN), and `margin` is
    f_y − max_{j≠y} f_j for the predicted y; other tasks say what it is. `radius` is in the norm of the inputs.

    Attributes:
        right: which predictions count as right; None: those that are the label.
        counted: which entries figures are about; None: all.
    """

    label: Tensor
    prediction: Tensor
    margin: Tensor
    radius: Tensor
    right: Tensor | None = None
    counted: Tensor | None = None

    def __post_init__(self) -> None:
        shapes = {name: tuple(column.shape) for name, column in vars(self).items() if column is not None}
        if len(set(shapes.values())) > 1 or self.label.dim() not in (1, 2):  # others would be compared with each other
            raise ShapeError(f"Certificates: got {shapes}; expected one number for each sample, (N,), or all (N, M)")

    @classmethod
    def joined(cls, parts: Sequence[Certificates]) -> Certificates:
        """Those of all batches."""
        rows = {name: [getattr(part, name) for part in parts] for name in vars(parts[0])}
        columns: dict[str, Any] = {name: None if one[0] is None else torch.cat(one) for name, one in rows.items()}
        return cls(**columns)

    def part(self, index: Any) -> Certificates:
        """Those of some samples, or of one output: every column at an index."""
        columns: dict[str, Any] = {name: None if one is None else one[index] for name, one in vars(self).items()}
        return Certificates(**columns)

    @property
    def correct(self) -> Tensor:
        return self.label == self.prediction if self.right is None else self.right

    def _figures(self, column: Tensor) -> Tensor:
        """The entries of a column that count, in one dimension."""
        return column.flatten() if self.counted is None else column[self.counted]

    @property
    def clean_accuracy(self) -> float:
        return self._figures(self.correct).double().mean().item()

    def accuracy(self, epsilon: float) -> float:
        """Certified accuracy at radius ε; of several outputs, the share of all that count."""
        return certified_accuracy(self._figures(self.radius), self._figures(self.correct), epsilon)

    def all_accuracy(self, epsilon: float) -> float:
        """The share of samples of which every output that counts is certified at ε."""
        least, every = self.radius, self.correct
        if self.counted is not None:
            least, every = least.masked_fill(~self.counted, math.inf), every | ~self.counted
        return certified_accuracy(least.reshape(len(least), -1).amin(1), every.reshape(len(every), -1).all(1), epsilon)

    @property
    def mean_radius(self) -> float:
        """The mean over all that counts, where a wrong prediction counts 0 (average certified radius)."""
        return self._figures(torch.where(self.correct, self.radius, 0.0)).mean().item()

    @property
    def not_finite(self) -> int:
        """How many samples had NaN or infinite outputs; they certify nothing."""
        numbers = self.prediction.is_floating_point()
        wrong = self.prediction.isnan() if numbers else self.prediction == -1
        return int(wrong.reshape(len(wrong), -1).any(1).sum())
