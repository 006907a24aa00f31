"""Arithmetic on Python numbers with one rounding at the end, to the least float that is not below the exact result.

What is a float comes out exactly: product(1.0, 3.0) is 3.0. Infinity counts as a number too large for a float, and NaN
stays NaN.
"""

from __future__ import annotations

import math
import sys
from fractions import Fraction

__all__ = ["Number", "hypot", "product", "quotient", "root", "total"]

Number = float | Fraction


def product(*factors: Number) -> float:
    """x_1·x_2·…, rounded up; 1 for none.

    >>> product(1.0, 3.0), product(0.1, 0.1) > 0.01
    (3.0, True)
    """
    if not all(map(_finite, factors)):
        # the size of a finite factor does not matter, and must not overflow or vanish
        return math.prod((1.0 if x > 0 else -1.0) if _finite(x) and x else float(x) for x in factors)
    return _rounded(math.prod((Fraction(x) for x in factors), start=Fraction(1)))


def total(*terms: Number) -> float:
    """x_1 + x_2 + …, rounded up; 0 for none.

    >>> total(1.0, 1e-30) > 1, total(0.1, 0.2) >= 0.1 + 0.2
    (True, True)
    """
    if not all(map(_finite, terms)):
        return sum(float(x) if not _finite(x) else 0.0 for x in terms)
    return _rounded(sum((Fraction(x) for x in terms), start=Fraction(0)))


def quotient(numerator: Number, denominator: Number) -> float:
    """x/y, rounded up; ∞ for a positive x over 0.

    >>> quotient(1, 4), quotient(1, 6) > 1 / 6, quotient(1, 0)
    (0.25, True, inf)
    """
    if not (_finite(numerator) and _finite(denominator)):
        return float(numerator) / float(denominator) if denominator else float(numerator)
    if not denominator:
        return math.copysign(math.inf, numerator) if numerator else math.nan
    return _rounded(Fraction(numerator) / Fraction(denominator))


def root(x: Number) -> float:
    """√x, rounded up; NaN below 0.

    >>> root(9.0), root(2) ** 2 > 2
    (3.0, True)
    """
    if not _finite(x) or x < 0:
        return math.inf if x > 0 else math.nan
    numerator, denominator = Fraction(x).as_integer_ratio()
    bits = denominator.bit_length() + 64  # then √x·2^bits has 64 bits at least, and is an integer where √x is a float
    scaled = -(-numerator * 4**bits // denominator)
    integer = math.isqrt(scaled)
    return _rounded(Fraction(integer + (integer**2 < scaled), 2**bits))


def hypot(*terms: Number) -> float:
    """√(x_1² + x_2² + …), rounded up; 0 for none.

    >>> hypot(3.0, 4.0), hypot(1e200, 1e200) < 1.5e200
    (5.0, True)
    """
    if not all(map(_finite, terms)):
        return math.nan if any(x != x for x in terms) else math.inf
    return root(sum((Fraction(x) ** 2 for x in terms), start=Fraction(0)))


def _finite(x: Number) -> bool:
    return not isinstance(x, float) or math.isfinite(x)  # math would make a float of a fraction, however large


def _rounded(x: Fraction) -> float:
    try:
        nearest = float(x)
    except OverflowError:
        return math.inf if x > 0 else -sys.float_info.max
    return nearest if Fraction(nearest) >= x else math.nextafter(nearest, math.inf)
