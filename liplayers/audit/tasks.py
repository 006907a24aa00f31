"""Attacks on the certificates of any task, through the slack that must stay positive in each ball."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from liplayers.audit.attack import batches, gradient_of, seeded
from liplayers.audit.ball import project, random_point, rows_like, uphill, within_reach
from liplayers.certification.certificates import Certificates
from liplayers.certification.network import CertifiedNetwork
from liplayers.certification.tasks import Segmentation, Task

__all__ = ["SHARES", "TaskAudit", "audit_task"]

SHARES = (0.0, 0.25, 0.5, 0.75, 0.999)  # of the pixels that have a radius: which of their radii samples are attacked at


@dataclass(frozen=True)
class TaskAudit:
    """What attacks on certificates found.

    Attributes:
        task: its name.
        certified: how many radii were attacked, each at its own size.
        fallen: how many of these an attack refuted.
        nearest: the least share of its slack that an attack left; 0 would be a tight certificate, below it fell.
        index: (F, 2), sample and output of the first that fell.
        adversarial: (F, *shape), the points that they fell at.
    """

    task: str
    certified: int
    fallen: int
    nearest: float
    index: Tensor
    adversarial: Tensor

    @property
    def holds(self) -> bool:
        """Whether nothing was refuted."""
        return self.fallen == 0

    def summary(self) -> dict[str, Any]:
        """Plain numbers for a report, without the points themselves."""
        plain = {key: value for key, value in asdict(self).items() if key not in ("index", "adversarial")}
        return {"holds": self.holds, **plain, "refuted": self.index.tolist()}


def audit_task(
    network: CertifiedNetwork,
    task: Task,
    inputs: Tensor,
    certificates: Certificates,
    *,
    steps: int = 50,
    seed: int = 0,
    batch_size: int = 256,
    progress: Callable[[int, int], object] | None = None,
) -> TaskAudit:
    """Try to refute every radius of a task by projected gradient descent of its slack, each in its own ball.

    Of a segmentation each sample is attacked at some of the radii of its pixels: as many right pixels as have at least
    that radius must stay.

    Args:
        network: in float64.
        task: that the certificates are of.
        inputs: (N, *shape), float64.
        certificates: of these inputs.
        steps: gradient steps of each of two runs, of which the second starts at a random point.
        seed: of the random numbers.
        batch_size: samples in a batch.
        progress: called with the number of outputs that are done, and of all.

    >>> from liplayers import AOLLinear
    >>> from liplayers.certification.tasks import Binary
    >>> network, x = CertifiedNetwork(AOLLinear(2, 1), (2,)), torch.rand(4, 2).double()
    >>> found = Binary().certificates(network.outputs(x), torch.ones(4).long())
    >>> audit_task(network, Binary(), x, found, steps=5).holds
    True
    """
    generator = seeded(inputs, seed)
    outputs = 1 if certificates.radius.dim() == 1 else certificates.radius.shape[1]
    stages = len(SHARES) if isinstance(task, Segmentation) else outputs
    certified, nearest = 0, float("inf")
    fallen: list[tuple[int, int]] = []
    points: list[Tensor] = []
    for stage in range(stages):
        radius, need = _aim(task, certificates, stage)
        for rows in batches(len(inputs), batch_size, inputs.device):
            rows = rows[(radius[rows.cpu()] > 0).to(rows.device)]
            if not len(rows):
                continue
            chosen = rows.cpu()
            part = certificates.part(chosen)
            attacked = _descend(
                network,
                _slack(task, part, stage, need[chosen]),
                inputs[rows],
                radius[chosen].to(inputs),
                steps,
                generator,
            )
            certified += len(rows)
            nearest = min(nearest, attacked.left.amin().item())
            for i in (attacked.slack <= 0).nonzero()[:, 0].tolist():
                fallen.append((int(rows[i]), stage))
                points.append(attacked.points[i].cpu())
        if progress is not None:
            progress(stage + 1, stages)
    return TaskAudit(
        task.name,
        certified,
        len(fallen),
        nearest,
        torch.tensor(fallen[:100]).reshape(-1, 2),
        torch.stack(points[:100]) if points else inputs[:0].cpu(),
    )


def _aim(task: Task, certificates: Certificates, stage: int) -> tuple[Tensor, Tensor]:
    """The radius to attack each sample at, (N,), 0 for none, and how many right pixels must be left there."""
    radius = certificates.radius
    if not isinstance(task, Segmentation):
        wanted = radius if radius.dim() == 1 else radius[:, stage]
        if certificates.counted is not None:
            wanted = torch.where(certificates.counted[:, stage], wanted, 0.0)
        return wanted, torch.zeros(len(radius), dtype=torch.long)
    ordered = radius.sort(1).values
    have = (ordered > 0).sum(1)
    place = ordered.shape[1] - have + (SHARES[stage] * have).long()
    aim = ordered.gather(1, place.clamp_max(ordered.shape[1] - 1)[:, None])[:, 0]
    return aim, (radius >= aim[:, None]).sum(1)


def _slack(
    task: Task, certificates: Certificates, stage: int, need: Tensor
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """outputs → what must stay positive, (N,), and what to descend."""
    if not isinstance(task, Segmentation):

        def of_one(values: Tensor) -> tuple[Tensor, Tensor]:
            slack = task.slack(values, certificates)
            one = slack if slack.dim() == 1 else slack[:, stage]
            return one, one

        return of_one
    right = certificates.correct

    def of_pixels(values: Tensor) -> tuple[Tensor, Tensor]:
        margins = task.slack(values, certificates)
        kept = right.to(margins.device)
        left = ((margins > 0) & kept).sum(1) - need.to(margins.device)
        # the pixels that are cheapest to lose: one more than may be lost, with those that are lost already
        cheapest = margins.masked_fill(~kept, torch.inf).sort(1).values
        aim = (right.sum(1) - need + 1).to(margins.device)
        chosen = torch.arange(cheapest.shape[1], device=margins.device) < aim[:, None]
        return left.to(margins) + 0.5, torch.where(chosen, cheapest, 0.0).clamp_min(-1e-9).sum(1)

    return of_pixels


@dataclass
class _Attacked:
    points: Tensor
    slack: Tensor
    left: Tensor


def _descend(
    network: CertifiedNetwork,
    slack: Callable[[Tensor], tuple[Tensor, Tensor]],
    inputs: Tensor,
    radius: Tensor,
    steps: int,
    generator: torch.Generator,
) -> _Attacked:
    """The point with the least slack found in each ball, and the share that it has of that at the centre."""
    radius = within_reach(inputs, radius)
    step = rows_like(radius, inputs) * 2.5 / steps
    best = torch.full_like(radius, torch.inf)
    best_points = inputs
    for run in range(2):
        points = inputs if run == 0 else random_point(inputs, radius, generator)
        for _ in range(steps + 1):
            with torch.enable_grad():
                moving = points.detach().requires_grad_()
                left, aim = slack(network(moving))
                gradient = gradient_of(aim, moving)
            left = torch.where(left.detach().isfinite(), left.detach(), -torch.inf)
            if run == 0 and points is inputs:
                start = left
            better = left < best
            best, best_points = (
                torch.where(better, left, best),
                torch.where(rows_like(better, inputs), points, best_points),
            )
            points = project(inputs, points - step * uphill(gradient, generator), radius)
    return _Attacked(best_points, best, best / start)
