"""Optimisers for orthogonal parameters: AdamW in the tangent space (Hu et al. 2026, arXiv 2601.18513), and Muon."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from liplayers.errors import ArgumentError
from liplayers.layers.manifold import OrthogonalParameter
from liplayers.linalg.norms import minus_identity_
from liplayers.linalg.stiefel import fast_polar_factor, nearest_orthogonal, rotate, skew_gradient, tangent

__all__ = ["LARGEST_ANGLE", "ManifoldAdamW", "ManifoldMuon", "ManifoldOptimizer"]

LARGEST_ANGLE = 0.5  # for X − lr·U, norm √(1 + lr²), one Newton–Schulz step leaves little


class ManifoldOptimizer(Optimizer):
    """Moves each `OrthogonalParameter` along its manifold; other parameters get AdamW."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
        except ArgumentError:
            self.param_groups.pop()
            raise

    def _check(self, group: dict[str, Any]) -> None:
        """Raise ArgumentError for a setting or a parameter that cannot be."""
        name = type(self).__name__
        for setting, (holds, expected) in _EXPECTED.items():
            if setting in group and not holds(group[setting]):
                raise ArgumentError(f"{name}: {setting}={group[setting]!r}; expected {expected}")
        for p in group["params"]:
            if isinstance(p, OrthogonalParameter) and p.dim() != 2:
                raise ArgumentError(f"{name}: an OrthogonalParameter of shape {tuple(p.shape)}; expected a matrix")

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
            self._adamw(group, plain, plain, [p.grad for p in plain], self._plain_lr(group), group["weight_decay"])
            for stack in _of_one_shape(params):
                self._turn(group, stack)
        return loss

    @torch.no_grad()
    def retract(self) -> None:
        """Put every orthogonal parameter back on its manifold, as after the last step of a training."""
        for group in self.param_groups:
            for stack in _of_one_shape(group["params"]):
                _retract(stack)

    def _plain_lr(self, group: dict[str, Any]) -> Any:
        """The learning rate of parameters that are not orthogonal."""
        return group["lr"]

    def _turn(self, group: dict[str, Any], stack: list[Tensor]) -> None:
        """One step of orthogonal parameters of one shape."""
        raise NotImplementedError

    def _adamw(
        self,
        group: dict[str, Any],
        params: Sequence[Tensor],
        values: list[Tensor],
        grads: list[Any],
        lr: Any,
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
            lr=lr,
            weight_decay=weight_decay,
            eps=group["eps"],
            maximize=False,
        )


class ManifoldAdamW(ManifoldOptimizer):
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
        lr: learning rate; about the angle, in radians, by which a step turns each pair of axes.
        betas: decay of the means of the gradient and of its square, as in `torch.optim.AdamW`.
        eps: ε, added to the root of the mean square.
        weight_decay: AdamW's, of the parameters that are not orthogonal.
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

    def _turn(self, group: dict[str, Any], stack: list[Tensor]) -> None:
        precise = torch.promote_types(stack[0].dtype, torch.float32)
        X = torch.stack([_wide(p) for p in stack]).to(precise)
        G = torch.stack([_wide(p.grad) for p in stack]).to(precise)  # type: ignore[arg-type]
        S = skew_gradient(X, G).to(stack[0].dtype)
        A = torch.zeros_like(S)  # AdamW's step from zero, with S as the gradient, is A
        self._adamw(group, stack, list(A), list(S), group["lr"], weight_decay=0.0)
        _write(stack, rotate(X, A.to(precise)))
        _retract([p for p in stack if int(self.state[p]["step"]) % group["retract_every"] == 0])


