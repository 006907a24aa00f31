"""The certified radius of a prediction, from logits and the Lipschitz constants of their differences."""

from __future__ import annotations

import math
import re
from fractions import Fraction

import torch
from torch import Tensor

from liplayers.errors import ArgumentError, ShapeError, UnknownNameError

__all__ = [
    "NORMS",
    "certified_accuracy",
    "certified_radius",
    "flip_radii",
    "in_norm",
    "label_radius",
    "parse_radius",
    "slack_radius",
    "target_radii",
]

NORMS = ("l2", "l1", "linf")

_NUMBER = re.compile(r"\s*-?[\d.]{1,30}(e[+-]?\d{1,3})?(\s*/\s*\d{1,30})?\s*", re.ASCII)  # short: "1e999999999" is not


def certified_radius(logits: Tensor, margin_lipschitz: Tensor, logit_error: Tensor | None = None) -> Tensor:
    r"""The ℓ2 radius within which no input changes the predicted class.

    R = min_{j≠y} (m_j(1 − 4u) − 2(e_y + e_j))/L_yj·(1 − 8u), floored at 0; y = argmax f, m_j = f_y − f_j, u the unit
    roundoff of the logits' dtype. Ties and logits that are not finite give 0. It is a proof where the logits are exact
    up to `logit_error`.

    Args:
        logits: (N, K), K ≥ 2.
        margin_lipschitz: (K, K), L_yj the Lipschitz constant of f_y − f_j.
        logit_error: (N, K), proven bounds e on the rounding error of each logit; None takes 0.

    Returns:
        (N,), in the norm of the input; infinite where the prediction cannot change.

    Source: Li et al. 2019 and Tsuzuku et al. 2018 (arXiv 1802.04034), per pair as in Singla et al. 2022 (2108.04062).

    >>> certified_radius(torch.tensor([[3.0, 1.0], [1.0, 1.0]]), torch.tensor([[0.0, 2.0], [2.0, 0.0]]))
    tensor([1.0000, 0.0000])
    """
    _check("certified_radius", logits, margin_lipschitz, logit_error)
    return _kept(logits, logits.argmax(1), 1, margin_lipschitz, logit_error)


def label_radius(
    logits: Tensor, labels: Tensor, k: int, margin_lipschitz: Tensor, logit_error: Tensor | None = None
) -> Tensor:
    r"""The ℓ2 radius within which each label stays among the k largest logits; 0 where it is not among them.

    With R_j = (m_j(1 − 4u) − 2(e_y + e_j))/L_yj·(1 − 8u), m_j = f_y − f_j, it is the k-th smallest R_j: for y to leave,
    k other logits have to reach it, of which one has to move by the k-th smallest at least.

    Args:
        logits: (N, K), K > k.
        labels: (N,), int64.
        k: at least 1; 1 gives the radius of the prediction where the label is predicted.
        margin_lipschitz: (K, K), L_yj the Lipschitz constant of f_y − f_j.
        logit_error: (N, K), proven bounds e on the rounding error of each logit; None takes 0.

    >>> logits, label, constants = torch.tensor([[1.0, 3.0, 0.5]]), torch.tensor([0]), 1 - torch.eye(3)
    >>> [round(label_radius(logits, label, k, constants).item(), 3) for k in (1, 2)]
    [0.0, 0.5]
    """
    _check("label_radius", logits, margin_lipschitz, logit_error)
    if not 0 < k < logits.shape[1]:
        raise ArgumentError(f"k={k}: expected at least 1 and less than the {logits.shape[1]} classes")
    return _kept(logits, labels, k, margin_lipschitz, logit_error)


def target_radii(logits: Tensor, margin_lipschitz: Tensor, logit_error: Tensor | None = None) -> Tensor:
    r"""For each class j the ℓ2 radius within which no input is predicted as j, (N, K); 0 for the prediction itself.

    R_j = max_{i≠j} ((f_i − f_j)(1 − 4u) − 2(e_i + e_j))/L_ij·(1 − 8u): as long as one logit is above f_j, j is not
    predicted.

    Args:
        logits: (N, K), K ≥ 2.
        margin_lipschitz: (K, K), L_ij the Lipschitz constant of f_i − f_j.
        logit_error: (N, K), proven bounds e on the rounding error of each logit; None takes 0.

    >>> target_radii(torch.tensor([[3.0, 1.0, 2.0]]), 1 - torch.eye(3)).round(decimals=3)
    tensor([[0., 2., 1.]])
    """
    _check("target_radii", logits, margin_lipschitz, logit_error)
    classes = torch.arange(logits.shape[1])
    columns = []
    for j in classes.tolist():  # (N, K) at a time
        margin = (logits - logits[:, j : j + 1]) * (1 - 2 * torch.finfo(logits.dtype).eps)
        if logit_error is not None:
            margin = margin - 2 * (logit_error + logit_error[:, j : j + 1])
        constants = margin_lipschitz.to(logits)[:, j].expand_as(logits)
        columns.append(_ratio(margin, constants).masked_fill(classes.to(logits.device) == j, -math.inf).amax(1))
    return _floored(torch.stack(columns, 1), torch.isfinite(logits).all(1, keepdim=True))


