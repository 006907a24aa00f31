"""ℓ2 attacks on the predictions of a model, to refute their certificates.

The attacked model is in evaluation mode and float64, takes inputs (N, *shape) of any rank and gives logits (N, K), each
row computed from its own input alone. Balls are not clipped to a range of pixels, as certificates are not restricted to
one. A point has fallen where its label's logit is not strictly the largest, or a logit is not finite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liplayers.audit.ball import project, random_point, rows_like, uphill, within_reach
from liplayers.errors import ArgumentError, DataError, ShapeError, UnknownNameError

__all__ = [
    "LOSSES",
    "Attacked",
    "Loss",
    "Search",
    "apgd",
    "attack",
    "batches",
    "check_counts",
    "check_inputs",
    "check_samples",
    "cross_entropy_loss",
    "dlr_loss",
    "gradient_of",
    "headroom",
    "linear_distances",
    "margin_loss",
    "misclassified",
    "nearest_classes",
    "pgd",
    "seeded",
]


class Attacked(NamedTuple):
    """The point that an attack ends at for each sample, (N, *shape), and whether it has fallen there, (N,)."""

    points: Tensor
    fallen: Tensor


# Losses: (N, K) logits, (N,) labels, (N,) targets or None → (N,), larger the nearer to another class ------------------

Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def margin_loss(logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
    """f_t − f_y; without targets max_{j≠y} f_j − f_y.

    >>> margin_loss(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0])).tolist()
    [-1.0]
    """
    of_label = logits.gather(1, labels[:, None])[:, 0]
    if targets is not None:
        return logits.gather(1, targets[:, None])[:, 0] - of_label
    return logits.scatter(1, labels[:, None], -torch.inf).amax(1) - of_label


def dlr_loss(logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
    """The margin loss over f_π1 − f_π3; with targets over f_π1 − (f_π3 + f_π4)/2; π sorts the logits downwards.

    With fewer classes than that takes it is the margin loss.

    Source: Croce & Hein 2020, arXiv 2003.01690.

    >>> dlr_loss(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0])).tolist()
    [-0.5]
    """
    margin = margin_loss(logits, labels, targets)
    needed = 3 if targets is None else 4
    if logits.shape[1] < needed:
        return margin
    top = logits.topk(needed, 1).values
    spread = top[:, 0] - top[:, 2:].mean(1)
    return margin / spread.clamp_min(torch.finfo(logits.dtype).tiny)


def cross_entropy_loss(logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
    """−log p_y; with targets log p_t.

    >>> cross_entropy_loss(torch.zeros(1, 4), torch.tensor([0])).exp().tolist()
    [4.0]
    """
    if targets is not None:
        return -F.cross_entropy(logits, targets, reduction="none")
    return F.cross_entropy(logits, labels, reduction="none")


LOSSES: dict[str, Loss] = {"margin": margin_loss, "dlr": dlr_loss, "cross_entropy": cross_entropy_loss}


def misclassified(logits: Tensor, labels: Tensor) -> Tensor:
    """(N,): whether the label's logit is not strictly the largest, or a logit is NaN or infinite.

    >>> misclassified(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([0, 0])).tolist()
    [False, True]
    """
    return ~(margin_loss(logits, labels) < 0) | ~logits.isfinite().all(1)


# Attacks --------------------------------------------------------------------------------------------------------------


class Search:
    """Evaluates points, one for each sample, and keeps the best: the first that has fallen, else that of largest loss.

    Samples that have fallen are not evaluated again. `value` and `gradient` are those of the last evaluation.
    """

    def __init__(
        self,
        model: nn.Module,
        points: Tensor,
        labels: Tensor,
        targets: Tensor | None,
        loss: str,
        fallen: Tensor | None = None,
    ) -> None:
        if loss not in LOSSES:
            raise UnknownNameError.of("loss", loss, LOSSES)
        self.model, self.labels, self.targets, self.loss = model, labels, targets, LOSSES[loss]
        self.fallen = torch.zeros_like(labels, dtype=torch.bool) if fallen is None else fallen
        self.value = torch.full_like(labels, -torch.inf, dtype=points.dtype)
        self.gradient = torch.zeros_like(points)
        self.best, self.best_value, self.best_gradient = points, self.value, self.gradient

    def evaluate(self, points: Tensor) -> None:
        if self.done:
            return
        rows = (~self.fallen).nonzero()[:, 0]
        labels, targets = self.labels[rows], None if self.targets is None else self.targets[rows]
        with torch.enable_grad():
            x = points[rows].detach().requires_grad_()
            logits = self.model(x)
            value = self.loss(logits, labels, targets)
            gradient = gradient_of(value, x)
        fallen = misclassified(logits.detach(), labels)
        self.fallen = self.fallen.index_put((rows,), fallen)
        self.value = self.value.index_put((rows,), torch.where(fallen, torch.inf, value.detach()))
        self.gradient = self.gradient.index_put((rows,), gradient)
        better = self.value > self.best_value
        mask = rows_like(better, points)
        self.best = torch.where(mask, points, self.best)
        self.best_gradient = torch.where(mask, self.gradient, self.best_gradient)
        self.best_value = torch.where(better, self.value, self.best_value)

    @property
    def done(self) -> bool:
        return bool(self.fallen.all())

    @property
    def result(self) -> Attacked:
        return Attacked(self.best, self.fallen)


def pgd(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    radius: Tensor,
    *,
    generator: torch.Generator,
    loss: str = "margin",
    targets: Tensor | None = None,
    steps: int = 50,
    restarts: int = 1,
) -> Attacked:
    """Projected gradient ascent of a loss over ℓ2 balls, all samples in one batch.

    Steps have length 2.5·radius/steps along the normalised gradient, or at random where that is zero. The first run
    starts at the centre, further ones at random points of the ball. Every point tried lies in the ball, rounding
    counted.

    Args:
        model: in evaluation mode and float64.
        inputs: (N, *shape), float64.
        labels: (N,), the true classes.
        radius: (N,), float64, one for each sample; what lies beyond 1e6·max(1, ‖x‖) is not searched.
        generator: of the random numbers.
        loss: a key of `LOSSES`.
        targets: (N,), the classes to move to; None for any.
        steps: gradient steps of each run.
        restarts: number of runs.

    Raises:
        ArgumentError: a model in training mode or not in float64, labels that are no classes, a radius that is negative
            or NaN.
        ShapeError: tensors of another shape; labels that are not int64, or a radius that is not float64.
        DataError: no samples, or inputs that are not finite.

    Source: Madry et al. 2018, arXiv 1706.06083.

    >>> x, g = torch.zeros(1, 2).double(), torch.Generator().manual_seed(0)
    >>> model = nn.Linear(2, 2).double().eval()
    >>> _ = model.load_state_dict({"weight": torch.eye(2), "bias": torch.tensor([1.0, 0.0])})
    >>> [pgd(model, x, torch.tensor([0]), torch.tensor([r]).double(), generator=g).fallen.item() for r in (0.70, 0.71)]
    [False, True]
    """
    check_samples(model, inputs, labels, radius)
    check_counts(steps=steps, restarts=restarts)
    radius = within_reach(inputs, radius)
    search = Search(model, inputs, labels, targets, loss)
    step = rows_like(radius, inputs) * 2.5 / steps
    for run in range(restarts):
        points = inputs if run == 0 else random_point(inputs, radius, generator)
        search.evaluate(points)
        for _ in range(steps):
            if search.done:
                return search.result
            points = project(inputs, points + step * uphill(search.gradient, generator), radius)
            search.evaluate(points)
    return search.result


def apgd(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    radius: Tensor,
    *,
    generator: torch.Generator,
    loss: str = "cross_entropy",
    targets: Tensor | None = None,
    steps: int = 50,
    restarts: int = 1,
) -> Attacked:
    """Auto-PGD over ℓ2 balls: momentum, and steps that halve from 2·radius where progress stalls, back at the best.

    The first run starts at the centre, further ones at random points of the ball.

    Args:
        model: in evaluation mode and float64.
        inputs: (N, *shape), float64.
        labels: (N,), the true classes.
        radius: (N,), float64, one for each sample; what lies beyond 1e6·max(1, ‖x‖) is not searched.
        generator: of the random numbers.
        loss: a key of `LOSSES`.
        targets: (N,), the classes to move to; None for any.
        steps: gradient steps of each run.
        restarts: number of runs.

    Raises:
        ArgumentError: a model in training mode or not in float64, labels that are no classes, a radius that is negative
            or NaN.
        ShapeError: tensors of another shape; labels that are not int64, or a radius that is not float64.
        DataError: no samples, or inputs that are not finite.

    Source: Croce & Hein 2020, arXiv 2003.01690, Algorithm 1.

    >>> x, g = torch.zeros(1, 2).double(), torch.Generator().manual_seed(0)
    >>> model = nn.Linear(2, 2).double().eval()
    >>> _ = model.load_state_dict({"weight": torch.eye(2), "bias": torch.tensor([1.0, 0.0])})
    >>> [apgd(model, x, torch.tensor([0]), torch.tensor([r]).double(), generator=g).fallen.item() for r in (0.70, 0.71)]
    [False, True]
    """
    check_samples(model, inputs, labels, radius)
    check_counts(steps=steps, restarts=restarts)
    radius = within_reach(inputs, radius)
    best, value = inputs, torch.full_like(radius, -torch.inf)
    fallen = torch.zeros_like(labels, dtype=torch.bool)
    for run in range(restarts):
        search = Search(model, inputs, labels, targets, loss, fallen)  # each run returns to its own best only
        start = inputs if run == 0 else random_point(inputs, radius, generator)
        _apgd_run(search, inputs, start, radius, steps, generator)
        best = torch.where(rows_like(search.best_value > value, inputs), search.best, best)
        value, fallen = torch.maximum(value, search.best_value), search.fallen
    return Attacked(best, fallen)


def _apgd_run(
    search: Search, inputs: Tensor, points: Tensor, radius: Tensor, steps: int, generator: torch.Generator
) -> None:
    search.evaluate(points)
    previous, gradient, value = points, search.gradient, search.value
    step, halved = 2 * radius, torch.zeros_like(search.fallen)
    for first, last in pairwise(_checkpoints(steps)):
        increases, best_before = torch.zeros_like(radius), search.best_value
        for k in range(first, last):
            if search.done:
                return
            ahead = project(inputs, points + rows_like(step, points) * uphill(gradient, generator), radius)
            if k > 0:
                ahead = points + 0.75 * (ahead - points) + 0.25 * (points - previous)
            previous, points = points, project(inputs, ahead, radius)
            search.evaluate(points)
            increases += search.value > value
            gradient, value = search.gradient, search.value
        halved = (increases < 0.75 * (last - first)) | (~halved & (search.best_value == best_before))
        step = torch.where(halved, step / 2, step)
        mask = rows_like(halved, points)
        points, previous = (torch.where(mask, search.best, old) for old in (points, previous))
        gradient = torch.where(mask, search.best_gradient, gradient)
        value = torch.where(halved, search.best_value, value)


def _checkpoints(steps: int) -> list[int]:
    """⌈p_j·steps⌉ with p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j − p_{j−1} − 0.03, 0.06), and `steps` itself."""
    percent = [0, 22]
    while percent[-1] < 100:
        percent.append(percent[-1] + max(percent[-1] - percent[-2] - 3, 6))
    return sorted({min(-(-p * steps // 100), steps) for p in percent})


def attack(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    radius: Tensor,
    *,
    methods: tuple[str, ...] = ("pgd", "apgd"),
    steps: int = 50,
    restarts: int = 1,
    classes: int = 9,
    seed: int = 0,
    batch_size: int = 256,
) -> Attacked:
    """PGD on the margin; APGD on cross-entropy, on DLR, and on the margin to each of the nearest classes.

    Each run attacks only what the earlier ones left. "Nearest" is by margin over the norm of its gradient. The balls
    are those of `pgd`. The same seed gives the same points.

    Args:
        model: in evaluation mode and float64.
        inputs: (N, *shape), float64.
        labels: (N,), the true classes.
        radius: (N,), float64, one for each sample; what lies beyond 1e6·max(1, ‖x‖) is not searched.
        methods: "pgd", "apgd" or both.
        steps: gradient steps of each run.
        restarts: number of runs of each method and loss.
        classes: how many of the nearest classes are targeted.
        seed: of the random numbers.
        batch_size: samples in a batch.

    Raises:
        ArgumentError: a model in training mode or not in float64, labels that are no classes, a radius that is negative
            or NaN.
        ShapeError: tensors of another shape; labels that are not int64, or a radius that is not float64.
        DataError: no samples, or inputs that are not finite.

    >>> model = nn.Linear(2, 3).double().eval()
    >>> x = torch.rand(5, 2).double()
    >>> attack(model, x, model(x).argmax(1), torch.full((5,), 1e3).double()).fallen.all().item()
    True
    """
    check_samples(model, inputs, labels, radius)
    unknown = set(methods) - {"pgd", "apgd"}
    if unknown or not methods:
        raise ArgumentError(f"methods={methods}; expected one or both of 'pgd' and 'apgd'")
    check_counts(steps=steps, restarts=restarts, batch_size=batch_size)
    generator = seeded(inputs, seed)
    found = []
    for rows in batches(len(inputs), batch_size, inputs.device):
        x, y, r = inputs[rows], labels[rows], radius[rows]
        points, fallen = x.clone(), torch.zeros_like(y, dtype=torch.bool)
        for run, loss, targets in _runs(model, x, y, methods, classes):
            left = (~fallen).nonzero()[:, 0]
            if not len(left):
                break
            of_left = None if targets is None else targets[left]
            options = {"generator": generator, "steps": steps, "restarts": restarts}
            new = run(model, x[left], y[left], r[left], loss=loss, targets=of_left, **options)
            points[left], fallen[left] = new.points, new.fallen
        found.append(Attacked(points, fallen))
    return Attacked(*(torch.cat(column) for column in zip(*found, strict=True)))


def _runs(
    model: nn.Module, inputs: Tensor, labels: Tensor, methods: tuple[str, ...], classes: int
) -> Iterator[tuple[Callable[..., Attacked], str, Tensor | None]]:
    """(attack, loss, targets) one after the other."""
    if "pgd" in methods:
        yield pgd, "margin", None
    if "apgd" in methods:
        yield apgd, "cross_entropy", None
        yield apgd, "dlr", None
        for targets in nearest_classes(model, inputs, labels, classes):
            yield apgd, "margin", targets


# What the gradients say -----------------------------------------------------------------------------------------------


def headroom(model: nn.Module, inputs: Tensor, labels: Tensor, *, batch_size: int = 256) -> Tensor:
    """min_{j≠y} m_j/‖∇m_j(x)‖, the distance to the boundary of the model linearised at x, (N,); m_j = f_y − f_j.

    An estimate of what a local method could certify at most, not a certificate. Where the label is not predicted it is
    0.

    Args:
        model: in evaluation mode and float64.
        inputs: (N, *shape), float64.
        labels: (N,), the true classes.
        batch_size: samples in a batch.

    Raises:
        ArgumentError: a model in training mode or not in float64, labels that are no classes.
        ShapeError: tensors of another shape, or labels that are not int64.
        DataError: no samples, or inputs that are not finite.

    >>> model = nn.Linear(1, 2, bias=False).double().eval()
    >>> _ = model.load_state_dict({"weight": torch.tensor([[1.0], [-1.0]])})
    >>> headroom(model, torch.tensor([[0.5], [2.0]]).double(), torch.tensor([0, 0])).tolist()
    [0.5, 2.0]
    """
    check_samples(model, inputs, labels)
    rows = batches(len(inputs), batch_size, inputs.device)
    return torch.cat([linear_distances(model, inputs[r], labels[r]).amin(1).clamp_min(0) for r in rows])


def nearest_classes(model: nn.Module, inputs: Tensor, labels: Tensor, count: int) -> Tensor:
    """The other classes in order of m_j/‖∇m_j(x)‖, at most `count` of them: (count, N)."""
    distances = linear_distances(model, inputs, labels)
    return distances.argsort(1)[:, : min(count, distances.shape[1] - 1)].T


def linear_distances(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """(N, K), infinite at the label, and where a positive margin has no gradient; 0 where it is NaN."""
    with torch.enable_grad():
        x = inputs.detach().requires_grad_()
        logits = model(x)
        columns = []
        for j in range(logits.shape[1]):
            margin = -margin_loss(logits, labels, torch.full_like(labels, j))
            slope = gradient_of(margin, x, keep=True).flatten(1).norm(dim=1)
            columns.append(torch.where((slope == 0) & (margin > 0), torch.inf, margin.detach() / slope))
    # NaN first: it is the class to look at
    return torch.stack(columns, 1).nan_to_num(0.0, torch.inf, 0.0).scatter(1, labels[:, None], torch.inf)


def gradient_of(value: Tensor, x: Tensor, keep: bool = False) -> Tensor:
    """The gradient of each row's value; zero where the value does not depend on x."""
    if not value.requires_grad:
        return torch.zeros_like(x)
    return torch.autograd.grad(value.sum(), x, retain_graph=keep, materialize_grads=True)[0]


