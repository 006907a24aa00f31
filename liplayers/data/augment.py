"""Random augmentations of a whole batch, each image drawn on its own, reproducible from a generator."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import pad

from liplayers.errors import ArgumentError, ShapeError


def _draw_device(images: Tensor, generator: Generator | None) -> torch.device:
    """Where to draw: on the generator's device, so that a CPU generator gives the same draws on every accelerator."""
    return images.device if generator is None else generator.device


def _check_batch(images: Tensor, where: str) -> None:
    if images.ndim != 4:
        raise ShapeError(f"{where}: expected a batch (N, C, H, W), got shape {tuple(images.shape)}")


class RandomShift(nn.Module):
    """Shifts each image by up to `padding` pixels along each axis; what moves in is zero.

    The same as padding every side with `padding` zeros and cropping a random window of the old size. Vertical and
    horizontal shifts are independent and uniform on −padding … padding, for each image of the batch on its own.

    Args:
        padding: the largest shift, in pixels, at least 0.

    Raises:
        ArgumentError: `padding` is not an integer of at least 0.
        ShapeError: the images are not a batch (N, C, H, W).

    >>> images = torch.ones(2, 1, 3, 3)
    >>> RandomShift(1)(images, torch.Generator().manual_seed(0)).shape
    torch.Size([2, 1, 3, 3])
    """

    def __init__(self, padding: int) -> None:
        super().__init__()
        if isinstance(padding, bool) or not isinstance(padding, int) or padding < 0:
            raise ArgumentError(f"RandomShift: padding must be an integer of at least 0, got {padding!r}")
        self.padding = padding

    def forward(self, images: Tensor, generator: Generator | None = None) -> Tensor:
        _check_batch(images, "RandomShift")
        if self.padding == 0:
            return images
        n, _, height, width = images.shape
        padded = pad(images, [self.padding] * 4)
        # One draw for both axes: (2, N) offsets of the window's corner in the padded image.
        corner = torch.randint(
            2 * self.padding + 1, (2, n), generator=generator, device=_draw_device(images, generator)
        ).to(images.device)
        rows = corner[0, :, None] + torch.arange(height, device=images.device)
        columns = corner[1, :, None] + torch.arange(width, device=images.device)
        sample = torch.arange(n, device=images.device)[:, None, None]
        # Indices on both sides of the channel slice put the channels last: (N, H, W, C).
        window = padded[sample, :, rows[:, :, None], columns[:, None, :]]
        return window.permute(0, 3, 1, 2).contiguous()

    def extra_repr(self) -> str:
        return f"padding={self.padding}"


class RandomHorizontalFlip(nn.Module):
    """Mirrors each image left to right with probability `p`, each on its own.

    Args:
        p: the probability, within [0, 1].

    Raises:
        ArgumentError: `p` is not within [0, 1].
        ShapeError: the images are not a batch (N, C, H, W).

    >>> RandomHorizontalFlip(p=1.0)(torch.tensor([[[[1.0, 2.0]]]]))
    tensor([[[[2., 1.]]]])
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1:
            raise ArgumentError(f"RandomHorizontalFlip: p must be a probability within [0, 1], got {p!r}")
        self.p = float(p)

    def forward(self, images: Tensor, generator: Generator | None = None) -> Tensor:
        _check_batch(images, "RandomHorizontalFlip")
        draw = torch.rand(len(images), generator=generator, device=_draw_device(images, generator))
        flip = (draw < self.p).to(images.device)
        return torch.where(flip[:, None, None, None], images.flip(-1), images)

    def extra_repr(self) -> str:
        return f"p={self.p}"
