"""The two commands. All of hydra is here: the rest of the package takes plain arguments."""

from __future__ import annotations

import importlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from liplayers.bounds import layer_bounds
from liplayers.certification import Certificates, parse_radius
from liplayers.certification import certify as certify_model
from liplayers.certification import report as reports
from liplayers.checkpoint import Checkpoint, load_checkpoint
from liplayers.errors import ArgumentError, CheckpointError, ConfigError, LipschitzError, OutputError, UnknownNameError
from liplayers.training import CertifiedClassifier, ProgressBar, SaveWhenInterrupted, Throughput
from liplayers.training.module import certified_name

PARTS = ("model", "data", "loss", "optimizer", "schedule", "trainer")
GROUPS = (*PARTS, "experiment")
# the packages whose public names a checkpoint's config may call
TRUSTED = ("liplayers.models", "liplayers.data", "liplayers.losses", "liplayers.training", "torch.optim", "lightning")

NOT_FOR_CERTIFYING: dict[str, Any] = {"download": False, "cache": None, "augment": []}

console = Console()


def config_folder() -> Path:
    """The folder of the configs: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


# ---------------------------------------------------------------------------------------------------------- training


def train(cfg: DictConfig) -> dict[str, float]:
    """Train as configured; return the metrics of the last epoch and the best value of the selection metric.

    Writes to the output folder: checkpoints/best.ckpt and last.ckpt, config.yaml, csv/ and tensorboard/ logs.

    Raises:
        LipschitzError: a subclass for each cause, with a message of one line.
    """
    output = Path(cfg.output)
    if HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN:
        output = Path(HydraConfig.get().runtime.output_dir)  # one folder for each job
    if cfg.resume is not None:
        cfg = _resumed(cfg, HydraConfig.get().overrides.task if HydraConfig.initialized() else [])
    select, eps = _training_radii(cfg)
    if cfg.threads is not None:
        torch.set_num_threads(_integer("threads", cfg.threads, least=1))
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for noise in (".*LeafSpec.*", ".*exists and is not empty.*"):  # not the user's to mend, and said by us already
        warnings.filterwarnings("ignore", message=noise)
    L.seed_everything(_integer("seed", cfg.seed), workers=True, verbose=False)

    data = _build(cfg.data)
    data.setup()
    module = CertifiedClassifier(
        model=_build(cfg.model, input_shape=data.input_shape, num_classes=data.num_classes),
        loss=_build(cfg.loss),
        optimizer=_build(cfg.optimizer),
        schedule=_build(cfg.schedule),
        input_shape=data.input_shape,
        class_names=data.class_names,
        eps=eps,
        config=_plain(cfg),
    )
    if _integer("trainer.max_epochs", cfg.trainer.max_epochs) < 1 and cfg.trainer.max_steps < 1:
        raise ConfigError(f"trainer.max_epochs={cfg.trainer.max_epochs}: expected at least 1, or trainer.max_steps")
    _try_optimizer(module)
    stage = "val" if data.val_fraction else "train"  # without a validation split the training samples select
    monitor = f"{stage}/{certified_name(select)}"
    checkpoints = output / "checkpoints"
    best = ModelCheckpoint(checkpoints, "best", monitor=monitor, mode="max", enable_version_counter=False)
    last = ModelCheckpoint(checkpoints, "last", enable_version_counter=False)  # of every epoch, better or not
    callbacks: list[Callback] = [best, last, SaveWhenInterrupted(checkpoints / "interrupted.ckpt"), Throughput()]
    if cfg.trainer.enable_progress_bar:
        shown = {"images/s": "images/s", "val/accuracy": "clean", f"val/{certified_name(select)}": f"ε={select:.3g}"}
        callbacks.append(ProgressBar(shown))
    if cfg.epsilon_ramp is not None:
        callbacks.append(_build(cfg.epsilon_ramp, _target_="liplayers.training.EpsilonRamp"))
    trainer = _build(
        cfg.trainer,
        default_root_dir=str(output),
        callbacks=callbacks,
        logger=[
            CSVLogger(output, name="csv", flush_logs_every_n_steps=1),
            TensorBoardLogger(output, name="tensorboard"),
        ],
        enable_model_summary=False,
    )
    if cfg.resume is None and not cfg.overwrite and any(checkpoints.glob("*.ckpt")):
        raise OutputError(
            f"{output}: holds the checkpoints of a run; continue it with resume={checkpoints / 'last.ckpt'}, "
            f"choose another output=…, or pass overwrite=true"
        )
    with _Writing(output):
        output.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(cfg, output / "config.yaml")
        parameters = sum(p.numel() for p in module.model.parameters())
        console.print(f"training {parameters:,} parameters on {data.name}, selecting by {monitor}; writing to {output}")
        trainer.fit(module, datamodule=data, ckpt_path=cfg.resume, weights_only=True)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if best.best_model_score is not None:
        metrics["best"] = float(best.best_model_score)
        console.print(f"best {monitor}: {metrics['best']:.4f}, {best.best_model_path}")
        console.print(f"certify it: python certify.py ckpt={best.best_model_path}", soft_wrap=True)
    return metrics


def _resumed(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The config of the checkpoint to resume, with the single values that were overridden on the command line."""
    checkpoint = load_checkpoint(cfg.resume)
    _check_config(checkpoint, checkpoint.config, cfg.allow)
    config = OmegaConf.create(checkpoint.config)
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


