"""What a certification leaves behind: the table, report.json, certificates.csv, certified_accuracy.png."""

from __future__ import annotations

import csv
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
from matplotlib.figure import Figure
from rich.markup import escape
from rich.table import Table

import liplayers
from liplayers.certification.evaluate import Certificates
from liplayers.certification.radius import parse_radius
from liplayers.errors import OutputError

Radii = Sequence[float | str]

MOST_FEATURES = 20  # rows of a table of features; the report has them all


def assumptions(unit: str) -> str:
    """What the certificates rest on; `unit` is what the inputs are, such as "pixels in [0, 1]"."""
    return (
        f"l2 norm of {unit}; the classifier is the float64 evaluation of the model; layer bounds are proven in "
        "exact arithmetic; the rounding of the float64 forward pass is not counted yet"
    )


def results_table(results: Mapping[str, Certificates], eps: Radii, title: str, unit: str) -> Table:
    """One row for each named result: clean accuracy, certified accuracy at each radius, mean radius."""
    table = Table(title=title, caption=f"accuracy in %, certified at l2 radius ε of {unit}; wrong points have R = 0")
    table.add_column("model", overflow="fold")
    for heading in ["clean", *(f"ε={e}" for e in eps), "mean R"]:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, certificates in results.items():
        values = [certificates.clean_accuracy, *(certificates.accuracy(parse_radius(e)) for e in eps)]
        cells = [f"{100 * value:.2f}" for value in values]
        table.add_row(name, *cells, f"{certificates.mean_radius:.4f}")
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
        title=title,
        caption="mean R along: how far this feature alone may move, in its own unit; in l2 norm of them all: R times "
        "the least std" + (f"; {more} more features are in report.json" if more > 0 else ""),
    )
    table.add_column("feature", overflow="fold")
    for heading in ("mean", "std", "mean R along"):
        table.add_column(heading, justify="right", no_wrap=True)
    for unit in units[:MOST_FEATURES]:
        table.add_row(escape(unit["name"]), *(f"{unit[key]:.4g}" for key in ("mean", "std", "mean_radius_along")))
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
        radii = certificates.radius[certificates.correct].double()
        finite = radii[radii.isfinite()].sort().values.numpy()
        x = np.concatenate([[0.0], finite])
        y = 100 * (len(radii) - np.arange(len(x))) / len(certificates.label)
        axes.step(x, y, where="post", label=f"{name} (clean {100 * certificates.clean_accuracy:.1f} %)")
        largest = max(largest, float(x[-1]))
    axes.set(
        xlabel=rf"$\ell_2$ radius $\varepsilon$, {unit}",
        ylabel="certified accuracy (%)",
        title=title,
        xlim=(0, largest * 1.02 or 1.0),
        ylim=(0, 100),
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    return figure


def write_outputs(folder: Path, writers: Mapping[str, Callable[[Path], None]]) -> list[Path]:
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
            for name in writers:
                os.replace(Path(temporary) / name, folder / name)
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be written ({error.strerror or error}); choose another folder with output=…"
        ) from None
    return [folder / name for name in writers]


def json_writer(content: Mapping[str, Any]) -> Callable[[Path], None]:
    """A writer of strict JSON; infinity is written as a string."""

    def plain(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return lambda path: _write_text(path, json.dumps(plain(content), indent=2, allow_nan=False, ensure_ascii=False))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")


def csv_writer(certificates: Certificates) -> Callable[[Path], None]:
    """A writer of one row for each sample; numbers are exact (shortest repr)."""

    def write(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["index", "label", "prediction", "margin", "radius"])
            columns = (certificates.label, certificates.prediction, certificates.margin, certificates.radius)
            rows.writerows((i, *row) for i, row in enumerate(zip(*(c.tolist() for c in columns), strict=True)))

    return write


def figure_writer(figure: Figure) -> Callable[[Path], None]:
    """A writer of a PNG."""
    return lambda path: figure.savefig(path, format="png", dpi=150)
