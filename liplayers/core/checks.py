"""Checks of arguments, shapes and dtypes, with their error messages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from liplayers.errors import ArgumentError, ShapeError

__all__ = [
    "DTYPES",
    "Size2d",
    "check_dtype",
    "check_image",
    "check_odd_kernel",
    "check_positive",
    "check_shape",
    "check_share",
    "check_transformed",
    "pair",
]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_positive(owner: object, **sizes: int) -> None:
    """Raise ArgumentError unless every size is an integer of at least 1."""
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            owner_name = getattr(owner, "__name__", type(owner).__name__)
            raise ArgumentError(f"{owner_name}: {name}={value!r}; expected an integer of at least 1")


def check_dtype(owner: object, dtype: torch.dtype | None) -> None:
    """Raise ArgumentError unless parameters of that dtype are real numbers that layers compute with."""
    if dtype is not None and dtype not in DTYPES:
        known = ", ".join(map(str, DTYPES))
        raise ArgumentError(f"{type(owner).__name__}: dtype={dtype!r}; expected one of {known}")


def check_shape(owner: object, name: str, value: Tensor, expected: Sequence[int]) -> None:
    """Raise ShapeError unless a parameter has the shape that it was made with: others may broadcast."""
    if tuple(value.shape) != tuple(expected):
        raise ShapeError(
            f"{type(owner).__name__}: {name} is of shape {tuple(value.shape)}; expected {tuple(expected)}, "
            f"as constructed: build a new layer"
        )


def check_share(owner: object, name: str, value: float, low: float, high: float) -> None:
    """Raise ArgumentError unless a number lies within [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ArgumentError(f"{type(owner).__name__}: {name}={value!r}; expected a number from {low:g} to {high:g}")


Size2d = int | tuple[int, int]


def pair(owner: object, name: str, value: Size2d, least: int) -> tuple[int, int]:
    """`value` as two integers of at least `least`, or an ArgumentError that names it."""
    values = value if isinstance(value, (tuple, list)) else (value, value)
    if len(values) != 2 or any(isinstance(v, bool) or not isinstance(v, int) or v < least for v in values):
        raise ArgumentError(
            f"{type(owner).__name__}: {name}={value!r}; expected an integer of at least {least} or a pair of them"
        )
    return values[0], values[1]


def check_image(owner: object, x: Tensor, channels: int) -> None:
    """Raise ShapeError unless x is an image, or a batch of them, of so many channels."""
    if x.dim() not in (3, 4) or x.shape[-3] != channels:
        raise ShapeError(
            f"{type(owner).__name__}: got an input of shape {tuple(x.shape)}; expected (N, {channels}, H, W) "
            f"or ({channels}, H, W)"
        )


def check_transformed(owner: object, x: Tensor, dtype: torch.dtype) -> None:
    """Raise ArgumentError for an image of another dtype: a transform of integers would be rounded to integers again."""
    if x.dtype != dtype and not (x.is_floating_point() and torch.is_autocast_enabled(x.device.type)):
        raise ArgumentError(
            f"{type(owner).__name__}: got an input of {x.dtype}, its parameters are of {dtype}; cast one to the other"
        )


def check_odd_kernel(owner: object, kernel_size: int) -> None:
    """Raise ArgumentError unless a kernel of this size keeps the size of an image with padding (k − 1)/2."""
    check_positive(owner, kernel_size=kernel_size)
    if kernel_size % 2 == 0:
        raise ArgumentError(f"{type(owner).__name__}: kernel_size={kernel_size}; expected an odd number")
