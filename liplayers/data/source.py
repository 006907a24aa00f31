"""What the samples are: `Source` is what a data set has to say, and `DataModule` does with it what all need."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from liplayers.data.checks import validate_images, validate_inputs
from liplayers.data.scaling import Scaling
from liplayers.data.split import Split

__all__ = ["ImageSource", "Loaded", "Source"]

# From the labels of training samples to the rows that stay and those held out for validation.
HoldOut = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Loaded:
    """What a source has read.

    Args:
        train: the training samples; without `val` the validation samples are taken from them.
        test: the test samples.
        class_names: in the order of the labels.
        val: the validation samples, where the source says which they are.
        scaling: how the features of a table were standardised.
        no_val: why there are no validation samples, where the source decides that there are none.
    """

    train: Split
    test: Split
    class_names: tuple[str, ...]
    val: Split | None = None
    scaling: Scaling | None = None
    no_val: str | None = None


class Source(ABC):
    """What the samples are, and nothing about how they are split, shuffled or augmented, which `DataModule` does.

    Derive from it, set `name` and `unit`, and read the samples in `load`. The constructor takes what the source needs.

    Attributes:
        name: of the data, for messages, tables and plots.
        unit: what distances are measured in, such as "standardised features".
        input_range: the least and greatest value an input may hold; None for any finite number.
        noun: what inputs are called in messages, in the plural.
        axes: what the axes of an input are called in messages, after a space.

    >>> import torch
    >>> class Rings(Source):
    ...     name, unit = "rings", "units of the plane"
    ...     def load(self):
    ...         angle, label = torch.arange(40.0), torch.arange(40) % 2
    ...         points = (1 + label)[:, None] * torch.stack([angle.sin(), angle.cos()], 1)
    ...         return Loaded(Split(points[:30], label[:30]), Split(points[30:], label[30:]), ("inner", "outer"))
    >>> Rings().load().train.input_shape
    (2,)
    """

    name: str
    unit: str
    input_range: tuple[float, float] | None = None
    noun = "inputs"
    axes = ""

    @abstractmethod
    def load(self) -> Loaded:
        """Reads the samples; `DataModule` calls it once, and checks what it gives."""

    def load_holding_out(self, hold_out: HoldOut) -> Loaded:
        """As `load`, where the values of other samples depend on which are held out, as those of a standardised table.

        Args:
            hold_out: chooses the validation samples, for `Loaded.val`.
        """
        return self.load()

    def prepare(self) -> None:  # noqa: B027 - most sources have nothing to fetch
        """Fetches what is absent, where that is asked for; called in one process before `load` in all."""

    def validate(self, split: Split, num_classes: int, where: str) -> None:
        """Raises unless the samples can be used as they are.

        Args:
            split: the samples.
            num_classes: the number of classes.
            where: what the samples are, to begin the message with.

        Raises:
            DataError: the message names the first sample that cannot.
        """
        validate_inputs(split.inputs, split.labels, num_classes, where, split.sources)


class ImageSource(Source):
    """A source of images (C, H, W): uint8, or floating point in [0, 1]; batches are float32 in [0, 1]."""

    unit = "pixels in [0, 1]"
    input_range = (0.0, 1.0)
    noun = "images"
    axes = " (C, H, W)"

    def validate(self, split: Split, num_classes: int, where: str) -> None:
        """Raises unless the samples are images that can be used as they are; see `Source.validate`."""
        validate_images(split.inputs, split.labels, num_classes, where, split.sources)
