"""The audit runs every attack that could refute a certificate. An audit that refutes none proves nothing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from liplayers.audit.attack import Attacked, attack, batches, check_samples, headroom, misclassified
from liplayers.audit.ball import distance
from liplayers.audit.boundary import boundary_points, rounding_attack
from liplayers.audit.steepest import margin_ratio_lower_bound
from liplayers.certification.radius import certified_accuracy, certified_radius
from liplayers.errors import ArgumentError, ShapeError

__all__ = [
    "METHODS",
    "MOST",
    "QUANTILES",
    "Audit",
    "Refutation",
    "RobustAccuracy",
    "audit",
]

METHODS = ("pgd", "apgd")
QUANTILES = (0.0, 0.5, 0.95)
MOST = 100  # refutations of each kind that are kept with their points; all are counted


@dataclass(frozen=True)
class RobustAccuracy:
    """Shares of all samples: certified at ε, and still predicted rightly under each attack within ε."""

    eps: float
    certified: float
    pgd: float
    apgd: float


@dataclass(frozen=True)
class Refutation:
    """A point within the certified radius that is not predicted as certified.

    Attributes:
        kind: "radius" (attacked at its own radius), "eps" (at a smaller one) or "rounding" (near the boundary).
        index: of the sample; for "rounding" of the boundary point.
        input, adversarial: the certified point and the other one, (*shape).
        label: the certified class.
        radius: certified.
        distance: between the two, an upper bound; at most `radius`.
        alone: whether it falls as a batch of one too; another batch size may round otherwise.
    """

    kind: str
    index: int
    input: Tensor
    adversarial: Tensor
    label: int
    radius: float
    distance: float
    alone: bool


@dataclass(frozen=True)
class Audit:
    """What the attacks found.

    Attributes:
        samples: how many inputs there are.
        clean_accuracy: share of them that is predicted rightly.
        rows: one for each ε.
        certified, certified_fallen: points with a positive radius, all of them attacked; how many an attack refuted.
        margin_ratio: the largest difference quotient of a margin over its constant; above 1 the constant is wrong.
        boundary, boundary_certified, boundary_fallen: points near the decision boundary, those of them with a positive
            radius, and those whose radius was refuted.
        naive_certified, naive_fallen: the same for the radii that would be claimed if rounding were not counted.
        headroom: quantiles, by their level, of headroom over radius: 1 is all that a local method could certify.
        fallen: the first refutations of each kind.
    """

    samples: int
    clean_accuracy: float
    rows: tuple[RobustAccuracy, ...]
    certified: int
    certified_fallen: int
    margin_ratio: float
    boundary: int
    boundary_certified: int
    boundary_fallen: int
    naive_certified: int
    naive_fallen: int
    headroom: dict[float, float]
    fallen: tuple[Refutation, ...]

    @property
    def holds(self) -> bool:
        """Whether nothing was refuted."""
        return self.certified_fallen == 0 and self.boundary_fallen == 0 and self.margin_ratio <= 1

    def summary(self) -> dict[str, Any]:
        """Plain numbers for a report, without the points themselves."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("rows", "headroom", "fallen")}
        refutations = [
            {f.name: getattr(r, f.name) for f in fields(r) if f.name not in ("input", "adversarial")}
            for r in self.fallen
        ]
        return {
            "holds": self.holds,
            **plain,
            "rows": [asdict(row) for row in self.rows],
            "headroom": {str(level): value for level, value in self.headroom.items()},
            "fallen": refutations,
        }


@dataclass(frozen=True)
class _Subject:
    """What is audited, and how hard."""

    model: nn.Module
    inputs: Tensor
    labels: Tensor  # the certified classes
    radius: Tensor
    seed: int
    steps: int
    batch_size: int
    tick: Callable[[], None]
    first: int = 0  # the number of the first row

    def attack(self, rows: Tensor, radius: Tensor, methods: tuple[str, ...]) -> Attacked:
        options = {"steps": self.steps, "seed": self.seed, "batch_size": self.batch_size}
        return attack(self.model, self.inputs[rows], self.labels[rows], radius, methods=methods, **options)

    @torch.no_grad()
    def refutations(self, kind: str, rows: Tensor, points: Tensor) -> list[Refutation]:
        """The first of these rows with the points they fell at."""
        rows, points = rows[:MOST], points[:MOST]
        if not len(rows):
            return []
        far = distance(self.inputs[rows], points).tolist()
        found = []
        for row, point, d in zip(rows.tolist(), points, far, strict=True):
            alone = misclassified(self.model(point[None]), self.labels[row : row + 1]).item()
            label, radius = int(self.labels[row]), self.radius[row].item()
            found.append(Refutation(kind, self.first + row, self.inputs[row], point, label, radius, d, bool(alone)))
        return found


