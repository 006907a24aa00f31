"""The front of clean against certified accuracy over the finished runs of a sweep.

    python -m liplayers.cli.front runs/sweep --eps 108/255

Reads what each run leaves behind, config.yaml and csv/version_*/metrics.csv, and shows the epoch that `best.ckpt`
holds, on the validation split: hyper-parameters are to be chosen there and not on test samples. Runs without a
validation split are compared on their training samples. The output says which; the figures come from float32 margins,
so certify what was chosen.

Writes front.csv, front.md and front.png into the folder.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from liplayers.certification import parse_radius
from liplayers.certification.report import figure_writer, text_writer, write_outputs
from liplayers.checkpoint import check_parts
from liplayers.cli.configuration import radii
from liplayers.commands.entry import front_command, front_options
from liplayers.commands.output import console, say
from liplayers.commands.quoting import command, hydra_override
from liplayers.errors import ConfigError, DataError, DataNotFoundError, LipschitzError
from liplayers.text import one_line, printable
from liplayers.training.module import certified_name

__all__ = [
    "MISSING",
    "MOST_LABELS",
    "MOST_SETTINGS",
    "NO_SETTINGS",
    "SPLITS",
    "Front",
    "Run",
    "cells",
    "compare",
    "differing",
    "front_figure",
    "main",
    "markdown",
    "non_dominated",
    "read_run",
    "rich_table",
    "run_folders",
    "sweep_front",
]

SPLITS = {"val": "validation split", "train": "training samples (no validation split)"}
NO_SETTINGS = ("output", "resume", "overwrite", "allow")  # where a run writes and how it was started
MOST_LABELS = 12  # points that are all labelled; of more, only the front
MOST_SETTINGS = 4  # in a label; where more differ, it names the run
MISSING = "–"


@dataclass(frozen=True)
class Run:
    """A finished run: its settings by dotted name, and the metrics of the epoch that best.ckpt holds.

    `evaluated` maps the name of a certified accuracy to its radius as configured, `select` is the one that selected.
    """

    name: str
    settings: dict[str, str]
    evaluated: dict[str, str]
    select: str
    split: str
    metrics: dict[str, float]


@dataclass(frozen=True)
class Front:
    """Runs at one radius, best first: columns run, front, clean, certified, and the settings that differ."""

    split: str
    eps: str
    settings: list[str]
    clean: str
    certified: str
    table: pd.DataFrame

    @property
    def explanation(self) -> str:
        return (
            f"accuracy in % on the {SPLITS[self.split]} at the epoch of best.ckpt, certified at l2 radius ε={self.eps} "
            f"from float32 margins (no proof); ★: Pareto-optimal"
        )


def non_dominated(points: np.ndarray) -> np.ndarray:
    """Which points are Pareto-optimal: none is as large in every coordinate and larger in one.

    Args:
        points: (N, D), larger is better.

    >>> non_dominated(np.array([[0.9, 0.5], [0.8, 0.7], [0.8, 0.6], [0.9, 0.5]])).tolist()
    [True, True, False, True]
    """
    others, own = points[None, :, :], points[:, None, :]
    dominates = np.all(others >= own, axis=2) & np.any(others > own, axis=2)
    return ~np.any(dominates, axis=1)


def run_folders(folder: Path) -> list[Path]:
    """Every folder below that a training has written to, or that hydra has made for the job of a sweep.

    Raises:
        DataNotFoundError: no such folder.
    """
    if not folder.is_dir():
        raise DataNotFoundError(f"{folder}: no such folder; expected the output folder of a sweep")
    started = {path.parent for path in folder.rglob("config.yaml")}
    jobs = {job for path in folder.rglob("multirun.yaml") for job in path.parent.iterdir() if job.name.isdigit()}
    return sorted(started | jobs)


def read_run(folder: Path, name: str) -> Run:
    """The run that a folder holds.

    Raises:
        DataError: not finished, or its files are missing or broken.
    """
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
        check_parts(folder / "config.yaml", config)
        (select,) = radii("select_eps", config["select_eps"])
        evaluated = {certified_name(parse_radius(eps)): str(eps) for eps in [select, *radii("eps", config["eps"])]}
        metrics = _logged(folder, resumed=config["resume"] is not None)
        _check_finished(folder, metrics, config["trainer"])
        split = "val" if "val/accuracy" in metrics else "train"
        monitor = certified_name(parse_radius(select))
        rows = metrics[[f"{split}/{metric}" for metric in ("accuracy", *evaluated)]].dropna()
        if rows.empty:
            raise DataError(f"{folder}: its metrics.csv holds no epoch with every accuracy")
        best = rows.loc[rows[f"{split}/{monitor}"].idxmax()]  # of equal ones the first, as best.ckpt
        settings = _flat({key: value for key, value in config.items() if key not in NO_SETTINGS})
    except KeyError as error:
        raise DataError(f"{folder}: its config.yaml or metrics.csv lacks {one_line(error)}") from None
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{folder}: has no {Path(error.filename).name}; the run has not begun, or failed") from None
    except (OSError, OverflowError, RecursionError, TypeError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"{folder}: cannot be read ({one_line(error)})") from None
    if not best.between(0, 1).all():
        raise DataError(f"{folder}: its metrics.csv holds accuracies outside [0, 1]: {best.to_dict()}")
    values = {str(key).partition("/")[2]: float(value) for key, value in best.items()}
    return Run(name, settings, evaluated, monitor, split, values)


def _logged(folder: Path, resumed: bool) -> pd.DataFrame:
    """The rows of metrics.csv; each start has a file of its own, from which a resumed run goes back to epoch 0."""
    versions = sorted(folder.glob("csv/version_*"), key=lambda path: int(path.name.removeprefix("version_")))
    parts: list[pd.DataFrame] = []
    first = math.inf
    for version in reversed(versions) if resumed else versions[-1:]:
        path = version / "metrics.csv"
        if path.is_file():
            part = pd.read_csv(path, dtype=float)
            parts.insert(0, part[part["step"] < first])
            first = min(first, part["step"].min())
            if (part["epoch"] == 0).any():
                break
    if not parts:
        raise DataError(f"{folder}: unfinished, no epoch has ended")
    return pd.concat(parts, ignore_index=True)


def _check_finished(folder: Path, metrics: pd.DataFrame, trainer: Mapping[str, Any]) -> None:
    ended = metrics[metrics["train/loss"].notna()]
    epochs, steps = (0 if ended.empty else int(ended[key].max()) + 1 for key in ("epoch", "step"))
    most_epochs, most_steps = trainer["max_epochs"], trainer["max_steps"]
    if epochs and trainer.get("max_time") is not None:
        return  # whether its time was up is not recorded
    if not (0 <= most_epochs <= epochs or 0 <= most_steps <= steps):
        reached = f"{epochs} of {most_epochs} epochs" if most_epochs >= 0 else f"{steps} of {most_steps} steps"
        resume = hydra_override("resume", folder / "checkpoints" / "last.ckpt")
        raise DataError(f"{folder}: unfinished, {reached}; go on with {resume}")


def _flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted names and values as text; what a part builds stands under the part's own name.

    >>> _flat({"seed": 0, "loss": {"_target_": "liplayers.losses.EMMA", "epsilon": 0.5}})
    {'seed': '0', 'loss': 'EMMA', 'loss.epsilon': '0.5'}
    """
    found: dict[str, str] = {}
    for key, value in node.items():
        if key == "_target_":
            found[prefix.removesuffix(".")] = str(value).rpartition(".")[2]
        elif isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return {printable(key): printable(value) for key, value in found.items()}


