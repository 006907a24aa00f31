"""The training command."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from liplayers.certification import parse_radius
from liplayers.checkpoint import Checkpoint, load_checkpoint
from liplayers.cli.configuration import build, check_config, integer, one_line, plain, radii
from liplayers.data import DataModule
from liplayers.errors import ConfigError, LipschitzError, OutputError
from liplayers.training import (
    CertifiedClassifier,
    ProgressBar,
    SaveWhenInterrupted,
    SaveWithinEpoch,
    Throughput,
    WeightEMA,
    WholeFileCheckpointIO,
)
from liplayers.training.module import certified_name

GROUPS = ("model", "data", "loss", "optimizer", "schedule", "trainer", "experiment")

console = Console()


def train(cfg: DictConfig) -> dict[str, float]:
    """Train as configured; return the metrics of the last epoch and the best value of the selection metric.

    Writes to the output folder: checkpoints/best.ckpt and last.ckpt, config.yaml, csv/ and tensorboard/ logs.

    Raises:
        LipschitzError: a subclass for each cause, with a message of one line.
    """
    if not isinstance(cfg.output, str):
        raise ConfigError(f"output={cfg.output}: expected one folder")
    output = Path(cfg.output)
    if HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN:
        output = Path(HydraConfig.get().runtime.output_dir)  # one folder for each job
    if cfg.resume is not None:
        cfg = _resumed(cfg, HydraConfig.get().overrides.task if HydraConfig.initialized() else [])
    select, eps = _training_radii(cfg)
    _check_settings(cfg, output)
    _quieten()
    L.seed_everything(cfg.seed, workers=True, verbose=False)

    data = _data(cfg)
    module = CertifiedClassifier(
        model=build(cfg.model, input_shape=data.input_shape, num_classes=data.num_classes),
        loss=build(cfg.loss),
        optimizer=build(cfg.optimizer),
        schedule=build(cfg.schedule),
        input_shape=data.input_shape,
        class_names=data.class_names,
        eps=eps,
        config=plain(cfg),
        channels_last=bool(cfg.channels_last),
    )
    if cfg.compile:
        module.model.compile()
    _try_optimizer(module)
    begun_at = (
        None if cfg.resume is None else _resumed_step(load_checkpoint(cfg.resume), module, cfg.trainer.max_epochs)
    )
    stage = "val" if data.has_validation else "train"  # without a validation split the training samples select
    monitor = f"{stage}/{certified_name(select)}"
    best = ModelCheckpoint(output / "checkpoints", "best", monitor=monitor, mode="max", enable_version_counter=False)
    trainer = _trainer(cfg, output, best, shown={f"{stage}/accuracy": "clean", monitor: f"ε={select:.3g}"})
    data.train_sampler(trainer.world_size)  # before anything is written, raises where a batch cannot be shared
    with _Writing(output):
        _begin(output, module, data.name, monitor)
        trainer.fit(module, datamodule=data, ckpt_path=cfg.resume, weights_only=True)
    if trainer.global_step == begun_at:
        limits = ", ".join(f"trainer.{key}={cfg.trainer.get(key)}" for key in ("max_epochs", "max_steps", "max_time"))
        _say(f"nothing was left to train: {cfg.resume} is at step {begun_at}; to go on raise one of {limits}")
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if best.best_model_score is not None:
        metrics["best"] = float(best.best_model_score)
        _say(f"best {monitor}: {metrics['best']:.4f}")
        _say(f"certify it: python certify.py ckpt={output / 'checkpoints' / 'best.ckpt'}")
    return metrics


def _data(cfg: DictConfig) -> DataModule:
    data = build(cfg.data)
    data.setup()
    if cfg.extra is not None:
        data.mix(build(cfg.extra.data), cfg.extra.share)
    data.on_device = bool(cfg.data_on_device)
    return data


@rank_zero_only
def _say(line: str) -> None:
    console.print(line, soft_wrap=True)


@rank_zero_only  # another process would make a folder of its own, named after the second it started in
def _begin(output: Path, module: CertifiedClassifier, data: str, monitor: str) -> None:
    """Make the output folder and say what is about to happen."""
    output.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(module.config), output / "config.yaml")
    parameters = sum(p.numel() for p in module.model.parameters())
    shape = "×".join(map(str, module.input_shape))
    _say(f"training {parameters:,} parameters on {data} ({shape}), selecting by {monitor}")
    _say(f"writing to {output}")


def _check_settings(cfg: DictConfig, output: Path) -> None:
    """The checks of settings that need no data."""
    integer("seed", cfg.seed)
    if cfg.threads is not None:
        torch.set_num_threads(integer("threads", cfg.threads, least=1))
    if integer("trainer.max_epochs", cfg.trainer.max_epochs) < 1 and cfg.trainer.max_steps < 1:
        raise ConfigError(f"trainer.max_epochs={cfg.trainer.max_epochs}: expected at least 1, or trainer.max_steps")
    checkpoints = output / "checkpoints"
    if cfg.resume is None and not cfg.overwrite and any(checkpoints.glob("*.ckpt")):
        raise OutputError(
            f"{output}: holds the checkpoints of a run; continue it with resume={checkpoints / 'last.ckpt'}, "
            f"choose another output=…, or pass overwrite=true"
        )


def _resumed_step(checkpoint: Checkpoint, module: CertifiedClassifier, max_epochs: int) -> int:
    """The step that a checkpoint is at; raise if its weights do not fit or it began more epochs than are asked for."""
    checkpoint.load_into(module.model)
    if 0 <= max_epochs <= checkpoint.epoch:
        raise ConfigError(
            f"{checkpoint.path} has reached epoch {checkpoint.epoch + 1}, trainer.max_epochs is {max_epochs}; "
            f"set it higher to go on"
        )
    return checkpoint.global_step


def _quieten() -> None:
    """Silence messages of Lightning that a user cannot act on, or that we print ourselves."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # the position in the epoch is not the loader's, as Lightning expects, but read by the sampler
    for noise in (".*LeafSpec.*", ".*exists and is not empty.*", ".*your dataloader is not resumable.*"):
        warnings.filterwarnings("ignore", message=noise)


