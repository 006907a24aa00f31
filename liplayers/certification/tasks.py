"""What a network's outputs mean: what labels look like, what is certified of a prediction, and when it is right.

A task gives for each sample, or for each output of it, a radius within which its prediction keeps what it is right in.
Each has its proof in docs/certificates.md. Rounding is counted in all: e bounds ‖f̂ − f‖₂ at the sample and in the ball.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from liplayers.certification.certificates import Certificates
from liplayers.certification.network import CertifiedNetwork, Outputs
from liplayers.certification.radius import certified_radius, flip_radii, label_radius, slack_radius, target_radii
from liplayers.errors import ArgumentError, DataError, ShapeError, UnknownNameError

__all__ = [
    "TASKS",
    "Binary",
    "Classification",
    "Conformal",
    "MultiLabel",
    "Regression",
    "Segmentation",
    "Targeted",
    "Task",
    "TopK",
    "task_of",
]

_U = 2.0**-53


class Task(ABC):
    """What outputs mean. Derive from it for a task of your own, and prove what its radii say.

    Attributes:
        name: for messages, tables and reports.
        statement: what a radius R > 0 proves, to follow "for every input within R".
        outputs: what the outputs of the network must be, for messages.
    """

    name: ClassVar[str]
    statement: ClassVar[str]
    outputs: ClassVar[str]

    @abstractmethod
    def fits(self, output_shape: tuple[int, ...]) -> bool:
        """Whether outputs of this shape, without the batch dimension, are of this task."""

    @abstractmethod
    def labels(self, labels: Tensor, samples: int, output_shape: tuple[int, ...], done: int) -> Tensor:
        """The labels of a batch on the CPU; raises a DataError, which names the sample from `done` on, unless they fit.

        Args:
            labels: as given.
            samples: how many inputs the batch has.
            output_shape: of the network's outputs for one input.
            done: how many samples there were before.
        """

    @abstractmethod
    def certificates(self, outputs: Outputs, labels: Tensor) -> Certificates:
        """From the outputs of a batch, the proven constants of its network, and the labels."""

    @abstractmethod
    def slack(self, values: Tensor, certificates: Certificates) -> Tensor:
        """(N,) or (N, M), positive as long as what is certified holds; differentiable in the outputs, for attacks.

        Args:
            values: (N, *output_shape), outputs of the network.
            certificates: of these samples.
        """

    def check(self, network: CertifiedNetwork) -> None:
        """Raises a ShapeError unless the network's outputs are of this task."""
        if not self.fits(network.output_shape):
            shape = ", ".join(map(str, ("N", *network.output_shape)))
            raise ShapeError(f"task {self.name}: the model's outputs are ({shape}); expected {self.outputs}")


# Labels ---------------------------------------------------------------------------------------------------------------


def _shaped(
    labels: Tensor, samples: int, shape: tuple[int, ...], done: int, expected: str, *, booleans: bool = False
) -> Tensor:
    """Integer labels (N, *shape), int64 on the CPU."""
    where = f"samples from {done} on"
    whole = isinstance(labels, Tensor) and not (labels.is_floating_point() or labels.is_complex() or labels.is_meta)
    if not whole or (labels.dtype == torch.bool and not booleans) or labels.dim() != 1 + len(shape):
        raise DataError(f"{where}: labels are {_described(labels)}; expected {expected}")
    if len(labels) != samples:
        raise DataError(f"{where}: {samples} inputs but {len(labels)} labels; give one label for each input")
    if tuple(labels.shape[1:]) != shape:
        raise DataError(f"{where}: labels are {_described(labels)}; expected {expected}, {shape} for each sample")
    return labels.cpu().long()


def _described(labels: object) -> str:
    if not isinstance(labels, Tensor):
        return str(type(labels))
    return f"{labels.dtype} {tuple(labels.shape)} on {labels.device}"


def _within(labels: Tensor, number: int, done: int, besides: int | None = None) -> Tensor:
    """The labels, which are all 0 … number − 1, or `besides`."""
    outside = (labels < 0) | (labels >= number)
    wrong = (outside if besides is None else outside & (labels != besides)).nonzero()
    if len(wrong):
        row, *place = wrong[0].tolist()
        at = f" at {tuple(place)}" if place else ""
        also = "" if besides is None else f", or {besides}"
        raise DataError(f"sample {done + row} has label {labels[row, *place]}{at}; expected 0 … {number - 1}{also}")
    return labels


