"""The certifying command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from liplayers.bundles.bundle import load_bundle
from liplayers.certification import report as reports
from liplayers.checkpoint import Checkpoint, load_checkpoint, run_folder
from liplayers.cli.audit import audit
from liplayers.cli.configuration import flag, integer, radii, text
from liplayers.cli.proving import Certified, certify_one
from liplayers.cli.verify import verify
from liplayers.commands.output import console, say
from liplayers.errors import ConfigError

__all__ = ["certify", "write_and_print"]


def certify(cfg: DictConfig) -> dict[str, Any]:
    """Certify one checkpoint, or compare several, or a bundle; return the summary of each by name.

    With `verify`, compute a report again instead; with `audit`, also attack what was certified.

    Writes report.json, certificates.csv, certified_accuracy.png and network.pt for each, and for several a common plot.

    Raises:
        LipschitzError: a subclass for each cause, with a message of one line.
    """
    if cfg.bundle is not None and not OmegaConf.is_missing(cfg, "ckpt"):
        raise ConfigError(f"bundle={cfg.bundle} and ckpt={cfg.ckpt}: give one of them")
    if cfg.verify is not None:
        return {"verified": len(verify(cfg).certificates.label)}
    bundle = None if cfg.bundle is None else load_bundle(text("bundle", cfg.bundle, "one bundle"))
    weights = None if bundle is None or cfg.mode != "proof" else bundle.frozen
    checkpoints = _checkpoints(cfg) if bundle is None else {bundle.name: bundle.checkpoint()}
    eps = radii("eps", cfg.eps if cfg.eps is not None else next(iter(checkpoints.values())).config.get("eps", []))
    if not eps:  # a report is about radii, and verify takes one without any for damaged
        raise ConfigError("eps=[]: expected at least one radius, such as eps=[0.5,36/255]")
    output = _default_output(list(checkpoints.values()), cfg.data.split)
    if bundle is not None:
        output = Path("runs") / f"{bundle.name}-certify-{cfg.data.split}"
    if cfg.output is not None:
        output = Path(text("output", cfg.output, "one folder"))
    if flag("audit", cfg.audit):
        integer("audit_samples", cfg.audit_samples, least=1)
        if cfg.mode != "proof":
            raise ConfigError(f"audit=true needs mode=proof, got mode={cfg.mode}: other figures are not proofs")
    done = {name: certify_one(checkpoint, cfg, eps, weights) for name, checkpoint in checkpoints.items()}
    if len({one.report["data"]["sha256"] for one in done.values()}) > 1:
        raise ConfigError(f"ckpt={list(cfg.ckpt)}: trained for different data; certify them one at a time")
    write_and_print(done, output, eps)
    for name, one in done.items() if cfg.audit else ():
        audit(name, one, cfg.audit_samples, eps, output if len(done) == 1 else output / name)
    return {name: one.report["results"] for name, one in done.items()}


def _checkpoints(cfg: DictConfig) -> dict[str, Checkpoint]:
    """Those of `cfg.ckpt`, by name."""
    paths = list(cfg.ckpt) if isinstance(cfg.ckpt, ListConfig) else [cfg.ckpt]
    if not paths:
        raise ConfigError(f"ckpt={cfg.ckpt}: expected a checkpoint or a list of them")
    for path in paths:
        text("ckpt", path, "a checkpoint or a list of them")
    return dict(zip(_names(paths), map(load_checkpoint, paths), strict=True))


def write_and_print(done: Mapping[str, Certified], output: Path, eps: list[float | str]) -> None:
    """The files and the table of one result, or of several with their comparison."""
    first = next(iter(done.values()))
    about = first.report["data"]
    title, unit = f"{about['name']} ({about['split']})", about["unit"]
    written: list[Path] = []
    for name, one in done.items():
        files = one.certification.writers(name)
        written += reports.write_outputs(output if len(done) == 1 else output / name, files)
    results = {name: one.certificates for name, one in done.items()}
    if len(done) > 1:
        summaries = {name: one.report["results"] for name, one in done.items()}
        figure = reports.curve(results, title, unit)
        written += reports.write_outputs(
            output, {"comparison.json": reports.json_writer(summaries), "comparison.png": reports.figure_writer(figure)}
        )
    samples = len(first.certificates.label)
    console.print(reports.results_table(results, eps, f"{about['name']} ({about['split']}, {samples} samples)", unit))
    for name, one in done.items():
        say(reports.proof_line(one.report))
        if "units" in one.report:
            console.print(reports.units_table(one.report["units"], f"{name} in original units"))
    for path in written:
        say(path)


def _names(paths: Sequence[str]) -> list[str]:
    """A distinct name for each checkpoint: its run folder, with the file's name where that is not enough."""
    runs = []
    for path in paths:
        run = run_folder(Path(path).resolve())
        runs.append(f"{run.parent.name}-{run.name}" if run.name.isdigit() else run.name)  # a job of a sweep
    names = [run if runs.count(run) == 1 else f"{run}-{Path(path).stem}" for run, path in zip(runs, paths, strict=True)]
    return [n if names.count(n) == 1 else f"{n}-{i}" for i, n in enumerate(names)]


def _default_output(checkpoints: Sequence[Checkpoint], split: str) -> Path:
    if len(checkpoints) > 1:
        return Path("runs") / f"comparison-{datetime.now():%Y-%m-%d_%H-%M-%S}"
    return run_folder(checkpoints[0].path) / f"certify-{checkpoints[0].path.stem}-{split}"