def slack_radius(slack: Tensor, lipschitz: Tensor | float, error: Tensor | float = 0.0) -> Tensor:
    r"""The ℓ2 radius within which a value stays above 0: R = (s(1 − 4u) − 2e)/L·(1 − 8u), floored at 0.

    The value is s here and s' at an input x', |s' − s| ≤ L‖x' − x‖ + 2e; for the sign of a logit f it is |f|.

    Args:
        slack: s, computed with a relative error of at most 2u.
        lipschitz: L, of the exact value, of a shape that broadcasts.
        error: e, of the value as it is evaluated.

    Returns:
        As `slack`; infinite where L = 0 and the slack is positive; 0 where the slack is NaN or infinite.

    >>> slack_radius(torch.tensor([1.0, -1.0, torch.nan]), 2.0)
    tensor([0.5000, 0.0000, 0.0000])
    """
    left = slack * (1 - 2 * torch.finfo(slack.dtype).eps)
    left = left - 2 * torch.as_tensor(error, dtype=slack.dtype, device=slack.device)
    constants = torch.as_tensor(lipschitz, dtype=slack.dtype, device=slack.device).expand_as(slack)
    return _floored(_ratio(left, constants), torch.isfinite(slack))


def flip_radii(margins: Tensor, lipschitz: float, error: Tensor | float = 0.0) -> Tensor:
    r"""When each pixel of a segmentation may be lost, (N, P): within the ℓ2 radius r fewer than k pixels of a sample
    change, where k of its radii are at least r, counted from the largest; so at most as many as have a radius below r.

    A pixel changes only if its own logits move by m/√2 at least, and all pixels share one budget: k of them cost
    c_k = m_(1)²/2 + … + m_(k)²/2 at least, of the smallest k, and ‖f̂(x') − f̂(x)‖ ≤ L‖x' − x‖ + 2E. The pixel with the
    k-th smallest margin gets R_k = (√c_k(1 − (P + 8)u) − 2E)/L·(1 − 8u), floored at 0.

    Args:
        margins: (N, P), m of each pixel, f_y − max_{j≠y} f_j; ∞ for one that does not count.
        lipschitz: L, of all logits of a sample jointly.
        error: E, (N, 1), bounds ‖f̂ − f‖ over all logits of a sample, here and in the ball.

    >>> flip_radii(torch.tensor([[3.0, 1.0, torch.inf]]).double(), 1.0).round(decimals=4)
    tensor([[2.2361, 0.7071, 0.0000]], dtype=torch.float64)
    """
    u = torch.finfo(margins.dtype).eps / 2
    counted = margins.isfinite()
    cost = torch.where(counted, margins.clamp_min(0), 0.0)
    scale = cost.amax(1, keepdim=True)
    scale = torch.where(scale > 0, scale, 1.0)  # whose square may be no float
    # what does not count comes last, where it adds to nobody
    order = cost.masked_fill(~counted, math.inf).argsort(1)
    root = ((cost / scale).square() / 2).gather(1, order).cumsum(1).sqrt() * scale
    root = torch.empty_like(root).scatter(1, order, root) * (1 - (margins.shape[1] + 8) * u)
    slack = torch.where(counted & (margins > 0), root, 0.0)
    return slack_radius(slack, lipschitz, torch.as_tensor(error, dtype=margins.dtype).expand_as(margins))


def in_norm(radius: Tensor, norm: str, features: int) -> Tensor:
    """What an ℓ2 radius proves in another norm, rounded down: R in ℓ1, R/√d in ℓ∞.

    Proof: ‖δ‖₂ ≤ ‖δ‖₁, and ‖δ‖₂ ≤ √d‖δ‖_∞.

    Args:
        radius: in ℓ2, of any shape.
        norm: "l2", "l1" or "linf".
        features: d, how many numbers an input has.

    >>> in_norm(torch.tensor([1.0]).double(), "linf", 64).round(decimals=6).item()
    0.125
    """
    if norm not in NORMS:
        raise UnknownNameError.of("norm", norm, NORMS)
    if norm != "linf" or features == 1:
        return radius
    return radius / math.sqrt(features) * (1 - 4 * torch.finfo(radius.dtype).eps)


