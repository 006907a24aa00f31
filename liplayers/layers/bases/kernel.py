"""Bases of the convolutions: torch's arguments, explicit kernels, and the adjoints of these."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liplayers.core.checks import Size2d, check_image, check_positive, pair
from liplayers.core.module import LipschitzModule
from liplayers.core.precision import executed
from liplayers.core.weights import ParametrizedModule
from liplayers.errors import ArgumentError, ShapeError
from liplayers.linalg.convolution import orthogonal_taps_
from liplayers.linalg.verified import conv_norm_enclosure
from liplayers.modules.frozen import filled

__all__ = ["KernelConv2d", "LipschitzConv2d", "LipschitzConvTranspose2d", "wrap"]


class LipschitzConv2d(ParametrizedModule, abstract=True):
    """Base of the convolutions: torch's arguments, checked for what keeps the norm at most 1.

    Zero padding of any width is sound: the map is a compression of the convolution on the infinite grid. Circular
    padding is sound when no input position is repeated in the output's reach more often than on the torus itself:
    total padding at most k_eff − 1 (k_eff = dilation·(k − 1) + 1) and a stride that divides the image. Reflection and
    replication enlarge the norm (up to √2 and √(p + 1) an axis) and are refused.

    A family's constructor has the arguments of `torch.nn.Conv2d`, calls this one with those that describe the map,
    makes `raw`, what else is mapped and `bias`, in this order, and calls `reset_parameters`.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the output.
        kernel_size: size of the kernel in pixels, an integer or a pair.
        stride: pixels from one position of the kernel to the next, an integer or a pair.
        padding: pixels around the image on each side, an integer or a pair; "same" (with stride 1 only) or "valid"
            (none).
        dilation: pixels from one tap of the kernel to the next, an integer or a pair.
        groups: number of groups of channels that are mapped apart; it divides in_channels and out_channels.
        padding_mode: what the padding holds, "zeros" or "circular".
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size2d,
        stride: Size2d,
        padding: Size2d | str,
        dilation: Size2d,
        groups: int,
        padding_mode: str,
    ) -> None:
        super().__init__()
        check_positive(self, in_channels=in_channels, out_channels=out_channels, groups=groups)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = pair(self, "kernel_size", kernel_size, 1)
        self.stride = pair(self, "stride", stride, 1)
        self.dilation = pair(self, "dilation", dilation, 1)
        self.groups = groups
        self.padding_mode = padding_mode
        self.padding = padding if isinstance(padding, str) else pair(self, "padding", padding, 0)
        self._effective_size = tuple(d * (k - 1) + 1 for k, d in zip(self.kernel_size, self.dilation, strict=True))
        self.pads = self._resolve_padding()
        self._check_arguments()

    def _resolve_padding(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(before, after) for height and width, as torch resolves them."""
        if self.padding == "valid":
            return (0, 0), (0, 0)
        if self.padding == "same":
            if self.stride != (1, 1):
                raise ArgumentError(
                    f"{type(self).__name__}: padding='same' with stride={self.stride}; use stride 1, "
                    f"or give the padding as a number"
                )
            total = [k - 1 for k in self._effective_size]
            return (total[0] // 2, total[0] - total[0] // 2), (total[1] // 2, total[1] - total[1] // 2)
        if isinstance(self.padding, str):
            raise ArgumentError(
                f"{type(self).__name__}: padding={self.padding!r}; expected 'same', 'valid', an integer or a pair"
            )
        return (self.padding[0], self.padding[0]), (self.padding[1], self.padding[1])

    def _check_arguments(self) -> None:
        name = type(self).__name__
        for side, channels in (("in_channels", self.in_channels), ("out_channels", self.out_channels)):
            if channels % self.groups:
                raise ArgumentError(f"{name}: groups={self.groups} does not divide {side}={channels}")
        if self.padding_mode not in ("zeros", "circular"):
            raise ArgumentError(
                f"{name}: padding_mode={self.padding_mode!r} enlarges the norm beyond 1; use 'zeros' or 'circular'"
            )
        if self.padding_mode == "circular":
            for (before, after), k in zip(self.pads, self._effective_size, strict=True):
                if before + after > k - 1:
                    raise ArgumentError(
                        f"{name}: circular padding={self.padding} repeats pixels for a kernel that spans {k}: "
                        f"at most {k - 1} in all keeps the norm at 1; use padding={(k - 1) // 2} or 'same'"
                    )

    def reset_parameters(self) -> None:
        """One orthogonal block at the centre of the kernel, no bias."""
        orthogonal_taps_(self.raw, self.stride, self.groups)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _check_input(self, x: Tensor) -> None:
        check_image(self, x, self.in_channels)
        name = type(self).__name__
        for axis, size in enumerate(x.shape[-2:]):
            if self.padding_mode == "circular" and size % self.stride[axis]:
                raise ShapeError(
                    f"{name}: circular padding with stride {self.stride[axis]} on an image of {tuple(x.shape[-2:])} "
                    f"exceeds norm 1; the stride must divide the size: crop or pad the image, or use 'zeros'"
                )
            if size + sum(self.pads[axis]) < self._effective_size[axis]:
                raise ShapeError(
                    f"{name}: the image {tuple(x.shape[-2:])} with padding {self.padding} is smaller than "
                    f"the kernel's span {self._effective_size}"
                )

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output, by torch's rule."""
        sizes = (
            (n + sum(pad) - k) // s + 1
            for n, pad, k, s in zip((height, width), self.pads, self._effective_size, self.stride, strict=True)
        )
        h, w = sizes
        return h, w

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        defaults = {"padding": (0, 0), "dilation": (1, 1), "groups": 1, "padding_mode": "zeros"}
        for name, default in defaults.items():
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)!r}"
        return text + (", bias=False" if self.bias is None else "")