def differing(settings: Sequence[Mapping[str, str]]) -> list[str]:
    """The settings that differ between runs which build the same part.

    Two losses differ as `loss`, and not in each setting that only one of them has.

    >>> differing([{"loss": "EMMA", "loss.epsilon": "1", "seed": "0"}, {"loss": "HKR", "loss.hinge": "1", "seed": "0"}])
    ['loss']
    """
    shown = []
    for key in dict.fromkeys(key for one in settings for key in one):
        parts = key.split(".")
        values = defaultdict(set)
        for one in settings:
            built = tuple(one.get(".".join(parts[:n])) for n in range(1, len(parts)))
            values[built].add(one.get(key))
        if any(len(found) > 1 for found in values.values()):
            shown.append(key)
    return shown


def compare(runs: Sequence[Run], eps: str) -> Front:
    """The front of runs that have recorded the same split and this radius."""
    split = runs[0].split
    clean, certified = f"{split}/accuracy", f"{split}/{certified_name(parse_radius(eps))}"
    different = differing([run.settings for run in runs])
    shared = {"run", "front", clean, certified} & set(different)  # names of settings and of other columns
    settings = {f"setting.{key}" if shared else key: key for key in different}
    points = np.array([[run.metrics[name.partition("/")[2]] for name in (clean, certified)] for run in runs])
    columns = {"run": [run.name for run in runs], "front": non_dominated(points), clean: points[:, 0]}
    columns |= {certified: points[:, 1]} | {
        shown: pd.Series([run.settings.get(key) for run in runs], dtype=object) for shown, key in settings.items()
    }
    table = pd.DataFrame(columns).sort_values([certified, clean], ascending=False, kind="stable", ignore_index=True)
    return Front(split, eps, list(settings), clean, certified, table)


