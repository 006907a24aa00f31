"""The Lightning module: certified training of a classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from liplayers import checkpoint
from liplayers.bounds import HeadSplit
from liplayers.bounds.composition import head_splitter
from liplayers.certification.radius import certified_radius
from liplayers.core.weights import cached
from liplayers.errors import ConfigError
from liplayers.losses import MarginLoss

__all__ = ["CertifiedClassifier", "certified_name"]


def certified_name(epsilon: float) -> str:
    """The metric's name for a radius.

    >>> certified_name(36 / 255)
    'certified_0.141176'
    """
    return f"certified_{epsilon:.6g}"


def _bound_moves(module: nn.Module) -> bool:
    """Whether a step of the optimizer may change the module's own bound: plain torch layers, a residual's α."""
    return bool(module._parameters) and not getattr(module, "constant_estimate", False)


class _Splitters(dict[bool, Callable[[], HeadSplit]]):
    """The splitters of one model, by whether it trains; a copy has another model and begins without any."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Splitters:
        return _Splitters()

    def __reduce__(self) -> tuple[type[_Splitters], tuple[()]]:
        return _Splitters, ()


class CertifiedClassifier(L.LightningModule):
    """Trains a classifier and logs, for each epoch, loss, clean accuracy, certified accuracy and mean margin.

    The certified accuracies logged here come from float32 margins: they monitor the training and prove nothing. Those
    of training batches take the last bound that was computed, at the start of the epoch or in a validation. They take
    that of every step where the loss needs it, or where there is no validation split, so that they select the
    checkpoint.

    Args:
        model: ends in a linear head (`liplayers.split_head`), or certifies with √2·L.
        loss: forward(logits, target), or a `MarginLoss`.
        optimizer: parameters → optimizer.
        schedule: (optimizer, total_steps) → scheduler that is stepped after every batch.
        input_shape: of one input.
        class_names: in the order of the logits.
        eps: radii to log certified accuracy at.
        config: what rebuilds the model; plain containers, kept in each checkpoint.
        channels_last: whether images are handed to the model with their channels last in memory.

    Raises:
        ConfigError: `channels_last` for inputs that are not images (C, H, W).
        UnknownBoundError: a part of the model without a known bound.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        *,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        schedule: Callable[[Optimizer, int], LRScheduler],
        input_shape: Sequence[int],
        class_names: Sequence[str],
        eps: Sequence[float],
        config: dict[str, Any],
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        if channels_last and len(input_shape) != 3:
            raise ConfigError(
                f"channels_last=true: expected images (C, H, W), got inputs of shape {tuple(input_shape)}"
            )
        self.model = model
        self.loss = loss
        self.optimizer_factory = optimizer
        self.schedule_factory = schedule
        self.input_shape = tuple(input_shape)
        self.class_names = tuple(class_names)
        self.eps = tuple(eps)
        self.config = config
        self.channels_last = channels_last
        self._splitters = _Splitters()
        self._refresh_bound()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def _refresh_bound(self, anew: bool = True) -> None:
        if anew or self.training not in self._splitters:
            self._splitters[self.training] = head_splitter(self.model, self.input_shape, estimates=True)
        self.split = [self._splitters[self.training]()]  # in a list: the head is not a second submodule
        head = self.split[0].head
        self.bound_moves = any(_bound_moves(module) for module in self.model.modules() if module is not head)

    def on_train_start(self) -> None:
        self._refresh_bound()

    def on_train_epoch_start(self) -> None:
        self._refresh_bound()

    def on_validation_epoch_start(self) -> None:
        self._refresh_bound()

    def on_test_epoch_start(self) -> None:
        self._refresh_bound()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._step(batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._step(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._step(batch, "test")

    def _step(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        inputs, labels = batch
        needs_constants = isinstance(self.loss, MarginLoss)
        if self.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        with cached(self.model):
            if stage == "train" and self.bound_moves and (needs_constants or not sum(self.trainer.num_val_batches)):
                self._refresh_bound(anew=False)
            logits = self.model(inputs)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # autocast may have made them bfloat16
            constants = self.split[0].margin_lipschitz(logits.shape[1]).to(logits.device)
        extra = (constants,) if needs_constants else ()
        loss = self.loss(logits, labels, *extra)
        self._log_metrics(stage, loss.detach(), logits.detach().float(), labels, constants.detach().float())
        return loss

    def _log_metrics(self, stage: str, loss: Tensor, logits: Tensor, labels: Tensor, constants: Tensor) -> None:
        correct = (logits.argmax(1) == labels) & logits.isfinite().all(1)
        radius = certified_radius(logits, constants)
        best = logits.topk(2, 1).values
        metrics = {
            "loss": loss,
            "accuracy": correct.float().mean(),
            "margin": torch.where(correct, best[:, 0] - best[:, 1], best[:, 1] - best[:, 0]).mean(),
            **{certified_name(e): (correct & (radius >= e)).float().mean() for e in self.eps},
        }
        shown = {"accuracy", certified_name(self.eps[0])} if self.eps else {"accuracy"}
        for name, value in metrics.items():
            self.log(
                f"{stage}/{name}",
                value,
                on_step=False,
                on_epoch=True,
                prog_bar=name in shown,
                batch_size=len(labels),
                sync_dist=True,
            )

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = self.optimizer_factory(self.model.parameters())
        scheduler = self.schedule_factory(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_load_checkpoint(self, content: dict[str, Any]) -> None:
        if all(p.dim() for p in self.model.parameters()):
            for optimizer in content.get("optimizer_states", ()):
                checkpoint.widen_scalars(optimizer.get("inner", optimizer).get("state", {}))

    def on_save_checkpoint(self, content: dict[str, Any]) -> None:
        content[checkpoint.KEY] = checkpoint.describe(self.config, self.input_shape, self.class_names)
