"""Checks of inputs and labels on loading; a message names the first sample that is wrong, by its file where it has one.

Models get float32 images (C, H, W) with pixels in [0, 1]. Normalisation is a layer of the model, since it counts in
the Lipschitz bound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from liplayers.data.split import CHUNK
from liplayers.errors import DataError

__all__ = ["validate_images", "validate_inputs", "validate_labels"]


def first_wrong(inputs: Tensor, wrong: Callable[[Tensor], Tensor]) -> tuple[int, ...] | None:
    """The index of the first element for which `wrong`, an elementwise condition, holds; None without one.

    >>> first_wrong(torch.tensor([[1.0, 2.0], [3.0, torch.nan]]), torch.isnan)
    (1, 1)
    """
    for start in range(0, len(inputs), CHUNK):
        places = wrong(inputs[start : start + CHUNK]).nonzero()
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
    if images.ndim != 4:
        raise DataError(f"{where}: images must have 4 dimensions (N, C, H, W), got shape {tuple(images.shape)}")
    if len(images) == 0:
        raise DataError(f"{where}: the data set is empty; at least one sample is needed")
    if images.numel() == 0:
        raise DataError(f"{where}: images without pixels, shape {tuple(images.shape)}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise DataError(f"{where}: images must be uint8 (0 … 255) or floating point in [0, 1], got {images.dtype}")
    validate_labels(labels, len(images), num_classes, where, "images", sources)
    if images.dtype == torch.uint8:
        return
    # Written so that NaN counts as bad.
    place = first_wrong(images, lambda part: ~((part >= 0) & (part <= 1)))
    if place is not None:
        sample, channel, row, column = place
        value = float(images[place])
        mend = (
            "outside [0, 1]; scale the pixels to [0, 1], e.g. divide by 255"
            if np.isfinite(value)
            else "which is not finite; repair or remove the sample"
        )
        raise DataError(
            f"{where}: {sample_name(sample, sources)} has pixel {value:g} at channel {channel}, row {row}, "
            f"column {column}, {mend}"
        )