def audit(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    radius: Tensor,
    *,
    margin_lipschitz: Tensor,
    certify: Callable[[Tensor], Tensor],
    eps: Sequence[float],
    seed: int = 0,
    steps: int = 50,
    batch_size: int = 256,
    progress: Callable[[int, int], object] | None = None,
) -> Audit:
    """Try to refute certified radii of `model`, which is in evaluation mode and float64.

    Every point with a radius, rightly predicted or not, is attacked at it; the rightly predicted ones at each ε; the
    Lipschitz constants of the margins are compared with difference quotients; points near the decision boundary are
    certified and searched for rounding errors. Balls are not clipped to a range of pixels. The same seed gives the same
    audit.

    Args:
        model: in evaluation mode and float64.
        inputs: (N, *shape), float64.
        labels: (N,), the true classes.
        radius: (N,), float64, the certified radii of the predictions; 0 where nothing is certified.
        margin_lipschitz: (K, K), the constants of f_y − f_j behind the radii.
        certify: the certified radii of other inputs, (M, *shape) → (M,).
        eps: radii to attack at.
        seed: of the random numbers.
        steps: gradient steps of each run of an attack.
        batch_size: samples in a batch.
        progress: called with the number of stages that are done, first with 0, and of all stages.

    Raises:
        ArgumentError: a model in training mode or not in float64, labels that are no classes, a radius or ε that is
            negative or NaN.
        ShapeError: tensors of another shape; labels that are not int64, or a radius that is not float64.
        DataError: no samples, or inputs that are not finite.

    >>> from liplayers.certification.radius import certified_radius
    >>> model = nn.Linear(2, 2).double().eval().requires_grad_(False)
    >>> x, L = torch.rand(5, 2).double(), torch.cdist(model.weight, model.weight)
    >>> certify = lambda z: certified_radius(model(z), L, torch.full((len(z), 2), 1e-12).double())
    >>> audit(model, x, model(x).argmax(1), certify(x), margin_lipschitz=L, certify=certify, eps=[0.1]).holds
    True
    """
    check_samples(model, inputs, labels, radius)
    logits = _logits(model, inputs, margin_lipschitz, eps, batch_size)
    prediction = logits.argmax(1)
    correct = (prediction == labels) & logits.isfinite().all(1)
    done, stages = itertools.count(), 4 + len(METHODS) * len(eps)

    def tick() -> None:
        if progress is not None:
            progress(next(done), stages)

    tick()
    subject = _Subject(model, inputs, prediction, radius, seed, steps, batch_size, tick)
    refuted, at_radius = _attack_certified(subject)
    robust, refuted_at_eps, at_eps = _attack_at(subject, correct, eps)
    steepest = margin_ratio_lower_bound(model, inputs, prediction, margin_lipschitz, seed=seed, batch_size=batch_size)
    tick()
    boundary, rounding = _attack_boundary(subject, certify, margin_lipschitz)
    room = _headroom(subject)
    return Audit(
        samples=len(inputs),
        clean_accuracy=correct.double().mean().item(),
        rows=tuple(RobustAccuracy(e, certified_accuracy(radius, correct, e), **robust[e]) for e in eps),
        certified=int((radius > 0).sum()),
        certified_fallen=int((refuted | refuted_at_eps).sum()),
        margin_ratio=steepest.quotient,
        **boundary,
        headroom=room,
        fallen=(*at_radius, *at_eps, *rounding),
    )


def _logits(
    model: nn.Module, inputs: Tensor, margin_lipschitz: Tensor, eps: Sequence[float], batch_size: int
) -> Tensor:
    """Of the inputs; raises where the other arguments do not fit them."""
    for e in eps:
        if not (math.isfinite(e) and e >= 0):
            raise ArgumentError(f"eps={e!r}; expected finite numbers ≥ 0")
    with torch.no_grad():
        logits = torch.cat([model(inputs[r]) for r in batches(len(inputs), batch_size, inputs.device)])
    if margin_lipschitz.shape != (logits.shape[1],) * 2:
        raise ShapeError(f"margin_lipschitz: {tuple(margin_lipschitz.shape)}; expected {(logits.shape[1],) * 2}")
    return logits