def _check(name: str, logits: Tensor, margin_lipschitz: Tensor, logit_error: Tensor | None) -> None:
    if logits.dim() != 2 or logits.shape[1] < 2 or margin_lipschitz.shape != (logits.shape[1],) * 2:
        raise ShapeError(
            f"{name}: got logits {tuple(logits.shape)} and margin_lipschitz "
            f"{tuple(margin_lipschitz.shape)}; expected (N, K) with K ≥ 2 and (K, K)"
        )
    if not logits.is_floating_point():
        raise ArgumentError(f"{name}: logits are {logits.dtype}; expected floating-point numbers")
    if logit_error is not None and logit_error.shape != logits.shape:
        raise ShapeError(
            f"{name}: logit_error is {tuple(logit_error.shape)}, expected {tuple(logits.shape)} as the logits"
        )


def _kept(logits: Tensor, classes: Tensor, k: int, margin_lipschitz: Tensor, logit_error: Tensor | None) -> Tensor:
    """The k-th smallest radius of the pairs of each class, (N,)."""
    rows = classes[:, None]
    u = torch.finfo(logits.dtype).eps / 2
    margin = (logits.gather(1, rows) - logits) * (1 - 4 * u)
    if logit_error is not None:
        margin = margin - 2 * (logit_error.gather(1, rows) + logit_error)
    ratio = _ratio(margin, margin_lipschitz.to(logits)[classes]).scatter(1, rows, math.inf)
    smallest = ratio.amin(1) if k == 1 else ratio.kthvalue(k, 1).values
    return _floored(smallest, torch.isfinite(logits).all(1))


def _ratio(margin: Tensor, constants: Tensor) -> Tensor:
    """margin/L; where L = 0 the difference is constant, so it keeps its sign whatever the input; a negative or NaN L
    proves nothing."""
    constant = (constants == 0) & (margin > 0)
    return torch.where(constants > 0, margin / constants, torch.where(constant, math.inf, 0.0))


def _floored(ratio: Tensor, finite: Tensor) -> Tensor:
    """The radius with the rounding of its formula taken off, at least 0; 0 where outputs are not finite."""
    info = torch.finfo(ratio.dtype)
    radius = (ratio * (1 - 4 * info.eps)).clamp_min(0)
    radius = torch.where(radius >= 2.0**30 * info.tiny, radius, 0.0)  # no relative errors below
    return torch.where(finite & ~radius.isnan(), radius, 0.0)


def certified_accuracy(radius: Tensor, correct: Tensor, epsilon: float) -> float:
    """The share of points that are predicted rightly with R ≥ ε, ε rounded up to the next float.

    Args:
        radius: (N,).
        correct: (N,), booleans.
        epsilon: the radius ε.

    Raises:
        ShapeError: other shapes, or `correct` of numbers.

    >>> certified_accuracy(torch.tensor([1.0, 0.5]), torch.tensor([True, True]), 0.7)
    0.5
    """
    if radius.dim() != 1 or correct.shape != radius.shape or correct.dtype != torch.bool:
        raise ShapeError(
            f"certified_accuracy: got radius {tuple(radius.shape)} and correct {tuple(correct.shape)} of "
            f"{correct.dtype}; expected (N,) and (N,) of torch.bool"
        )
    threshold = math.nextafter(epsilon, math.inf)
    return (correct & (radius.double() >= threshold)).double().mean().item()


def parse_radius(value: float | int | str) -> float:
    """A radius from a number or a string such as "36/255", rounded up where the quotient is not a float.

    Raises:
        ArgumentError: negative, not finite, or not a number.

    >>> parse_radius("1/4"), parse_radius(0.5)
    (0.25, 0.5)
    """
    try:
        if isinstance(value, bool) or (isinstance(value, str) and not _NUMBER.fullmatch(value)):
            raise ValueError
        exact = Fraction(value.replace(" ", "")) if isinstance(value, str) else Fraction(value)
        nearest = float(exact)
    except (ValueError, TypeError, ZeroDivisionError, OverflowError):
        raise ArgumentError(f"eps={value!r} is not a radius; expected a number ≥ 0 such as 0.5 or 36/255") from None
    if exact < 0:
        raise ArgumentError(f"eps={value!r} is negative; a radius is at least 0")
    return nearest if Fraction(nearest) >= exact else math.nextafter(nearest, math.inf)