class KernelConv2d(LipschitzConv2d, abstract=True):
    """Base of the convolutions that run an explicit kernel.

    `map_weight` returns a kernel (out, in/groups, kh, kw) whose convolution, with this stride and dilation, has norm
    ≤ 1 on the infinite grid.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the output.
        kernel_size: size of the kernel in pixels, an integer or a pair.
        stride: pixels from one position of the kernel to the next, an integer or a pair.
        padding: pixels around the image on each side, an integer or a pair; "same" (with stride 1 only) or "valid"
            (none).
        dilation: pixels from one tap of the kernel to the next, an integer or a pair.
        groups: number of groups of channels that are mapped apart; it divides in_channels and out_channels.
        padding_mode: what the padding holds, "zeros" or "circular".
    """

    has_weight = True

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        padding: Any = self.padding
        if self.padding_mode == "circular":
            x = wrap(self, x, self.pads)
            padding = 0
        return F.conv2d(x, self.effective(), self.bias, self.stride, padding, self.dilation, self.groups)

    def lipschitz_bound(self) -> float:
        if torch.finfo(self.executed_dtype()).bits >= 32:
            return 1.0
        ((exact, run),) = self.exact_and_executed()
        # the norm of a convolution is at most the sum of its taps' norms
        return 1.0 + torch.linalg.matrix_norm(run - exact, dim=(0, 1)).sum().item()

    def proven_norm(self) -> float:
        """A proven bound of the norm of the kernel that runs here and now, for every size of image."""
        kernel = executed(self.effective())
        if not kernel.isfinite().all():
            return math.inf
        return conv_norm_enclosure(kernel, self.stride, self.dilation, self.groups).upper

    def frozen(self, shape: tuple[int, ...] | None) -> nn.Module:
        mode: Any = self.padding_mode
        geometry = (self.kernel_size, self.stride, self.padding, self.dilation, self.groups, False, mode)
        # it pads as ours, for "same" too
        conv = nn.Conv2d(self.in_channels, self.out_channels, *geometry, device="meta")
        return filled(conv, self.effective(), self.bias)