# Arguments ------------------------------------------------------------------------------------------------------------


def batches(samples: int, batch_size: int, device: torch.device) -> tuple[Tensor, ...]:
    """The row numbers of each batch."""
    check_counts(batch_size=batch_size)
    return torch.arange(samples, device=device).split(batch_size)


def seeded(inputs: Tensor, seed: int) -> torch.Generator:
    """A generator on the device of the inputs."""
    return torch.Generator(inputs.device).manual_seed(seed)


def check_samples(model: nn.Module, inputs: Tensor, labels: Tensor, radius: Tensor | None = None) -> None:
    """Refuse what cannot be attacked, with the errors of `pgd`."""
    check_inputs(inputs)
    if model.training:
        raise ArgumentError("the model is in training mode; an attack needs model.eval()")
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float64:
            raise ArgumentError(f"{name}: of {parameter.dtype}; an attack needs the float64 model, model.double()")
    n = len(inputs)
    if labels.shape != (n,) or labels.dtype != torch.long:
        raise ShapeError(f"labels: {tuple(labels.shape)} of {labels.dtype}; expected ({n},) of torch.int64")
    with torch.no_grad():
        logits = model(inputs[:1])
    if logits.dtype != torch.float64:
        raise ArgumentError(f"the model: logits of {logits.dtype}; an attack needs the float64 model, model.double()")
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ShapeError(f"the model maps one input to logits of shape {tuple(logits.shape)}; expected (1, K), K ≥ 2")
    wrong = ((labels < 0) | (labels >= logits.shape[1])).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ArgumentError(
            f"labels, row {row}: {labels[row].item()}; expected a class from 0 to {logits.shape[1] - 1}"
        )
    if radius is None:
        return
    if radius.shape != (n,) or radius.dtype != torch.float64:
        raise ShapeError(f"radius: {tuple(radius.shape)} of {radius.dtype}; expected ({n},) of torch.float64")
    wrong = (~(radius >= 0)).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ArgumentError(f"radius, row {row}: {radius[row].item()}; expected a number ≥ 0")


def check_inputs(inputs: Tensor) -> None:
    """Raise DataError or ArgumentError unless these are finite samples in float64."""
    if not inputs.numel():
        raise DataError(f"inputs: no samples to attack, shape {tuple(inputs.shape)}; pass at least one")
    if inputs.dim() < 2 or inputs.dtype != torch.float64:
        raise ArgumentError(
            f"inputs: {tuple(inputs.shape)} of {inputs.dtype}; expected (N, *shape) of torch.float64, as the model's"
        )
    wrong = (~inputs.flatten(1).isfinite().all(1)).nonzero()
    if len(wrong):
        raise DataError(f"inputs, row {int(wrong[0])}: NaN or infinite; expected finite numbers")


def check_counts(**counts: int) -> None:
    """Raise ArgumentError unless every count is at least 1."""
    for name, value in counts.items():
        if value < 1:
            raise ArgumentError(f"{name}={value}; expected at least 1")
