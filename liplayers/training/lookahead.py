"""Lookahead (Zhang et al. 2019, arXiv 1907.08610), around any optimizer of torch's interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from liplayers.errors import ArgumentError
from liplayers.training.manifold import ManifoldOptimizer

__all__ = ["Lookahead"]


class Lookahead(Optimizer):
    r"""After every `every` steps of an inner optimizer, goes back to a slow copy φ that has moved part of the way.

        φ ← φ + α·(θ − φ),   θ ← φ

    The same may be done before each validation and at the end of each epoch (`synchronize`, which the training command
    calls): what is evaluated and saved is then φ. The inner optimizer's moments are kept. Under `ManifoldAdamW` or
    `ManifoldMuon` the orthogonal parameters are retracted afterwards, since their mean is not orthogonal; it costs as
    much as ten steps.

    Args:
        params: parameters or groups of them.
        inner: (params, lr=…) → optimizer.
        lr: its learning rate, which schedules change.
        every: steps between two moves of φ, the paper's k.
        alpha: within (0, 1]; 1 is the inner optimizer alone.
        sync: whether `synchronize` does anything.

    Raises:
        ArgumentError: a setting out of range.

    Source: Zhang et al. 2019, arXiv 1907.08610.

    >>> weight = torch.nn.Parameter(torch.tensor(1.0))
    >>> optimizer = Lookahead([weight], torch.optim.SGD, lr=0.1, every=1, alpha=0.5)
    >>> weight.backward()
    >>> optimizer.step()
    >>> round(weight.item(), 4)
    0.95
    """

    def __init__(
        self,
        params: Any,
        inner: Callable[..., Optimizer],
        lr: float = 1e-3,
        every: int = 5,
        alpha: float = 0.5,
        sync: bool = False,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ArgumentError(f"Lookahead: every={every!r}; expected an integer of at least 1")
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= 1:
            raise ArgumentError(f"Lookahead: alpha={alpha!r}; expected a number in (0, 1]")
        if not isinstance(sync, bool):
            raise ArgumentError(f"Lookahead: sync={sync!r}; expected True or False")
        self.inner = inner(params, lr=lr)
        self.every, self.alpha, self.sync = every, alpha, sync
        self.steps = self.synchronized = 0
        super().__init__(self.inner.param_groups, self.inner.defaults)
        self._share_groups()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["slow"] = p.detach().clone()

    def _share_groups(self) -> None:
        """A schedule sets the rates in our groups; they are the inner optimizer's."""
        self.param_groups = self.inner.param_groups

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of the inner optimizer, and a move of φ where it is due."""
        loss = self.inner.step(closure)  # type: ignore[arg-type]
        self.steps += 1
        if self.steps % self.every == 0:
            self._move()
        return loss

    @torch.no_grad()
    def synchronize(self) -> None:
        """Move φ and go back to it, where `sync` asks for it; nothing when called again before the next step."""
        if self.sync and self.synchronized != self.steps:
            self._move()
            self.synchronized = self.steps

    def _move(self) -> None:
        for p, state in self.state.items():
            p.copy_(state["slow"].lerp_(p, self.alpha))
        if isinstance(self.inner, ManifoldOptimizer):
            self.inner.retract()

    def state_dict(self) -> dict[str, Any]:
        return {
            "inner": self.inner.state_dict(),
            "slow": [self.state[p]["slow"] for group in self.param_groups for p in group["params"]],
            "steps": self.steps,
            "synchronized": self.synchronized,
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict["inner"])
        self._share_groups()
        self.steps = int(state_dict["steps"])
        self.synchronized = int(state_dict.get("synchronized", 0))  # older checkpoints have none
        params = [p for group in self.param_groups for p in group["params"]]
        for p, slow in zip(params, state_dict["slow"], strict=True):
            if slow.shape != p.shape:  # copy_ would repeat a smaller one
                raise ArgumentError(f"Lookahead: a slow copy of shape {tuple(slow.shape)} for {tuple(p.shape)}")
            self.state[p]["slow"].copy_(slow)
