"""Random augmentations of a whole batch, each image drawn on its own, reproducible from a generator."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import pad
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as images_v2

from liplayers.core.checks import check_positive, check_share
from liplayers.errors import ArgumentError, ShapeError

__all__ = ["ColorJitter", "RandAugment", "RandomHorizontalFlip", "RandomShift"]


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
        check_share(self, "p", p, 0, 1)
        self.p = float(p)

    def forward(self, images: Tensor, generator: Generator | None = None) -> Tensor:
        _check_batch(images, "RandomHorizontalFlip")
        draw = torch.rand(len(images), generator=generator, device=_draw_device(images, generator))
        flip = (draw < self.p).to(images.device)
        return torch.where(flip[:, None, None, None], images.flip(-1), images)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class ColorJitter(nn.Module):
    """Changes brightness, contrast and saturation of each image by factors of its own, in this order.

    As `torchvision.transforms.v2.ColorJitter`, which draws one set of factors for a whole batch, but without hue and in
    a fixed order. Factors are uniform on max(0, 1 − x) … 1 + x. Grey images (one channel) have no saturation to change.

    Args:
        brightness: the largest change x of the factor of brightness, at least 0; 0 changes nothing.
        contrast: likewise, of contrast.
        saturation: likewise, of saturation.

    Raises:
        ArgumentError: a change that is not a number of at least 0.
        ShapeError: the images are not a batch (N, C, H, W) of 1 or 3 channels.

    >>> jitter = ColorJitter(brightness=0.5, contrast=0.5, saturation=0.5)
    >>> jitter(torch.rand(2, 3, 4, 4), torch.Generator().manual_seed(0)).shape
    torch.Size([2, 3, 4, 4])
    """

    def __init__(self, brightness: float = 0.0, contrast: float = 0.0, saturation: float = 0.0) -> None:
        super().__init__()
        self.changes = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
        for name, value in self.changes.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < torch.inf:
                raise ArgumentError(f"ColorJitter: {name} must be a finite number of at least 0, got {value!r}")

    def forward(self, images: Tensor, generator: Generator | None = None) -> Tensor:
        _check_colours(images, "ColorJitter")
        draws = torch.rand(3, len(images), 1, 1, 1, generator=generator, device=_draw_device(images, generator))
        spread = torch.tensor(list(self.changes.values()), device=draws.device)[:, None, None, None, None]
        low = (1 - spread).clamp_min(0)
        brightness, contrast, saturation = (low + (1 + spread - low) * draws).to(images)
        images = (images * brightness).clamp(0, 1)
        images = torch.lerp(_grey(images).mean((1, 2, 3), keepdim=True), images, contrast).clamp(0, 1)
        return torch.lerp(_grey(images), images, saturation).clamp(0, 1)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.changes.items())


def _check_colours(images: Tensor, where: str) -> None:
    _check_batch(images, where)
    if images.shape[1] not in (1, 3):
        raise ShapeError(f"{where}: expected images of 1 or 3 channels, got shape {tuple(images.shape)}")


def _grey(images: Tensor) -> Tensor:
    return images if images.shape[1] == 1 else images_v2.rgb_to_grayscale(images)


def _affine(images: Tensor, angle: float = 0.0, shear: float = 0.0, across: float = 0.0, down: float = 0.0) -> Tensor:
    """Rotation in degrees, shear along x in radians, shifts as shares of the side; zeros move in."""
    height, width = images.shape[-2:]
    return images_v2.affine(
        images,
        angle=angle,
        translate=[round(across * width), round(down * height)],
        scale=1.0,
        shear=[shear * 180 / torch.pi, 0.0],
        interpolation=InterpolationMode.BILINEAR,
    )


def _transposed(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda images: change(images.mT).mT


def _operations(strength: float) -> list[Callable[[Tensor], Tensor]]:
    """RandAugment's 14 at a strength within [-1, 1]; the sign is the direction where there is one."""
    shear = partial(_affine, shear=0.3 * strength)
    blends = [
        images_v2.adjust_saturation,
        images_v2.adjust_brightness,
        images_v2.adjust_contrast,
        images_v2.adjust_sharpness,
    ]
    return [
        lambda images: images,
        shear,
        _transposed(shear),
        partial(_affine, across=0.45 * strength),
        partial(_affine, down=0.45 * strength),
        partial(_affine, angle=30.0 * strength),
        *(
            partial(blend, **{f"{blend.__name__.removeprefix('adjust_')}_factor": 1 + 0.9 * strength})
            for blend in blends
        ),
        partial(images_v2.posterize, bits=8 - round(4 * abs(strength))),
        partial(images_v2.solarize, threshold=1 - abs(strength)),
        images_v2.autocontrast,
        images_v2.equalize,
    ]


class RandAugment(nn.Module):
    """RandAugment: to each image `num_ops` operations drawn from fourteen, with random directions.

    The operations are identity, shears, shifts, rotation, saturation, brightness, contrast, sharpness, posterise,
    solarise, autocontrast and equalise, each at the strength m of its largest: 0.3 of shear, 0.45 of the side, 30°, a
    factor 0.1 … 1.9, 4 of 8 bits, and all pixels for solarise. They are torchvision's, run once on all the images that
    drew them: cheap for large batches, on any device.

    Args:
        num_ops: operations one after the other, at least 1.
        magnitude: m within [0, 1].
        p: the probability with which a drawn operation is applied.

    Raises:
        ArgumentError: an argument out of range.
        ShapeError: the images are not a batch (N, C, H, W) of 1 or 3 channels.

    Source: Cubuk et al. 2020, arXiv 1909.13719, with torchvision's largest strengths (its shift is 150/331 of a side).

    >>> augment = RandAugment(num_ops=2, magnitude=0.3)
    >>> augment(torch.rand(4, 3, 8, 8), torch.Generator().manual_seed(0)).shape
    torch.Size([4, 3, 8, 8])
    """

    def __init__(self, num_ops: int = 2, magnitude: float = 0.3, p: float = 1.0) -> None:
        super().__init__()
        check_positive(self, num_ops=num_ops)
        check_share(self, "magnitude", magnitude, 0, 1)
        check_share(self, "p", p, 0, 1)
        self.num_ops, self.magnitude, self.p = num_ops, float(magnitude), float(p)

    def forward(self, images: Tensor, generator: Generator | None = None) -> Tensor:
        _check_colours(images, "RandAugment")
        choices = [change for sign in (1, -1) for change in _operations(sign * self.magnitude)]
        size = (self.num_ops, len(images))
        device = _draw_device(images, generator)
        drawn = torch.randint(len(choices), size, generator=generator, device=device)
        applied = torch.rand(size, generator=generator, device=device) < self.p
        for choice in torch.where(applied, drawn, 0).cpu():  # 0 is the identity
            changed = images.clone()
            for number in choice.unique().tolist():
                rows = (choice == number).nonzero()[:, 0].to(images.device)
                changed[rows] = choices[number](images[rows])
            images = changed
        return images

    def extra_repr(self) -> str:
        return f"num_ops={self.num_ops}, magnitude={self.magnitude}, p={self.p}"
