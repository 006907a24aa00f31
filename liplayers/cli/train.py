"""The training command."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from liplayers.certification import parse_radius
from liplayers.checkpoint import Checkpoint, load_checkpoint
from liplayers.cli.composing import GROUPS as GROUPS
from liplayers.cli.composing import resumed
from liplayers.cli.configuration import UNASKED, build, build_data, flag, integer, plain, radii, text
from liplayers.commands.output import console, say
from liplayers.commands.quoting import command, hydra_override
from liplayers.data import DataModule
from liplayers.errors import CheckpointError, ConfigError, LipschitzError, OutputError
from liplayers.files import held, whole_file
from liplayers.text import one_line
from liplayers.training import (
    CertifiedClassifier,
    EpochLines,
    LookaheadSync,
    MovedRun,
    ProgressBar,
    SaveWhenInterrupted,
    SaveWithinEpoch,
    Throughput,
    ValidateAtEnd,
    WeightEMA,
    WholeFileCheckpointIO,
    check_training_state,
    keep_freed_memory,
)
from liplayers.training.module import certified_name

__all__ = ["train"]


def train(cfg: DictConfig) -> dict[str, float]:
    """Train as configured; return the metrics of the last epoch and the best value of the selection metric.

    Writes to the output folder: checkpoints/best.ckpt and last.ckpt, config.yaml, csv/ and tensorboard/ logs.

    Raises:
        LipschitzError: a subclass for each cause, with a message of one line.
        Stopped: by Ctrl-C or SIGTERM; checkpoints/interrupted.ckpt is written.
    """
    output = Path(text("output", cfg.output, "one folder"))
    if HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN:
        output = Path(HydraConfig.get().runtime.output_dir)  # one folder for each job
    if cfg.resume is not None:
        cfg = resumed(cfg)
    select, eps = _training_radii(cfg)
    _check_settings(cfg, output)
    _quieten()
    keep_freed_memory()
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
    stage = "val" if _validates(cfg.trainer, data) else "train"  # without validation the training samples select
    monitor = f"{stage}/{certified_name(select)}"
    checkpoints = output / "checkpoints"
    best, validation = _best(checkpoints, monitor), ValidateAtEnd()
    interrupted = checkpoints / "interrupted.ckpt"
    interruption = SaveWhenInterrupted(interrupted, command("train", hydra_override("resume", interrupted)))
    shown = {f"{stage}/accuracy": "clean", monitor: f"ε={select:.3g}"}
    trainer = _trainer(cfg, output, [best, validation, interruption], shown)
    if cfg.resume is not None:
        check_training_state(Path(cfg.resume), module, trainer)
    data.train_sampler(trainer.world_size)  # before anything is written, raises where a batch cannot be shared
    with _writing(output):
        _begin(cfg, output, module, data.name, monitor)
        with _starting(cfg, interruption):
            trainer.fit(module, datamodule=data, ckpt_path=cfg.resume, weights_only=True)
    interruption.raise_if_asked(trainer)
    if stage == "val" and validation.step < trainer.global_step != begun_at:
        _say(f"steps after {validation.step} of {trainer.global_step} were not validated; best.ckpt is of those before")
    if trainer.global_step == begun_at:
        limits = ", ".join(f"trainer.{key}={cfg.trainer.get(key)}" for key in ("max_epochs", "max_steps", "max_time"))
        _say(f"nothing was left to train: {cfg.resume} is at step {begun_at}; to go on raise one of {limits}")
    return _concluded(output, trainer, best)


def _concluded(output: Path, trainer: L.Trainer, best: ModelCheckpoint) -> dict[str, float]:
    """The metrics at the end; says what there is to certify."""
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        _say("trainer.fast_dev_run: nothing is logged and no checkpoint is written")
    if best.best_model_score is not None:
        metrics["best"] = float(best.best_model_score)
        _say(f"best {best.monitor}: {metrics['best']:.4f}")
        _say(f"certify it: {command('certify', hydra_override('ckpt', output / 'checkpoints' / 'best.ckpt'))}")
    return metrics


def _best(folder: Path, monitor: str) -> ModelCheckpoint:
    """Keeps best.ckpt: at validations, or at the end of each epoch where there are none."""
    at_end = None if monitor.startswith("val/") else True
    return ModelCheckpoint(
        folder, "best", monitor=monitor, mode="max", save_on_train_epoch_end=at_end, enable_version_counter=False
    )


def _validates(trainer: DictConfig, data: DataModule) -> bool:
    """Whether there is validation at all; how often, `ValidateAtEnd` makes no matter."""
    return data.has_validation and trainer.get("limit_val_batches") != 0


def _data(cfg: DictConfig) -> DataModule:
    data = build_data(cfg.data)
    data.setup()
    if cfg.extra is not None:
        if not isinstance(cfg.extra, DictConfig) or set(cfg.extra) != {"data", "share"}:
            raise ConfigError(f"extra={cfg.extra}: expected {{data: {{_target_: …}}, share: 0.3}}")
        data.mix(build_data(cfg.extra.data), cfg.extra.share)
    data.on_device = bool(cfg.data_on_device)
    return data


_say = rank_zero_only(say)


@rank_zero_only  # another process would make a folder of its own, named after the second it started in
def _begin(cfg: DictConfig, output: Path, module: CertifiedClassifier, data: str, monitor: str) -> None:
    """Write the config and say what is about to happen."""
    _refuse_earlier_run(cfg, output)  # which may have ended since the command began
    for part in (output / "checkpoints").glob("*.part"):  # of a process that was killed
        part.unlink()
    with whole_file(output / "config.yaml") as path:
        OmegaConf.save(OmegaConf.create(module.config), path)
    parameters = sum(p.numel() for p in module.model.parameters())
    shape = "×".join(map(str, module.input_shape))
    _say(f"training {parameters:,} parameters on {data} ({shape}), selecting by {monitor}")
    _say(f"writing to {output}")


def _check_settings(cfg: DictConfig, output: Path) -> None:
    """The checks of settings that need no data."""
    integer("seed", cfg.seed)
    if cfg.threads is not None:
        torch.set_num_threads(integer("threads", cfg.threads, least=1))
    epochs, steps = (integer(f"trainer.{key}", cfg.trainer[key]) for key in ("max_epochs", "max_steps"))
    if epochs < 1 and steps < 1:
        raise ConfigError(f"trainer.max_epochs={cfg.trainer.max_epochs}: expected at least 1, or trainer.max_steps")
    if cfg.trainer.get("overfit_batches"):
        raise ConfigError("trainer.overfit_batches: our batches come shuffled; use trainer.limit_train_batches")
    for name in ("overwrite", "compile", "channels_last", "data_on_device"):
        flag(name, cfg[name])
    _refuse_earlier_run(cfg, output)


def _refuse_earlier_run(cfg: DictConfig, output: Path) -> None:
    checkpoints = output / "checkpoints"
    if cfg.resume is None and not cfg.overwrite and any(checkpoints.glob("*.ckpt")):
        resume = hydra_override("resume", checkpoints / "last.ckpt")
        raise OutputError(
            f"{output}: holds the checkpoints of a run; continue it with {resume}, "
            f"choose another output=…, or pass overwrite=true"
        )


def _resumed_step(checkpoint: Checkpoint, module: CertifiedClassifier, max_epochs: int) -> int:
    """The step that a checkpoint is at; raise if its weights do not fit or it began more epochs than are asked for."""
    checkpoint.load_into(module.model)
    for key, value in UNASKED.items():
        asked = checkpoint.config["data"].get(key, value)
        if asked != value and module.config["data"].get(key) == value:
            _say(f"data.{key}={asked} of {checkpoint.path} is left out, as it writes files; to have it, give it here")
    if min(checkpoint.epoch, checkpoint.global_step) < 0:
        raise CheckpointError(f"{checkpoint.path}: does not say at which epoch and step it is; train again")
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


def _trainer(cfg: DictConfig, output: Path, callbacks: list[Callback], shown: dict[str, str]) -> L.Trainer:
    """The trainer with its callbacks and loggers; `shown` are the metrics on the progress bar."""
    checkpoints = output / "checkpoints"
    # of every epoch, better or not, validated or not
    last = ModelCheckpoint(checkpoints, "last", save_on_train_epoch_end=True, enable_version_counter=False)
    callbacks = [
        *callbacks,
        last,
        LookaheadSync(),
        Throughput(),
        MovedRun(),
    ]  # the best before the last, which holds what the best is
    if cfg.ema_decay is not None:
        callbacks.insert(0, WeightEMA(cfg.ema_decay))  # first, to put the weights back where training is interrupted
    if cfg.save_every_steps is not None:
        callbacks.append(SaveWithinEpoch(checkpoints / "last.ckpt", cfg.save_every_steps))
    seen = console.is_terminal or console.is_jupyter
    if not seen:
        callbacks.append(EpochLines(_say, shown))
    elif cfg.trainer.enable_progress_bar:
        callbacks.append(ProgressBar({"samples/s": "samples/s", **shown}))
    if cfg.epsilon_ramp is not None:
        callbacks.append(build(cfg.epsilon_ramp, _target_="liplayers.training.EpsilonRamp"))
    loggers = [
        CSVLogger(output, name="csv", flush_logs_every_n_steps=1),
        TensorBoardLogger(output, name="tensorboard"),
    ]
    make = build(cfg.trainer, _partial_=True)  # omegaconf would read more than a name into that of the folder
    try:
        return make(
            default_root_dir=str(output),
            callbacks=callbacks,
            logger=loggers,
            plugins=[WholeFileCheckpointIO()],
            enable_model_summary=False,
            enable_progress_bar=seen and cfg.trainer.enable_progress_bar,
        )
    except Exception as error:  # Lightning raises anything
        raise ConfigError(f"{cfg.trainer._target_}: {one_line(error)}") from error


def _training_radii(cfg: DictConfig) -> tuple[float, list[float]]:
    """The radius that selects, and all radii to log, that one first; two that would share a name are refused."""
    select, *more = map(parse_radius, radii("select_eps", cfg.select_eps))
    if more:
        raise ConfigError(f"select_eps={cfg.select_eps}: expected one radius")
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


@contextmanager
def _starting(cfg: DictConfig, interruption: SaveWhenInterrupted) -> Iterator[None]:
    """What Lightning refuses before training begins is the fault of a setting, or of the checkpoint to go on from."""
    try:
        yield
    except (ValueError, TypeError, MisconfigurationException) as error:
        if interruption.begun or isinstance(error, LipschitzError):
            raise
        if cfg.resume is not None:
            raise CheckpointError(f"{cfg.resume}: training cannot go on from it ({one_line(error)})") from error
        raise ConfigError(f"trainer: {one_line(error)}") from error


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Keep the folder for this training alone, and turn an OSError about it into one line."""
    try:
        if getattr(rank_zero_only, "rank", 0):  # the first process holds it for all
            yield
            return
        folder.mkdir(parents=True, exist_ok=True)
        with held(folder, "training"):
            yield
    except LipschitzError:
        raise
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be written ({error.strerror or error}); choose another with output=…"
        ) from None