def _build(node: DictConfig, **arguments: Any) -> Any:
    """Instantiate a config node; what its target says about bad arguments comes out in one line."""
    try:
        return instantiate(node, **arguments, _convert_="all")
    except HydraException as error:
        cause = error.__cause__
        while cause is not None and not isinstance(cause, LipschitzError):
            cause = cause.__cause__
        if cause is not None:
            raise cause from None
        raise ConfigError(f"{node.get('_target_')}: {_one_line(error.__cause__ or error)}") from None


def _integer(name: str, value: Any, least: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
        raise ConfigError(f"{name}={value!r}: expected an integer{'' if least is None else f' of at least {least}'}")
    return value


def _radii(name: str, value: Any) -> list[float | str]:
    """A list of radii as given, each checked; a single one counts as a list."""
    radii = list(value) if isinstance(value, (list, ListConfig)) else [value]
    for radius in radii:
        try:
            parse_radius(radius)
        except ArgumentError as error:
            raise ArgumentError(f"{name}: {error}") from None
    return radii


def _training_radii(cfg: DictConfig) -> tuple[float, list[float]]:
    """The radius that selects, and all radii to log, that one first; two that would share a name are refused."""
    (select,) = map(parse_radius, _radii("select_eps", cfg.select_eps))
    eps = dict.fromkeys([select, *map(parse_radius, _radii("eps", cfg.eps))])
    names = [certified_name(e) for e in eps]
    if len(set(names)) < len(names):
        raise ConfigError(f"eps={cfg.eps}, select_eps={cfg.select_eps}: two radii agree to six digits; drop one")
    return select, list(eps)


def _check_config(checkpoint: Checkpoint, node: Any, allow: Any) -> None:
    """A checkpoint must not choose what code runs: numbers, strings, lists, dicts, and targets that are known."""
    packages = [allow] if isinstance(allow, str) else list(allow)
    if isinstance(node, dict):
        if "_target_" in node:
            _check_target(checkpoint, str(node["_target_"]), packages)
        for value in node.values():
            _check_config(checkpoint, value, packages)
    elif isinstance(node, list):
        for value in node:
            _check_config(checkpoint, value, packages)
    elif not isinstance(node, (str, int, float, bool, type(None))) or (isinstance(node, str) and "${" in node):
        raise CheckpointError(f"{checkpoint.path}: its config holds {node!r:.80}; expected plain numbers and strings")


def _check_target(checkpoint: Checkpoint, target: str, packages: Sequence[str]) -> None:
    if target.split(".")[0] in packages:
        return
    module, _, name = target.rpartition(".")
    if module in TRUSTED:
        found = getattr(importlib.import_module(module), name, None)
        if callable(found) and getattr(found, "__module__", "").startswith(module):
            return
    raise CheckpointError(
        f"{checkpoint.path}: its config calls {target!r}, which is no part of liplayers; "
        f"if you trust the file, pass allow=[{target.split('.')[0]}]"
    )


def _try_optimizer(module: CertifiedClassifier) -> None:
    """Build the optimizer once for nothing, so that a bad setting is told before the data is looked at for long."""
    try:
        module.optimizer_factory(module.model.parameters())
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer: {_one_line(error)}") from None


def _plain(node: DictConfig) -> Any:
    return OmegaConf.to_container(node, resolve=True)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


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


# -------------------------------------------------------------------------------------------------------- certifying


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
    eps = _radii("eps", cfg.eps if cfg.eps is not None else next(iter(checkpoints.values())).config.get("eps", []))
    single = len(checkpoints) == 1
    output = Path(cfg.output) if cfg.output is not None else _default_output(list(checkpoints.values()), cfg.data.split)

    results: dict[str, Certificates] = {}
    reports_by_name: dict[str, dict[str, Any]] = {}
    written: list[Path] = []
    for name, checkpoint in checkpoints.items():
        results[name], reports_by_name[name] = _certify_one(checkpoint, cfg, eps, device)
        title = f"{reports_by_name[name]['data']['name']}, {cfg.data.split}: {name}"
        written += reports.write_outputs(
            output if single else output / name,
            {
                "report.json": reports.json_writer(reports_by_name[name]),
                "certificates.csv": reports.csv_writer(results[name]),
                "certified_accuracy.png": reports.figure_writer(reports.curve({name: results[name]}, title)),
            },
        )
    data_names = sorted({report["data"]["name"] for report in reports_by_name.values()})
    samples = sorted({len(certificates.label) for certificates in results.values()})
    title = f"{', '.join(data_names)} ({cfg.data.split}, {', '.join(map(str, samples))} samples)"
    if not single:
        summaries = {name: report["results"] for name, report in reports_by_name.items()}
        figure = reports.curve(results, title)
        written += reports.write_outputs(
            output, {"comparison.json": reports.json_writer(summaries), "comparison.png": reports.figure_writer(figure)}
        )
    console.print(reports.results_table(results, eps, title))
    for path in written:
        console.print(str(path), soft_wrap=True)
    return {name: report["results"] for name, report in reports_by_name.items()}


def _certify_one(
    checkpoint: Checkpoint, cfg: DictConfig, eps: list[float | str], device: torch.device
) -> tuple[Certificates, dict[str, Any]]:
    _check_config(checkpoint, checkpoint.config, cfg.allow)
    data_config = _data_config(checkpoint, cfg)
    data = _build(OmegaConf.create(data_config))
    data.setup()
    split = data.split(cfg.data.split)
    if tuple(data.class_names) != checkpoint.class_names:
        raise ConfigError(
            f"{data.name} has the classes {list(data.class_names)[:5]}…, {checkpoint.path} was trained on "
            f"{list(checkpoint.class_names)[:5]}…; certify on the data it was trained for"
        )
    model = _build(
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
        total=len(split),
        console=console,
    )
    if certificates.not_finite:
        console.print(f"warning: {certificates.not_finite} samples have NaN or infinite logits; they certify nothing")
    report = {
        "assumptions": reports.ASSUMPTIONS,
        "checkpoint": {
            "path": str(checkpoint.path),
            "sha256": checkpoint.sha256,
            "epoch": checkpoint.epoch,
            "liplayers": checkpoint.version,
            "config": checkpoint.config,
        },
        "data": {
            "name": data.name,
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
    return certificates, report


def _data_config(checkpoint: Checkpoint, cfg: DictConfig) -> dict[str, Any]:
    """The data config of the checkpoint with what the command line changes; by itself it must not write files."""
    config = dict(checkpoint.config["data"])
    config.update({key: value for key, value in NOT_FOR_CERTIFYING.items() if key in config})
    for key, value in _plain(cfg.data).items():
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
    for path in map(Path, paths):
        folder = path.resolve().parent
        runs.append((folder.parent if folder.name == "checkpoints" else folder).name)
    names = [run if runs.count(run) == 1 else f"{run}-{Path(path).stem}" for run, path in zip(runs, paths, strict=True)]
    return [n if names.count(n) == 1 else f"{n}-{i}" for i, n in enumerate(names)]


def _default_output(checkpoints: Sequence[Checkpoint], split: str) -> Path:
    if len(checkpoints) > 1:
        return Path("runs") / f"comparison-{datetime.now():%Y-%m-%d_%H-%M-%S}"
    folder = checkpoints[0].path.parent
    run = folder.parent if folder.name == "checkpoints" else folder
    return run / f"certify-{checkpoints[0].path.stem}-{split}"


# ---------------------------------------------------------------------------------------------------------- commands


def train_command() -> None:
    """`python train.py` and `liplayers-train`."""
    arguments = sys.argv[1:]
    resume = next((a.partition("=")[2].strip("'\"") for a in arguments if a.startswith("resume=")), None)
    if resume not in (None, "null") and not any(a.startswith(("output=", "hydra.run.dir=")) for a in arguments):
        run = Path(resume).parent
        run = run.parent if run.name == "checkpoints" else run
        sys.argv.append(f"output='{run}'")  # a resumed run goes on in its own folder
    _run("train", train)


def certify_command() -> None:
    """`python certify.py` and `liplayers-certify`."""
    _run("certify", certify)


def _run(config_name: str, task: Callable[[DictConfig], Any]) -> None:
    """Run a task under hydra; an error that we or the user's config caused is one line and exit status 2."""
    asked = os.environ.get("HYDRA_FULL_ERROR")

    def guarded(cfg: DictConfig) -> Any:
        # inside hydra: it would print a heading of its own for exceptions, but lets SystemExit through
        try:
            return task(cfg)
        except (LipschitzError, OmegaConfBaseException) as error:
            if asked == "1":
                raise
            _fail(error)

    guarded.__name__ = config_name
    decorate = hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=config_name)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes hydra raise, so that the message is ours
    try:
        decorate(guarded)()
    except (HydraException, OmegaConfBaseException, OSError) as error:
        if asked == "1":
            raise
        _fail(_config_error(error, config_name))
    finally:
        os.environ.pop("HYDRA_FULL_ERROR")
        if asked is not None:
            os.environ["HYDRA_FULL_ERROR"] = asked


def _fail(error: BaseException) -> None:
    sys.stderr.write(f"error: {_one_line(error)}\n")
    sys.exit(2)


def _config_error(error: Exception, config_name: str) -> Exception:
    """What hydra says about a bad command line, in one line with the nearest known names."""
    if isinstance(error, MissingConfigException):  # an OSError, too
        group, _, name = (error.missing_cfg_file or "").rpartition("/")
        return UnknownNameError.of(f"{group} config", name, error.options or [])
    if isinstance(error, OSError):
        return OutputError(
            f"{error.filename or 'output'}: cannot be written ({error.strerror}); choose another output=…"
        )
    bad_key = re.search(r"Could not override '([^']+)'", str(error))
    if bad_key:
        return UnknownNameError.of("setting", bad_key[1], _known_keys(config_name))
    return ConfigError(_one_line(error))


def _known_keys(config_name: str) -> list[str]:
    """The dotted keys of the default config."""

    def walk(node: Any, prefix: str) -> Iterator[str]:
        for key, value in node.items() if isinstance(node, dict) else ():
            yield prefix + key
            yield from walk(value, f"{prefix}{key}.")

    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        return list(walk(OmegaConf.to_container(hydra.compose(config_name)), ""))
