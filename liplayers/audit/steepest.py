"""Lower bounds of Lipschitz constants: the steepest difference quotient found. It must not exceed what is proven."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from liplayers.audit.attack import (
    batches,
    check_counts,
    check_inputs,
    check_samples,
    gradient_of,
    margin_loss,
    nearest_classes,
    seeded,
)
from liplayers.audit.ball import at_least_unit_norm, distance, random_direction, rows_like, uphill

__all__ = ["ROUNDING", "SCALES", "Steepest", "lipschitz_lower_bound", "margin_ratio_lower_bound"]

SCALES = (1e-3, 1e-1, 1.0)  # of difference quotients, times max(1, ‖x‖): evaluation errors, 1e-15, stay negligible
ROUNDING = 1e-9  # of the largest Lipschitz constant: what difference quotients at these scales may err by


class Steepest(NamedTuple):
    """The pair of inputs with the largest difference quotient found, and that quotient."""

    quotient: float
    x: Tensor
    other: Tensor


def lipschitz_lower_bound(
    function: Callable[[Tensor], Tensor], inputs: Tensor, *, steps: int = 30, seed: int = 0, batch_size: int = 256
) -> Steepest:
    """The largest ‖f(x) − f(x′)‖/‖x − x′‖ found by ascent from the inputs, as evaluated, with the pair that has it.

    Power iteration with finite steps t·max(1, ‖x‖), t = 1e-3, 0.1 and 1: x′ ← x + t·∇/‖∇‖, ∇ the gradient of
    ‖f(x) − f(x′)‖ in x′; then x and x′ change places. For linear f it is the power iteration on JᵀJ.

    Args:
        function: (N, *shape) → (N, *any), row by row, in float64.
        inputs: (N, *shape), float64, to start from.
        steps: steps of the ascent from each input.
        seed: of the random numbers.
        batch_size: samples in a batch.

    >>> model = nn.Linear(3, 3, bias=False).double()
    >>> bound = lipschitz_lower_bound(model, torch.rand(4, 3).double(), steps=100)
    >>> abs(bound.quotient / torch.linalg.matrix_norm(model.weight, 2).item() - 1) < 1e-6
    True
    """
    check_inputs(inputs)
    check_counts(steps=steps, batch_size=batch_size)
    generator = seeded(inputs, seed)
    found = [_steepest(function, inputs[r], steps, generator) for r in batches(len(inputs), batch_size, inputs.device)]
    quotient, x, other = (torch.cat(column) for column in zip(*found, strict=True))
    best = int(quotient.argmax())
    return Steepest(quotient[best].item(), x[best], other[best])


def _steepest(
    function: Callable[[Tensor], Tensor], inputs: Tensor, steps: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """The largest quotient found from each input, (N,), and its pair."""
    best, best_x, best_other = torch.zeros_like(inputs.flatten(1)[:, 0]), inputs, inputs
    for scale in SCALES:
        length = rows_like(scale * at_least_unit_norm(inputs), inputs)
        x, other = inputs, inputs + length * random_direction(inputs, generator)
        for _ in range(steps):
            with torch.enable_grad():
                moving = other.detach().requires_grad_()
                change = (function(moving) - function(x).detach()).reshape(len(x), -1).norm(dim=1)
                gradient = gradient_of(change, moving)
            quotient = change.detach() / distance(x, other)
            better = quotient.isfinite() & (quotient > best)
            mask = rows_like(better, inputs)
            best = torch.where(better, quotient, best)
            best_x, best_other = torch.where(mask, x, best_x), torch.where(mask, other, best_other)
            x, other = x + length * uphill(gradient, generator), x
    return best, best_x, best_other


def margin_ratio_lower_bound(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    margin_lipschitz: Tensor,
    *,
    steps: int = 10,
    classes: int = 9,
    seed: int = 0,
    batch_size: int = 256,
) -> Steepest:
    """The largest (|m_j(x) − m_j(x′)|/‖x − x′‖)/L_yj found, m_j = f_y − f_j: above 1 it refutes a constant L_yj.

    For each input y is its label, and j runs over its nearest classes; the search is that of `lipschitz_lower_bound`.
    1e-9·max L is added to each L_yj, for the rounding of the evaluation.

    Args:
        model: in evaluation mode and float64.
        inputs: (N, *shape), float64, to start from.
        labels: (N,), the true classes.
        margin_lipschitz: (K, K), the constants to refute.
        steps: steps of the ascent from each input.
        classes: how many of the nearest classes are tried.
        seed: of the random numbers.
        batch_size: samples in a batch.

    >>> model, x = nn.Linear(2, 2).double().eval(), torch.rand(3, 2).double()
    >>> L = torch.cdist(model.weight, model.weight)
    >>> ratio = margin_ratio_lower_bound(model, x, torch.zeros(3).long(), L).quotient
    >>> 0.999999 < ratio <= 1
    True
    """
    check_samples(model, inputs, labels)
    check_counts(steps=steps, batch_size=batch_size)
    generator = seeded(inputs, seed)
    constants = margin_lipschitz.to(inputs)
    constants = constants + ROUNDING * constants.nan_to_num(0.0, 0.0).max()
    found = []
    for rows in batches(len(inputs), batch_size, inputs.device):
        x, y = inputs[rows], labels[rows]
        for targets in nearest_classes(model, x, y, classes):

            def margin(points: Tensor, y: Tensor = y, j: Tensor = targets) -> Tensor:
                return margin_loss(model(points), y, j)

            quotient, *pair = _steepest(margin, x, steps, generator)
            # a constant that is NaN, like one of 0 with a slope, proves nothing
            ratio = torch.where(quotient > 0, quotient / constants[y, targets], 0.0).nan_to_num(torch.inf, torch.inf)
            found.append((ratio, *pair))
    ratio, x, other = (torch.cat(column) for column in zip(*found, strict=True))
    best = int(ratio.argmax())
    return Steepest(ratio[best].item(), x[best], other[best])
