"""One training recipe for all methods, chosen on validation rows.

Each recipe of a small grid is tried with every method on some of the sets; test rows of a fold are neither trained on
nor looked at. The criterion: clean accuracy and certified accuracy at 36, 72 and 108 /255, averaged with equal weights
over the four, folds and seeds, then sets, then methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks.uci.jobs import METRICS, Configuration
from benchmarks.uci.report import scores_of, text_writer
from benchmarks.uci.results import read_results
from benchmarks.uci.run import Job, known_sets, plan_jobs, run_jobs
from benchmarks.uci.train import Recipe
from liplayers.certification.report import write_outputs

LEARNING_RATES = (0.01, 0.03)
OFFSETS = (0.5, 1.0)
TEMPERATURES = (0.5,)
CRITERION = METRICS[:4]
EVERY = 15  # the sets to choose on, unless they are named: the first in the alphabet and every 15th after it


def grid(recipe: Recipe) -> list[Recipe]:
    """`recipe` with each combination of learning rate, offset and temperature."""
    return [
        replace(recipe, lr=lr, offset=offset, temperature=temperature)
        for lr, offset, temperature in product(LEARNING_RATES, OFFSETS, TEMPERATURES)
    ]


def _folder(output: Path, recipe: Recipe) -> Path:
    return output / "recipes" / f"lr{recipe.lr}_offset{recipe.offset}_temperature{recipe.temperature}"


def select_recipe(
    root: Path,
    output: Path,
    sets: Sequence[str] | None,
    methods: Sequence[str] | None,
    configuration: Configuration,
    processes: int,
    console: Console | None,
) -> tuple[Recipe, list[Path]]:
    """Try the grid, write its table to recipes.md; the best recipe, and the paths.

    Args:
        configuration: the lr, offset and temperature of its recipe, and its rows, do not matter.

    Raises:
        LipschitzError: as `plan_jobs` and `run_jobs`.
    """
    chosen = known_sets(root, sets)[:: EVERY if sets is None else 1]
    recipes = grid(configuration.recipe)
    jobs: list[Job] = []
    for recipe in recipes:
        tried = replace(configuration, recipe=recipe, rows="validation")
        jobs += plan_jobs(root, _folder(output, recipe), chosen, methods, tried)
    run_jobs(sorted(jobs, key=lambda job: -job.cost), processes, console)
    found = [scores_of(read_results(_folder(output, recipe))) for recipe in recipes]
    means = np.array([scores.values[:, :, : len(CRITERION)].mean((0, 2)) for scores in found])  # (recipes, methods)
    best = int(means.mean(1).round(10).argmax())
    text = _table(recipes, means, found[0].methods, found[0].sets, best)
    paths = write_outputs(output, {"recipes.md": text_writer(text)})
    return recipes[best], paths


def _table(recipes: Sequence[Recipe], means: np.ndarray, methods: Sequence[str], sets: Sequence[str], best: int) -> str:
    lines = [
        "# Recipes on validation rows",
        "",
        f"Mean of clean accuracy and certified accuracy at 36, 72 and 108 /255 in %, over folds, seeds and {len(sets)} "
        f"sets: {', '.join(sets)}. The recipe with the best mean over methods is in bold; all methods take it.",
        "",
        f"| lr | offset | temperature | mean | {' | '.join(methods)} |",
        "|--:" * (4 + len(methods)) + "|",
    ]
    for i, (recipe, row) in enumerate(zip(recipes, means, strict=True)):
        mean = f"{100 * row.mean():.2f}"
        cells = [f"{recipe.lr}", f"{recipe.offset}", f"{recipe.temperature}", f"**{mean}**" if i == best else mean]
        lines.append("| " + " | ".join([*cells, *(f"{100 * value:.2f}" for value in row)]) + " |")
    return "\n".join(lines) + "\n"
