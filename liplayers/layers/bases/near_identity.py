"""Matrices and kernels around the identity, V = I + d^(−½)·γ·W.

LiResNet and BRONet start each of their d equal layers so (Hu et al. 2023, arXiv 2301.12549; Lai et al. 2025, arXiv
2505.15174): W is a Gaussian of standard deviation 1/(k²·n) with n the rows of V and k × k taps, γ a learned gain of
each row, 1 at first. The layers together start as near the identity as one does, whatever d is, and a step of Adam
moves V less by √d.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liplayers.core.checks import check_positive
from liplayers.errors import ArgumentError

__all__ = ["around_identity", "check_residual_depth", "near_identity", "residual_repr", "start_near_identity_"]


def check_residual_depth(owner: object, depth: int | None, **sizes: int) -> int | None:
    """`depth`, or an ArgumentError where it is no count of layers, or where the two sizes have no identity.

    Args:
        owner: the layer, to be named.
        depth: d, or None where the layer does not start near the identity.
        sizes: its inputs and outputs by name; of a convolution, the channels of the pixel-unshuffled image.
    """
    if depth is None:
        return None
    check_positive(owner, residual_depth=depth)
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise ArgumentError(
            f"{type(owner).__name__}: residual_depth={depth} with {found} (in_channels times the stride's area), "
            f"between which there is no identity; expected as many of both, or residual_depth=None"
        )
    return depth


def near_identity(W: Tensor, gain: Tensor | None = None, *, depth: int | None = None) -> Tensor:
    """I + d^(−½)·γ·W; I + W without a gain.

    Args:
        W: (m, n), or a kernel (m, n, kh, kw), whose identity is the tap at (k − 1)//2.
        gain: γ, (m, 1) or (m, 1, 1, 1), or None.
        depth: d, where there is a gain.

    Returns:
        Of W's shape; its diagonal is as long as the shorter side.

    >>> near_identity(torch.ones(2, 2), gain=torch.tensor([[2.0], [4.0]]), depth=4)
    tensor([[2., 1.],
            [2., 3.]])
    """
    if gain is not None and depth is not None:
        W = W * (gain * depth**-0.5)
    return W + _identity(W)


def around_identity(V: Tensor, gain: Tensor | None = None, *, depth: int | None = None) -> Sequence[Tensor]:
    """The W, and the γ of 1 where there is a gain, with near_identity(W, γ, d) = V."""
    W = V - _identity(V)
    return [W] if gain is None or depth is None else [W * depth**0.5, torch.ones_like(gain, dtype=V.dtype)]


def start_near_identity_(W: Tensor, gain: Tensor) -> None:
    """Fill W and γ as the publications do; ‖V − I‖_F is then about √(r/(n·d))/k for n × r matrices of k × k taps."""
    nn.init.normal_(W, std=1 / (W.shape[0] * math.prod(W.shape[2:])))
    nn.init.ones_(gain)


def residual_repr(depth: int | None) -> str:
    """What a repr adds.

    >>> residual_repr(12)
    ', residual_depth=12'
    """
    return "" if depth is None else f", residual_depth={depth}"


def _identity(like: Tensor) -> Tensor:
    eye = torch.eye(*like.shape[:2], dtype=like.dtype, device=like.device)
    if like.dim() == 2:
        return eye
    pads = [pad for k in like.shape[:1:-1] for pad in ((k - 1) // 2, k // 2)]
    return F.pad(eye[(...,) + (None,) * (like.dim() - 2)], pads)