class ManifoldMuon(ManifoldOptimizer):
    r"""Muon on the manifold: turns an `OrthogonalParameter` by about the same angle in all directions it can move in.

    For a wide or square X with gradient G (a tall X is taken by its transpose), and P the projection onto the tangent
    space at X:

        M ← βM + (1 − β)G,   U ≈ P(polar factor of P(βM + (1 − β)G))
        X ← X − lr·U,   X ← X − ½(XXᵀ − I)X

    Where Adam equalises entries of a step, this equalises its singular values: for a square X it is the steepest
    descent under the spectral norm. The last product is one Newton–Schulz step towards the manifold. It leaves no
    singular value above 1, up to rounding, and as the rate falls to 0 none below; the layers' bounds count what there
    is in between. Other parameters get AdamW. The directions of matrices of one shape are found together. Per matrix it
    keeps one of its shape, and a step takes 17 products of its size, all but one of them in bfloat16.

    Args:
        params: parameters or groups of them.
        lr: about the angle of a turn, in radians, at most 0.5; 0.05 to 0.2 suit dense layers.
        momentum: β.
        plain_ratio: AdamW's learning rate for other parameters, as a multiple of lr.
        betas: AdamW's, for other parameters.
        eps: AdamW's ε, for other parameters.
        weight_decay: AdamW's, for other parameters; there is no weight decay on the manifold.
        bfloat16: whether the products run in bfloat16, except the one that finds the distance from the manifold;
            processors without such products are faster with False.

    Raises:
        ArgumentError: a setting out of range.

    Source: Jordan et al. 2024 (Muon); Bernstein 2025 (on the Stiefel manifold); Amsel et al. 2025, arXiv 2505.16932.

    >>> from liplayers import ManifoldLinear
    >>> layer = ManifoldLinear(6, 4)
    >>> optimizer = ManifoldMuon(layer.parameters(), lr=0.1)
    >>> layer(torch.ones(6)).sum().backward()
    >>> optimizer.step()
    >>> torch.allclose(layer.weight @ layer.weight.mT, torch.eye(4), atol=1e-2)
    True
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.1,
        momentum: float = 0.9,
        plain_ratio: float = 0.1,
        betas: Sequence[float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bfloat16: bool = True,
    ) -> None:
        settings = {"lr": lr, "momentum": momentum, "plain_ratio": plain_ratio, "betas": betas, "eps": eps}
        super().__init__(params, settings | {"weight_decay": weight_decay, "bfloat16": bfloat16})

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        self._check_angle(group["lr"])

    def _check_angle(self, lr: Any) -> None:
        if lr > LARGEST_ANGLE:
            raise ArgumentError(f"ManifoldMuon: lr={lr!r}; expected at most {LARGEST_ANGLE}, in radians")

    def _plain_lr(self, group: dict[str, Any]) -> Any:
        return group["lr"] * group["plain_ratio"]

    def _turn(self, group: dict[str, Any], stack: list[Tensor]) -> None:
        self._check_angle(group["lr"])  # a schedule may have raised it
        beta, precise = group["momentum"], torch.promote_types(stack[0].dtype, torch.float32)
        rough = torch.bfloat16 if group["bfloat16"] else precise
        frame = torch.stack([_wide(p).to(rough) for p in stack])
        G = torch.stack([_wide(gradient).to(rough) for gradient in self._nesterov(stack, beta)])
        U = tangent(frame, fast_polar_factor(tangent(frame, G)))
        for p, turn in zip(stack, U, strict=True):
            X = _wide(p).to(precise)  # the parameter itself, unless it is of half precision
            X.sub_(turn, alpha=group["lr"])
            excess = minus_identity_(X @ X.mT).to(rough)  # small, so that what it is multiplied by need not be exact
            X.sub_(excess @ X.to(rough), alpha=0.5)
            if X.dtype != p.dtype:
                _wide(p).copy_(X)

    def _nesterov(self, stack: list[Tensor], beta: float) -> Iterator[Tensor]:
        """Update each gradient's running mean, then yield the gradient moved by β towards that mean."""
        for p in stack:
            if not self.state[p]:
                self.state[p] = {"momentum": torch.zeros_like(p)}
            mean = self.state[p]["momentum"].lerp_(p.grad, 1 - beta)  # type: ignore[arg-type]
            yield torch.lerp(p.grad, mean, beta)  # type: ignore[arg-type]


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


def _number(value: Any) -> bool:
    return isinstance(value, (int, float, Tensor)) and not isinstance(value, bool) and math.isfinite(value)


_EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (lambda x: _number(x) and x >= 0, "a number of at least 0"),
    "weight_decay": (lambda x: _number(x) and x >= 0, "a number of at least 0"),
    "plain_ratio": (lambda x: _number(x) and x >= 0, "a number of at least 0"),
    "momentum": (lambda x: _number(x) and 0 <= x < 1, "a number in [0, 1)"),
    "eps": (lambda x: _number(x) and x > 0, "a positive number"),  # entries of S may be zero at every step
    "betas": (
        lambda x: isinstance(x, (tuple, list)) and len(x) == 2 and all(_number(b) and 0 <= b < 1 for b in x),
        "two numbers in [0, 1)",
    ),
    "retract_every": (lambda x: type(x) is int and x >= 1, "an integer of at least 1"),
    "bfloat16": (lambda x: isinstance(x, bool), "true or false"),
}
