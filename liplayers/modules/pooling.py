"""Pooling without overlap, patches, channel padding, each 1-Lipschitz; `lipschitz_bound` knows torch's own pooling."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from einops import rearrange
from torch import Tensor

from liplayers.core.checks import Size2d, check_positive, pair
from liplayers.core.module import LipschitzModule
from liplayers.errors import ArgumentError, ShapeError
from liplayers.linalg import upward

__all__ = ["GlobalL2Pool2d", "L2Pool2d", "MaxPool2d", "PadChannels", "Patchify2d", "ScaledAvgPool2d"]


class _Pool2d(LipschitzModule):
    """Pooling over patches of kernel_size = stride, which every pixel enters at most once."""

    def __init__(self, kernel_size: Size2d, stride: Size2d | None = None) -> None:
        super().__init__()
        self.kernel_size = pair(self, "kernel_size", kernel_size, 1)
        self.stride = self.kernel_size if stride is None else pair(self, "stride", stride, 1)
        if self.stride != self.kernel_size:
            raise ArgumentError(
                f"{type(self).__name__}: kernel_size={self.kernel_size}, stride={self.stride}; overlapping patches are "
                f"not 1-Lipschitz: use equal sizes, or torch's own pooling, whose overlap lipschitz_bound counts"
            )

    def patches(self, x: Tensor) -> Tensor:
        """(…, H, W) → (…, H//k, W//k, k²); border pixels that fill no patch are dropped, as torch does."""
        kh, kw = self.kernel_size
        height, width = x.shape[-2] // kh * kh, x.shape[-1] // kw * kw
        if not height or not width:
            raise ShapeError(
                f"{type(self).__name__}: the image {tuple(x.shape[-2:])} is smaller than kernel_size={self.kernel_size}"
            )
        return rearrange(x[..., :height, :width], "... (h a) (w b) -> ... h w (a b)", a=kh, b=kw)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}"


class ScaledAvgPool2d(_Pool2d):
    r"""Average pooling scaled to norm 1: y = (Σ_patch x)/√|patch|, √|patch| times torch's average.

    A linear contraction (a projection onto the patches' means, orthogonal in its rows) for images of every size. Cost:
    one sum over each patch. Signal gain at initialisation: 1 for constant patches, 1/√|patch| for white noise.

    Args:
        kernel_size: size of a patch in pixels, an integer or a pair.
        stride: None or equal to kernel_size.

    Shape:
        (*, H, W) → (*, ⌊H/k⌋, ⌊W/k⌋).

    Raises:
        ArgumentError: a stride other than kernel_size.
        ShapeError: an image smaller than a patch.

    Source: torch's average pooling; the factor as in Serrurier et al. 2021 (arXiv 2006.06520).

    >>> ScaledAvgPool2d(2)(torch.ones(1, 1, 2, 2))
    tensor([[[[2.]]]])
    """

    def forward(self, x: Tensor) -> Tensor:
        return self.patches(x).sum(-1) / math.sqrt(math.prod(self.kernel_size))

    def lipschitz_bound(self) -> float:
        area = math.prod(self.kernel_size)
        return upward.root(area / Fraction(math.sqrt(area)) ** 2)  # 1, or what the root was rounded down by


class L2Pool2d(_Pool2d):
    r"""ℓ2 pooling, y = √(Σ_patch x²): preserves the norm; 1-Lipschitz by the triangle inequality in each patch.

    Nonlinear, for images of every size. Cost: one norm of each patch. Signal gain at initialisation: 1, as always.

    The gradient at an all-zero patch is taken as 0.

    Args:
        kernel_size: size of a patch in pixels, an integer or a pair.
        stride: None or equal to kernel_size.

    Shape:
        (*, H, W) → (*, ⌊H/k⌋, ⌊W/k⌋).

    Raises:
        ArgumentError: a stride other than kernel_size.
        ShapeError: an image smaller than a patch.

    Source: Boureau et al. 2010; as a 1-Lipschitz layer, Serrurier et al. 2021 (arXiv 2006.06520).

    >>> L2Pool2d(2)(torch.ones(1, 1, 2, 2))
    tensor([[[[2.]]]])
    """

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(self.patches(x), dim=-1)

    def lipschitz_bound(self) -> float:
        return 1.0


