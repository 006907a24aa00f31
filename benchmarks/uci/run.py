"""Many jobs: one result file for each, in as many processes as asked for.

What is there already is not run again, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.uci.data import read_uci, uci_names
from benchmarks.uci.jobs import Configuration, run_job
from benchmarks.uci.methods import known_methods
from benchmarks.uci.results import check_same, read_results, result_path, write_result
from liplayers.certification.report import write_outputs
from liplayers.core.checks import check_positive
from liplayers.errors import LipschitzError, UnknownNameError


@dataclass(frozen=True)
class Job:
    """A method on a set, where its result goes, and what it will take, in a unit of its own."""

    root: Path
    folder: Path
    name: str
    method: str
    configuration: Configuration
    cost: int

    def run(self) -> None:
        result = run_job(read_uci(self.root, self.name), self.method, self.configuration)
        write_result(self.folder, result)


def known_sets(root: Path, names: Sequence[str] | None) -> list[str]:
    """The sets of these names, all for None.

    Raises:
        UnknownNameError: no set of that name.
        DataNotFoundError: no sets under `root`.
    """
    found = uci_names(root)
    for name in names or ():
        if name not in found:
            raise UnknownNameError.of("UCI set", name, found)
    return [name for name in found if names is None or name in names]


def plan_jobs(
    root: Path, folder: Path, sets: Sequence[str] | None, methods: Sequence[str] | None, configuration: Configuration
) -> list[Job]:
    """The jobs that have no result yet, the largest first.

    Raises:
        DataError: `folder` holds results of another configuration.
        UnknownNameError: no set or method of that name.
        OutputError: the folder cannot be written.
    """
    chosen, names = known_methods(methods), known_sets(root, sets)
    write_outputs(folder / "jobs", {})  # fails now rather than after the first job
    for result in read_results(folder)[:1]:
        check_same(folder, result["configuration"], configuration.record())
    jobs = []
    recipe = configuration.recipe
    for name in names:
        missing = [m for m in chosen if not result_path(folder, name, m).exists()]
        if missing:
            samples = _samples(root, name)
            cost = recipe.steps * (min(recipe.batch_size, samples) + 100) + 10 * samples
            jobs += [Job(root, folder, name, method, configuration, cost) for method in missing]
    return sorted(jobs, key=lambda job: -job.cost)


@cache
def _samples(root: Path, name: str) -> int:
    return len(read_uci(root, name).labels)


def run_jobs(jobs: Sequence[Job], processes: int, console: Console | None) -> None:
    """Run the jobs in `processes` processes of one thread each, or one after another in this one.

    Raises:
        ArgumentError: no process.
        LipschitzError: what a job raised.
    """
    check_positive(run_jobs, processes=processes)
    columns = (TextColumn("{task.fields[done]}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    with Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=console is None
    ) as bar:
        task = bar.add_task("", total=sum(job.cost for job in jobs), done="")
        finished = _in_turn(jobs) if processes == 1 else _in_processes(jobs, processes)
        with closing(finished):
            for i, job in enumerate(finished, 1):
                bar.update(task, advance=job.cost, done=f"{i} of {len(jobs)}: {job.name}, {job.method}")


def _in_turn(jobs: Sequence[Job]) -> Generator[Job, None, None]:
    for job in jobs:
        job.run()
        yield job


def _in_processes(jobs: Sequence[Job], processes: int) -> Generator[Job, None, None]:
    executor = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))
    try:
        with _as_workers_shall_start():
            running: dict[Future[None], Job] = {executor.submit(job.run): job for job in jobs}
        for future in as_completed(running):
            future.result()
            yield running[future]
    except BrokenProcessPool:
        raise LipschitzError(
            "a worker process died, perhaps for want of memory; run again, with --processes 1"
        ) from None
    except BaseException:
        executor.shutdown(wait=False, cancel_futures=True)
        for worker in multiprocessing.active_children():
            worker.terminate()  # what it has written so far is a temporary file
        raise
    executor.shutdown()


@contextmanager
def _as_workers_shall_start() -> Iterator[None]:
    """What processes inherit that start in here: one thread each, and an interrupt is for their parent to act on."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # read when a worker imports torch
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = threads
