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

__all__ = [
    "EMMA",
    "HKR",
    "CertificateRegularization",
    "CrossEntropy",
    "GloRoTrades",
    "LogitAnnealing",
    "MarginLoss",
    "MultiMargin",
    "OffsetCrossEntropy",
    "RadiusLoss",
    "certificate_regularization",
    "emma",
    "emma_logits",
    "gloro_trades",
    "hkr",
    "logit_annealing",
    "multi_margin",
    "offset_cross_entropy",
]


def _one_hot(target: Tensor, logits: Tensor) -> Tensor:
    """As `F.one_hot`, which torch.func.vmap does not take."""
    return (target[:, None] == torch.arange(logits.shape[1], device=target.device)).to(logits.dtype)


def offset_cross_entropy(logits: Tensor, target: Tensor, offset: float, temperature: float) -> Tensor:
    r"""t·CE((f − u·onehot(y))/t, y): cross-entropy after the true logit has been lowered by an offset.

    Args:
        logits: (N, K).
        target: (N,), the true classes.
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

    Args:
        logits: (N, K).
        target: (N,), the true classes.
        margin_lipschitz: (K, K), the constants of f_y − f_j.
        epsilon: the radius to train for, above 0.

    Source: Hu et al. 2023, arXiv 2301.12549.
    """
    z = logits - logits.gather(1, target[:, None])
    m = margin_lipschitz.to(logits)[target]
    share = (-z / (epsilon * m).clamp_min(torch.finfo(z.dtype).tiny)).clamp(0.01, 1).detach()
    return z + share * epsilon * m