def _attack_certified(subject: _Subject) -> tuple[Tensor, list[Refutation]]:
    """Attack every point with a radius at it: which fell, (N,), and the first of them."""
    refuted = torch.zeros_like(subject.labels, dtype=torch.bool)
    held = (subject.radius > 0).nonzero()[:, 0]
    found: list[Refutation] = []
    if len(held):
        points, fallen = subject.attack(held, subject.radius[held], METHODS)
        refuted[held] = fallen
        found = subject.refutations("radius", held[fallen], points[fallen])
    subject.tick()
    return refuted, found


def _attack_at(
    subject: _Subject, correct: Tensor, eps: Sequence[float]
) -> tuple[dict[float, dict[str, float]], Tensor, list[Refutation]]:
    """Robust accuracy at each ε by method; which certified points fell, (N,), and the first of them.

    What has fallen at an ε has fallen at every larger one.
    """
    robust: dict[float, dict[str, float]] = {e: {} for e in eps}
    refuted = torch.zeros_like(correct)
    found: list[Refutation] = []
    for method in METHODS:
        standing = correct.clone()
        for e in sorted(eps):
            rows = standing.nonzero()[:, 0]
            if len(rows):
                points, fallen = subject.attack(rows, torch.full_like(subject.radius[rows], e), (method,))
                standing[rows] = ~fallen
                wrong = fallen & (subject.radius[rows] >= e)
                refuted[rows[wrong]] = True
                found += subject.refutations("eps", rows[wrong], points[wrong])
            robust[e][method] = standing.double().mean().item()
            subject.tick()
    return robust, refuted, found[:MOST]


def _attack_boundary(
    subject: _Subject, certify: Callable[[Tensor], Tensor], margin_lipschitz: Tensor
) -> tuple[dict[str, int], list[Refutation]]:
    """Points near the boundary: how many there are, have a radius, and fell; and the first that fell.

    One batch of samples after the other, since each gives many points.
    """
    tried = certified = refuted = naive = naively = 0
    found: list[Refutation] = []
    options = {"seed": subject.seed, "batch_size": subject.batch_size}
    for rows in batches(len(subject.inputs), subject.batch_size, subject.inputs.device):
        points, labels = boundary_points(subject.model, subject.inputs[rows], subject.labels[rows], **options)
        if not len(points):
            continue
        with torch.no_grad():
            radius = certify(points)
            unrounded = certified_radius(subject.model(points), margin_lipschitz.to(points))
        if radius.shape != labels.shape:
            raise ShapeError(f"certify: gave radii of shape {tuple(radius.shape)}; expected {tuple(labels.shape)}")
        held = (radius > 0).nonzero()[:, 0]
        if len(held):
            others, fallen = rounding_attack(subject.model, points[held], labels[held], radius[held], **options)
            near = replace(subject, inputs=points, labels=labels, radius=radius, first=tried)
            found += near.refutations("rounding", held[fallen], others[fallen])
            refuted += int(fallen.sum())
        claimed = (unrounded > 0).nonzero()[:, 0]
        if len(claimed):
            attacked = rounding_attack(subject.model, points[claimed], labels[claimed], unrounded[claimed], **options)
            naive, naively = naive + len(claimed), naively + int(attacked.fallen.sum())
        tried, certified = tried + len(points), certified + len(held)
    subject.tick()
    counts = {"boundary": tried, "boundary_certified": certified, "boundary_fallen": refuted}
    return counts | {"naive_certified": naive, "naive_fallen": naively}, found[:MOST]


def _headroom(subject: _Subject) -> dict[float, float]:
    held = ((subject.radius > 0) & subject.radius.isfinite()).nonzero()[:, 0]
    if not len(held):
        subject.tick()
        return {}
    room = headroom(subject.model, subject.inputs[held], subject.labels[held], batch_size=subject.batch_size)
    ratio = room / subject.radius[held]
    subject.tick()
    return {q: ratio.quantile(q, interpolation="nearest").item() for q in QUANTILES}
