"""The handwritten digits that scikit-learn bundles: 1,797 grey images of 8 × 8, no download, good for trials."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from torch import nn

from liplayers.data.base import Loaded, Split, stratified_rows
from liplayers.data.images import ImageDataModule

# Fixed apart from the user's seed, so that figures on the test split compare across runs.
_TEST_SEED = 20240229
_TEST_FRACTION = 0.2


class Digits(ImageDataModule):
    """scikit-learn's digits: 1 × 8 × 8 in 17 grey levels (value / 16, float32), ten classes.

    One fifth, in proportion to the classes, is the test split; always the same one. Arguments are those of
    `DataModule`.

    >>> data = Digits(val_fraction=0.1)
    >>> data.setup()
    >>> data.input_shape, data.num_classes, [len(data.split(which)) for which in ("train", "val", "test")]
    ((1, 8, 8), 10, [1294, 144, 359])
    >>> images, labels = next(iter(data.train_dataloader()))
    >>> images.shape, images.dtype, labels.dtype
    (torch.Size([256, 1, 8, 8]), torch.float32, torch.int64)
    """

    name = "digits"

    def __init__(
        self,
        *,
        batch_size: int = 256,
        eval_batch_size: int = 1000,
        val_fraction: float = 0.1,
        augment: Sequence[nn.Module] = (),
        seed: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_fraction=val_fraction,
            augment=augment,
            seed=seed,
        )

    def load(self) -> Loaded:
        bundle = load_digits()
        images = torch.from_numpy(bundle.images).float().div_(16).unsqueeze(1)
        labels = torch.from_numpy(bundle.target).long()
        train, test = stratified_rows(labels, _TEST_FRACTION, _TEST_SEED)
        return Loaded(
            train=Split(images[train], labels[train]),
            test=Split(images[test], labels[test]),
            class_names=tuple(str(name) for name in bundle.target_names),
        )