def cells(front: Front) -> list[list[str]]:
    """The table as text, its headings first."""
    rows = [["★", "clean", f"ε={front.eps}", *front.settings, "run"]]
    for row in front.table.to_dict("records"):
        accuracies = [f"{100 * row[name]:.2f}" for name in (front.clean, front.certified)]
        settings = [MISSING if row[key] is None else row[key] for key in front.settings]
        rows.append(["★" if row["front"] else "", *accuracies, *settings, row["run"]])
    return rows


def rich_table(front: Front, title: str) -> Table:
    """The table for a terminal, the front in bold."""
    table = Table(title=Text(title, "table.title"), caption=front.explanation)
    headings, *rows = cells(front)
    for place, heading in enumerate(headings):
        number = place in (1, 2)
        table.add_column(Text(heading), justify="right" if number else "left", no_wrap=number, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row), style="bold" if row[0] else None)
    return table


def markdown(front: Front, title: str) -> str:
    """The table under its title, with what it shows."""
    headings, *rows = ([_literal(cell) for cell in row] for row in cells(front))
    lines = [headings, ["---", "--:", "--:", *["---"] * (len(headings) - 3)], *rows]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"# {_literal(title)}\n\n{front.explanation[0].upper()}{front.explanation[1:]}.\n\n{table}"


def _literal(text: str) -> str:
    r"""For Markdown, where what looks like markup would be taken for it.

    >>> print(_literal("a_b|[c](d) *e* <f>"))
    a_b\|\[c\](d) \*e\* \<f\>
    """
    return re.sub(r"([\\`*|\[\]<>]|\b_|_\b)", r"\\\1", text)


def front_figure(front: Front, title: str) -> Figure:
    """Certified over clean accuracy, the front as a line, points labelled by the settings that differ."""
    table = front.table.assign(x=100 * front.table[front.clean], y=100 * front.table[front.certified])
    table["label"] = _labels(front)
    on, off = table[table["front"]].sort_values("x"), table[~table["front"]]
    figure = Figure(figsize=(7.2, 5.4), layout="constrained")
    axes = figure.add_subplot()
    if len(off):
        axes.scatter(off["x"], off["y"], color="#999999", label="dominated")
    axes.plot(on["x"], on["y"], "o-", color="#4477aa", label="front")
    _annotate(axes, on, 1, "#224466")
    if len(table) <= MOST_LABELS:
        _annotate(axes, off, -1, "#777777")
    axes.margins(0.3, 0.25)
    axes.set(
        xlabel=f"clean accuracy (%), {SPLITS[front.split]}",
        ylabel=rf"certified accuracy (%) at $\ell_2$ radius {front.eps}",
    )
    axes.set_title(title, parse_math=False)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _annotate(axes: Axes, points: pd.DataFrame, side: int, color: str) -> None:
    """Labels towards the upper right (side 1) or the lower left (−1), oblique so that those of a row stay apart."""
    for (x, y), labels in points.groupby(["x", "y"])["label"]:  # one for points that coincide
        axes.annotate(
            "\n".join(fill(label, 24, break_long_words=False, break_on_hyphens=False) for label in labels),
            (x, y),
            xytext=(5 * side, 4 * side),
            textcoords="offset points",
            ha="left" if side > 0 else "right",
            va="bottom" if side > 0 else "top",
            rotation=25,
            rotation_mode="anchor",
            fontsize=7,
            color=color,
            in_layout=False,
            parse_math=False,
        )