class _OfClasses(Task):
    """One of K classes: logits (N, K), labels (N,)."""

    outputs = "logits (N, K) of at least two classes"

    def fits(self, output_shape: tuple[int, ...]) -> bool:
        return len(output_shape) == 1 and output_shape[0] >= 2

    def labels(self, labels: Tensor, samples: int, output_shape: tuple[int, ...], done: int) -> Tensor:
        expected = "class numbers, integers of shape (N,)"
        return _within(_shaped(labels, samples, (), done, expected), output_shape[0], done)


def _predicted(logits: Tensor) -> Tensor:
    """(N,), the class; −1 where a logit is NaN or infinite."""
    return torch.where(logits.isfinite().all(1), logits.argmax(1), -1)


def _others(values: Tensor, classes: Tensor) -> Tensor:
    """(N,): the largest of the other logits."""
    return values.scatter(1, classes[:, None], -math.inf).amax(1)


# Tasks ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Classification(_OfClasses):
    """The class of the largest logit; the radius is `certified_radius`.

    >>> from liplayers import AOLLinear
    >>> network = CertifiedNetwork(AOLLinear(2, 3), (2,))
    >>> Classification().certificates(network.outputs(torch.rand(4, 2)), torch.tensor([0, 1, 2, 0])).radius.shape
    torch.Size([4])
    """

    name: ClassVar[str] = "classification"
    statement: ClassVar[str] = "the largest logit is that of the same class"

    def certificates(self, outputs: Outputs, labels: Tensor) -> Certificates:
        logits, exact, constants = outputs.values.cpu(), outputs.exact, outputs.network.margin_lipschitz
        radius = outputs.radii(lambda e: certified_radius(exact, constants, e[:, None].expand_as(exact)))
        best = logits.topk(2, 1).values
        return Certificates(labels, _predicted(logits), best[:, 0] - best[:, 1], radius)

    def slack(self, values: Tensor, certificates: Certificates) -> Tensor:
        y = certificates.prediction.to(values.device).clamp_min(0)
        return values.gather(1, y[:, None])[:, 0] - _others(values, y)


@dataclass(frozen=True)
class TopK(_OfClasses):
    """The k classes of the largest logits, right where the label is among them; the radius is `label_radius`.

    The prediction is the label where it is among them, else the class of the largest logit; the margin is the label's
    logit less the k-th largest of the others.

    Args:
        k: at least 1 and less than the number of classes.

    >>> from liplayers import AOLLinear
    >>> network = CertifiedNetwork(AOLLinear(2, 3), (2,))
    >>> found = TopK(2).certificates(network.outputs(torch.rand(4, 2)), torch.tensor([0, 1, 2, 0]))
    >>> torch.equal(found.correct, found.margin > 0)
    True
    """

    k: int
    name: ClassVar[str] = "top-k"
    statement: ClassVar[str] = "the label's logit is among the k largest"

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise ArgumentError(f"TopK: k={self.k!r}; expected an integer of at least 1")

    def fits(self, output_shape: tuple[int, ...]) -> bool:
        return super().fits(output_shape) and output_shape[0] > self.k

    def certificates(self, outputs: Outputs, labels: Tensor) -> Certificates:
        exact, constants = outputs.exact, outputs.network.margin_lipschitz
        radius = outputs.radii(lambda e: label_radius(exact, labels, self.k, constants, e[:, None].expand_as(exact)))
        margin = self._margin(exact, labels)
        right = (margin > 0) & exact.isfinite().all(1)
        return Certificates(labels, torch.where(right, labels, _predicted(exact)), margin, radius, right)

    def _margin(self, values: Tensor, labels: Tensor) -> Tensor:
        rows = labels[:, None]
        return values.gather(1, rows)[:, 0] - values.scatter(1, rows, -math.inf).topk(self.k, 1).values[:, -1]

    def slack(self, values: Tensor, certificates: Certificates) -> Tensor:
        return self._margin(values, certificates.label.to(values.device))


