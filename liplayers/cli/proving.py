"""From a checkpoint to the certificates of a data set and the report on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from liplayers.certification import Certificates, CertifiedNetwork
from liplayers.checkpoint import Checkpoint
from liplayers.cli.configuration import build, build_data, check_config, plain, unasked
from liplayers.commands.output import console, progress_bar, say
from liplayers.data import DataModule
from liplayers.errors import CheckpointError, ConfigError, UnknownNameError
from liplayers.evaluator import Certification, certify

__all__ = ["Certified", "certify_one"]

PROGRESS_FROM = 2000  # samples; shorter sets are done before a bar is read


@dataclass(frozen=True)
class Certified:
    """One checkpoint, certified, and its data."""

    certification: Certification
    data: DataModule

    @property
    def network(self) -> CertifiedNetwork:
        return self.certification.network

    @property
    def certificates(self) -> Certificates:
        return self.certification.certificates

    @property
    def report(self) -> dict[str, Any]:
        return self.certification.report


def certify_one(
    checkpoint: Checkpoint, cfg: DictConfig, eps: list[float | str], weights: Mapping[str, Tensor] | None = None
) -> Certified:
    """Certify one checkpoint, with the settings `mode`, `device`, `data` and `allow` of `cfg`."""
    device = _device(cfg.device)
    check_config(checkpoint, checkpoint.config, cfg.allow)
    data_config = _data_config(checkpoint, cfg)
    data = build_data(OmegaConf.create({"data": data_config}).data)  # errors name `data.root`
    split = data.split(cfg.data.split)
    if tuple(data.class_names) != checkpoint.class_names:
        raise ConfigError(
            f"{data.name} has the classes {list(data.class_names)[:5]}…, {checkpoint.path} was trained on "
            f"{list(checkpoint.class_names)[:5]}…; certify on the data it was trained for"
        )
    shape, classes = checkpoint.input_shape, len(checkpoint.class_names)
    model = build(OmegaConf.create(checkpoint.model_config), input_shape=shape, num_classes=classes)
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"{checkpoint.path}: its config makes no model; train again")
    checkpoint.load_into(model)
    with console.status("proving the bounds of the layers"):
        network = CertifiedNetwork(model, shape, classes, mode=cfg.mode, device=device, weights=weights)
    with progress_bar("certifying", len(split), shown=len(split) >= PROGRESS_FROM) as progress:
        certification = certify(
            network,
            data,
            eps=eps,
            split=cfg.data.split,
            checkpoint=checkpoint,
            data_config=data_config,
            progress=progress,
        )
    if certification.certificates.not_finite:
        not_finite = certification.certificates.not_finite
        say(f"warning: {not_finite} samples have NaN or infinite logits; they certify nothing")
    return Certified(certification, data)


def _data_config(checkpoint: Checkpoint, cfg: DictConfig) -> dict[str, Any]:
    """The data config of the checkpoint with what the command line changes; by itself it must not write files."""
    config = unasked(checkpoint, checkpoint.config["data"])
    if "augment" in config:
        config["augment"] = []  # not to train with
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
