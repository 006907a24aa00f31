"""Checks, before anything is written, that training can go on from a checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from packaging.version import Version
from torch import Tensor, nn

from liplayers.checkpoint import MOST_STEPS, load_tensors
from liplayers.errors import CheckpointError
from liplayers.training.module import CertifiedClassifier

__all__ = ["MovedRun", "check_training_state"]


class MovedRun(L.Callback):
    """Lets a run whose folder was moved or renamed know its best checkpoint, which Lightning keeps by absolute path.

    A run that goes on in another folder than the checkpoint's begins with no best one there.
    """

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        here = Path(trainer.ckpt_path).parent.resolve()  # type: ignore[arg-type]
        if here != Path(trainer.checkpoint_callback.dirpath):  # type: ignore[union-attr]
            return
        for state in checkpoint["callbacks"].values():
            if "best_k_models" in state:
                state["dirpath"] = str(here)
                state["best_k_models"] = {_moved(path, here): score for path, score in state["best_k_models"].items()}
                for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
                    state[key] = _moved(state[key], here)


def _moved(path: str, folder: Path) -> str:
    return str(folder / Path(path).name) if path else path


def check_training_state(path: Path, module: CertifiedClassifier, trainer: L.Trainer) -> None:
    """Rehearse what Lightning will restore, on copies: a file that was damaged or made up may hold anything.

    Args:
        path: the checkpoint, whose weights are known to fit.
        module: the classifier to go on with.
        trainer: the trainer to go on with; its loops are left where the checkpoint is.

    Raises:
        CheckpointError: anything but the weights is missing or does not fit the model, its optimizer and its schedule.
    """
    content = load_tensors(path)
    try:
        Version(content["pytorch-lightning_version"])
        _check_loops(content, trainer)
        _rehearse_step(content, module, trainer.strategy.root_device)
        _check_average(content, module)
        _check_callbacks(content["callbacks"], trainer)
    except Exception as error:  # whatever such a state leads torch and Lightning to
        reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise CheckpointError(f"{path}: training cannot go on from its state ({reason}); train again") from error


def _check_loops(content: dict[str, Any], trainer: L.Trainer) -> None:
    """The counts of epochs, batches and steps: of the right kind, and in agreement with those beside them."""
    state = content["loops"]["fit_loop"]
    _check_kind(state, trainer.fit_loop.state_dict(), "loops.fit_loop")
    trainer.fit_loop.load_state_dict(copy.deepcopy(state))
    counted = trainer.current_epoch, trainer.global_step
    stated = content["epoch"], content["global_step"]
    if counted != stated:
        raise ValueError(f"its loops are at epoch and step {counted}, it says {stated}")


def _check_kind(state: Any, like: Any, name: str) -> None:
    """Raise where a part of a state is of another kind than the same part of another; either may have more."""
    if isinstance(like, dict):
        if not isinstance(state, dict):
            raise TypeError(f"{name} is {state!r:.40}, expected entries")
        for key in like.keys() & state.keys():
            _check_kind(state[key], like[key], f"{name}.{key}")
    elif isinstance(like, bool):
        if not isinstance(state, bool):
            raise TypeError(f"{name} is {state!r:.40}, expected true or false")
    elif isinstance(like, (int, float)):
        kinds = int if name.startswith("loops.") else (int, float)  # a time may begin as 0
        if isinstance(state, bool) or not isinstance(state, kinds) or not 0 <= state <= MOST_STEPS:
            raise TypeError(f"{name} is {state!r:.40}, expected a count")


def _rehearse_step(content: dict[str, Any], module: CertifiedClassifier, device: torch.device) -> None:
    """A step of optimizer and schedule with the states of the checkpoint and arbitrary gradients."""
    model = copy.deepcopy(module.model).to(device)
    optimizer = module.optimizer_factory(model.parameters())
    schedule = module.schedule_factory(optimizer, 1)
    (state,), (rates,) = content["optimizer_states"], content["lr_schedulers"]
    _check_kind(rates, schedule.state_dict(), "lr_schedulers")
    optimizer.load_state_dict(state)
    schedule.load_state_dict(rates)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p)
    optimizer.step()
    schedule.step()
    if not all(p.isfinite().all() for p in model.parameters()):
        raise ValueError("a step of the optimizer leads to NaN or infinity")


def _check_average(content: dict[str, Any], module: nn.Module) -> None:
    """The weights beside their moving average, where there is one."""
    if "current_model_state" not in content and "averaging_state" not in content:
        return
    current, expected = content["current_model_state"], module.state_dict()
    for name in expected.keys() | current.keys():
        if current[name].shape != expected[name].shape:
            raise ValueError(f"current_model_state.{name} is {tuple(current[name].shape)}")
    if not _is_scalar(content["averaging_state"]["n_averaged"]):
        raise TypeError("averaging_state.n_averaged is no count")


def _check_callbacks(states: dict[str, Any], trainer: L.Trainer) -> None:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        state = states.get(callback.state_key)
        if state is None:
            continue
        _check_kind(state, callback.state_dict(), f"callbacks.{callback.state_key}")
        if isinstance(callback, ModelCheckpoint):
            scores = [state["kth_value"], *state["best_k_models"].values()]
            paths = [state[key] for key in ("best_model_path", "kth_best_model_path", "last_model_path")]
            paths += state["best_k_models"]
            if state["best_model_score"] is not None:
                scores.append(state["best_model_score"])
            if not all(map(_is_scalar, scores)) or not all(isinstance(path, str) for path in paths):
                raise TypeError(f"callbacks.{callback.state_key} holds scores that are no numbers")
            if state["best_k_models"] and state["kth_best_model_path"] not in state["best_k_models"]:
                raise ValueError(f"callbacks.{callback.state_key} has no score for its own checkpoint")


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
