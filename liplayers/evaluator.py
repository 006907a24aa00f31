"""The evaluator: from a model and data of any form to its certificates, with their figures, files and an audit."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from liplayers.audit.audit import Audit, audit
from liplayers.audit.tasks import TaskAudit, audit_task
from liplayers.certification.certificates import Certificates
from liplayers.certification.evaluate import certify as certify_batches
from liplayers.certification.network import CertifiedNetwork, Outputs
from liplayers.certification.radius import in_norm, parse_radius
from liplayers.certification.tasks import Binary, Classification, Regression, Segmentation, Task, task_of
from liplayers.checkpoint import Checkpoint, load_checkpoint
from liplayers.errors import ArgumentError, DataError, ShapeError
from liplayers.extras import extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from rich.table import Table

__all__ = ["Certification", "ClassFigures", "Selected", "certify"]

Pair = tuple[Tensor, Tensor]
IMAGES = "pixels in [0, 1]"


class ClassFigures(NamedTuple):
    """Of the samples of one class, or of one label of several: shares of those, and the mean radius."""

    name: str
    samples: int
    clean_accuracy: float
    certified_accuracy: tuple[float, ...]
    mean_radius: float


class Selected(NamedTuple):
    """What is left when samples with a certified radius below `threshold` are set aside.

    Attributes:
        threshold: ε, in ℓ2.
        coverage: the share of samples that are left.
        accuracy: of these, the share that is predicted rightly; NaN where none is left.
    """

    threshold: float
    coverage: float
    accuracy: float


def _nothing() -> Iterator[Pair]:
    """Of data that can be read once only."""
    return iter(())


@dataclass(frozen=True, eq=False)
class Certification:
    """Certificates of a data set, with everything that they are about: what `liplayers.certify` gives.

    Attributes:
        network: that was certified.
        certificates: label, prediction, margin and radius of each sample.
        task: what the outputs mean.
        eps: radii that tables, plots and reports show.
        name: of the data.
        unit: what distances are measured in.
        class_names: in the order of the labels.
        split: of the data, or "".
        data_sha256: of the samples and labels, in order.
        norms: (N,), at least ‖x‖₂ of each input.
        checkpoint: that the model is from, or None.
        data_config: settings that the data were made with, or None.
        scaling: how the features of a table were standardised.
    """

    network: CertifiedNetwork
    certificates: Certificates
    task: Task
    eps: tuple[float | str, ...]
    name: str
    unit: str
    class_names: tuple[str, ...]
    split: str
    data_sha256: str
    norms: Tensor
    checkpoint: Checkpoint | None = None
    data_config: Mapping[str, Any] | None = None
    scaling: Any = None
    _again: Callable[[], Iterator[Pair]] = field(default=_nothing, repr=False)

    def __len__(self) -> int:
        return len(self.certificates.label)

    def __str__(self) -> str:
        figures = [f"clean {100 * self.clean_accuracy:.2f} %"]
        figures += [f"at {e} {100 * self.accuracy(e):.2f} %" for e in self.eps]
        return f"{self.task.name}, {len(self)} samples, mode={self.network.mode}: {', '.join(figures)}"

    @property
    def radius(self) -> Tensor:
        """(N,), or (N, M) of several outputs, in ℓ2."""
        return self.certificates.radius

    @property
    def clean_accuracy(self) -> float:
        return self.certificates.clean_accuracy

    @property
    def mean_radius(self) -> float:
        return self.certificates.mean_radius

    def radii(self, norm: str = "l2") -> Tensor:
        """The radii in a norm: in ℓ1 those of ℓ2, in ℓ∞ those over √d.

        Args:
            norm: "l2", "l1" or "linf".
        """
        return in_norm(self.radius, norm, math.prod(self.network.input_shape))

    def accuracy(self, eps: float | str, norm: str = "l2") -> float:
        """Certified accuracy at ε: the share that is right, and whose radius is at least ε.

        Args:
            eps: a number, or a string such as "36/255".
            norm: "l2", "l1" or "linf".
        """
        return self._in(norm).accuracy(parse_radius(eps))

    def all_accuracy(self, eps: float | str, norm: str = "l2") -> float:
        """The share of samples all of whose outputs are certified at ε, such as all labels of one.

        Args:
            eps: a number, or a string such as "36/255".
            norm: "l2", "l1" or "linf".
        """
        return self._in(norm).all_accuracy(parse_radius(eps))

    def _in(self, norm: str) -> Certificates:
        return self.certificates if norm == "l2" else replace(self.certificates, radius=self.radii(norm))

    def interval(self, eps: float | str) -> tuple[Tensor, Tensor]:
        """What every output of a regression lies between, for all inputs within ε: f̂ ∓ (Lε + 2e), rounded outwards.

        Args:
            eps: a number, or a string such as "36/255".

        Raises:
            ArgumentError: for another task.
        """
        reach = self._reach(eps)
        value = self.certificates.prediction
        low, high = value - reach, value + reach
        return low.nextafter(torch.full_like(low, -math.inf)), high.nextafter(torch.full_like(high, math.inf))

    def error(self, eps: float | str) -> Tensor:
        """The largest |f̂ − y| of a regression within ε of each sample, at most.

        Args:
            eps: a number, or a string such as "36/255".

        Raises:
            ArgumentError: for another task.
        """
        found = self.certificates
        return ((found.prediction - found.label).abs() + self._reach(eps)) * (1 + 2.0**-50)

    def _reach(self, eps: float | str) -> Tensor:
        """How far outputs may move within ε, rounded up."""
        if not isinstance(self.task, Regression):
            raise ArgumentError(f"task {self.task.name}: intervals and errors are those of a regression")
        radius, like = parse_radius(eps), self.certificates.prediction
        rows = (-1, *[1] * (like.dim() - 1))
        moved = self.network.output_lipschitz.reshape(like.shape[1:]) * radius
        if self.network.mode == "proof":
            within = self.network.error_within(self.norms, torch.full_like(self.norms, radius))
            moved = moved + 2 * within.reshape(rows)
            if radius > 2.0**20:
                raise ArgumentError(f"eps={eps}: rounding is analysed up to 2**20")
        return moved.expand_as(like) * (1 + 2.0**-50)

    def per_class(self) -> list[ClassFigures]:
        """The figures of the samples of each class; of several labels those of each label.

        Raises:
            ArgumentError: a task without classes, or a segmentation, whose pixels share one budget.
        """
        found = self.certificates
        if isinstance(self.task, (Regression, Segmentation)):
            raise ArgumentError(f"task {self.task.name}: has no figures of single classes")
        one = found.label.dim() == 1
        number = len(self.class_names) if one else found.label.shape[1]
        rows = []
        for k in range(number):
            part = found.part(found.label == k if one else (slice(None), k))
            name = self.class_names[k] if k < len(self.class_names) else str(k)
            count = len(part.label) if part.counted is None else int(part.counted.sum())
            accuracies = tuple(part.accuracy(parse_radius(e)) for e in self.eps) if count else ()
            clean, mean = (part.clean_accuracy, part.mean_radius) if count else (math.nan, math.nan)
            rows.append(ClassFigures(name, count, clean, accuracies or (math.nan,) * len(self.eps), mean))
        return rows

    def confusion(self, eps: float | str | None = None) -> Tensor:
        """(K, K), how many samples of the class of the row are predicted as that of the column.

        Args:
            eps: counts those alone whose prediction is certified at ε; None counts all with finite outputs.

        Raises:
            ArgumentError: a task whose prediction is not one class for each sample or pixel.
        """
        found = self.certificates
        if not isinstance(self.task, Classification | Segmentation) and not isinstance(self.task, Binary):
            raise ArgumentError(f"task {self.task.name}: does not predict one class")
        if eps is not None and isinstance(self.task, Segmentation):
            raise ArgumentError("task segmentation: radii are not of single pixels; leave eps out")
        number = 2 if isinstance(self.task, Binary) else self.network.output_shape[0]
        kept = (found.prediction >= 0) & (found.label >= 0) & (found.label < number)
        if found.counted is not None:
            kept &= found.counted
        if eps is not None:
            kept &= found.radius >= math.nextafter(parse_radius(eps), math.inf)
        pairs = found.label[kept] * number + found.prediction[kept]
        return torch.bincount(pairs.long(), minlength=number**2).reshape(number, number)

    def selective(self, thresholds: Sequence[float | str] | None = None) -> list[Selected]:
        """Accuracy among the samples that are kept, when those with a radius below a threshold are set aside.

        Args:
            thresholds: in ℓ2; None: 0, the quantiles of the radii by tenths, and `eps`.

        Raises:
            ArgumentError: a task with several outputs for each sample.
        """
        radius, correct = self.radius, self.certificates.correct
        if radius.dim() != 1:
            raise ArgumentError(f"task {self.task.name}: has several radii for each sample")
        if thresholds is None:
            levels = radius.sort().values[[i * (len(radius) - 1) // 10 for i in range(1, 10)]].tolist()
            thresholds = sorted({0.0, *levels, *map(parse_radius, self.eps)})
        rows = []
        for threshold in map(parse_radius, thresholds):
            kept = radius >= threshold
            share = correct[kept].double().mean().item() if kept.any() else math.nan
            rows.append(Selected(threshold, kept.double().mean().item(), share))
        return rows

    def table(self, title: str | None = None) -> Table:
        """One row: clean accuracy, certified accuracy at each of `eps`, mean radius; `rich.print` shows it.

        Args:
            title: None: the data.
        """
        from liplayers.certification import report as reports

        heading = f"{self.title}, {len(self)} samples" if title is None else title
        return reports.results_table({self.task.name: self.certificates}, self.eps, heading, self.unit)

    def to_frame(self) -> DataFrame:
        """One row for each sample, or for each of its outputs: label, prediction, margin, radius, correct."""
        with extra("train"):
            import pandas as pd

        found = self.certificates
        columns = {name: getattr(found, name).flatten().numpy() for name in ("label", "prediction", "margin", "radius")}
        columns["correct"] = found.correct.flatten().numpy()
        if found.label.dim() == 1:
            return pd.DataFrame(columns, index=pd.RangeIndex(len(self), name="index"))
        index = pd.MultiIndex.from_product([range(len(self)), range(found.label.shape[1])], names=["index", "output"])
        frame = pd.DataFrame(columns, index=index)
        return frame if found.counted is None else frame[found.counted.flatten().numpy()]

    @property
    def title(self) -> str:
        return f"{self.name} ({self.split})" if self.split else self.name

    def plot(self, title: str | None = None) -> Figure:
        """Certified accuracy over the radius.

        Args:
            title: None: the data.
        """
        from liplayers.certification import report as reports

        return reports.curve({self.task.name: self.certificates}, title or self.title, self.unit)

    @cached_property
    def report(self) -> dict[str, Any]:
        """What report.json holds: what was proven, of which weights and data, and the figures."""
        from liplayers.certification import report as reports

        network = self.network
        device = network.device
        found: dict[str, Any] = {
            "mode": network.mode,
            "statement": reports.statement(network.mode, self.unit),
            "checkpoint": None if self.checkpoint is None else reports.checkpoint_entry(self.checkpoint),
            "data": {
                "name": self.name,
                "unit": self.unit,
                "split": self.split or None,
                "sha256": self.data_sha256,
                "config": None if self.data_config is None else dict(self.data_config),
            },
            "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
            "dtype": str(network.dtype).removeprefix("torch."),
            "environment": reports.environment(),
            **reports.proofs(network),
            "results": reports.summary(self.certificates, self.eps),
            "certificates_sha256": hashlib.sha256(reports.certificates_bytes(self.certificates)).hexdigest(),
        }
        if not isinstance(self.task, Classification):
            found["task"] = {"name": self.task.name, "settings": vars(self.task), "certified": self.task.statement}
        scaling = self.scaling
        if scaling is not None and scaling.mean is not None and scaling.std is not None:
            found |= reports.original_units(scaling.names, scaling.mean, scaling.std, self.mean_radius)
        return found

    def save(self, folder: str | Path) -> list[Path]:
        """Write the command's files: report.json, certificates.csv, certified_accuracy.png and, in proofs, network.pt.

        With the checkpoint that the model is from (`certify(…, checkpoint=…)`), `certify.py verify=…` accepts them. Of
        several outputs for each sample the certificates are in certificates.npz.

        Args:
            folder: made where it is not there.

        Raises:
            OutputError: it cannot be written.
        """
        from liplayers.certification import report as reports

        return reports.write_outputs(Path(folder), self.writers())

    def writers(self, label: str | None = None) -> dict[str, Callable[[Path], object]]:
        """The files of `save`: name → function that writes it.

        Args:
            label: of the line in the plot; None: the task.
        """
        from liplayers.certification import report as reports

        content = reports.certificates_bytes(self.certificates)
        name = "certificates.csv" if self.radius.dim() == 1 else "certificates.npz"
        curve = reports.curve({label or self.task.name: self.certificates}, self.title, self.unit)
        files: dict[str, Callable[[Path], object]] = {
            "report.json": reports.json_writer(self.report),
            name: lambda path: path.write_bytes(content),
            "certified_accuracy.png": reports.figure_writer(curve),
        }
        if self.network.mode == "proof":
            files["network.pt"] = reports.state_writer(self.network.weights())
        return files

    def audit(
        self,
        samples: int = 1000,
        *,
        eps: Sequence[float | str] | None = None,
        steps: int = 50,
        seed: int = 0,
        progress: Callable[[int, int], object] | None = None,
    ) -> Audit | TaskAudit:
        """Attack the certificates of the first samples; their radii are computed again.

        Args:
            samples: how many.
            eps: radii of a classifier to attack at, besides its own; None: `eps`.
            steps: gradient steps of each attack.
            seed: of the random numbers.
            progress: called with the number of stages that are done, and of all stages.

        Raises:
            ArgumentError: in mode=fast, whose figures are not proofs; data that can be read once alone.
        """
        network = self.network
        if network.mode != "proof":
            raise ArgumentError(f"audit: needs mode='proof', got mode={network.mode!r}: other figures are not proofs")
        inputs, labels = self._first(samples)
        inputs = inputs.to(network.device, torch.float64)
        if not isinstance(self.task, Classification):
            found = self.task.certificates(network.outputs(inputs), labels)
            return audit_task(network, self.task, inputs, found, steps=steps, seed=seed, progress=progress)
        radius = network.radius(inputs)
        return audit(
            network,
            inputs,
            labels.to(network.device),
            radius.to(network.device),
            margin_lipschitz=network.margin_lipschitz.to(network.device),
            certify=lambda x: network.radius(x).to(x.device),
            eps=[parse_radius(e) for e in (self.eps if eps is None else eps)],
            steps=steps,
            seed=seed,
            progress=progress,
        )

    def _first(self, samples: int) -> Pair:
        parts, count = [], 0
        for inputs, labels in self._again():
            parts.append((inputs, self.task.labels(labels, len(inputs), self.network.output_shape, count)))
            count += len(inputs)
            if count >= samples:
                break
        if not parts:
            raise ArgumentError("audit: the data can be read once only; certify a list, a Dataset or a DataLoader")
        return torch.cat([x for x, _ in parts])[:samples], torch.cat([y for _, y in parts])[:samples]


def certify(
    model: nn.Module,
    data: Any,
    *,
    eps: Sequence[float | str] | float | str = (),
    task: str | Task = "classification",
    mode: str | None = None,
    device: torch.device | str | None = None,
    keys: tuple[str, str] | None = None,
    split: str = "test",
    batch_size: int = 256,
    input_range: tuple[float, float] | str | None = "auto",
    name: str | None = None,
    unit: str | None = None,
    class_names: Sequence[str] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    checkpoint: Checkpoint | str | Path | None = None,
    data_config: Mapping[str, Any] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Certification:
    """Certify a model on data: a radius for each sample within which its prediction is proven to stay.

    Args:
        model: in evaluation mode, or a `CertifiedNetwork`; not changed.
        data: a DataLoader, a Dataset, a list of batches, a pair (inputs, labels) of tensors or arrays, a dict of these,
            or a `liplayers.data.DataModule`. Batches are pairs, or dicts with `keys`. The order does not matter.
        eps: radii to show, numbers or strings such as "36/255".
        task: what the outputs mean, a key of `liplayers.certification.TASKS` or a `Task`.
        mode: "proof" (None) or "fast", as in `CertifiedNetwork`.
        device: where it runs; None: the CPU.
        keys: of inputs and labels in dicts, such as ("image", "label").
        split: of a DataModule.
        batch_size: for a Dataset, tensors and arrays.
        input_range: what every input must lie within; "auto": that of a DataModule, else [0, 1] for images (C, H, W)
            and any finite number for other inputs; None: any finite number.
        name: of the data, for tables and plots.
        unit: what distances are measured in, such as "pixels in [0, 1]".
        class_names: in the order of the labels.
        weights: those of an earlier `CertifiedNetwork`, to run instead of those computed here.
        checkpoint: that the model is from, for the report: `certify.py verify=…` takes it.
        data_config: settings that the data were made with, for the report; None: those of the checkpoint.
        progress: called after each batch with the number of samples that are done.

    Raises:
        ArgumentError: a model in training mode, or settings that a `CertifiedNetwork` has already.
        ShapeError: inputs of another shape than the network's, outputs that are not of the task.
        DataError: no samples, or inputs or labels that cannot be used; named by their number.
        UnknownBoundError: parts of the model without a known bound; all are named.

    >>> from liplayers import AOLLinear
    >>> found = certify(AOLLinear(2, 2).eval(), (torch.rand(3, 2), torch.tensor([0, 1, 0])), eps=[0.1])
    >>> found.radius.shape, found.accuracy(0.1) <= found.clean_accuracy
    (torch.Size([3]), True)
    """
    task = task_of(task)
    shown = (eps,) if isinstance(eps, (int, float, str)) else tuple(eps)
    for radius in shown:
        parse_radius(radius)
    found = _Data(data, keys, split, batch_size)
    first, batches = found.begin()
    network = _network(model, tuple(first.shape[1:]), mode, device, weights)
    if not isinstance(model, CertifiedNetwork) and isinstance(task, Classification):
        _check_classes(network, class_names if class_names is not None else found.get("class_names"))
    limits = found.get("input_range", _limits(network.input_shape)) if input_range == "auto" else input_range
    if isinstance(limits, str):
        raise ArgumentError(f"input_range={limits!r}; expected (low, high), None or 'auto'")
    digest, norms = hashlib.sha256(), []

    def seen(inputs: Tensor, labels: Tensor, outputs: Outputs) -> None:
        norms.append(outputs.norms)
        for tensor in (inputs, labels):
            content = tensor.detach().cpu().contiguous()
            digest.update(f"{tuple(content.shape[1:])} {content.dtype}".encode())
            digest.update(content.reshape(-1).view(torch.uint8).numpy().tobytes())

    certificates = certify_batches(network, batches, task=task, input_range=limits, progress=progress, seen=seen)
    if (scaling := found.get("scaling")) is not None:
        radius = scaling.radius(certificates.radius, data.split(split).inputs)
        certificates = replace(certificates, radius=radius)
    origin = load_checkpoint(checkpoint) if isinstance(checkpoint, (str, Path)) else checkpoint
    names = class_names if class_names is not None else found.get("class_names")
    if names is None:
        names = range(2 if isinstance(task, Binary) else network.output_shape[0] if network.output_shape else 1)
    return Certification(
        network=network,
        certificates=certificates,
        task=task,
        eps=shown,
        name=name or found.get("name", "data"),
        unit=unit or found.get("unit", IMAGES if limits == (0.0, 1.0) else "the inputs"),
        class_names=tuple(map(str, names)),
        split=split if found.is_module else "",
        data_sha256=data.fingerprint(split) if found.is_module else digest.hexdigest(),
        norms=torch.cat(norms),
        checkpoint=origin,
        data_config=data_config if data_config is not None or origin is None else origin.config["data"],
        scaling=scaling,
        _again=found.batches if found.again else _nothing,
    )


def _network(
    model: nn.Module,
    input_shape: tuple[int, ...],
    mode: str | None,
    device: torch.device | str | None,
    weights: Mapping[str, Tensor] | None,
) -> CertifiedNetwork:
    if isinstance(model, CertifiedNetwork):
        for key, given, own in (("mode", mode, model.mode), ("device", device, model.device)):
            if given is not None and str(given) != str(own):
                raise ArgumentError(f"{key}={given!r}: the CertifiedNetwork has {key}={str(own)!r}; make another")
        if weights is not None:
            raise ArgumentError("weights: a CertifiedNetwork has its own; give the model")
        return model
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model: got {type(model).__name__}; expected an nn.Module or a CertifiedNetwork")
    training = next((path for path, module in model.named_modules() if module.training), None)
    if training is not None:
        where = f"its part {training} is" if training else "it is"
        raise ArgumentError(f"model: {where} in training mode; call model.eval(), since that is what is certified")
    return CertifiedNetwork(model, input_shape, mode=mode or "proof", device=device or "cpu", weights=weights)


def _check_classes(network: CertifiedNetwork, class_names: Sequence[str] | None) -> None:
    classes = network.output_shape
    if class_names is not None and len(classes) == 1 and classes[0] != len(class_names):
        raise ShapeError(f"the model has {classes[0]} logits, the data {len(class_names)} classes")


def _limits(input_shape: tuple[int, ...]) -> tuple[float, float] | None:
    return (0.0, 1.0) if len(input_shape) == 3 else None


class _Data:
    """Batches of inputs and labels, from whatever they come in."""

    def __init__(self, data: Any, keys: tuple[str, str] | None, split: str, batch_size: int) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ArgumentError(f"batch_size={batch_size!r}; expected an integer of at least 1")
        if keys is not None and (isinstance(keys, str) or len(keys) != 2):
            raise ArgumentError(f"keys={keys!r}; expected two, of inputs and labels, such as ('image', 'label')")
        self.keys = keys
        self.is_module = callable(getattr(data, "eval_loader", None))
        self._about = data if self.is_module else None
        self.source: Iterable[Any]
        if self.is_module:
            self.source = data.eval_loader(split)
        elif isinstance(data, Mapping) or _is_arrays(data):
            inputs, labels = self._pair(data, "data")
            self.source = _Slices(_tensor(inputs), _tensor(labels), batch_size)
        elif isinstance(data, Dataset) and not isinstance(data, DataLoader):
            self.source = DataLoader(data, batch_size=batch_size)
        elif isinstance(data, Iterable) and not isinstance(data, (str, Tensor, np.ndarray)):
            self.source = data
        else:
            raise DataError(
                f"data: got {type(data).__name__}; expected a DataLoader, a Dataset, a list of batches, or a pair "
                "(inputs, labels)"
            )
        self.again = not isinstance(self.source, Iterator)

    def get(self, attribute: str, default: Any = None) -> Any:
        return default if self._about is None else getattr(self._about, attribute)

    def begin(self) -> tuple[Tensor, Iterator[Pair]]:
        """The first inputs, and all batches from the first on."""
        batches = self.batches()
        try:
            first = next(batches)
        except StopIteration:
            raise DataError("no samples to certify: the data set is empty") from None
        return first[0], chain([first], batches)

    def batches(self) -> Iterator[Pair]:
        for number, batch in enumerate(self.source):
            inputs, labels = map(_tensor, self._pair(batch, f"batch {number}"))
            if not inputs.dim():
                raise ShapeError(f"batch {number}: inputs are one number; expected (N, …)")
            yield inputs, labels

    def _pair(self, batch: Any, where: str) -> tuple[Any, Any]:
        if isinstance(batch, Mapping):
            if self.keys is None:
                found = sorted(map(str, batch))
                raise DataError(f"{where}: a dict with {found}; say which are the inputs and labels: keys=(…, …)")
            missing = [key for key in self.keys if key not in batch]
            if missing:
                raise DataError(f"{where}: has no {missing[0]!r}, only {sorted(map(str, batch))}; see keys=…")
            return batch[self.keys[0]], batch[self.keys[1]]
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            got = f"{len(batch)} parts" if isinstance(batch, (tuple, list)) else type(batch).__name__
            raise DataError(f"{where}: got {got}; expected (inputs, labels), or a dict and keys=…")
        return batch[0], batch[1]


@dataclass(frozen=True)
class _Slices:
    """Batches of samples in memory."""

    inputs: Tensor
    labels: Tensor
    size: int

    def __iter__(self) -> Iterator[Pair]:
        if not self.inputs.dim() or not self.labels.dim() or len(self.inputs) != len(self.labels):
            got = f"{tuple(self.inputs.shape)} and {tuple(self.labels.shape)}"
            raise DataError(f"inputs and labels: got {got}; expected one label for each input, (N, …) and (N, …)")
        yield from zip(self.inputs.split(self.size), self.labels.split(self.size), strict=True)


def _is_arrays(data: Any) -> bool:
    return isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(d, (Tensor, np.ndarray)) for d in data)


def _tensor(values: Any) -> Any:
    """A tensor of an array; what is neither stays, for the task to name."""
    if not isinstance(values, np.ndarray):
        return values
    try:
        return torch.from_numpy(np.ascontiguousarray(values))
    except TypeError:
        raise DataError(f"an array of {values.dtype}; expected numbers") from None