def emma(logits: Tensor, target: Tensor, margin_lipschitz: Tensor, epsilon: float) -> Tensor:
    """EMMA, efficient margin maximisation: cross-entropy of `emma_logits`.

    Args:
        logits: (N, K).
        target: (N,), the true classes.
        margin_lipschitz: (K, K), the constants of f_y − f_j; gradients flow through it to the head.
        epsilon: the radius to train for, above 0.

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
        logits: (N, K).
        target: (N,), the true classes.
        temperature: T > 0.
        offset: ξ, in units of the logits.
        exponent: β ≥ 0; 0 is the offset cross-entropy.

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


def certificate_regularization(logits: Tensor, target: Tensor, margin_lipschitz: Tensor, gamma: float) -> Tensor:
    r"""CE(f, y) − γ·mean relu(R), R = min_{j≠y} (f_y − f_j)/L_yj: pays for the radius of points classified rightly.

    Args:
        logits: (N, K).
        target: (N,), the true classes.
        margin_lipschitz: (K, K), the constants of f_y − f_j; gradients flow through it to the head.
        gamma: γ ≥ 0, per unit of radius. A larger γ buys radius on points that are right already, at the price of
            points near the border, whose cross-entropy then counts less: lower clean, higher certified accuracy at
            large radii.

    Source: Singla et al. 2022, arXiv 2108.04062.

    >>> logits = torch.tensor([[3.0, 0.0], [3.0, 0.0]])
    >>> constants = torch.tensor([[0.0, 1.5], [1.5, 0.0]])
    >>> loss = certificate_regularization(logits, torch.tensor([0, 1]), constants, gamma=0.1)
    >>> round((loss - F.cross_entropy(logits, torch.tensor([0, 1]))).item(), 4)  # radii 2 and none
    -0.1
    """
    differences = logits.gather(1, target[:, None]) - logits
    m = margin_lipschitz.to(logits)[target].clamp_min(torch.finfo(logits.dtype).tiny)
    radius = (differences / m).masked_fill(_one_hot(target, logits).bool(), torch.inf).amin(1)
    return F.cross_entropy(logits, target) - gamma * radius.relu().mean()


def multi_margin(logits: Tensor, target: Tensor, margin: float) -> Tensor:
    r"""(1/K)·Σ_{j≠y} relu(u − (f_y − f_j)): a hinge on every margin of the true class.

    Args:
        logits: (N, K).
        target: (N,), the true classes.
        margin: u > 0, in units of the logits. A point adds nothing once all its margins reach u, so u sets the radius
            trained for, u/L: larger ones trade clean accuracy for certified accuracy at larger radii.

    Source: Crammer & Singer 2001, summed over the classes; `torch.nn.functional.multi_margin_loss`.

    >>> multi_margin(torch.tensor([[3.0, 0.0, 2.0]]), torch.tensor([0]), margin=2.5)
    tensor(0.5000)
    """
    return F.multi_margin_loss(logits, target, margin=margin)


def hkr(logits: Tensor, target: Tensor, hinge: float, margin: float) -> Tensor:
    r"""Hinge-regularised Kantorovich–Rubinstein, one class against all others: mean over the classes k of

        mean(f_k | y ≠ k) − mean(f_k | y = k) + λ·mean relu(m − s_k·f_k),   s_k = 1 where y = k, else −1

    The first two terms are −W₁, estimated by a 1-Lipschitz f_k: they are left out for a class that all samples of the
    batch have, or none. It is the paper's multi-class loss divided by K. With several processes, each takes its own
    means.

    Args:
        logits: (N, K).
        target: (N,), the true classes.
        hinge: λ ≥ 0. Small ones maximise the mean margin whatever becomes of single points; large ones (10 – 100) ask
            for the margin m on every point, for accuracy.
        margin: m > 0, in units of the logits; larger ones trade clean for certified accuracy at larger radii.

    Source: Serrurier et al. 2021, arXiv 2006.06520.

    >>> logits = torch.tensor([[1.0, -1.0], [0.5, 0.5]])
    >>> hkr(logits, torch.tensor([0, 1]), hinge=2.0, margin=1.0)  # KR −1, hinge 1/2
    tensor(0.)
    """
    member = _one_hot(target, logits)
    inside, outside = member.sum(0), (1 - member).sum(0)
    difference = ((1 - member) * logits).sum(0) / outside.clamp_min(1) - (member * logits).sum(0) / inside.clamp_min(1)
    transport = (difference * ((inside > 0) & (outside > 0))).mean()
    return transport + hinge * (margin - (2 * member - 1) * logits).relu().mean()


def gloro_trades(logits: Tensor, target: Tensor, margin_lipschitz: Tensor, epsilon: float, trade_off: float) -> Tensor:
    r"""CE(f, y) + λ·KL(softmax(f, −∞) ‖ softmax(f, ⊥)), ⊥ = max_{j≠i} (f_j + ε·L_ij), i the predicted class.

    ⊥ is the logit that a perturbation of radius ε could bring another class to; the divergence is −log(1 − p_⊥).

    Args:
        logits: (N, K).
        target: (N,), the true classes.
        margin_lipschitz: (K, K), the constants of f_y − f_j; gradients flow through it to the head.
        epsilon: the radius to train for, above 0.
        trade_off: λ ≥ 0. 0 is cross-entropy; larger ones give up clean accuracy for predictions, right or wrong, that
            hold within ε.

    Source: Leino et al. 2021, arXiv 2102.08452.

    >>> logits = torch.tensor([[3.0, 0.0]])
    >>> constants = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> loss = gloro_trades(logits, torch.tensor([0]), constants, epsilon=3.0, trade_off=1.0)
    >>> round((loss - F.cross_entropy(logits, torch.tensor([0]))).item(), 4)  # log((e³ + 1 + e³)/(e³ + 1))
    0.6691
    """
    predicted = logits.argmax(1)
    raised = logits + epsilon * margin_lipschitz.to(logits)[predicted]
    bottom = raised.masked_fill(_one_hot(predicted, logits).bool(), -torch.inf).amax(1)
    divergence = F.softplus(bottom - logits.logsumexp(1))
    return F.cross_entropy(logits, target) + trade_off * divergence.mean()


class MarginLoss(nn.Module):
    """Base of the losses that also take `margin_lipschitz`: forward(logits, target, margin_lipschitz)."""


class RadiusLoss(MarginLoss):
    """Base of those that train for a radius, `epsilon`, which may be changed during training."""

    epsilon: float


class CrossEntropy(nn.Module):
    """`torch.nn.functional.cross_entropy`; forward(logits, target)."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target)