class LipschitzConvTranspose2d(LipschitzModule):
    """The adjoint of a convolution of `family`, with the arguments of `torch.nn.ConvTranspose2d`.

    The adjoint of a contraction is a contraction. output_padding only enlarges the image that the convolution would
    take. The raw parameters are those of the convolution from out_channels to in_channels, held as `adjoint`.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the output.
        kernel_size: size of the kernel in pixels, an integer or a pair.
        stride: pixels of the output from one position of the kernel to the next, an integer or a pair.
        padding: pixels that are cut from the output on each side, an integer or a pair.
        output_padding: pixels more at the end of the output, an integer or a pair; fewer than the larger of stride and
            dilation.
        groups: number of groups of channels that are mapped apart; it divides in_channels and out_channels.
        bias: whether b is there.
        dilation: pixels from one tap of the kernel to the next, an integer or a pair.
        padding_mode: "zeros", the only value of transposed convolutions.
        device: of the parameters.
        dtype: of the parameters.
    """

    family: Callable[..., KernelConv2d]
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size2d,
        stride: Size2d,
        padding: Size2d,
        output_padding: Size2d,
        groups: int,
        bias: bool,
        dilation: Size2d,
        padding_mode: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_positive(self, in_channels=in_channels, out_channels=out_channels, groups=groups)
        if padding_mode != "zeros":
            raise ArgumentError(f"{name}: padding_mode={padding_mode!r}; a transposed convolution has only 'zeros'")
        self.padding_mode = padding_mode
        self.output_padding = pair(self, "output_padding", output_padding, 0)
        padding = pair(self, "padding", padding, 0)
        geometry = (kernel_size, stride, padding, dilation, groups, False)
        try:
            self.adjoint = self.family(out_channels, in_channels, *geometry, device=device, dtype=dtype)
        except ArgumentError as error:
            raise ArgumentError(f"{name}: {error}") from None
        for extra, s, d in zip(self.output_padding, self.stride, self.dilation, strict=True):
            if extra >= max(s, d):
                raise ArgumentError(
                    f"{name}: output_padding={output_padding}; it must be smaller than the stride or the dilation"
                )
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as the convolution does, without a bias."""
        self.adjoint.reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    in_channels = property(lambda self: self.adjoint.out_channels)
    out_channels = property(lambda self: self.adjoint.in_channels)
    kernel_size = property(lambda self: self.adjoint.kernel_size)
    stride = property(lambda self: self.adjoint.stride)
    padding = property(lambda self: self.adjoint.padding)
    dilation = property(lambda self: self.adjoint.dilation)
    groups = property(lambda self: self.adjoint.groups)

    @property
    def weight(self) -> Tensor:
        """The kernel, (in_channels, out_channels/groups, kh, kw), as torch's conv_transpose2d takes it; to be read."""
        return self.adjoint.weight

    @weight.setter
    def weight(self, weight: Tensor) -> None:
        self.assign_weight(weight)

    def assign_weight(self, weight: Tensor) -> float:
        """Start from a dense weight, as the convolution does."""
        return self.adjoint.assign_weight(weight)

    def forward(self, x: Tensor) -> Tensor:
        check_image(self, x, self.in_channels)
        geometry = (self.stride, self.padding, self.output_padding, self.groups, self.dilation)
        return F.conv_transpose2d(x, self.adjoint.effective(), self.bias, *geometry)

    def lipschitz_bound(self) -> float:
        return self.adjoint.lipschitz_bound()

    def lipschitz_estimate(self) -> float | Tensor:
        return self.adjoint.lipschitz_estimate()

    def frozen(self, shape: tuple[int, ...] | None) -> nn.Module:
        sizes = (self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding)
        conv = nn.ConvTranspose2d(*sizes, self.output_padding, self.groups, False, self.dilation, device="meta")
        return filled(conv, self.adjoint.effective(), self.bias)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        defaults = {"padding": (0, 0), "output_padding": (0, 0), "dilation": (1, 1), "groups": 1}
        for name, default in defaults.items():
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)!r}"
        return text + (", bias=False" if self.bias is None else "")


def wrap(owner: object, x: Tensor, pads: tuple[tuple[int, int], tuple[int, int]]) -> Tensor:
    """Circular padding by (before, after) for height and width."""
    if any(max(pad) > size for pad, size in zip(pads, x.shape[-2:], strict=True)):
        raise ShapeError(
            f"{type(owner).__name__}: the image {tuple(x.shape[-2:])} is smaller than its circular padding {pads}; "
            f"use padding_mode='zeros' or a larger image"
        )
    (top, bottom), (left, right) = pads
    return F.pad(x, (left, right, top, bottom), mode="circular")