@dataclass(frozen=True)
class Targeted(_OfClasses):
    """Each class that is not the label, as the target of an attack, (N, K); the radius is `target_radii`.

    An entry is right where the class is not predicted; its margin is the largest other logit less that of the class.

    >>> from liplayers import AOLLinear
    >>> network = CertifiedNetwork(AOLLinear(2, 3), (2,))
    >>> found = Targeted().certificates(network.outputs(torch.rand(4, 2)), torch.tensor([0, 1, 2, 0]))
    >>> found.radius.shape, int(found.counted.sum())
    (torch.Size([4, 3]), 8)
    """

    name: ClassVar[str] = "targeted"
    statement: ClassVar[str] = "the class of the entry is not predicted"

    def certificates(self, outputs: Outputs, labels: Tensor) -> Certificates:
        exact, constants = outputs.exact, outputs.network.margin_lipschitz
        radius = outputs.radii(lambda e: target_radii(exact, constants, e[:, None].expand_as(exact)))
        classes = torch.arange(exact.shape[1])
        margin = self._margin(exact)
        right = (margin > 0) & exact.isfinite().all(1, keepdim=True)
        prediction, label = (column[:, None].expand_as(exact) for column in (_predicted(exact), labels))
        return Certificates(label, prediction, margin, radius, right, label != classes)

    @staticmethod
    def _margin(values: Tensor) -> Tensor:
        best = values.topk(2, 1)
        is_best = best.indices[:, :1] == torch.arange(values.shape[1], device=values.device)
        return torch.where(is_best, best.values[:, 1:], best.values[:, :1]) - values

    def slack(self, values: Tensor, certificates: Certificates) -> Tensor:
        return self._margin(values)


class _OfSigns(Task):
    """Logits of which the signs are predicted, 1 above 0."""

    def certificates(self, outputs: Outputs, labels: Tensor) -> Certificates:
        values = outputs.exact.reshape(labels.shape)
        constants = outputs.network.output_lipschitz.reshape(values.shape[1:])
        rows = (-1, *[1] * (values.dim() - 1))
        finite = outputs.exact.reshape(len(values), -1).isfinite().all(1).reshape(rows)
        size = torch.where(finite, values.abs(), math.nan)
        radius = outputs.radii(lambda e: slack_radius(size, constants, e.reshape(rows)))
        return Certificates(labels, torch.where(finite, (values > 0).long(), -1), values.abs(), radius)

    def slack(self, values: Tensor, certificates: Certificates) -> Tensor:
        prediction = certificates.prediction.to(values)
        return values.reshape(prediction.shape) * (2 * prediction - 1)


@dataclass(frozen=True)
class Binary(_OfSigns):
    """The sign of one logit, outputs (N,) or (N, 1), labels 0 and 1; R = (|f|(1 − 4u) − 2e)/L·(1 − 8u).

    >>> from liplayers import AOLLinear
    >>> network = CertifiedNetwork(AOLLinear(2, 1), (2,))
    >>> Binary().certificates(network.outputs(torch.rand(3, 2)), torch.tensor([0, 1, 1])).radius.shape
    torch.Size([3])
    """

    name: ClassVar[str] = "binary"
    statement: ClassVar[str] = "the logit has the same sign"
    outputs: ClassVar[str] = "one logit, (N,) or (N, 1)"

    def fits(self, output_shape: tuple[int, ...]) -> bool:
        return output_shape in ((), (1,))

    def labels(self, labels: Tensor, samples: int, output_shape: tuple[int, ...], done: int) -> Tensor:
        expected = "0 and 1, integers or booleans of shape (N,)"
        return _within(_shaped(labels, samples, (), done, expected, booleans=True), 2, done)


@dataclass(frozen=True)
class MultiLabel(_OfSigns):
    """The sign of each of K logits, labels (N, K) of 0 and 1: a radius for each, as `Binary` has it.

    All labels of a sample hold within the least of its radii: `Certificates.all_accuracy`.

    >>> from liplayers import AOLLinear
    >>> network = CertifiedNetwork(AOLLinear(2, 3), (2,))
    >>> MultiLabel().certificates(network.outputs(torch.rand(4, 2)), torch.eye(4, 3).long()).radius.shape
    torch.Size([4, 3])
    """

    name: ClassVar[str] = "multilabel"
    statement: ClassVar[str] = "the logit of the label has the same sign"
    outputs: ClassVar[str] = "one logit for each label, (N, K)"

    def fits(self, output_shape: tuple[int, ...]) -> bool:
        return len(output_shape) == 1

    def labels(self, labels: Tensor, samples: int, output_shape: tuple[int, ...], done: int) -> Tensor:
        expected = f"0 and 1 for each label, integers or booleans of shape (N, {output_shape[0]})"
        return _within(_shaped(labels, samples, output_shape, done, expected, booleans=True), 2, done)