class MaxPool2d(_Pool2d):
    r"""Max pooling over disjoint patches, y = max_patch x: 1-Lipschitz, since each patch's maximum is.

    Nonlinear, does not preserve norms; for images of every size. Cost: one maximum over each patch. Signal gain at
    initialisation: 1 for a lone peak in each patch, 1/√|patch| for constant patches.

    Args:
        kernel_size: size of a patch in pixels, an integer or a pair.
        stride: None or equal to kernel_size.

    Shape:
        (*, H, W) → (*, ⌊H/k⌋, ⌊W/k⌋).

    Raises:
        ArgumentError: a stride other than kernel_size.
        ShapeError: an image smaller than a patch.

    Source: in 1-Lipschitz networks, Prach et al. 2023, arXiv 2311.16833.

    >>> MaxPool2d(2)(torch.arange(4.0).view(1, 1, 2, 2))
    tensor([[[[3.]]]])
    """

    def forward(self, x: Tensor) -> Tensor:
        return self.patches(x).amax(-1)

    def lipschitz_bound(self) -> float:
        return 1.0


class GlobalL2Pool2d(LipschitzModule):
    r"""y_c = √(Σ_hw x²_chw), one number for each channel of an image of any size; preserves the norm.

    Nonlinear and 1-Lipschitz, as `L2Pool2d`. Cost: one norm of each channel. Signal gain at initialisation: 1, as
    always.

    Shape:
        (N, C, H, W) → (N, C).

    Source: Hu et al. 2026, arXiv 2601.18513.

    >>> GlobalL2Pool2d()(torch.ones(1, 1, 2, 2))
    tensor([[2.]])
    """

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x, dim=(-2, -1))

    def lipschitz_bound(self) -> float:
        return 1.0


class PadChannels(LipschitzModule):
    r"""Append channels of zeros, or cut channels off, along dimension 1: y = [x; 0], an isometry, or a projection.

    Linear. Cost: one copy, or none. Signal gain at initialisation: 1, or √(out/in) on average where channels are cut.

    Args:
        channels: of the output.

    Shape:
        (N, C, *) → (N, channels, *).

    Raises:
        ArgumentError: channels below 1.

    Source: the zero padding of channels as in residual networks (He et al. 2016, arXiv 1512.03385).

    >>> PadChannels(3)(torch.ones(1, 2)), PadChannels(1)(torch.ones(1, 2))
    (tensor([[1., 1., 0.]]), tensor([[1.]]))
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        check_positive(self, channels=channels)
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        missing = self.channels - x.shape[1]
        if missing <= 0:
            return x[:, : self.channels]
        return torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], 1)

    def lipschitz_bound(self) -> float:
        return 1.0

    def extra_repr(self) -> str:
        return f"channels={self.channels}"


class Patchify2d(LipschitzModule):
    r"""Patches become channels: y_{(c, a, b), h, w} = x_{c, h·p_h + a, w·p_w + b}, an isometry for every image.

    Linear and orthogonal, a permutation of the entries: torch's `PixelUnshuffle`, which takes square patches only, with
    its order of channels. An orthogonal 1×1 convolution after it is an orthogonal patch embedding. Cost: one copy.
    Signal gain at initialisation: 1, as always.

    Args:
        patch_size: an integer or a pair.

    Shape:
        (*, C, H, W) → (*, C·p_h·p_w, H/p_h, W/p_w).

    Raises:
        ArgumentError: a patch_size below 1.
        ShapeError: an image that the patch does not divide.

    Source: Shi et al. 2016, arXiv 1609.05158 (the inverse of their pixel shuffle).

    >>> Patchify2d((1, 2))(torch.arange(4.0).view(1, 1, 1, 4))
    tensor([[[[0., 2.]],
    <BLANKLINE>
             [[1., 3.]]]])
    """

    def __init__(self, patch_size: Size2d) -> None:
        super().__init__()
        self.patch_size = pair(self, "patch_size", patch_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        ph, pw = self.patch_size
        if x.dim() < 3 or x.shape[-2] % ph or x.shape[-1] % pw:
            raise ShapeError(
                f"Patchify2d: patch_size={self.patch_size} does not divide the image of an input of shape "
                f"{tuple(x.shape)}; expected (N, C, H, W), H a multiple of {ph} and W of {pw}: crop or pad the image"
            )
        return rearrange(x, "... c (h a) (w b) -> ... (c a b) h w", a=ph, b=pw)

    def lipschitz_bound(self) -> float:
        return 1.0

    def extra_repr(self) -> str:
        return f"patch_size={self.patch_size}"
