"""Many small models trained as one batched computation, each exactly as if alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state

from liplayers.core.checks import check_positive
from liplayers.errors import ArgumentError
from liplayers.losses import OffsetCrossEntropy, offset_cross_entropy
from liplayers.training.schedules import warmup_cosine


@dataclass(frozen=True)
class Recipe:
    """How every model of every method is trained: Adam, linear warm-up, half a cosine down to 0.

    Args:
        steps: on every set, whatever its size.
        batch_size: at most; a set with fewer training rows takes all of them at each step.
        lr: learning rate after the warm-up.
        offset, temperature: of the loss, `liplayers.OffsetCrossEntropy`.
        betas: of Adam.
        warmup: share of the steps.

    Raises:
        ArgumentError: a value out of its range.
    """

    steps: int = 300
    batch_size: int = 256
    lr: float = 0.01
    offset: float = 1.0
    temperature: float = 0.5
    betas: tuple[float, float] = (0.9, 0.99)
    warmup: float = 0.1

    def __post_init__(self) -> None:
        check_positive(self, steps=self.steps, batch_size=self.batch_size)
        OffsetCrossEntropy(self.offset, self.temperature)
        for name, value, least, most in (("lr", self.lr, 0, math.inf), ("warmup", self.warmup, 0, 1)):
            if not least < value < most:
                raise ArgumentError(f"Recipe: {name}={value!r}; expected a number above {least} and below {most}")


def shuffled_batches(rows: Tensor, batch_size: int, steps: int, generator: torch.Generator) -> Tensor:
    """(steps, batch_size) of `rows`: epochs, each in an order of its own, one after another, cut into batches.

    >>> rows = torch.tensor([4, 7, 9])
    >>> shuffled_batches(rows, 3, 2, torch.Generator().manual_seed(0)).sort().values
    tensor([[4, 7, 9],
            [4, 7, 9]])
    """
    epochs = math.ceil(steps * batch_size / len(rows))
    order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(epochs)])
    return rows[order[: steps * batch_size]].view(steps, batch_size)


def train_together(
    models: Sequence[nn.Module], features: Tensor, labels: Tensor, batches: Tensor, recipe: Recipe
) -> None:
    """Train models of one architecture in place, each on its own batches.

    Their parameters are stacked, gradients are taken model by model under `torch.vmap`, and Adam works entry by entry,
    so that no model knows of the others.

    Args:
        features: (N, d), in the dtype of the models.
        labels: (N,).
        batches: (steps, models, batch), row numbers.
    """
    stacked, buffers = stack_module_state(list(models))  # type: ignore[arg-type]
    parameters = {name: p.detach() for name, p in stacked.items()}
    skeleton = copy.deepcopy(models[0])

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        logits = functional_call(skeleton, (parameters, buffers), (x,))
        return offset_cross_entropy(logits, y, recipe.offset, recipe.temperature)

    gradients = torch.vmap(grad(loss))
    optimizer = torch.optim.Adam(parameters.values(), lr=recipe.lr, betas=recipe.betas)
    schedule = warmup_cosine(optimizer, recipe.steps, recipe.warmup)
    for rows in batches:
        for name, gradient in gradients(parameters, buffers, features[rows], labels[rows]).items():
            parameters[name].grad = gradient
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        for i, model in enumerate(models):
            for name, p in model.named_parameters():
                p.copy_(parameters[name][i])