@dataclass(frozen=True)
class Regression(Task):
    """Numbers, right within a tolerance; outputs (N,) or (N, D), R = ((τ − |f − y|)(1 − 4u) − 2e)/L·(1 − 8u).

    The margin is τ − |f − y|.

    Args:
        tolerance: τ > 0, how far an output may be from its label.

    >>> from liplayers import AOLLinear
    >>> network = CertifiedNetwork(AOLLinear(2, 1), (2,))
    >>> Regression(5.0).certificates(network.outputs(torch.rand(3, 2)), torch.rand(3).double()).correct.tolist()
    [True, True, True]
    """

    tolerance: float
    name: ClassVar[str] = "regression"
    statement: ClassVar[str] = "the output is within the tolerance of the label"
    outputs: ClassVar[str] = "numbers, (N,) or (N, D)"

    def __post_init__(self) -> None:
        given = self.tolerance
        if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 < given < math.inf:
            raise ArgumentError(f"Regression: tolerance={given!r}; expected a number above 0")

    def fits(self, output_shape: tuple[int, ...]) -> bool:
        return len(output_shape) <= 1

    def labels(self, labels: Tensor, samples: int, output_shape: tuple[int, ...], done: int) -> Tensor:
        where, shape = f"samples from {done} on", () if output_shape in ((), (1,)) else output_shape
        numbers = isinstance(labels, Tensor) and not (labels.is_complex() or labels.is_meta)
        if not numbers or labels.dtype == torch.bool or tuple(labels.shape[1:]) != shape or not labels.dim():
            expected = ", ".join(map(str, ("N", *shape)))
            raise DataError(f"{where}: labels are {_described(labels)}; expected real numbers ({expected})")
        if len(labels) != samples:
            raise DataError(f"{where}: {samples} inputs but {len(labels)} labels; give one label for each input")
        wrong = (~labels.isfinite()).nonzero()
        if len(wrong):
            row = int(wrong[0, 0])
            raise DataError(f"sample {done + row} has label {labels[row].tolist()}; expected finite numbers")
        return labels.cpu().double()

    def certificates(self, outputs: Outputs, labels: Tensor) -> Certificates:
        values = outputs.exact.reshape(labels.shape)
        constants = outputs.network.output_lipschitz.reshape(values.shape[1:])
        rows = (-1, *[1] * (values.dim() - 1))
        margin = self.tolerance - (values - labels).abs() * (1 + 4 * _U)
        margin = torch.where(values.isfinite(), margin, math.nan)
        radius = outputs.radii(lambda e: slack_radius(margin, constants, e.reshape(rows)))
        return Certificates(labels, torch.where(values.isfinite(), values, math.nan), margin, radius, margin >= 0)

    def slack(self, values: Tensor, certificates: Certificates) -> Tensor:
        label = certificates.label.to(values)
        return self.tolerance - (values.reshape(label.shape) - label).abs()


