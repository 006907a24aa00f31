"""The tables and pictures, from the result files alone: results.csv, uci.md, cd_<metric>.png, mean.png."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.uci.jobs import METRICS, RADII, Result
from benchmarks.uci.methods import REFERENCE, method_order
from benchmarks.uci.results import read_results
from benchmarks.uci.statistics import (
    average_ranks,
    critical_difference,
    friedman,
    groups,
    pairwise,
    wins_ties_losses,
)
from liplayers.certification.report import figure_writer, write_outputs
from liplayers.errors import DataError

RIVAL = "sll"  # wins, ties, losses and differences are against it
SMALL = 50  # rows; fewer are kept, and listed
COLUMNS = ("set", "method", "fold", "seed", *METRICS, "n_test", "parameters", "bound")
EXPLANATION = f"""\
Accuracies in %, certified at ℓ2 radii of {", ".join(map(str, RADII))} /255 in the units of the features, which are
standardised; means over folds and seeds. Certificates are those of `liplayers.certification.certify`: float64, proven
bounds, the distance of the head's rows for each pair of classes.

Budget: the number of parameters of {REFERENCE}'s model at width {{width}} on the same set; every other method has the
width whose model is nearest to it.

Tests are over sets, with one mean for each set and method: the folds of a set overlap and its seeds share their rows,
so neither are samples of their own. The recipe is one for all methods; rows that validated it in one fold may be test
rows in another. p-values of Wilcoxon's signed-rank test are two-sided, equal scores split, Holm's correction over all
pairs of a table. CD is Nemenyi's critical difference of average ranks at α = 0.05."""


@dataclass(frozen=True)
class Scores:
    """Means over folds and seeds of the sets that every method has.

    Args:
        values: (sets, methods, metrics), accuracies in [0, 1].
        incomplete: sets that lack a method.
    """

    sets: list[str]
    methods: list[str]
    values: np.ndarray
    incomplete: list[str]

    def of(self, metric: str) -> np.ndarray:
        return self.values[:, :, METRICS.index(metric)]


def scores_of(results: Iterable[Result]) -> Scores:
    """Raises DataError where no set has all methods."""
    means = {(r["set"], r["method"]): [np.mean([m[k] for m in r["models"]]) for k in METRICS] for r in results}
    methods = sorted({method for _, method in means}, key=method_order)
    names = sorted({name for name, _ in means})
    sets = [name for name in names if all((name, m) in means for m in methods)]
    if not sets:
        raise DataError("no set has results of every method; run the benchmark first")
    values = np.array([[means[name, m] for m in methods] for name in sets])
    return Scores(sets, methods, values, [name for name in names if name not in sets])


