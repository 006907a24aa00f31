"""ℓ2 balls around inputs: (N, *shape) and radii (N,), in float64; their floats lie inside, rounding counted."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "U",
    "at_least_unit_norm",
    "distance",
    "project",
    "random_direction",
    "random_point",
    "rows_like",
    "unit",
    "uphill",
    "within_reach",
]

U = torch.finfo(torch.float64).eps / 2


def distance(inputs: Tensor, points: Tensor) -> Tensor:
    """ℓ2 distances of the rows, (N,): upper bounds, rounding counted, that exceed the distance by about n·u at most.

    >>> distance(torch.zeros(1, 2).double(), torch.tensor([[3.0, 4.0]]).double()).item() >= 5
    True
    """
    difference = (points - inputs).flatten(1).abs()
    largest = difference.amax(1, keepdim=True)  # scaled by it, squares neither overflow nor underflow
    scaled = difference / torch.where(largest > 0, largest, 1.0)
    norm = largest[:, 0] * (scaled.square().sum(1).sqrt() * (1 + (scaled.shape[1] + 8) * U))
    return torch.where(largest[:, 0] == 0, 0.0, norm.nextafter(norm.new_tensor(torch.inf)))


def project(inputs: Tensor, points: Tensor, radius: Tensor) -> Tensor:
    """The points moved straight towards their inputs until `distance` is at most the radius; radius 0 gives the inputs.

    >>> x = torch.zeros(1, 2).double()
    >>> point = project(x, torch.tensor([[3.0, 4.0]]).double(), torch.ones(1).double())
    >>> point.allclose(torch.tensor([[0.6, 0.8]]).double()), distance(x, point).item() <= 1
    (True, True)
    """
    offset = points - inputs
    factor = radius / distance(inputs, points).clamp_min(radius) * (1 - (2 * inputs[0].numel() + 32) * U)
    offset = offset * rows_like(factor, offset)
    nearest = inputs + offset
    # where rounding to nearest left the ball, round each coordinate towards the centre; else there is only the centre
    inner = torch.where((nearest - inputs).abs() > offset.abs(), torch.nextafter(nearest, inputs), nearest)
    result = inputs
    for candidate in (inner, nearest, points):
        result = torch.where(rows_like(distance(inputs, candidate) <= radius, result), candidate, result)
    return result


def rows_like(values: Tensor, like: Tensor) -> Tensor:
    """(N,) → (N, 1, …), to go with (N, *shape)."""
    return values.view(-1, *[1] * (like.dim() - 1))


def unit(vectors: Tensor) -> Tensor:
    """Each row divided by its norm; rows that are zero or not finite give zero."""
    flat = vectors.flatten(1)
    flat = flat / flat.abs().amax(1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)
    flat = flat / flat.norm(dim=1, keepdim=True).clamp_min(1)
    return torch.where(flat.isfinite().all(1, keepdim=True), flat, 0.0).view_as(vectors)


def random_direction(like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform on the unit sphere, one for each row."""
    return unit(torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator))


def uphill(gradient: Tensor, generator: torch.Generator) -> Tensor:
    """The direction of each gradient; a random one where it is zero or not finite."""
    direction = unit(gradient)
    flat = (direction == 0).flatten(1).all(1)
    if flat.any():
        direction = torch.where(rows_like(flat, gradient), random_direction(gradient, generator), direction)
    return direction


def random_point(inputs: Tensor, radius: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform in the ball."""
    share = torch.rand(len(inputs), dtype=inputs.dtype, device=inputs.device, generator=generator)
    length = radius * share ** (1 / inputs[0].numel())
    return project(inputs, inputs + rows_like(length, inputs) * random_direction(inputs, generator), radius)


def within_reach(inputs: Tensor, radius: Tensor) -> Tensor:
    """The radius, at most 1e6·max(1, ‖x‖): larger balls, and infinite ones, are searched out to there."""
    return torch.minimum(radius, 1e6 * at_least_unit_norm(inputs))


def at_least_unit_norm(inputs: Tensor) -> Tensor:
    """max(1, ‖x‖) of each row."""
    return inputs.flatten(1).norm(dim=1).clamp_min(1)
