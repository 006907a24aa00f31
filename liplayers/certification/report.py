"""What a certification leaves behind: the table, report.json, certificates.csv, certified_accuracy.png."""

from __future__ import annotations

import io
import json
import math
import os
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import liplayers
from liplayers.certification.certificates import Certificates
from liplayers.certification.evidence import CSV_HEADER
from liplayers.certification.network import CertifiedNetwork
from liplayers.certification.radius import parse_radius
from liplayers.checkpoint import Checkpoint
from liplayers.errors import OutputError
from liplayers.extras import extra
from liplayers.files import held, save_tensors
from liplayers.text import printable

with extra("train"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table
    from rich.text import Text

__all__ = [
    "CSV_HEADER",
    "MOST_FEATURES",
    "MOST_RADII",
    "STATEMENTS",
    "Radii",
    "certificates_bytes",
    "checkpoint_entry",
    "csv_text",
    "curve",
    "environment",
    "figure_writer",
    "json_text",
    "json_writer",
    "label_plot",
    "original_units",
    "proof_line",
    "proofs",
    "results_table",
    "state_writer",
    "statement",
    "summary",
    "text_writer",
    "units_table",
    "write_outputs",
]

Radii = Sequence[float | str]

MOST_RADII = 12  # columns of a table; the report has them all
MOST_FEATURES = 20  # rows of a table of features; the report has them all


STATEMENTS = {
    "proof": (
        "The classifier is the float64 evaluation of the frozen weights in network.pt, as it runs on this device. Of "
        "each sample with a radius R > 0 it is proven that every float64 input within l2 distance R of the sample, in "
        "the norm of {unit}, gets the same prediction. Layer bounds are proven for the weights as stored, with the "
        "rounding of their computation; the rounding of the forward pass is counted for the sample and for every input "
        "in its ball. Assumed: IEEE 754 arithmetic with rounding to nearest and without flushing of subnormal numbers, "
        "matrix products and convolutions that sum products in any order, and the accuracy of exp, tanh, sin and cos "
        "that docs/certificates.md states; nothing is assumed of LAPACK."
    ),
    "fast": (
        "The classifier is the model in its own dtype. Radii are in the l2 norm of {unit}, from layer bounds that are "
        "proven in exact arithmetic. The rounding of the forward pass and of the weights is not counted: these figures "
        "are for monitoring and are no proofs; certify with mode=proof."
    ),
}


def statement(mode: str, unit: str) -> str:
    """What a report in this mode claims; `unit` is what the inputs are, such as "pixels in [0, 1]"."""
    return STATEMENTS[mode].format(unit=unit)


def proofs(network: CertifiedNetwork) -> dict[str, Any]:
    """What was proven of the network: hash, bounds of its layers, rounding."""
    split = network.bounds.split
    found: dict[str, Any] = {
        "network": {
            "sha256": network.sha256(),
            "stored_dtypes": sorted({_name(dtype) for dtype in network.stored_dtypes.values()}),
            "parameters": sum(t.numel() for t in network.network.parameters()),
        },
        "lipschitz": {
            "body": split.body_bound,
            "head": None if split.head is None else type(split.head).__name__,
            "layers": network.bounds.upper,
            "lower": network.bounds.lower,
        },
    }
    rounding = network.worst_rounding
    if rounding is not None:
        largest = max(rounding.rows, key=lambda row: row.local_error, default=None)
        found["rounding"] = {
            "input_norm": rounding.input_norm,
            "logit_error": rounding.error,
            "largest_term": None if largest is None else {"layer": largest.path, "error": largest.local_error},
            "layers": {row.path: row.local_error for row in rounding.rows},
        }
    return found


def proof_line(report: Mapping[str, Any]) -> str:
    """What stands behind a table, in a line."""
    body = f"Lipschitz bound below the head {report['lipschitz']['body']:.9g}"
    if "rounding" not in report:
        return f"mode=fast: {body}; rounding is not counted, these figures prove nothing"
    rounding = report["rounding"]
    worst = rounding["largest_term"]
    most = f", most of it in {worst['layer'] or 'the model'}" if worst and worst["error"] else ""
    return f"mode=proof: {body}; rounding moves a logit by {rounding['logit_error']:.1e} at most{most}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def results_table(results: Mapping[str, Certificates], eps: Radii, title: str, unit: str) -> Table:
    """One row for each named result: clean accuracy, certified accuracy at each radius, mean radius."""
    shown, more = eps[:MOST_RADII], len(eps) - MOST_RADII
    about = f"accuracy in %, certified at l2 radius ε of {printable(unit)}; wrong points have R = 0"
    caption = Text(about + (f"; {more} more radii are in report.json" if more > 0 else ""), "table.caption")
    table = Table(title=Text(printable(title), "table.title"), caption=caption)
    table.add_column("model", overflow="fold")
    for heading in ["clean", *(f"ε={e}" for e in shown), "mean R"]:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, certificates in results.items():
        values = [certificates.clean_accuracy, *(certificates.accuracy(parse_radius(e)) for e in shown)]
        cells = [f"{100 * value:.2f}" for value in values]
        table.add_row(Text(printable(name)), *cells, f"{certificates.mean_radius:.4f}")
    return table


def summary(certificates: Certificates, eps: Radii) -> dict[str, Any]:
    """The figures of the table as plain numbers."""
    certified = [
        {"eps": str(e), "radius": parse_radius(e), "accuracy": certificates.accuracy(parse_radius(e))} for e in eps
    ]
    return {
        "samples": len(certificates.label),
        "clean_accuracy": certificates.clean_accuracy,
        "certified_accuracy": certified,
        "mean_radius": certificates.mean_radius,
        "samples_with_non_finite_logits": certificates.not_finite,
    }


def checkpoint_entry(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a report says of the checkpoint that a model is from."""
    return {
        "path": str(checkpoint.path),
        "sha256": checkpoint.sha256,
        "epoch": checkpoint.epoch,
        "liplayers": checkpoint.version,
        "config": checkpoint.config,
    }


def original_units(
    names: Sequence[str], mean: Sequence[float], std: Sequence[float], mean_radius: float
) -> dict[str, Any]:
    """What a radius R of features standardised as (x − mean)/std means in their own units.

    Feature j alone may change by R·std_j; an ℓ2 ball of radius R·min(std) in the original units lies within the
    certified one.

    >>> original_units(["cm"], [170.0], [10.0], 0.5)["units"]
    [{'name': 'cm', 'mean': 170.0, 'std': 10.0, 'mean_radius_along': 5.0}]
    """
    return {
        "units": [
            {"name": name, "mean": m, "std": s, "mean_radius_along": mean_radius * s}
            for name, m, s in zip(names, mean, std, strict=True)
        ],
        "radius_factor_original_l2": min(std),
    }


def units_table(units: Sequence[Mapping[str, Any]], title: str) -> Table:
    """The first features of `original_units`, one a row."""
    more = len(units) - MOST_FEATURES
    table = Table(
        title=Text(printable(title), "table.title"),
        caption="mean R along: how far this feature alone may move, in its own unit; in l2 norm of them all: R times "
        "the least std" + (f"; {more} more features are in report.json" if more > 0 else ""),
    )
    table.add_column("feature", overflow="fold")
    for heading in ("mean", "std", "mean R along"):
        table.add_column(heading, justify="right", no_wrap=True)
    for unit in units[:MOST_FEATURES]:
        table.add_row(
            Text(printable(unit["name"])), *(f"{unit[key]:.4g}" for key in ("mean", "std", "mean_radius_along"))
        )
    return table


def environment() -> dict[str, str]:
    """Versions and machine that a result was computed with."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "liplayers": liplayers.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
    }


def curve(results: Mapping[str, Certificates], title: str, unit: str) -> Figure:
    """Certified accuracy over the radius, one line for each named result."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    largest = 0.0
    for name, certificates in results.items():
        counted = torch.ones_like(certificates.correct) if certificates.counted is None else certificates.counted
        radii = certificates.radius[certificates.correct & counted].double()
        finite = radii[radii.isfinite()].sort().values.numpy()
        x = np.concatenate([[0.0], finite])
        y = 100 * (len(radii) - np.arange(len(x))) / int(counted.sum())
        axes.step(x, y, where="post", label=f"clean {100 * certificates.clean_accuracy:.1f} %: {printable(name)}")
        largest = max(largest, float(x[-1]))
    axes.set(ylabel="certified accuracy (%)", xlim=(0, largest * 1.02 or 1.0), ylim=(0, 100))
    axes.grid(alpha=0.3)
    label_plot(axes, title, unit)
    return figure


def label_plot(axes: Axes, title: str, unit: str) -> None:
    """Title, axis of radii and legend; a `$` in a name begins no formula."""
    axes.set_title(printable(title), parse_math=False)
    axes.set_xlabel(f"ℓ₂ radius ε, {printable(unit)}", parse_math=False)
    for text in axes.legend(loc="upper right").get_texts():
        text.set_parse_math(False)


def write_outputs(folder: Path, writers: Mapping[str, Callable[[Path], object]]) -> list[Path]:
    """Write every file to a temporary folder first, then move them all: a failure leaves earlier files as they were.

    Args:
        writers: file name → function that writes it to the path it is given.

    Raises:
        OutputError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as temporary:
            for name, write in writers.items():
                write(Path(temporary) / name)
            with held(folder, "writing", patience=60):  # of two processes, the files of one and not a mixture
                for name in writers:
                    os.replace(Path(temporary) / name, folder / name)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be written ({error.strerror or error}); choose another folder with output=…"
        ) from None
    return [folder / name for name in writers]


