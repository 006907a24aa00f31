"""Layers that add or subtract an offset: a learned position embedding, and centering by a running mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from liplayers.core.checks import check_dtype, check_positive, check_shape
from liplayers.core.module import LipschitzModule
from liplayers.errors import ArgumentError, ShapeError

__all__ = ["BatchCentering", "PositionEmbedding"]


class PositionEmbedding(LipschitzModule):
    r"""Add a learned offset of the shape of one input: y = x + p, an isometry for every p.

    Distances between inputs are kept exactly; norms are not. Cost: one addition. Signal gain at initialisation: 1
    (p = 0).

    Args:
        shape: of one input without the batch dimension, (C, H, W) for an image.
        device: of the parameter `position`.
        dtype: of the parameter `position`.

    Shape:
        (N, *shape) → the same.

    Raises:
        ArgumentError: a shape that is empty or not of positive integers.
        ShapeError: an input of another shape; a broadcast would not be an isometry.

    Source: Hu et al. 2026, arXiv 2601.18513.

    >>> PositionEmbedding((3, 4, 4))(torch.ones(2, 3, 4, 4)).shape
    torch.Size([2, 3, 4, 4])
    """

    constant_estimate = True  # whatever the offset is

    def __init__(
        self,
        shape: Sequence[int],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(shape, Sequence) or isinstance(shape, str) or not shape:
            raise ArgumentError(f"PositionEmbedding: shape={shape!r}; expected the sizes of one input, as (C, H, W)")
        check_positive(self, **{f"shape[{i}]": size for i, size in enumerate(shape)})
        check_dtype(self, dtype)
        self.shape = tuple(shape)
        self.position = nn.Parameter(torch.empty(self.shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """No offset."""
        nn.init.zeros_(self.position)

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != self.shape:
            expected = ", ".join(map(str, self.shape))
            raise ShapeError(f"PositionEmbedding: got an input of shape {tuple(x.shape)}; expected (N, {expected})")
        check_shape(self, "position", self.position, self.shape)
        return x + self.position.to(x.dtype)

    def lipschitz_bound(self) -> float:
        return 1.0

    def extra_repr(self) -> str:
        return f"shape={self.shape}"


class BatchCentering(LipschitzModule):
    r"""Subtract the mean of each channel: y = x − m, m the batch's mean in training, its running average in eval.

    With `bias` a learned offset b of each channel is added, which one before the layer could not do: y = x − m + b.

    No variance is divided out, so both are contractions. In eval m is constant: a shift, an isometry of each sample. In
    training y = (I − 11ᵀ/M)x in each channel, over the M entries of the batch: an orthogonal projection of the whole
    batch. There the bound is about the batch as one vector: a change of one sample also moves the others, but all
    of it together is at most as long as that change. It composes with layers that treat each sample by itself, since
    those have the same bound for a batch. The mean is taken in float32 at least.

    m ← (1 − momentum)·m + momentum·(mean of the batch) after each batch in training, from 0. Cost: one mean and one
    subtraction. Signal gain at initialisation: 1 for channels of mean 0 (training) or any (eval, up to the shift).

    Args:
        channels: C.
        momentum: the weight of the newest batch, in [0, 1].
        device: of the buffer `running_mean` and of b.
        dtype: of the buffer `running_mean` and of b.
        bias: whether b is there.

    Shape:
        (N, C, *) → the same.

    Raises:
        ArgumentError: channels below 1, momentum outside [0, 1].
        ShapeError: an input with another number of channels.

    Source: centering in BRONet, Lai et al. 2025, arXiv 2505.15174; the running mean as in Ioffe & Szegedy 2015,
    arXiv 1502.03167.

    >>> BatchCentering(2)(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    tensor([[-1., -2.],
            [ 1.,  2.]])
    """

    constant_estimate = True  # whatever the offset is
    running_mean: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        channels: int,
        momentum: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = False,
    ) -> None:
        super().__init__()
        check_positive(self, channels=channels)
        if not isinstance(momentum, (int, float)) or not 0 <= momentum <= 1:
            raise ArgumentError(f"BatchCentering: momentum={momentum!r}; expected a number in [0, 1]")
        check_dtype(self, dtype)
        self.channels = channels
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype)) if bias else None

    def reset_parameters(self) -> None:
        """A running mean of zero, no bias."""
        nn.init.zeros_(self.running_mean)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() < 2 or x.shape[1] != self.channels:
            raise ShapeError(
                f"BatchCentering: got an input of shape {tuple(x.shape)}; expected (N, {self.channels}, …)"
            )
        check_shape(self, "running_mean", self.running_mean, (self.channels,))
        # not detached: the gradient is that of the projection that ran, without a part along the mean, which it removes
        mean = self._batch_mean(x) if self.training and x.numel() else self.running_mean
        if self.bias is not None:
            check_shape(self, "bias", self.bias, (self.channels,))
            mean = mean - self.bias
        return (x - mean.view(-1, *[1] * (x.dim() - 2))).to(x.dtype)

    def _batch_mean(self, x: Tensor) -> Tensor:
        others = [d for d in range(x.dim()) if d != 1]
        mean = x.mean(others, dtype=torch.promote_types(x.dtype, torch.float32))
        with torch.no_grad():
            self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), self.momentum)
        return mean

    def lipschitz_bound(self) -> float:
        return 1.0

    def extra_repr(self) -> str:
        return f"channels={self.channels}, momentum={self.momentum}" + ("" if self.bias is None else ", bias=True")
