"""Weight decay of kernels alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn
from torch.optim import Optimizer

__all__ = ["kernel_decay"]


def kernel_decay(
    params: Iterable[nn.Parameter], inner: Callable[..., Optimizer], lr: float = 1e-3, weight_decay: float = 0.0
) -> Optimizer:
    """An optimizer that decays kernels, parameters of two dimensions or more, and no biases, multipliers or scales.

    Args:
        params: of the model.
        inner: (groups of parameters, lr=…) → optimizer, which knows `weight_decay` in a group.
        lr: its learning rate.
        weight_decay: of kernels, as `inner` takes it. Keras' l2(λ) is 2λ of torch's SGD, whose gradient is that of
            half the square.

    >>> import torch
    >>> model = nn.Linear(3, 2)
    >>> optimizer = kernel_decay(model.parameters(), torch.optim.SGD, lr=0.1, weight_decay=1e-3)
    >>> [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
    [(1, 0.001), (1, 0.0)]
    """
    every = list(params)
    kernels = [p for p in every if p.dim() > 1]
    others = [p for p in every if p.dim() < 2]
    groups = [{"params": kernels, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return inner(groups, lr=lr)
