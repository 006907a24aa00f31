"""The handwritten digits that scikit-learn bundles: 1,797 grey images of 8 × 8, no download, good for trials."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits

from liplayers.data.sampling import stratified_rows
from liplayers.data.source import ImageSource, Loaded
from liplayers.data.split import Split

__all__ = ["Digits"]

# Fixed apart from the user's seed, so that figures on the test split compare across runs.
_TEST_SEED = 20240229
_TEST_FRACTION = 0.2


class Digits(ImageSource):
    """scikit-learn's digits: 1 × 8 × 8 in 17 grey levels (value / 16, float32), ten classes.

    One fifth, in proportion to the classes, is the test split; always the same one.

    >>> loaded = Digits().load()
    >>> loaded.train.input_shape, len(loaded.train), len(loaded.test)
    ((1, 8, 8), 1438, 359)
    """

    name = "digits"

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
