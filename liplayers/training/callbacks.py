"""Callbacks of certified training."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar

from liplayers.errors import ArgumentError, ConfigError
from liplayers.losses import MarginLoss


class ProgressBar(RichProgressBar):
    """Lightning's bar with samples per second and the validation metrics under short names, fit for 80 columns.

    Args:
        metrics: name of a logged metric → the name it is shown under.
    """

    def __init__(self, metrics: dict[str, str]) -> None:
        super().__init__()
        self._short = metrics

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        logged = trainer.progress_bar_metrics
        return {short: f"{logged[name]:.4g}" for name, short in self._short.items() if name in logged}


class SaveWhenInterrupted(L.Callback):
    """Writes a checkpoint that resumes when training ends by Ctrl-C, SIGTERM or an exception.

    The first Ctrl-C waits for the batch to end: an exception between two arbitrary lines may be lost in a callback, or
    leave the optimizer half stepped. The second ends at once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._asked = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._ask)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._previous)

    def _ask(self, number: int, frame: Any) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        print("\nstopping after this batch; Ctrl-C again stops at once", flush=True)

    def _stop_if_asked(self) -> None:
        if self._asked:
            raise KeyboardInterrupt

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._stop_if_asked()

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._stop_if_asked()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        trainer.save_checkpoint(self.path)
        print(
            f"\nstopped in epoch {trainer.current_epoch + 1}; to go on: python train.py resume={self.path}", flush=True
        )


class Throughput(L.Callback):
    """Logs the training throughput in samples per second, on the progress bar and for each epoch."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start, self._samples = time.perf_counter(), 0  # a run that resumes within an epoch does not start one

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start, self._samples = time.perf_counter(), 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._samples += len(batch[0])
        rate = self._samples / (time.perf_counter() - self._start)
        pl_module.log("samples/s", rate, prog_bar=True, on_step=True, on_epoch=False, logger=False)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        rate = self._samples / (time.perf_counter() - self._start)
        pl_module.log("train/samples_per_second", rate)


class EpsilonRamp(L.Callback):
    r"""Raises the radius of an EMMA-type loss: ε(t) = ε_max·(start + (1 − start)·min(t/(share·E), 1)), t in epochs.

    With epsilon 108/255, start 1/30 and share 1/2 it is BRONet's 36/255·(0.1 + 2.9·min(2t/E, 1)).

    Args:
        epsilon: ε_max.
        start: share of ε_max at the first epoch.
        share: of the epochs after which ε_max is reached.

    Source: Lai et al. 2025, arXiv 2505.15174.
    """

    def __init__(self, epsilon: float, start: float = 1 / 30, share: float = 0.5) -> None:
        if not (epsilon > 0 and 0 < start <= 1 and 0 < share <= 1):
            raise ArgumentError(
                f"EpsilonRamp: epsilon={epsilon}, start={start}, share={share}; expected epsilon > 0, shares in (0, 1]"
            )
        self.epsilon, self.start, self.share = epsilon, start, share

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loss = pl_module.loss
        if not isinstance(loss, MarginLoss):
            raise ConfigError(f"EpsilonRamp needs a loss with an epsilon (emma, logit_annealing); got {loss}")
        if not trainer.max_epochs or trainer.max_epochs < 1:
            raise ConfigError(f"EpsilonRamp: trainer.max_epochs={trainer.max_epochs}; expected the number of epochs")
        reached = min(1.0, trainer.current_epoch / (self.share * trainer.max_epochs))
        loss.epsilon = self.epsilon * (self.start + (1 - self.start) * reached)