class OffsetCrossEntropy(nn.Module):
    """`offset_cross_entropy` as a module; forward(logits, target).

    Args:
        offset: u ≥ 0, in units of the logits; larger offsets trade clean accuracy for larger margins.
        temperature: t > 0.

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


class EMMA(RadiusLoss):
    """`emma` as a module; forward(logits, target, margin_lipschitz).

    Args:
        epsilon: the radius to train for, above 0.
    """

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self.epsilon = _number(self, "epsilon", epsilon, above=0)

    def forward(self, logits: Tensor, target: Tensor, margin_lipschitz: Tensor) -> Tensor:
        return emma(logits, target, margin_lipschitz, self.epsilon)

    def extra_repr(self) -> str:
        return f"epsilon={self.epsilon}"


class LogitAnnealing(RadiusLoss):
    """`logit_annealing` on EMMA's logits, as BRONet trains; epsilon = 0 takes the plain logits.

    Args:
        temperature: T > 0.
        offset: ξ ≥ 0, in units of the logits.
        exponent: β ≥ 0; 0 is the offset cross-entropy.
        epsilon: the radius to train for, at least 0; 0 takes the plain logits.

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


class CertificateRegularization(MarginLoss):
    """`certificate_regularization` as a module; forward(logits, target, margin_lipschitz).

    Args:
        gamma: γ ≥ 0, per unit of radius; larger ones trade clean accuracy for large radii.
    """

    def __init__(self, gamma: float = 0.1) -> None:
        super().__init__()
        self.gamma = _number(self, "gamma", gamma, least=0)

    def forward(self, logits: Tensor, target: Tensor, margin_lipschitz: Tensor) -> Tensor:
        return certificate_regularization(logits, target, margin_lipschitz, self.gamma)

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}"


class MultiMargin(nn.Module):
    """`multi_margin` as a module; forward(logits, target).

    Args:
        margin: u > 0, in units of the logits; larger ones trade clean for certified accuracy.
    """

    def __init__(self, margin: float = 1.0) -> None:
        super().__init__()
        self.margin = _number(self, "margin", margin, above=0)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return multi_margin(logits, target, self.margin)

    def extra_repr(self) -> str:
        return f"margin={self.margin}"


class HKR(nn.Module):
    """`hkr` as a module; forward(logits, target).

    Args:
        hinge: λ ≥ 0; large ones (10 – 100) ask for the margin on every point.
        margin: m > 0, in units of the logits; larger ones trade clean for certified accuracy at larger radii.
    """

    def __init__(self, hinge: float = 10.0, margin: float = 1.0) -> None:
        super().__init__()
        self.hinge = _number(self, "hinge", hinge, least=0)
        self.margin = _number(self, "margin", margin, above=0)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return hkr(logits, target, self.hinge, self.margin)

    def extra_repr(self) -> str:
        return f"hinge={self.hinge}, margin={self.margin}"


class GloRoTrades(RadiusLoss):
    """`gloro_trades` as a module; forward(logits, target, margin_lipschitz).

    Args:
        epsilon: the radius to train for, above 0.
        trade_off: λ ≥ 0; larger ones trade clean for certified accuracy.
    """

    def __init__(self, epsilon: float, trade_off: float = 1.0) -> None:
        super().__init__()
        self.epsilon = _number(self, "epsilon", epsilon, above=0)
        self.trade_off = _number(self, "trade_off", trade_off, least=0)

    def forward(self, logits: Tensor, target: Tensor, margin_lipschitz: Tensor) -> Tensor:
        return gloro_trades(logits, target, margin_lipschitz, self.epsilon, self.trade_off)

    def extra_repr(self) -> str:
        return f"epsilon={self.epsilon}, trade_off={self.trade_off}"


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
