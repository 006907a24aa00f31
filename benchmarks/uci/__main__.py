"""Train and certify several families at one parameter budget on the UCI sets, and compare them.

    python -m benchmarks.uci --root DIR --processes 2             # everything, then the report
    python -m benchmarks.uci --root DIR --sets iris,wine --methods aol,sll
    python -m benchmarks.uci --root DIR --select --seeds 1        # try the grid of recipes on validation rows
    python -m benchmarks.uci --report-only                        # the report once more, from the result files

An interrupted run goes on where it stopped. The recipe that --select finds best is to become the default of
`benchmarks.uci.train.Recipe`, which every run takes that does not say otherwise.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from benchmarks.runs import exit_status
from benchmarks.uci.jobs import Configuration
from benchmarks.uci.methods import METHODS
from benchmarks.uci.report import write_report
from benchmarks.uci.run import plan_jobs, run_jobs
from benchmarks.uci.selection import select_recipe
from benchmarks.uci.train import Recipe
from liplayers.errors import ArgumentError

FOLDER = Path(__file__).parents[1] / "results" / "uci"


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _parser() -> argparse.ArgumentParser:
    recipe, configuration = Recipe(), Configuration()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.uci", description="Compare certified classifiers on the UCI sets."
    )
    add = parser.add_argument
    add("--root", type=Path, metavar="DIR", help="the folder that holds the sets' folders")
    add("--sets", type=_names, metavar="NAME,…", help="default: all in DIR; with --select, every 15th")
    add("--methods", type=_names, metavar="NAME,…", help=f"of {', '.join(METHODS)}; default: all")
    add(
        "--depth",
        type=int,
        default=configuration.depth,
        metavar="N",
        help="layers before the head; default %(default)s",
    )
    add("--width", type=int, default=configuration.width, metavar="N", help="of AOL's model; default %(default)s")
    add("--seeds", type=int, default=configuration.seeds, metavar="N", help="models for each fold; default %(default)s")
    add("--steps", type=int, default=recipe.steps, metavar="N", help="of training; default %(default)s")
    add("--batch-size", type=int, default=recipe.batch_size, metavar="N", help="at most; default %(default)s")
    add("--lr", type=float, default=recipe.lr, metavar="X", help="default %(default)s")
    add("--offset", type=float, default=recipe.offset, metavar="X", help="of the loss; default %(default)s")
    add("--temperature", type=float, default=recipe.temperature, metavar="X", help="of the loss; default %(default)s")
    add("--processes", type=int, default=1, metavar="N", help="of one thread each; default %(default)s: no other")
    add("--output", type=Path, default=FOLDER, metavar="DIR", help="default: benchmarks/results/uci")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--select", action="store_true", help="try a grid of recipes on validation rows")
    what.add_argument("--report-only", action="store_true", help="from the result files in the output folder")
    return parser


def _run(options: argparse.Namespace, progress: Console, console: Console) -> list[Path]:
    if options.report_only:
        return write_report(options.output)
    if options.root is None:
        raise ArgumentError("--root is missing; give the folder that holds the UCI sets")
    recipe = Recipe(
        steps=options.steps,
        batch_size=options.batch_size,
        lr=options.lr,
        offset=options.offset,
        temperature=options.temperature,
    )
    configuration = Configuration(recipe, options.depth, options.width, options.seeds)
    if options.select:
        best, paths = select_recipe(
            options.root, options.output, options.sets, options.methods, configuration, options.processes, progress
        )
        console.print(f"best: {best}", highlight=False, soft_wrap=True)
        return paths
    jobs = plan_jobs(options.root, options.output, options.sets, options.methods, configuration)
    run_jobs(jobs, options.processes, progress)
    return write_report(options.output)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    return exit_status(partial(_run, _parser().parse_args(arguments), Console(stderr=True), Console()))


if __name__ == "__main__":
    sys.exit(main())
