"""What the settings of a command line change: a command's own config or, where it names a checkpoint, that one's."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, ListConfig, OmegaConf

from liplayers.bundles.bundle import load_bundle
from liplayers.checkpoint import Checkpoint, load_checkpoint, run_folder
from liplayers.cli.configuration import DEEPEST, check_config, literal, text, unasked
from liplayers.commands.help import config_folder
from liplayers.errors import ConfigError

__all__ = [
    "GROUPS",
    "NOT_RESUMED",
    "OF_CHECKPOINT",
    "RESUMED",
    "certify_config",
    "refuse_group",
    "resumed",
    "training_config",
]

GROUPS = ("model", "data", "loss", "optimizer", "schedule", "trainer", "experiment")
RESUMED = "resumed_training"
OF_CHECKPOINT = "certify_checkpoint"
NOT_RESUMED = ("hydra", "defaults", "resume", "output", "overwrite", "allow")  # what this command says, not the earlier


def training_config(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The name of the config that the arguments of `train` change, and arguments to add to them."""
    options = get_args_parser().parse_args(list(arguments))
    overrides = _parsed(options.overrides)
    given = {override.key_or_group for override in overrides}
    if "resume" in given:
        resume = _value("train", overrides, "resume")
        if resume is not None:
            allow = _value("train", overrides, "allow") if "allow" in given else []
            _store_resumed(text("resume", resume, "a checkpoint"), allow)
            for override in overrides:
                refuse_group(override, resume)
            return RESUMED, []
    sweep = options.multirun or ("hydra.mode" in given and "MULTIRUN" in str(_value("train", overrides, "hydra.mode")))
    if sweep and not given & {"output", "hydra.sweep.dir"}:
        # the default names the model and data of one job, which a sweep as a whole does not have
        return "train", [f"output=runs/sweep/{datetime.now():%Y-%m-%d_%H-%M-%S}"]
    return "train", []


def certify_config(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The name of the config that the arguments of `certify` change: with all data settings of the checkpoints."""
    overrides = _parsed(get_args_parser().parse_args(list(arguments)).overrides)
    given = {override.key_or_group for override in overrides}
    if not given & {"ckpt", "bundle"} or not any(key.startswith("data.") for key in given):
        return "certify", []
    own = _own("certify")
    for config in _certified_configs(overrides, given):
        own["data"] = dict.fromkeys(filter(lambda key: isinstance(key, str), config["data"])) | own["data"]
    ConfigStore.instance().store(name=OF_CHECKPOINT, node=own)
    return OF_CHECKPOINT, []


def _certified_configs(overrides: Sequence[Override], given: set[str]) -> Iterator[dict[str, Any]]:
    """The configs of the checkpoints and the bundle that are to be certified."""
    if "bundle" in given:
        bundle = _value("certify", overrides, "bundle")
        if bundle is not None:
            yield load_bundle(text("bundle", bundle, "one bundle")).config["config"]
    if "ckpt" in given:
        ckpt = _value("certify", overrides, "ckpt")
        for path in ckpt if isinstance(ckpt, list) else [ckpt]:
            yield load_checkpoint(text("ckpt", path, "a checkpoint or a list of them")).config


def resumed(cfg: DictConfig) -> DictConfig:
    """The config to go on with from `cfg.resume`: `cfg` itself, where `training_config` has seen to it.

    Else it is the checkpoint's, with the output folder of `cfg` and, under hydra, the settings of the command line.
    """
    overrides = []
    if HydraConfig.initialized():
        if HydraConfig.get().job.config_name == RESUMED:
            return cfg
        overrides = _parsed(HydraConfig.get().overrides.task)
    checkpoint = load_checkpoint(text("resume", cfg.resume, "a checkpoint"))
    check_config(checkpoint, checkpoint.config, cfg.allow)
    own = {key: value for key, value in cfg.items() if key in NOT_RESUMED}
    config = OmegaConf.create(_newer(checkpoint, OmegaConf.to_container(cfg, resolve=True)) | own)
    for override in overrides:
        refuse_group(override, cfg.resume)
        OmegaConf.update(config, override.key_or_group, override.value(), force_add=True)
    return config


def refuse_group(override: Override, resume: str) -> None:
    """Raise if an override chooses a whole group of settings, which a resumed run has from its checkpoint."""
    if override.key_or_group in GROUPS:
        raise ConfigError(
            f"resume takes model, data and the rest from {resume}; drop {override.input_line}, "
            f"or set single values such as trainer.max_epochs=50"
        )


def _store_resumed(resume: str, allow: Any) -> None:
    """Make the checkpoint's config one that hydra composes from, under the name RESUMED."""
    checkpoint = load_checkpoint(resume)
    check_config(checkpoint, checkpoint.config, allow)
    own = _own("train")
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        default = OmegaConf.to_container(hydra.compose("train"), resolve=False)
    node = _newer(checkpoint, default) | {key: own[key] for key in NOT_RESUMED}
    # a resumed run goes on in its own folder
    node |= {"defaults": [*_of_hydra(own["defaults"]), "_self_"], "output": literal(str(run_folder(resume)))}
    ConfigStore.instance().store(name=RESUMED, node=node)


def _newer(checkpoint: Checkpoint, default: Any) -> dict[str, Any]:
    """The checkpoint's config with the settings that are newer than it; what writes files is to be asked for anew."""
    data = {key: unasked(checkpoint, checkpoint.config[key]) for key in ("data", "extra") if key in checkpoint.config}
    return default | checkpoint.config | data


def _own(config_name: str) -> Any:
    """A command's file of settings as it stands."""
    return OmegaConf.to_container(OmegaConf.load(config_folder() / f"{config_name}.yaml"), resolve=False)


def _of_hydra(defaults: Sequence[Any]) -> list[Any]:
    """Those entries of a defaults list that choose how hydra itself runs."""
    return [entry for entry in defaults if isinstance(entry, dict) and any("hydra/" in key for key in entry)]


def _parsed(overrides: Sequence[str]) -> list[Override]:
    for override in overrides:
        if max(itertools.accumulate((c in "[{") - (c in "]}") for c in override)) > DEEPEST:  # quoted ones, too
            raise ConfigError(f"{override[:40]}…: nested deeper than {DEEPEST}")
    return OverridesParser.create().parse_overrides(list(overrides))


def _value(config_name: str, overrides: Sequence[Override], key: str) -> Any:
    """What a setting comes to by hydra's grammar and interpolations, whatever else the command line may set."""
    lines = []
    for override in overrides:
        if override.key_or_group == key and override.is_sweep_override():
            raise ConfigError(f"{override.input_line}: expected one value; a sweep cannot be over {key}")
        group = override.key_or_group in GROUPS or "/" in override.key_or_group
        if not (group or override.is_delete() or override.is_sweep_override()):
            lines.append(f"++{(override.input_line or '').lstrip('+')}")
    hydra_config = HydraConfig.instance()
    before = hydra_config.cfg
    try:
        with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
            cfg = hydra.compose(config_name, lines, return_hydra_config=True)
            hydra_config.set_config(cfg)
            value = OmegaConf.select(cfg, key)
            return OmegaConf.to_container(value, resolve=True) if isinstance(value, (DictConfig, ListConfig)) else value
    finally:
        hydra_config.cfg = before