def _labels(front: Front) -> list[str]:
    """What tells each point from the others: `lr=0.01, seed=1`, or its run where none or many differ."""
    last = {key: key.rpartition(".")[2] for key in front.settings}
    shared = Counter(last.values())
    names = {key: short if shared[short] == 1 else key for key, short in last.items()}
    labels = []
    for row in front.table.to_dict("records"):
        parts = [f"{name}={row[key]}" for key, name in names.items() if row[key] is not None]
        named = bool(parts) and len(names) <= MOST_SETTINGS
        labels.append(", ".join(parts) if named else row["run"])
    return labels


def sweep_front(folder: Path, eps: str | None) -> Front:
    """Read the runs below a folder, name those left out, and compare the others.

    Raises:
        ConfigError: a radius that no run has evaluated, or none is given and the runs select at different ones.
        DataNotFoundError: no such folder, or no finished run in it.
    """
    runs = []
    for path in run_folders(folder):
        try:
            runs.append(read_run(path, printable(path.relative_to(folder).as_posix())))
        except DataError as error:
            say(f"left out: {error}")
    if not runs:
        raise DataNotFoundError(
            f"{folder}: holds no finished run; start a sweep with "
            f"{command('train', '-m', hydra_override('output', folder))} …"
        )
    split = "val" if any(run.split == "val" for run in runs) else "train"
    alike = [run for run in runs if run.split == split]
    eps = _radius(alike, eps)
    compared = [run for run in alike if certified_name(parse_radius(eps)) in run.evaluated]
    for run in runs:
        if run not in alike:
            say(f"left out: {folder / run.name}: recorded no validation accuracy, as other runs did")
        elif run not in compared:
            say(f"left out: {folder / run.name}: evaluated at {', '.join(run.evaluated.values())}, not at {eps}")
    return compare(compared, eps)


def _radius(runs: Sequence[Run], eps: str | None) -> str:
    """The radius as asked for, or the one by which every run has selected its best epoch."""
    if eps is None:
        selected = {run.select: run.evaluated[run.select] for run in runs}
        if len(selected) > 1:
            raise ConfigError(f"the runs select at different radii ({', '.join(selected.values())}); pass --eps")
        return next(iter(selected.values()))
    (checked,) = map(str, radii("--eps", eps))
    known = {name: text for run in runs for name, text in run.evaluated.items()}
    if certified_name(parse_radius(checked)) not in known:
        evaluated = ", ".join(sorted(known.values(), key=parse_radius))
        raise ConfigError(f"--eps={eps}: no run has evaluated this radius; evaluated: {evaluated}")
    return checked


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m liplayers.cli.front` and `liplayers-front`."""
    options = front_options(arguments)
    try:
        front = sweep_front(options.folder, options.eps)
        title = f"{printable(options.folder.resolve().name)}: clean against certified accuracy"
        console.print(rich_table(front, title))
        files = {
            "front.csv": lambda path: front.table.to_csv(path, index=False),
            "front.md": text_writer(markdown(front, title)),
            "front.png": figure_writer(front_figure(front, title)),
        }
        for path in write_outputs(options.folder, files):
            say(path)
    except LipschitzError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(front_command())