@dataclass(frozen=True)
class Segmentation(Task):
    """The class of each pixel, outputs (N, K, *pixels), labels (N, *pixels); one row of P pixels for each sample.

    The radii are `flip_radii`: all pixels share one budget, so the accuracy at ε is what is left when as many right
    pixels are lost as a change of norm ε can make wrong at most. A radius is about its pixel's rank in the sample, not
    about the pixel alone. Wrong pixels have radius 0.

    Args:
        ignore: a label that does not count, such as 255; None for none.

    >>> from liplayers import AOLConv2d
    >>> network = CertifiedNetwork(AOLConv2d(1, 2, 3, padding=1), (1, 4, 4))
    >>> labels = torch.zeros(3, 4, 4).long()
    >>> Segmentation().certificates(network.outputs(torch.rand(3, 1, 4, 4)), labels).radius.shape
    torch.Size([3, 16])
    """

    ignore: int | None = None
    name: ClassVar[str] = "segmentation"
    statement: ClassVar[str] = "fewer pixels change their class than have a radius of at most R"
    outputs: ClassVar[str] = "logits (N, K, H, W) of at least two classes"

    def fits(self, output_shape: tuple[int, ...]) -> bool:
        return len(output_shape) >= 2 and output_shape[0] >= 2

    def labels(self, labels: Tensor, samples: int, output_shape: tuple[int, ...], done: int) -> Tensor:
        expected = "class numbers of pixels, integers of shape (N, H, W)"
        found = _shaped(labels, samples, output_shape[1:], done, expected)
        return _within(found, output_shape[0], done, self.ignore)

    def certificates(self, outputs: Outputs, labels: Tensor) -> Certificates:
        values, label = outputs.exact.flatten(2), labels.flatten(1)
        finite = values.isfinite()
        prediction = torch.where(finite.all(1), values.argmax(1), -1)
        best = values.topk(2, 1).values
        margin = best[:, 0] - best[:, 1]
        counted = torch.ones_like(label, dtype=torch.bool) if self.ignore is None else label != self.ignore
        right = (prediction == label) & counted
        losable = torch.where(right & finite.flatten(1).all(1, keepdim=True), margin, math.inf)
        lipschitz = outputs.network.lipschitz
        radius = outputs.radii(lambda e: flip_radii(losable, lipschitz, e[:, None]))
        return Certificates(label, prediction, margin, radius, right, counted)

    def slack(self, values: Tensor, certificates: Certificates) -> Tensor:
        flat, y = values.flatten(2), certificates.prediction.to(values.device).clamp_min(0)[:, None]
        return (flat.gather(1, y) - flat.scatter(1, y, -math.inf).amax(1, keepdim=True))[:, 0]


