"""What the image data sets share: images in [0, 1] and the checks on them.

Models get float32 images (C, H, W) with pixels in [0, 1]. Normalisation is a layer of the model, since it counts in
the Lipschitz bound.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from liplayers.data.base import DataModule, first_wrong, sample_name, validate_labels
from liplayers.errors import DataError


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


class ImageDataModule(DataModule):
    """Base of the image data sets: images (C, H, W) in memory, float32 in [0, 1] by the batch.

    Arguments and errors are those of `DataModule`.
    """

    unit = "pixels in [0, 1]"
    input_range = (0.0, 1.0)

    _noun = "images"
    _axes = " (C, H, W)"

    def _validate(
        self, inputs: Tensor, labels: Tensor, num_classes: int, where: str, sources: Sequence[str] | None
    ) -> None:
        validate_images(inputs, labels, num_classes, where, sources)
