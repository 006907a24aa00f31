"""The certifying command."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.console import Console

from liplayers.bounds import layer_bounds
from liplayers.certification import Certificates
from liplayers.certification import certify as certify_model
from liplayers.certification import report as reports
from liplayers.checkpoint import Checkpoint, load_checkpoint, run_folder
from liplayers.cli.configuration import build, check_config, plain, radii
from liplayers.errors import ConfigError, UnknownNameError

# what a checkpoint must not make a certification do: fetch or write files, change the inputs
NOT_FOR_CERTIFYING: dict[str, Any] = {"download": False, "cache": None, "augment": []}

console = Console()


def certify(cfg: DictConfig) -> dict[str, Any]:
    """Certify one checkpoint, or compare several; return the summary of each by name.

    Writes report.json, certificates.csv and certified_accuracy.png for each, and for several a common plot.

    Raises:
        LipschitzError: a subclass for each cause, with a message of one line.
    """
    paths = list(cfg.ckpt) if isinstance(cfg.ckpt, ListConfig) else [cfg.ckpt]
    if not paths or not all(isinstance(path, str) for path in paths):
        raise ConfigError(f"ckpt={cfg.ckpt}: expected a checkpoint or a list of them")
    device = _device(cfg.device)
    checkpoints = dict(zip(_names(paths), map(load_checkpoint, paths), strict=True))
    eps = radii("eps", cfg.eps if cfg.eps is not None else next(iter(checkpoints.values())).config.get("eps", []))
    single = len(checkpoints) == 1
    output = Path(cfg.output) if cfg.output is not None else _default_output(list(checkpoints.values()), cfg.data.split)

    results: dict[str, Certificates] = {}
    reports_by_name: dict[str, dict[str, Any]] = {}
    written: list[Path] = []
    for name, checkpoint in checkpoints.items():
        results[name], reports_by_name[name] = _certify_one(checkpoint, cfg, eps, device)
    if len({report["data"]["sha256"] for report in reports_by_name.values()}) > 1:
        raise ConfigError(f"ckpt={list(paths)}: trained for different data; certify them one at a time")
    about = next(iter(reports_by_name.values()))["data"]
    data_name, unit = about["name"], about["unit"]
    for name in checkpoints:
        title = f"{data_name} ({cfg.data.split})"
        written += reports.write_outputs(
            output if single else output / name,
            {
                "report.json": reports.json_writer(reports_by_name[name]),
                "certificates.csv": reports.csv_writer(results[name]),
                "certified_accuracy.png": reports.figure_writer(reports.curve({name: results[name]}, title, unit)),
            },
        )
    samples = len(next(iter(results.values())).label)
    title = f"{data_name} ({cfg.data.split}, {samples} samples)"
    if not single:
        summaries = {name: report["results"] for name, report in reports_by_name.items()}
        figure = reports.curve(results, title, unit)
        written += reports.write_outputs(
            output, {"comparison.json": reports.json_writer(summaries), "comparison.png": reports.figure_writer(figure)}
        )
    console.print(reports.results_table(results, eps, title, unit))
    for name, report in reports_by_name.items():
        if "units" in report:
            console.print(reports.units_table(report["units"], f"{name} in original units"))
    for path in written:
        console.print(str(path), soft_wrap=True)
    return {name: report["results"] for name, report in reports_by_name.items()}


def _certify_one(
    checkpoint: Checkpoint, cfg: DictConfig, eps: list[float | str], device: torch.device
) -> tuple[Certificates, dict[str, Any]]:
    check_config(checkpoint, checkpoint.config, cfg.allow)
    data_config = _data_config(checkpoint, cfg)
    data = build(OmegaConf.create(data_config))
    data.setup()
    split = data.split(cfg.data.split)
    if tuple(data.class_names) != checkpoint.class_names:
        raise ConfigError(
            f"{data.name} has the classes {list(data.class_names)[:5]}…, {checkpoint.path} was trained on "
            f"{list(checkpoint.class_names)[:5]}…; certify on the data it was trained for"
        )
    model = build(
        OmegaConf.create(checkpoint.config["model"]),
        input_shape=checkpoint.input_shape,
        num_classes=len(checkpoint.class_names),
    )
    checkpoint.load_into(model)
    certificates, head_split = certify_model(
        model.to(device),
        data.eval_loader(cfg.data.split),
        input_shape=checkpoint.input_shape,
        num_classes=len(checkpoint.class_names),
        input_range=data.input_range,
        total=len(split),
        console=console,
    )
    if certificates.not_finite:
        console.print(f"warning: {certificates.not_finite} samples have NaN or infinite logits; they certify nothing")
    report = {
        "assumptions": reports.assumptions(data.unit),
        "checkpoint": {
            "path": str(checkpoint.path),
            "sha256": checkpoint.sha256,
            "epoch": checkpoint.epoch,
            "liplayers": checkpoint.version,
            "config": checkpoint.config,
        },
        "data": {
            "name": data.name,
            "unit": data.unit,
            "split": cfg.data.split,
            "sha256": data.fingerprint(cfg.data.split),
            "config": data_config,
        },
        "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
        "dtype": "float64",
        "environment": reports.environment(),
        "lipschitz": {
            "body": head_split.body_bound,
            "head": None if head_split.head is None else type(head_split.head).__name__,
            "layers": layer_bounds(model, checkpoint.input_shape),
        },
        "results": reports.summary(certificates, eps),
    }
    if data.scaling is not None and data.scaling.std is not None:
        report |= reports.original_units(
            data.scaling.names, data.scaling.mean, data.scaling.std, certificates.mean_radius
        )
    return certificates, report


def _data_config(checkpoint: Checkpoint, cfg: DictConfig) -> dict[str, Any]:
    """The data config of the checkpoint with what the command line changes; by itself it must not write files."""
    config = dict(checkpoint.config["data"])
    config.update({key: value for key, value in NOT_FOR_CERTIFYING.items() if key in config})
    for key, value in plain(cfg.data).items():
        if key == "split" or value is None:
            continue
        if key not in config:
            raise UnknownNameError.of(f"data setting of {checkpoint.path}", key, config)
        config[key] = value
    return config


def _device(name: str) -> torch.device:
    if name not in ("cpu", "cuda"):
        raise UnknownNameError.of("device", name, ["cpu", "cuda"])
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: torch finds no CUDA device here; use device=cpu")
    return torch.device(name)


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