@dataclass(frozen=True)
class Conformal(_OfClasses):
    """Sets of classes, {y : s(x, y) ≤ q} with the score s(x, y) = max_{j≠y} f_j − f_y, right where the label is in it.

    q is the ⌈(n + 1)(1 − α)⌉-th smallest score of n calibration samples and their labels, so that of a sample that is
    exchangeable with these the set holds the label with probability 1 − α at least. The radius is that within which
    an input's set keeps the label: the accuracy at ε is the coverage that no change of norm ε can break. `sets` gives
    larger sets, which cover with probability 1 − α at least whatever change of norm ε was made.

    The prediction is the label where it is in the set, else −2; the margin is q − s(x, y).

    Args:
        quantile: q, from `Conformal.calibrated`.
        alpha: that it was computed for.

    >>> from liplayers import AOLLinear
    >>> network, x, y = CertifiedNetwork(AOLLinear(2, 3), (2,)), torch.rand(40, 2), torch.arange(40) % 3
    >>> conformal = Conformal.calibrated(network, [(x, y)], alpha=0.1)
    >>> bool(conformal.sets(network, x, 0.2).sum() >= conformal.sets(network, x, 0.0).sum())
    True
    """

    quantile: float
    alpha: float
    name: ClassVar[str] = "conformal"
    statement: ClassVar[str] = "the conformal set holds the label"

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1 or math.isnan(self.quantile):
            raise ArgumentError(f"Conformal: alpha={self.alpha}, quantile={self.quantile}; expected alpha in (0, 1)")

    @classmethod
    def calibrated(cls, network: CertifiedNetwork, batches: Iterable[tuple[Tensor, Tensor]], alpha: float) -> Conformal:
        """From calibration samples, which were not trained on.

        q is rounded up by what rounding can make of the scores, so that it is one of the exact network, too.

        Args:
            network: the classifier with its proven constants.
            batches: (inputs, labels) of the calibration samples.
            alpha: the share of labels that sets may miss, in (0, 1).

        Raises:
            DataError: fewer samples than ⌈1/α⌉ − 1, of which no quantile can be taken.
        """
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < 1:
            raise ArgumentError(f"Conformal: alpha={alpha!r}; expected a number in (0, 1)")
        task, done = cls(0.0, alpha), 0
        task.check(network)
        scores: list[Tensor] = []
        for inputs, labels in batches:
            labels = task.labels(labels, len(inputs), network.output_shape, done)
            outputs = network.outputs(inputs)
            exact = outputs.exact
            score = _others(exact, labels) - exact.gather(1, labels[:, None])[:, 0]
            score = score + task._rounding(outputs)[:, 0] + 16 * _U * exact.abs().amax(1)
            scores.append(torch.where(exact.isfinite().all(1) & outputs.finite, score, math.inf))
            done += len(score)
        share = Fraction(str(float(alpha)))  # the number that was written
        rank = math.ceil((done + 1) * (1 - share))
        if not done or rank > done:
            raise DataError(f"{done} calibration samples; alpha={alpha} needs at least {math.ceil(1 / share) - 1}")
        return cls(torch.cat(scores).kthvalue(rank).values.item(), alpha)

    @staticmethod
    def _rounding(outputs: Outputs) -> Tensor:
        """(N, 1): what rounding may have changed in a difference of two outputs, above."""
        here = torch.zeros_like(outputs.norms)
        if outputs.network.mode != "proof":
            return here[:, None]
        return 2 * (1 + 4 * _U) * outputs.network.error_within(outputs.norms, here)[:, None]

    @torch.no_grad()
    def sets(self, network: CertifiedNetwork, inputs: Tensor, eps: float) -> Tensor:
        """The robust sets {y : f_j − f_y − L_yj ε ≤ q for all j} of inputs that may have been changed by ε, (N, K).

        Args:
            network: that was calibrated.
            inputs: (N, *input_shape).
            eps: the ℓ2 norm of the change, at least 0.

        Returns:
            booleans; of logits that are NaN or infinite every class is in the set.
        """
        if not 0 <= eps < math.inf:
            raise ArgumentError(f"eps={eps!r}; expected a number ≥ 0")
        self.check(network)
        outputs = network.outputs(inputs)
        exact, constants = outputs.exact, network.margin_lipschitz
        above = self.quantile + self._rounding(outputs)
        columns = []
        for y in range(exact.shape[1]):
            lower = exact - exact[:, y : y + 1] - constants[y] * eps
            slack = 8 * _U * (exact.abs() + exact[:, y : y + 1].abs() + constants[y] * eps + above.abs())
            columns.append((lower - slack <= above).index_fill(1, torch.tensor([y]), True).all(1))
        finite = exact.isfinite().all(1) & outputs.finite
        return torch.stack(columns, 1) | ~finite[:, None]

    def certificates(self, outputs: Outputs, labels: Tensor) -> Certificates:
        exact, constants = outputs.exact, outputs.network.margin_lipschitz[labels]
        of_label = exact.gather(1, labels[:, None])
        slack = self.quantile + (of_label - exact)
        slack = slack - 8 * _U * (exact.abs() + of_label.abs() + abs(self.quantile))
        slack = slack.scatter(1, labels[:, None], math.inf)

        def radius(e: Tensor) -> Tensor:
            found = slack_radius(slack, constants, 2 * e[:, None]).scatter(1, labels[:, None], math.inf)
            return found.amin(1)

        margin = slack.amin(1)
        finite = exact.isfinite().all(1)
        radii = torch.where(finite, outputs.radii(radius), 0.0)
        right = (margin >= 0) & finite
        prediction = torch.where(right, labels, torch.where(finite, -2, -1))
        return Certificates(labels, prediction, margin, radii, right)

    def slack(self, values: Tensor, certificates: Certificates) -> Tensor:
        y = certificates.label.to(values.device)
        return self.quantile - (_others(values, y) - values.gather(1, y[:, None])[:, 0])


TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (Classification, TopK, Targeted, Binary, MultiLabel, Regression, Segmentation, Conformal)
}


def task_of(task: str | Task) -> Task:
    """A task, or the one of that name where it has no settings that must be given.

    >>> task_of("multilabel")
    MultiLabel()
    """
    if isinstance(task, Task):
        return task
    if not isinstance(task, str) or task not in TASKS:
        raise UnknownNameError.of("task", str(task), TASKS)
    kind = TASKS[task]
    try:
        return kind()
    except TypeError:
        example = {"top-k": "TopK(5)", "regression": "Regression(tolerance=0.1)"}
        expected = example.get(task, "Conformal.calibrated(network, batches, alpha=0.1)")
        raise ArgumentError(f"task={task!r} has settings: give one such as {expected}") from None
