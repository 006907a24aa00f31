"""Base of the convolutions that multiply each frequency of the padded image by a matrix."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from liplayers.core.checks import check_transformed
from liplayers.core.precision import exact_precision
from liplayers.errors import ArgumentError
from liplayers.layers.bases.kernel import LipschitzConv2d
from liplayers.linalg.convolution import orthogonal_taps_
from liplayers.linalg.fourier import fast_size, fourier_multiply
from liplayers.modules.frozen import FrozenFourierConv2d, Placement, image_size

__all__ = ["FourierConv2d"]


class FourierConv2d(LipschitzConv2d, abstract=True):
    """A convolution that is a contraction at each frequency.

    `map_weight(*raw parameters, grid)` returns the transfer matrices W(ω), (H, W//2 + 1, out, in·s²), of a grid (H, W).

    The image is zero-padded as asked (and on to a size that transforms quickly), pixel-unshuffled by the stride,
    transformed, multiplied at each frequency by W(ω) with ‖W(ω)‖ ≤ 1, transformed back and cropped to the size that
    torch's convolution would have. Embedding and cropping are contractions, so the whole is one, for every image size;
    with circular padding nothing is cropped at stride 1 and an orthogonal W(ω) gives an orthogonal layer.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the output.
        kernel_size: size of the kernel in pixels, an integer or a pair.
        stride: an integer or a pair; it acts by pixel-unshuffling, with the kernel ⌈k/s⌉ on the unshuffled image.
        padding: pixels around the image on each side, an integer or a pair; "same" (with stride 1 only) or "valid"
            (none).
        dilation: 1, the only value of this family.
        groups: 1, the only value of this family.
        padding_mode: what the padding holds, "zeros" or "circular".
    """

    def _check_arguments(self) -> None:
        super()._check_arguments()
        if self.groups != 1 or self.dilation != (1, 1):
            raise ArgumentError(
                f"{type(self).__name__}: groups={self.groups}, dilation={self.dilation}; this family supports only "
                f"groups=1 and dilation=1; AOLConv2d and AOCConv2d support both"
            )

    @property
    def unshuffled(self) -> tuple[int, int, int]:
        """Input channels and kernel size of the stride-1 map on pixel-unshuffled images."""
        (kh, kw), (sh, sw) = self.kernel_size, self.stride
        return self.in_channels * sh * sw, math.ceil(kh / sh), math.ceil(kw / sw)

    def reset_parameters(self) -> None:
        """One orthogonal centre tap, no bias."""
        orthogonal_taps_(self.raw, (1, 1))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def unshuffle(self, x: Tensor, pads: list[tuple[int, int]]) -> Tensor:
        """The image with zeros (before, after) for height and width, pixel-unshuffled by the stride."""
        x = F.pad(x, (*pads[1], *pads[0])) if any(map(any, pads)) else x
        sh, sw = self.stride
        return rearrange(x, "n c (h a) (w b) -> n (c a b) h w", a=sh, b=sw)

    def place(
        self, size: tuple[int, int], out: tuple[int, int]
    ) -> tuple[list[tuple[int, int]], tuple[int, int], tuple[int, int]]:
        """For an image and an output of these sizes: zeros (before, after) for height and width to add before the
        pixel-unshuffling, the grid that it is convolved on, and where on it the output begins.

        Where the image lies on the torus does not matter: it stays at the origin, with as many rows of padding before
        it as the phase of the stride needs, and the output begins at a negative position if it must. On the torus the
        zeros after the image are those before it, too: one side's padding is enough.
        """
        grid, start, pads = [], [], []
        sizes = zip(size, self.kernel_size, self.pads, self.stride, out, strict=True)
        for n, k, (before, after), s, m in sizes:
            if self.padding_mode == "circular":
                grid.append(n // s)
                start.append(max(0, (k - 1) // 2 - before) // s)
                pads.append((0, 0))
            else:
                phase = before % s
                grid.append(fast_size(max(math.ceil((phase + n + max(before, after)) / s), m)))
                start.append((k - 1) // 2 // s - before // s)
                pads.append((phase, -(phase + n) % s))
        return pads, (grid[0], grid[1]), (start[0], start[1])

    def _check_input(self, x: Tensor) -> None:
        super()._check_input(x)
        check_transformed(self, x, self.raw.dtype)

    def convolve(self, x: Tensor, out: tuple[int, int]) -> Tensor:
        """The linear part on a batch of images of float32 at least, cropped to the size `out`."""
        pads, grid, (top, left) = self.place((x.shape[-2], x.shape[-1]), out)
        x = self.unshuffle(x, pads)
        inside = 0 <= top <= grid[0] - out[0] and 0 <= left <= grid[1] - out[1]
        y = fourier_multiply(x, self.effective(grid), grid, (top + out[0], left + out[1]) if inside else grid)
        if not inside:
            y, top, left = y.roll((-top, -left), (-2, -1)), 0, 0
        if (top, left, *y.shape[-2:]) == (0, 0, *out):
            return y
        return y[..., top : top + out[0], left : left + out[1]]

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        batched = x.dim() == 4
        y = x if batched else x[None]
        y = y.to(torch.promote_types(y.dtype, torch.float32))  # no transform exists in half precision
        with exact_precision(x.device):
            y = self.convolve(y, self.output_size(*x.shape[-2:])).to(x.dtype)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype).view(self.out_channels, 1, 1)
        return y if batched else y[0]

    def lipschitz_bound(self) -> float:
        return 1.0

    frozen_for_one_shape = True

    def frozen(self, shape: tuple[int, ...] | None) -> nn.Module:
        image = image_size(shape)
        out = self.output_size(*image)
        pads, grid, start = self.place(image, out)
        placement = Placement(image, (pads[0], pads[1]), self.stride, start, out)
        return FrozenFourierConv2d(self.effective(grid), self.bias, grid, placement)
