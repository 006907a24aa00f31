"""Losses for certified training, each as a function and a module.

Logits are (N, K), targets (N,) class indices; every loss is the mean over the batch. `margin_lipschitz` is the (K, K)
matrix of Lipschitz constants of the logit differences f_y − f_j (`liplayers.split_head(…).margin_lipschitz(K)`), in
the norm of the pixels; radii `epsilon` are in that norm.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liplayers.errors import ArgumentError


def _one_hot(target: Tensor, logits: Tensor) -> Tensor:
    """As `F.one_hot`, which torch.func.vmap does not take."""
    return (target[:, None] == torch.arange(logits.shape[1], device=target.device)).to(logits.dtype)


def offset_cross_entropy(logits: Tensor, target: Tensor, offset: float, temperature: float) -> Tensor:
    r"""t·CE((f − u·onehot(y))/t, y): cross-entropy after the true logit has been lowered by an offset.

    Args:
        offset: u ≥ 0, in units of the logits; larger offsets trade clean accuracy for larger margins.
        temperature: t > 0.

    Source: Prach & Lampert 2022, arXiv 2208.03160.

    >>> logits = torch.tensor([[3.0, 0.0]])
    >>> round(offset_cross_entropy(logits, torch.tensor([0]), offset=3.0, temperature=1.0).item(), 4)
    0.6931
    """
    shifted = logits - offset * _one_hot(target, logits)
    return temperature * F.cross_entropy(shifted / temperature, target)


def emma_logits(logits: Tensor, target: Tensor, margin_lipschitz: Tensor, epsilon: float) -> Tensor:
    r"""Logits relative to the true one, each raised by what an adversary of radius ε_j·ε can gain on it.

    z_j = f_j − f_y, m_j = L_yj, ε_j = clip(−z_j/(ε m_j), 0.01, 1) detached; returns z_j + ε_j·ε·m_j.

    Source: Hu et al. 2023, arXiv 2301.12549.
    """
    z = logits - logits.gather(1, target[:, None])
    m = margin_lipschitz.to(logits)[target]
    share = (-z / (epsilon * m).clamp_min(torch.finfo(z.dtype).tiny)).clamp(0.01, 1).detach()
    return z + share * epsilon * m


def emma(logits: Tensor, target: Tensor, margin_lipschitz: Tensor, epsilon: float) -> Tensor:
    """EMMA, efficient margin maximisation: cross-entropy of `emma_logits`.

    Args:
        margin_lipschitz: (K, K); gradients flow through it to the head.
        epsilon: > 0, the radius to train for.

    Source: Hu et al. 2023, arXiv 2301.12549.

    >>> logits = torch.tensor([[3.0, 0.0]])
    >>> round(emma(logits, torch.tensor([0]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]), epsilon=3.0).item(), 4)
    0.6931
    """
    return F.cross_entropy(emma_logits(logits, target, margin_lipschitz, epsilon), target)


def logit_annealing(
    logits: Tensor, target: Tensor, temperature: float = 0.75, offset: float = 2.0, exponent: float = 5.0
) -> Tensor:
    r"""T(1 − p_y)^β(−log p_y), p = softmax((f − ξ·onehot(y))/T): the pull on a point fades as its margin grows.

    Args:
        temperature: T > 0. offset: ξ. exponent: β ≥ 0; 0 is the offset cross-entropy.

    Source: Lai et al. 2025, arXiv 2505.15174 (its code's ξ = 2; its text gives 2√2).

    >>> logits = torch.tensor([[3.0, 0.0]])
    >>> round(logit_annealing(logits, torch.tensor([0]), 1.0, 3.0, 1.0).item(), 4)
    0.3466
    """
    shifted = (logits - offset * _one_hot(target, logits)) / temperature
    log_p = shifted.log_softmax(1).gather(1, target[:, None])[:, 0]
    # expm1: 1 − p_y keeps its relative accuracy, and its gradient stays finite, as p_y approaches 1
    complement = (-torch.expm1(log_p)).clamp_min(torch.finfo(log_p.dtype).tiny)
    return (temperature * complement**exponent * -log_p).mean()


class MarginLoss(nn.Module):
    """Base of the losses that also take `margin_lipschitz`: forward(logits, target, margin_lipschitz)."""

    epsilon: float


class CrossEntropy(nn.Module):
    """`torch.nn.functional.cross_entropy`; forward(logits, target)."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target)


class OffsetCrossEntropy(nn.Module):
    """`offset_cross_entropy` as a module; forward(logits, target).

    >>> OffsetCrossEntropy(offset=3.0, temperature=1.0)
    OffsetCrossEntropy(offset=3.0, temperature=1.0)
    """

    def __init__(self, offset: float = 1.0, temperature: float = 0.25) -> None:
        super().__init__()
        self.offset = _number(self, "offset", offset, least=0)
        self.temperature = _number(self, "temperature", temperature, above=0)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return offset_cross_entropy(logits, target, self.offset, self.temperature)

    def extra_repr(self) -> str:
        return f"offset={self.offset}, temperature={self.temperature}"


class EMMA(MarginLoss):
    """`emma` as a module; forward(logits, target, margin_lipschitz). `epsilon` may be changed during training."""

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self.epsilon = _number(self, "epsilon", epsilon, above=0)

    def forward(self, logits: Tensor, target: Tensor, margin_lipschitz: Tensor) -> Tensor:
        return emma(logits, target, margin_lipschitz, self.epsilon)

    def extra_repr(self) -> str:
        return f"epsilon={self.epsilon}"


class LogitAnnealing(MarginLoss):
    """`logit_annealing` on EMMA's logits, as BRONet trains; epsilon = 0 takes the plain logits.

    Source: Lai et al. 2025, arXiv 2505.15174.
    """

    def __init__(
        self, temperature: float = 0.75, offset: float = 2.0, exponent: float = 5.0, epsilon: float = 0.0
    ) -> None:
        super().__init__()
        self.temperature = _number(self, "temperature", temperature, above=0)
        self.offset = _number(self, "offset", offset, least=0)
        self.exponent = _number(self, "exponent", exponent, least=0)
        self.epsilon = _number(self, "epsilon", epsilon, least=0)

    def forward(self, logits: Tensor, target: Tensor, margin_lipschitz: Tensor) -> Tensor:
        if self.epsilon:
            logits = emma_logits(logits, target, margin_lipschitz, self.epsilon)
        return logit_annealing(logits, target, self.temperature, self.offset, self.exponent)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, offset={self.offset}, exponent={self.exponent}, epsilon={self.epsilon}"


def _number(owner: nn.Module, name: str, value: float, least: float | None = None, above: float | None = None) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or (least is not None and value < least)
        or (above is not None and value <= above)
    ):
        wanted = f"at least {least}" if above is None else f"above {above}"
        raise ArgumentError(f"{type(owner).__name__}: {name}={value!r}; expected a finite number {wanted}")
    return float(value)
