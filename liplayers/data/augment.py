"""Random augmentations of a whole batch, each image drawn on its own, reproducible from a generator."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import affine_grid, grid_sample, pad
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as images_v2

from liplayers.core.checks import check_positive, check_share
from liplayers.errors import ArgumentError, ShapeError, UnknownNameError

__all__ = ["ColorJitter", "RandAugment", "RandomAffine", "RandomHorizontalFlip", "RandomShift"]


def _draw_device(images: Tensor, generator: Generator | None) -> torch.device:
    """Where to draw: on the generator's device, so that a CPU generator gives the same draws on every accelerator."""
    return images.device if generator is None else generator.device


def _check_batch(images: Tensor, where: str) -> None:
    if images.ndim != 4:
        raise ShapeError(f"{where}: expected a batch (N, C, H, W), got shape {tuple(images.shape)}")


def _check_name(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UnknownNameError.of(name, value, known)


class RandomShift(nn.Module):
    """Shifts each image by up to `padding` pixels along each axis; what moves in is one colour, or a reflection.

    The same as padding every side with `padding` pixels and cropping a random window of the old size. Vertical and
    horizontal shifts are independent and uniform on −padding … padding, for each image of the batch on its own.

    Args:
        padding: the largest shift, in pixels, at least 0.
        padding_mode: "constant", or "reflect" about the pixels of the border.
        fill: what moves in where it is constant, within [0, 1]: one number, or one for each channel.

    Raises:
        ArgumentError: `padding` is not an integer of at least 0, `fill` is not within [0, 1].
        UnknownNameError: another padding_mode.
        ShapeError: the images are not a batch (N, C, H, W), have another number of channels than `fill`, or are too
            small to be reflected.

    >>> images = torch.ones(2, 1, 3, 3)
    >>> RandomShift(1)(images, torch.Generator().manual_seed(0)).shape
    torch.Size([2, 1, 3, 3])
    """

    def __init__(self, padding: int, padding_mode: str = "constant", fill: float | Sequence[float] = 0.0) -> None:
        super().__init__()
        if isinstance(padding, bool) or not isinstance(padding, int) or padding < 0:
            raise ArgumentError(f"RandomShift: padding must be an integer of at least 0, got {padding!r}")
        _check_name("padding_mode", padding_mode, ("constant", "reflect"))
        for number in fill if isinstance(fill, Sequence) else [fill]:
            check_share(self, "fill", number, 0, 1)
        self.padding, self.padding_mode, self.fill = padding, padding_mode, fill

    def forward(self, images: Tensor, generator: Generator | None = None) -> Tensor:
        _check_batch(images, "RandomShift")
        if self.padding == 0:
            return images
        n, _, height, width = images.shape
        padded = self._padded(images)
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

    def _padded(self, images: Tensor) -> Tensor:
        sides = [self.padding] * 4
        if self.padding_mode == "reflect":
            if self.padding >= min(images.shape[2:]):
                raise ShapeError(
                    f"RandomShift: padding={self.padding} with padding_mode='reflect' needs images of more pixels a "
                    f"side, got shape {tuple(images.shape)}"
                )
            return pad(images, sides, mode="reflect")
        if not isinstance(self.fill, Sequence):
            return pad(images, sides, value=self.fill)
        if len(self.fill) != images.shape[1]:
            raise ShapeError(
                f"RandomShift: fill has {len(self.fill)} numbers for images of shape {tuple(images.shape)}; "
                f"expected one for each channel"
            )
        return torch.cat([pad(images[:, c : c + 1], sides, value=fill) for c, fill in enumerate(self.fill)], 1)

    def extra_repr(self) -> str:
        mode = "" if self.padding_mode == "constant" else f", padding_mode={self.padding_mode!r}"
        return f"padding={self.padding}{mode}" + ("" if self.fill == 0 else f", fill={self.fill}")


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


class RandomAffine(nn.Module):
    """Turns each image about its centre, then shifts it, by amounts of its own; bilinear.

    Angles are uniform on −degrees … degrees, shifts on −translate … translate of the side, for each axis alone.

    Args:
        degrees: the largest angle, in degrees, from 0 to 180.
        translate: the largest shift, as a share of the side, from 0 to 1.
        padding_mode: what moves in: "zeros", or "reflect" about the border, whose pixels are repeated.

    Raises:
        ArgumentError: an argument out of range.
        UnknownNameError: another padding_mode.
        ShapeError: the images are not a batch (N, C, H, W).

    >>> RandomAffine(degrees=5, translate=0.1)(torch.rand(2, 3, 8, 8), torch.Generator().manual_seed(0)).shape
    torch.Size([2, 3, 8, 8])
    """

    def __init__(self, degrees: float = 0.0, translate: float = 0.0, padding_mode: str = "zeros") -> None:
        super().__init__()
        check_share(self, "degrees", degrees, 0, 180)
        check_share(self, "translate", translate, 0, 1)
        _check_name("padding_mode", padding_mode, ("zeros", "reflect"))
        self.degrees, self.translate, self.padding_mode = float(degrees), float(translate), padding_mode

    def forward(self, images: Tensor, generator: Generator | None = None) -> Tensor:
        _check_batch(images, "RandomAffine")
        n, _, height, width = images.shape
        draws = 2 * torch.rand(3, n, generator=generator, device=_draw_device(images, generator)).to(images) - 1
        angle, (across, down) = math.radians(self.degrees) * draws[0], 2 * self.translate * draws[1:]
        cos, sin = angle.cos(), angle.sin()
        # where a pixel comes from, in units of half a side: turned back once it is shifted back
        turn = torch.stack([cos, sin * height / width, -sin * width / height, cos], 1).view(n, 2, 2)
        shift = -turn @ torch.stack([across, down], 1)[..., None]
        grid = affine_grid(torch.cat([turn, shift], 2), list(images.shape), align_corners=False)
        mode = "reflection" if self.padding_mode == "reflect" else "zeros"
        return grid_sample(images, grid, padding_mode=mode, align_corners=False).clamp(0, 1)

    def extra_repr(self) -> str:
        return f"degrees={self.degrees}, translate={self.translate}, padding_mode={self.padding_mode!r}"


Change = float | Sequence[float]  # the largest change x, or the two ends of a range


def _range(name: str, change: Change, middle: float, least: float, most: float) -> tuple[float, float]:
    """max(least, middle − x) … middle + x, or the range given, within [least, most]."""
    ends: Sequence[float] = ()
    if isinstance(change, Sequence):
        ends = change
    elif _is_number(change):
        ends = (max(least, middle - change), middle + change)
    if len(ends) == 2 and all(map(_is_number, ends)) and least <= ends[0] <= ends[1] <= most:
        return float(ends[0]), float(ends[1])
    raise ArgumentError(
        f"ColorJitter: {name}={change!r}; expected a largest change of at least 0, or the two ends of a range within "
        f"[{least:g}, {most:g}]"
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class ColorJitter(nn.Module):
    """Changes brightness, contrast, saturation and hue of each image by amounts of its own, in this order.

    As `torchvision.transforms.v2.ColorJitter`, which draws one set of amounts for a whole batch, but in a fixed order.
    Factors are uniform on max(0, 1 − x) … 1 + x, or between the two ends of a range; the change of hue on −x … x, as a
    share of the colour circle. Grey images (one channel) have no saturation and no hue to change.

    Args:
        brightness: the largest change x of the factor of brightness, at least 0, or the range of the factor; 0 changes
            nothing.
        contrast: likewise, of contrast.
        saturation: likewise, of saturation.
        hue: the largest change x, at most 0.5, or the range of changes.

    Raises:
        ArgumentError: a change below 0, a range out of order or out of [0, ∞), for hue [−0.5, 0.5].
        ShapeError: the images are not a batch (N, C, H, W) of 1 or 3 channels.

    >>> jitter = ColorJitter(brightness=0.5, contrast=0.5, saturation=0.5)
    >>> jitter(torch.rand(2, 3, 4, 4), torch.Generator().manual_seed(0)).shape
    torch.Size([2, 3, 4, 4])
    """

    def __init__(
        self, brightness: Change = 0.0, contrast: Change = 0.0, saturation: Change = 0.0, hue: Change = 0.0
    ) -> None:
        super().__init__()
        factors = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
        self.ranges = {name: _range(name, change, 1.0, 0.0, math.inf) for name, change in factors.items()}
        self.hue = _range("hue", hue, 0.0, -0.5, 0.5)

    def forward(self, images: Tensor, generator: Generator | None = None) -> Tensor:
        _check_colours(images, "ColorJitter")
        draw = partial(torch.rand, generator=generator, device=_draw_device(images, generator))
        draws = draw(3, len(images), 1, 1, 1)
        low, high = torch.tensor(list(self.ranges.values()), device=draws.device).T[..., None, None, None, None]
        brightness, contrast, saturation = (low + (high - low) * draws).to(images)
        images = (images * brightness).clamp(0, 1)
        images = torch.lerp(_grey(images).mean((1, 2, 3), keepdim=True), images, contrast).clamp(0, 1)
        images = torch.lerp(_grey(images), images, saturation).clamp(0, 1)
        if self.hue == (0, 0):
            return images
        low, high = self.hue
        change = (low + (high - low) * draw(len(images), 1, 1, 1)).to(images)
        return images if images.shape[1] == 1 else _turned(images, change)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={ends}" for name, ends in (self.ranges | {"hue": self.hue}).items())


def _turned(images: Tensor, hue: Tensor) -> Tensor:
    """Colours with their hue, in sixths of the circle, moved by 6·hue; value and chroma stay."""
    red, green, blue = images.unbind(1)
    value, most = images.max(1)
    chroma = value - images.amin(1)
    safe = torch.where(chroma > 0, chroma, 1)
    sixths = torch.stack([(green - blue) / safe, (blue - red) / safe + 2, (red - green) / safe + 4], 1)
    turned = sixths.gather(1, most[:, None]) + 6 * hue
    k = (turned + torch.arange(5, 0, -2, device=images.device).view(1, 3, 1, 1)) % 6
    return (value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)).clamp(0, 1)


def _check_colours(images: Tensor, where: str) -> None:
    _check_batch(images, where)
    if images.shape[1] not in (1, 3):
        raise ShapeError(f"{where}: expected images of 1 or 3 channels, got shape {tuple(images.shape)}")


def _grey(images: Tensor) -> Tensor:
    return images if images.shape[1] == 1 else images_v2.rgb_to_grayscale(images)


def _affine(
    images: Tensor,
    interpolation: InterpolationMode,
    angle: float = 0.0,
    shear: float = 0.0,
    across: float = 0.0,
    down: float = 0.0,
) -> Tensor:
    """Rotation in degrees, shear along x in radians, shifts as shares of the side; zeros move in."""
    height, width = images.shape[-2:]
    return images_v2.affine(
        images,
        angle=angle,
        translate=[round(across * width), round(down * height)],
        scale=1.0,
        shear=[shear * 180 / torch.pi, 0.0],
        interpolation=interpolation,
    )


def _transposed(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda images: change(images.mT).mT


def _operations(strength: float, interpolation: InterpolationMode) -> list[Callable[[Tensor], Tensor]]:
    """RandAugment's 14 at a strength within [-1, 1]; the sign is the direction where there is one."""
    move = partial(_affine, interpolation=interpolation)
    shear = partial(move, shear=0.3 * strength)
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
        partial(move, across=0.45 * strength),
        partial(move, down=0.45 * strength),
        partial(move, angle=30.0 * strength),
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
        p: the probability with which a drawn operation is applied, or an image augmented at all.
        gate: what p is drawn for: each "operation", or the "image" with all its operations.
        interpolation: of shears, shifts and rotations: "bilinear" or "nearest", torchvision's default.

    Raises:
        ArgumentError: an argument out of range.
        UnknownNameError: another gate or interpolation.
        ShapeError: the images are not a batch (N, C, H, W) of 1 or 3 channels.

    Source: Cubuk et al. 2020, arXiv 1909.13719, with torchvision's largest strengths (its shift is 150/331 of a side).

    >>> augment = RandAugment(num_ops=2, magnitude=0.3)
    >>> augment(torch.rand(4, 3, 8, 8), torch.Generator().manual_seed(0)).shape
    torch.Size([4, 3, 8, 8])
    """

    def __init__(
        self,
        num_ops: int = 2,
        magnitude: float = 0.3,
        p: float = 1.0,
        gate: str = "operation",
        interpolation: str = "bilinear",
    ) -> None:
        super().__init__()
        check_positive(self, num_ops=num_ops)
        check_share(self, "magnitude", magnitude, 0, 1)
        check_share(self, "p", p, 0, 1)
        _check_name("gate", gate, ("operation", "image"))
        _check_name("interpolation", interpolation, ("bilinear", "nearest"))
        self.num_ops, self.magnitude, self.p = num_ops, float(magnitude), float(p)
        self.gate, self.interpolation = gate, interpolation

    def forward(self, images: Tensor, generator: Generator | None = None) -> Tensor:
        _check_colours(images, "RandAugment")
        mode = InterpolationMode(self.interpolation)
        choices = [change for sign in (1, -1) for change in _operations(sign * self.magnitude, mode)]
        size = (self.num_ops, len(images))
        device = _draw_device(images, generator)
        drawn = torch.randint(len(choices), size, generator=generator, device=device)
        gates = size if self.gate == "operation" else size[1:]
        applied = torch.rand(gates, generator=generator, device=device) < self.p
        for choice in torch.where(applied, drawn, 0).cpu():  # 0 is the identity
            changed = images.clone()
            for number in choice.unique().tolist():
                rows = (choice == number).nonzero()[:, 0].to(images.device)
                changed[rows] = choices[number](images[rows])
            images = changed
        return images

    def extra_repr(self) -> str:
        arguments = f"num_ops={self.num_ops}, magnitude={self.magnitude}, p={self.p}"
        return f"{arguments}, gate={self.gate!r}, interpolation={self.interpolation!r}"
