"""What a benchmark leaves behind: a table for each size, and layers_<device>.json, .md and .png."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from rich import box
from rich.table import Table

from liplayers.certification.report import figure_writer, json_writer, write_outputs

Row = dict[str, Any]

FOLDER = Path(__file__).parent / "results"
HEADINGS = ("family", "against", "train ms", "×", "eval ms", "×", "MB", "×")
EXPLANATION = (
    "× is ours divided by the other's, the median over rounds of the ratio within a round, quartiles in brackets; ms "
    "is our median. Train: weight, forward, backward; eval: forward, weights cached; MB: the most that a training step "
    "holds at a time beyond parameters, input and output gradient. – is what a layer refuses."
)
COLORS = {"train": "#4477aa", "eval": "#ee6677"}


def by_size(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """(title, rows) for each role and size, in their order."""
    groups = groupby(rows, key=lambda row: (row["role"], row["size"]))
    return [(f"{role}: {size}", list(found)) for (role, size), found in groups]


def _number(value: float | None) -> str:
    """Three significant digits or all before the point; what is not there is a dash.

    >>> _number(0.01234), _number(1.5), _number(123.4), _number(None)
    ('0.0123', '1.50', '123', '–')
    """
    if value is None:
        return "–"
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{max(0, digits)}f}"


def _cells(row: Row, with_quartiles: bool) -> list[str]:
    memory = row["memory_bytes"]
    cells = [row["family"], row["against"]]
    for what, own in (("train", row["train_ms"]), ("eval", row["eval_ms"]), ("memory", memory and memory / 1e6)):
        ratio = _number(row[f"{what}_ratio"])
        spread = row.get(f"{what}_ratio_quartiles")
        if spread and with_quartiles:
            ratio += f" ({_number(spread[0])} – {_number(spread[1])})"
        cells += [_number(own), ratio]
    return cells


def results_tables(rows: Sequence[Row]) -> list[Table]:
    """One table for each role and size."""
    tables = []
    for title, found in by_size(rows):
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for heading in HEADINGS:
            text = heading in HEADINGS[:2]
            folds = heading == "against"  # the numbers never do
            table.add_column(heading, justify="left" if text else "right", no_wrap=not folds, overflow="fold")
        for row in found:
            table.add_row(*_cells(row, with_quartiles=False), style="dim" if row["peer"] else None)
        tables.append(table)
    return tables


def markdown(rows: Sequence[Row], machine: Mapping[str, Any]) -> str:
    """The tables with quartiles, the machine, and the reasons of what was refused."""
    lines = ["# Layers against torch's plain layers", "", EXPLANATION, ""]
    lines += [f"- {name}: {value}" for name, value in machine.items()]
    for title, found in by_size(rows):
        lines += ["", f"## {title}", "", f"| {' | '.join(HEADINGS)} |", "|---|---" + "|--:" * (len(HEADINGS) - 2) + "|"]
        lines += [f"| {' | '.join(_cells(row, with_quartiles=True))} |" for row in found]
        refused = [f"- {row['family']}, {row['against']}: {row['refused']}" for row in found if row["refused"]]
        lines += ["", "Refused:", "", *refused] if refused else []
    return "\n".join(lines) + "\n"


def _panel(axes: Axes, title: str, rows: Sequence[Row], places: int) -> None:
    """Two bars for each row, on as many places as the longest panel of the line has."""
    axes.set_title(title, fontsize=9, loc="left")
    for position, row in enumerate(rows):
        for offset, what in ((-0.2, "train"), (0.2, "eval")):
            ratio = row[f"{what}_ratio"]
            if ratio is None:
                axes.annotate("–", (1, position + offset), va="center", fontsize=7, color=COLORS[what])
                continue
            axes.barh(position + offset, ratio - 1, 0.38, left=1, color=COLORS[what])
            right = ratio >= 1
            axes.annotate(
                _number(ratio),
                (ratio, position + offset),
                xytext=(2 if right else -2, 0),
                textcoords="offset points",
                ha="left" if right else "right",
                va="center",
                fontsize=6.5,
            )
    axes.set_yticks(range(len(rows)), [row["family"] for row in rows], fontsize=8)
    axes.set_ylim(places - 0.4, -0.6)
    axes.axvline(1, color="black", linewidth=0.8)


def figure(rows: Sequence[Row], machine: Mapping[str, Any]) -> Figure:
    """Horizontal bars of the training and evaluation ratio to torch's plain layer, a panel for each size."""
    panels = [(title, found) for title, found in by_size([row for row in rows if not row["peer"]])]
    columns = min(3, len(panels))
    lines = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    places = [max(len(found) for _, found in line) for line in lines]
    heights = [0.8 + 0.34 * most for most in places]
    drawing = Figure(figsize=(4.4 * columns + 0.4, sum(heights) + 0.8), layout="constrained")
    grid = drawing.subplots(len(lines), columns, squeeze=False, sharex=True, height_ratios=heights)
    values = [row[f"{what}_ratio"] for row in rows if not row["peer"] for what in COLORS]
    values = [value for value in values if value is not None] or [1.0]
    for place, axes in enumerate(grid.flat):
        if place >= len(panels):
            axes.set_axis_off()
            continue
        _panel(axes, *panels[place], places[place // columns])
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(min(0.8, min(values) / 1.6), max(2.0, max(values) * 1.8))
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
        axes.tick_params(axis="x", labelbottom=place + columns >= len(panels), labelsize=8)
    handles = [drawing.axes[0].barh(0, 0, color=color, label=what) for what, color in COLORS.items()]
    drawing.legend(handles=handles, labels=["training step", "evaluation"], loc="outside upper right", ncols=2)
    drawing.suptitle("time of our layer / time of torch's plain layer", x=0.01, ha="left", fontsize=10)
    name = machine["cpu"] if machine["device"] == "cpu" else machine["device"]
    drawing.supxlabel(f"{name}; threads: {machine['threads']}; torch {machine['torch']}", fontsize=8)
    return drawing


def write_results(folder: Path, name: str, rows: Sequence[Row], machine: Mapping[str, Any]) -> list[Path]:
    """Write name.json, name.md and name.png, each under a temporary name first; the paths.

    Raises:
        OutputError: the folder cannot be written.
    """
    text = markdown(rows, machine)

    def write_markdown(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    return write_outputs(
        folder,
        {
            f"{name}.json": json_writer({"machine": dict(machine), "rows": list(rows)}),
            f"{name}.md": write_markdown,
            f"{name}.png": figure_writer(figure(rows, machine)),
        },
    )