def _trainer(cfg: DictConfig, output: Path, best: ModelCheckpoint, shown: dict[str, str]) -> L.Trainer:
    """The trainer with its callbacks and loggers; `shown` are the metrics on the progress bar."""
    checkpoints = output / "checkpoints"
    last = ModelCheckpoint(checkpoints, "last", enable_version_counter=False)  # of every epoch, better or not
    callbacks: list[Callback] = [best, last, Throughput()]
    if cfg.ema_decay is not None:
        callbacks.append(WeightEMA(cfg.ema_decay))
    callbacks.append(SaveWhenInterrupted(checkpoints / "interrupted.ckpt"))
    if cfg.save_every_steps is not None:
        callbacks.append(SaveWithinEpoch(checkpoints / "last.ckpt", cfg.save_every_steps))
    if cfg.trainer.enable_progress_bar:
        callbacks.append(ProgressBar({"samples/s": "samples/s", **shown}))
    if cfg.epsilon_ramp is not None:
        callbacks.append(build(cfg.epsilon_ramp, _target_="liplayers.training.EpsilonRamp"))
    loggers = [
        CSVLogger(output, name="csv", flush_logs_every_n_steps=1),
        TensorBoardLogger(output, name="tensorboard"),
    ]
    return build(
        cfg.trainer,
        default_root_dir=str(output),
        callbacks=callbacks,
        logger=loggers,
        plugins=[WholeFileCheckpointIO()],
        enable_model_summary=False,
    )


def _resumed(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The config of the checkpoint to resume, with the single values that were overridden on the command line."""
    checkpoint = load_checkpoint(cfg.resume)
    check_config(checkpoint, checkpoint.config, cfg.allow)
    config = OmegaConf.create(checkpoint.config)
    for key in set(cfg) - set(config):  # settings that are newer than the checkpoint
        config[key] = cfg[key]
    config.resume, config.output = cfg.resume, cfg.output
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key = override.key_or_group
        if key in GROUPS:
            raise ConfigError(
                f"resume takes model, data and the rest from {cfg.resume}; drop {override.input_line}, "
                f"or set single values such as trainer.max_epochs=50"
            )
        OmegaConf.update(config, key, override.value(), force_add=True)
    return config


def _training_radii(cfg: DictConfig) -> tuple[float, list[float]]:
    """The radius that selects, and all radii to log, that one first; two that would share a name are refused."""
    (select,) = map(parse_radius, radii("select_eps", cfg.select_eps))
    eps = dict.fromkeys([select, *map(parse_radius, radii("eps", cfg.eps))])
    names = [certified_name(e) for e in eps]
    if len(set(names)) < len(names):
        raise ConfigError(f"eps={cfg.eps}, select_eps={cfg.select_eps}: two radii agree to six digits; drop one")
    return select, list(eps)


def _try_optimizer(module: CertifiedClassifier) -> None:
    """Build the optimizer once and drop it, so that a bad setting is reported before training begins."""
    try:
        module.optimizer_factory(module.model.parameters())
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer: {one_line(error)}") from None


class _Writing:
    """Turn an OSError about the output folder into one line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError) and not isinstance(error, LipschitzError):
            raise OutputError(
                f"{self.folder}: cannot be written ({error.strerror or error}); choose another with output=…"
            ) from None
