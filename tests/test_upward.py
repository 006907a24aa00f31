"""Arithmetic rounded upward: never below the exact result, and the least float that is not."""

import math
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from liplayers.linalg import upward

floats = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(min_value=0, allow_nan=False, allow_infinity=False)
exactly = settings(max_examples=300, deadline=None, derandomize=True)


def assert_least_above(result: float, exact: Fraction) -> None:
    if result == math.inf:
        assert exact > Fraction(1.7976931348623157e308)
    else:
        assert Fraction(result) >= exact
        below = math.nextafter(result, -math.inf)
        assert below == -math.inf or Fraction(below) < exact


@exactly
@given(st.lists(floats, max_size=6))
@example([1 + 2**-52] * 300)
@example([1e200, 1e200, 1e-200])
@example([5e-324, 0.5])
def test_products_and_sums_are_the_least_float_not_below(numbers: list[float]):
    assert_least_above(upward.product(*numbers), math.prod(map(Fraction, numbers), start=Fraction(1)))
    assert_least_above(upward.total(*numbers), sum(map(Fraction, numbers), start=Fraction(0)))


@exactly
@given(floats, floats.filter(bool))
def test_quotients_are_the_least_float_not_below(a: float, b: float):
    assert_least_above(upward.quotient(a, b), Fraction(a) / Fraction(b))


@exactly
@given(st.lists(positive, max_size=4))
@example([5e-324])
@example([3.0, 4.0])
@example([1.7976931348623157e308] * 4)
def test_roots_are_the_least_float_not_below(numbers: list[float]):
    square = sum((Fraction(x) ** 2 for x in numbers), start=Fraction(0))
    for result, exact in (
        (upward.hypot(*numbers), square),
        (upward.root(sum(numbers[:1])), Fraction(sum(numbers[:1]))),
    ):
        if result == math.inf:
            assert exact > Fraction(1.7976931348623157e308) ** 2
        else:
            assert Fraction(result) ** 2 >= exact
            assert not result or Fraction(math.nextafter(result, 0)) ** 2 < exact


def test_many_factors_near_one_are_not_below_their_product_where_floats_are():
    factors = [1 + k * 2.0**-52 for k in range(1, 500)]
    exact = math.prod(map(Fraction, factors))
    assert Fraction(math.prod(factors)) < exact
    assert exact <= Fraction(upward.product(*factors)) < exact * (1 + Fraction(1, 2**52))


@pytest.mark.parametrize("function", [upward.product, upward.total, upward.hypot, upward.quotient])
def test_nan_stays_nan_and_infinity_infinite(function):
    for other in (0.0, 1.0, -1.0, math.inf, math.nan):
        assert math.isnan(function(math.nan, other))
        assert math.isnan(function(other, math.nan))
    assert function(math.inf, 2.0) == math.inf
    assert upward.product(math.inf, 1e-300, 1e-300) == math.inf
    assert upward.quotient(1, math.inf) == 0
    assert math.isnan(upward.root(math.nan))
    assert math.isnan(upward.root(-1.0))
    assert upward.root(Fraction(10) ** 700) == math.inf
