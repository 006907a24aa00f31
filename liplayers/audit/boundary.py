"""Attacks that exploit rounding: points that barely keep their class, and the tiny balls about them.

Source: Jin, Ohrimenko & Rubinstein 2022, arXiv 2205.10159.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from liplayers.audit.attack import (
    Attacked,
    Search,
    attack,
    batches,
    check_counts,
    check_samples,
    linear_distances,
    misclassified,
    seeded,
)
from liplayers.audit.ball import project, random_direction, rows_like, unit, uphill, within_reach

__all__ = ["HALVINGS", "boundary_points", "rounding_attack"]

HALVINGS = (16, 20, 24, 28, 32, 36, 40, 42, 44, 46, 48, 50, 52, 56)  # margins from 1e-5 of the first to its rounding


def boundary_points(
    model: nn.Module, inputs: Tensor, labels: Tensor, *, seed: int = 0, batch_size: int = 256
) -> tuple[Tensor, Tensor]:
    """Points that barely keep their label: margins from 1e-5 of the input's down to their own rounding.

    From each input an attack, in a ball of three times its headroom, looks for a point of another class; the segment
    between them is halved in float64, and the label's end kept after each of `HALVINGS`. Inputs from which nothing is
    found, or whose label is not predicted, give no points.

    Args:
        model: in evaluation mode and float64.
        inputs: (N, *shape), float64, to start from.
        labels: (N,), the true classes.
        seed: of the random numbers.
        batch_size: samples in a batch.

    Returns:
        points (M, *shape) and labels (M,); M may be 0.

    Raises:
        ArgumentError: a model in training mode or not in float64, labels that are no classes.
        ShapeError: tensors of another shape, or labels that are not int64.
        DataError: no samples, or inputs that are not finite.

    >>> model = nn.Linear(2, 2).double().eval()
    >>> x = torch.rand(4, 2).double()
    >>> points, labels = boundary_points(model, x, model(x).argmax(1))
    >>> len(points) == 4 * len(HALVINGS), (model(points).argmax(1) == labels).all().item()
    (True, True)
    """
    check_samples(model, inputs, labels)
    points, kept = [inputs[:0]], [labels[:0]]
    for rows in batches(len(inputs), batch_size, inputs.device):
        with torch.no_grad():
            rows = rows[~misclassified(model(inputs[rows]), labels[rows])]
        if not len(rows):
            continue
        x, y = inputs[rows], labels[rows]
        radius = 3 * linear_distances(model, x, y).amin(1)
        found = attack(model, x, y, radius, methods=("pgd",), restarts=2, seed=seed, batch_size=batch_size)
        ends = _bisect(model, x[found.fallen], found.points[found.fallen], y[found.fallen])
        points += ends
        kept += [y[found.fallen]] * len(ends)
    return torch.cat(points), torch.cat(kept)


@torch.no_grad()
def _bisect(model: nn.Module, inner: Tensor, outer: Tensor, labels: Tensor) -> list[Tensor]:
    kept: list[Tensor] = []
    if not len(inner):
        return kept
    for halving in range(1, max(HALVINGS) + 1):
        middle = inner + (outer - inner) / 2
        outside = rows_like(misclassified(model(middle), labels), inner)
        inner, outer = torch.where(outside, inner, middle), torch.where(outside, middle, outer)
        if halving in HALVINGS:
            kept.append(inner)
    return kept


def rounding_attack(
    model: nn.Module,
    points: Tensor,
    labels: Tensor,
    radius: Tensor,
    *,
    trials: int = 64,
    seed: int = 0,
    batch_size: int = 256,
) -> Attacked:
    """Look in tiny balls for a float64 point of another class, which rounding errors alone may bring about.

    It tries points at and just below the radius along the gradient of the margin, with and without noise, in random
    directions, and changes of single units in the last place.

    Args:
        model: in evaluation mode and float64.
        points: (N, *shape), float64, the centres of the balls.
        labels: (N,), the true classes.
        radius: (N,), float64, one for each sample; what lies beyond 1e6·max(1, ‖x‖) is not searched.
        trials: points that are tried for each centre.
        seed: of the random numbers.
        batch_size: samples in a batch.

    Raises:
        ArgumentError: a model in training mode or not in float64, labels that are no classes, a radius that is negative
            or NaN.
        ShapeError: tensors of another shape; labels that are not int64, or a radius that is not float64.
        DataError: no samples, or inputs that are not finite.

    >>> model = nn.Linear(2, 2).double().eval()
    >>> x = torch.rand(4, 2).double()
    >>> rounding_attack(model, x, model(x).argmax(1), torch.zeros(4).double()).fallen.any().item()
    False
    """
    check_samples(model, points, labels, radius)
    check_counts(trials=trials, batch_size=batch_size)
    generator = seeded(points, seed)
    found = []
    for rows in batches(len(points), batch_size, points.device):
        z, r = points[rows], within_reach(points[rows], radius[rows])
        search = Search(model, z, labels[rows], None, "margin")
        search.evaluate(z)
        ascent = uphill(search.gradient, generator)
        for trial in range(trials):
            if search.done:
                break
            length = rows_like(r * (1 - 0.05 * trial / trials), z)
            search.evaluate(project(z, _nudged(z, ascent, length, trial, generator), r))
        found.append(search.result)
    return Attacked(*(torch.cat(column) for column in zip(*found, strict=True)))


def _nudged(z: Tensor, ascent: Tensor, length: Tensor, trial: int, generator: torch.Generator) -> Tensor:
    """One trial of the rounding attack: of four, two go uphill, one anywhere, one by single units."""
    noise = random_direction(z, generator)
    if trial % 4 == 3:
        chosen = torch.rand(z.shape, dtype=z.dtype, device=z.device, generator=generator) < 2.0 ** -(trial // 4 % 8)
        up = torch.nextafter(z, torch.where(ascent == 0, noise, ascent).sign() * torch.inf)
        return torch.where(chosen, up, z)
    share = (0.0, 0.1, 1.0)[trial % 4]
    return z + length * unit((1 - share) * ascent + share * noise)