def json_text(content: Mapping[str, Any]) -> str:
    """Strict JSON; infinity is written as a string."""

    def plain(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return json.dumps(plain(content), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def json_writer(content: Mapping[str, Any]) -> Callable[[Path], object]:
    """A writer of `json_text`."""
    return text_writer(json_text(content))


def csv_text(certificates: Certificates) -> str:
    """One row for each sample; numbers are exact (shortest repr)."""
    columns = (certificates.label, certificates.prediction, certificates.margin, certificates.radius)
    rows = [CSV_HEADER, *((i, *row) for i, row in enumerate(zip(*(c.tolist() for c in columns), strict=True)))]
    return "".join(",".join(map(str, row)) + "\n" for row in rows)


def certificates_bytes(certificates: Certificates) -> bytes:
    """The content of certificates.csv; of several outputs for each sample that of certificates.npz."""
    if certificates.label.dim() == 1:
        return csv_text(certificates).encode()
    content = io.BytesIO()
    np.savez_compressed(content, **{name: c.numpy() for name, c in vars(certificates).items() if c is not None})
    return content.getvalue()


def text_writer(text: str) -> Callable[[Path], object]:
    """A writer of this text, without another ending of lines on any system; names that are no UTF-8 are escaped."""
    return lambda path: path.write_bytes(text.encode("utf-8", "backslashreplace"))


def state_writer(state: Mapping[str, Tensor]) -> Callable[[Path], object]:
    """A writer of tensors, to be read by `torch.load(…, weights_only=True)`."""
    return lambda path: save_tensors(dict(state), path)


def figure_writer(figure: Figure) -> Callable[[Path], object]:
    """A writer of a PNG."""
    return lambda path: figure.savefig(path, format="png", dpi=150)
