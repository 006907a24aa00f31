"""Certify a classifier on a data set: one radius for each sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from liplayers.certification.network import CertifiedNetwork
from liplayers.certification.radius import certified_accuracy
from liplayers.errors import DataError, ShapeError

__all__ = ["Certificates", "certify"]


@dataclass(frozen=True)
class Certificates:
    """The result for each sample: tensors of one length.

    `prediction` is −1 where logits are NaN or infinite; `margin` is f_y − max_{j≠y} f_j for the predicted y; `radius`
    is in the norm of the inputs.
    """

    label: Tensor
    prediction: Tensor
    margin: Tensor
    radius: Tensor

    def __post_init__(self) -> None:
        shapes = {name: tuple(column.shape) for name, column in vars(self).items()}
        if set(shapes.values()) != {self.label.shape[:1]}:  # others would be compared with each other
            raise ShapeError(f"Certificates: got {shapes}; expected one number for each sample, (N,)")

    @property
    def correct(self) -> Tensor:
        return self.label == self.prediction

    @property
    def clean_accuracy(self) -> float:
        return self.correct.double().mean().item()

    def accuracy(self, epsilon: float) -> float:
        """Certified accuracy at radius ε."""
        return certified_accuracy(self.radius, self.correct, epsilon)

    @property
    def mean_radius(self) -> float:
        """The mean over all samples, where a wrong prediction counts 0 (average certified radius)."""
        return torch.where(self.correct, self.radius, 0.0).mean().item()

    @property
    def not_finite(self) -> int:
        """How many samples had NaN or infinite logits; they certify nothing."""
        return int((self.prediction == -1).sum())


def certify(
    network: CertifiedNetwork,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    input_range: tuple[float, float] | None = (0.0, 1.0),
    progress: Callable[[int], object] | None = None,
) -> Certificates:
    """Certify the prediction of each sample.

    Args:
        network: the classifier with its proven constants.
        batches: (inputs, labels). Certified are the float64 numbers that the inputs stand for; labels are class
            numbers, integers (N,).
        input_range: what every input must lie within; None for any finite number.
        progress: called after each batch with the number of samples that are done.

    Raises:
        ShapeError: inputs of another shape than the network's, logits of another size than its classes.
        DataError: no samples, inputs that are NaN, infinite, or outside `input_range`, labels that are no classes.

    >>> from liplayers import AOLLinear
    >>> certify(CertifiedNetwork(AOLLinear(2, 2), (2,), 2), [(torch.rand(3, 2), torch.tensor([0, 1, 0]))]).radius.shape
    torch.Size([3])
    """
    columns: list[list[Tensor]] = [[], [], [], []]
    done = 0
    with torch.no_grad():
        for inputs, labels in batches:
            _check_inputs(inputs, network.input_shape, input_range, done)
            labels = _classes(labels, len(inputs), network.num_classes, done)
            logits, radius = network.logits_and_radius(inputs)
            logits = logits.cpu()
            prediction = torch.where(logits.isfinite().all(1), logits.argmax(1), -1)
            best = logits.topk(2, 1).values
            for column, value in zip(columns, (labels, prediction, best[:, 0] - best[:, 1], radius), strict=True):
                column.append(value)
            done += len(inputs)
            if progress is not None:
                progress(done)
    if not done:
        raise DataError("no samples to certify: the data set is empty")
    return Certificates(*(torch.cat(column) for column in columns))


def _check_inputs(
    inputs: Tensor, input_shape: tuple[int, ...], input_range: tuple[float, float] | None, done: int
) -> None:
    if tuple(inputs.shape[1:]) != tuple(input_shape):
        images = len(input_shape) == 3
        raise ShapeError(
            f"the {'images' if images else 'inputs'} have shape {tuple(inputs.shape[1:])}, the model was trained on "
            f"{tuple(input_shape)}{' (channels, height, width); set data.image_size or' if images else ';'} use the "
            "data set it was trained on"
        )
    if inputs.is_complex():
        raise DataError(f"samples from {done} on: inputs are {inputs.dtype}; expected real numbers")
    low, high = input_range or (-torch.inf, torch.inf)
    wrong = ~(inputs.isfinite() & (inputs >= low) & (inputs <= high))
    if wrong.any():
        position = wrong.nonzero()[0].tolist()
        value = inputs[tuple(position)].item()
        what, expected = (
            ("feature", "a finite number") if input_range is None else ("pixel", f"pixels in [{low:g}, {high:g}]")
        )
        raise DataError(f"sample {done + position[0]}, {what} {tuple(position[1:])}: {value}; expected {expected}")


def _classes(labels: Tensor, samples: int, num_classes: int, done: int) -> Tensor:
    """The labels of a batch, int64 on the CPU; raises unless they are one class for each sample."""
    where = f"samples from {done} on"
    whole = isinstance(labels, Tensor) and not (labels.is_floating_point() or labels.is_complex() or labels.is_meta)
    if not whole or labels.dtype == torch.bool or labels.dim() != 1:
        found = (
            f"{labels.dtype} {tuple(labels.shape)} on {labels.device}" if isinstance(labels, Tensor) else type(labels)
        )
        raise DataError(f"{where}: labels are {found}; expected class numbers, integers of shape (N,)")
    if len(labels) != samples:
        raise DataError(f"{where}: {samples} inputs but {len(labels)} labels; give one label for each input")
    labels = labels.cpu().long()
    wrong = ((labels < 0) | (labels >= num_classes)).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise DataError(f"sample {done + row} has label {labels[row]}; expected 0 … {num_classes - 1}")
    return labels
