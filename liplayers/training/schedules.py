"""Learning-rate schedules: functions (optimizer, total_steps, …) → scheduler, stepped after every batch."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from liplayers.errors import ArgumentError

__all__ = ["constant", "triangular", "warmup_cosine"]


def _check_share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ArgumentError(f"{name}={value!r}; expected a share of the training in [0, 1)")


def constant(optimizer: Optimizer, total_steps: int) -> LambdaLR:
    """The learning rate as given."""
    return LambdaLR(optimizer, lambda step: 1.0)


def warmup_cosine(optimizer: Optimizer, total_steps: int, warmup: float = 0.05, final: float = 0.0) -> LambdaLR:
    """Linear warm-up over the share `warmup` of the steps, then a half cosine down to `final` times the rate.

    Args:
        optimizer: whose learning rate is scheduled.
        total_steps: optimizer steps of the whole training.
        warmup: share of the steps of the rise, in [0, 1).
        final: what the rate ends at, as a multiple of the full one.
    """
    _check_share("warmup", warmup)
    rise = max(1, round(warmup * total_steps))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        done = min(1.0, (step - rise) / max(1, total_steps - rise))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))

    return LambdaLR(optimizer, factor)


def triangular(optimizer: Optimizer, total_steps: int, peak: float = 0.4, final: float = 0.0) -> LambdaLR:
    """Linear rise to the full rate at the share `peak` of the steps, then linear decay to `final` times it.

    Args:
        optimizer: whose learning rate is scheduled.
        total_steps: optimizer steps of the whole training.
        peak: share of the steps of the rise, in [0, 1).
        final: what the rate ends at, as a multiple of the full one.
    """
    _check_share("peak", peak)
    top = max(1, round(peak * total_steps))

    def factor(step: int) -> float:
        if step < top:
            return (step + 1) / top
        return final + (1 - final) * max(0.0, 1 - (step - top) / max(1, total_steps - top))

    return LambdaLR(optimizer, factor)
