"""The certified radius of a prediction, from logits and the Lipschitz constants of their differences."""

from __future__ import annotations

import math
import re
from fractions import Fraction

import torch
from torch import Tensor

from liplayers.errors import ArgumentError, ShapeError

__all__ = ["certified_accuracy", "certified_radius", "parse_radius"]

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
    if logits.dim() != 2 or logits.shape[1] < 2 or margin_lipschitz.shape != (logits.shape[1],) * 2:
        raise ShapeError(
            f"certified_radius: got logits {tuple(logits.shape)} and margin_lipschitz "
            f"{tuple(margin_lipschitz.shape)}; expected (N, K) with K ≥ 2 and (K, K)"
        )
    if not logits.is_floating_point():
        raise ArgumentError(f"certified_radius: logits are {logits.dtype}; expected floating-point numbers")
    if logit_error is not None and logit_error.shape != logits.shape:
        raise ShapeError(
            f"certified_radius: logit_error is {tuple(logit_error.shape)}, expected {tuple(logits.shape)} as the logits"
        )
    u = torch.finfo(logits.dtype).eps / 2
    prediction = logits.argmax(1, keepdim=True)
    margin = (logits.gather(1, prediction) - logits) * (1 - 4 * u)
    if logit_error is not None:
        margin = margin - 2 * (logit_error.gather(1, prediction) + logit_error)
    constants = margin_lipschitz.to(logits)[prediction[:, 0]]
    # L = 0: the difference is constant, so it keeps its sign whatever the input; a negative or NaN L proves nothing
    constant = (constants == 0) & (margin > 0)
    ratio = torch.where(constants > 0, margin / constants, torch.where(constant, math.inf, 0.0))
    ratio = ratio.scatter(1, prediction, math.inf)
    radius = (ratio.amin(1) * (1 - 8 * u)).clamp_min(0)
    radius = torch.where(radius >= 2.0**30 * torch.finfo(radius.dtype).tiny, radius, 0.0)  # no relative errors below
    return torch.where(torch.isfinite(logits).all(1) & ~radius.isnan(), radius, 0.0)


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
