"""An optimiser for orthogonal parameters: AdamW in the tangent space (after Hu et al. 2026, arXiv 2601.18513)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from liplayers.errors import ArgumentError
from liplayers.layers.manifold import OrthogonalParameter
from liplayers.linalg.stiefel import nearest_orthogonal, rotate, skew_gradient


class ManifoldAdamW(Optimizer):
    r"""AdamW that moves each `OrthogonalParameter` along its manifold, and treats other parameters as AdamW does.

    For a wide or square X with gradient G (a tall X is taken by its transpose):

        S = (XᵀG − GᵀX)/2,   A = −lr·m̂/(√v̂ + ε),   X ← X·exp(A)

    m̂ and v̂ are Adam's moments of S, entry by entry: A is skew as S is, so X·exp(A) is as orthogonal as X. They live in
    the coordinates A, which are the same at every X: nothing has to be transported. The exponential is cut at order 2,
    3 or 4 for ‖A‖_F up to 0.05, 0.25, 1 and exact beyond; what this leaves is removed by the polar factor after every
    `retract_every` steps, and counted in the layers' bounds in between. There is no weight decay on the manifold.

    A step does not leave the component of the orthogonal group that a square X is in: det X keeps its sign. Matrices
    of one shape are moved together. Per matrix it keeps two square matrices of the longer side. The lookahead that
    reviews of the paper report is left out.

    Args:
        params: parameters or groups of them.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`; lr is about the angle by which a step turns each pair
            of axes.
        retract_every: steps between two retractions of a parameter. One costs as much as ten steps. Without any, norms
            were at most 4e-5 above 1 after 100 steps with lr ≤ 0.02, and 7e-4 with lr 0.1 (squares of 2 to 256).

    Raises:
        ArgumentError: a setting out of range.

    Source: Hu et al. 2026, arXiv 2601.18513 (the facts; no public code); Loshchilov & Hutter 2019, arXiv 1711.05101.

    >>> from liplayers import ManifoldLinear
    >>> layer = ManifoldLinear(6, 4)
    >>> optimizer = ManifoldAdamW(layer.parameters(), lr=0.1)
    >>> layer(torch.ones(6)).sum().backward()
    >>> optimizer.step()
    >>> torch.allclose(layer.weight @ layer.weight.mT, torch.eye(4), atol=1e-2)
    True
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        retract_every: int = 100,
    ) -> None:
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "retract_every": retract_every}
        super().__init__(params, settings)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        _check(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step on every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            plain = [p for p in params if not isinstance(p, OrthogonalParameter)]
            self._adamw(group, plain, plain, [p.grad for p in plain], group["weight_decay"])
            for stack in _of_one_shape(params):
                self._turn(group, stack)
                due = [p for p in stack if int(self.state[p]["step"]) % group["retract_every"] == 0]
                _retract(due)
        return loss

    @torch.no_grad()
    def retract(self) -> None:
        """Put every orthogonal parameter back on its manifold, as after the last step of a training."""
        for group in self.param_groups:
            for stack in _of_one_shape(group["params"]):
                _retract(stack)

    def _turn(self, group: dict[str, Any], stack: list[Tensor]) -> None:
        """X ← X·exp(A) for parameters of one shape."""
        precise = torch.promote_types(stack[0].dtype, torch.float32)
        X = torch.stack([_wide(p) for p in stack]).to(precise)
        G = torch.stack([_wide(p.grad) for p in stack]).to(precise)  # type: ignore[arg-type]
        S = skew_gradient(X, G).to(stack[0].dtype)
        A = torch.zeros_like(S)  # AdamW's step from zero, with S as the gradient, is A
        self._adamw(group, stack, list(A), list(S), weight_decay=0.0)
        _write(stack, rotate(X, A.to(precise)))

    def _adamw(
        self,
        group: dict[str, Any],
        params: Sequence[Tensor],
        values: list[Tensor],
        grads: list[Any],
        weight_decay: float,
    ) -> None:
        """torch's AdamW on `values`, in place, with the state of `params`."""
        if not params:
            return
        for p, value in zip(params, values, strict=True):
            if not self.state[p]:
                zeros = torch.zeros_like(value, memory_format=torch.preserve_format)
                self.state[p] = {"step": torch.tensor(0.0), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
        states = [self.state[p] for p in params]
        adamw(
            values,
            grads,
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            has_complex=any(value.is_complex() for value in values),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=weight_decay,
            eps=group["eps"],
            maximize=False,
        )


def _wide(X: Tensor) -> Tensor:
    return X.mT if X.shape[0] > X.shape[1] else X


def _write(stack: list[Tensor], moved: Tensor) -> None:
    for p, X in zip(stack, moved, strict=True):
        p.copy_(X.mT if p.shape[0] > p.shape[1] else X)


def _retract(stack: list[Tensor]) -> None:
    if stack:
        _write(stack, nearest_orthogonal(torch.stack([_wide(p) for p in stack])))


def _of_one_shape(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The orthogonal parameters, those together that can be stacked."""
    stacks: dict[tuple, list[Tensor]] = {}
    for p in params:
        if isinstance(p, OrthogonalParameter):
            stacks.setdefault((_wide(p).shape, p.dtype, p.device), []).append(p)
    yield from stacks.values()


def _check(group: dict[str, Any]) -> None:
    """Raise ArgumentError for a setting out of range."""

    def refuse(name: str, expected: str) -> None:
        raise ArgumentError(f"ManifoldAdamW: {name}={group[name]!r}; expected {expected}")

    def number(value: Any) -> bool:
        return isinstance(value, (int, float, Tensor)) and not isinstance(value, bool)

    for name in ("lr", "weight_decay"):
        if not (number(group[name]) and group[name] >= 0):
            refuse(name, "a number of at least 0")
    if not (number(group["eps"]) and group["eps"] > 0):
        refuse("eps", "a positive number")  # entries of S may be zero at every step: the diagonal is
    betas = group["betas"]
    if not (
        isinstance(betas, (tuple, list)) and len(betas) == 2 and all(number(beta) and 0 <= beta < 1 for beta in betas)
    ):
        refuse("betas", "two numbers in [0, 1)")
    every = group["retract_every"]
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        refuse("retract_every", "an integer of at least 1")
    for p in group["params"]:
        if isinstance(p, OrthogonalParameter) and p.dim() != 2:
            raise ArgumentError(f"ManifoldAdamW: an OrthogonalParameter of shape {tuple(p.shape)}; expected a matrix")