# Text -----------------------------------------------------------------------------------------------------------------


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(headings) + " |", "|---" + "|--:" * (len(headings) - 1) + "|"]
    return ["", *lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def _p(value: float) -> str:
    """
    >>> _p(0.0302), _p(1e-9), _p(float("nan"))
    ('0.030', '<0.001', '–')
    """
    if math.isnan(value):
        return "–"
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _metric_name(metric: str) -> str:
    return "clean accuracy" if metric == "clean" else f"certified accuracy at {metric[1:]}/255"


def _budget(results: Sequence[Result]) -> list[str]:
    reference = {r["set"]: r["parameters"] for r in results if r["method"] == REFERENCE}
    rows = []
    for method in sorted({r["method"] for r in results}, key=method_order):
        own = [r for r in results if r["method"] == method]
        widths = sorted(r["width"] for r in own)
        counts = sorted(r["parameters"] for r in own)
        ratios = sorted((r["parameters"] / reference[r["set"]], r["set"]) for r in own if r["set"] in reference)
        cells = ["–"] * 3
        if ratios:
            mean = np.mean([ratio for ratio, _ in ratios])
            cells = [f"{mean:.4f}", *(f"{ratio:.3f} ({name})" for ratio, name in (ratios[0], ratios[-1]))]
        time = f"{np.mean([r['seconds'] for r in own]):.1f}"
        rows.append([method, f"{widths[0]} – {widths[-1]}", f"{counts[0]} – {counts[-1]}", *cells, time])
    headings = ("method", "width", "parameters", f"mean ratio to {REFERENCE}", "least", "most", "seconds for a set")
    return ["## Budget", *_table(headings, rows)]


def _comparison(scores: Scores, metric: str) -> list[str]:
    values = scores.of(metric)
    ranks, p = average_ranks(values), pairwise(values)
    rival = scores.methods.index(RIVAL) if RIVAL in scores.methods else None
    rows = []
    for j, method in enumerate(scores.methods):
        row = [method, f"{100 * values[:, j].mean():.2f}", f"{ranks[j]:.2f}"]
        if rival is not None:
            row += ["–", "–"] if j == rival else _against(values[:, j], values[:, rival])
        rows.append(row + ["–" if i == j else _p(p[j, i]) for i in range(len(scores.methods))])
    versus = [f"wins / ties / losses against {RIVAL}", f"difference to {RIVAL}, points"] if rival is not None else []
    facts = f"Friedman: p = {_p(friedman(values))}"
    if len(scores.methods) > 1:
        facts += f"; CD = {critical_difference(len(scores.methods), len(scores.sets)):.2f}"
    headings = ["method", "mean", "average rank", *versus, *(f"p, {m}" for m in scores.methods)]
    return [f"## Comparison: {_metric_name(metric)}", "", facts, *_table(headings, rows)]


def _against(own: np.ndarray, other: np.ndarray) -> list[str]:
    return [" / ".join(map(str, wins_ties_losses(own, other))), f"{100 * (own - other).mean():+.2f}"]


def _each_set(scores: Scores, metric: str) -> list[str]:
    rows = [
        [name, *(f"{100 * value:.2f}" for value in row)]
        for name, row in zip([*scores.sets, "**mean**"], [*scores.of(metric), scores.of(metric).mean(0)], strict=True)
    ]
    return [f"## Each set: {_metric_name(metric)}", *_table(["set", *scores.methods], rows)]


def markdown(results: Sequence[Result], scores: Scores) -> str:
    """All tables, and what they depend on."""
    configuration = results[0]["configuration"]
    recipe = ", ".join(f"{key} {value}" for key, value in configuration["recipe"].items())
    small = sorted({f"{r['set']} ({r['samples']})" for r in results if r["samples"] < SMALL})
    not_finite = sorted({f"{r['set']}, {r['method']}" for r in results if any(m["not_finite"] for m in r["models"])})
    lines = ["# Certified classifiers on the UCI sets", "", EXPLANATION.format(width=configuration["width"]), ""]
    folds = sorted({m["fold"] for r in results for m in r["models"]})
    facts = {
        "sets": len(scores.sets),
        "folds × seeds": f"{len(folds)} × {configuration['seeds']}",
        "depth": configuration["depth"],
        "rows certified": configuration["rows"],
        "recipe": recipe,
        "liplayers": configuration["liplayers"],
        "torch": ", ".join(sorted({r["torch"] for r in results})),
        "processor cores": ", ".join(sorted({str(r["cores"]) for r in results})),
        f"sets with fewer than {SMALL} rows": ", ".join(small) or "none",
        "left out, for want of a method": ", ".join(scores.incomplete) or "none",
        "models with logits that are not finite": "; ".join(not_finite) or "none",
    }
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", *_budget(results)]
    for part in (_comparison, _each_set):
        for metric in METRICS:
            lines += part(scores, metric)
    return "\n".join(lines)


# Pictures -------------------------------------------------------------------------------------------------------------


def critical_difference_plot(methods: Sequence[str], ranks: Sequence[float], difference: float, title: str) -> Figure:
    """Average ranks on a line, best to the left; bars join methods that differ by less than the critical difference.

    Source: Demšar 2006, JMLR 7.
    """
    count = len(methods)
    bars = groups(ranks, difference)
    top = 0.5 + 0.25 * len(bars)  # of the first label, below the axis
    half = math.ceil(count / 2)
    height = top + 0.4 * half + 0.1
    figure = Figure(figsize=(7.2, 0.9 + 0.55 * height), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=(0.4, count + 0.6), ylim=(height, -1.4), title=title)
    axes.set_axis_off()
    axes.plot([1, count], [0, 0], color="black", linewidth=1)
    for rank in range(1, count + 1):
        axes.plot([rank, rank], [-0.15, 0], color="black", linewidth=1)
        axes.text(rank, -0.22, str(rank), ha="center", va="bottom", fontsize=9)
    axes.plot([1, 1 + difference], [-0.95, -0.95], color="black", linewidth=1, marker="|")
    axes.text(1 + difference / 2, -1.0, f"CD = {difference:.2f}", ha="center", va="bottom", fontsize=9)
    for place, j in enumerate(np.argsort(ranks, kind="stable")):
        left = place < half
        level = top + 0.4 * (place if left else count - 1 - place)
        end = 0.9 if left else count + 0.1
        axes.plot([ranks[j], ranks[j], end], [0, level, level], color="0.4", linewidth=0.9)
        label = f"{methods[j]}  {ranks[j]:.2f}" if left else f"{ranks[j]:.2f}  {methods[j]}"
        axes.text(
            end + (-0.05 if left else 0.05), level, label, ha="right" if left else "left", va="center", fontsize=9
        )
    for i, (low, high) in enumerate(bars):
        level = 0.3 + 0.25 * i
        axes.plot([low - 0.03, high + 0.03], [level, level], color="black", linewidth=3.5, solid_capstyle="butt")
    return figure


def mean_plot(scores: Scores) -> Figure:
    """Certified accuracy, mean over sets, over the radius; and its difference to the rival's, if that is there."""
    means = 100 * scores.values.mean(0)  # (methods, metrics)
    panels = [("certified accuracy (%)", means)]
    if RIVAL in scores.methods:
        panels.append((f"difference to {RIVAL} (points)", means - means[scores.methods.index(RIVAL)]))
    figure = Figure(figsize=(5.4 * len(panels), 4.2), layout="constrained")
    for axes, (label, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for method, line in zip(scores.methods, values, strict=True):
            axes.plot((0, *RADII), line, marker="o", markersize=4, label=method)
        axes.set(xlabel=r"$\ell_2$ radius · 255, standardised features", ylabel=label, xticks=(0, *RADII))
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.suptitle(f"mean over {len(scores.sets)} sets; radius 0 is clean accuracy")
    return figure


# Files ----------------------------------------------------------------------------------------------------------------


def _write_csv(path: Path, results: Sequence[Result]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        rows.writeheader()
        for result in results:
            for model in result["models"]:
                short = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in model.items()}
                rows.writerow(result | short)


def text_writer(text: str) -> Callable[[Path], None]:
    """A writer of a text file."""

    def write(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    return write


def write_report(folder: Path) -> list[Path]:
    """Write all files of the report from the results in `folder`; their paths.

    Raises:
        DataError: results that cannot be read, that do not belong together, or of which no set is complete.
        OutputError: the folder cannot be written.
    """
    results = read_results(folder)
    scores = scores_of(results)
    writers = {
        "results.csv": lambda path: _write_csv(path, results),
        "uci.md": text_writer(markdown(results, scores)),
        "mean.png": figure_writer(mean_plot(scores)),
    }
    if len(scores.methods) > 1:
        difference = critical_difference(len(scores.methods), len(scores.sets))
        for metric in METRICS:
            title = f"{_metric_name(metric)}: average rank over {len(scores.sets)} sets"
            plot = critical_difference_plot(
                scores.methods, average_ranks(scores.of(metric)).tolist(), difference, title
            )
            writers[f"cd_{metric}.png"] = figure_writer(plot)
    return write_outputs(folder, writers)
